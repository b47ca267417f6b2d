"""Statistics of maps over regions of interest (§3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks


@dataclass(frozen=True)
class RegionStatistics:
    """What one map is like in one region; SI units.

    Attributes:
        label: number of the region.
        region: its name.
        parameter: of the map.
        voxels: in the region.
        failed: share of them without an estimate; all else is over the others.
        median: NaN, as all that follow, where no voxel has an estimate.
        lower_quartile: a quarter of the voxels is below.
        upper_quartile: a quarter is above.
        mean: arithmetic.
        sd: standard deviation over the voxels, of n - 1 degrees of freedom; NaN for a single one.
        mean_error: mean of the error bars, infinite where the signal tells nothing of a voxel;
            NaN without any. Where all are alike, noise alone would make this `sd`.
    """

    label: int
    region: str
    parameter: str
    voxels: int
    failed: float
    median: float
    lower_quartile: float
    upper_quartile: float
    mean: float
    sd: float
    mean_error: float


def statistics(
    maps: Mapping[str, NDArray[np.floating]],
    labels: NDArray[np.integer],
    *,
    errors: Mapping[str, NDArray[np.floating]] | None = None,
    names: Mapping[int, str] | None = None,
) -> tuple[RegionStatistics, ...]:
    """Statistics of each map over each region.

    Args:
        maps: by parameter, any shape; NaN where there is no estimate.
        labels: the same shape; 0 is outside of all regions.
        errors: standard deviations of the estimates, by parameter; any may be absent.
        names: of the labels; a region without a name is called by its number.

    Returns:
        All parameters of the lowest label, then those of the next.

    Raises:
        ValueError: another shape, labels that are no integers, or none but 0; or a name of a
            label that is not there.
        KeyError: errors of an unknown parameter.
    """
    errors, names = errors or {}, names or {}
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers; got {labels.dtype}. Round a labels volume, and never "
            "interpolate it."
        )
    shape = [(axis, n) for axis, n in zip("XYZ", labels.shape, strict=False)]
    for name in errors:
        _checks.index(name, tuple(maps))
    for what, images in (("map", maps), ("error", errors)):
        for name, image in images.items():
            _checks.shape(f"the {what} of {name}", image, shape)
    found = [int(label) for label in np.unique(labels) if label != 0]
    if not found:
        raise ValueError("labels must hold a region; got zeros alone. Check the file.")
    absent = sorted(set(names) - set(found))
    if absent:
        raise ValueError(
            f"expected names of the labels that are there, {_checks.listing(map(str, found))}; "
            f"got one of {absent[0]}, {names[absent[0]]!r}. Do names and labels belong together?"
        )
    return tuple(
        _statistics(label, names.get(label, str(label)), name, image, inside, errors.get(name))
        for label in found
        for inside in [labels == label]
        for name, image in maps.items()
    )


def _statistics(
    label: int,
    region: str,
    parameter: str,
    image: NDArray[np.floating],
    inside: NDArray[np.bool_],
    errors: NDArray[np.floating] | None,
) -> RegionStatistics:
    values = np.asarray(image[inside], dtype=np.float64)
    estimated = np.isfinite(values)
    used = values[estimated]
    quartiles = np.percentile(used, (25, 50, 75)) if len(used) else np.full(3, np.nan)
    bars = used[:0] if errors is None else np.asarray(errors[inside][estimated], dtype=np.float64)
    bars = bars[~np.isnan(bars)]
    return RegionStatistics(
        label=label,
        region=region,
        parameter=parameter,
        voxels=len(values),
        failed=float(1 - estimated.mean()),
        median=float(quartiles[1]),
        lower_quartile=float(quartiles[0]),
        upper_quartile=float(quartiles[2]),
        mean=float(used.mean()) if len(used) else np.nan,
        sd=float(used.std(ddof=1)) if len(used) > 1 else np.nan,
        mean_error=float(bars.mean()) if len(bars) else np.nan,
    )
