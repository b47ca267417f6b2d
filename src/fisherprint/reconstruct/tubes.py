"""A digital phantom of six tubes after §2.8: three protein concentrations, half of them doped.

The paper prints values of one mixture alone; the others are scaled from it as said here
(docs/decisions/035-digital-tubes.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fisherprint import _checks

# Cross-linked bovine serum albumin, 15 % of the weight, undoped, at 3 T.
_MEASURED = {"m0s": 0.085, "T1": 0.835, "T2f": 52e-3, "Rx": 71.0, "T2s": 13e-6}
_MEASURED_PERCENT = 15.0
CONCENTRATIONS = (10.0, 15.0, 20.0)
"""Of the protein, % of the weight (§2.8)."""
# Water without protein, at room temperature, 1/s.
_WATER_R1, _WATER_R2 = 0.35, 0.5
# 0.1 mM of MnCl2 with about 7 and 100 1/(s mM) adds this to R1 and R2 of the water, 1/s.
_DOPED_R1, _DOPED_R2 = 0.7, 10.0

FIELD_OF_VIEW = 128.0
"""Edge of the slice, mm."""
# mm: tubes of 28 mm on a circle.
_RADIUS, _CIRCLE = 14.0, 40.0


def mixture(percent: float, *, doped: bool) -> Mapping[str, float]:
    """Parameters of a mixture, SI units.

    m0s is proportional to the concentration c, and so are the relaxation rates that the protein
    adds to those of water; doping adds constants. Exchange and T2s are those of the measured one.

    Args:
        percent: c, % of the weight.
        doped: with 0.1 mM of MnCl2.

    Raises:
        ValueError: a concentration that is not positive.
    """
    share = _checks.positive("the concentration (%)", percent) / _MEASURED_PERCENT
    R1 = _WATER_R1 + share * (1 / _MEASURED["T1"] - _WATER_R1) + doped * _DOPED_R1
    R2 = _WATER_R2 + share * (1 / _MEASURED["T2f"] - _WATER_R2) + doped * _DOPED_R2
    return MappingProxyType(
        _MEASURED | {"m0s": share * _MEASURED["m0s"], "T1": 1 / R1, "T2f": 1 / R2}
    )


@dataclass(frozen=True, eq=False)
class DigitalTubes:
    """A slice through six tubes whose parameters are known.

    Attributes:
        theta: parameters in SI units, shape (X, Y, 1, P); NaN outside the tubes.
        names: names of the P parameters.
        m0: complex scale M0, shape (X, Y, 1); |M0| = 1 in the tubes, zero outside.
        labels: number of the tube, 1 to 6, shape (X, Y, 1); 0 outside.
        eroded: the same without the outermost voxels of each tube, for regions (§2.8).
        tubes: their names, in the order of the labels.
        affine: voxel index -> mm, shape (4, 4).
    """

    theta: NDArray[np.float64]
    names: tuple[str, ...]
    m0: NDArray[np.complex128]
    labels: NDArray[np.uint8]
    eroded: NDArray[np.uint8]
    tubes: tuple[str, ...]
    affine: NDArray[np.float64]


def digital_tubes(names: Sequence[str], *, voxel_size: float = 1.0) -> DigitalTubes:
    """The phantom's central slice. B0, B1 and the phase of M0 vary smoothly; nothing is random.

    Args:
        names: the wanted parameters in their order: m0s, T1, T2f, Rx, T2s, B0 (rad/s), B1.
        voxel_size: edge of the voxels, mm.

    Raises:
        KeyError: another parameter.
        ValueError: voxels too large for a tube to have an inside.
    """
    known = (*_MEASURED, "B0", "B1")
    for name in names:
        _checks.index(name, known)
    size = _checks.positive("the voxel size (mm)", voxel_size)
    if size > _RADIUS / 3:
        raise ValueError(
            f"the voxels of tubes of {2 * _RADIUS:g} mm must be at most {_RADIUS / 3:.2g} mm; got "
            f"{size:g}. Make them smaller."
        )
    n = round(FIELD_OF_VIEW / size)
    centres = (np.arange(n) - (n - 1) / 2) * size
    x, y = np.meshgrid(centres, centres, indexing="ij")
    labels = np.zeros((n, n), dtype=np.uint8)
    found = {}
    for i, (doped, percent) in enumerate((d, c) for d in (False, True) for c in CONCENTRATIONS):
        angle = np.pi / 3 * i
        at = _CIRCLE * np.cos(angle), _CIRCLE * np.sin(angle)
        labels[(x - at[0]) ** 2 + (y - at[1]) ** 2 <= _RADIUS**2] = i + 1
        found[f"{percent:g} % BSA{' + MnCl2' * doped}"] = mixture(percent, doped=doped)
    fields = {
        "B0": 40 * x / 64 - 60 * (y / 64) ** 2 + 20,
        "B1": 1.1 - 0.3 * (x**2 + y**2) / 64**2,
    }
    of_tube = np.maximum(labels, 1) - 1
    theta = np.stack(
        [
            fields[name]
            if name in fields
            else np.array([values[name] for values in found.values()])[of_tube]
            for name in names
        ],
        axis=-1,
    )
    theta[labels == 0] = np.nan
    m0 = np.where(labels > 0, np.exp(1j * (0.8 * x - 0.5 * y) / 64), 0)
    inside = ndimage.binary_erosion(labels > 0, iterations=2)
    affine = np.diag([size, size, size, 1.0])
    affine[:2, 3] = centres[0]
    return DigitalTubes(
        theta[:, :, None],
        tuple(names),
        m0[:, :, None],
        labels[:, :, None],
        (labels * inside)[:, :, None],
        tuple(found),
        affine,
    )
