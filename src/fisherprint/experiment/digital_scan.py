"""The digital scan: raw data of a brain or of tubes whose parameters are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, files
from fisherprint.experiment.folder import Progress, Run, Say
from fisherprint.experiment.mapping import Trained
from fisherprint.experiment.reconstructing import (
    MemoryForecastError,
    ReconstructionError,
    basis_and_model,
)
from fisherprint.reconstruct import phantom, planning, scanning, trajectory, tubes

_VOXELS_AT_ONCE = 4096
# Middle of the head in MNI space, mm.
_MIDDLE = (0.0, -18.0, 8.0)
# Voxels of the digital brain that count as one tissue: at least this share of it.
_PURE = 0.9
# mm: a head in all directions.
_HEAD = 224.0


@dataclass(frozen=True)
class DigitalScan:
    """A radial scan of the digital brain, or of a slice through the digital tubes.

    Attributes:
        matrix: N of a cube, or of the square slice.
        field_of_view: edge of that, mm; if None, 224, or the 128 of the tubes.
        cycles: how often the train is played.
        coils: how many.
        oversampling: samples along a spoke for each step of 1/(field of view).
        noise_std: σ of the real and of the imaginary part of a sample, where |M0| ≤ 1; a Cartesian
            scan of as many samples as voxels would have the same in its images.
        seed: of the noise.
        tubes: scan the tubes, not the brain.
    """

    matrix: int = 48
    field_of_view: float | None = None
    cycles: int = 20
    coils: int = 8
    oversampling: int = 2
    noise_std: float = 0.01
    seed: int = 0
    tubes: bool = False

    @property
    def edge(self) -> float:
        """Field of view, mm."""
        if self.field_of_view is not None:
            return self.field_of_view
        return tubes.FIELD_OF_VIEW if self.tubes else _HEAD

    def __post_init__(self) -> None:
        _checks.positive("field of view", self.edge)
        for name in ("matrix", "cycles", "coils", "oversampling"):
            _checks.positive(name, getattr(self, name))
        if self.tubes and self.edge != tubes.FIELD_OF_VIEW:
            raise ValueError(
                f"the slice of the tubes has an edge of {tubes.FIELD_OF_VIEW:g} mm; got a field "
                f"of view of {self.edge:g} mm. Leave it out."
            )
        if not (np.isfinite(self.noise_std) and self.noise_std >= 0):
            raise ValueError(f"σ of the noise must be zero or above; got {self.noise_std}.")


@dataclass(frozen=True, eq=False)
class _Object:
    """What is scanned: θ (N0, N1, N2, P), M0, where it is, and regions of one kind each."""

    theta: NDArray[np.float64]
    m0: NDArray[np.complex128]
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]
    kind: str
    regions: dict[str, NDArray[np.bool_]]


def _brain(names: tuple[str, ...], wanted: DigitalScan) -> _Object:
    voxel = wanted.edge / wanted.matrix
    corner = [middle - voxel * (wanted.matrix // 2) for middle in _MIDDLE]
    # A little more than the last centre, so that rounding loses no voxel.
    low, high = corner, [x + voxel * (wanted.matrix - 0.5) for x in corner]
    brain = phantom.digital_brain(
        files.read_tissue_maps(),
        names,
        box=((low[0], high[0]), (low[1], high[1]), (low[2], high[2])),
        voxel_size=voxel,
    )
    shares = zip(brain.tissues, np.moveaxis(brain.fractions, -1, 0), strict=True)
    regions = {tissue: share > _PURE for tissue, share in shares if (share > _PURE).any()}
    return _Object(brain.theta, brain.m0, brain.mask, brain.affine, "tissues", regions)


def _tubes(names: tuple[str, ...], wanted: DigitalScan) -> _Object:
    found = tubes.digital_tubes(names, voxel_size=wanted.edge / wanted.matrix)
    regions = {tube: found.eroded == i for i, tube in enumerate(found.tubes, start=1)}
    return _Object(found.theta, found.m0, found.labels > 0, found.affine, "tubes", regions)


def scan_phantom(
    source: Run | Trained, output: Path, wanted: DigitalScan, *, say: Say, progress: Progress
) -> None:
    """Scan brain or tubes with the train of a run or of a shipped network, with noise.

    Writes `output`, raw data with trajectory, noise samples and true sensitivities; and beside it
    `<name>-truth/`: the coefficient images without noise, the mask, masks of tissues or tubes.

    Args:
        source: a run, whose data set has train, basis and model, or a shipped network.
        output: `.h5`.
        wanted: the scan.
        say: told what was written.
        progress: told how many voxels and pulses are done.

    Raises:
        ModuleNotFoundError: nilearn, which brings the tissues, is not installed.
        ValueError: a matrix too coarse for the tubes.
        MemoryForecastError: the signals of all voxels do not fit into memory.
    """
    if output.suffix != ".h5":
        raise ReconstructionError(f"expected raw data as .h5; got {output}. Change the suffix.")
    basis, model = basis_and_model(source)
    scanned = (_tubes if wanted.tubes else _brain)(model.names, wanted)
    mask, theta = scanned.mask, scanned.theta[scanned.mask]
    n_pulses = len(basis.vectors)
    there = planning.available_memory()
    if there is not None and 8 * len(theta) * n_pulses > there:
        raise MemoryForecastError(
            f"expected {8 * len(theta) * n_pulses / 2**30:.3g} GiB of memory for the signals of "
            f"{len(theta)} voxels; {there / 2**30:.3g} GiB are left. Take a smaller matrix."
        )
    signals = np.empty((n_pulses, len(theta)), np.complex64)
    for first in range(0, len(theta), _VOXELS_AT_ONCE):
        part = slice(first, first + _VOXELS_AT_ONCE)
        signals[:, part] = model.signal(theta[part]).T
        progress("voxels of the phantom", min(part.stop, len(theta)), len(theta))
    signals *= scanned.m0[mask].astype(np.complex64)

    def frame(pulse: int) -> NDArray[np.complex64]:
        image = np.zeros(mask.shape, np.complex64)
        image[mask] = signals[pulse]
        progress("pulses", pulse + 1, n_pulses)
        return image

    position = trajectory.readout(wanted.matrix, wanted.oversampling)
    spokes = trajectory.radial_scan(n_pulses, wanted.cycles, position, planar=wanted.tubes)
    maps = scanning.coil_sensitivities(mask.shape, wanted.coils)
    rng = np.random.default_rng(wanted.seed)
    others: dict[str, Any] = {
        "trajectory": spokes,
        "matrix": np.array(mask.shape),
        "affine": scanned.affine,
        "sensitivities": maps,
    }
    if wanted.noise_std:
        noise = rng.standard_normal((wanted.coils, 4096, 2)).view(np.complex128)[..., 0]
        others["noise"] = (wanted.noise_std * noise).astype(np.complex64)
    shape = (wanted.coils, n_pulses, wanted.cycles, len(position))
    samples = scanning.acquire(spokes, maps, frame, noise_std=wanted.noise_std, rng=rng)
    files.write_kspace(output, shape, samples, **others)
    truth = np.zeros((*mask.shape, basis.rank), np.complex64)
    truth[mask] = signals.T @ basis.vectors.conj().astype(np.complex64)
    folder = output.with_name(output.stem + "-truth")
    volume = files.Volume(truth, scanned.affine)
    files.write_coefficients(folder / "coefficients.nii.gz", volume, basis_sha256=basis.digest)
    files.write_mask(folder / "mask.nii.gz", mask, volume=volume)
    for name, region in scanned.regions.items():
        path = folder / scanned.kind / f"{name.replace(' ', '_')}.nii.gz"
        files.write_mask(path, region, volume=volume)
    say(f"raw data: {output}")
    say(f"without noise: {folder}")
