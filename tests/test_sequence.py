import pickle
import tomllib

import h5py
import numpy as np
import pytest
import scipy.io

import fisherprint as fp
from fisherprint._storage import UnreadableFileError
from fisherprint.sequence import bundled

TR = 3.5e-3
RNG = np.random.default_rng(0)
# Three trains of five pulses, with digits that only a faithful copy keeps.
ANGLE = np.c_[np.full(3, np.pi), RNG.uniform(0, 2, (3, 4))]
DURATION = RNG.uniform(1e-4, 5e-4, (3, 5))


def train(**changes):
    arguments = {"flip_angle": ANGLE, "pulse_duration": DURATION, "repetition_time": TR}
    return fp.PulseTrain(**(arguments | changes))


def write_mat5(path, angle, duration):
    scipy.io.savemat(path, {"alpha": angle, "TRF": duration})


def write_mat73(path, angle, duration):
    """As MATLAB v7.3 does: a text header in the user block, the axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["alpha"], file["TRF"] = np.transpose(angle), np.transpose(duration)
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(116) + bytes(8) + b"\x00\x02IM"
    with path.open("r+b") as stream:
        stream.write(header)


MATLAB = pytest.mark.parametrize("write", [write_mat5, write_mat73])


@MATLAB
def test_matlab_columns_are_trains(tmp_path, write):
    path = tmp_path / "control.mat"
    write(path, ANGLE.T, DURATION.T)
    read = fp.PulseTrain.read(path, repetition_time=TR)
    np.testing.assert_array_equal(read.flip_angle, ANGLE)
    np.testing.assert_array_equal(read.pulse_duration, DURATION)
    assert read.repetition_time == TR
    assert read.inversion == "crushed"
    assert read.digest == train().digest


@MATLAB
@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_a_single_train_may_be_a_row_or_a_column(tmp_path, write, shape):
    path = tmp_path / "control.mat"
    write(path, ANGLE[0].reshape(shape), DURATION[0].reshape(shape))
    read = fp.PulseTrain.read(str(path), repetition_time=TR, inversion="spoiled")
    np.testing.assert_array_equal(read.flip_angle, ANGLE[:1])
    np.testing.assert_array_equal(read.pulse_duration, DURATION[:1])
    assert read.inversion == "spoiled"


@pytest.mark.parametrize("name", ["train.toml", "train.h5", "train.hdf5"])
@pytest.mark.parametrize("inversion", ["crushed", "spoiled"])
def test_round_trip_keeps_every_bit(tmp_path, name, inversion):
    written = train(inversion=inversion, phase_increment=2.0)
    written.write(tmp_path / name)
    read = fp.PulseTrain.read(tmp_path / name)
    np.testing.assert_array_equal(read.flip_angle, written.flip_angle)
    np.testing.assert_array_equal(read.pulse_duration, written.pulse_duration)
    assert (read.repetition_time, read.inversion, read.phase_increment) == (TR, inversion, 2.0)
    assert read.digest == written.digest
    # Arguments that agree are no conflict.
    fp.PulseTrain.read(
        tmp_path / name, repetition_time=TR, inversion=inversion, phase_increment=2.0
    )


@pytest.mark.parametrize("name", ["train.toml", "train.h5"])
def test_files_of_early_versions_have_no_phase_increment(tmp_path, name):
    path = tmp_path / name
    train().write(path)
    if name == "train.toml":
        lines = path.read_text().splitlines()
        path.write_text("\n".join(line for line in lines if "phase_increment" not in line))
    else:
        with h5py.File(path, "r+") as file:
            del file["phase_increment"]
            assert fp.PulseTrain.read_from(file).phase_increment == np.pi
    assert fp.PulseTrain.read(path).digest == train().digest
    assert fp.PulseTrain.read(path, phase_increment=0.0).phase_increment == 0.0


def test_data_sets_of_early_versions_know_their_train():
    # The digest that the first version gave this train.
    expected = "ace97e269beba56eafa099ec174e85c91553a5c3a1faa815933dffde2e30248f"
    assert train().digest == expected


def test_a_group_of_an_open_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        train(inversion="spoiled").write_to(file.create_group("train"))
        read = fp.PulseTrain.read_from(file["train"])
    assert read.digest == train(inversion="spoiled").digest


def test_the_digest_changes_with_each_field():
    slower = np.where(DURATION[1, 2] == DURATION, np.nextafter(DURATION, 1), DURATION)
    turned = np.where(ANGLE[2, 4] == ANGLE, np.nextafter(ANGLE, 9), ANGLE)
    digests = {
        train().digest,
        train(flip_angle=turned).digest,
        train(pulse_duration=slower).digest,
        train(repetition_time=np.nextafter(TR, 1)).digest,
        train(inversion="spoiled").digest,
        train(phase_increment=np.nextafter(np.pi, 0)).digest,
        train(flip_angle=ANGLE[:1], pulse_duration=DURATION[:1]).digest,
    }
    assert len(digests) == 7


@pytest.mark.paper("§2.8")
def test_the_train_of_the_paper(paper_train):
    # 4 s long, TR 3.5 ms, inversion first (§2.8); 1142 pulses.
    assert paper_train.flip_angle.shape == paper_train.pulse_duration.shape == (1, 1142)
    assert paper_train.flip_angle[0, 0] == pytest.approx(np.pi, abs=1e-12)
    assert paper_train.pulse_duration[0, 0] == pytest.approx(500e-6, abs=1e-12)
    assert paper_train.duration == pytest.approx(3.997, abs=1e-12)


def test_the_six_trains_in_vivo(data):
    trains = fp.PulseTrain.read(data / "invivo" / "control.mat", repetition_time=TR)
    assert trains.flip_angle.shape == (6, 1142)
    assert trains.n_samples == 6852
    np.testing.assert_allclose(trains.flip_angle[:, 0], np.pi, rtol=1e-12)


def test_derived_numbers_of_a_constant_train():
    angle = np.r_[np.pi, np.full(9, 0.5)]
    duration = np.r_[500e-6, np.full(9, 200e-6)]
    constant = fp.PulseTrain([angle, angle], [duration, duration], TR)
    assert constant.n_samples == 20
    assert constant.duration == pytest.approx(20 * TR, rel=1e-15)
    # Rectangular pulses: ∫ω1² dt = α²/TRF each. Rounding of a sum of 20.
    power = (np.pi**2 / 500e-6 + 9 * 0.5**2 / 200e-6) / (10 * TR)
    assert constant.rf_power == pytest.approx(power, rel=1e-14)


def test_the_bundled_train():
    own = bundled()
    assert own.inversion == "crushed"
    assert own.flip_angle[0, 0] == np.pi
    # The paper's is 4 s long.
    assert own.duration == pytest.approx(4.0, abs=0.01)
    angle, duration = own.flip_angle[0, 1:], own.pulse_duration[0, 1:]
    # On a raster of 1 µs, so that a scanner can play it; a µs is not a binary fraction.
    assert 1e6 * duration == pytest.approx(np.round(1e6 * duration), abs=1e-9)
    assert 0 < angle.min() <= angle.max() < np.pi
    assert bundled().digest == own.digest


def test_the_bundled_train_asks_no_more_than_the_papers(paper_train):
    own = bundled()
    assert own.rf_power <= paper_train.rf_power
    assert own.duration <= paper_train.duration

    def rough(train):
        return np.sqrt((np.diff(train.flip_angle[0, 1:], 2) ** 2).mean())

    assert rough(own) <= rough(paper_train)
    for name in ("flip_angle", "pulse_duration"):
        values, papers = getattr(own, name)[0, 1:], getattr(paper_train, name)[0, 1:]
        assert papers.min() <= values.min() <= values.max() <= papers.max()


def test_one_train_may_be_given_without_its_axis():
    single = fp.PulseTrain(ANGLE[0], DURATION[0], TR)
    assert single.flip_angle.shape == (1, 5)
    assert single.digest == fp.PulseTrain(ANGLE[:1], DURATION[:1], TR).digest


def test_values_are_frozen_and_not_shared_with_the_caller():
    angle, duration = ANGLE.copy(), DURATION.copy()
    own = fp.PulseTrain(angle, duration, TR)
    angle[:], duration[:] = 0, 0
    np.testing.assert_array_equal(own.flip_angle, ANGLE)
    np.testing.assert_array_equal(own.pulse_duration, DURATION)
    for array in (own.flip_angle, own.pulse_duration):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 1] = 0
    with pytest.raises(AttributeError):
        own.repetition_time = 1.0


def changed(array, value, *, at=(1, 2)):
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_time": 0.5},
        {"flip_angle": changed(ANGLE, np.pi + 0.199, at=(1, 0))},
        {"flip_angle": changed(ANGLE, np.pi - 0.199, at=(1, 0))},
    ],
)
def test_what_lies_just_within_the_limits_is_taken(changes):
    (name, value), *_ = changes.items()
    np.testing.assert_array_equal(getattr(train(**changes), name), value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pulse_duration": DURATION * 1e3}, "below the repetition time .* in ms?"),
        ({"pulse_duration": DURATION * 1e6}, "below the repetition time .* in µs?"),
        (
            {"pulse_duration": changed(DURATION, 4e-3)},
            r"below the repetition time 0.0035 s; got 0.004 s\. Shorten the pulses",
        ),
        ({"pulse_duration": changed(DURATION, 0)}, r"must be positive; got 0.0 s\. Drop pulses"),
        ({"pulse_duration": changed(DURATION, -1e-4)}, "must be positive; got -0.0001 s"),
        ({"flip_angle": np.rad2deg(ANGLE)}, "within ±2π rad; got .* in degrees?"),
        (
            {"flip_angle": changed(ANGLE, np.nan)},
            r"flip angles must be finite; got 1 NaN or Inf of 15 values, the first at .*\(1, 2\)",
        ),
        ({"pulse_duration": changed(DURATION, np.inf)}, "pulse durations must be finite; got 1"),
        (
            {"pulse_duration": DURATION[:, :4]},
            r"pulse durations must have the axes \(trains=3, pulses=5\); got the shape \(3, 4\)",
        ),
        ({"pulse_duration": DURATION.T}, r"\(trains=3, pulses=5\); got the shape \(5, 3\)"),
        ({"flip_angle": ANGLE[None]}, r"\(trains, pulses\) .* got the shape \(1, 3, 5\)"),
        ({"flip_angle": [np.pi]}, "at least 2 pulses"),
        ({"flip_angle": [[np.pi, 1], [np.pi]]}, "flip angles must be real .* trains of equal"),
        ({"flip_angle": ANGLE * 1j}, "flip angles must be real numbers .* got complex"),
        ({"flip_angle": "π"}, "flip angles must be real numbers"),
        ({"flip_angle": np.roll(ANGLE, 1, axis=1)}, r"must be the inversion.*Roll the train"),
        ({"flip_angle": changed(ANGLE, np.pi + 0.201, at=(1, 0))}, "must be the inversion"),
        ({"flip_angle": changed(ANGLE, np.pi - 0.201, at=(1, 0))}, "must be the inversion"),
        ({"inversion": "adiabatic"}, r"one of \('crushed', 'spoiled'\); got 'adiabatic'"),
        ({"phase_increment": 180.0}, r"within ±2π rad; got 180.0\. Is it in degrees?"),
        ({"phase_increment": np.nan}, "the phase increment must lie within ±2π rad; got nan"),
        ({"repetition_time": 3.5}, r"below 0.5 s; got 3.5\. Is it in ms?"),
        ({"repetition_time": 0.501}, r"below 0.5 s; got 0.501"),
        ({"repetition_time": 0}, "the repetition time must be a positive finite number; got 0"),
        ({"repetition_time": np.nan}, "the repetition time must be a positive finite number"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train(**changes)


@pytest.mark.parametrize("name", ["a.toml", "a.h5"])
def test_an_empty_inversion_in_a_file_is_refused(tmp_path, name):
    train().write(tmp_path / name)
    if name == "a.toml":
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace('"crushed"', '""'))
    else:
        with h5py.File(tmp_path / name, "r+") as file:
            del file["inversion"]
            file["inversion"] = ""
    with pytest.raises(ValueError, match=r"one of \('crushed', 'spoiled'\); got ''\. Choose"):
        fp.PulseTrain.read(tmp_path / name)


@MATLAB
def test_a_missing_repetition_time(tmp_path, write):
    write(tmp_path / "a.mat", ANGLE.T, DURATION.T)
    with pytest.raises(ValueError, match=r"holds no repetition time\. Give one"):
        fp.PulseTrain.read(tmp_path / "a.mat")


@pytest.mark.parametrize("name", ["a.toml", "a.h5"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repetition_time": 4e-3}, "says repetition time 0.0035, the call says 0.004"),
        ({"inversion": "spoiled"}, "says inversion crushed, the call says spoiled"),
        ({"phase_increment": 0.0}, "says phase increment 3.14159.*, the call says 0.0"),
    ],
)
def test_arguments_that_disagree_with_the_file(tmp_path, name, arguments, message):
    train().write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        fp.PulseTrain.read(tmp_path / name, **arguments)


def test_a_missing_key_lists_those_there_are(tmp_path):
    scipy.io.savemat(tmp_path / "a.mat", {"alpha": ANGLE, "durations": DURATION})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["flip_angle"] = ANGLE
    (tmp_path / "a.toml").write_text("flip_angle = [3.14, 1.0]\nrepetition_time = 3.5e-3\n")
    for name, missing, there in (
        ("a.mat", "TRF", "alpha, durations"),
        ("a.h5", "pulse_duration", "flip_angle"),
        ("a.toml", "pulse_duration", "flip_angle, repetition_time"),
    ):
        with pytest.raises(UnreadableFileError, match=f"the key '{missing}' .* it has {there}"):
            fp.PulseTrain.read(tmp_path / name, repetition_time=TR)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["v5.mat", "v73.mat", "own.h5"])
def test_a_truncated_file(tmp_path, name, share):
    path = tmp_path / name
    long = np.tile(ANGLE[:, 1:], 100)
    angle, duration = np.c_[np.full(3, np.pi), long], np.full((3, 401), 2e-4)
    if name == "own.h5":
        fp.PulseTrain(angle, duration, TR).write(path)
    else:
        (write_mat5 if name == "v5.mat" else write_mat73)(path, angle.T, duration.T)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnreadableFileError, match=str(path)):
        fp.PulseTrain.read(path, repetition_time=TR)


@pytest.mark.parametrize("name", ["a.mat", "a.h5", "a.toml"])
@pytest.mark.parametrize("content", [b"", b"alpha,TRF\n180,0.5\n", b"\x93NUMPY\x01\x00v\x00{'d"])
def test_a_foreign_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFileError, match=name):
        fp.PulseTrain.read(tmp_path / name, repetition_time=TR)


def test_no_file_and_an_unknown_suffix(tmp_path):
    for name in ("absent.mat", "absent.h5", "absent.toml"):
        with pytest.raises(UnreadableFileError, match="found nothing"):
            fp.PulseTrain.read(tmp_path / name, repetition_time=TR)
    with pytest.raises(UnreadableFileError, match=r"\.hdf5, \.toml, \.seq; got .*a\.txt"):
        fp.PulseTrain.read(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"written as \.toml or \.h5; got .*a\.mat"):
        train().write(tmp_path / "a.mat")
    assert list(tmp_path.iterdir()) == []


def test_toml_with_contents_that_are_no_train(tmp_path):
    path = tmp_path / "a.toml"
    train().write(path)
    content = path.read_text()
    assert tomllib.loads(content)["repetition_time"] == TR
    path.write_text(content.replace("repetition_time = 0.0035", 'repetition_time = "3.5 ms"'))
    with pytest.raises(ValueError, match=r"as a number, .*; got '3.5 ms'\. Write it without"):
        fp.PulseTrain.read(path)
    path.write_text(content.replace('"crushed"', '"hard"'))
    with pytest.raises(ValueError, match=r"one of .*; got 'hard'"):
        fp.PulseTrain.read(path)


def test_a_train_survives_pickling_as_it_is(short_train):
    # Workers get pickles; kernels are compiled for arrays that nobody can change.
    again = pickle.loads(pickle.dumps(short_train))
    for name in ("flip_angle", "pulse_duration"):
        there, here = getattr(again, name), getattr(short_train, name)
        assert np.array_equal(there, here)
        assert not there.flags.writeable and not here.flags.writeable
    assert again.digest == short_train.digest
