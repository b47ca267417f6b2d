"""Low-rank temporal subspace: the SVD basis of simulated signals (§2.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg.blas import zherk

from fisherprint import _checks, _storage


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


def fit(
    signal: NDArray[np.complexfloating] | Iterable[NDArray[np.complexfloating]], *, rank: int
) -> Basis:
    """The right singular vectors of signals (S, T) with the largest singular values (§2.4).

    They are eigenvectors of the T x T matrix Σ_s s sᴴ, which is accumulated over batches, so that
    the signals need not be held at once. Squaring costs half of the digits: a vector whose
    singular value is 1e-4 of the largest still has about eight. The phase of each vector makes
    its largest entry real and positive.

    Args:
        signal: shape (S, T), or an iterable of such batches.
        rank: K, at most S and T.

    Raises:
        ValueError: a rank outside 1...min(S, T), or signals that are not finite.
    """
    size = 0
    gram: NDArray[np.complex128] = np.zeros((0, 0), dtype=np.complex128)
    for batch in [signal] if isinstance(signal, np.ndarray) else signal:
        _checks.finite("signal", batch)
        _checks.shape("signal", batch, [("S", None), ("T", len(gram) or None)])
        if not size:
            gram = np.zeros((batch.shape[1],) * 2, dtype=np.complex128, order="F")
        # The squares of single-precision signals need double precision. Only the upper triangle
        # of this Hermitian matrix is summed, in place.
        columns = np.asarray(batch, dtype=np.complex128, order="C").T
        gram = zherk(1.0, columns, beta=1.0, c=gram, overwrite_c=1)
        size += len(batch)
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
