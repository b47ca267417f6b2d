"""Coils, the digital scan, files of raw data, and the way from a scan to images in one command."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import h5py
import ismrmrd
import nibabel
import numpy as np
import pytest

from fisherprint import _storage, cli, files
from fisherprint import experiment as stages
from fisherprint.experiment import reconstructing
from fisherprint.experiment.folder import read_data
from fisherprint.reconstruct import (
    coils,
    encoding,
    planning,
    scanning,
    solve,
    toeplitz,
    trajectory,
)
from fisherprint.sequence import PulseTrain


def _gaussian(rng, *shape):
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def _relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def silent(*_):
    """Report nothing."""


@pytest.mark.parametrize("planar", [True, False])
def test_spokes_of_a_scan_are_counted_cycle_by_cycle(planar):
    spokes = trajectory.radial_scan(3, 2, [1.0], planar=planar)
    assert spokes.shape == (3, 2, 1, 3)
    directions = (trajectory.golden_angle if planar else trajectory.koosh_ball)(6)
    # The second pulse of the second cycle is the fifth spoke.
    np.testing.assert_allclose(spokes[1, 1, 0], directions[4], rtol=1e-6)


def test_the_golden_angle_is_111_degrees():
    x, y, z = trajectory.golden_angle(2)[1]
    # Winkelmann et al. print 111.246°.
    assert np.rad2deg(np.arctan2(y, x)) == pytest.approx(111.246, abs=1e-3)
    assert z == 0


@pytest.mark.parametrize("matrix", [(5, 6, 4), (7, 6, 1)])
def test_the_digital_scan_is_the_sum_over_voxels(matrix):
    rng = np.random.default_rng(0)
    spokes = trajectory.radial_scan(4, 2, trajectory.readout(min(matrix[:2]) // 2), planar=True)
    frames = _gaussian(rng, 4, *matrix)
    maps = scanning.coil_sensitivities(matrix, 3)
    samples = np.stack(list(scanning.acquire(spokes, maps, lambda t: frames[t], rng=rng)), 1)
    place = np.stack(
        np.meshgrid(*((np.arange(n) - n // 2) / n for n in matrix), indexing="ij"), -1
    )
    waves = np.exp(-2j * np.pi * np.einsum("tsra,xyza->tsrxyz", spokes.astype(float), place))
    expected = np.einsum("tsrxyz,cxyz,txyz->ctsr", waves, maps, frames, optimize=True)
    expected /= np.sqrt(np.prod(matrix))
    # The result is in single precision.
    assert _relative(samples, expected) < 1e-6
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-6)


def test_noise_of_the_scan_is_that_of_real_and_imaginary_part_each():
    spokes = trajectory.radial_scan(10, 10, trajectory.readout(8))
    maps = scanning.coil_sensitivities((8, 8, 8), 2)
    rng = np.random.default_rng(0)
    frame = np.zeros((8, 8, 8))
    noise = np.stack(list(scanning.acquire(spokes, maps, lambda _: frame, noise_std=0.3, rng=rng)))
    # 3200 numbers: relative standard error of σ is 1/√(2·1600); four of them.
    for part in (noise.real, noise.imag):
        assert abs(part.std() / 0.3 - 1) < 4 / np.sqrt(2 * noise.size)


def _plain_sum(points, maps, frames, pulses):
    """y_c(k) of points (number, 3), voxel by voxel and without a transform: (number, C)."""
    matrix = maps.shape[1:]
    total = np.zeros((len(points), len(maps)), np.complex128)
    for voxel in np.ndindex(*matrix):
        place = [(i - n // 2) / n for i, n in zip(voxel, matrix, strict=True)]
        wave = np.exp(-2j * np.pi * (points.astype(float) @ place))
        total += np.outer(wave * frames[(pulses, *voxel)], maps[(slice(None), *voxel)])
    return total / np.sqrt(np.prod(matrix))


@pytest.mark.filterwarnings("ignore::fisherprint.reconstruct.encoding.UndersampledWarning")
@pytest.mark.parametrize("matrix", [(13, 12, 9), (8, 11, 14)])
def test_the_digital_scan_of_a_volume_is_the_plain_sum_at_random_samples(matrix):
    """The path of the scan and of the reconstruction, without any non-uniform transform."""
    rng = np.random.default_rng(3)
    T, S, R = 6, 4, 10
    # Anywhere within the edges of k-space, which differ between the axes.
    spokes = (rng.uniform(-0.5, 0.5, (T, S, R, 3)) * np.array(matrix)).astype(np.float32)
    basis = np.linalg.qr(_gaussian(rng, T, 3))[0].astype(np.complex64)
    images, maps = _gaussian(rng, 3, *matrix), scanning.coil_sensitivities(matrix, 3)
    # An object far from the middle, so that a shift of the grid by a voxel shows.
    images *= np.arange(np.prod(matrix)).reshape(matrix) % 7 == 0
    frames = np.tensordot(basis, images, 1)
    scan = np.stack(list(scanning.acquire(spokes, maps, lambda t: frames[t], rng=rng)), 1)
    t, s, r = rng.integers(0, (T, S, R), (60, 3)).T
    expected = _plain_sum(spokes[t, s, r], maps, frames, t)
    # Results are in single precision.
    assert _relative(scan[:, t, s, r].T, expected) < 1e-6
    # finufft was asked for 1e-6, in single precision; a conjugate or a centre would be off by 1.
    sampling = encoding.Sampling(spokes, basis, matrix)
    assert _relative(encoding.forward(sampling, maps, images)[:, t, s, r].T, expected) < 1e-5


# Coils.


@pytest.mark.paper("§2.8")
def test_compression_keeps_what_an_svd_of_all_samples_keeps():
    rng = np.random.default_rng(0)
    # Five coils see three sources, the third of them weakly.
    mixing, sources = _gaussian(rng, 5, 3), _gaussian(rng, 3, 4, 3, 20)
    sources[2] *= 1e-2
    kspace = np.tensordot(mixing, sources, 1)
    energy = np.linalg.svd(kspace.reshape(5, -1), compute_uv=False) ** 2
    for number in (1, 2, 3):
        compress = coils.compression(kspace, number)
        virtual = compress(kspace)
        expected = energy[:number].sum() / energy.sum()
        assert compress.kept == pytest.approx(expected, rel=1e-6)
        assert np.linalg.norm(virtual) ** 2 / energy.sum() == pytest.approx(expected, rel=1e-5)
    # Three coils tell all: the combination is unitary on what the coils see.
    back = np.tensordot(compress.matrix.conj().T, virtual, 1)
    assert _relative(back, kspace) < 1e-6


def test_whitened_coils_have_independent_noise_of_variance_one():
    rng = np.random.default_rng(0)
    mixing = _gaussian(rng, 4, 4)
    noise = mixing @ _gaussian(rng, 4, 5000)
    kspace = _gaussian(rng, 4, 3, 2, 10)
    compress = coils.compression(kspace, 4, noise=noise)
    covariance = np.cov(compress(noise))
    # The covariance was measured from the same samples: rounding alone.
    np.testing.assert_allclose(covariance, np.eye(4), atol=1e-4)


def test_coils_that_cannot_be_told_apart_or_do_not_exist_are_refused():
    kspace = _gaussian(np.random.default_rng(0), 3, 2, 2, 4)
    with pytest.raises(ValueError, match=r"expected 1 to 3 virtual coils.*got 4"):
        coils.compression(kspace, 4)
    with pytest.raises(ValueError, match="more noise samples than the 3 coils; got 2"):
        coils.compression(kspace, 3, noise=np.ones((3, 2), np.complex64))
    with pytest.raises(ValueError, match="singular covariance"):
        coils.compression(kspace, 3, noise=np.zeros((3, 9), np.complex64))
    kspace[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="got NaN or Inf"):
        coils.compression(kspace, 2)
    with pytest.raises(ValueError, match="got zeros alone"):
        coils.compression(np.zeros_like(kspace), 2)


def _ball(matrix):
    lines = [(np.arange(n) - n // 2) / (n / 2) for n in matrix]
    place = np.stack(np.meshgrid(*lines, indexing="ij"))
    return (place**2).sum(0) < 0.5, place


@pytest.mark.parametrize("matrix", [(20, 18, 20), (24, 20, 1)])
def test_espirit_finds_the_sensitivities_of_the_scan(matrix):
    rng = np.random.default_rng(0)
    inside, place = _ball(matrix)
    contrast = inside * (1 + 0.3 * np.cos(4 * place[0]))
    basis = np.linalg.qr(rng.standard_normal((8, 2)))[0]
    images = np.stack([contrast, 0.5 * contrast * place[1]])
    maps = scanning.coil_sensitivities(matrix, 4)
    position = trajectory.readout(min(n for n in matrix if n > 1), 2)
    spokes = trajectory.radial_scan(8, 30, position, planar=matrix[2] == 1)
    frames = np.tensordot(basis, images, 1)
    kspace = np.stack(
        list(scanning.acquire(spokes, maps, lambda t: frames[t], noise_std=1e-3, rng=rng)), 1
    )
    sampling = encoding.Sampling(spokes, basis, matrix)
    middle = coils.calibration(sampling, kspace, width=14)
    found = coils.espirit(middle, matrix, kernel=5)
    expected = maps * maps[:1].conj() / np.abs(maps[:1])
    # The calibration has a sharp edge at a resolution of 14: Gibbs ringing of a few percent.
    assert _relative(found[:, inside], expected[:, inside]) < 0.08
    alike = np.abs((found.conj() * expected).sum(0))[inside]
    assert np.median(alike) > 0.999


def test_espirit_leaves_the_background_out():
    matrix = (24, 24, 1)
    inside, _ = _ball(matrix)
    maps = scanning.coil_sensitivities(matrix, 4)
    found = coils.espirit((maps * inside).astype(np.complex64), matrix, kernel=5, threshold=0.06)
    there = np.abs(found).sum(0) > 0
    assert there[inside].mean() > 0.95
    assert there[0, 0, 0] == 0 and there.mean() < 0.9
    with pytest.raises(ValueError, match="expected a calibration with signal"):
        coils.espirit(np.zeros((2, 4, 4, 1), np.complex64), matrix)


def test_coils_of_the_scan_see_what_is_near():
    maps = scanning.coil_sensitivities((16, 16, 1), 4)
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-5)
    # The first coil is at x = 1.3, the third opposite (three quarters of a turn each).
    middle, beside = np.abs(maps[0, 8, 8, 0]), np.abs(maps[0, 15, 8, 0])
    opposite = np.abs(maps[2, 15, 8, 0])
    assert middle == pytest.approx(0.5, rel=1e-5)
    # 1/(0.3 + d²) at distances of 1.3 - 7/8 and 1.3 + 7/8.
    assert beside / opposite == pytest.approx(
        (0.3 + (1.3 + 7 / 8) ** 2) / (0.3 + (1.3 - 7 / 8) ** 2), rel=1e-5
    )


# Files.


@pytest.fixture
def raw():
    rng = np.random.default_rng(0)
    spokes = trajectory.radial_scan(5, 3, trajectory.readout(8))
    return _gaussian(rng, 2, 5, 3, 8), spokes


def _write(path, kspace, **others):
    pulses = np.moveaxis(kspace, 1, 0)
    files.write_kspace(path, kspace.shape, pulses, **others)


def test_raw_data_come_back_and_are_not_read_at_once(raw, tmp_path):
    kspace, spokes = raw
    noise, weights = kspace[:, 0, 0], np.ones(spokes.shape[:3], np.float32)
    _write(
        tmp_path / "scan.h5", kspace, trajectory=spokes, matrix=np.array((8, 8, 8)),
        noise=noise, weights=weights, affine=2 * np.eye(4), pulse=np.arange(5),
    )  # fmt: skip
    back = files.read_kspace(tmp_path / "scan.h5")
    assert isinstance(back.kspace, np.memmap)
    for found, expected in (
        (back.kspace, kspace), (back.trajectory, spokes), (back.noise, noise),
        (back.weights, weights), (back.affine, 2 * np.eye(4)), (back.pulses, np.arange(5)),
    ):  # fmt: skip
        np.testing.assert_array_equal(found, expected)
    assert back.matrix == (8, 8, 8)


def test_a_trajectory_of_another_file_leaves_matrix_place_and_pulses(raw, tmp_path):
    kspace, spokes = raw
    _write_bart(tmp_path, kspace, spokes)
    pulse = np.array([0, 1, 2, 4, 6])
    _write(tmp_path / "scan.h5", kspace, matrix=np.array([8]), affine=2 * np.eye(4), pulse=pulse)
    reading = files.Reading(trajectory=tmp_path / "traj.cfl")
    back = files.read_kspace(tmp_path / "scan.h5", reading)
    assert back.matrix == (8, 8, 8) and back.notes == ()
    np.testing.assert_array_equal(back.trajectory, spokes)
    np.testing.assert_array_equal(back.affine, 2 * np.eye(4))
    np.testing.assert_array_equal(back.pulses, pulse)
    wider = files.read_kspace(tmp_path / "scan.h5", replace(reading, matrix=(16, 16, 16)))
    assert wider.affine is None and "place in space is left out" in wider.notes[0]
    # A matrix of the trajectory's own file is not that of the place.
    with h5py.File(tmp_path / "traj.h5", "w") as file:
        file["trajectory"], file["matrix"] = spokes, np.array([16])
    other = files.read_kspace(tmp_path / "scan.h5", files.Reading(trajectory=tmp_path / "traj.h5"))
    assert other.matrix == (16, 16, 16) and other.affine is None


def _write_bart(folder, kspace, spokes):
    files.write_cfl(folder / "traj", spokes.transpose(3, 2, 1, 0)[:, :, :, None, None, :])
    files.write_cfl(folder / "data", kspace.transpose(3, 2, 0, 1)[None, :, :, :, None, :])


def test_bart_files_hold_the_axes_in_its_order(raw, tmp_path):
    kspace, spokes = raw
    _write_bart(tmp_path, kspace, spokes)
    assert files.open_cfl(tmp_path / "data").shape[:6] == (1, 8, 3, 2, 1, 5)
    reading = files.Reading(trajectory=tmp_path / "traj.cfl", matrix=(8, 8, 8))
    back = files.read_kspace(tmp_path / "data.cfl", reading)
    np.testing.assert_array_equal(back.kspace, kspace)
    np.testing.assert_array_equal(back.trajectory, spokes)
    maps = _gaussian(np.random.default_rng(1), 2, 8, 7, 6)
    files.write_cfl(tmp_path / "maps", maps.transpose(1, 2, 3, 0))
    np.testing.assert_array_equal(files.read_sensitivities(tmp_path / "maps.cfl", (8, 7, 6)), maps)
    with pytest.raises(ValueError, match=r"sensitivities .* N0=8, N1=8, N2=8"):
        files.read_sensitivities(tmp_path / "maps.cfl", (8, 8, 8))


_HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><reconSpace>
<matrixSize><x>8</x><y>8</y><z>8</z></matrixSize>
<fieldOfView_mm><x>160</x><y>160</y><z>160</z></fieldOfView_mm>
</reconSpace></encoding></ismrmrdHeader>"""


def _write_ismrmrd(path, kspace, spokes, scale):
    """In the order of the scan, after a readout of noise, by the library of the format."""
    dataset = ismrmrd.Dataset(str(path), "dataset")
    dataset.write_xml_header(_HEADER.encode())
    noise = ismrmrd.Acquisition.from_array(kspace[:, 0, 0] * 2)
    noise.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    dataset.append_acquisition(noise)
    for cycle in range(kspace.shape[2]):
        for pulse in range(kspace.shape[1]):
            dataset.append_acquisition(
                ismrmrd.Acquisition.from_array(
                    kspace[:, pulse, cycle], (spokes[pulse, cycle] * scale).astype(np.float32)
                )
            )
    dataset.close()


@pytest.mark.parametrize(
    ("scale", "unit"), [(1.0, "1/"), (1 / 8, "cycles"), (2 * np.pi / 8, "radians")]
)
def test_ismrmrd_is_read_in_the_order_of_the_scan(raw, tmp_path, scale, unit):
    kspace, spokes = raw
    _write_ismrmrd(tmp_path / "scan.h5", kspace, spokes, scale)
    back = files.read_kspace(tmp_path / "scan.h5", files.Reading(n_pulses=5))
    np.testing.assert_array_equal(back.kspace, kspace)
    np.testing.assert_allclose(back.trajectory, spokes, atol=1e-5)
    np.testing.assert_array_equal(back.noise, kspace[:, 0, 0] * 2)
    assert back.matrix == (8, 8, 8)
    np.testing.assert_allclose(back.affine @ (4, 4, 4, 1), (0, 0, 0, 1))
    assert back.affine[0, 0] == 20
    (note,) = back.notes
    assert f"looks like {unit}" in note
    stated = files.read_kspace(tmp_path / "scan.h5", files.Reading(n_pulses=5, scale=2 / scale))
    assert stated.notes == ()
    np.testing.assert_allclose(stated.trajectory, 2 * spokes, atol=1e-5)


def test_samples_to_discard_and_readouts_of_no_image_are_left_out(raw, tmp_path):
    kspace, spokes = raw
    # Two samples before, one behind; and after each readout another that is none of the image.
    wide = np.pad(kspace, [(0, 0)] * 3 + [(2, 1)], constant_values=9)
    along = np.pad(spokes, [(0, 0)] * 2 + [(2, 1), (0, 0)], constant_values=0.5)
    image = {"PARALLEL_CALIBRATION_AND_IMAGING", "REVERSE"}
    kinds = [name for name in dir(ismrmrd) if name.startswith("ACQ_IS_")]
    none = [getattr(ismrmrd, name) for name in kinds if name[len("ACQ_IS_") :] not in image]
    none.remove(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
    path = tmp_path / "scan.h5"
    dataset = ismrmrd.Dataset(str(path), "dataset")
    dataset.write_xml_header(_HEADER.encode())
    for number in range(15):
        cycle, pulse = divmod(number, 5)
        readout = ismrmrd.Acquisition.from_array(
            wide[:, pulse, cycle], along[pulse, cycle].astype(np.float32)
        )
        readout.discard_pre, readout.discard_post = 2, 1
        if number % 2:
            readout.setFlag(ismrmrd.ACQ_IS_REVERSE)
        dataset.append_acquisition(readout)
        readout.setFlag(none[number % len(none)])
        dataset.append_acquisition(readout)
    dataset.close()
    back = files.read_kspace(path, files.Reading(n_pulses=5))
    np.testing.assert_array_equal(back.kspace, kspace)
    np.testing.assert_allclose(back.trajectory, spokes, atol=1e-6)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_truncated_ismrmrd_file_is_named(raw, tmp_path, share):
    path = tmp_path / "scan.h5"
    _write_ismrmrd(path, *raw, 1.0)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(files.UnreadableFileError, match=r"scan.h5.*truncated"):
        files.read_kspace(path, files.Reading(n_pulses=5))


@pytest.mark.parametrize(("name", "numbers"), [("data", 32), ("traj", 24)])
def test_a_readout_that_was_not_written_to_its_end_is_named(raw, tmp_path, name, numbers):
    path = tmp_path / "scan.h5"
    _write_ismrmrd(path, *raw, 1.0)
    with h5py.File(path, "r+") as file:
        readouts = file["dataset/data"]
        last = readouts[15]
        last[name] = last[name][:-3]
        readouts[15] = last
    message = rf"expected {numbers} numbers of {name} in readout 15 .* got {numbers - 3}: .*trunc"
    with pytest.raises(files.UnreadableFileError, match=message):
        files.read_kspace(path, files.Reading(n_pulses=5))


@pytest.mark.parametrize("name", ["discard_pre", "discard_post"])
def test_readouts_with_other_samples_to_discard_are_refused(raw, tmp_path, name):
    path = tmp_path / "scan.h5"
    _write_ismrmrd(path, *raw, 1.0)
    with h5py.File(path, "r+") as file:
        readouts = file["dataset/data"]
        last = readouts[15]
        last["head"][name] = 3
        readouts[15] = last
    with pytest.raises(ValueError, match=rf"readouts of one kind .*; got {name} of \[0, 3\]"):
        files.read_kspace(path, files.Reading(n_pulses=5))


def test_raw_data_that_cannot_be_read_say_why(raw, tmp_path):
    kspace, spokes = raw
    path = tmp_path / "scan.h5"
    _write_ismrmrd(path, kspace, spokes, 1.0)
    with pytest.raises(ValueError, match=r"whole cycles of 4 pulses .* got 15 readouts"):
        files.read_kspace(path, files.Reading(n_pulses=4))
    path.unlink()
    _write_ismrmrd(path, kspace, spokes, 100.0)
    with pytest.raises(ValueError, match=r"got up to 3\d\d.* --trajectory-scale"):
        files.read_kspace(path, files.Reading(n_pulses=5))
    path.unlink()
    _write(path, kspace, matrix=np.array((8, 8, 8)))
    with pytest.raises(files.UnreadableFileError, match="expected a trajectory with"):
        files.read_kspace(path)
    _write(path, kspace, trajectory=spokes[:, :2], matrix=np.array((8, 8, 8)))
    with pytest.raises(ValueError, match="T=5, S=3, R=8"):
        files.read_kspace(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(files.UnreadableFileError, match="truncated"):
        files.read_kspace(path)
    with h5py.File(path, "w") as file:
        file["image"] = 0
    with pytest.raises(files.UnreadableFileError, match=r"expected raw data .* it has image"):
        files.read_kspace(path)
    _write_bart(tmp_path, kspace, spokes)
    data = tmp_path / "data.cfl"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(files.UnreadableFileError, match=r"expected 1920 bytes .* got 1912"):
        files.read_kspace(data)
    files.write_cfl(tmp_path / "data", kspace)
    with pytest.raises(ValueError, match=r"BART axes \[1, RO, SPOKES, COIL, 1, TE\]"):
        files.read_kspace(data)


# From a scan to images.

_TINY = """\
[sequence]
path = "train.toml"
[simulation]
training = 256
validation = 8
test = 8
rank = 6
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> stages.Run:
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("nilearn is not installed")
    folder = tmp_path_factory.mktemp("basis")
    i = np.arange(1, 24)
    angle = np.r_[np.pi, 0.1 + np.sin(np.pi * i / 24) ** 2]
    PulseTrain(angle, np.r_[500e-6, 1e-6 * (150 + 8 * i)], 3.5e-3).write(folder / "train.toml")
    (folder / "tiny.toml").write_text(_TINY)
    run = stages.start(stages.read(folder / "tiny.toml"), folder / "run")
    stages.simulate_run(run, progress=silent)
    return run


@pytest.fixture(scope="session")
def scanned(run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "scan.h5"
    wanted = stages.DigitalScan(14, cycles=25, coils=4, noise_std=1e-4)
    stages.scan_phantom(run, path, wanted, say=silent, progress=silent)
    return path


def _reconstruct(run, data, output, *, say=silent, lines=None, **options):
    keywords = {
        name: options.pop(name)
        for name in ("reading", "work", "resume", "executor")
        if name in options
    }
    say = silent if lines is None else lines.append
    default = {} if "l2" in options else {"llr": 2e-3, "block": 4}
    wanted = stages.Reconstruction(**default | options)
    stages.reconstruct_run(run, data, output, wanted, say=say, progress=silent, **keywords)
    return np.asarray(nibabel.load(output).dataobj)


def test_a_scan_becomes_images_near_the_truth(run, scanned, tmp_path):
    output, lines = tmp_path / "images.nii.gz", []
    images = _reconstruct(run, scanned, output, iterations=30, lines=lines)
    truth_image = nibabel.load(scanned.with_name("scan-truth") / "coefficients.nii.gz")
    np.testing.assert_allclose(nibabel.load(output).affine, truth_image.affine)
    truth = np.asarray(truth_image.dataobj)
    mask = np.asarray(nibabel.load(scanned.with_name("scan-truth") / "mask.nii.gz").dataobj) > 0
    # One complex factor: noise units of whitened coils, and the phase of the first of them, which
    # is smooth but not constant; magnitudes are compared.
    x, y = np.abs(images[mask][:, 0]), np.abs(truth[mask][:, 0])
    factor = (x * y).sum() / (x**2).sum()
    # Spokes do not see the corners of k-space, 12 % of this truth with its sharp edges.
    assert _relative(factor * x, y) < 0.2
    # The other coefficients relative to the first, without any factor.
    ratio = images[mask][:, 1] / images[mask][:, 0]
    expected = truth[mask][:, 1] / truth[mask][:, 0]
    assert np.median(np.abs(ratio - expected)) < 0.1 * np.median(np.abs(expected))
    assert files.recorded_basis(output) == files.read_dataset(run.dataset)[0].basis.digest
    assert any(line.startswith("expected memory") for line in lines)
    # What `encoding.noise_gain` is tested for, in units of the scaled data.
    assert sum(line.startswith("λ that takes away the noise") for line in lines) == 1
    assert sum("residual" in line for line in lines) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.json", "images.nii.gz"]


@pytest.mark.parametrize("options", [{"llr": None, "l2": 0.1}, {}], ids=["l2", "llr"])
def test_an_interrupted_reconstruction_keeps_its_images_and_goes_on(
    run, scanned, tmp_path, options, monkeypatch
):
    output = tmp_path / "images.nii"
    # One kernel for all: several threads of finufft add in any order.
    options = options | {"work": tmp_path / "work"}
    whole = _reconstruct(run, scanned, tmp_path / "whole.nii", iterations=5, **options)
    third = _reconstruct(run, scanned, tmp_path / "third.nii", iterations=3, **options)
    states, real = [], reconstructing._states

    def interrupted(*arguments):
        for state in real(*arguments):
            if state.iteration == 4:
                raise KeyboardInterrupt
            states.append(state)
            yield state

    with monkeypatch.context() as patched:
        patched.setattr(reconstructing, "_states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _reconstruct(run, scanned, output, iterations=5, **options)
    np.testing.assert_array_equal(np.asarray(nibabel.load(output).dataobj), third)
    other = options | ({"l2": 0.2} if "l2" in options else {"llr": 9e-3})
    with pytest.raises(reconstructing.ReconstructionError, match="is another one"):
        _reconstruct(run, scanned, output, resume=True, **other)
    lines = []
    on = _reconstruct(run, scanned, output, iterations=5, resume=True, lines=lines, **options)
    assert sum("residual" in line for line in lines) == 2
    # The same steps; the data were compressed once.
    np.testing.assert_array_equal(on, whole)
    with pytest.raises(reconstructing.ReconstructionError, match="expected an interrupted"):
        _reconstruct(run, scanned, output, resume=True, **options)


def test_work_is_kept_where_it_is_asked_for(run, scanned, tmp_path, monkeypatch):
    work = tmp_path / "work"
    first = _reconstruct(run, scanned, tmp_path / "a.nii", iterations=2, work=work)
    assert {path.name.split("-")[0] for path in work.iterdir()} == {"prepared.h5", "kernel"}
    monkeypatch.setattr(toeplitz, "_fields", None)
    monkeypatch.setattr(coils, "compression", None)
    again = _reconstruct(run, scanned, tmp_path / "b.nii", iterations=2, work=work)
    np.testing.assert_array_equal(again, first)


def test_more_memory_than_there_is_is_refused_before_anything_starts(run, scanned, tmp_path):
    with pytest.raises(reconstructing.MemoryForecastError, match=r"GiB of memory .* may be used"):
        _reconstruct(run, scanned, tmp_path / "a.nii", memory=1e-6)
    assert not list(tmp_path.iterdir())


def test_one_prior_is_asked_for():
    for llr, l2, got in ((None, None, "none"), (0.1, 0.1, "both")):
        with pytest.raises(reconstructing.ReconstructionError, match=f"got {got}"):
            stages.Reconstruction(llr=llr, l2=l2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llr": -1.0}, "λ must be zero or above; got -1"),
        ({"l2": -1.0}, "λ must be zero or above; got -1"),
        ({"llr": 0.1, "block": 0}, "at least one voxel; got 0"),
        ({"l2": 0.1, "block": 8}, "blocks with --llr alone; got --block 8"),
        ({"llr": 0.1, "coils": 0}, "at least one coil; got 0"),
        ({"llr": 0.1, "iterations": 0}, "at least one iteration; got 0"),
    ],
)
def test_numbers_without_sense_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        stages.Reconstruction(**options)


def test_what_cannot_be_written_or_resumed_is_refused_before_anything_starts(
    run, scanned, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "read_kspace", None)
    with pytest.raises(reconstructing.ReconstructionError, match="Change the suffix"):
        _reconstruct(run, scanned, tmp_path / "images.CFL", iterations=1)
    with pytest.raises(reconstructing.ReconstructionError, match="expected an interrupted"):
        _reconstruct(run, scanned, tmp_path / "images.nii", iterations=1, resume=True)
    with pytest.raises(reconstructing.ReconstructionError, match=r"data of 24 pulses.* got 7"):
        _reconstruct(run, scanned, tmp_path / "a.nii", reading=files.Reading(n_pulses=7))


def test_images_that_cannot_be_written_are_not_lost(run, scanned, tmp_path, monkeypatch):
    options = {"iterations": 2, "work": tmp_path / "work"}
    whole = _reconstruct(run, scanned, tmp_path / "whole.nii", **options)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_coefficients", full)
        with pytest.raises(OSError, match="No space"):
            _reconstruct(run, scanned, tmp_path / "images.nii", **options)
    lines = []
    again = _reconstruct(run, scanned, tmp_path / "b.nii", resume=True, lines=lines, **options)
    assert not any("residual" in line for line in lines)
    np.testing.assert_array_equal(again, whole)


def test_sensitivities_of_the_user_are_those_of_the_physical_coils(run, scanned, tmp_path):
    images = _reconstruct(
        run, scanned, tmp_path / "a.nii", iterations=30, sensitivities=scanned, coils=3
    )
    truth = scanned.with_name("scan-truth")
    mask = np.asarray(nibabel.load(truth / "mask.nii.gz").dataobj) > 0
    expected = np.asarray(nibabel.load(truth / "coefficients.nii.gz").dataobj)[mask]
    found = images[mask]
    # With the true sensitivities the phase is right too. Whitening leaves one real factor.
    factor = np.vdot(found, expected) / np.vdot(found, found)
    assert abs(factor.imag) < 0.05 * abs(factor)
    # The same 12 %, and the noise.
    assert _relative(factor * found, expected) < 0.2
    np.save(tmp_path / "maps.npy", np.ones((2, 14, 14, 14), np.complex64))
    with pytest.raises(reconstructing.ReconstructionError, match=r"of the 4 coils .* has 2"):
        _reconstruct(run, scanned, tmp_path / "b.nii", sensitivities=tmp_path / "maps.npy")
    assert not (tmp_path / "b.nii.work").exists()


def test_coils_that_see_nothing_leave_no_data_behind(run, scanned, tmp_path, monkeypatch):
    nothing = np.zeros((4, 14, 14, 14), np.complex64)
    monkeypatch.setattr(coils, "espirit", lambda *_, **__: nothing)
    with pytest.raises(reconstructing.ReconstructionError, match="ESPIRiT found noise alone"):
        _reconstruct(run, scanned, tmp_path / "a.nii")
    assert not list(tmp_path.iterdir())
    # What another call may need is kept.
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "kernel-of-others.h5").touch()
    with pytest.raises(reconstructing.ReconstructionError):
        _reconstruct(run, scanned, tmp_path / "a.nii", work=tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["kernel-of-others.h5"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_one_process_at_a_time_prepares_in_a_folder(run, scanned, tmp_path):
    with (
        _storage.locked(tmp_path),
        pytest.raises(BlockingIOError, match="another one is at work there"),
    ):
        _reconstruct(run, scanned, tmp_path / "a.nii", work=tmp_path)
    _reconstruct(run, scanned, tmp_path / "a.nii", iterations=1, work=tmp_path)


def test_the_tubes_are_scanned_as_a_slice(run, tmp_path):
    wanted = stages.DigitalScan(40, cycles=16, coils=4, noise_std=1e-4, tubes=True)
    scan = tmp_path / "scan.h5"
    stages.scan_phantom(run, scan, wanted, say=silent, progress=silent)
    images = _reconstruct(run, scan, tmp_path / "images.nii.gz", iterations=30, block=8)
    folder = tmp_path / "scan-truth"
    truth = nibabel.load(folder / "coefficients.nii.gz")
    assert truth.shape == images.shape == (40, 40, 1, 6)
    np.testing.assert_allclose(truth.header.get_zooms()[:2], 128 / 40)
    regions = sorted((folder / "tubes").iterdir())
    assert len(regions) == 6
    ratios = []
    for path in regions:
        inside = np.asarray(nibabel.load(path).dataobj) > 0
        assert 15 < inside.sum() < np.pi * 14**2 / (128 / 40) ** 2
        found, expected = (
            np.median((x[inside][:, 1] / x[inside][:, 0]).real)
            for x in (images, np.asarray(truth.dataobj))
        )
        ratios.append((found, expected))
    # Tubes differ, and each is found again.
    found, expected = np.array(ratios).T
    assert (np.abs(found - expected) < 0.1 * np.ptp(expected)).all()
    with pytest.raises(ValueError, match="edge of 128 mm; got a field of view of 224 mm"):
        stages.DigitalScan(40, 224.0, tubes=True)
    with pytest.raises(ValueError, match=r"must be at most 4\.7 mm"):
        coarse = stages.DigitalScan(16, tubes=True)
        stages.scan_phantom(run, scan, coarse, say=silent, progress=silent)


def test_a_shipped_network_stands_for_a_run(run, tmp_path):
    data, pulses, model = read_data(run)
    # Nothing of the network itself is needed.
    trained = stages.Trained(tmp_path, None, {}, data.basis, pulses, model)
    wanted = stages.DigitalScan(10, cycles=12, coils=2, noise_std=1e-4)
    images = []
    for number, source in enumerate((run, trained)):
        scan = tmp_path / f"{number}.h5"
        stages.scan_phantom(source, scan, wanted, say=silent, progress=silent)
        options = {"iterations": 2, "l2": 0.1, "llr": None}
        images.append(_reconstruct(source, scan, tmp_path / f"{number}.nii.gz", **options))
        assert files.recorded_basis(tmp_path / f"{number}.nii.gz") == data.basis.digest
    # Several threads of finufft add in any order.
    assert _relative(images[1], images[0]) < 1e-4


def test_the_commands_scan_and_reconstruct(run, tmp_path, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["fisherprint", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        return leaving.value.code, capsys.readouterr()

    scan, images = tmp_path / "scan.h5", tmp_path / "images.cfl"
    code, _ = call(
        "scan",
        run.folder,
        "-o",
        scan,
        "--matrix",
        10,
        "--cycles",
        12,
        "--coils",
        2,
        "--noise",
        1e-4,
    )
    assert code == 0
    arguments = ("reconstruct", scan, "--run", run.folder, "-o", images, "--iterations", 2)
    code, printed = call(*arguments)
    assert code == 2 and "--llr λ or --l2 λ" in printed.err
    code, printed = call(*arguments, "--l2", 0.1)
    assert code == 0 and "iteration 2 of 2: residual" in printed.out
    assert files.open_cfl(images).shape[:7] == (10, 10, 10, 1, 1, 1, 6)
    code, printed = call(*arguments, "--l2", 0.1)
    assert code == 2 and "already there" in printed.err
    # The data are of 24 pulses; the bundled train has 1142.
    code, printed = call(*arguments[:2], "--model", "bundled", "-o", tmp_path / "b.cfl", "--l2", 1)
    assert code == 2 and "T=1142" in printed.err
    again = (*arguments, "--force", "--l2", 0.1)
    for words in (again, ("scan", run.folder, "-o", tmp_path / "b.h5")):
        code, printed = call(*words, "--model", "bundled")
        assert code == 2 and "or --model; got both or neither" in printed.err.replace("\n", " ")


def test_forecast_of_a_whole_head_fits_into_24_gib():
    request = planning.Request((240, 240, 240), 13, False, 20, 205_000 * 480, 30)
    ahead = planning.forecast(request, planning.Speed(1e-9, 1e-7, 1e-8))
    assert 10 < ahead.peak / 2**30 < 24
    # What ESPIRiT of 20 coils took beyond the libraries, in a run of its own at 32³.
    assert 1.45 < ahead.memory["sensitivities"] / 2**30 < 1.6
    # Gigabytes of the kernel (below), 20 maps, 4 × 13 images and 20 × 205,000 × 480 samples.
    assert ahead.disk / 1e9 == pytest.approx(40.3 + 2.21 + 5.75 + 15.7, abs=0.1)
    # 91 fields of eight pieces.
    assert toeplitz.n_bytes(request.matrix, 13, hermitian=False) == 4 * 91 * 8 * 240**3


def test_state_of_the_other_method_is_refused():
    right = np.ones((1, 2, 2, 2), np.complex64)
    state = next(solve.fista(lambda x: x, right, lambda x, *_: x, step=0.5))
    with pytest.raises(ValueError, match="got one of FISTA"):
        next(solve.conjugate_gradients(lambda x: x, right, start=state))
