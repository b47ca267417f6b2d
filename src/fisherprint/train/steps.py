"""What goes with steps: their recording on a GPU, and the mean of their weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from fisherprint.network import Network
from fisherprint.train.augmentation import Tensors

# Before a recording, torch's libraries want to have done the same a few times.
_WARM_UP = 3


class Recorded:
    """A step that a GPU repeats from a recording, a CUDA graph (decision 045).

    A step is some hundred short kernels, and Python starts them more slowly than a GPU computes
    them. From the fourth step on they are started all at once. What differs from step to step
    must be in the batch or in tensors that stay where they are; nothing may be read from the GPU.

    Args:
        step: works on a batch by changing tensors in place; batches all have the same shapes.
    """

    def __init__(self, step: Callable[[Tensors], None]) -> None:
        self._step = step
        self._steps = 0
        self._graph = torch.cuda.CUDAGraph()
        self._batch: list[Tensor] = []

    def __call__(self, batch: Tensors) -> None:
        """Make one step."""
        self._steps += 1
        if self._steps <= _WARM_UP:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch lacks it
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return
        if not self._batch:
            self._batch = [part.clone() for part in batch]
            with torch.cuda.graph(self._graph):
                self._step(self._batch)
        for recorded, part in zip(self._batch, batch, strict=True):
            recorded.copy_(part)
        self._graph.replay()


class Mean:
    """The mean of the weights of all steps, or of about the last N (decision 044).

    Step n moves it by 1/min(n, N) of the way to the weights after that step.

    Attributes:
        network: with these weights; at first those of the network whose weights are averaged.

    Args:
        network: its weights are trained in place.
        steps: N.
    """

    def __init__(self, network: Network, steps: int) -> None:
        self.network = copy.deepcopy(network)
        self._steps = steps
        state, mean = network.state_dict(), self.network.state_dict()
        moving = [name for name, tensor in mean.items() if tensor.is_floating_point()]
        self._mean = [mean[name] for name in moving]
        self._weights = [state[name] for name in moving]
        # Whether and how often, which have no mean.
        self._rest = [(mean[name], state[name]) for name in mean.keys() - set(moving)]

    def move(self, step: int) -> None:
        """Take in the weights after a step, counted from 1."""
        torch._foreach_lerp_(self._mean, self._weights, 1 / min(step, self._steps))
        for last, tensor in self._rest:
            last.copy_(tensor)
