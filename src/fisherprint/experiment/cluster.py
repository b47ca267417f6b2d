"""Who computes: threads of this process, or the workers of a Dask cluster."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from fisherprint import _threads

# Seconds to wait for a scheduler.
_PATIENCE = 10


class Workers(NamedTuple):
    """An executor, and how many tasks it computes at once."""

    executor: Executor
    number: int


@contextmanager
def workers(number: int | None = None, scheduler: str | None = None) -> Iterator[Workers]:
    """Local threads, or a Dask cluster.

    Args:
        number: of local threads; the cores of this process if None.
        scheduler: address of a Dask scheduler, such as tcp://host:8786, instead.

    Raises:
        ValueError: both are given, or a number below 1.
        ImportError: Dask is not installed.
        OSError: nobody answers at the address, there is no worker, or workers died with a task
            time and again.
    """
    if number is not None and scheduler is not None:
        raise ValueError(
            f"expected a number of local workers or a scheduler; got {number} and {scheduler}. "
            "A scheduler has workers of its own: drop one."
        )
    if scheduler is None:
        if number is not None and number < 1:
            raise ValueError(f"expected at least 1 worker; got {number}. Leave it out for all.")
        count = number or _threads.usable()
        with ThreadPoolExecutor(count) as pool:
            yield Workers(pool, count)
        return
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ImportError(
            "expected Dask for --scheduler; it is not installed. Install it: "
            'pip install "fisherprint[cluster]"'
        ) from error
    try:
        client = Client(scheduler, timeout=_PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        raise OSError(
            f"expected a Dask scheduler at {scheduler}; got no answer ({error}). Start one with "
            "`dask scheduler`, and give its address as tcp://host:8786."
        ) from error
    with client:
        threads = sum(client.nthreads().values())
        if threads == 0:
            raise OSError(
                f"expected workers at {scheduler}; the scheduler has none. Start some with "
                f"`dask worker {scheduler}`."
            )
        try:
            yield Workers(client.get_executor(), threads)
        except KilledWorker as error:
            raise OSError(
                "expected workers that finish a shard; several died with the same one, perhaps "
                f"for want of memory ({error}). Give them more and repeat the command: finished "
                "shards are kept."
            ) from error
