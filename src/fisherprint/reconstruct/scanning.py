"""A digital scan: k-space of objects whose signal is known at each pulse.

It shares neither the subspace nor the convolutions with the reconstruction: each pulse has an
image of its own, transformed in double precision. `tests/test_reconstruct_scan.py` compares it
with the sum over voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import finufft
import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _threads
from fisherprint.reconstruct.encoding import Matrix

# Far below any noise, and below the single precision of the result.
_PRECISION = 1e-7


def coil_sensitivities(matrix: Matrix, n_coils: int) -> NDArray[np.complex64]:
    """Smooth sensitivities of coils around the object, on rings at three heights.

    Each falls off with the square of the distance and turns its phase once across the field of
    view. Σ_c |S_c|² = 1 in each voxel, as ESPIRiT has it.

    Args:
        matrix: voxels (N0, N1, N2).
        n_coils: how many.

    Returns:
        Shape (C, N0, N1, N2).
    """
    if n_coils < 1:
        raise ValueError(f"expected at least one coil; got {n_coils}.")
    lines = [(np.arange(n) - n // 2) / (n / 2) for n in matrix]
    place = np.stack(np.meshgrid(*lines, indexing="ij"))
    number = np.arange(n_coils)
    turn = 2 * np.pi * number * 3 / max(n_coils, 3)
    height = (number % 3 - 1) * 0.7 * (matrix[2] > 1)
    centres = np.stack([1.3 * np.cos(turn), 1.3 * np.sin(turn), height], -1)
    maps = np.empty((n_coils, *matrix), np.complex64)
    for coil, centre in zip(maps, centres, strict=True):
        away = place - centre[:, None, None, None]
        phase = np.einsum("a,axyz->xyz", centre, place) + np.angle(centre[0] + 1j * centre[1])
        coil[...] = np.exp(1j * phase) / (0.3 + (away**2).sum(0))
    return maps / np.sqrt((np.abs(maps) ** 2).sum(0))


def acquire(
    trajectory: NDArray[np.float32],
    sensitivities: NDArray[np.complex64],
    frame: Callable[[int], NDArray[np.complexfloating]],
    *,
    noise_std: float = 0.0,
    rng: np.random.Generator,
) -> Iterator[NDArray[np.complex64]]:
    """K-space of an object that changes from pulse to pulse.

        y_c(k) = (N0 N1 N2)^(-1/2) Σ_r S_c(r) m_t(r) exp(-2πi k·(r - N//2)/N) + noise

    Args:
        trajectory: in 1/(field of view), shape (T, S, R, 3).
        sensitivities: shape (C, N0, N1, N2).
        frame: the object's signal m_t at pulse t, shape (N0, N1, N2).
        noise_std: σ of the real and of the imaginary part.
        rng: draws the noise.

    Yields:
        The samples of one pulse after the other, shape (C, S, R).
    """
    _checks.shape(
        "the trajectory", trajectory, [("T", None), ("S", None), ("R", None), ("xyz", 3)]
    )
    matrix = sensitivities.shape[1:]
    axes = [axis for axis in range(3) if matrix[axis] > 1]
    sizes = tuple(matrix[axis] for axis in axes)
    maps = sensitivities.astype(np.complex128)
    plan = finufft.Plan(
        2,
        sizes,
        len(maps),
        _PRECISION,
        -1,
        "complex128",
        nthreads=_threads.usable(),
        # Double precision has digits enough for the smaller grid.
        upsampfac=1.25,
        showwarn=0,
    )
    for pulse, spokes in enumerate(trajectory):
        plan.setpts(
            *(
                np.ascontiguousarray(spokes[..., axis], np.float64).reshape(-1)
                * (2 * np.pi / matrix[axis])
                for axis in axes
            )
        )
        images = (maps * frame(pulse)).reshape(-1, *sizes)
        values = plan.execute(images[0] if len(images) == 1 else images)
        values = values.reshape(len(maps), *spokes.shape[:2]) / np.sqrt(np.prod(matrix))
        noise = rng.standard_normal((*values.shape, 2)).view(np.complex128)[..., 0]
        yield (values + noise_std * noise).astype(np.complex64)
