"""From coefficient images and any estimator to parameter maps (§3.3, §3.4).

An *estimator* is any callable from coefficients (..., K), complex, to parameters (..., E): a
network, a non-linear fit or a function of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fisherprint import _checks

Estimator = Callable[[NDArray[np.complexfloating]], NDArray[np.floating]]

# Voxels for one call of the estimator: enough to keep all cores busy, 7 MB of 13 coefficients.
_CHUNK = 65536


class Status(IntEnum):
    """What is to be thought of a voxel's estimates; where several hold, the smallest code."""

    FINE = 0
    """Nothing of what follows."""
    OUTSIDE_MASK = 1
    """Nobody asked."""
    NOT_FINITE = 2
    """No estimate: no signal, NaN, or a known map without a usable value. NaN in all maps."""
    NOT_CONVERGED = 3
    """A search ended early; for maps of a network, no error bars were found."""
    AT_BOUND = 4
    """An estimate at a limit of the fit, or, of a network, at or beyond one of the model."""
    OUTSIDE_RANGE = 5
    """An estimate outside of the range that a network was trained in."""
    MISFIT = 6
    """The model's residual is larger than the noise explains."""


def classified(found: Mapping[Status, NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """The `Status` of each voxel, from where each of them holds: arrays of one shape."""
    shape = next(iter(found.values())).shape
    status = np.full(shape, Status.FINE, dtype=np.uint8)
    for code in sorted(found, reverse=True):
        status[found[code]] = code
    return status


def counted(status: NDArray[np.uint8]) -> dict[str, int]:
    """How many voxels have each `Status`, by its name in lower case."""
    numbers = np.bincount(status.ravel(), minlength=max(Status) + 1)
    return {code.name.lower(): int(numbers[code]) for code in Status}


@dataclass(frozen=True, eq=False)
class Maps:
    """Parameter maps of one volume.

    Attributes:
        names: names of the E parameters.
        values: their maps in SI units, spatial axes and then E; NaN outside the mask and where
            the estimation failed.
        mask: the voxels that were asked for, bool, spatial axes.
        n_failed: voxels of the mask without a finite estimate of every parameter.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    mask: NDArray[np.bool_]
    n_failed: int

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """The map of one parameter; an unknown name raises a KeyError that lists the known."""
        return self.values[..., _checks.index(name, self.names)]


def estimate_maps(
    coefficients: NDArray[np.complexfloating],
    estimator: Estimator,
    names: Sequence[str],
    *,
    mask: NDArray[np.bool_] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Maps:
    """Estimate the parameters of each voxel of the mask (§3.4).

    A voxel fails, and is NaN in all maps, if one of its coefficients is NaN or Inf, if all are
    zero (no signal, hence no information), or if one of its estimates is NaN or Inf. It never
    stops the volume. The estimator sees the other voxels alone, a bounded number at a time.

    Args:
        coefficients: complex, one to three spatial axes and then K.
        estimator: coefficients (V, K) -> parameters (V, E).
        names: names of the E parameters.
        mask: bool, the spatial axes; `automatic_mask` where it is None.
        on_progress: called with the voxels done and the voxels in all, after each chunk.

    Raises:
        ValueError: axes that do not fit, coefficients that are not complex, an empty mask, or an
            estimator that returns another shape than (V, E).
    """
    _check_coefficients(coefficients)
    spatial = coefficients.shape[:-1]
    if mask is None:
        mask = automatic_mask(coefficients)
    _checks.shape("the mask", mask, list(zip("XYZ", spatial, strict=False)))
    wanted = np.flatnonzero(mask)
    if not wanted.size:
        raise ValueError("the mask must hold at least one voxel; got none. Check its values.")

    voxels = coefficients.reshape(-1, coefficients.shape[-1])
    values = np.full((len(voxels), len(names)), np.nan)
    n_failed = 0
    for start in range(0, wanted.size, _CHUNK):
        chunk = wanted[start : start + _CHUNK]
        given = voxels[chunk]
        usable = np.isfinite(given).all(-1) & given.any(-1)
        estimates = np.full((len(chunk), len(names)), np.nan)
        if usable.any():
            estimates[usable] = _estimated(estimator, given[usable], len(names))
        failed = ~np.isfinite(estimates).all(-1)
        estimates[failed] = np.nan
        values[chunk] = estimates
        n_failed += int(failed.sum())
        if on_progress is not None:
            on_progress(start + len(chunk), wanted.size)
    return Maps(
        tuple(names),
        values.reshape(*spatial, len(names)),
        np.array(mask, dtype=np.bool_),
        n_failed,
    )


def automatic_mask(coefficients: NDArray[np.complexfloating]) -> NDArray[np.bool_]:
    """The largest object in the volume, from the signal's energy; deterministic.

    The logarithm of the norm over the coefficients is split by Otsu's threshold, with what lies
    below 1/1000 of the 99th percentile raised to it (an empty background has no logarithm). If
    the two sides' geometric means differ by less than a factor of 4, there is no background, and
    the object is all that is above that floor. Of this, the largest connected part is kept and
    its holes are filled. Values that are not finite count as background.

    Args:
        coefficients: complex, one to three spatial axes and then K.

    Returns:
        bool, the spatial axes.

    Raises:
        ValueError: coefficients of another kind, or without any signal.
    """
    _check_coefficients(coefficients)
    # As two real sums in double precision: no complex copy, and no underflow of small scales.
    real, imag = coefficients.real, coefficients.imag
    energy = np.einsum("...k,...k->...", real, real, dtype=np.float64)
    energy += np.einsum("...k,...k->...", imag, imag, dtype=np.float64)
    norm = np.sqrt(np.where(np.isfinite(energy), energy, 0))
    if not norm.any():
        raise ValueError(
            "an automatic mask needs signal; all coefficients are zero, NaN or Inf. "
            "Check the input or give a mask."
        )
    # The percentile is that of voxels with signal: a small object must not set it to zero.
    floor = 1e-3 * np.percentile(norm[norm > 0], 99)
    level = np.log(np.maximum(norm, floor))
    above = level > _otsu_threshold(level)
    split = 0 < above.sum() < above.size
    if not split or level[above].mean() - level[~above].mean() < np.log(4):
        above = norm > floor

    # A single slice is a plane: with its third axis, every hole would be open on both sides.
    plane = above.squeeze()
    parts, _ = ndimage.label(plane)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(parts == sizes.argmax())).reshape(above.shape)


# Bins of the joint histogram of m0s and T1, and the width of its smoothing in bins.
_M0S_BIN, _T1_BIN, _SMOOTHING = 0.005, 0.025, 3.0
# A local maximum counts as a mode of tissue from this share of the highest one on.
_MODE_SHARE = 0.2
# White matter reaches this far from its mode, relative to it.
_M0S_REACH, _T1_REACH = 0.2, 0.1


def white_matter(m0s: NDArray[np.floating], T1: NDArray[np.floating]) -> NDArray[np.bool_]:
    """White matter by the joint mode of m0s and T1 alone, no hand-drawn mask.

    White matter has the largest macromolecular pool of the brain's large tissues. Of the modes of
    the smoothed joint histogram of m0s and T1 (or T1f) that reach a fifth of the highest, its mode
    is the one with the largest m0s; white matter are the voxels within 20 % of it in m0s and
    10 % in T1 (docs/decisions/011-white-matter.md).

    Args:
        m0s: map, any shape; NaN is left out.
        T1: in s, the same shape.

    Returns:
        bool, the same shape.

    Raises:
        ValueError: shapes that differ, or no voxel with m0s in [0, 0.5] and T1 in [0, 5] s.
    """
    _checks.shape("T1", T1, [(axis, n) for axis, n in zip("XYZ", m0s.shape, strict=False)])
    limits = ((0.0, 0.5), (0.0, 5.0))
    bins = (round(0.5 / _M0S_BIN), round(5.0 / _T1_BIN))
    usable = np.isfinite(m0s) & np.isfinite(T1)
    histogram, *edges = np.histogram2d(m0s[usable], T1[usable], bins=bins, range=limits)
    if not histogram.any():
        raise ValueError(
            "white matter needs voxels with m0s in [0, 0.5] and T1 in [0, 5] s; got none. "
            "Check the order of the maps and their units."
        )
    density = ndimage.gaussian_filter(histogram, _SMOOTHING, mode="constant")
    modes = (density == ndimage.maximum_filter(density, size=5)) & (
        density >= _MODE_SHARE * density.max()
    )
    row, column = np.argwhere(modes)[-1]  # rows are sorted by m0s
    mode_m0s, mode_T1 = edges[0][row] + _M0S_BIN / 2, edges[1][column] + _T1_BIN / 2
    # NaN is far from everything.
    return np.asarray(
        (np.abs(m0s - mode_m0s) <= _M0S_REACH * mode_m0s)
        & (np.abs(T1 - mode_T1) <= _T1_REACH * mode_T1)
    )


# Nearer to fluid (4 s at 3 T) than to grey matter (T1f of 2.5 s): partial volume stays out.
FLUID_T1 = 3.5


def fluid(T1: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Cerebrospinal fluid: T1 (or T1f) of at least 3.5 s, whatever m0s and T2f are there.

    Args:
        T1: map in s, any shape; NaN is left out.

    Returns:
        bool, the same shape.
    """
    return np.asarray(T1 >= FLUID_T1)


def longitudinal(names: Sequence[str]) -> str | None:
    """Which of the names is the T1 of tissue water: `T1f`, else `T1`; None if it has neither."""
    return next((name for name in ("T1f", "T1") if name in names), None)


def _otsu_threshold(values: NDArray[np.float64]) -> float:
    """The value that splits `values` with the greatest variance between the two sides."""
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1]
    above = below[-1] + counts[-1] - below
    sums = np.cumsum(counts * centres)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
    between = np.nan_to_num(below * above * difference**2)
    # An empty gap makes all thresholds in it equal: take its middle.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[1:-1][best[[0, -1]]].mean())


def _estimated(
    estimator: Estimator, coefficients: NDArray[np.complexfloating], n_parameters: int
) -> NDArray[np.floating]:
    estimates = np.asarray(estimator(coefficients))
    _checks.shape("the estimates", estimates, [("V", len(coefficients)), ("E", n_parameters)])
    return estimates


def _check_coefficients(coefficients: NDArray[np.complexfloating]) -> None:
    if not 2 <= coefficients.ndim <= 4:
        raise ValueError(
            "coefficients must have one to three spatial axes and then K; got the shape "
            f"{coefficients.shape}."
        )
    if not np.iscomplexobj(coefficients):
        raise ValueError(
            f"coefficients must be complex; got {coefficients.dtype}. Give the complex images, "
            "not their magnitude."
        )
