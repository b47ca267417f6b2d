"""The formats of images: NIfTI, BART, NumPy, and arrays that a MATLAB or HDF5 file names."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint._storage import UnreadableFileError
from fisherprint.files import cfl

NIFTI = (".nii", ".nii.gz")
KEYED = (".mat", ".h5", ".hdf5")

# BART's axes 0, 1, 2 are space and 6 holds the coefficients of a subspace.
_BART_KEPT = (0, 1, 2, 6)


@dataclass(frozen=True, eq=False)
class Image:
    """An array as its file has it, with what NIfTI says of its place."""

    array: NDArray[np.generic]
    affine: NDArray[np.float64] | None = None
    header: nibabel.Nifti1Header | None = None


def suffix_of(path: Path) -> str:
    """The end of the name, `.nii.gz` whole."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def read_image(path: Path, key: str | None) -> Image:
    """An image in any of the formats; `key` names the array where the file holds several.

    Raises:
        UnreadableFileError: no such file, of another format, damaged, or the key is missing.
        ValueError: a key for one array without a name, or a BART array with other axes than those
            of coefficient images.
    """
    suffix = suffix_of(path)
    if key is not None and suffix not in KEYED:
        raise ValueError(f"{path} holds one array without a name; got the key {key!r}. Drop it.")
    if suffix in NIFTI:
        return Image(*read_nifti(path))
    if suffix in cfl.SUFFIXES:
        return Image(_read_bart(path))
    if suffix == ".npy":
        return Image(_read_npy(path))
    if suffix in KEYED:
        if key is None:
            raise UnreadableFileError(
                f"{path} needs the key of an array; it has "
                f"{_checks.listing(_storage.array_names(path))}. "
                "Name one: --key, of a mask --mask-key."
            )
        return Image(_storage.read_arrays(path, [key])[key])
    raise UnreadableFileError(
        "expected an image as "
        f"{_checks.listing((*NIFTI, *cfl.SUFFIXES, '.npy', *KEYED))}; got {path}."
    )


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64], nibabel.Nifti1Header]:
    """Array, affine (4, 4) in mm, and header.

    Raises:
        UnreadableFileError: no such file, or it is damaged.
    """
    _storage.require_file(path)
    try:
        if suffix_of(path) == ".nii.gz":
            # nibabel stops before the checksum, and damaged numbers would pass for images.
            with gzip.open(path) as stream:
                while stream.read(1 << 20):
                    pass
        image: Any = nibabel.load(path)
        array = np.asarray(image.dataobj)
    except (ImageFileError, HeaderDataError, OSError, ValueError, EOFError, zlib.error) as error:
        raise UnreadableFileError(
            f"expected a NIfTI image; {path} ({path.stat().st_size} bytes) is none or is "
            f"damaged: {error}. Copy or export it again."
        ) from error
    return array, image.affine, image.header


def _read_bart(path: Path) -> NDArray[np.complex64]:
    """A BART array with its spatial axes and the coefficients: (X, Y, Z, K)."""
    array = cfl.open_cfl(path)
    dims, values = array.shape, path.with_suffix(".cfl")
    names = {axis: f"{axis} ({name})" for axis, name in enumerate(cfl.AXES)}
    long = {axis: n for axis, n in enumerate(dims) if n > 1 and axis not in _BART_KEPT}
    if long:
        found = ", ".join(
            f"axis {names.get(axis, axis)} of length {n}" for axis, n in long.items()
        )
        raise ValueError(
            f"expected coefficient images along the BART axes 0, 1, 2 and 6; {values} has "
            f"{found}. Combine the coils and choose one volume first."
        )
    return np.array(array).reshape([dims[axis] for axis in _BART_KEPT], order="F")


def _read_npy(path: Path) -> NDArray[np.generic]:
    _storage.require_file(path)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UnreadableFileError(
            f"expected a NumPy array; {path} ({path.stat().st_size} bytes) is none or is "
            f"truncated: {error}. Save it again."
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UnreadableFileError(f"expected one NumPy array; {path} is an archive. Save one.")
    return array
