"""Low-rank temporal subspace: the SVD and the CRB-SVD basis of fingerprints (§2.4)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg.blas import zherk

from fisherprint import _checks, _storage, fisher
from fisherprint.models import Fingerprints

Method = Literal["svd", "crb-svd"]
# Fingerprints whose directions are held at once: enough columns for the product's full speed.
_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Basis:
    """Orthonormal temporal basis: s ≈ vectors @ coefficients.

    Attributes:
        vectors: shape (T, K), orthonormal columns, complex128.

    Raises:
        ValueError: not finite, not two-dimensional with K ≤ T, or not orthonormal to 1e-4.
    """

    vectors: NDArray[np.complex128]

    def __post_init__(self) -> None:
        vectors = np.array(self.vectors, dtype=np.complex128)
        _checks.finite("basis vectors", vectors)
        _checks.shape("basis vectors", vectors, [("T", None), ("K", None)])
        deviation = np.abs(vectors.conj().T @ vectors - np.eye(vectors.shape[1])).max()
        # Published bases are stored in single precision, which costs about 1e-6.
        if deviation > 1e-4:
            raise ValueError(
                "basis vectors must be the orthonormal columns of a (T, K) array; got the shape "
                f"{vectors.shape} with Uᴴ U off the identity by {deviation:.2g}. "
                "Transpose or orthonormalize it."
            )
        vectors.setflags(write=False)
        object.__setattr__(self, "vectors", vectors)

    @property
    def rank(self) -> int:
        """K."""
        return self.vectors.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the basis."""
        return _storage.digest(self.vectors)

    def compress(self, signal: NDArray[np.complexfloating]) -> NDArray[np.complex128]:
        """Coefficients c = Uᴴ s: signals (S, T) to (S, K), or Jacobians (S, T, P) to (S, K, P).

        Raises:
            ValueError: the time axis is not that of the basis.
        """
        signal = np.asarray(signal)
        axes: list[tuple[str, int | None]] = [("S", None), ("T", len(self.vectors))]
        _checks.shape("signal", signal, axes if signal.ndim == 2 else [*axes, ("P", None)])
        if signal.ndim == 2:
            return signal @ self.vectors.conj()
        return (signal.mT @ self.vectors.conj()).mT

    def expand(self, coefficients: NDArray[np.complexfloating]) -> NDArray[np.complex128]:
        """Signals s = U c, (S, K) to (S, T).

        Raises:
            ValueError: the number of coefficients is not the rank.
        """
        coefficients = np.asarray(coefficients)
        _checks.shape("coefficients", coefficients, [("S", None), ("K", self.rank)])
        return coefficients @ self.vectors.T

    def energy(self, signal: NDArray[np.complexfloating]) -> float:
        """Share of the energy of signals (S, T) that the subspace holds."""
        kept = np.linalg.norm(self.compress(signal)) ** 2
        return float(kept / np.linalg.norm(signal) ** 2)


@dataclass(frozen=True)
class CrbSvd:
    """Asks for a CRB-SVD basis where a mere rank asks for an SVD basis.

    Attributes:
        rank: K.
        weight: l, from 0 (the SVD of the signals) to 1 (of the derivatives alone).

    Raises:
        ValueError: a weight outside [0, 1].
    """

    rank: int
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(
                "the weight of the derivatives must lie between 0, signals alone, and 1; got "
                f"{self.weight}. 0.5 keeps most of both."
            )


def fit(
    fingerprints: NDArray[np.complexfloating]
    | Fingerprints
    | Iterable[NDArray[np.complexfloating] | Fingerprints],
    *,
    rank: int,
    method: Method = "svd",
    weight: float | None = None,
) -> Basis:
    r"""Basis of the K directions in time that hold most of the fingerprints (§2.4).

        svd:      left singular vectors of [s ...]
        crb-svd:  of [(1 - l)·s, l·d⊥_1 ... l·d⊥_P ...]

    with a column, or 1 + P of them, for each fingerprint. d⊥_p is the derivative's part that no
    other unknown can imitate, with unit norm (`fisher.efficient_directions`): a basis that holds
    it loses nothing of the bound of θ_p. A derivative of which nothing is left adds nothing. The
    signal is as it is for M0 = 1 (docs/decisions/020-crb-svd-basis.md). Source of the CRB-SVD:
    Mao et al., Cramér-Rao bound optimized subspace reconstruction in quantitative MRI, 2023,
    arXiv:2305.00326.

    They are eigenvectors of the T x T second moment of the columns, which is accumulated over
    batches, so that these need not be held at once. Squaring costs half of the digits: a vector
    whose singular value is 1e-4 of the largest still has about eight. The phase of each vector
    makes its largest entry real and positive.

    Args:
        fingerprints: signals, shape (S, T), or an iterable of such batches; for "crb-svd"
            `Fingerprints` with their Jacobians, or an iterable of those.
        rank: K, at most the number of columns and T.
        method: "svd", which holds the most energy of the signals, or "crb-svd", which for a
            little of it holds far more of what they tell about the parameters.
        weight: l of "crb-svd", from 0 to 1; 0.5 if not given.

    Raises:
        TypeError: signals for "crb-svd", or fingerprints for "svd".
        ValueError: an unknown method, a weight outside [0, 1] or for "svd", a rank outside
            1...min(columns, T), or values that are not finite or of other shapes.
    """
    if method not in ("svd", "crb-svd"):
        raise ValueError(f"expected the method svd or crb-svd; got {method!r}. Choose one.")
    if method == "svd" and weight is not None:
        raise ValueError(
            f"expected no weight for the SVD, which has no derivatives; got {weight}. "
            "Drop it, or ask for the method crb-svd."
        )
    share = None if method == "svd" else CrbSvd(rank, 0.5 if weight is None else weight).weight
    if isinstance(fingerprints, np.ndarray | Fingerprints):
        fingerprints = [fingerprints]
    size = 0
    gram: NDArray[np.complex128] = np.zeros((0, 0), dtype=np.complex128)
    for batch in fingerprints:
        for rows in _rows(batch, len(gram) or None, share):
            if not size:
                gram = np.zeros((rows.shape[1],) * 2, dtype=np.complex128, order="F")
            # The squares of single-precision signals need double precision. Only the upper
            # triangle of this Hermitian matrix is summed, in place.
            columns = np.asarray(rows, dtype=np.complex128, order="C").T
            gram = zherk(1.0, columns, beta=1.0, c=gram, overwrite_c=1)
            size += len(rows)
    if not 1 <= rank <= min(size, len(gram)):
        raise ValueError(
            f"the rank must lie between 1 and {min(size, len(gram))}, the smaller of the number "
            f"of signals and of samples; got {rank}. Choose another rank or give more signals."
        )
    top = [len(gram) - rank, len(gram) - 1]
    vectors = scipy.linalg.eigh(gram, subset_by_index=top, lower=False, overwrite_a=True)[1]
    vectors = vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)]
    return Basis(vectors * (np.abs(largest) / largest))


def _rows(
    batch: NDArray[np.complexfloating] | Fingerprints, n_samples: int | None, weight: float | None
) -> Iterator[NDArray[np.complexfloating]]:
    """Transposed columns of a batch, each part of shape (columns, T); without weight signals."""
    if isinstance(batch, Fingerprints) is (weight is None):
        raise TypeError(
            f"expected {'signals' if weight is None else 'Fingerprints with their Jacobians'}; "
            f"got {type(batch).__name__}. The SVD takes model.signal(theta), the CRB-SVD "
            "model.simulate(theta)."
        )
    signal = batch.signal if isinstance(batch, Fingerprints) else batch
    _checks.finite("signal", signal)
    _checks.shape("signal", signal, [("S", None), ("T", n_samples)])
    if not isinstance(batch, Fingerprints) or weight is None:
        yield signal
        return
    jacobian = batch.jacobian
    _checks.finite("jacobian", jacobian)
    _checks.shape("jacobian", jacobian, [("S", len(signal)), ("T", signal.shape[1]), ("P", None)])
    for first in range(0, len(signal), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        directions = fisher.efficient_directions(signal[part], jacobian[part])
        rows = np.concatenate([(1 - weight) * signal[part, None], weight * directions], axis=1)
        yield rows.reshape(-1, signal.shape[1])
