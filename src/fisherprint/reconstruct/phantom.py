"""The digital brain: parameter maps with a known truth, from tissue probabilities.

Arrays in, arrays out. The tissue values are for 3 T: means over regions of interest in published
maps of quantitative magnetization transfer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fisherprint import _checks


@dataclass(frozen=True)
class Tissue:
    """What one tissue is made of.

    Attributes:
        m0s: fraction of the semi-solid pool.
        T1f: longitudinal relaxation time of the free pool, s.
        T1s: that of the semi-solid pool, s.
        T2f: transverse relaxation time of the free pool, s.
        Rx: exchange rate, 1/s.
        T2s: transverse relaxation time of the semi-solid pool, s.
        water: proton density relative to that of cerebrospinal fluid.
    """

    m0s: float
    T1f: float
    T1s: float
    T2f: float
    Rx: float
    T2s: float
    water: float

    @property
    def T1(self) -> float:
        """Apparent relaxation time of both pools, s: 1/T1 = (1 − m0s)/T1f + m0s/T1s."""
        return 1 / ((1 - self.m0s) / self.T1f + self.m0s / self.T1s)

    @property
    def T2(self) -> float:
        """Transverse relaxation time of a single pool, s: that of the free one, which is seen."""
        return self.T2f


# Water contents of white and grey matter are rounded from published maps (about 0.69 and 0.84);
# those of the nuclei are set between them, for a plausible contrast only.
TISSUES: Mapping[str, Tissue] = MappingProxyType(
    {
        "white matter": Tissue(0.212, 1.84, 0.340, 76.9e-3, 13.6, 12.5e-6, 0.70),
        "grey matter": Tissue(0.098, 2.46, 0.420, 83.0e-3, 14.0, 14.4e-6, 0.83),
        "CSF": Tissue(0.001, 4.0, 0.33, 2.0, 10.0, 12e-6, 1.0),
        "caudate": Tissue(0.113, 1.95, 0.432, 73.3e-3, 13.8, 15.1e-6, 0.82),
        "putamen": Tissue(0.118, 1.84, 0.385, 67.4e-3, 14.9, 15.4e-6, 0.82),
        "pallidum": Tissue(0.164, 1.664, 0.351, 59.3e-3, 15.8, 14.9e-6, 0.76),
        "thalamus": Tissue(0.158, 2.02, 0.396, 70.8e-3, 14.2, 13.0e-6, 0.77),
    }
)

TISSUE_PARAMETERS = ("m0s", "T1", "T1f", "T1s", "T2", "T2f", "Rx", "T2s")
FIELD_PARAMETERS = ("B0", "B1")


@dataclass(frozen=True)
class _Ellipsoid:
    """A nucleus of the right half of the brain, in MNI mm; the left one is its mirror image."""

    centre: tuple[float, float, float]
    semi_axes: tuple[float, float, float]
    turn: float  # degrees about z, counter-clockwise seen from above

    def holds(self, points: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of the points (..., 3) lie inside it or its mirror image."""
        offset = np.stack([np.abs(points[..., 0]), points[..., 1], points[..., 2]], -1)
        offset -= self.centre
        c, s = np.cos(np.deg2rad(self.turn)), np.sin(np.deg2rad(self.turn))
        along = np.stack(
            [
                c * offset[..., 0] + s * offset[..., 1],
                c * offset[..., 1] - s * offset[..., 0],
                offset[..., 2],
            ],
            -1,
        )
        return ((along / self.semi_axes) ** 2).sum(-1) <= 1


# Approximate centres in MNI space; axes and turns fitted by eye to the T1 template, rather too
# small than beyond the nucleus. Where two overlap, the first one has the place.
NUCLEI: Mapping[str, _Ellipsoid] = MappingProxyType(
    {
        "pallidum": _Ellipsoid((19, -4, 0), (4.5, 9.5, 6), 25),
        "putamen": _Ellipsoid((26, 2, 1), (5.5, 15.5, 10), 14),
        "caudate": _Ellipsoid((13, 12, 10), (4.8, 11, 11), -10),
        "thalamus": _Ellipsoid((11, -18, 8), (8.5, 13, 9), 20),
    }
)


@dataclass(frozen=True, eq=False)
class TissueMaps:
    """Probabilities of the tissues on one grid, in MNI space.

    Attributes:
        grey: probability of grey matter, shape (X, Y, Z).
        white: that of white matter.
        brain: what lies within the brain's hull, fluid included, bool.
        affine: voxel index -> mm (right, anterior, superior), shape (4, 4).
    """

    grey: NDArray[np.float32]
    white: NDArray[np.float32]
    brain: NDArray[np.bool_]
    affine: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DigitalBrain:
    """A brain whose parameters are known in every voxel.

    Attributes:
        theta: parameters in SI units, shape (X, Y, Z, P); NaN outside the mask.
        names: names of the P parameters.
        m0: complex scale M0, shape (X, Y, Z); |M0| ≤ 1, zero outside the mask.
        fractions: share of each tissue in the voxel, shape (X, Y, Z, tissues); sums to 1 inside.
        tissues: names of the tissues.
        mask: voxels of the brain, bool, shape (X, Y, Z).
        affine: voxel index -> MNI mm, shape (4, 4).
    """

    theta: NDArray[np.float64]
    names: tuple[str, ...]
    m0: NDArray[np.complex128]
    fractions: NDArray[np.float64]
    tissues: tuple[str, ...]
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64]


# Points along an edge of a voxel that its shares of the tissues are the mean of.
_MOST_POINTS = 8

Box = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

# All of the head in-plane; in z from the pallidum's lower edge to above the lateral ventricles.
DEEP_SLAB: Box = ((-90.0, 90.0), (-126.0, 90.0), (-12.0, 24.0))


def digital_brain(
    tissue_maps: TissueMaps, names: Sequence[str], *, box: Box = DEEP_SLAB, voxel_size: float = 2.0
) -> DigitalBrain:
    """Parameter maps of a brain at 3 T with grey and white matter, four deep nuclei and fluid.

    What is inside the hull but neither grey nor white matter is cerebrospinal fluid, in sulci and
    ventricles alike. The nuclei (`NUCLEI`) replace grey and white matter, never fluid.

    The truth of a voxel is the mean of its tissues' values (of each parameter, so of T1, not of
    1/T1), weighted by their shares. B0, B1 and the phase of M0 are smooth functions of position.
    Nothing is random.

    Args:
        tissue_maps: probabilities in MNI space.
        names: the wanted parameters in their order: m0s, T1 (apparent), T1f, T1s, T2 (of a single
            pool), T2f, T2s, Rx, B0 (rad/s), B1.
        box: first and last voxel centre along x, y and z, in MNI mm.
        voxel_size: edge of the cubic voxels, mm.

    Raises:
        KeyError: an unknown parameter.
        ValueError: a box without brain, or arrays that do not fit one another.
    """
    known = TISSUE_PARAMETERS + FIELD_PARAMETERS
    for name in names:
        _checks.index(name, known)
    _checks.positive("the voxel size (mm)", voxel_size)
    _checks.shape("grey matter", tissue_maps.grey, [("X", None), ("Y", None), ("Z", None)])
    grid = list(zip("XYZ", tissue_maps.grey.shape, strict=True))
    _checks.shape("white matter", tissue_maps.white, grid)
    _checks.shape("the brain's hull", tissue_maps.brain, grid)

    low, high = np.array(box, dtype=np.float64).T
    counts = np.floor((high - low) / voxel_size + 1e-9).astype(int) + 1
    if (counts < 1).any():
        raise ValueError(
            f"the box needs low ≤ high along each axis; got {box} mm. "
            "Give a pair (first, last) for each of x, y and z."
        )
    affine = np.diag([voxel_size, voxel_size, voxel_size, 1.0])
    affine[:3, 3] = low

    fractions, hull = _tissue_fractions(tissue_maps, affine, counts)
    mask = hull >= 0.5
    if not mask.any():
        raise ValueError(
            f"the box must hold brain; got {box} mm, which holds none. "
            "Give MNI coordinates (right, anterior, superior) in mm."
        )
    fractions[~mask] = 0
    fractions[mask] /= fractions[mask].sum(-1, keepdims=True)

    fields = dict(zip(FIELD_PARAMETERS, _fields(_positions(affine, counts)), strict=True))
    theta = np.stack(
        [fields[name] if name in fields else _mean_of(name, fractions) for name in names], -1
    )
    theta[~mask] = np.nan
    m0 = _mean_of("water", fractions) * np.exp(1j * _phase(_positions(affine, counts)))
    return DigitalBrain(theta, tuple(names), m0, fractions, tuple(TISSUES), mask, affine)


def _mean_of(attribute: str, fractions: NDArray[np.float64]) -> NDArray[np.float64]:
    return fractions @ np.array([getattr(tissue, attribute) for tissue in TISSUES.values()])


def _tissue_fractions(
    tissue_maps: TissueMaps, affine: NDArray[np.float64], counts: NDArray[np.int_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of the tissues (X, Y, Z, tissues) and of the hull: means over points in a voxel."""
    source_size = np.linalg.norm(tissue_maps.affine[:3, :3], axis=0).min()
    n_points = min(max(1, int(np.ceil(affine[0, 0] / source_size))), _MOST_POINTS)
    images = [
        image.astype(np.float32)
        for image in (tissue_maps.grey, tissue_maps.white, tissue_maps.brain)
    ]
    steps = (np.arange(n_points) + 0.5) / n_points - 0.5
    fractions = np.zeros((*counts, len(TISSUES)))
    hull = np.zeros(counts)
    for shift in np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3):
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ shift
        grey, white, inside = (
            _sample(image, tissue_maps.affine, moved, counts) for image in images
        )
        share = {
            "grey matter": grey,
            "white matter": white,
            "CSF": np.maximum(inside - grey - white, 0),
        }
        points = _positions(moved, counts)
        free = np.ones(counts, dtype=bool)
        for name, nucleus in NUCLEI.items():
            here = nucleus.holds(points) & free
            share[name] = np.where(here, grey + white, 0)
            free &= ~here
        share["grey matter"], share["white matter"] = grey * free, white * free
        fractions += np.stack([share[name] for name in TISSUES], -1)
        hull += inside
    return fractions / n_points**3, hull / n_points**3


def _sample(
    image: NDArray[np.float32],
    image_affine: NDArray[np.float64],
    affine: NDArray[np.float64],
    counts: NDArray[np.int_],
) -> NDArray[np.float64]:
    """`image` at the voxel centres of another grid, trilinear, zero outside."""
    index_map = np.linalg.inv(image_affine) @ affine
    return ndimage.affine_transform(
        image, index_map[:3, :3], index_map[:3, 3], tuple(counts), output=np.float64, order=1
    )


def _positions(affine: NDArray[np.float64], counts: NDArray[np.int_]) -> NDArray[np.float64]:
    """Voxel centres in mm, shape (X, Y, Z, 3)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in counts), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def _fields(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """B0 in rad/s and relative B1 at points (..., 3) in MNI mm.

    Air in the frontal sinus and the temporal bones shifts B0 up beside it; the shim that makes
    good for it pulls the rest of the brain below zero. B1 is high in the centre of the head, as
    dielectric resonance makes it at 3 T.
    """
    x, y, z = np.moveaxis(points, -1, 0)
    sinus = np.exp(-((x / 28) ** 2 + ((y - 62) / 26) ** 2 + ((z + 22) / 26) ** 2))
    bones = np.exp(-(((np.abs(x) - 56) / 22) ** 2 + ((y + 22) / 30) ** 2 + ((z + 30) / 24) ** 2))
    shim = 20 + 0.35 * x - 110 * ((y + 30) / 85) ** 2 - 50 * (x / 70) ** 2 - 35 * ((z - 10) / 60)
    b0 = 260 * sinus + 150 * bones + shim

    r2 = (x / 70) ** 2 + ((y + 18) / 88) ** 2 + ((z - 8) / 75) ** 2
    b1 = 0.75 + 0.45 * np.exp(-r2) + 0.02 * x / 70
    return b0, b1


def _phase(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Phase of M0 in rad: a receive phase that varies slowly over the head."""
    x, y, z = np.moveaxis(points, -1, 0)
    return 0.6 * x / 70 + 1.2 * (y + 18) / 88 - 0.4 * z / 60 + 0.5 * (x / 70) ** 2
