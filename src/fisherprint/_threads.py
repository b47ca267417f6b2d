"""How many threads a computation may use: all cores of this process, or one inside a worker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from threadpoolctl import threadpool_limits

_alone: ContextVar[bool] = ContextVar("alone", default=True)

# The limit of linear algebra is one for the whole process, so overlapping blocks share it. Only
# the thread that set it can lift it, hence a thread that does nothing but hold it.
_lock = threading.Lock()
_inside = 0
_release = threading.Event()
_holder = threading.Thread()


def usable() -> int:
    """Threads for compiled code: the cores of this process, or 1 inside `one_thread`."""
    if not _alone.get():
        return 1
    # Not all cores of the machine in a job or a container.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """A block in which this worker computes with one thread: our kernels and linear algebra.

    Several workers then fill the cores without getting in each other's way, and sums are rounded
    in one order, whatever the number of cores.
    """
    global _inside, _release, _holder
    with _lock:
        if _inside == 0:
            held, _release = threading.Event(), threading.Event()
            _holder = threading.Thread(target=_hold, args=(held, _release), daemon=True)
            _holder.start()
            held.wait()
        _inside += 1
    token = _alone.set(False)
    try:
        yield
    finally:
        _alone.reset(token)
        with _lock:
            _inside -= 1
            if _inside == 0:
                _release.set()
                _holder.join()


def _hold(held: threading.Event, release: threading.Event) -> None:
    try:
        with threadpool_limits(1, user_api="blas"):
            held.set()
            release.wait()
    finally:
        held.set()
