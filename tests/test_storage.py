import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io

from fisherprint import _storage
from fisherprint._storage import UnreadableFileError


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()]
)
@pytest.mark.parametrize("old", [b"old", None])
def test_an_interrupted_write_leaves_things_as_they_were(tmp_path, error, old):
    path = tmp_path / "result.h5"
    if old is not None:
        path.write_bytes(old)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(type(error)), _storage.replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert sorted(tmp_path.iterdir()) == before
    if old is not None:
        assert path.read_bytes() == old


def test_the_new_file_appears_whole(tmp_path):
    path = tmp_path / "new folder" / "result.nii.gz"
    with _storage.replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename within one file system
        assert temporary.name.endswith(path.name)
        temporary.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    ordinary, path = tmp_path / "ordinary", tmp_path / "result"
    ordinary.write_bytes(b"")
    with _storage.replacing(path) as temporary:
        temporary.write_bytes(b"")
    assert path.stat().st_mode == ordinary.stat().st_mode


def matlab73(path: Path, **arrays):
    """Write as MATLAB v7.3 does: a text header in the user block, the axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file[name] = array.T
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
    assert len(header) == 128
    with path.open("r+b") as stream:
        stream.write(header)


A = np.arange(6.0).reshape(2, 3)


def test_one_array_through_all_formats(tmp_path):
    scipy.io.savemat(tmp_path / "v5.mat", {"a": A})
    matlab73(tmp_path / "v73.mat", a=A)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["a"] = A
    for name in ("v5.mat", "v73.mat", "plain.h5"):
        np.testing.assert_array_equal(_storage.read_arrays(tmp_path / name, ["a"])["a"], A)
        assert _storage.array_names(tmp_path / name) == ["a"]


def test_compound_arrays_become_complex(tmp_path):
    # MATLAB v7.3 and others hold complex numbers as pairs (real, imag).
    pairs = np.zeros(A.shape, dtype=[("real", "f4"), ("imag", "f4")])
    pairs["real"], pairs["imag"] = A, -2 * A
    matlab73(tmp_path / "v73.mat", x=pairs)
    x = _storage.read_arrays(tmp_path / "v73.mat", ["x"])["x"]
    assert np.iscomplexobj(x)
    np.testing.assert_array_equal(x, A - 2j * A)


def test_other_compounds_stay_as_they_are(tmp_path):
    pairs = np.zeros(2, dtype=[("t", "f8"), ("x", "f8")])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["p"] = pairs
    assert _storage.read_arrays(tmp_path / "a.h5", ["p"])["p"].dtype.names == ("t", "x")


def test_arrays_within_groups(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["group/a"] = A
    assert _storage.array_names(tmp_path / "a.h5") == ["group/a"]
    read = _storage.read_arrays(tmp_path / "a.h5", ["group/a"])
    np.testing.assert_array_equal(read["group/a"], A)
    with pytest.raises(UnreadableFileError, match="expected the key 'group'"):
        _storage.read_arrays(tmp_path / "a.h5", ["group"])


@pytest.mark.parametrize("name", ["v5.mat", "v73.mat", "plain.h5"])
def test_a_missing_key_lists_those_there_are(tmp_path, name):
    path = tmp_path / name
    if name == "v5.mat":
        scipy.io.savemat(path, {"a": A, "b": A})
    elif name == "v73.mat":
        matlab73(path, a=A, b=A)
    else:
        with h5py.File(path, "w") as file:
            file["a"] = file["b"] = A
    with pytest.raises(UnreadableFileError, match=r"expected the key 'c' in .*; it has a, b"):
        _storage.read_arrays(path, ["a", "c"])


def test_no_file_or_a_folder(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"absent\.mat; found nothing\. Check the path"):
        _storage.read_arrays(tmp_path / "absent.mat", ["a"])
    with pytest.raises(UnreadableFileError, match="found a folder"):
        _storage.array_names(tmp_path)


def test_a_chunk_damaged_within_a_sound_file(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a", data=np.arange(1000.0), chunks=(1000,), fletcher32=True)
    with h5py.File(path) as file:
        chunk = file["a"].id.get_chunk_info(0)
    with path.open("r+b") as stream:
        stream.seek(chunk.byte_offset + 100)
        stream.write(b"damage")
    with pytest.raises(UnreadableFileError, match=r"'a' cannot be read .* Copy it again"):
        _storage.read_arrays(path, ["a"])


def test_the_digest_sees_dtype_shape_and_bytes_but_not_memory_order():
    own = _storage.digest(A)
    assert _storage.digest(np.asfortranarray(A)) == own
    changed = A.copy()
    changed[1, 2] = np.nextafter(changed[1, 2], 6)
    others = (A.reshape(3, 2), A.astype(np.float32), changed, A.T, A[:1])
    digests = {own, _storage.digest(A[:1], A[1:])} | {_storage.digest(other) for other in others}
    assert len(digests) == 2 + len(others)
