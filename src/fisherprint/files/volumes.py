"""Images: coefficient images and masks in, parameter maps out."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint.files.formats import KEYED, NIFTI, read_image, read_nifti, suffix_of
from fisherprint.files.records import read_json, write_json
from fisherprint.maps import Maps, Status, counted
from fisherprint.parameters import Parameter
from fisherprint.reconstruct.phantom import TissueMaps
from fisherprint.subspace import Basis

Kind = Literal["estimate", "standard deviation"]
"""What a map shows, as its sidecar says."""

# What places a volume in space; all else in a header belongs to the file that it came from.
_GEOMETRY = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True, eq=False)
class Volume:
    """Coefficient images with their place in space.

    Attributes:
        data: coefficients, complex64, shape (X, Y, Z, K); Z = 1 for a single slice.
        affine: voxel index -> mm, shape (4, 4); None where the format holds none.
        header: the NIfTI header; None for the other formats.
        source: the file it was read from; None for what was computed.
        mask: bool, shape (X, Y, Z); None where none was asked for.
    """

    data: NDArray[np.complex64]
    affine: NDArray[np.float64] | None = None
    header: nibabel.Nifti1Header | None = None
    source: Path | None = None
    mask: NDArray[np.bool_] | None = None


def read_coefficients(
    path: str | Path,
    *,
    key: str | None = None,
    mask_key: str | None = None,
    rank: int | None = None,
) -> Volume:
    """Read complex coefficient images; the suffix says the format.

    | suffix | coefficients are |
    |---|---|
    | `.nii`, `.nii.gz` | the last of three or four axes, complex |
    | `.cfl` or `.hdr` (BART) | axis 6; the axes other than 0, 1, 2 and 6 must be single |
    | `.npy` | the last axis |
    | `.mat` (v5, v7.3), `.h5`, `.hdf5` | the first or the last axis of the array `key` |

    A voxel whose coefficients are all NaN (or all zero) is background. Any other NaN or Inf is
    refused.

    Args:
        path: the file.
        key: name of the array in a `.mat` or HDF5 file.
        mask_key: name of a mask in the same file, nonzero inside.
        rank: K, the number of coefficients that the estimator takes. In `.mat` and HDF5 it finds
            the axis of the coefficients, which is else the last; elsewhere it is checked.

    Raises:
        UnreadableFileError: no such file, damaged, foreign, without the key.
        ValueError: contents that are no coefficient images: not complex, of another rank, of too
            many axes, with NaN or Inf, or without any signal.
    """
    path = Path(path)
    image = read_image(path, key)
    array = image.array
    if not np.iscomplexobj(array):
        raise ValueError(
            f"expected complex coefficients in {path}; got {array.dtype}. "
            "Write the complex images, not their magnitude."
        )
    array = _coefficients_last(array, rank, movable=suffix_of(path) in KEYED, path=path)
    data = np.ascontiguousarray(_three_axes(array, 1, path), dtype=np.complex64)
    _require_finite(data, path)
    mask = None if mask_key is None else read_mask(path, data.shape[:3], key=mask_key)
    return Volume(data, image.affine, image.header, path, mask)


def read_mask(
    path: str | Path, shape: Sequence[int], *, key: str | None = None
) -> NDArray[np.bool_]:
    """Read a mask, nonzero inside, in any format that coefficients come in.

    Args:
        path: the file.
        shape: (X, Y, Z) of the volume that it belongs to.
        key: name of the array in a `.mat` or HDF5 file.

    Raises:
        UnreadableFileError: no such file, damaged, foreign, without the key.
        ValueError: another shape than the volume's, NaN or Inf, or no voxel inside.
    """
    path = Path(path)
    array = read_image(path, key).array
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    array = _three_axes(array, 0, path)
    _checks.shape(f"the mask {path}", array, list(zip("XYZ", shape, strict=True)))
    mask = _checks.finite(f"the mask {path}", array) != 0
    if not mask.any():
        raise ValueError(f"the mask {path} must be nonzero somewhere; got zeros alone.")
    return mask


def read_map(path: str | Path, shape: Sequence[int], *, name: str) -> NDArray[np.float64]:
    """Read a map of real numbers, such as of B1, in any format that coefficients come in.

    Args:
        path: the file.
        shape: (X, Y, Z) of the volume that it belongs to.
        name: of the array in a `.mat` or HDF5 file; the other formats hold one without a name.

    Returns:
        float64, that shape; NaN where the file has it.

    Raises:
        UnreadableFileError: no such file, damaged, foreign, without that array.
        ValueError: complex values, another shape than the volume's, or a map of ours that is
            stated in another unit than SI.
    """
    path = Path(path)
    _require_si(path)
    array = read_image(path, name if suffix_of(path) in KEYED else None).array
    # BART knows no real numbers.
    if np.iscomplexobj(array):
        if np.nan_to_num(array.imag).any():
            raise ValueError(
                f"expected a map of real numbers in {path}; got complex ones. Write the parameter "
                "itself, not the image that it was found from."
            )
        array = array.real
    if array.ndim == 4 and array.shape[-1] == 1:
        array = array[..., 0]
    array = _three_axes(array, 0, path)
    _checks.shape(f"the map {path}", array, list(zip("XYZ", shape, strict=True)))
    return np.asarray(array, dtype=np.float64)


def write_mask(path: str | Path, mask: NDArray[np.bool_], *, volume: Volume) -> None:
    """Write a mask as a NIfTI of zeros and ones, placed in space like the volume."""
    with _storage.replacing(Path(path)) as temporary:
        nibabel.save(_as_nifti(mask.astype(np.float64), volume, np.uint8), temporary)


@dataclass(frozen=True, eq=False)
class PlacedMaps:
    """Maps that were read back.

    Attributes:
        maps: by name, SI units, shape (X, Y, Z, E).
        mask: where there is an estimate.
        affine: voxel index -> mm, shape (4, 4); None where the images had no place in space.
    """

    maps: Maps
    mask: NDArray[np.bool_]
    affine: NDArray[np.float64] | None


def read_maps(folder: str | Path, names: Sequence[str], *, as_stated: bool = False) -> PlacedMaps:
    """The maps that `write_maps` wrote.

    Args:
        folder: of the maps.
        names: of the files, without their suffix.
        as_stated: take maps that are stated in other units as they are.

    Raises:
        UnreadableFileError: one is missing, damaged or foreign.
        ValueError: one in other units than SI, or of another shape than the first.
    """
    if not as_stated:
        for name in names:
            _require_si(Path(folder) / f"{name}.nii.gz")
    images = [read_nifti(Path(folder) / f"{name}.nii.gz") for name in names]
    first, affine, header = images[0]
    for name, (image, _, _) in zip(names, images, strict=True):
        axes = [*zip("XYZ", first.shape, strict=False)]
        _checks.shape(f"the map {name} in {folder}", image, axes)
    values = np.stack([np.asarray(image, dtype=np.float64) for image, _, _ in images], axis=-1)
    inside: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(axis=-1))
    return PlacedMaps(Maps(tuple(names), values, inside, 0), inside, _place(affine, header))


def _require_si(path: Path) -> None:
    """Refuse a map whose sidecar says that it was converted."""
    sidecar = _sidecar_of(path)
    done = read_json(sidecar).get("Conversion") if sidecar.is_file() else None
    if done is not None:
        raise ValueError(
            f"expected {done['Parameter']} in {done['Unit'] or 'SI units'}; {path} holds "
            f"{done['Formula']}. Name the map from before it was converted."
        )


def read_place(path: str | Path) -> NDArray[np.float64] | None:
    """Voxel index -> mm of an image, shape (4, 4); None if it does not say.

    Raises:
        UnreadableFileError: no such file, damaged, foreign.
    """
    if suffix_of(Path(path)) not in NIFTI:
        return None
    _, affine, header = read_nifti(Path(path))
    return _place(affine, header)


def _place(
    affine: NDArray[np.float64], header: nibabel.Nifti1Header
) -> NDArray[np.float64] | None:
    placed = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    return affine if placed else None


def read_basis(path: str | Path, *, key: str, n_samples: int) -> Basis:
    """Read the temporal basis that coefficient images were made with, coefficients = Uᴴ signal.

    Args:
        path: `.mat`, `.h5` or `.hdf5`.
        key: name of an array (T, K) of basis vectors, or (K, T) of their conjugates: the matrix
            that turns signals into coefficients.
        n_samples: T, the pulses of all trains.

    Raises:
        UnreadableFileError: no such file, damaged, foreign, without the key.
        ValueError: neither axis has T entries, or the vectors are not orthonormal.
    """
    vectors = _storage.read_arrays(Path(path), [key])[key]
    if vectors.ndim != 2 or n_samples not in vectors.shape:
        raise ValueError(
            f"expected a basis of T={n_samples} time points in {path}, as the train has; got "
            f"the shape {vectors.shape}. Do the basis and the train belong together?"
        )
    oriented = vectors if len(vectors) == n_samples else vectors.T.conj()
    return Basis(oriented.astype(np.complex128))


def write_coefficients(path: str | Path, volume: Volume, *, basis_sha256: str) -> None:
    """Write coefficient images as a complex NIfTI, and the identity of their basis beside it."""
    path = Path(path)
    with _storage.replacing(path) as temporary:
        nibabel.save(_as_nifti(volume.data, volume, np.complex64), temporary)
    write_json(_sidecar_of(path), {"BasisSHA256": basis_sha256})


def recorded_basis(path: str | Path) -> str | None:
    """The identity of the basis of coefficient images, if a sidecar beside them tells."""
    sidecar = _sidecar_of(Path(path))
    return read_json(sidecar).get("BasisSHA256") if sidecar.is_file() else None


def _sidecar_of(path: Path) -> Path:
    # The suffix is in lower case, the name may be not.
    return path.with_name(path.name[: len(path.name) - len(suffix_of(path))] + ".json")


def read_tissue_maps() -> TissueMaps:
    """The ICBM 2009a tissue probabilities and brain template that nilearn brings along, 1 mm.

    Raises:
        ModuleNotFoundError: nilearn is not installed.
        UnreadableFileError: an installation of nilearn without these files.
    """
    # Found, not imported: nilearn takes seconds to load, and its files are all that is needed.
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the digital brain needs the tissue maps of nilearn, which is not installed. "
            'Install it: pip install "fisherprint[demo]"'
        )
    folder = Path(spec.origin).parent / "datasets" / "data"
    (grey, affine, _), (white, _, _), (template, _, _) = (
        read_nifti(folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz")
        for kind in ("gm", "wm", "t1")
    )
    # Probabilities are stored as 0 to 255; the template is zero outside the brain.
    return TissueMaps(
        np.divide(grey, 255, dtype=np.float32),
        np.divide(white, 255, dtype=np.float32),
        template != 0,
        affine,
    )


def write_maps(
    maps: Maps,
    folder: str | Path,
    *,
    volume: Volume,
    parameters: Sequence[Parameter],
    provenance: Mapping[str, Any],
    kind: Kind = "estimate",
) -> list[Path]:
    """Write each parameter as `<name>.nii.gz` (float32, SI units) and `<name>.json`.

    Standard deviations have the names `<name>_std`.

    The images have the volume's affine with its sform and qform codes, and NaN where there is no
    estimate. The sidecar says the unit, the range, how many voxels there are and how many failed,
    and where it all came from.

    Args:
        maps: maps of the volume, spatial axes (X, Y, Z).
        folder: made if absent; files of the same name are replaced.
        volume: the coefficient images that were mapped.
        parameters: descriptions of at least the maps' parameters.
        provenance: anything JSON can hold: versions, digests of the network and its data.
        kind: what the maps show of their parameters.

    Returns:
        The images' paths, in the order of the maps.

    Raises:
        KeyError: a map without a description.
        ValueError: maps of another shape than the volume, or a provenance JSON cannot hold.
    """
    axes = [*zip("XYZ", volume.data.shape[:3], strict=True), ("E", len(maps.names))]
    _checks.shape("the maps", maps.values, axes)
    known = {parameter.name: parameter for parameter in parameters}
    for name in maps.names:
        _checks.index(name, tuple(known))
    paths = []
    for name in maps.names:
        stem = f"{name}_std" if kind == "standard deviation" else name
        path = Path(folder) / f"{stem}.nii.gz"
        with _storage.replacing(path) as temporary:
            nibabel.save(_as_nifti(maps[name], volume), temporary)
        sidecar = {"Kind": kind, **_sidecar(maps, known[name], volume, provenance)}
        write_json(Path(folder) / f"{stem}.json", sidecar)
        paths.append(path)
    return paths


def write_status(
    status: NDArray[np.uint8],
    folder: str | Path,
    *,
    volume: Volume,
    provenance: Mapping[str, Any],
) -> Path:
    """Write `status.nii.gz` (uint8), placed like the volume, and `status.json` with its codes.

    Args:
        status: one `maps.Status` a voxel, shape (X, Y, Z).
        folder: made if absent; files of the same name are replaced.
        volume: the coefficient images that were mapped.
        provenance: as for `write_maps`.
    """
    path = Path(folder) / "status.nii.gz"
    with _storage.replacing(path) as temporary:
        nibabel.save(_as_nifti(status, volume, np.uint8), temporary)
    sidecar = {
        "Kind": "status",
        "Parameter": "status",
        "Unit": "",
        "Codes": {str(code.value): code.name.lower() for code in Status},
        "NumberOfVoxels": counted(status),
        "Source": None if volume.source is None else volume.source.name,
        "Provenance": dict(provenance),
    }
    write_json(path.with_name("status.json"), sidecar)
    return path


def read_status(folder: str | Path, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The status that `write_status` wrote, shape (X, Y, Z).

    Raises:
        UnreadableFileError: it is missing, damaged or foreign.
        ValueError: another shape than the volume's.
    """
    path = Path(folder) / "status.nii.gz"
    array = np.asarray(read_nifti(path)[0])
    _checks.shape(f"the status {path}", array, list(zip("XYZ", shape, strict=True)))
    return array.astype(np.uint8)


def _coefficients_last(
    array: NDArray[np.generic], rank: int | None, *, movable: bool, path: Path
) -> NDArray[np.generic]:
    if rank is None:
        return array
    last = array.ndim - 1
    candidates = [axis for axis in ((0, last) if movable else (last,)) if axis >= 0]
    found = [axis for axis in candidates if array.shape[axis] == rank]
    if len(found) != 1:
        where = " or ".join(f"axis {axis}" for axis in candidates)
        raise ValueError(
            f"expected {rank} coefficients along {where} of {path}; got the shape {array.shape}, "
            + (
                "in which both fit. Write it as .npy with the coefficients last."
                if found
                else "in which none fits. Do the images and the network share one basis?"
            )
        )
    return np.moveaxis(array, found[0], -1)


def _three_axes(array: NDArray[np.generic], n_last: int, path: Path) -> NDArray[np.generic]:
    """Append single axes to the spatial ones, which stand before `n_last` others."""
    n_spatial = array.ndim - n_last
    if not 1 <= n_spatial <= 3:
        raise ValueError(
            f"expected one to three spatial axes{' and then the coefficients' * n_last} in {path};"
            f" got the shape {array.shape}. Choose one volume."
        )
    return array.reshape(
        *array.shape[:n_spatial], *[1] * (3 - n_spatial), *array.shape[n_spatial:]
    )


def _require_finite(data: NDArray[np.complex64], path: Path) -> None:
    bad = ~np.isfinite(data)
    bad[np.isnan(data).all(-1)] = False
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"the coefficients of {path} must be finite, or all NaN in a voxel of the background; "
            f"got {int(bad.sum())} other NaN or Inf of {data.size} values, the first at index "
            f"{where}. Set those voxels to zero if they are background."
        )
    if not (np.isfinite(data) & (data != 0)).any():
        raise ValueError(
            f"expected signal in {path}; got zeros or NaN alone. Is it the right key?"
        )


def _as_nifti(
    values: NDArray[np.generic], volume: Volume, dtype: type[np.generic] = np.float32
) -> nibabel.Nifti1Image:
    # nibabel announces types, but leaves this constructor without.
    image = nibabel.Nifti1Image(  # type: ignore[no-untyped-call]
        values.astype(dtype), volume.affine
    )
    if volume.header is not None:
        for field in _GEOMETRY:
            image.header[field] = volume.header[field]
        # pixdim[0] is the sign of the quaternion's third axis.
        image.header["pixdim"][:4] = volume.header["pixdim"][:4]
        # The lowest three bits are the unit of space, the others that of time.
        image.header["xyzt_units"] = volume.header["xyzt_units"] & 7
    elif volume.affine is not None:
        image.header["xyzt_units"] = 2  # mm
    return image


def _sidecar(
    maps: Maps, parameter: Parameter, volume: Volume, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    values = maps[parameter.name]
    finite = values[np.isfinite(values)]
    return {
        "Parameter": parameter.name,
        "Unit": parameter.unit,
        "DisplayUnit": parameter.display_unit,
        "DisplayFactor": parameter.display_factor,
        "Range": [float(finite.min()), float(finite.max())] if finite.size else None,
        "NumberOfVoxels": int(maps.mask.sum()),
        "NumberFailed": maps.n_failed,
        # The name alone: maps are shared, and folders name people and places.
        "Source": None if volume.source is None else volume.source.name,
        "Provenance": dict(provenance),
    }
