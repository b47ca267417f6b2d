from __future__ import annotations

import errno
import gzip
import importlib.util
import json
import os

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
import torch

from fisherprint import files
from fisherprint.files import OutputExistsError, UnreadableFileError, Volume, read_coefficients
from fisherprint.maps import Maps
from fisherprint.parameters import Parameter

SHAPE = (4, 5, 3, 6)  # no two axes alike, so that no permutation goes unnoticed
M0S = Parameter("m0s", "$m_0^s$", "", (0.0, 1.0))
T2F = Parameter("T2f", "$T_2^f$", "s", (0.0, 10.0), "ms", 1e3)


def images(shape=SHAPE):
    rng = np.random.default_rng(1)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def oblique_affine():
    """Rotated by 30 degrees about z, voxels of 2 x 2 x 4 mm, shifted."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    affine[:2, :2] = 2 * np.array([[c, -s], [s, c]])
    affine[:3, 3] = (-10, 20, 5)
    return affine


def write_nifti(path, array, *, sform=1, qform=4):
    # nibabel would not save an image with an affine but without a code that claims it.
    image = nibabel.Nifti1Image(array, oblique_affine() if sform or qform else None)
    if sform or qform:
        image.header.set_sform(oblique_affine(), sform)
        image.header.set_qform(oblique_affine(), qform)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


def write_bart(path, array, dims):
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{' '.join(map(str, dims))}\n# Command\n")
    array.astype("<c8").ravel(order="F").tofile(path.with_suffix(".cfl"))
    return path.with_suffix(".cfl")


def write_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def write_matlab73(path, **arrays):
    """As MATLAB does: a 512-byte preamble, axes reversed, compound complex numbers."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            if np.iscomplexobj(array):
                pairs = np.empty(array.T.shape, [("real", "<f4"), ("imag", "<f4")])
                pairs["real"], pairs["imag"] = array.T.real, array.T.imag
                file[name] = pairs
            else:
                file[name] = array.T
    with path.open("r+b") as stream:
        stream.write(b"MATLAB 7.3 MAT-file".ljust(512))
    return path


def truncate(path, keep=0.6):
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    return path


# Reading coefficients: the oracle is the array that was written.


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_keeps_numbers_and_place(tmp_path, suffix):
    volume = read_coefficients(write_nifti(tmp_path / f"x{suffix}", images()), rank=6)
    np.testing.assert_array_equal(volume.data, images())
    # NIfTI stores the affine in float32.
    np.testing.assert_allclose(volume.affine, oblique_affine(), rtol=1e-6, atol=1e-6)
    assert (volume.header["sform_code"], volume.header["qform_code"]) == (1, 4)
    assert volume.source == tmp_path / f"x{suffix}"


@pytest.mark.parametrize("suffix", [".cfl", ".hdr"])
def test_bart_coefficients_are_its_axis_6(tmp_path, suffix):
    dims = (4, 5, 3, 1, 1, 1, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    path = write_bart(tmp_path / "x.cfl", images(), dims)
    volume = read_coefficients(path.with_suffix(suffix))
    np.testing.assert_array_equal(volume.data, images())
    assert volume.affine is None


def test_npy_of_a_slice_gets_a_third_axis(tmp_path):
    np.save(tmp_path / "x.npy", images()[:, :, 0].astype(complex))
    volume = read_coefficients(tmp_path / "x.npy")
    np.testing.assert_array_equal(volume.data, images()[:, :, :1])
    assert volume.data.dtype == np.complex64


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["hdf5", "matlab73", "matlab5"])
def test_keyed_arrays_may_have_their_coefficients_first_or_last(tmp_path, kind, first):
    stored = np.moveaxis(images(), -1, 0) if first else images()
    inside = np.abs(images()[..., 0]) > 0.5
    if kind == "hdf5":
        path = write_hdf5(tmp_path / "x.h5", x=stored, mask=inside.astype(np.uint8))
    elif kind == "matlab73":
        path = write_matlab73(tmp_path / "x.mat", x=stored, mask=inside.astype(np.uint8))
    else:
        path = tmp_path / "x.mat"
        scipy.io.savemat(path, {"x": stored, "mask": inside})
    volume = read_coefficients(path, key="x", mask_key="mask", rank=6)
    np.testing.assert_array_equal(volume.data, images())
    np.testing.assert_array_equal(volume.mask, inside)


def test_in_vivo_data(data):
    volume = read_coefficients(data / "invivo" / "coeffs.mat", key="x", mask_key="mask", rank=15)
    assert volume.data.shape == (176, 146, 1, 15)
    # This data set was masked by its authors: zero outside and nowhere else.
    np.testing.assert_array_equal(volume.mask, volume.data.any(-1))


# What cannot be read says so: expected, got, what to do.


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".npy", ".mat", ".h5", ".cfl"])
def test_a_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(UnreadableFileError, match=r"expected a file at .*x\..*nothing"):
        read_coefficients(tmp_path / f"x{suffix}", key="x" if suffix in (".mat", ".h5") else None)


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"\.nii, \.nii\.gz, \.cfl"):
        read_coefficients(tmp_path / "x.png")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
@pytest.mark.parametrize("kind", [".nii", ".nii.gz", ".npy", ".h5", "v5.mat", "v73.mat"])
def test_a_damaged_file_is_named(tmp_path, kind, damage):
    path = tmp_path / f"x{kind}"
    if kind.startswith(".nii"):
        write_nifti(path, images())
    elif kind == ".npy":
        np.save(path, images())
    elif kind == "v5.mat":
        scipy.io.savemat(path, {"x": images()})
    elif kind == "v73.mat":
        write_matlab73(path, x=images())
    else:
        write_hdf5(path, x=images())
    if damage == "truncated":
        truncate(path)
    else:
        path.write_bytes(b"" if damage == "empty" else b"GIF89a, no coefficients" * 40)
    key = "x" if kind.endswith((".h5", ".mat")) else None
    with pytest.raises(
        UnreadableFileError, match=r"^expected (an?|one) (HDF5|MATLAB|NIfTI|NumPy)"
    ) as caught:
        read_coefficients(path, key=key)
    assert str(path) in str(caught.value)


def test_gzip_with_a_wrong_checksum_is_refused(tmp_path):
    path = write_nifti(tmp_path / "x.nii.gz", images())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match="expected a NIfTI image"):
        read_coefficients(path)


def test_an_npz_archive_is_no_array(tmp_path):
    np.savez(tmp_path / "x.npz", x=images())
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(UnreadableFileError, match="is an archive"):
        read_coefficients(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ("4 5 3 1 1 1 7", UnreadableFileError, "expected 3360 bytes .* got 2880"),
        ("4 5 3 1 1 1 six", UnreadableFileError, "a line of integers"),
        ("", UnreadableFileError, "got 2880"),
        ("4 5 1 3 1 1 6", ValueError, r"axis 3 \(COIL\) of length 3"),
        ("4 5 1 1 1 1 6 1 1 1 1 1 1 3", ValueError, "axis 13 of length 3"),
    ],
)
def test_a_bart_header_that_does_not_fit_is_refused(tmp_path, dims, error, message):
    path = write_bart(tmp_path / "x.cfl", images(), (4, 5, 3, 1, 1, 1, 6))
    path.with_suffix(".hdr").write_text(f"# Dimensions\n{dims}\n")
    with pytest.raises(error, match=message):
        read_coefficients(path)


@pytest.mark.parametrize("kind", ["hdf5", "matlab73", "matlab5"])
@pytest.mark.parametrize("key", [None, "coefficients"])
def test_a_missing_key_lists_those_there_are(tmp_path, kind, key):
    path = tmp_path / "x.mat"
    if kind == "matlab5":
        scipy.io.savemat(path, {"x": images(), "mask": np.ones(3)})
    else:
        {"hdf5": write_hdf5, "matlab73": write_matlab73}[kind](path, x=images(), mask=np.ones(3))
    with pytest.raises(UnreadableFileError, match=r"it has (x, mask|mask, x)"):
        read_coefficients(path, key=key)


def test_a_key_for_a_format_without_names_is_refused(tmp_path):
    path = write_nifti(tmp_path / "x.nii", images())
    with pytest.raises(ValueError, match="got the key 'mask'"):
        read_coefficients(path, mask_key="mask")


def test_magnitude_images_are_refused(tmp_path):
    path = write_nifti(tmp_path / "x.nii", np.abs(images()))
    with pytest.raises(ValueError, match=r"expected complex .* got float32"):
        read_coefficients(path)


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [
        ((6, 5, 6), 6, "axis 0 or axis 2 .* in which both fit"),
        ((4, 6, 5), 6, "axis 0 or axis 2 .* in which none fits"),
    ],
)
def test_coefficients_that_cannot_be_told_are_refused(tmp_path, shape, rank, message):
    path = write_hdf5(tmp_path / "x.h5", x=images(shape))
    with pytest.raises(ValueError, match=message):
        read_coefficients(path, key="x", rank=rank)


def test_a_rank_that_disagrees_is_refused_where_the_axis_is_fixed(tmp_path):
    path = write_nifti(tmp_path / "x.nii", images())
    with pytest.raises(ValueError, match=r"expected 4 coefficients along axis 3"):
        read_coefficients(path, rank=4)


@pytest.mark.parametrize("shape", [(6,), (2, 2, 2, 2, 6)])
def test_too_few_or_too_many_axes_are_refused(tmp_path, shape):
    np.save(tmp_path / "x.npy", images(shape))
    with pytest.raises(ValueError, match="one to three spatial axes"):
        read_coefficients(tmp_path / "x.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, complex(0, -np.inf)])
def test_a_single_bad_coefficient_is_counted_and_located(tmp_path, value):
    array = images()
    array[1, 2, 0, 3] = array[3, 0, 2, 5] = value
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=r"2 other NaN or Inf of 360 .* \(1, 2, 0, 3\)"):
        read_coefficients(tmp_path / "x.npy")


def test_a_voxel_of_infinities_is_no_background(tmp_path):
    array = images()
    array[1, 2, 0] = np.inf
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match="6 other NaN or Inf"):
        read_coefficients(tmp_path / "x.npy")


def test_background_of_nan_or_zero_is_read(tmp_path):
    array = images()
    array[0], array[1] = np.nan, 0
    np.save(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(read_coefficients(tmp_path / "x.npy").data, array)


@pytest.mark.parametrize("value", [0, np.nan])
def test_background_alone_is_refused(tmp_path, value):
    np.save(tmp_path / "x.npy", np.full(SHAPE, value, np.complex64))
    with pytest.raises(ValueError, match="expected signal"):
        read_coefficients(tmp_path / "x.npy")


# Masks.


def test_masks_come_from_every_format(tmp_path):
    inside = np.abs(images()[..., 0]) > 0.5
    paths = [
        write_nifti(tmp_path / "a.nii.gz", inside.astype(np.uint8)),
        write_nifti(tmp_path / "b.nii", inside[..., None].astype(np.float32)),
        write_bart(tmp_path / "c.cfl", inside + 0j, (4, 5, 3)),
    ]
    for path in paths:
        np.testing.assert_array_equal(files.read_mask(path, SHAPE[:3]), inside)
    path = write_hdf5(tmp_path / "d.h5", inside=inside[..., 0])
    mask = files.read_mask(path, (4, 5, 1), key="inside")
    np.testing.assert_array_equal(mask, inside[..., :1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((5, 4, 3)), r"axes \(X=4, Y=5, Z=3\); got the shape \(5, 4, 3\)"),
        (np.zeros((4, 5, 3)), "zeros alone"),
        (np.full((4, 5, 3), np.nan), "60 NaN or Inf"),
        (np.ones((4, 5, 3, 2)), "one to three spatial axes"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, array, message):
    np.save(tmp_path / "mask.npy", array)
    with pytest.raises(ValueError, match=message):
        files.read_mask(tmp_path / "mask.npy", SHAPE[:3])


# Writing maps.


def two_maps():
    rng = np.random.default_rng(2)
    values = rng.uniform(0.05, 0.2, (*SHAPE[:3], 2))
    mask = np.ones(SHAPE[:3], bool)
    mask[0] = False
    values[0] = np.nan
    values[1, 1, 1] = np.nan
    return Maps(("T2f", "m0s"), values, mask, 1)


def write_two(folder, volume=None):
    volume = Volume(images(), oblique_affine()) if volume is None else volume
    return files.write_maps(
        two_maps(), folder, volume=volume, parameters=[M0S, T2F], provenance={"version": "1.2"}
    )


@pytest.mark.parametrize("codes", [(1, 4), (4, 0), (0, 1), (0, 0)])
def test_maps_keep_numbers_place_and_codes(tmp_path, codes):
    sform, qform = codes
    volume = read_coefficients(write_nifti(tmp_path / "x.nii", images(), sform=sform, qform=qform))
    paths = write_two(tmp_path / "maps", volume)
    assert [path.name for path in paths] == ["T2f.nii.gz", "m0s.nii.gz"]
    for column, path in enumerate(paths):
        image = nibabel.load(path)
        np.testing.assert_array_equal(
            image.get_fdata(), two_maps().values[..., column].astype(np.float32)
        )
        assert image.get_data_dtype() == np.float32
        np.testing.assert_array_equal(image.affine, volume.affine)
        assert (image.header["sform_code"], image.header["qform_code"]) == codes
        np.testing.assert_array_equal(image.get_qform(), volume.header.get_qform())
        assert image.header.get_xyzt_units() == ("mm", "unknown")
        assert image.header.get_zooms() == volume.header.get_zooms()[:3]


def test_maps_without_a_header_take_the_affine_and_without_an_affine_claim_none(tmp_path):
    placed = nibabel.load(write_two(tmp_path / "a")[0])
    np.testing.assert_allclose(placed.affine, oblique_affine(), rtol=1e-6, atol=1e-6)
    assert placed.header.get_xyzt_units()[0] == "mm"
    nowhere = nibabel.load(write_two(tmp_path / "b", Volume(images()))[0])
    assert nowhere.header["sform_code"] == nowhere.header["qform_code"] == 0


def test_the_sidecar_says_what_the_image_holds(tmp_path):
    write_two(tmp_path)
    values = two_maps()["T2f"]
    assert files.read_json(tmp_path / "T2f.json") == {
        "Parameter": "T2f",
        "Unit": "s",
        "DisplayUnit": "ms",
        "DisplayFactor": 1e3,
        "Range": [np.nanmin(values), np.nanmax(values)],
        "NumberOfVoxels": 3 * 5 * 3,
        "NumberFailed": 1,
        "Source": None,
        "Provenance": {"version": "1.2"},
    }


def test_a_map_of_failures_has_no_range(tmp_path):
    maps = Maps(("m0s",), np.full((4, 5, 3, 1), np.nan), np.ones(SHAPE[:3], bool), 60)
    files.write_maps(maps, tmp_path, volume=Volume(images()), parameters=[M0S], provenance={})
    assert files.read_json(tmp_path / "m0s.json")["Range"] is None


def test_maps_of_another_volume_or_without_description_are_refused(tmp_path):
    other = Volume(images((5, 4, 3, 6)))
    with pytest.raises(ValueError, match=r"the maps must have the axes \(X=5, Y=4, Z=3, E=2\)"):
        write_two(tmp_path / "maps", other)
    with pytest.raises(KeyError, match="unknown parameter 'T2f'; known are m0s"):
        files.write_maps(
            two_maps(), tmp_path / "maps", volume=Volume(images()), parameters=[M0S], provenance={}
        )
    assert not (tmp_path / "maps").exists()


# A full disk leaves what was there.


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_a_nifti(image, path):
    path.write_bytes(image.to_bytes()[:400])
    full_disk()


WRITERS = {
    "maps": lambda folder: write_two(folder),
    "json": lambda folder: files.write_json(folder / "a.json", {"a": 1}),
    "network": lambda folder: files.save_network(folder, {"w": torch.ones(3)}, {"rank": 13}),
    "checkpoint": lambda folder: files.write_checkpoint(
        folder / "state.safetensors", {"w": torch.ones(3)}, {"epoch": 3}
    ),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_files_and_no_others(tmp_path, monkeypatch, writer):
    WRITERS[writer](tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"old")
    before = contents(tmp_path)
    # Some file systems tell of a full disk only when the data are forced out.
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[writer](tmp_path)
    assert contents(tmp_path) == before


def test_a_disk_that_fills_half_way_through_an_image_leaves_the_old_one(tmp_path, monkeypatch):
    write_two(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(nibabel, "save", half_a_nifti)
    with pytest.raises(OSError, match="No space left"):
        write_two(tmp_path)
    assert contents(tmp_path) == before


# Records.


def test_toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("rate = 0.5\n[train]\nname = 'µ'\n", encoding="utf-8")
    assert files.read_toml(path) == {"rate": 0.5, "train": {"name": "µ"}}
    path.write_text("rate = \n")
    with pytest.raises(UnreadableFileError, match=r"a\.toml cannot be parsed: .*line 1"):
        files.read_toml(path)
    with pytest.raises(UnreadableFileError, match="expected a file"):
        files.read_toml(tmp_path / "b.toml")


def test_json_returns_what_was_written(tmp_path):
    content = {"name": "m₀ˢ", "values": [1, 0.1, None], "nested": {"a": True}}
    files.write_json(tmp_path / "new" / "a.json", content)
    assert files.read_json(tmp_path / "new" / "a.json") == content


def test_json_refuses_nan_before_it_touches_the_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert files.read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"), [('{"a": ', "truncated"), ("[1]", "got a list"), ("\xff", "parsed")]
)
def test_json_that_is_none_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UnreadableFileError, match=message):
        files.read_json(tmp_path / "a.json")


def test_json_lines_grow_and_drop_an_unfinished_last_one(tmp_path):
    path = tmp_path / "log" / "epochs.jsonl"
    files.append_jsonl(path, {"epoch": 1, "note": "ε"})
    files.append_jsonl(path, {"epoch": 2})
    with path.open("a") as stream:
        stream.write('{"epoch": 3, "lo')
    assert files.read_jsonl(path) == [{"epoch": 1, "note": "ε"}, {"epoch": 2}]
    files.append_jsonl(path, {"epoch": 3})
    assert [record["epoch"] for record in files.read_jsonl(path)] == [1, 2, 3]


def test_a_broken_line_that_is_not_the_last_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(UnreadableFileError, match=r"a\.jsonl cannot be parsed"):
        files.read_jsonl(tmp_path / "a.jsonl")


def test_a_finished_run_is_not_overwritten_unless_forced(tmp_path):
    folder = tmp_path / "runs" / "one"
    assert files.claim_folder(folder, finished_marker="done.json") == folder
    (folder / "partial").touch()
    files.claim_folder(folder, finished_marker="done.json")  # unfinished: may go on
    (folder / "done.json").touch()
    with pytest.raises(OutputExistsError, match=r"another folder, or .* --force"):
        files.claim_folder(folder, finished_marker="done.json")
    files.claim_folder(folder, finished_marker="done.json", force=True)
    assert not (folder / "done.json").exists()
    assert (folder / "partial").exists()
    with pytest.raises(OutputExistsError, match="found a file"):
        files.claim_folder(folder / "partial", finished_marker="done.json")


# Networks.


def some_state():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, generator=generator)
    return {"weight": weight, "turned": weight.T.clone().T, "epoch": torch.tensor(7)}


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_network_comes_back_bit_for_bit(tmp_path):
    files.save_network(tmp_path / "net", some_state(), {"rank": 13, "names": ["m0s"]})
    state, card = files.load_network_files(tmp_path / "net", required=("rank", "names"))
    assert_same(state, some_state())
    assert (card["rank"], card["names"]) == (13, ["m0s"])


def test_a_card_without_a_key_lists_what_it_has(tmp_path):
    files.save_network(tmp_path, some_state(), {"rank": 13})
    with pytest.raises(UnreadableFileError, match=r"expected the keys names in .* has rank, w"):
        files.load_network_files(tmp_path, required=("rank", "names"))


def test_weights_that_are_truncated_or_anothers_are_refused(tmp_path):
    files.save_network(tmp_path / "a", some_state(), {})
    files.save_network(tmp_path / "b", {"w": torch.ones(2)}, {})
    weights = tmp_path / "a" / "weights.safetensors"
    weights.write_bytes((tmp_path / "b" / "weights.safetensors").read_bytes())
    with pytest.raises(UnreadableFileError, match="truncated or from another run"):
        files.load_network_files(tmp_path / "a", required=())
    truncate(tmp_path / "b" / "weights.safetensors")
    with pytest.raises(UnreadableFileError, match="truncated or from another run"):
        files.load_network_files(tmp_path / "b", required=())
    weights.unlink()
    with pytest.raises(UnreadableFileError, match="expected a file"):
        files.load_network_files(tmp_path / "a", required=())


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "state.safetensors"
    content = {"epoch": 3, "groups": [{"lr": 0.01, "params": [0, 1]}], "name": "ε"}
    files.write_checkpoint(path, some_state(), content)
    tensors, read = files.read_checkpoint(path)
    assert_same(tensors, some_state())
    assert read == content
    # An open checkpoint can be replaced, and what was read from it stays.
    files.write_checkpoint(path, {"w": torch.zeros(2)}, {"epoch": 4})
    assert_same(tensors, some_state())


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "state.safetensors"
    files.write_checkpoint(path, some_state(), {"epoch": 3})
    truncate(path)
    with pytest.raises(UnreadableFileError, match=r"expected a checkpoint.*truncated"):
        files.read_checkpoint(path)
    files.save_network(tmp_path, some_state(), {})
    with pytest.raises(UnreadableFileError, match="holds tensors alone"):
        files.read_checkpoint(tmp_path / "weights.safetensors")


# Tissue maps.


@pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn brings the tissue maps"
)
def test_tissue_maps_are_probabilities_in_a_brain():
    maps = files.read_tissue_maps()
    assert maps.grey.shape == maps.white.shape == maps.brain.shape == (197, 233, 189)
    # Origin of the 1 mm ICBM grid.
    np.testing.assert_array_equal(maps.affine[:3, 3], (-98, -134, -72))
    total = maps.grey + maps.white
    assert total.min() >= 0
    assert total.max() <= 1 + 1e-6  # two roundings in float32
    # Grey and white matter of adults is 1.0 to 1.4 litres; this template is a large brain.
    assert 1.0 < total.sum() * 1e-6 < 1.8
    # Less than 1 % of the matter is outside the hull.
    assert total[~maps.brain].sum() < 0.01 * total.sum()


def test_without_nilearn_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fisherprint\[demo\]"'):
        files.read_tissue_maps()


def test_gz_maps_are_gzip(tmp_path):
    path = write_two(tmp_path)[0]
    header = gzip.decompress(path.read_bytes())[:348]
    # sizeof_hdr of NIfTI-1, and its magic string.
    assert int.from_bytes(header[:4], "little") == 348
    assert header[344:347] == b"n+1"


def test_the_sidecar_is_strict_json(tmp_path):
    write_two(tmp_path)
    json.loads((tmp_path / "m0s.json").read_text(), parse_constant=pytest.fail)
