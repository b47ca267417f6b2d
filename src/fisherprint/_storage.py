"""Files at the lowest level: whole or not at all on writing, explained when unreadable on reading.

The one place below `files` that touches the disk; pulse trains and the cached rate table need it.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import io
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io
from numpy.typing import NDArray

from fisherprint import _checks


class UnreadableFileError(ValueError):
    """A file that is missing, truncated, foreign, or lacks what was asked of it."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well.

    An error inside the block (a full disk, an interrupt) leaves an old file as it was.
    The temporary name ends like `path`, since some writers choose the format by it. What an
    earlier write to `path` left because its process was killed is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp draws eight characters; `*` would also find the parts of files named *-`path`.
    for left in path.parent.glob(f".part-????????-{glob.escape(path.name)}"):
        with contextlib.suppress(OSError):
            left.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-", suffix="-" + path.name)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        # mkstemp is private to the owner; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to fill, which becomes `path`, whole or not at all, when the block ends well.

    It is built in memory: where the disk is full, the HDF5 library brings down the process on
    closing a file, while plain bytes raise an OSError.
    """
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        yield file
    with replacing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


@contextlib.contextmanager
def large_hdf5(path: Path, size: int) -> Iterator[h5py.File]:
    """The same for a file of about `size` bytes that may not fit into memory, built on the disk.

    Raises:
        OSError: not enough room for it; so that the HDF5 library does not meet a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(path.parent).free
    if room < 1.05 * size + 1e6:
        raise OSError(
            errno.ENOSPC,
            f"expected {size / 1e6:.0f} MB of room for {path}; the disk has {room / 1e6:.0f} MB "
            "left. Make room and repeat the command; what is finished is kept",
        )
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        yield file


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A block for one process at a time; the system frees the lock of one that died.

    Where there are no such locks (Windows, some network disks) nobody is kept out.

    Raises:
        BlockingIOError: another process is in it.
    """
    handle = None
    try:
        try:
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"expected {folder} for this process alone; another one is at work there. Wait "
                "for it, or choose another folder."
            ) from error
        except (ImportError, OSError):
            pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        UnreadableFileError: no such file, or not TOML.
    """
    require_file(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnreadableFileError(
            f"expected TOML; {path} cannot be parsed: {error}. Mend that line."
        ) from error


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    """Named arrays of an HDF5 file or a MATLAB file (v5 or v7.3), axes in MATLAB's order for both.

    HDF5 written by MATLAB holds the axes reversed; they are turned back here. Compound
    (real, imag) arrays become complex.

    Raises:
        UnreadableFileError: no such file, not such a file, truncated, or a key is missing
            (the message lists those there are).
    """
    require_file(path)
    with path.open("rb") as stream:
        head = stream.read(128)
    if head.startswith(b"MATLAB 5.0"):
        return _read_mat5(path, keys)
    with open_hdf5(path) as file:
        arrays = {key: _hdf5_array(file, key, path) for key in keys}
    if head.startswith(b"MATLAB 7.3"):
        arrays = {key: array.T for key, array in arrays.items()}
    return arrays


def array_names(path: Path) -> list[str]:
    """Keys of the arrays in an HDF5 file or a MATLAB file (v5 or v7.3).

    Raises:
        UnreadableFileError: no such file, not such a file, or truncated.
    """
    require_file(path)
    with path.open("rb") as stream:
        head = stream.read(128)
    if head.startswith(b"MATLAB 5.0"):
        return [name for name in _load_mat5(path) if not name.startswith("__")]
    with open_hdf5(path) as file:
        return _hdf5_names(file)


def require_file(path: Path) -> None:
    """Raise UnreadableFileError unless `path` is a file."""
    if not path.is_file():
        there = "a folder" if path.is_dir() else "nothing"
        raise UnreadableFileError(f"expected a file at {path}; found {there}. Check the path.")


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; what is no HDF5 or truncated is an UnreadableFileError."""
    require_file(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        size = path.stat().st_size
        raise UnreadableFileError(
            f"expected an HDF5 (or MATLAB v7.3) file; {path} ({size} bytes) is none or is "
            f"truncated: {error}. Copy or export it again."
        ) from error
    with file:
        yield file


def digest(*arrays: NDArray[np.generic]) -> str:
    """SHA-256 of dtype, shape and bytes of the arrays: the identity of a train or a basis."""
    sha = hashlib.sha256()
    for array in arrays:
        contiguous = np.ascontiguousarray(array)
        sha.update(f"{contiguous.dtype.str}{contiguous.shape}".encode())
        sha.update(contiguous.tobytes())
    return sha.hexdigest()


def _read_mat5(path: Path, keys: Sequence[str]) -> dict[str, NDArray[np.generic]]:
    there = _load_mat5(path)
    names = [name for name in there if not name.startswith("__")]
    for key in keys:
        if key not in names:
            raise _missing(path, key, names)
    return {key: np.asarray(there[key]) for key in keys}


def _load_mat5(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        return scipy.io.loadmat(path)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UnreadableFileError(
            f"expected a MATLAB v5 file; {path} cannot be read: {error}. Save it again."
        ) from error


def _hdf5_names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


def _hdf5_array(file: h5py.File, key: str, path: Path) -> NDArray[np.generic]:
    if key not in file or not isinstance(file[key], h5py.Dataset):
        raise _missing(path, key, _hdf5_names(file))
    try:
        array = file[key][()]
    except OSError as error:
        raise UnreadableFileError(
            f"{path}: {key!r} cannot be read ({error}); the file is truncated. Copy it again."
        ) from error
    array = np.asarray(array)
    if array.dtype.names is not None and set(array.dtype.names) == {"real", "imag"}:
        array = array["real"] + 1j * array["imag"]
    return array


def _missing(path: Path, key: str, names: Sequence[str]) -> UnreadableFileError:
    return UnreadableFileError(
        f"expected the key {key!r} in {path}; it has {_checks.listing(names)}. Name another key."
    )
