"""Raw data: k-space with its trajectory, as HDF5 of our own, ISMRMRD, or BART's `.cfl`.

Ours holds contiguous arrays, which are mapped and not read: `kspace` (C, T, S, R) complex64,
`trajectory` (T, S, R, 3) float32 in 1/(field of view), `matrix` (3,), and, where there is such a
thing, `pulse` (T,), `weights` (T, S, R), `noise` (C, number), `sensitivities` (C, N0, N1, N2) and
`affine` (4, 4), voxel index -> mm.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint._storage import UnreadableFileError
from fisherprint.files import cfl

# Flags of an acquisition in ISMRMRD, counted from 1.
_NOISE = 19
# Calibration alone, navigator, phase correction, feedback, dummy, surface coil correction, phase
# stabilization. A readout that runs backwards (22) is one of the image: its trajectory says so.
_NO_IMAGE = (_NOISE, 20, 23, 24, 26, 27, 28, 29, 30, 31)
_EXTRAS = ("weights", "noise", "affine")


@dataclass(frozen=True, eq=False)
class RawData:
    """K-space and what is known about it.

    Attributes:
        kspace: complex64, shape (C, T, S, R); may be mapped from the disk.
        trajectory: in 1/(field of view), float32, shape (T, S, R, 3).
        matrix: voxels (N0, N1, N2).
        pulses: which pulses of the train the T are; None for all.
        weights: density compensation, shape (T, S, R).
        noise: samples without signal, shape (C, number).
        affine: voxel index -> mm.
        notes: what was assumed in reading.
    """

    kspace: NDArray[np.complex64]
    trajectory: NDArray[np.float32]
    matrix: tuple[int, int, int]
    pulses: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None
    noise: NDArray[np.complex64] | None = None
    affine: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """What files may not say themselves.

    Attributes:
        n_pulses: T of the train, where the spokes of ISMRMRD stand in the order of the scan.
        trajectory: a file of it; `.cfl`, or HDF5 as `fisherprint export` writes it.
        scale: what the file's trajectory is multiplied by to be in 1/(field of view); inferred
            if None.
        matrix: voxels along each axis; else as the file says.
    """

    n_pulses: int | None = None
    trajectory: Path | None = None
    scale: float | None = None
    matrix: tuple[int, int, int] | None = None


def write_kspace(
    path: str | Path,
    shape: tuple[int, int, int, int],
    pulses: Iterable[NDArray[np.complex64]],
    **others: NDArray[np.generic] | tuple[int, ...],
) -> None:
    """Write raw data, one pulse at a time.

    Args:
        path: the file.
        shape: (C, T, S, R) of all.
        pulses: the samples (C, S, R) of each pulse.
        others: `trajectory` and `matrix`, and what else there is.
    """
    size = 8 * int(np.prod(shape)) + sum(np.asarray(array).nbytes for array in others.values())
    with _storage.large_hdf5(Path(path), size) as file:
        kspace = file.create_dataset("kspace", shape, "c8")
        for number, samples in enumerate(pulses):
            kspace[:, number] = samples
        for name, array in others.items():
            file[name] = array


def read_kspace(path: str | Path, reading: Reading | None = None) -> RawData:
    """Read raw data; the suffix and the contents say the format.

    Raises:
        UnreadableFileError: no such file, damaged, foreign, or without a trajectory.
        ValueError: shapes that disagree, or a trajectory whose unit cannot be told.
    """
    path, reading = Path(path), reading or Reading()
    if path.suffix in cfl.SUFFIXES:
        return _read_cfl(path, reading)
    with _storage.open_hdf5(path) as file:
        groups = [name for name in file if isinstance(file[name], h5py.Group)]
        of_ismrmrd = [name for name in groups if "data" in file[name] and "xml" in file[name]]
        try:
            if "kspace" in file:
                return _read_ours(file, path, reading)
            if of_ismrmrd:
                return _read_ismrmrd(file[of_ismrmrd[0]], path, reading)
        except OSError as error:
            raise UnreadableFileError(
                f"{path} cannot be read ({error}); the file is truncated. Copy it again."
            ) from error
        raise UnreadableFileError(
            f"expected raw data in {path}: an array 'kspace', or a group of ISMRMRD with 'data' "
            f"and 'xml'; it has {_checks.listing(file)}."
        )


def read_sensitivities(path: str | Path, matrix: tuple[int, int, int]) -> NDArray[np.complex64]:
    """Maps of the coils (C, N0, N1, N2): `.cfl` as [x, y, z, coil], `.npy`, or HDF5 of ours.

    Raises:
        UnreadableFileError: no such file, damaged, foreign.
        ValueError: another matrix.
    """
    path = Path(path)
    maps: NDArray[np.complex64]
    if path.suffix in cfl.SUFFIXES:
        array = cfl.open_cfl(path)
        if array.size != np.prod(array.shape[:4]):
            raise ValueError(
                f"expected one set of maps [x, y, z, coil] in {path}; got {array.shape}. "
                "Choose one set."
            )
        maps = np.moveaxis(array.reshape(array.shape[:4], order="F"), 3, 0)
    elif path.suffix == ".npy":
        _storage.require_file(path)
        try:
            maps = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UnreadableFileError(
                f"expected a NumPy array in {path}; it is none or is truncated: {error}."
            ) from error
    else:
        maps = _storage.read_arrays(path, ["sensitivities"])["sensitivities"].astype("c8")
    axes = zip(("N0", "N1", "N2"), matrix, strict=True)
    _checks.shape(f"the sensitivities {path}", maps, [("C", None), *axes])
    return np.ascontiguousarray(_checks.finite(f"the sensitivities {path}", maps), np.complex64)


def _mapped(dataset: h5py.Dataset, path: Path) -> NDArray[Any]:
    """A contiguous array without reading it; one in chunks is read."""
    offset = dataset.id.get_offset()
    if offset is None:
        return dataset[()]
    if offset + dataset.nbytes > path.stat().st_size:
        raise OSError(f"{dataset.name} ends beyond the file")
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


def _read_ours(file: h5py.File, path: Path, reading: Reading) -> RawData:
    kspace = _mapped(file["kspace"], path)
    axes: list[tuple[str, int | None]] = [("C", None), ("T", None), ("S", None), ("R", None)]
    _checks.shape(f"kspace of {path}", kspace, axes)
    if not np.iscomplexobj(kspace):
        raise ValueError(f"kspace of {path} must be complex; got {kspace.dtype}.")
    known = {name: file[name][()] for name in _EXTRAS if name in file}
    known |= {name: file[name][()] for name in ("matrix", "pulse") if name in file}
    known["affine_matrix"] = known.get("matrix")
    if reading.trajectory is not None:
        known |= _read_trajectory(reading.trajectory)
    elif "trajectory" in file:
        known |= _trajectory_of(file)
    else:
        raise _no_trajectory(path)
    return _assembled(kspace, known, reading, path, assume="1/(field of view)")


def _read_cfl(path: Path, reading: Reading) -> RawData:
    """K-space [1, RO, SPOKES, COIL, 1, TE]."""
    array = cfl.open_cfl(path)
    dims = array.shape
    if dims[0] != 1 or dims[4] != 1 or array.size != np.prod(dims[:6]):
        raise ValueError(
            f"expected k-space along the BART axes [1, RO, SPOKES, COIL, 1, TE] in {path}; got "
            f"{list(dims)}. Move the pulses to axis 5 (TE) and the cycles to axis 2."
        )
    if reading.trajectory is None:
        raise _no_trajectory(path)
    kspace = array.reshape([dims[axis] for axis in (1, 2, 3, 5)], order="F").transpose(2, 3, 1, 0)
    known = _read_trajectory(reading.trajectory)
    return _assembled(kspace, known, reading, path, assume="1/(field of view)")


def _read_trajectory(path: Path) -> dict[str, NDArray[Any]]:
    """Trajectory, and what stands beside it: `.cfl` [3, RO, SPOKES, 1, 1, TE], or HDF5."""
    if path.suffix in cfl.SUFFIXES:
        array = cfl.open_cfl(path)
        dims = array.shape
        if dims[0] != 3 or array.size != np.prod([dims[axis] for axis in (0, 1, 2, 5)]):
            raise ValueError(
                f"expected a trajectory along the BART axes [3, RO, SPOKES, 1, 1, TE] in {path}; "
                f"got {list(dims)}."
            )
        spokes = array.reshape([dims[axis] for axis in (0, 1, 2, 5)], order="F")
        return {"trajectory": np.ascontiguousarray(spokes.real.transpose(3, 2, 1, 0))}
    with _storage.open_hdf5(path) as file:
        if "trajectory" not in file:
            raise UnreadableFileError(
                f"expected an array 'trajectory' in {path}; it has {_checks.listing(file)}."
            )
        return _trajectory_of(file)


def _trajectory_of(file: h5py.File) -> dict[str, NDArray[Any]]:
    names = [name for name in ("trajectory", "pulse", "matrix") if name in file]
    return {name: file[name][()] for name in names}


def _no_trajectory(path: Path) -> UnreadableFileError:
    return UnreadableFileError(
        f"expected a trajectory with {path}; it has none. Name a file of it: --trajectory FILE "
        "(.cfl, or .trajectory.h5 as `fisherprint export` writes it)."
    )


def _read_ismrmrd(group: h5py.Group, path: Path, reading: Reading) -> RawData:
    """Acquisitions, in the order of the scan: pulse by pulse, cycle by cycle."""
    head = group["data"]["head"]
    flags = head["flags"]

    def has(number: int) -> NDArray[np.bool_]:
        return (flags >> np.uint64(number - 1)) & np.uint64(1) > 0

    used = np.flatnonzero(~np.logical_or.reduce([has(number) for number in _NO_IMAGE]))
    if not len(used):
        raise UnreadableFileError(
            f"expected readouts in {path}; it has none with an image's data."
        )
    first = head[used[0]]
    n_coils, n_all = int(first["active_channels"]), int(first["number_of_samples"])
    pre, post = int(first["discard_pre"]), int(first["discard_post"])
    same = (
        *("active_channels", "number_of_samples", "trajectory_dimensions"),
        *("discard_pre", "discard_post"),
    )
    for name in same:
        if (head[name][used] != first[name]).any():
            raise ValueError(
                f"expected readouts of one kind in {path}; got {name} of "
                f"{sorted(set(head[name][used].tolist()))}. Select one encoding."
            )
    known = {} if reading.trajectory is None else _read_trajectory(reading.trajectory)
    n_pulses = len(known["trajectory"]) if known else reading.n_pulses
    if n_pulses is None or len(used) % n_pulses:
        raise ValueError(
            f"expected whole cycles of {n_pulses} pulses in {path}; got {len(used)} readouts. "
            "Is the run that of the train that was played? Remove dummies."
        )
    n_cycles, part = len(used) // n_pulses, slice(pre, n_all - post)
    shape = (n_coils, n_pulses, n_cycles, n_all - post - pre)
    kspace = np.empty(shape, np.complex64)
    dimensions = int(first["trajectory_dimensions"])
    spokes = np.zeros((*shape[1:], 3), np.float32)
    for number, row in enumerate(used):
        cycle, pulse = divmod(number, n_pulses)
        item = group["data"][row]
        samples = _values(item, "data", 2 * n_coils * n_all, int(row), path).view("<c8")
        kspace[:, pulse, cycle] = samples.reshape(n_coils, n_all)[:, part]
        if dimensions and not known:
            along = _values(item, "traj", n_all * dimensions, int(row), path)
            spokes[pulse, cycle, :, :dimensions] = along.reshape(n_all, dimensions)[part]
    if not known:
        if not dimensions:
            raise _no_trajectory(path)
        known = {"trajectory": spokes}
    noise = np.flatnonzero(has(_NOISE))
    if len(noise):
        known["noise"] = np.concatenate(
            [group["data"][row]["data"].view("<c8").reshape(n_coils, -1) for row in noise], 1
        )
    return _assembled(kspace, known | _header(group, path), reading, path)


def _values(
    item: NDArray[np.void], name: str, size: int, row: int, path: Path
) -> NDArray[np.float32]:
    """Of one readout; where writing was interrupted, its header is there and they are not."""
    values: NDArray[np.float32] = item[name]
    if values.size != size:
        raise UnreadableFileError(
            f"expected {size} numbers of {name} in readout {row} of {path}; got {values.size}: "
            "the file is truncated or damaged. Copy it again, or remove the readout."
        )
    return values


def _header(group: h5py.Group, path: Path) -> dict[str, Any]:
    """Matrix, and an affine of the field of view about its middle."""
    text = group["xml"][()].ravel()[0]
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise UnreadableFileError(f"the header of {path} is no XML: {error}.") from error
    space = root.find("./{*}encoding/{*}reconSpace")
    if space is None:
        return {}
    matrix, size = (
        [float(space.findtext(f"./{{*}}{name}/{{*}}{axis}", "nan")) for axis in "xyz"]
        for name in ("matrixSize", "fieldOfView_mm")
    )
    if not np.isfinite([matrix, size]).all():
        return {}
    voxel = np.divide(size, matrix)
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = -voxel * (np.array(matrix) // 2)
    return {"matrix": np.array(matrix, int), "affine": affine}


def _assembled(
    kspace: NDArray[np.complex64],
    known: Mapping[str, Any],
    reading: Reading,
    path: Path,
    assume: str | None = None,
) -> RawData:
    matrix = reading.matrix
    if matrix is None:
        if "matrix" not in known:
            raise ValueError(f"expected the matrix of the images; {path} has none. Give --matrix.")
        matrix = _three(known["matrix"])
    notes = []
    trajectory = np.asarray(known["trajectory"], np.float32)
    _checks.shape(
        f"the trajectory of {path}",
        trajectory,
        [*zip("TSR", kspace.shape[1:], strict=True), ("xyz", 3)],
    )
    if reading.scale is not None:
        trajectory = trajectory * np.float32(reading.scale)
    elif assume is None:
        factor, unit = _unit(_checks.finite("the trajectory", trajectory), matrix)
        notes.append(f"the trajectory looks like {unit}: multiplied by {factor}")
        trajectory = trajectory * np.array(factor, np.float32)
    affine, of = known.get("affine"), known.get("affine_matrix", known.get("matrix"))
    if affine is not None and of is not None and _three(of) != matrix:
        notes.append("another matrix than the file's: its place in space is left out")
        affine = None
    pulse = known.get("pulse")
    return RawData(
        kspace,
        trajectory,
        matrix,
        None if pulse is None else np.asarray(pulse, np.int64),
        known.get("weights"),
        known.get("noise"),
        affine,
        tuple(notes),
    )


def _three(matrix: NDArray[Any]) -> tuple[int, int, int]:
    """One number of voxels stands for each axis."""
    n = [int(n) for n in np.atleast_1d(matrix)]
    return (n[0],) * 3 if len(n) == 1 else (n[0], n[1], n[2])


def _unit(
    trajectory: NDArray[np.generic], matrix: tuple[int, int, int]
) -> tuple[list[float], str]:
    """What to multiply by, and what it then was. Rounding may go a little beyond the edge."""
    reach = float(np.abs(trajectory).max())
    if reach <= 0.5 * 1.01:
        return [float(n) if n > 1 else 1.0 for n in matrix], "cycles per voxel"
    if reach <= np.pi * 1.01:
        return [n / (2 * np.pi) if n > 1 else 1.0 for n in matrix], "radians per voxel"
    if reach <= max(matrix) / 2 * 1.01:
        return [1.0, 1.0, 1.0], "1/(field of view)"
    raise ValueError(
        f"expected a trajectory within ±N/2 = ±{max(matrix) / 2:g} in 1/(field of view), or in "
        f"cycles or radians per voxel; got up to {reach:.4g}. State what it is to be multiplied "
        "by: --trajectory-scale."
    )
