r"""From coefficient images to k-space and back, sample by sample: the slow, exact pair.

    y_c(k) = (N0 N1 N2)^(-1/2) Σ_r S_c(r) Σ_j U[t,j] x_j(r) exp(-2πi k·(r - N//2)/N)

with t the pulse of the sample (low rank inversion, doi:10.1002/mrm.26639). `toeplitz` has the
composition of both, which is what iterations need, much faster.

Axes: K coefficients, C coils, T pulses, S cycles, R samples along a readout, N0, N1, N2 voxels.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import finufft
import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage, _threads

Matrix = tuple[int, int, int]
Images = NDArray[np.complex64]

# In single precision, rounding is at about this level for a matrix of some hundred.
_PRECISION = 1e-6
# A readout may overshoot the edge of k-space by rounding.
_EDGE = 1 + 1e-4


@dataclass(frozen=True, eq=False)
class Sampling:
    """When and where k-space was sampled, and the images that are wanted.

    Attributes:
        trajectory: positions in 1/(field of view), |k| ≤ N/2 along each axis, float32, shape
            (T, S, R, 3).
        basis: U, orthonormal columns, complex64, shape (T, K), or of more pulses than are read. A
            signal is U x.
        matrix: voxels (N0, N1, N2); N2 = 1 for a slice, whose trajectory has no third component.
        weights: w ≥ 0 of the squared residuals (density compensation), float32, shape (T, S, R);
            None for 1.
        pulses: which T of the basis' pulses are read; None for all.

    Raises:
        ValueError: shapes that disagree, NaN, a basis that is not orthonormal, weights below
            zero, a trajectory beyond the matrix or in other units.
    """

    trajectory: NDArray[np.float32]
    basis: NDArray[np.complex64]
    matrix: Matrix
    weights: NDArray[np.float32] | None = None
    pulses: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if len(self.matrix) != 3 or any(n < 1 for n in self.matrix) or max(self.matrix) < 2:
            raise ValueError(
                f"the matrix must be three numbers of voxels; got {self.matrix}. "
                "Give N0, N1, N2, with N2 = 1 for a slice."
            )
        basis = np.asarray(self.basis)
        _checks.shape("the basis", basis, [("T", None), ("K", None)])
        _checks.finite("the basis", basis)
        off = np.abs(basis.conj().T @ basis - np.eye(basis.shape[1])).max()
        # Single precision costs about 1e-6.
        if off > 1e-4:
            raise ValueError(
                "the basis must have orthonormal columns (T, K); got the shape "
                f"{basis.shape} with Uᴴ U off the identity by {off:.2g}. "
                "Transpose or orthonormalize it."
            )
        n_pulses = len(basis)
        if self.pulses is not None:
            pulses = np.asarray(self.pulses, dtype=np.int64)
            if pulses.ndim != 1 or not ((pulses >= 0) & (pulses < len(basis))).all():
                raise ValueError(
                    f"the pulses that are read must be among the {len(basis)} of the basis; got "
                    f"{pulses.min(initial=0)} to {pulses.max(initial=0)}. Do the trajectory and "
                    "the basis belong to one train?"
                )
            n_pulses = len(pulses)
            object.__setattr__(self, "pulses", pulses)
        trajectory = np.asarray(self.trajectory, dtype=np.float32)
        _checks.shape(
            "the trajectory", trajectory, [("T", n_pulses), ("S", None), ("R", None), ("xyz", 3)]
        )
        _checks.finite("the trajectory", trajectory)
        _require_units(trajectory, self.matrix)
        weights = self.weights
        if weights is not None:
            weights = np.asarray(weights, dtype=np.float32)
            _checks.shape(
                "the weights", weights, list(zip("TSR", trajectory.shape[:3], strict=True))
            )
            _checks.finite("the weights", weights)
            if weights.min() < 0 or not weights.any():
                raise ValueError(
                    "the weights must be zero or above, and not all zero; got "
                    f"{weights.min():.3g} to {weights.max():.3g}. Give the density compensation "
                    "itself, not its logarithm."
                )
        object.__setattr__(self, "trajectory", trajectory)
        object.__setattr__(self, "basis", basis.astype(np.complex64))
        object.__setattr__(self, "weights", weights)
        _warn_if_undetermined(self)

    @property
    def rank(self) -> int:
        """K."""
        return self.basis.shape[1]

    @property
    def rows(self) -> NDArray[np.complex64]:
        """The basis at the pulses that are read, shape (T, K)."""
        return self.basis if self.pulses is None else self.basis[self.pulses]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images: (K, N0, N1, N2)."""
        return (self.rank, *self.matrix)

    @property
    def samples(self) -> tuple[int, ...]:
        """Of one coil: (T, S, R)."""
        return self.trajectory.shape[:3]

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of space along which there is more than one voxel."""
        return tuple(axis for axis in range(3) if self.matrix[axis] > 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the operator."""
        weights = np.ones(1, np.float32) if self.weights is None else self.weights
        return _storage.digest(self.trajectory, self.rows, np.array(self.matrix), weights)

    @property
    def noise_gain(self) -> float:
        """Standard deviation of Aᴴ W n for noise n of variance 1, mean over the coefficients.

        With Σ_c |S_c|² = 1 it is (1/(K N0 N1 N2) Σ_tm w² Σ_j |U_tj|²)^½: the λ of a locally
        low-rank prior that just takes the noise away, for data that are not scaled.
        """
        energy = (np.abs(self.rows.astype(np.complex128)) ** 2).sum(1)
        if self.weights is None:
            per_pulse = np.full(len(energy), math.prod(self.samples[1:]), np.float64)
        else:
            per_pulse = (self.weights.astype(np.float64) ** 2).sum((1, 2))
        return math.sqrt(float(energy @ per_pulse) / (self.rank * math.prod(self.matrix)))

    def angles(self) -> list[NDArray[np.float32]]:
        """2π k/N of all samples along each of the `axes`, shape (T S R,) each."""
        return [
            np.ascontiguousarray(self.trajectory[..., axis]).reshape(-1)
            * np.float32(2 * np.pi / self.matrix[axis])
            for axis in self.axes
        ]


def forward(
    sampling: Sampling,
    sensitivities: NDArray[np.complex64],
    images: Images,
    *,
    threads: int | None = None,
) -> NDArray[np.complex64]:
    """K-space of coefficient images, A x without weights: low rank inversion (§2.8).

    Args:
        sampling: the samples.
        sensitivities: of the coils, shape (C, N0, N1, N2).
        images: coefficients, shape (K, N0, N1, N2).
        threads: all cores of this process if None.

    Returns:
        Shape (C, T, S, R).

    Raises:
        ValueError: shapes that disagree.
    """
    _require_maps(sampling, sensitivities)
    _require_images(sampling, images)
    plan = _plan(sampling, 2, threads)
    kspace = np.zeros((len(sensitivities), *sampling.samples), np.complex64)
    for coil, of_coil in zip(sensitivities, kspace, strict=True):
        for image, vector in zip(images, sampling.rows.T, strict=True):
            values = plan.execute(_squeezed(sampling, coil * image))
            of_coil += vector[:, None, None] * values.reshape(sampling.samples)
    kspace *= np.float32(math.prod(sampling.matrix) ** -0.5)
    return kspace


def adjoint(
    sampling: Sampling,
    sensitivities: NDArray[np.complex64],
    kspace: NDArray[np.complex64],
    *,
    threads: int | None = None,
) -> Images:
    """Coefficient images of weighted k-space: Aᴴ W y.

    Args:
        sampling: the samples.
        sensitivities: of the coils, shape (C, N0, N1, N2).
        kspace: shape (C, T, S, R); one coil is read at a time, so that it may lie on the disk.
        threads: all cores of this process if None.

    Returns:
        Shape (K, N0, N1, N2).

    Raises:
        ValueError: shapes that disagree, or NaN among the samples.
    """
    _require_maps(sampling, sensitivities)
    n_coils = len(sensitivities)
    _checks.shape("k-space", kspace, [("C", n_coils), *zip("TSR", sampling.samples, strict=True)])
    plan = _plan(sampling, 1, threads)
    images = np.zeros(sampling.shape, np.complex64)
    for number, coil in enumerate(sensitivities):
        samples = np.asarray(kspace[number], dtype=np.complex64)
        _checks.finite(f"k-space of coil {number}", samples)
        if sampling.weights is not None:
            samples = samples * sampling.weights
        for image, vector in zip(images, sampling.rows.T, strict=True):
            strengths = samples * vector.conj()[:, None, None]
            image += coil.conj() * plan.execute(strengths.reshape(-1)).reshape(sampling.matrix)
    images *= np.float32(math.prod(sampling.matrix) ** -0.5)
    return images


def _plan(sampling: Sampling, kind: int, threads: int | None) -> finufft.Plan:
    """Type 2: exp(-i k r) from images to samples; type 1: its adjoint."""
    plan = finufft.Plan(
        kind,
        tuple(sampling.matrix[axis] for axis in sampling.axes),
        eps=_PRECISION,
        isign=-1 if kind == 2 else 1,
        dtype="complex64",
        nthreads=threads or _threads.usable(),
        showwarn=0,
    )
    plan.setpts(*sampling.angles())
    return plan


def _squeezed(sampling: Sampling, image: NDArray[np.complex64]) -> NDArray[np.complex64]:
    return image.reshape([sampling.matrix[axis] for axis in sampling.axes]).astype(np.complex64)


def _require_maps(sampling: Sampling, sensitivities: NDArray[np.complexfloating]) -> None:
    _checks.shape(
        "the sensitivities",
        sensitivities,
        [("C", None), *zip(("N0", "N1", "N2"), sampling.matrix, strict=True)],
    )


def _require_images(sampling: Sampling, images: NDArray[np.complexfloating]) -> None:
    _checks.shape(
        "the images",
        images,
        list(zip(("K", "N0", "N1", "N2"), sampling.shape, strict=True)),
    )


def _require_units(trajectory: NDArray[np.float32], matrix: Matrix) -> None:
    for axis, n in enumerate(matrix):
        component = trajectory[..., axis]
        reach = float(np.abs(component).max(initial=0.0))
        if n == 1:
            if reach > 0:
                raise ValueError(
                    f"a matrix of one voxel along axis {axis} needs a trajectory of zeros there; "
                    f"got up to {reach:.4g}. Give the matrix of a volume, or a planar trajectory."
                )
        elif reach > n / 2 * _EDGE:
            raise ValueError(
                f"the trajectory must stay within ±N/2 = ±{n / 2:g} in 1/(field of view) along "
                f"axis {axis}; got up to {reach:.4g}, which looks like "
                f"{_looks_like(reach, n)}. Rescale it, or reconstruct a larger matrix."
            )
    # Along which axis it reaches far is the reader's choice; along none is a mistake.
    reach = float(np.abs(trajectory).max(initial=0.0))
    largest = max(matrix)
    if largest >= 16 and 0 < reach <= 3.15 and reach < largest / 4:
        unit, factor = (
            ("cycles per voxel", f"N = {largest}")
            if reach <= 0.501
            else ("radians per voxel", f"N/2π = {largest / (2 * np.pi):.4g}")
        )
        raise ValueError(
            f"the trajectory must reach towards ±N/2 = ±{largest / 2:g} in 1/(field of view); got "
            f"at most {reach:.4g}, which looks like {unit}. Multiply it by {factor}."
        )


def _looks_like(reach: float, n: int) -> str:
    if reach <= n * _EDGE:
        return f"a readout with oversampling, or the matrix {2 * int(np.ceil(reach))}"
    if reach <= np.pi * n * _EDGE:
        return "radians per field of view (divide by 2π)"
    return "1/m or rad/m (multiply by the field of view in m)"


def _warn_if_undetermined(sampling: Sampling) -> None:
    """One coil sees at most as many numbers as there are samples."""
    needed = sampling.rank * math.prod(sampling.matrix)
    # Spokes fill a ball (a disc), not the cube.
    needed = int(needed * {2: np.pi / 4, 3: np.pi / 6}.get(len(sampling.axes), 1.0))
    there = math.prod(sampling.samples)
    n_cycles = sampling.samples[1]
    if there < needed:
        cycles = math.ceil(needed * n_cycles / max(there, 1))
        warnings.warn(
            f"{n_cycles} cycles give {there} samples a coil for {needed} unknowns of "
            f"{sampling.rank} coefficients: without regularization or several coils the images "
            f"are not determined. About {cycles} cycles would be enough.",
            UndersampledWarning,
            stacklevel=4,
        )


class UndersampledWarning(UserWarning):
    """Fewer samples of a coil than unknowns."""
