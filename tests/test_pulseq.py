"""The scan that goes to the scanner, looked at through the file that was written."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pypulseq
import pytest
import scipy.io
from blochsim.simulators import TrueFISPSimulator
from scipy.linalg import expm
from test_cli import call, done, refused

import fisherprint as fp
from fisherprint import pulseq
from fisherprint._storage import UnreadableFileError
from fisherprint.cli import shell
from fisherprint.models import SinglePool
from fisherprint.pulseq import Scan
from fisherprint.reconstruct.trajectory import koosh_ball

TR = 3.5e-3
SCAN = Scan(cycles=3, dummy_cycles=1)
# The gyromagnetic ratio of protons over 2π, in Hz/T, to the digits that scanners use.
GAMMA = 42.576e6


class Exported(NamedTuple):
    path: Path
    train: fp.PulseTrain
    plan: pulseq.Plan
    sequence: pypulseq.Sequence


@pytest.fixture(scope="module")
def exported(tmp_path_factory, short_train):
    path = tmp_path_factory.mktemp("scan") / "short.seq"
    plan = pulseq.write(short_train, path, SCAN)
    return Exported(path, short_train, plan, opened(path))


def opened(path, rf_raster=1e-6):
    """The file as pypulseq reads it, with the limits that the scan was made for."""
    system = pypulseq.Opts(
        max_grad=40,
        grad_unit="mT/m",
        max_slew=150,
        slew_unit="T/m/s",
        rf_dead_time=100e-6,
        rf_ringdown_time=30e-6,
        adc_dead_time=10e-6,
        rf_raster_time=rf_raster,
    )
    sequence = pypulseq.Sequence(system)
    sequence.read(str(path))
    return sequence


def middles(sequence):
    """Times of the middles of all pulses from the start of the scan, s."""
    times, now = [], 0.0
    for number in sequence.block_events:
        block = sequence.get_block(number)
        if block.rf is not None:
            times.append(now + block.rf.delay + (block.rf.t[0] + block.rf.t[-1]) / 2)
        now += block.block_duration
    return np.array(times)


def moments(sequence, times):
    """∫ gradient from the start of the scan to these times, shape (3, len(times)), 1/m.

    Exact for the piecewise linear waveforms.
    """
    result = []
    for t, g in sequence.waveforms():
        whole = np.r_[0, np.cumsum(np.diff(t) * (g[1:] + g[:-1]) / 2)]
        before = np.clip(np.searchsorted(t, times, side="right") - 1, 0, len(t) - 1)
        inside = np.clip(times, t[0], t[-1])
        part = (inside - t[before]) * (g[before] + np.interp(inside, t, g)) / 2
        result.append(whole[before] + part)
    return np.array(result)


# --- timing and gradients ------------------------------------------------------------------


def test_passes_the_timing_check_of_pypulseq(exported):
    good, errors = exported.sequence.check_timing()
    assert good, errors


def test_pulses_come_every_repetition_time(exported):
    times = middles(exported.sequence)
    assert len(times) == 40 * 4 == exported.plan.n_repetitions
    # An odd duration puts the middle half a raster of 1 µs early.
    np.testing.assert_allclose(np.diff(times), TR, atol=0.51e-6)
    assert exported.sequence.duration()[0] == pytest.approx(40 * 4 * TR, abs=1e-9)
    assert exported.plan.duration == pytest.approx(40 * 4 * TR, abs=1e-9)


def test_gradient_moments_of_each_repetition_are_zero(exported):
    # From the middle of one pulse to that of the next.
    moment = np.diff(moments(exported.sequence, middles(exported.sequence)), axis=1)
    pulse = np.arange(moment.shape[1]) % 40
    fov = exported.plan.scan.field_of_view
    # In turns across the field of view; a spoke reaches 128. Shapes have nine digits in the file.
    assert np.abs(moment[:, (pulse != 0) & (pulse != 39)]).max() * fov < 1e-6
    # The inversion changes the sign of the moment before it: both together are balanced.
    before, after = moment[:, pulse == 39], moment[:, pulse == 0]
    assert np.abs(after[:, 1:] - before).max() * fov < 1e-9
    # Each dephases a voxel, of 1 mm, by the four turns asked for, to the six digits of the file.
    np.testing.assert_allclose(np.linalg.norm(after, axis=0) * 1e-3, 4, rtol=1e-5)


def test_crushers_of_successive_cycles_point_elsewhere(exported):
    moment = np.diff(moments(exported.sequence, middles(exported.sequence)), axis=1)
    after = moment[:, ::40] / np.linalg.norm(moment[:, ::40], axis=0)
    # Diagonals of a cube: cosines of ±1/3 between any two.
    np.testing.assert_allclose(np.abs(after.T @ after)[~np.eye(4, dtype=bool)], 1 / 3, rtol=1e-5)


def test_a_spoiled_inversion_has_different_crushers(tmp_path, short_train):
    spoiled = dataclasses.replace(short_train, inversion="spoiled")
    plan = pulseq.write(spoiled, tmp_path / "a.seq", SCAN)
    sequence = opened(tmp_path / "a.seq")
    moment = np.diff(moments(sequence, middles(sequence)), axis=1)
    before, after = moment[:, 39::40], moment[:, 40::40]
    # Neither what was there before nor what the pulse makes comes back: turns across a voxel.
    voxel = plan.scan.field_of_view / plan.scan.matrix
    for left in (before, after, after - before, after + before):
        assert np.linalg.norm(left * voxel, axis=0).min() > 4
    assert fp.PulseTrain.read(tmp_path / "a.seq").inversion == "spoiled"


def test_gradients_keep_to_their_limits_and_the_plan_says_their_peaks(exported):
    peak_gradient = peak_slew = 0.0
    for t, g in exported.sequence.waveforms():
        peak_gradient = max(peak_gradient, np.abs(g).max() / GAMMA)
        peak_slew = max(peak_slew, np.abs(np.diff(g) / np.diff(t)).max() / GAMMA)
    assert peak_gradient <= 40e-3
    assert peak_slew <= 150
    # The crushers run on all axes at once, at their amplitude, to the six digits of the file.
    assert exported.plan.peak_gradient == pytest.approx(peak_gradient, rel=1e-5)
    assert exported.plan.peak_slew == pytest.approx(peak_slew, rel=1e-5)
    assert exported.plan.peak_b1 == pytest.approx(np.pi / (2 * np.pi * GAMMA * 500e-6))


# --- trajectory ----------------------------------------------------------------------------


def test_written_trajectory_is_that_of_the_gradients(exported):
    with h5py.File(pulseq.trajectory_path(exported.path)) as file:
        written, pulse = file["trajectory"][()], file["pulse"][()]
        order, fov = file["acquisition"][()], file["field_of_view"][()]
        assert file["matrix"][()] == 256
        assert file["repetition_time"][()] == TR
        assert file["train_digest"].asstr()[()] == exported.train.digest
    assert written.shape == (38, 3, 512, 3)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(pulse, np.arange(1, 39))
    # pypulseq integrates from the middle of the pulse before. It rounds times to 0.1 ns, in which
    # k moves by 2e-5; float32 has 8e-6 at 128.
    k = exported.sequence.calculate_kspace()[0].T.reshape(-1, 512, 3) * fov
    assert sorted(order.ravel()) == list(range(len(k)))
    np.testing.assert_allclose(written, k[order], atol=4e-5)
    # Within a quarter of a step of the edge: two samples a voxel, symmetric but for the raster of
    # the start of a readout.
    assert 127.7 < np.linalg.norm(written, axis=-1).max() < 128


def test_spokes_are_in_golden_order_over_the_whole_scan(exported):
    with h5py.File(pulseq.trajectory_path(exported.path)) as file:
        k = file["trajectory"][()].astype(float)
    direction = k[:, :, -1] / np.linalg.norm(k[:, :, -1], axis=-1, keepdims=True)
    ball = koosh_ball(3 * 40).reshape(3, 40, 3)[:, 1:-1]
    # Amplitudes have six digits in the file.
    np.testing.assert_allclose(direction, ball.swapaxes(0, 1), atol=1e-5)


def test_the_echo_is_half_a_repetition_after_the_pulse(exported):
    with h5py.File(pulseq.trajectory_path(exported.path)) as file:
        k, times = file["trajectory"][()].astype(float), file["sample_time"][()]
    direction = k[0, 0, -1] / np.linalg.norm(k[0, 0, -1])
    echo = np.interp(0, k[0, 0] @ direction, times)
    # k has an accuracy of 8e-6 of 128, passed in 1.3 ms.
    assert echo == pytest.approx(TR / 2, abs=1e-9)
    # The same times by the file: from the middle of the pulse to the samples.
    sampled = exported.sequence.adc_times()[0].reshape(-1, 512)
    pulses = middles(exported.sequence)[40:].reshape(3, 40)[:, 1:-1].ravel()
    # An odd duration puts the middle half a raster early.
    assert np.abs(sampled - pulses[:, None] - times).max() < 0.51e-6
    np.testing.assert_allclose(np.diff(times), exported.plan.dwell, rtol=1e-9)


def test_nothing_is_read_in_dummies_and_beside_the_inversion(exported):
    read, pulse = [], -1
    for number in exported.sequence.block_events:
        block = exported.sequence.get_block(number)
        pulse += block.rf is not None
        if block.adc is not None:
            read.append(pulse)
    wanted = np.arange(160).reshape(4, 40)[1:, 1:-1]
    np.testing.assert_array_equal(read, wanted.ravel())


def test_two_trains_are_played_one_after_the_other(tmp_path, short_train):
    both = fp.PulseTrain(
        np.r_[short_train.flip_angle, np.c_[np.pi, 0.5 * short_train.flip_angle[:, 1:]]],
        np.repeat(short_train.pulse_duration, 2, axis=0),
        TR,
    )
    pulseq.write(both, tmp_path / "two.seq", SCAN)
    read = fp.PulseTrain.read(tmp_path / "two.seq")
    np.testing.assert_allclose(read.flip_angle, both.flip_angle, rtol=0, atol=1e-6)
    sequence = opened(tmp_path / "two.seq")
    with h5py.File(tmp_path / "two.trajectory.h5") as file:
        written, order = file["trajectory"][()], file["acquisition"][()]
        np.testing.assert_array_equal(file["pulse"], np.r_[1:39, 41:79])
    # As for one train.
    k = sequence.calculate_kspace()[0].T.reshape(-1, 512, 3) * 0.256
    np.testing.assert_allclose(written, k[order], atol=4e-5)


# --- physics -------------------------------------------------------------------------------


class Bloch:
    """Isochromats that play the blocks of a file, by matrices; it knows nothing of trains.

    They fill a cube of the edge over which the crushers turn by one full turn on each axis, in
    steps of a fifth: what is dephased then adds up to zero, as in a large voxel.
    """

    def __init__(self, T1, T2, B0=0.0, B1=1.0, *, edge):
        self.T1, self.T2, self.B0, self.B1 = T1, T2, B0, B1
        side = (np.arange(5) - 2) / 5 * edge
        self.r = np.stack(np.meshgrid(side, side, side), axis=-1).reshape(-1, 3)
        self.m = np.tile([0.0, 0.0, 1.0], (len(self.r), 1))

    def rest(self, time, moment=(0.0, 0.0, 0.0)):
        """Free precession while the gradients have this moment, in 1/m."""
        angle = self.B0 * time + 2 * np.pi * self.r @ np.asarray(moment)
        turned = np.exp(1j * angle) * (self.m[:, 0] + 1j * self.m[:, 1]) * np.exp(-time / self.T2)
        z = 1 + (self.m[:, 2] - 1) * np.exp(-time / self.T1)
        self.m = np.stack([turned.real, turned.imag, z], axis=-1)

    def pulse(self, rf):
        self.rest(rf.delay)
        duration = rf.t[-1] - rf.t[0]
        w = 2 * np.pi * self.B1 * rf.signal[0] * np.exp(1j * rf.phase_offset)
        # dm/dt = ω × m, and relaxation to (0, 0, 1).
        A = np.array(
            [
                [-1 / self.T2, -self.B0, w.imag, 0],
                [self.B0, -1 / self.T2, -w.real, 0],
                [-w.imag, w.real, -1 / self.T1, 1 / self.T1],
                [0, 0, 0, 0],
            ]
        )
        U = expm(A * duration)
        self.m = self.m @ U[:3, :3].T + U[:3, 3]

    def echo(self, phase):
        """Mean transverse magnetization in the frame of the receiver."""
        return (self.m[:, 0] + 1j * self.m[:, 1]).mean() * np.exp(-1j * phase)


def moment_until(block, time):
    """∫ gradient over a block up to this time from its start, 1/m: a fine trapezoidal sum."""
    # A step at each corner of the 10 µs raster, where the waveforms are linear between them.
    t = np.unique(np.r_[np.arange(0, time, 10e-6), time])
    result = []
    for g in (block.gx, block.gy, block.gz):
        if g is None:
            result.append(0.0)
            continue
        if g.type == "trap":
            corners = np.cumsum([g.delay, g.rise_time, g.flat_time, g.fall_time])
            values = np.array([0, g.amplitude, g.amplitude, 0])
        else:
            corners, values = g.delay + g.tt, g.waveform
        result.append(np.trapezoid(np.interp(t, corners, values, left=0, right=0), t))
    return np.array(result)


def played(sequence, bloch):
    """Echoes of the readouts of a file, in the order of the scan."""
    echoes = []
    for number in sequence.block_events:
        block = sequence.get_block(number)
        left = block.block_duration
        if block.rf is not None:
            bloch.pulse(block.rf)
            left -= block.rf.delay + block.rf.t[-1]
        if block.adc is not None:
            # The middle of the readout, at which k is zero to a fraction of a sample.
            middle = block.adc.delay + block.adc.num_samples * block.adc.dwell / 2
            first = moment_until(block, middle)
            bloch.rest(middle, first)
            echoes.append(bloch.echo(block.adc.phase_offset))
            bloch.rest(left - middle, moment_until(block, left) - first)
        else:
            bloch.rest(left, moment_until(block, left))
    return np.array(echoes)


# What each case changes of the train and the tissue, and the number of pulses.
CASES = {
    "on resonance": ({}, {}, 40),
    "off resonance": ({}, {"B0": 150.0}, 40),
    "weak B1": ({}, {"B1": 0.8}, 40),
    "spoiled": ({"inversion": "spoiled"}, {"B0": -80.0, "B1": 0.9}, 40),
    "odd number of pulses": ({}, {"B0": 50.0}, 39),
    "another increment": ({"phase_increment": 2.0}, {"B0": 50.0}, 40),
}


@pytest.mark.parametrize("case", CASES)
def test_bloch_simulation_of_the_file_gives_the_signal_of_the_model(tmp_path, short_train, case):
    changes, varied, size = CASES[case]
    train = fp.PulseTrain(
        short_train.flip_angle[:, :size], short_train.pulse_duration[:, :size], TR, **changes
    )
    plan = pulseq.write(train, tmp_path / "a.seq", Scan(cycles=4, dummy_cycles=8))
    # Fast relaxation: a cycle of 0.14 s is then as long for it as one of 4 s for tissue, and the
    # dummies, 7 T1, lead to the periodic state to 1e-3.
    tissue = {"T1": 0.15, "T2": 0.05, "B0": 0.0, "B1": 1.0} | varied
    turns_per_metre = 4 * 1e3 / np.sqrt(3)
    bloch = Bloch(**tissue, edge=1 / turns_per_metre)
    # The model turns z into x, a pulse of phase 0 in the file z into -y: a quarter turn.
    signal = 1j * played(opened(tmp_path / "a.seq"), bloch).reshape(4, size - 2)
    single = SinglePool(train).signal([list(tissue.values())])
    two = fp.TwoPool(train).signal(
        [[0.0, tissue["T1"], tissue["T2"], 20.0, 12e-6, tissue["B0"], tissue["B1"]]]
    )
    for model in (single[0, plan.pulses], two[0, plan.pulses]):
        # The model neglects relaxation during the inversion, half of TRF · (1/T2 - 1/T1): 0.3 %
        # here. Off B1 what one inversion dephases is in part refocused four cycles later.
        assert np.abs(signal - model).max() < 0.01 * np.abs(model).max()


def test_the_difference_from_the_model_is_relaxation_during_the_inversion(tmp_path, short_train):
    tissue = {"T1": 0.15, "T2": 0.05, "B0": 0.0, "B1": 1.0}
    errors = []
    for duration in (500e-6, 250e-6):
        durations = np.r_[duration, short_train.pulse_duration[0, 1:]]
        train = fp.PulseTrain(short_train.flip_angle, durations, TR)
        plan = pulseq.write(train, tmp_path / "a.seq", Scan(cycles=1, dummy_cycles=16))
        bloch = Bloch(**tissue, edge=np.sqrt(3) / 4e3)
        signal = 1j * played(opened(tmp_path / "a.seq"), bloch)
        model = SinglePool(train).signal([list(tissue.values())])[0, plan.pulses]
        errors.append(np.linalg.norm(signal - model) / np.linalg.norm(model))
    # Proportional to the duration, to the second order of TRF/T2 = 0.01.
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)


def test_blochsim_reads_the_file_and_gives_the_signal_of_the_model(tmp_path, short_train):
    errors = []
    for part in (1, 2):
        duration = np.round(1e6 * short_train.pulse_duration / part) * 1e-6
        train = fp.PulseTrain(short_train.flip_angle, duration, TR)
        plan = pulseq.write(train, tmp_path / "a.seq", SCAN)
        # It plays one cycle, of `TRSize` blocks, again and again; times in ms.
        simulator = TrueFISPSimulator.from_pulseq(tmp_path / "a.seq", tr_index=1, repetitions=80)
        # As above a quarter turn.
        signal = 1j * np.asarray(simulator.simulate(T1=1000.0, T2=100.0)).ravel()
        model = SinglePool(train).signal([[1.0, 0.1, 0.0, 1.0]])[0, plan.pulses]
        errors.append(np.abs(signal - model).max() / np.abs(model).max())
    # It takes pulses as instantaneous, which is the difference: twice as short, half of it.
    assert errors[0] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


# --- reading back --------------------------------------------------------------------------


def test_reading_back_gives_angles_and_durations(exported):
    read = fp.PulseTrain.read(exported.path)
    # The accuracy asked for; amplitudes alone, with six digits, would give 1e-5.
    np.testing.assert_allclose(read.flip_angle, exported.train.flip_angle, rtol=1e-6, atol=0)
    np.testing.assert_allclose(read.flip_angle, exported.train.flip_angle, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        read.pulse_duration, exported.train.pulse_duration, rtol=1e-6, atol=0
    )
    assert (read.repetition_time, read.inversion, read.phase_increment) == (TR, "crushed", np.pi)
    # Arguments that agree are no conflict, others are.
    fp.PulseTrain.read(exported.path, repetition_time=TR, inversion="crushed")
    with pytest.raises(ValueError, match=r"says repetition time 0.0035, the call says 0.004"):
        fp.PulseTrain.read(exported.path, repetition_time=4e-3)


@pytest.mark.parametrize("increment", [np.pi, 0.0, 2.0, -0.7])
def test_signs_zeros_and_phases_survive(tmp_path, short_train, increment):
    angle = short_train.flip_angle.copy()
    angle[0, 5], angle[0, 6], angle[0, 0] = 0.0, -0.3, np.pi - 0.1
    train = fp.PulseTrain(angle, short_train.pulse_duration, TR, phase_increment=increment)
    pulseq.write(train, tmp_path / "a.seq", SCAN)
    read = fp.PulseTrain.read(tmp_path / "a.seq")
    np.testing.assert_allclose(read.flip_angle, angle, rtol=1e-6, atol=0)
    assert read.phase_increment == increment


def test_finer_rasters_of_the_pulses(tmp_path, short_train):
    duration = short_train.pulse_duration + np.r_[0, 1e-7 * np.arange(1, 40)]
    train = fp.PulseTrain(short_train.flip_angle, duration, TR)
    pulseq.write(train, tmp_path / "a.seq", dataclasses.replace(SCAN, rf_raster=1e-7))
    read = fp.PulseTrain.read(tmp_path / "a.seq")
    np.testing.assert_allclose(read.pulse_duration, duration, rtol=1e-6, atol=0)
    np.testing.assert_allclose(read.flip_angle, train.flip_angle, rtol=1e-6, atol=0)
    sequence = opened(tmp_path / "a.seq", rf_raster=1e-7)
    assert sequence.check_timing()[0]
    # Half a raster, as above.
    np.testing.assert_allclose(np.diff(middles(sequence)), TR, atol=0.051e-6)


def test_the_papers_train(tmp_path, paper_train):
    # Its durations are multiples of 0.2 µs.
    with pytest.raises(ValueError, match=r"RF raster 1 µs; got 903 of 1142 .* rf_raster=2e-07"):
        pulseq.plan(paper_train)
    scan = Scan(cycles=1, dummy_cycles=0, rf_raster=2e-7)
    pulseq.write(paper_train, tmp_path / "a.seq", scan)
    read = fp.PulseTrain.read(tmp_path / "a.seq")
    np.testing.assert_allclose(read.flip_angle, paper_train.flip_angle, rtol=1e-6, atol=0)
    np.testing.assert_allclose(read.pulse_duration, paper_train.pulse_duration, rtol=1e-6, atol=0)


def test_a_train_is_rounded_to_a_raster(short_train):
    train = fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration + 0.3e-6, TR)
    rounded = pulseq.on_raster(train)
    # Products of whole numbers and the raster.
    np.testing.assert_allclose(rounded.pulse_duration, short_train.pulse_duration, rtol=1e-14)
    np.testing.assert_array_equal(rounded.flip_angle, train.flip_angle)
    pulseq.plan(rounded)


# --- options -------------------------------------------------------------------------------

# Another value of each, which must make another file.
OTHER = {
    "field_of_view": 0.3,
    "matrix": 128,
    "cycles": 2,
    "dummy_cycles": 0,
    "readout_time": 1e-3,
    "oversampling": 1,
    "crusher": 3.0,
    "max_gradient": 35e-3,
    "max_slew": 120.0,
    "rf_raster": 2e-6,
    "rf_dead_time": 150e-6,
    "rf_ringdown_time": 150e-6,
    "adc_dead_time": 0.9e-3,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Scan)])
def test_every_option_does_something(tmp_path, short_train, field):
    scan = Scan(cycles=1, dummy_cycles=1)
    for name, used in (("a", scan), ("b", dataclasses.replace(scan, **{field: OTHER[field]}))):
        pulseq.write(short_train, tmp_path / f"{name}.seq", used)
    a, b = ((tmp_path / f"{name}.seq").read_text() for name in "ab")
    assert a != b
    assert fp.PulseTrain.read(tmp_path / "b.seq").repetition_time == TR


def test_a_readout_time_is_kept(short_train):
    plan = pulseq.plan(short_train, dataclasses.replace(SCAN, readout_time=1.0e-3))
    # 512 samples on a raster of 0.1 µs: 1.9 µs each at most.
    assert plan.dwell == pytest.approx(1.9e-6)
    assert plan.readout_time == pytest.approx(512 * 1.9e-6)


# --- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field_of_view": 2.5e-4}, r"field_of_view must lie .*; got 0.00025. Check its unit."),
        ({"field_of_view": 256}, r"field_of_view must lie within .* m; got 256. Is it in mm\?"),
        ({"max_gradient": 40}, r"max_gradient must lie within .*; got 40. Is it in mT/m\?"),
        ({"max_slew": 150e3}, r"max_slew must lie within .*; got 150000.0. Is it in mT/m/s\?"),
        ({"matrix": 12.5}, r"matrix must be a whole number of at least 2; got 12.5"),
        ({"cycles": 0}, r"cycles must be a whole number of at least 1; got 0"),
        ({"dummy_cycles": -1}, r"dummy_cycles must be a whole number of at least 0; got -1"),
        ({"readout_time": 1.2}, r"readout_time must lie within .* s; got 1.2. Is it in ms\?"),
        ({"crusher": np.nan}, r"crusher must lie within .*; got nan"),
        ({"rf_dead_time": 100}, r"rf_dead_time must lie within .*; got 100. Is it in µs\?"),
        ({"rf_raster": 1}, r"rf_raster must be one of 1e-07, .* s; got 1. Is it in µs\?"),
        ({"matrix": 3, "oversampling": 1}, r"must be a multiple of 4, .*; got 3 · 1. Change"),
    ],
)
def test_options_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        Scan(**changes)


def test_times_off_their_raster_are_refused(short_train):
    duration = short_train.pulse_duration.copy()
    duration[0, 7] += 0.4e-6
    with pytest.raises(
        ValueError,
        match=r"multiples of the RF raster 1 µs; got 1 of 40 .* 206.4 µs at pulse 7 of train 0\. "
        r"Set rf_raster=2e-07 .* pulseq.on_raster",
    ):
        pulseq.plan(fp.PulseTrain(short_train.flip_angle, duration, TR))
    duration[0, 7] += 0.05e-6
    with pytest.raises(ValueError, match=r"No raster fits: round them with pulseq.on_raster"):
        pulseq.plan(fp.PulseTrain(short_train.flip_angle, duration, TR))
    with pytest.raises(ValueError, match=r"multiple of 10 µs, .*; got 3504 µs. Take 3500 µs"):
        pulseq.plan(fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration, 3.504e-3))


def test_gradients_that_do_not_fit_say_what_they_need(short_train):
    with pytest.raises(ValueError, match=r"need (.*) ms; .* leaves (.*) ms .* longer by (.*) ms,"):
        pulseq.plan(fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration, 2.5e-3))

    # With just as much more it goes, and with less it does not.
    def fits(repetition):
        train = fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration, repetition)
        try:
            pulseq.plan(train, Scan(crusher=1.0))
        except ValueError as error:
            return float(str(error).split("longer by ")[1].split(" ms")[0]) * 1e-3
        return 0.0

    missing = fits(2.5e-3)
    assert missing > 0
    assert fits(2.5e-3 + missing) == 0
    # Times come in steps of 10 µs, and a spoke in the middle of its gap in steps of 20 µs.
    assert fits(2.5e-3 + missing - 20e-6) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"readout_time": 2.5e-3}, r"the gradients of a spoke need .* a shorter readout_time"),
        ({"readout_time": 0.2e-3}, r"readout_time must be at least 0\.\d+ ms .*; got 0.2 ms"),
        ({"crusher": 10.0}, r"the crushers need .* Lower crusher from 10 cycles across a voxel"),
        ({"rf_dead_time": 2e-3}, r"the gradients of a spoke need .* leaves 0.00 ms"),
    ],
)
def test_options_that_do_not_fit_the_repetition_time_are_refused(short_train, changes, message):
    with pytest.raises(ValueError, match=message):
        pulseq.plan(short_train, dataclasses.replace(SCAN, **changes))


def test_a_train_of_two_pulses_and_another_suffix_are_refused(tmp_path, short_train):
    two = fp.PulseTrain([np.pi, 0.3], [5e-4, 3e-4], TR)
    with pytest.raises(ValueError, match=r"at least 3 pulses, .*; got 2. Give a longer train"):
        pulseq.plan(two)
    with pytest.raises(ValueError, match=r"ends in \.seq; got .*a\.txt. Change the suffix"):
        pulseq.write(short_train, tmp_path / "a.txt")


def test_without_pypulseq_the_message_says_what_to_install(
    monkeypatch, tmp_path, exported, short_train
):
    monkeypatch.setitem(sys.modules, "pypulseq", None)
    install = r'pip install "fisherprint\[pulseq\]"'
    with pytest.raises(ImportError, match=install):
        fp.PulseTrain.read(exported.path)
    with pytest.raises(ImportError, match=install):
        pulseq.write(short_train, tmp_path / "a.seq", SCAN)
    short_train.write(tmp_path / "train.toml")
    assert 'pip install "fisherprint[pulseq]"' in refused(
        "export", tmp_path / "train.toml", "--pulseq", tmp_path / "a.seq"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["train.toml"]


@pytest.mark.parametrize("part", [0.02, 0.5, 0.95, 0.999])
def test_a_truncated_file_is_refused(tmp_path, exported, part):
    text = exported.path.read_text()
    (tmp_path / "a.seq").write_text(text[: int(part * len(text))])
    with pytest.raises(UnreadableFileError, match=r"ends with its signature; .*truncated"):
        fp.PulseTrain.read(tmp_path / "a.seq")


def test_a_changed_or_missing_file_is_refused(tmp_path, exported):
    changed = exported.path.read_text().replace("RepetitionTime 0.0035", "RepetitionTime 0.0045")
    (tmp_path / "a.seq").write_text(changed)
    with pytest.raises(UnreadableFileError, match="another signature than its contents have"):
        fp.PulseTrain.read(tmp_path / "a.seq")
    with pytest.raises(UnreadableFileError, match=r"expected a file at .*b\.seq; found nothing"):
        fp.PulseTrain.read(tmp_path / "b.seq")
    (tmp_path / "c.seq").write_text("PK nothing of the kind\n")
    with pytest.raises(UnreadableFileError, match="has none: it is truncated"):
        fp.PulseTrain.read(tmp_path / "c.seq")


def test_foreign_sequences_are_refused(tmp_path, exported):
    sequence = pypulseq.Sequence()
    pulse = pypulseq.make_block_pulse(0.5, duration=1e-3, use="excitation")
    sequence.add_block(pulse)
    sequence.write(str(tmp_path / "a.seq"))
    with pytest.raises(
        UnreadableFileError,
        match=r"with the definition RepetitionTime; .* has AdcRasterTime, .* Give a file of this",
    ):
        fp.PulseTrain.read(tmp_path / "a.seq")
    (tmp_path / "b.seq").write_text("[BLOCKS]\n1 2 x\n\n[SIGNATURE]\n")
    signed(tmp_path / "b.seq", "[BLOCKS]\n1 2 x\n")
    with pytest.raises(UnreadableFileError, match=r"cannot be read: .* Export it again"):
        fp.PulseTrain.read(tmp_path / "b.seq")


def signed(path, text):
    """Write a file with the signature that belongs to it."""
    digest = hashlib.md5(text.encode()).hexdigest()
    path.write_text(f"{text}\n[SIGNATURE]\nType md5\nHash {digest}\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("RepetitionTime 0.0035", "RepetitionTime 0.004", r"pulses every 0.004 s; .* distances"),
        ("PulsesPerCycle 40", "PulsesPerCycle 41", r"4 cycles of 41 pulses; .* has 160 pulses"),
        (
            "PhaseIncrement 3.141592653589793",
            "PhaseIncrement 3",
            r"phases that change by -3.0 rad",
        ),
        ("PulsesPerCycle 40", "PulsesPerCycle 80", None),
    ],
)
def test_pulses_that_contradict_the_definitions_are_refused(tmp_path, exported, old, new, message):
    text = exported.path.read_text().rpartition("\n[SIGNATURE]")[0]
    assert old in text
    text = text.replace(old, new)
    if message is None:
        text, message = text.replace("Cycles 3", "Cycles 1"), "phases that change by"
    signed(tmp_path / "a.seq", text)
    with pytest.raises(UnreadableFileError, match=message):
        fp.PulseTrain.read(tmp_path / "a.seq")


def test_other_pulses_in_one_cycle_are_refused(tmp_path, exported):
    text = exported.path.read_text().rpartition("\n[SIGNATURE]")[0]
    # Of the last cycle, the block of its pulse 10 plays what pulse 12 plays.
    head, blocks = text.split("[BLOCKS]\n")
    lines = blocks.split("\n")
    here, other = (2 * (3 * 40 + pulse) for pulse in (10, 12))
    lines[here] = lines[here][:9] + lines[other][9:]
    signed(tmp_path / "a.seq", head + "[BLOCKS]\n" + "\n".join(lines))
    with pytest.raises(UnreadableFileError, match=r"same flip angles in each cycle; .* others in"):
        fp.PulseTrain.read(tmp_path / "a.seq")


def test_a_failed_timing_check_is_named_and_nothing_is_written(monkeypatch, tmp_path, short_train):
    found = SimpleNamespace(block=3, event="rf", field="delay", error_type="RASTER")
    monkeypatch.setattr(pypulseq.Sequence, "check_timing", lambda self: (False, [found]))
    with pytest.raises(pulseq.TimingError, match=r"got 1 errors, the first in block 3: rf delay"):
        pulseq.write(short_train, tmp_path / "a.seq", SCAN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_export_leaves_what_was_there(monkeypatch, tmp_path, short_train, error):
    for name in ("a.seq", "a.trajectory.h5"):
        (tmp_path / name).write_text("old")

    def write(self, name, **options):
        Path(name).write_text("half")
        raise error("stopped")

    monkeypatch.setattr(pypulseq.Sequence, "write", write)
    with pytest.raises(error):
        pulseq.write(short_train, tmp_path / "a.seq", SCAN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.seq", "a.trajectory.h5"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


# --- command line --------------------------------------------------------------------------


def test_command_line_writes_both_files_and_says_what_is_in_them(tmp_path, short_train):
    short_train.write(tmp_path / "train.toml")
    target = tmp_path / "out" / "scan.seq"
    arguments = ("export", tmp_path / "train.toml", "--pulseq", target, "--cycles", "3")
    out = done(*arguments, "--fov", "240", "--matrix", "160")
    assert "200 repetitions in 0.0 minutes (3 cycles and 2 dummies of 0.14 s)" in out
    assert "timing check: passed" in out
    assert "23.5 µT" in out  # π in 500 µs, by hand: 1 kHz / 42.576 MHz/T
    sequence = opened(target)
    assert sequence.check_timing()[0]
    np.testing.assert_array_equal(sequence.definitions["FOV"], (0.24, 0.24, 0.24))
    with h5py.File(target.with_name("scan.trajectory.h5")) as file:
        assert file["trajectory"].shape == (38, 3, 320, 3)
        assert file["field_of_view"][()] == 0.24
    # The file is a train like another.
    read = fp.PulseTrain.read(target)
    np.testing.assert_allclose(read.flip_angle, short_train.flip_angle, rtol=1e-6, atol=0)
    assert "already there. Choose another name, or replace it with --force" in refused(*arguments)
    done(*arguments, "--force")


def test_command_line_rounds_durations_when_told_to(tmp_path, short_train):
    duration = short_train.pulse_duration + 0.3e-6
    fp.PulseTrain(short_train.flip_angle, duration, TR).write(tmp_path / "train.h5")
    arguments = ("export", tmp_path / "train.h5", "--pulseq", tmp_path / "a.seq", "--cycles", "1")
    assert "--round-durations" in refused(*arguments)
    assert not list(tmp_path.glob("a.*"))
    assert "durations rounded by up to 0.3 µs" in done(*arguments, "--round-durations")
    read = fp.PulseTrain.read(tmp_path / "a.seq")
    np.testing.assert_allclose(read.pulse_duration, short_train.pulse_duration, rtol=1e-6, atol=0)


def test_a_repetition_time_in_ms_is_that_of_the_file(tmp_path, short_train):
    """4.1 times 1e-3 is another number than 4.1e-3."""
    angle, duration = short_train.flip_angle, short_train.pulse_duration
    fp.PulseTrain(angle, duration, 4.1e-3).write(tmp_path / "train.toml")
    scipy.io.savemat(tmp_path / "train.mat", {"alpha": angle, "TRF": duration})
    (of_mat,) = shell.read_trains([tmp_path / "train.mat"], 4.1).values()
    assert of_mat.digest == fp.PulseTrain.read(tmp_path / "train.toml").digest


def test_command_line_refuses_wrong_units(tmp_path, short_train):
    short_train.write(tmp_path / "train.toml")
    arguments = ("export", tmp_path / "train.toml", "--pulseq", tmp_path / "a.seq")
    assert "field_of_view must lie within 0.001 and 2 m" in refused(*arguments, "--fov", "0.25")
    assert call("export", tmp_path / "train.toml").code == 2
