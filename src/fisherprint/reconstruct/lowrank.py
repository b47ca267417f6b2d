"""Locally low-rank regularization: neighbouring voxels have few different time courses."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _threads
from fisherprint.reconstruct.encoding import Images


@dataclass(frozen=True)
class LocallyLowRank:
    """Soft thresholding of blocks' singular values (§2.8), the proximal step of Σ_b λ'‖X_b‖_*.

    A block X_b is the matrix (K, M) of the coefficients of M = b³ neighbouring voxels (b² in a
    slice). A step τ takes

        τ λ (√M + √K + √log(B min(M, K)))

    off each singular value, B the number of blocks: with this factor λ is a noise level, and means
    the same as in BART.

    Attributes:
        weight: λ.
        block: b, voxels along an edge.
        seed: of the random place of the blocks, another one in each iteration; None leaves the
            first block in the first corner, and its edges show.

    Raises:
        ValueError: a negative weight, or blocks of less than one voxel.
    """

    weight: float
    block: int = 8
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(
                f"the weight λ must be zero or above; got {self.weight}. Zero regularizes nothing."
            )
        if self.block < 1:
            raise ValueError(
                f"the edge of a block must be at least one voxel; got {self.block}. Give 4 to 8."
            )

    def __call__(
        self, images: Images, step: float, iteration: int, *, threads: int | None = None
    ) -> Images:
        """The images after one proximal step.

        Args:
            images: shape (K, N0, N1, N2).
            step: τ.
            iteration: chooses the place of the blocks, with the seed.
            threads: all cores of this process if None.
        """
        _checks.shape(
            "the images", images, [("K", None), ("N0", None), ("N1", None), ("N2", None)]
        )
        rank, *matrix = images.shape
        edges = [min(self.block, n) for n in matrix]
        counts = [-(-n // edge) for n, edge in zip(matrix, edges, strict=True)]
        shifts = [0, 0, 0]
        if self.seed is not None:
            shifts = list(np.random.default_rng((self.seed, iteration)).integers(0, edges))
        M, B = math.prod(edges), math.prod(counts)
        threshold = (
            step
            * self.weight
            * (math.sqrt(M) + math.sqrt(rank) + math.sqrt(math.log(B * min(M, rank))))
        )
        result = np.empty_like(images)

        def slab(number: int) -> None:
            """One layer of blocks; what is beyond the image counts as zero."""
            row = (np.arange(edges[0]) + number * edges[0] + shifts[0]) % (counts[0] * edges[0])
            there = row < matrix[0]
            padded = np.zeros(
                (rank, edges[0], counts[1] * edges[1], counts[2] * edges[2]), np.complex64
            )
            padded[:, there, : matrix[1], : matrix[2]] = images[:, row[there]]
            rolled = np.roll(padded, (-shifts[1], -shifts[2]), (2, 3))
            parts = rolled.reshape(rank, edges[0], counts[1], edges[1], counts[2], edges[2])
            blocks = parts.transpose(2, 4, 0, 1, 3, 5)
            shrunk = soft_threshold(blocks.reshape(-1, rank, M), threshold)
            back = shrunk.reshape(blocks.shape).transpose(2, 3, 0, 4, 1, 5).reshape(padded.shape)
            back = np.roll(back, (shifts[1], shifts[2]), (2, 3))
            result[:, row[there]] = back[:, there, : matrix[1], : matrix[2]]

        if (threads or _threads.usable()) == 1:
            for number in range(counts[0]):
                slab(number)
        else:
            with ThreadPoolExecutor(threads or _threads.usable()) as pool:
                list(pool.map(slab, range(counts[0])))
        return result


def soft_threshold(blocks: NDArray[np.complex64], threshold: float) -> NDArray[np.complex64]:
    """Singular values σ of matrices (..., K, M) become max(σ - threshold, 0).

    X = U Σ Vᴴ has X Xᴴ = U Σ² Uᴴ, which is small; U diag(max(1 - threshold/σ, 0)) Uᴴ X is the
    result. Squares of singular values need double precision.
    """
    X = blocks.astype(np.complex128)
    squares, U = np.linalg.eigh(X @ X.conj().mT)
    sigma = np.sqrt(np.maximum(squares, 0))
    kept = np.zeros_like(sigma)
    np.divide(sigma - threshold, sigma, out=kept, where=sigma > threshold)
    return ((U * kept[..., None, :]) @ (U.conj().mT @ X)).astype(np.complex64)
