"""Label images, the names of their labels, and tables of numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint._storage import UnreadableFileError
from fisherprint.files.records import read_json, write_text
from fisherprint.files.volumes import PlacedMaps, read_map, read_place

# What separates the columns, and what stands for no number: BIDS' word, where the file is BIDS'.
_TABLES = {".csv": (",", ""), ".tsv": ("\t", "n/a")}
# mm by which the corners of two grids may differ: affines are stored in single precision.
_SAME_PLACE = 1e-2


def read_labels(path: str | Path, like: PlacedMaps) -> NDArray[np.int64]:
    """Read an image of labels, 0 outside of all regions; a mask is one with the label 1.

    Args:
        path: the file, in a format of coefficients that needs no key.
        like: maps on the grid that the labels must have; where either file does not say its place
            in space, the shape alone counts.

    Returns:
        Shape (X, Y, Z).

    Raises:
        UnreadableFileError: no such file, damaged, foreign.
        ValueError: another grid than that of the maps, or numbers that are not whole.
    """
    path = Path(path)
    labels = read_map(path, like.mask.shape, name=path.name)
    _checks.finite(f"the labels {path}", labels)
    whole = np.rint(labels)
    if (bad := whole != labels).any():
        raise ValueError(
            f"expected whole numbers as labels in {path}; got {labels[bad][0]:g} among others. "
            "Resample labels by the nearest neighbour, never by interpolation."
        )
    place = read_place(path)
    if place is not None and like.affine is not None:
        last = np.array(labels.shape) - 1
        corners = [[x, y, z, 1] for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])]
        moved = np.abs((place - like.affine) @ np.array(corners).T).max()
        if moved > _SAME_PLACE:
            raise ValueError(
                f"expected labels on the grid of the maps; the corners of {path} lie up to "
                f"{moved:.3g} mm from theirs. Resample it onto the maps, by nearest neighbours."
            )
    return whole.astype(np.int64)


def read_label_names(path: str | Path) -> dict[int, str]:
    """Names of labels, from JSON `{"1": "white matter"}` or a table as of BIDS' `_dseg.tsv`.

    Args:
        path: `.json`; or `.tsv` or `.csv` with at least the columns `index` and `name`.

    Raises:
        UnreadableFileError: no such file, or another content.
    """
    path = Path(path)
    _storage.require_file(path)
    try:
        if path.suffix == ".json":
            return {int(label): str(name) for label, name in read_json(path).items()}
        separator, _ = _kind(path)
        text = io.StringIO(path.read_text(encoding="utf-8-sig"))
        return {
            int(row["index"]): row["name"] for row in csv.DictReader(text, delimiter=separator)
        }
    except (KeyError, TypeError, ValueError, AttributeError, json.JSONDecodeError) as error:
        raise UnreadableFileError(
            f'expected names of labels in {path}, as a JSON such as {{"1": "white matter"}} or '
            f"a .tsv or .csv with the columns index and name; it has not ({error!r}). Mend it."
        ) from error


def write_table(
    path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[str | float]]
) -> None:
    """Write a table, whole or not at all; a number that is not finite has an empty place, or n/a.

    Args:
        path: `.csv`, or `.tsv` as BIDS wants it.
        columns: their names.
        rows: a value for each column; numbers come back to the bit.

    Raises:
        ValueError: another suffix.
    """
    separator, none = _kind(Path(path))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(
            none if isinstance(value, float) and not np.isfinite(value) else value for value in row
        )
    write_text(path, text.getvalue())


def require_table(path: str | Path) -> None:
    """Refuse a table whose suffix says no kind that can be written; a ValueError."""
    _kind(Path(path))


def _kind(path: Path) -> tuple[str, str]:
    if path.suffix not in _TABLES:
        raise ValueError(
            f"expected a table with the suffix {' or '.join(_TABLES)}; got {path}. Rename it."
        )
    return _TABLES[path.suffix]
