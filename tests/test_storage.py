import errno
import os
import subprocess
import sys
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


def test_what_a_killed_write_left_is_removed_by_the_next_one(tmp_path):
    path = tmp_path / "a[1].h5"
    killed = (
        "import os, pathlib, sys; from fisherprint import _storage\n"
        "with _storage.replacing(pathlib.Path(sys.argv[1])): os.abort()"
    )
    assert subprocess.run([sys.executable, "-c", killed, path], check=False).returncode != 0
    (left,) = tmp_path.iterdir()
    # Of a write to another file whose name ends alike, which may be under way.
    other = tmp_path / ".part-abcdefgh-my-a[1].h5"
    other.touch()
    with _storage.replacing(path) as temporary:
        assert not left.exists()
        temporary.write_bytes(b"new")
    assert sorted(tmp_path.iterdir()) == sorted([other, path])


# Run with a limit on the size of files, which fails writes as a full disk does.
FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from fisherprint import files, sequence
from fisherprint.evaluate import Audit, Score
from fisherprint.simulate import SPLITS, DataSet, Reduced
from fisherprint.subspace import Basis

train, many = sequence.bundled(), np.ones((2000, 1))
reduced = Reduced(many, many + 0j, many, many)
data = DataSet(("R",), Basis(np.eye(2, 1)), {split: reduced for split in SPLITS}, 1.0)
audit = Audit(("R",), np.ones(1), many, many, many[None], many[None], 2)
score = Score(("R",), 1.0, 1.0, np.ones(1), np.ones(1), 1, 0, 0)
folder = Path(sys.argv[1])
writes = {
    "train.h5": train.write,
    "data.h5": lambda path: files.write_dataset(path, data, train, seed=0, versions={}),
    "audit.h5": lambda path: files.write_audit(path, audit, score),
}
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
for name, write in writes.items():
    (folder / name).write_bytes(b"old")
    try:
        write(folder / name)
    except OSError as error:
        print(name, error.errno)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of resources exist on Unix alone")
def test_a_full_disk_is_an_error_and_leaves_the_old_hdf5_file(tmp_path):
    # In a process of its own: HDF5 on a full disk used to end it with a segmentation fault.
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    names = ["train.h5", "data.h5", "audit.h5"]
    assert run.stdout.split("\n")[:-1] == [f"{name} {errno.EFBIG}" for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"old"}


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
