"""Statistics of a folder of maps over regions, as a table."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisherprint import files, regions
from fisherprint.experiment.folder import Say, region_file, require_absent
from fisherprint.experiment.mapping import REGIONS
from fisherprint.experiment.schema import ExperimentError
from fisherprint.files.stating import ERROR, ESTIMATE
from fisherprint.regions import RegionStatistics

COLUMNS = (
    *("label", "region", "parameter", "unit", "voxels", "failed", "median"),
    *("lower_quartile", "upper_quartile", "mean", "sd", "mean_crb_sd"),
)
"""Of the table; `failed` is a share, the last one the mean of the error bars."""

# What has no mean: an angle that wraps, and codes.
_NO_NUMBERS = ("M0_phase", "reason", "status")


class _Region(NamedTuple):
    labels: NDArray[np.int64]
    names: dict[int, str]


def region_table(
    maps: Path,
    table: Path,
    *,
    labels: Path | None = None,
    names: Path | None = None,
    force: bool = False,
    say: Say,
) -> tuple[RegionStatistics, ...]:
    """Write a table of the statistics of all maps in a folder over regions.

    Numbers are in the maps' units, which a column says. Images of codes and the phase of M0 are
    left out.

    Args:
        maps: folder of maps.
        table: `.csv` or `.tsv`, replaced whole or not at all.
        labels: image of the regions on the maps' grid; the masks of white matter and CSF beside
            the maps if None.
        names: JSON or table of the labels' names, which may name others, too; a region without
            one is called by its number.
        force: replace a table that is there.
        say: told which names no voxel has.

    Returns:
        What is in the table.

    Raises:
        OutputExistsError: the table is there.
        UnreadableFileError: no maps, or a file that is missing, damaged or foreign.
        ExperimentError: no labels and no masks, names without labels, or names that are all of
            other labels.
        ValueError: labels on another grid or not whole, or another suffix of the table.
    """
    files.require_table(table)
    if names is not None and labels is None:
        raise ExperimentError(
            f"expected labels that the names in {names} belong to; got none. Give both, or "
            "neither for white matter and CSF."
        )
    if not force:
        require_absent(table)
    found = {
        stem: about
        for stem, about in files.described_maps(maps).items()
        if about["Parameter"] not in _NO_NUMBERS
    }
    placed = files.read_maps(maps, list(found), as_stated=True)
    images: dict[str, dict[str, NDArray[np.float64]]] = {ESTIMATE: {}, ERROR: {}}
    units = {}
    for stem, about in found.items():
        if about["Kind"] in images:
            images[about["Kind"]][about["Parameter"]] = placed.maps[stem]
            units[about["Parameter"]] = about["Unit"]
    estimates = images[ESTIMATE]
    errors = {name: bars for name, bars in images[ERROR].items() if name in estimates}
    if labels is None:
        wanted = _masks(maps, placed)
    else:
        wanted = [_labelled(files.read_labels(labels, placed), labels, names, say)]
    rows: list[RegionStatistics] = []
    for region in wanted:
        rows += regions.statistics(estimates, region.labels, errors=errors, names=region.names)
    files.write_table(table, COLUMNS, [_row(row, units[row.parameter]) for row in rows])
    return tuple(rows)


def _masks(maps: Path, placed: files.PlacedMaps) -> list[_Region]:
    """The regions that were found in the maps, numbered as they are listed."""
    found = []
    for number, name in enumerate(REGIONS, start=1):
        path = maps / region_file(name)
        if path.exists():
            mask = files.read_mask(path, placed.mask.shape)
            found.append(_Region(number * mask.astype(np.int64), {number: name}))
    if not found:
        raise ExperimentError(
            f"expected masks beside the maps, {' or '.join(map(region_file, REGIONS))}; {maps} "
            "has none. Give an image of labels: --labels."
        )
    return found


def _labelled(labels: NDArray[np.int64], path: Path, names: Path | None, say: Say) -> _Region:
    """Labels with the names of those that are there."""
    if names is None:
        return _Region(labels, {})
    given = files.read_label_names(names)
    there = {int(label) for label in np.unique(labels)} - {0}
    used = {label: name for label, name in given.items() if label in there}
    if there and not used:
        raise ExperimentError(
            f"expected names of the labels in {path}, such as {min(there)}; {names} has those of "
            f"{', '.join(map(str, sorted(given)[:5])) or 'none'}. Do both belong together?"
        )
    absent = [name for label, name in given.items() if label not in there and label != 0]
    if absent:
        shown = ", ".join(absent[:5]) + ", ..." * (len(absent) > 5)
        say(f"{len(absent)} named labels have no voxel: {shown}")
    return _Region(labels, used)


def _row(row: RegionStatistics, unit: str) -> list[str | float]:
    return [
        *(row.label, row.region, row.parameter, unit, row.voxels, row.failed, row.median),
        *(row.lower_quartile, row.upper_quartile, row.mean, row.sd, row.mean_error),
    ]
