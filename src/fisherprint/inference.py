"""The layers of a trained network as a fast function of many voxels, on the CPU (decision 027).

The 14 layers of `Network.forward`, in another order of the same sums:

- Subtracting the mean of each group is linear: it moves from normalization into the weights and
  biases before it. What normalization leaves is a division by the root mean square.
- A few hundred voxels at a time go through all layers, so that their activations stay in the
  cache; bias, skip connection, normalization and ReLU read and write them once, in the precision
  of the products before and after.
- Each core has voxels of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional

from fisherprint import _threads

Floats = NDArray[np.float32]
Rows = NDArray[np.float32 | np.uint16]
"""In float32, or the bits of bfloat16, the upper half of those of float32, as uint16."""
Precision = Literal["float32", "bfloat16"]

# Voxels at once: their activations, 3 MB in the widest layer, stay in the cache of a core.
_CHUNK = 768
# Layers whose widths both reach this do four fifths of all multiplications, in the middle of the
# network. Rounding to 8 bits hurts in those before and after them.
_ROUNDED = 512

# Fused multiply-add, and sums in any order; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


def fastest() -> Precision:
    """The precision of products that is fastest on this processor.

    Without instructions for bfloat16 a processor converts number by number, which is several times
    slower than float32.
    """
    # Early versions of torch 2 do not tell.
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer with its normalization.

    Attributes:
        weight: shape (n_in, n_out), float32; or a tensor (n_out, n_in) of bfloat16.
        bias: shape (n_out,).
        group: neighbours that are divided by their common root mean square; 0 for no division.
        epsilon: added to the mean square.
        scale: of what comes of it, shape (n_out,).
        shift: added to that, shape (n_out,).
    """

    weight: Floats | Tensor
    bias: Floats
    group: int
    epsilon: float
    scale: Floats
    shift: Floats

    def product(self, x: Rows) -> Rows:
        """Of inputs (B, n_in) with the weights: (B, n_out), in their precision."""
        if isinstance(self.weight, np.ndarray):
            # A tenth faster than numpy's own product.
            return torch.mm(torch.from_numpy(x), torch.from_numpy(self.weight)).numpy()
        y = functional.linear(torch.from_numpy(x).view(torch.bfloat16), self.weight)
        return y.view(torch.uint16).numpy()

    @property
    def dtype(self) -> type[np.float32 | np.uint16]:
        """Of inputs and products."""
        return np.float32 if isinstance(self.weight, np.ndarray) else np.uint16


def layers(linear: Iterable[Any], norm: Iterable[Any], precision: Precision) -> list[Layer]:
    """Copies of layers, with what is linear in their normalization moved into the weights.

    Args:
        linear: layers with a weight (n_out, n_in) and a bias.
        norm: group or batch normalization of each one's output, in evaluation mode.
        precision: of the products of the widest layers.
    """
    made = []
    for product, normalization in zip(linear, norm, strict=True):
        weight, bias, scale, shift = (
            parameter.detach().double().numpy().T
            for part in (product, normalization)
            for parameter in (part.weight, part.bias)
        )
        group = 0
        if isinstance(normalization, nn.GroupNorm):
            group = len(bias) // normalization.num_groups
            weight, bias = _centred(weight, group), _centred(bias, group)
        else:
            mean, variance = (
                statistic.double().numpy()
                for statistic in (normalization.running_mean, normalization.running_var)
            )
            scale = scale / np.sqrt(variance + normalization.eps)
            shift = shift - scale * mean
        rounded = precision == "bfloat16" and min(weight.shape) >= _ROUNDED
        single = weight.astype(np.float32, order="C")
        made.append(
            Layer(
                torch.from_numpy(single.T).bfloat16() if rounded else single,
                bias.astype(np.float32),
                group,
                normalization.eps,
                scale.astype(np.float32),
                shift.astype(np.float32),
            )
        )
    return made


def through(layers: Sequence[Layer], skips: Mapping[int, int], x: Floats, width: int) -> Rows:
    """What comes out of layers, shape (B, n_out) of the last one.

    Args:
        layers: counted from 1.
        skips: layer -> the earlier one whose output before normalization it adds; 0 is the input.
        x: the input, shape (B, n_in).
        width: so many of its first columns are what is added.
    """
    kept = {0: np.ascontiguousarray(x[:, :width])}
    y: Rows = x
    for number, layer in enumerate(layers, start=1):
        skip = kept[skips[number]] if number in skips else None
        if skips.get(number) == 0 and layer.group:
            # What comes out of layers is centred by their weights; the input is not.
            skip = _centred(kept[0], layer.group)
        z = layer.product(y)
        before = np.empty(z.shape, dtype=np.float32) if number in skips.values() else None
        # The widest layers stand in the middle: what comes out of the last one is float32.
        wanted = layers[number].dtype if number < len(layers) else np.float32
        y = z if z.dtype == wanted else np.empty(z.shape, dtype=wanted)
        _normalize(
            z, layer.bias, skip, layer.group, layer.epsilon, layer.scale, layer.shift, before, y
        )
        if before is not None:
            kept[number] = before
    return y


def in_parts(
    function: Callable[[NDArray[Any]], NDArray[Any]], rows: NDArray[Any], result: NDArray[Any]
) -> None:
    """Fill the rows of a result with a function of other rows, some at a time, on all cores.

    Args:
        function: (B, ...) -> (B, ...), called in threads that have one core each.
        rows: its arguments, shape (V, ...).
        result: where its results go, shape (V, ...).
    """

    # Torch keeps this mode by thread.
    @torch.inference_mode()
    def fill(start: int) -> None:
        part = slice(start, start + _CHUNK)
        # Infinite weights make estimates of NaN, as in torch, without a warning.
        with np.errstate(invalid="ignore"):
            result[part] = function(rows[part])

    n_threads = _threads.usable()
    with (
        _threads.one_thread(),
        ThreadPoolExecutor(n_threads, initializer=_one_thread_of_torch) as pool,
    ):
        # Going through the results raises what a thread raised.
        for _ in pool.map(fill, range(0, len(rows), _CHUNK)):
            pass


@numba.njit(cache=True, fastmath=_FAST, nogil=True)
def _normalize(y, bias, skip, group, epsilon, scale, shift, before, x):  # type: ignore[no-untyped-def]
    """With y += bias + skip, which is kept in `before`, x = ReLU(scale·y/rms + shift).

    The root mean square is that of a group; skip and before may be None. Each of y and x is
    float32 or has the bits of bfloat16, and x may be y.
    """
    n_rows, width = y.shape
    size = group if group > 0 else width
    n_groups = width // size
    # Passes over a row: one group after the other would wait for each square root.
    of_y, factor = np.empty(width, dtype=np.float32), np.ones(n_groups, dtype=np.float32)
    bits = of_y.view(np.uint32)
    for row in range(n_rows):
        if y.itemsize == 2:
            for i in range(width):
                bits[i] = np.uint32(y[row, i]) << np.uint32(16)
        else:
            for i in range(width):
                of_y[i] = y[row, i]
        if skip is None:
            for i in range(width):
                of_y[i] += bias[i]
        else:
            of_skip = skip[row]
            for i in range(width):
                of_y[i] += bias[i] + of_skip[i]
        if before is not None:
            before[row] = of_y
        if group > 0:
            for g in range(n_groups):
                # Indices from zero on: the compiler vectorizes these loops alone.
                part = of_y[g * size : (g + 1) * size]
                square = np.float32(0)
                for i in range(size):
                    square += part[i] * part[i]
                factor[g] = square
            for g in range(n_groups):
                factor[g] = 1 / np.sqrt(factor[g] / np.float32(size) + np.float32(epsilon))
        for g in range(n_groups):
            of_group = slice(g * size, (g + 1) * size)
            part, of_scale, of_shift = of_y[of_group], scale[of_group], shift[of_group]
            for i in range(size):
                value = factor[g] * part[i] * of_scale[i] + of_shift[i]
                # NaN is not below 0: it stays.
                part[i] = np.float32(0) if value < 0 else value
        if x.itemsize == 2:
            for i in range(width):
                # To the nearest, to even between two. NaN, above infinity, would become a number.
                b = bits[i]
                b += np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))
                nan = (bits[i] & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                x[row, i] = np.uint16(0x7FC0) if nan else np.uint16(b >> np.uint32(16))
        else:
            for i in range(width):
                x[row, i] = of_y[i]


def _centred(values: NDArray[Any], group: int) -> NDArray[Any]:
    """Each group of neighbours along the last axis less its mean."""
    groups = values.reshape(*values.shape[:-1], -1, group)
    with np.errstate(invalid="ignore"):  # as in `in_parts`
        centred = groups - groups.mean(axis=-1, keepdims=True)
    return np.asarray(centred.reshape(values.shape))


def _one_thread_of_torch() -> None:
    """In a thread that shares the cores with others, products of torch take one core."""
    # At its first use in a thread, torch sets the number of OpenMP's threads, and not again.
    torch.get_num_threads()
    threadpool_limits(1, user_api="openmp")
