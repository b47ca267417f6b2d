from __future__ import annotations

import dataclasses
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
from fisherprint.evaluate import Audit, Score
from fisherprint.files import UnreadableFileError, Volume, read_coefficients
from fisherprint.fisher import PriorBounds
from fisherprint.maps import Maps
from fisherprint.parameters import Parameter
from fisherprint.sequence import PulseTrain
from fisherprint.simulate import SPLITS, DataSet, Reduced
from fisherprint.subspace import Basis

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


# Maps of real numbers.


def test_maps_come_from_every_format_with_nan(tmp_path):
    values = images()[..., 0].real
    values[0, 0, 0] = np.nan
    paths = [
        write_nifti(tmp_path / "a.nii.gz", values),
        write_nifti(tmp_path / "b.nii", values[..., None]),
        write_bart(tmp_path / "c.cfl", values + 0j, (4, 5, 3)),  # which knows no real numbers
        write_hdf5(tmp_path / "d.h5", B1=values, other=2 * values),
    ]
    np.save(tmp_path / "e.npy", values)
    for path in (*paths, tmp_path / "e.npy"):
        read = files.read_map(path, SHAPE[:3], name="B1")
        np.testing.assert_array_equal(read, values)
        assert read.dtype == np.float64
    with pytest.raises(UnreadableFileError, match=r"the key 'B0' in .* it has B1, other"):
        files.read_map(tmp_path / "d.h5", SHAPE[:3], name="B0")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((5, 4, 3)), r"axes \(X=4, Y=5, Z=3\); got the shape \(5, 4, 3\)"),
        (np.ones((4, 5, 3, 2)), "one to three spatial axes"),
        (1 + 1e-3j * np.ones((4, 5, 3)), "a map of real numbers in .*; got complex ones"),
    ],
)
def test_maps_that_do_not_fit_are_refused(tmp_path, array, message):
    np.save(tmp_path / "map.npy", array)
    with pytest.raises(ValueError, match=message):
        files.read_map(tmp_path / "map.npy", SHAPE[:3], name="B1")


# Masks and coefficient images that were written.


@pytest.mark.parametrize("affine", [None, oblique_affine()], ids=["nowhere", "placed"])
def test_a_mask_comes_back(tmp_path, affine):
    inside = images()[..., 0].real > 0
    files.write_mask(tmp_path / "mask.nii.gz", inside, volume=Volume(images(), affine))
    np.testing.assert_array_equal(files.read_mask(tmp_path / "mask.nii.gz", SHAPE[:3]), inside)
    image = nibabel.load(tmp_path / "mask.nii.gz")
    assert image.get_data_dtype() == np.uint8
    if affine is not None:
        # NIfTI stores the affine in float32.
        np.testing.assert_allclose(image.affine, affine, rtol=1e-6, atol=1e-6)


def test_coefficients_come_back_with_the_identity_of_their_basis(tmp_path):
    path = tmp_path / "x.nii.gz"
    given = read_coefficients(write_nifti(tmp_path / "given.nii", images(), sform=4, qform=1))
    files.write_coefficients(path, given, basis_sha256="ab" * 32)
    volume = read_coefficients(path, rank=6)
    np.testing.assert_array_equal(volume.data, images())
    np.testing.assert_array_equal(volume.affine, given.affine)
    assert (volume.header["sform_code"], volume.header["qform_code"]) == (4, 1)
    assert volume.header.get_xyzt_units()[0] == "mm"
    assert files.recorded_basis(path) == "ab" * 32
    files.write_coefficients(path, Volume(images()), basis_sha256="cd" * 32)
    assert files.recorded_basis(path) == "cd" * 32
    # Nothing places them in space, and nothing claims to.
    header = nibabel.load(path).header
    assert header["sform_code"] == header["qform_code"] == 0


@pytest.mark.parametrize("name", ["a.b.nii.gz", "a.b.nii", "a.b.cfl", "a.b.h5", "a.b.NII.GZ"])
def test_the_basis_is_recorded_beside_images_of_any_format(tmp_path, name):
    assert files.recorded_basis(tmp_path / name) is None
    files.write_json(tmp_path / "a.b.json", {"EchoTime": 0.001})
    assert files.recorded_basis(tmp_path / name) is None
    files.write_json(tmp_path / "a.b.json", {"BasisSHA256": "ab"})
    assert files.recorded_basis(tmp_path / name) == "ab"
    (tmp_path / "a.b.json").write_text('{"BasisSHA256": ')
    with pytest.raises(UnreadableFileError, match=r"a\.b\.json cannot be parsed"):
        files.recorded_basis(tmp_path / name)


# Bases.


def complex_basis(n_samples=12, rank=3):
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(n_samples, rank)) + 1j * rng.normal(size=(n_samples, rank))
    return Basis(np.linalg.qr(vectors)[0])


@pytest.mark.parametrize("kind", ["hdf5", "matlab73", "matlab5"])
def test_a_basis_may_stand_upright_or_as_the_matrix_that_makes_coefficients(tmp_path, kind):
    """(T, K) are the vectors U; (K, T) is Uᴴ, so that coefficients = matrix · signal."""
    basis = complex_basis()
    arrays = {"upright": basis.vectors, "matrix": basis.vectors.conj().T}
    path = tmp_path / "U.mat"
    if kind == "matlab5":
        scipy.io.savemat(path, arrays)
    elif kind == "matlab73":
        write_matlab73(path, **arrays)
    else:
        path = write_hdf5(tmp_path / "U.h5", **arrays)
    upright, matrix = (files.read_basis(path, key=key, n_samples=12) for key in arrays)
    assert upright.digest == matrix.digest
    if kind == "matlab73":
        # Written in single precision; orthonormality costs no further digit.
        np.testing.assert_allclose(upright.vectors, basis.vectors, rtol=0, atol=1e-7)
    else:
        assert upright.digest == basis.digest
    signal = np.random.default_rng(5).normal(size=(2, 12)) @ np.diag(np.exp(1j * np.arange(12)))
    # Sums of 12 products of order one; the vectors are good to 1e-7.
    np.testing.assert_allclose(
        matrix.compress(signal), signal @ arrays["matrix"].T, rtol=0, atol=1e-6
    )


def test_a_real_basis_is_a_basis_too(tmp_path):
    vectors = np.linalg.qr(np.random.default_rng(4).normal(size=(12, 3)))[0]
    path = write_hdf5(tmp_path / "U.h5", U=vectors, UT=vectors.T)
    bases = [files.read_basis(path, key=key, n_samples=12) for key in ("U", "UT")]
    assert bases[0].digest == bases[1].digest == Basis(vectors).digest


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.eye(13)[:, :3], r"T=12 time points in .*U\.h5.* got the shape \(13, 3\)"),
        (np.ones(12), r"got the shape \(12,\)"),
        (np.ones((12, 3)), "orthonormal"),
        (np.eye(13)[:12], "orthonormal"),
        (np.full((12, 3), np.nan), "must be finite"),
    ],
    ids=["other train", "one axis", "not orthonormal", "more vectors than samples", "NaN"],
)
def test_what_is_no_basis_of_the_train_is_refused(tmp_path, array, message):
    path = write_hdf5(tmp_path / "U.h5", U=array)
    with pytest.raises(ValueError, match=message):
        files.read_basis(path, key="U", n_samples=12)


def test_a_basis_that_cannot_be_read_is_named(tmp_path):
    path = write_hdf5(tmp_path / "U.h5", U=complex_basis().vectors)
    with pytest.raises(UnreadableFileError, match=r"expected the key 'V' .* it has U"):
        files.read_basis(path, key="V", n_samples=12)
    truncate(path)
    with pytest.raises(UnreadableFileError, match="truncated"):
        files.read_basis(path, key="U", n_samples=12)
    with pytest.raises(UnreadableFileError, match="expected a file"):
        files.read_basis(tmp_path / "V.h5", key="U", n_samples=12)


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
        "Kind": "estimate",
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


@pytest.mark.parametrize("affine", [None, oblique_affine()], ids=["nowhere", "placed"])
def test_maps_come_back(tmp_path, affine):
    write_two(tmp_path, Volume(images(), affine))
    read = files.read_maps(tmp_path, ["m0s", "T2f"])
    assert read.maps.names == ("m0s", "T2f")
    for name in read.maps.names:
        np.testing.assert_array_equal(read.maps[name], two_maps()[name].astype(np.float32))
    np.testing.assert_array_equal(read.mask, np.isfinite(two_maps()["m0s"]))
    if affine is None:
        assert read.affine is None
    else:
        # NIfTI stores the affine in float32.
        np.testing.assert_allclose(read.affine, affine, rtol=1e-6, atol=1e-6)


def test_maps_that_cannot_be_read_are_named(tmp_path):
    write_two(tmp_path)
    with pytest.raises(UnreadableFileError, match=r"expected a file at .*T1\.nii\.gz"):
        files.read_maps(tmp_path, ["m0s", "T1"])
    truncate(tmp_path / "m0s.nii.gz")
    with pytest.raises(UnreadableFileError, match=r"m0s\.nii\.gz .* damaged"):
        files.read_maps(tmp_path, ["T2f", "m0s"])


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
    "mask": lambda folder: files.write_mask(
        folder / "mask.nii.gz", np.ones(SHAPE[:3], bool), volume=Volume(images())
    ),
    "coefficients": lambda folder: files.write_coefficients(
        folder / "x.nii.gz", Volume(images()), basis_sha256="ab"
    ),
    "text": lambda folder: files.write_text(folder / "a.html", "a"),
    "toml": lambda folder: files.write_toml(folder / "a.toml", {"a": 1}),
    "json lines": lambda folder: files.write_jsonl(folder / "a.jsonl", [{"a": 1}]),
    "data set": lambda folder: write_some_dataset(
        folder / "dataset.h5", PulseTrain(np.r_[np.pi, 0.5], np.full(2, 3e-4), 3.5e-3)
    ),
    "audit": lambda folder: files.write_audit(folder / "evaluation.h5", *some_audit()),
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


@pytest.mark.parametrize("text", ["", "θ = Uᴴ s\n", "no end of line"])
def test_text_is_written_as_it_is(tmp_path, text):
    path = tmp_path / "new" / "page.html"
    files.write_text(path, "older and longer than the others")
    files.write_text(path, text)
    assert path.read_bytes() == text.encode("utf-8")


def test_toml_returns_what_was_written(tmp_path):
    content = {"title": 'É "≠" E', "low": -float("inf"), "n": 3, "map": {"ranges": {"T1": [0, 2]}}}
    files.write_toml(tmp_path / "a.toml", content)
    assert files.read_toml(tmp_path / "a.toml") == content
    assert (tmp_path / "a.toml").read_text("utf-8") == files.to_toml(content)


def test_toml_that_cannot_be_written_leaves_the_old_file(tmp_path):
    files.write_toml(tmp_path / "a.toml", {"a": 1})
    with pytest.raises(TypeError):  # TOML has no null
        files.write_toml(tmp_path / "a.toml", {"a": None})
    assert files.read_toml(tmp_path / "a.toml") == {"a": 1}


def test_json_lines_written_anew_are_those_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    files.append_jsonl(path, {"epoch": 1})
    files.write_jsonl(path, [{"epoch": 2, "note": "ε"}, {"epoch": 3}])
    assert files.read_jsonl(path) == [{"epoch": 2, "note": "ε"}, {"epoch": 3}]
    files.write_jsonl(path, [])
    assert files.read_jsonl(path) == []


def test_the_digest_of_a_file_is_sha256(tmp_path):
    # FIPS 180-2, appendix B.1.
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.file_digest(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


# Data sets and audits.


def some_dataset():
    rng = np.random.default_rng(6)

    def reduced(size):
        bounds = rng.random((2, size, 2))
        bounds[1, 0, 1] = np.inf  # a fingerprint without a bound
        coefficients = rng.normal(size=(size, 3)) + 1j * rng.normal(size=(size, 3))
        theta, information = rng.random((size, 2)), rng.random((size, 10))
        return Reduced(theta, coefficients, bounds[0], bounds[1], information)

    samples = {split: reduced(size) for split, size in zip(SPLITS, (5, 4, 3), strict=True)}
    return DataSet(("m0s", "T2f"), complex_basis(), samples, 0.998)


def write_some_dataset(path, train):
    files.write_dataset(path, some_dataset(), train, seed=7, versions={"numpy": "2.0"})


def some_audit():
    rng = np.random.default_rng(8)
    bias, variance = rng.random((2, 2, 4, 3))
    bias[1, 2, 0] = variance[1, 2, 0] = np.nan  # an estimate that failed
    crb = rng.random((4, 3))
    crb[3, 1] = np.inf
    names = ("m0s", "T1", "T2f")
    snr = np.array([20.0, 50.0])
    prior = PriorBounds(names, snr, rng.random(3), *rng.random((2, 2, 3)))
    audit = Audit(names, snr, rng.random((4, 3)), crb, bias, variance, n_noise=300, prior=prior)
    return audit, Score(names, 1.25, 0.01, rng.random(3), rng.random(3), 7, 2, 1)


def assert_equal_fields(read, written):
    for field in dataclasses.fields(written):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(written, field.name))


def test_a_data_set_comes_back_bit_for_bit(tmp_path, short_train):
    written, path = some_dataset(), tmp_path / "new" / "dataset.h5"
    write_some_dataset(path, short_train)
    read, train = files.read_dataset(path)
    assert (read.names, read.energy) == (written.names, written.energy)
    assert read.basis.digest == written.basis.digest
    assert train.digest == short_train.digest
    assert list(read.samples) == list(SPLITS)
    for split in SPLITS:
        assert_equal_fields(read.samples[split], written.samples[split])
    # The same data give the same file, so that its digest can identify them.
    write_some_dataset(tmp_path / "again.h5", short_train)
    assert files.file_digest(tmp_path / "again.h5") == files.file_digest(path)


def test_an_audit_comes_back_bit_for_bit(tmp_path):
    audit, score = some_audit()
    files.write_audit(tmp_path / "evaluation.h5", audit, score)
    read, read_score = files.read_audit(tmp_path / "evaluation.h5")
    assert_equal_fields(read.prior, audit.prior)
    assert_equal_fields(
        dataclasses.replace(read, prior=None), dataclasses.replace(audit, prior=None)
    )
    assert_equal_fields(read_score, score)


def test_records_of_early_versions_lack_the_information_and_the_prior(tmp_path, short_train):
    path = tmp_path / "dataset.h5"
    write_some_dataset(path, short_train)
    with h5py.File(path, "r+") as file:
        for split in SPLITS:
            del file[split]["information"]
    read, _ = files.read_dataset(path)
    assert not read.has_information
    np.testing.assert_array_equal(read.crb("test"), some_dataset().crb("test"))
    # Read and written again, it stays what it was.
    files.write_dataset(path, read, short_train, seed=7, versions={})
    assert not files.read_dataset(path)[0].has_information
    audit, score = some_audit()
    files.write_audit(path, dataclasses.replace(audit, prior=None), score)
    assert files.read_audit(path)[0].prior is None


def other_format(path):
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = 2


def foreign_group(path):
    with h5py.File(path, "w") as file:
        file["images"] = np.ones(3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated"),
        (lambda path: path.write_bytes(b"GIF89a"), r"expected an HDF5 .*\(6 bytes\)"),
        (lambda path: path.unlink(), "expected a file"),
        (other_format, r"of format 1 with .* has format 2 and .* another version or tool\?"),
        (foreign_group, "has format None and images"),
    ],
    ids=["truncated", "foreign", "missing", "other format", "other HDF5"],
)
@pytest.mark.parametrize("kind", ["data set", "evaluation"])
def test_a_record_that_cannot_be_read_is_named(tmp_path, short_train, kind, damage, message):
    path = tmp_path / "record.h5"
    if kind == "data set":
        write_some_dataset(path, short_train)
    else:
        files.write_audit(path, *some_audit())
    damage(path)
    with pytest.raises(UnreadableFileError, match=message) as caught:
        (files.read_dataset if kind == "data set" else files.read_audit)(path)
    assert str(path) in str(caught.value)


def test_a_data_set_is_no_audit_and_an_audit_no_data_set(tmp_path, short_train):
    path = tmp_path / "record.h5"
    write_some_dataset(path, short_train)
    with pytest.raises(UnreadableFileError, match="expected a fisherprint evaluation"):
        files.read_audit(path)
    files.write_audit(path, *some_audit())
    with pytest.raises(UnreadableFileError, match="expected a fisherprint data set"):
        files.read_dataset(path)


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
