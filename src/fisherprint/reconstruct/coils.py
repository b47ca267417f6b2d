"""Coils: fewer virtual ones, and their sensitivities from the data themselves (ESPIRiT)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.reconstruct import encoding, solve, toeplitz
from fisherprint.reconstruct.encoding import Matrix, Sampling

Progress = Callable[[str, int, int], None]


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, eq=False)
class Compression:
    """Virtual coils as sums of the physical ones.

    Attributes:
        matrix: complex64, shape (virtual coils, C); virtual = matrix @ physical, for k-space and
            sensitivities alike.
        kept: share of the energy of all samples that they hold.
    """

    matrix: NDArray[np.complex64]
    kept: float

    def __call__(self, of_coils: NDArray[np.complex64]) -> NDArray[np.complex64]:
        """Combine along the first axis, shape (C, ...)."""
        return np.tensordot(self.matrix, of_coils, 1)


def compression(
    kspace: NDArray[np.complex64],
    n_virtual: int,
    *,
    noise: NDArray[np.complex64] | None = None,
    progress: Progress = _silent,
) -> Compression:
    """The virtual coils that hold most of the energy: an SVD over all samples (§2.8).

    With noise samples of covariance L Lᴴ the data are first whitened, y -> L⁻¹ y, so that virtual
    coils have independent noise of variance 1 (of real and imaginary part together).

    Args:
        kspace: shape (C, T, S, R); read once, one pulse at a time.
        n_virtual: how many virtual coils.
        noise: samples without signal, shape (C, number).
        progress: called with what is done, how many pulses, and of how many.

    Raises:
        ValueError: more virtual coils than there are, NaN, no signal, or too few noise samples to
            tell the coils apart.
    """
    _checks.shape("k-space", kspace, [("C", None), ("T", None), ("S", None), ("R", None)])
    n_coils, n_pulses = kspace.shape[:2]
    if not 1 <= n_virtual <= n_coils:
        raise ValueError(
            f"expected 1 to {n_coils} virtual coils, as there are physical ones; got {n_virtual}."
        )
    whitening = np.eye(n_coils, dtype=np.complex128)
    if noise is not None:
        whitening = _whitening(noise, n_coils)
    covariance = np.zeros((n_coils, n_coils), np.complex128)
    for pulse in range(n_pulses):
        samples = np.asarray(kspace[:, pulse]).reshape(n_coils, -1).astype(np.complex128)
        covariance += samples @ samples.conj().T
        progress("covariance of the coils", pulse + 1, n_pulses)
    if not np.isfinite(covariance).all() or not covariance.any():
        raise ValueError(
            "k-space must hold finite samples that are not all zero; got "
            f"{'NaN or Inf' if not np.isfinite(covariance).all() else 'zeros alone'}. "
            "Remove the readouts concerned, or look for the right data."
        )
    energy, vectors = np.linalg.eigh(whitening @ covariance @ whitening.conj().T)
    strongest = vectors[:, ::-1][:, :n_virtual]
    matrix = strongest.conj().T @ whitening
    return Compression(
        matrix.astype(np.complex64), float(energy[::-1][:n_virtual].sum() / energy.sum())
    )


def _whitening(noise: NDArray[np.complex64], n_coils: int) -> NDArray[np.complex128]:
    """L⁻¹ of the covariance L Lᴴ."""
    _checks.shape("the noise samples", noise, [("C", n_coils), ("number", None)])
    _checks.finite("the noise samples", noise)
    if noise.shape[1] <= n_coils:
        raise ValueError(
            f"expected more noise samples than the {n_coils} coils; got {noise.shape[1]}. "
            "Measure longer, or leave them out."
        )
    covariance = np.cov(noise.astype(np.complex128))
    try:
        factor = np.linalg.cholesky(np.atleast_2d(covariance))
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "the noise must be independent between some of the coils; got a singular covariance. "
            "Is one coil zero, or there twice? Leave it out."
        ) from error
    return np.linalg.inv(factor).astype(np.complex128)


def calibration(
    sampling: Sampling,
    kspace: NDArray[np.complex64],
    *,
    width: int = 24,
    iterations: int = 12,
    progress: Progress = _silent,
) -> NDArray[np.complex64]:
    """Images of the first coefficient of each coil, from the middle of k-space.

    Args:
        sampling: of all data.
        kspace: shape (C, T, S, R); one coil is read at a time.
        width: of the part of k-space, in 1/(field of view), and so the matrix.
        iterations: of conjugate gradients, coil by coil.
        progress: called with what is done, how many coils, and of how many.

    Returns:
        Shape (C, n0, n1, n2), n = min(width, N).
    """
    matrix: Matrix = tuple(min(width, n) for n in sampling.matrix)  # type: ignore[assignment]
    edge = np.array(matrix) / 2
    inside: NDArray[np.bool_] = np.asarray((np.abs(sampling.trajectory) <= edge).all(-1))
    # Samples of a readout that are far outside for all of them are not even looked at.
    near = np.flatnonzero(inside.reshape(-1, inside.shape[-1]).any(0))
    part = slice(near[0], near[-1] + 1) if len(near) else slice(0)
    inside = inside[..., part]
    if not inside.any():
        raise ValueError(
            f"expected samples within ±{width / 2:g} in 1/(field of view) for sensitivities; got "
            "none. Give sensitivities, or a wider calibration."
        )
    trajectory = np.where(inside[..., None], sampling.trajectory[..., part, :], 0)
    # The density of spokes: iterations converge sooner, and the result is of low resolution.
    radius = np.linalg.norm(trajectory, axis=-1)
    weights = inside * (radius + 0.25) ** (len(sampling.axes) - 1)
    if sampling.weights is not None:
        weights = weights * (sampling.weights[..., part] > 0)
    small = replace(sampling, trajectory=trajectory, matrix=matrix, weights=weights)
    kernel = toeplitz.kernel(small)
    everywhere = np.ones((1, *matrix), np.complex64)
    images = np.zeros((len(kspace), *matrix), np.complex64)
    for number, image in enumerate(images):
        samples = np.where(inside, np.asarray(kspace[number])[..., part], 0)
        right = encoding.adjoint(small, everywhere, samples[None])
        if right.any():
            # Noise must not grow: what iterations leave out is small, since weights are good.
            states = solve.conjugate_gradients(
                lambda x: toeplitz.normal(kernel, everywhere, x), right
            )
            image[...] = list(itertools.islice(states, iterations))[-1].images[0]
        progress("calibration", number + 1, len(images))
    return images


def espirit(
    calibration: NDArray[np.complex64],
    matrix: Matrix,
    *,
    kernel: int = 6,
    threshold: float = 0.03,
    crop: float = 0.8,
    progress: Progress = _silent,
) -> NDArray[np.complex64]:
    r"""Sensitivities from images of low resolution (ESPIRiT, doi:10.1002/mrm.24751).

    Patches of calibrating k-space, κ³ samples of C coils, span a space with the projection U Uᴴ.
    In image space it is a C x C matrix in each voxel,

        G(r) = κ⁻³ Σ_m g_m(r) g_m(r)ᴴ,   g_m(r) = Σ_x u_m(x) exp(2πi x·r/N),

    and the sensitivities are its eigenvector of eigenvalue 1. Voxels are done layer by layer.

    Args:
        calibration: of each coil, shape (C, n0, n1, n2).
        matrix: voxels of the result.
        kernel: κ, edge of a patch.
        threshold: singular values of the patches below this share of the largest are noise.
        crop: eigenvalues below it are background, where the result is zero.
        progress: called with what is done, how many layers, and of how many.

    Returns:
        Shape (C, N0, N1, N2), Σ_c |S_c|² = 1, the first coil real and positive.

    Raises:
        ValueError: a calibration that is zero, not finite or larger than the matrix.
    """
    _checks.shape(
        "the calibration", calibration, [("C", None), ("n0", None), ("n1", None), ("n2", None)]
    )
    _checks.finite("the calibration", calibration)
    if not calibration.any() or any(
        n > m for n, m in zip(calibration.shape[1:], matrix, strict=True)
    ):
        raise ValueError(
            "expected a calibration with signal, of at most the matrix; got the shape "
            f"{calibration.shape} for {matrix}. Look at k-space near its middle."
        )
    correlations = _correlations(calibration, kernel, threshold)
    n_coils = len(calibration)
    waves = [
        np.exp(2j * np.pi * np.outer(np.arange(n) - n // 2, _lags(length)) / n).astype(
            np.complex64
        )
        for n, length in zip(matrix, correlations.shape[2:], strict=True)
    ]
    result = np.zeros((n_coils, *matrix), np.complex64)
    for layer, wave in enumerate(waves[0]):
        G = np.einsum("abxyz,x->abyz", correlations, wave)
        G = np.einsum("abyz,jy,kz->jkab", G, waves[1], waves[2], optimize=True)
        values, vectors = np.linalg.eigh(G)
        strongest = vectors[..., -1]
        first = strongest[..., :1]
        # |first| = 0 leaves the phase open.
        turn = np.where(first == 0, 1, first.conj() / np.maximum(np.abs(first), 1e-30))
        maps = np.where(values[..., -1:] >= crop, strongest * turn, 0)
        result[:, layer] = np.moveaxis(maps, -1, 0)
        progress("sensitivities", layer + 1, matrix[0])
    return result


def _correlations(
    calibration: NDArray[np.complex64], kernel: int, threshold: float
) -> NDArray[np.complex64]:
    """κ⁻³ Σ_m Σ_x u_m,a(x) conj(u_m,b(x - d)) for all lags d, shape (C, C, lags...)."""
    axes = (1, 2, 3)
    spectrum = np.fft.ifftshift(calibration.astype(np.complex128), axes=axes)
    spectrum = np.fft.fftshift(np.fft.fftn(spectrum, axes=axes), axes=axes)
    edges = tuple(min(kernel, n) for n in calibration.shape[1:])
    patches = np.lib.stride_tricks.sliding_window_view(spectrum, edges, axes)
    size = len(calibration) * math.prod(edges)
    gram = np.zeros((size, size), np.complex128)
    for layer in range(patches.shape[1]):
        # (C, positions, x) -> columns (C x, positions)
        columns = np.moveaxis(patches[:, layer], (1, 2), (4, 5)).reshape(size, -1)
        gram += columns @ columns.conj().T
    squares, vectors = np.linalg.eigh(gram)
    signal = vectors[:, squares > threshold**2 * squares[-1]]
    lengths = [2 * edge - 1 for edge in edges]
    padded = np.fft.fftn(signal.T.reshape(-1, len(calibration), *edges), lengths, axes=(2, 3, 4))
    product = np.einsum("maxyz,mbxyz->abxyz", padded, padded.conj(), optimize=True)
    return (np.fft.ifftn(product, axes=(2, 3, 4)) / math.prod(edges)).astype(np.complex64)


def _lags(length: int) -> NDArray[np.int_]:
    """Of a cyclic correlation of odd length: 0, 1, ..., -1."""
    return np.fft.ifftshift(np.arange(length) - length // 2)
