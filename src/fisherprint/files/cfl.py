"""BART's arrays: `NAME.hdr` with the lengths of the axes, `NAME.cfl` with the values.

The first axis is the fastest one. Values are complex64, little endian.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import _storage
from fisherprint._storage import UnreadableFileError

SUFFIXES = (".cfl", ".hdr")
# Our names of what BART calls the first axes.
AXES = ("READ", "PHS1", "PHS2", "COIL", "MAPS", "TE", "COEFF", "COEFF2")


def open_cfl(path: str | Path) -> NDArray[np.complex64]:
    """An array, mapped from the disk and not to be written, axes in BART's order.

    Raises:
        UnreadableFileError: one of both files is missing, damaged, or of another length.
    """
    header, values = Path(path).with_suffix(".hdr"), Path(path).with_suffix(".cfl")
    _storage.require_file(header)
    _storage.require_file(values)
    lines = header.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        dims = [int(word) for word in lines[lines.index("# Dimensions") + 1].split()]
    except (ValueError, IndexError) as error:
        raise UnreadableFileError(
            f"expected a BART header with '# Dimensions' and a line of integers; {header} has "
            "none. Write it again."
        ) from error
    size, expected = values.stat().st_size, 8 * math.prod(dims)
    if size != expected or not dims or not size:
        raise UnreadableFileError(
            f"expected {expected} bytes in {values} for the dimensions {dims} of {header.name}; "
            f"got {size}. One of the two is truncated or belongs to other data."
        )
    dims += [1] * (len(AXES) - len(dims))
    return np.memmap(values, "<c8", "r", shape=tuple(dims), order="F")


def write_cfl(path: str | Path, array: NDArray[np.number]) -> None:
    """Write an array whose axes are in BART's order.

    The header is written last: a file without one was not finished.
    """
    header, values = Path(path).with_suffix(".hdr"), Path(path).with_suffix(".cfl")
    header.unlink(missing_ok=True)
    with _storage.replacing(values) as temporary, temporary.open("wb") as stream:
        for part in _slices(array):
            # The transpose of the first axis fastest is the last axis fastest.
            stream.write(np.ascontiguousarray(part.T, dtype="<c8").tobytes())
    with _storage.replacing(header) as temporary:
        temporary.write_text(f"# Dimensions\n{' '.join(map(str, array.shape))}\n")


def _slices(array: NDArray[np.number]) -> Iterable[NDArray[np.number]]:
    """Along the slowest axis that has several: a copy of all would need its memory twice."""
    slowest = max((axis for axis, n in enumerate(array.shape) if n > 1), default=0)
    return np.moveaxis(array, slowest, 0) if array.ndim > 1 else [array]
