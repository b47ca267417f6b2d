"""Dictionary matching: the entry whose coefficients are most like the voxel's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.models import SignalModel
from fisherprint.subspace import Basis

# Inner products held at once, in bytes; each is a complex number, its modulus and an index.
_PRODUCT_BYTES, _PRODUCT_EACH = 64e6, 16 + 8 + 8
# Signals held at once while they are simulated.
_BATCH = 1024
# Memory that a dictionary may take unless another limit is given.
_LIMIT = 2e9


@dataclass(frozen=True, eq=False)
class Dictionary:
    r"""Fingerprints to compare voxels with, an estimator like a network.

        θ̂ = θ_n with the largest |d_nᴴ x|² / ‖d_n‖²

    which is the least squares estimate among the entries, with the best complex M0 for each.

    Attributes:
        names: the P parameters.
        theta: of the N entries, shape (N, P), SI units.
        coefficients: d, shape (N, K), of any norm but 0.

    Raises:
        ValueError: shapes that disagree, no entry, values that are not finite, or an entry
            without signal.
    """

    names: tuple[str, ...]
    theta: NDArray[np.float64]
    coefficients: NDArray[np.complex128]

    def __post_init__(self) -> None:
        size = len(self.theta)
        _checks.shape("theta", self.theta, [("N", None), ("P", len(self.names))])
        _checks.shape("coefficients", self.coefficients, [("N", size), ("K", None)])
        _checks.finite("theta", self.theta)
        _checks.finite("coefficients", self.coefficients)
        norm = np.linalg.norm(self.coefficients, axis=1, keepdims=True)
        if not size or not norm.all():
            raise ValueError(
                "expected at least one entry, and signal in each; got "
                f"{int((norm == 0).sum())} of {size} without. Leave these out."
            )
        object.__setattr__(self, "coefficients", self.coefficients / norm)

    def __call__(self, given: NDArray[np.complexfloating]) -> NDArray[np.float64]:
        """Parameters of the best entry: (..., K) to (..., P); NaN for coefficients of NaN or 0."""
        return self.nearest(given, 1)[..., 0, :]

    def nearest(self, given: NDArray[np.complexfloating], number: int) -> NDArray[np.float64]:
        """Parameters of the best entries, best first: (..., K) to (..., R, P).

        Args:
            given: coefficients, shape (..., K); NaN comes of NaN, Inf, or zeros alone.
            number: R, from 1 to N.

        Raises:
            ValueError: another number of coefficients, or R out of range.
        """
        given = np.asarray(given)
        size, rank = self.coefficients.shape
        if given.ndim < 1 or given.shape[-1] != rank:
            raise ValueError(
                f"expected coefficients of shape (..., {rank}); got {given.shape}. "
                "Are dictionary and images of the same basis?"
            )
        if not 1 <= number <= size:
            raise ValueError(f"expected 1 to {size} entries; got {number}. Ask for fewer.")
        voxels = given.reshape(-1, rank)
        result = np.full((len(voxels), number, self.theta.shape[1]), np.nan)
        usable = np.flatnonzero(np.isfinite(voxels).all(axis=1) & voxels.any(axis=1))
        length = max(1, int(_PRODUCT_BYTES / (_PRODUCT_EACH * size)))
        for first in range(0, len(usable), length):
            part = usable[first : first + length]
            result[part] = self.theta[self._best(voxels[part], number)]
        return result.reshape(*given.shape[:-1], number, self.theta.shape[1])

    def _best(self, voxels: NDArray[np.complexfloating], number: int) -> NDArray[np.intp]:
        """The entries most like each voxel, best first, shape (V, R)."""
        likeness = np.abs(voxels @ self.coefficients.conj().T)
        best = np.argpartition(likeness, -number, axis=1)[:, -number:]
        order = np.argsort(-np.take_along_axis(likeness, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)


def grid(model: SignalModel, values: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
    """All combinations of the values of each parameter, shape (N, P), the last one fastest.

    Args:
        model: whose parameters they are.
        values: of each of them by name, SI units; one number does for what is known.

    Raises:
        KeyError: an unknown parameter.
        ValueError: a parameter without values.
    """
    for name in values:
        _checks.index(name, model.names)
    missing = [name for name in model.names if name not in values or not np.size(values[name])]
    if missing:
        raise ValueError(
            f"expected values of {_checks.listing(model.names)}; got none of "
            f"{_checks.listing(missing)}. One number does for what is known."
        )
    axes = [np.atleast_1d(np.asarray(values[name], dtype=np.float64)) for name in model.names]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def forecast(model: SignalModel, basis: Basis, size: int) -> int:
    """Bytes that a dictionary of N entries takes at most, while it is made and used."""
    entries = size * (2 * 16 * basis.rank + 8 * len(model.parameters))
    simulated = 2 * 16 * min(size, _BATCH) * model.n_samples
    return int(entries + max(simulated, _PRODUCT_BYTES, _PRODUCT_EACH * size))


def dictionary(
    model: SignalModel,
    basis: Basis,
    theta: NDArray[np.float64],
    *,
    memory_limit: float = _LIMIT,
) -> Dictionary:
    """Simulate a dictionary in the subspace; the memory that it takes is forecast first.

    Args:
        model: any signal model; in practice of few parameters, for N grows as their power.
        basis: of the coefficients.
        theta: entries, shape (N, P), of a `grid` or of a prior.
        memory_limit: in bytes.

    Raises:
        MemoryError: the forecast is above the limit; nothing has been simulated.
        ValueError: as the model says; or an entry without signal.
    """
    theta = np.asarray(theta, dtype=np.float64)
    _checks.shape("theta", theta, [("N", None), ("P", len(model.names))])
    needed = forecast(model, basis, len(theta))
    if needed > memory_limit:
        raise MemoryError(
            f"expected a dictionary of at most {memory_limit / 1e9:.3g} GB; {len(theta)} entries "
            f"of {basis.rank} coefficients take {needed / 1e9:.3g} GB. Use a coarser grid, fewer "
            "unknowns, or raise memory_limit."
        )
    coefficients = np.empty((len(theta), basis.rank), dtype=np.complex128)
    for first in range(0, len(theta), _BATCH):
        part = slice(first, first + _BATCH)
        coefficients[part] = basis.compress(model.signal(theta[part]))
    return Dictionary(model.names, theta, coefficients)
