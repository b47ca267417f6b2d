"""The fully connected network of Fig. 2, from coefficients to parameters (§2.5)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Generator, Tensor, nn
from torch.nn import functional

from fisherprint import inference

Normalization = Literal["group", "batch"]

# Widths of layers 1 to 11; then 2K, 10 and E.
_WIDE = (128, 256, 512, 1024, 768, 640, 512, 384, 256, 192, 128)
_BEFORE_LAST = 10
# Layer 7 adds the output of layer 3, and so on, before normalization; layer 0 is the input.
SKIPS = {7: 3, 9: 2, 11: 1, 12: 0}
# Voxels on a GPU at once.
_CHUNK = 16384


class Network(nn.Module):
    """14 linear layers, all but the last with group normalization and ReLU (§2.5, Fig. 2).

    Widths 2K-128-256-512-1024-768-640-512-384-256-192-128-2K-10-E. Skip connections add the output
    of an earlier layer of equal width (512, 256, 128; at the end the normalized coefficients)
    before the normalization; 16 groups, but 2 in the layers of width 2K and 10.

    Args:
        rank: K, the number of complex coefficients (also an attribute).
        output_mean: prior mean of the E parameters, shape (E,), in their units.
        output_spread: their prior standard deviation; the last layer y yields mean + spread·y.
        output_range: lowest and highest value of each parameter, shape (2, E); a logistic
            function of y then keeps within, with the same value and slope at y = 0.
        extra_inputs: mean and spread of n real inputs beside the coefficients, shape (2, n).
        normalization: `group`, or `batch` as in the authors' code.
        remove_phase: turn the coefficients so that the first is real and positive: the phase of
            M0 tells nothing about the parameters, and the network need not learn that.
        generator: draws the initial weights, on the CPU; the global generator stays untouched.

    Raises:
        ValueError: a rank below 2; mean and spread that are not (E,), finite and positive; a
            range without the mean inside; or extra inputs that are not (2, n), finite and of
            positive spread.
    """

    output_mean: Tensor
    output_spread: Tensor
    output_range: Tensor | None
    extra_inputs: Tensor | None
    without_phase: Tensor | None

    def __init__(
        self,
        rank: int,
        output_mean: ArrayLike,
        output_spread: ArrayLike,
        *,
        output_range: ArrayLike | None = None,
        extra_inputs: ArrayLike | None = None,
        normalization: Normalization = "group",
        remove_phase: bool = False,
        generator: Generator,
    ) -> None:
        super().__init__()
        mean, spread = _constants(output_mean), _constants(output_spread)
        if rank < 2:
            raise ValueError(
                f"the rank must be at least 2; got {rank}. A single coefficient of norm 1 tells "
                "nothing: keep more singular vectors."
            )
        if mean.ndim != 1 or len(mean) == 0 or mean.shape != spread.shape:
            raise ValueError(
                "output mean and spread must both have the shape (E,); got "
                f"{tuple(mean.shape)} and {tuple(spread.shape)}. Give one of each a parameter."
            )
        if not (mean.isfinite().all() and spread.isfinite().all() and (spread > 0).all()):
            raise ValueError(
                "output means must be finite and spreads finite and positive; got "
                f"{mean.tolist()} and {spread.tolist()}. Estimate only parameters that vary."
            )
        limits = None if output_range is None else _constants(output_range)
        if limits is not None and not (
            limits.shape == (2, len(mean))
            and limits.isfinite().all()
            and (limits[0] < mean).all()
            and (mean < limits[1]).all()
        ):
            raise ValueError(
                f"the output range must have the axes (2, E={len(mean)}), and finite low < mean < "
                f"high; got {limits.tolist()} around {mean.tolist()}. Widen it."
            )
        extra = None if extra_inputs is None else _constants(extra_inputs)
        if extra is not None and not (
            extra.ndim == 2 and len(extra) == 2 and extra.isfinite().all() and (extra[1] > 0).all()
        ):
            raise ValueError(
                "extra inputs must have the axes (2, n), finite means and positive spreads; got "
                f"{extra.tolist()}. Give only inputs that vary."
            )
        n_extra = 0 if extra is None else extra.shape[1]
        widths = (2 * rank, *_WIDE, 2 * rank, _BEFORE_LAST, len(mean))
        groups = [16] * len(_WIDE) + [2, 2]
        self.rank = rank
        self.linear = nn.ModuleList(
            _Linear(n_in + (n_extra if number == 0 else 0), n_out, generator)
            for number, (n_in, n_out) in enumerate(itertools.pairwise(widths))
        )
        self.norm = nn.ModuleList(
            nn.GroupNorm(n_groups, width) if normalization == "group" else nn.BatchNorm1d(width)
            for n_groups, width in zip(groups, widths[1:-1], strict=True)
        )
        self.register_buffer("output_mean", mean)
        self.register_buffer("output_spread", spread)
        # Those that are None are not in the state dict.
        self.register_buffer("output_range", limits)
        self.register_buffer("extra_inputs", extra)
        self.register_buffer("without_phase", torch.tensor(True) if remove_phase else None)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Network:
        """The network that a `state_dict` describes, for evaluation.

        All options follow from the names and shapes of the tensors.

        Raises:
            ValueError: tensors of another network.
        """
        try:
            range_, extra = weights.get("output_range"), weights.get("extra_inputs")
            n_extra = 0 if extra is None else extra.shape[1]
            network = cls(
                (weights["linear.0.weight"].shape[1] - n_extra) // 2,
                weights["output_mean"].cpu().numpy(),
                weights["output_spread"].cpu().numpy(),
                output_range=None if range_ is None else range_.cpu().numpy(),
                extra_inputs=None if extra is None else extra.cpu().numpy(),
                normalization="batch" if "norm.0.running_mean" in weights else "group",
                remove_phase="without_phase" in weights,
                generator=Generator(),
            )
            network.load_state_dict(weights)
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"expected the weights of a fisherprint network; got others: {error}. "
                "Train again or name another file."
            ) from error
        return network.eval()

    @property
    def n_extra(self) -> int:
        """Number n of real inputs beside the coefficients."""
        return 0 if self.extra_inputs is None else self.extra_inputs.shape[1]

    def forward(
        self,
        coefficients: Tensor,
        extra: Tensor | None = None,
        *,
        products: torch.dtype = torch.float32,
    ) -> Tensor:
        """Estimates θ̂, shape (B, E), in the parameters' units.

        Args:
            coefficients: shape (B, K), complex, of any scale; a row without a norm (zeros, NaN)
                yields NaN.
            extra: the other inputs, shape (B, n), real; None where n = 0.
            products: precision of the wide matrix products; everything else stays float32.
        """
        return self.from_features(self.features(coefficients, extra), products)

    def features(self, coefficients: Tensor, extra: Tensor | None = None) -> Tensor:
        """What the first layer sees: the normalized coefficients, then the extra inputs."""
        if self.without_phase is not None:
            coefficients = _first_real(coefficients)
        x = _unit_norm(coefficients).to(self.output_mean.dtype)
        if self.extra_inputs is None:
            return x
        if extra is None:
            raise ValueError(
                f"expected the network's {self.n_extra} extra inputs beside the coefficients; "
                "got none. Give them in the order of its card."
            )
        if extra.shape != (len(x), self.n_extra):
            raise ValueError(
                f"expected extra inputs with the axes (B={len(x)}, n={self.n_extra}); got "
                f"{tuple(extra.shape)}. Give them in the order of the network's card."
            )
        mean, spread = self.extra_inputs
        return torch.cat([x, ((extra - mean) / spread).to(x.dtype)], dim=1)

    def from_features(self, x: Tensor, products: torch.dtype) -> Tensor:
        """The 14 layers alone, without a complex number: this can be compiled."""
        kept = {0: x[:, : 2 * self.rank]}
        for number, (linear, norm) in enumerate(
            zip(self.linear[:-1], self.norm, strict=True), start=1
        ):
            y = linear(x, products)
            if number in SKIPS:
                y = y + kept[SKIPS[number]]
            if number in SKIPS.values():
                kept[number] = y
            x = torch.relu(norm(y))
        return self._in_units(self.linear[-1](x, products))

    def _in_units(self, y: Tensor) -> Tensor:
        """What the last layer yields, in units of the parameters, shape (B, E).

        Mean + spread·y, or the logistic function with this tangent at y = 0.
        """
        if self.output_range is None:
            return self.output_mean + self.output_spread * y
        low, high = self.output_range
        width = high - low
        p = (self.output_mean - low) / width
        slope = self.output_spread / (width * p * (1 - p))
        return low + width * torch.sigmoid(torch.logit(p) + slope * y)


def as_estimator(
    network: Network, *, precision: inference.Precision = "float32"
) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """The network as a function from coefficients (..., K), complex, to parameters (..., E).

    The n extra inputs of a network that has some stand behind its coefficients, as further
    channels (..., K + n) with an imaginary part of zero.

    Arrays in, arrays out. Voxels of zeros, NaN or Inf yield NaN. On a GPU the network itself is
    called; on the CPU another order of the same sums, which is faster (decision 027).

    Args:
        network: copied as it is now, and used in evaluation mode on its device.
        precision: of the widest products on the CPU; `inference.fastest()` is the faster one.

    Raises:
        ValueError: another precision, or bfloat16 on another device.
    """
    network = copy.deepcopy(network).eval()
    device, n_estimated = network.output_mean.device, len(network.output_mean)
    on_cpu = device.type == "cpu"
    if precision not in ("float32", "bfloat16") or (precision == "bfloat16" and not on_cpu):
        raise ValueError(
            "expected the precision float32, or on the CPU bfloat16; got "
            f"{precision!r} on {device}. Take float32, or move the network."
        )
    layers = inference.layers(network.linear[:-1], network.norm, precision) if on_cpu else []

    def estimated(voxels: NDArray[Any]) -> NDArray[np.float32]:
        # Double precision until the norm is 1: images come in any scale.
        tensor = torch.from_numpy(np.array(voxels, dtype=np.complex128)).to(device)
        x = network.features(tensor[:, : network.rank], tensor[:, network.rank :].real)
        if not on_cpu:
            return network.from_features(x, torch.float32).cpu().numpy()
        last = inference.through(layers, SKIPS, x.numpy(), 2 * network.rank)
        y = network.linear[-1](torch.from_numpy(last), torch.float32)
        return network._in_units(y).numpy()

    @torch.inference_mode()
    def estimate(coefficients: NDArray[Any]) -> NDArray[np.float64]:
        n_channels = network.rank + network.n_extra
        if np.ndim(coefficients) == 0 or coefficients.shape[-1] != n_channels:
            axis = f"K={network.rank}" + (f" + n={network.n_extra}" if network.n_extra else "")
            raise ValueError(
                f"coefficients must have the axes (..., {axis}); got the shape "
                f"{np.shape(coefficients)}. Move the coefficients to the last axis, and use the "
                "basis that the network was trained with."
            )
        voxels = coefficients.reshape(-1, n_channels)
        estimates = np.empty((len(voxels), n_estimated))
        if on_cpu:
            inference.in_parts(estimated, voxels, estimates)
        else:
            for start in range(0, len(voxels), _CHUNK):
                part = slice(start, start + _CHUNK)
                estimates[part] = estimated(voxels[part])
        return estimates.reshape(*coefficients.shape[:-1], n_estimated)

    return estimate


class _Linear(nn.Module):
    """Linear layer whose matrix product may have a lower precision, if it is wide."""

    def __init__(self, n_in: int, n_out: int, generator: Generator) -> None:
        super().__init__()
        # nn.Linear would draw from the global generator.
        weight = torch.empty(n_out, n_in)
        nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor, products: torch.dtype) -> Tensor:
        # Near the input and the output 8 bits would round away more than the noise does.
        if products == torch.float32 or min(self.weight.shape) < min(_WIDE):
            return functional.linear(x, self.weight, self.bias)
        rounded = (part.to(products) for part in (x, self.weight, self.bias))
        return functional.linear(*rounded).to(x.dtype)


def _constants(values: ArrayLike) -> Tensor:
    return torch.as_tensor(np.array(values), dtype=torch.float32)


def _first_real(coefficients: Tensor) -> Tensor:
    """The coefficients turned so that the first is real and positive, or zero."""
    turn = coefficients[:, :1].sgn().conj()
    return coefficients * (turn + (turn == 0))


def _unit_norm(coefficients: Tensor) -> Tensor:
    """Real, then imaginary parts, shape (B, 2K), scaled to an l2 norm of 1 (§2.5)."""
    x = torch.cat([coefficients.real, coefficients.imag], dim=1)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
