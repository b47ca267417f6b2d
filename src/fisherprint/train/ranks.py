"""Several processes that train one network, by torch's distributed data parallel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fisherprint.network import Network
from fisherprint.train.config import TrainingConfig

Layers = Callable[[Tensor, torch.dtype], Tensor]
"""`Network.from_features`, or the same compiled."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train one network; by default it is the only one.

    All processes hold all data and draw the same order, M0 and noise; of each batch a process
    takes rows of its own. Only gradients and a few sums travel, and the steps are those of one
    process but for the order in which sums are rounded.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: that this process is meant to train on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    def rows(self, n: int) -> slice:
        """Those of n rows that are this process's: a part in one piece, equal to within one."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def parallel(self, network: Network) -> Callable[[Layers, Tensor, torch.dtype], Tensor]:
        """Calls layers of the network so that slopes become their mean over the processes.

        All processes begin with the weights of the first.
        """
        if self.size == 1:
            return lambda layers, x, products: layers(x, products)
        return DistributedDataParallel(_Called(network))

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes, in all of them."""
        if self.size > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return value

    def whole(self, part: Tensor, n: int) -> Tensor:
        """All n rows in all processes, where each gives its `rows`."""
        if self.size == 1:
            return part
        full = part.new_zeros(n, *part.shape[1:])
        full[self.rows(n)] = part
        return self.sum(full)

    def first(self, action: Callable[[], object]) -> None:
        """Let the first process do something while the others wait, before and after."""
        self._wait()
        if self.rank == 0:
            action()
        self._wait()

    def require_shares(self, size: int, config: TrainingConfig) -> None:
        """Refuse a training on so many fingerprints that cannot be shared.

        Raises:
            ValueError: a last batch with fewer fingerprints than processes, or batch
                normalization in several.
        """
        if self.size > 1 and config.normalization == "batch":
            raise ValueError(
                f"expected group normalization in {self.size} processes; got batch, whose mean "
                "and spread would be those of each process's share. Train it in one process."
            )
        last = size % config.fingerprints or config.fingerprints
        if last < self.size:
            raise ValueError(
                f"expected a fingerprint for each of {self.size} processes in every batch; got "
                f"{size} fingerprints in batches of {config.fingerprints}, the last of {last}. "
                "Change batch_size, or start fewer processes."
            )

    def require_same(self, values: Mapping[str, object]) -> None:
        """Refuse to go on where processes differ in what they begin with.

        Raises:
            ValueError: in all processes, with the names of the values that differ.
        """
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, dict(values))
        unlike = [name for name in values if any(other[name] != found[0][name] for other in found)]
        if unlike:
            listed = "; ".join(f"{name} {[other[name] for other in found]}" for name in unlike)
            raise ValueError(
                f"expected all {self.size} processes to begin with the same; got by process: "
                f"{listed}. Give them one run folder on a file system that they share, and GPUs "
                "of one kind."
            )

    def _wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


ALONE = Ranks()


def alone() -> Ranks:
    """The only process, on the GPU if there is one that torch can use, else on the CPU."""
    return Ranks(device=torch.device("cuda")) if torch.cuda.is_available() else ALONE


@contextlib.contextmanager
def together() -> Iterator[Ranks]:
    """This process among those that torchrun started with it; `alone()` if it did not.

    Each has a GPU of its own where there are GPUs, and nccl between them; CPUs have gloo.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
    """
    if not distributed.is_torchelastic_launched():
        yield alone()
        return
    device = _CPU
    if torch.cuda.is_available():
        here, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > there:
            raise ValueError(
                f"expected a GPU for each process; got {here} processes and {there} GPUs on this "
                f"machine. Start torchrun with --nproc-per-node {there}."
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        distributed.init_process_group("nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    # Not after an error: the others may never answer, and torchrun ends them.
    distributed.destroy_process_group()


class _Called(nn.Module):
    """What torch's wrapper asks for: a module that is called, with the network's weights.

    Without its buffers: they are constants, and would be sent in each step.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.weights = nn.ParameterList(network.parameters())

    def forward(self, layers: Layers, x: Tensor, products: torch.dtype) -> Tensor:
        return layers(x, products)
