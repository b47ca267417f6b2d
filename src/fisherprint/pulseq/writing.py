"""The Pulseq file of a scan and its trajectory; the one part that calls pypulseq."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fisherprint import _storage
from fisherprint.pulseq.scan import (
    ADC_RASTER,
    GAMMA,
    GRADIENT_RASTER,
    ON_RASTER,
    Plan,
    Scan,
    plan,
    six_digits,
)
from fisherprint.reconstruct import trajectory
from fisherprint.sequence import PulseTrain, load_pypulseq

Progress = Callable[[str, int, int], None]

# Of the crushers, one cycle after the other: no two of a run of four add up to nothing, so that
# what one inversion has dephased is not refocused by the next.
_DIAGONALS = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])


class TimingError(ValueError):
    """A sequence that does not pass pypulseq's timing check; it carries the `errors` found."""

    def __init__(self, message: str, errors: list[Any]) -> None:
        super().__init__(message)
        self.errors = errors


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


def build(planned: Plan, *, progress: Progress = _silent) -> Any:
    """The sequence as a `pypulseq.Sequence`.

    Args:
        planned: the scan, by `plan`.
        progress: told how many repetitions are done.

    Raises:
        ImportError: no pypulseq.
    """
    pypulseq = load_pypulseq()
    train, scan = planned.train, planned.scan
    system = pypulseq.Opts(
        max_grad=GAMMA * scan.max_gradient,
        max_slew=GAMMA * scan.max_slew,
        rf_dead_time=scan.rf_dead_time,
        rf_ringdown_time=scan.rf_ringdown_time,
        adc_dead_time=scan.adc_dead_time,
        rf_raster_time=scan.rf_raster,
        grad_raster_time=GRADIENT_RASTER,
        block_duration_raster=GRADIENT_RASTER,
        adc_raster_time=ADC_RASTER,
        gamma=GAMMA,
    )
    sequence = pypulseq.Sequence(system, use_block_cache=False)
    n_trains, n_pulses = train.flip_angle.shape
    definitions = {
        "Name": "fisherprint",
        "FOV": [float(scan.field_of_view)] * 3,
        # Text, since numbers would be cut to nine digits.
        "RepetitionTime": repr(train.repetition_time),
        "PhaseIncrement": repr(train.phase_increment),
        "Inversion": train.inversion,
        "Trains": n_trains,
        "PulsesPerCycle": n_pulses,
        "Cycles": int(scan.cycles),
        "DummyCycles": int(scan.dummy_cycles),
        "TrainDigest": f"sha256:{train.digest}",
        # Blocks of what repeats: one cycle.
        "TRSize": 2 * n_pulses,
    }
    for key, value in definitions.items():
        sequence.set_definition(key, value)
    events = _Events(planned, sequence, pypulseq)
    window = pypulseq.make_delay(planned.window * GRADIENT_RASTER)
    gap = pypulseq.make_delay(planned.gap * GRADIENT_RASTER)
    for number, played in enumerate(_repetitions(planned)):
        # The phase of the pulse in turns; rounded, so that equal phases are one event. In the
        # model the magnetization turns against the pulses, in the sense of positive frequencies:
        # the phase of the pulses goes the other way.
        phase = round(-number * train.phase_increment / (2 * np.pi) % 1.0, 9) % 1.0
        sequence.add_block(events.pulse(played.train, played.pulse, phase), window)
        in_gap = [*events.gradients(played, last=number == planned.n_repetitions - 1)]
        if played.read:
            in_gap.append(events.adc(phase))
        sequence.add_block(*in_gap, gap)
        if (number + 1) % 1000 == 0 or number + 1 == planned.n_repetitions:
            progress("repetitions", number + 1, planned.n_repetitions)
    return sequence


def write(
    train: PulseTrain,
    path: str | Path,
    scan: Scan | None = None,
    *,
    progress: Progress = _silent,
) -> Plan:
    """Write a scan as `path`, a Pulseq file, and its trajectory beside it.

    Both files are there whole or not at all. The trajectory, at `trajectory_path(path)`, is HDF5:

        trajectory        (T', S, R, 3) float32, in 1/field_of_view, |k| ≤ matrix/2
        pulse             (T',) which pulse of the T of the train; those beside an inversion miss
        acquisition       (T', S) when in the scan a spoke is read: 0, 1, 2, ...
        sample_time       (R,) s after the middle of the pulse
        field_of_view (m), matrix, repetition_time (s), train_digest

    Args:
        train: the pulse train, its durations on the scanner's raster.
        path: ends in `.seq`.
        scan: how it is played; the defaults where it is None.
        progress: told how many repetitions are done.

    Returns:
        What has been written.

    Raises:
        ImportError: no pypulseq.
        ValueError: as for `plan`, or another suffix.
        TimingError: pypulseq's timing check found something.
    """
    path = Path(path)
    if path.suffix != ".seq":
        raise ValueError(f"a Pulseq file ends in .seq; got {path}. Change the suffix.")
    load_pypulseq()
    planned = plan(train, scan)
    sequence = build(planned, progress=progress)
    progress("timing check", 0, 1)
    good, errors = sequence.check_timing()
    if not good:
        first = errors[0]
        raise TimingError(
            f"expected a sequence that passes pypulseq's timing check; got {len(errors)} errors, "
            f"the first in block {first.block}: {first.event} {first.field} {first.error_type}. "
            "Change the dead times or rasters of the scan.",
            errors,
        )
    progress("timing check", 1, 1)
    n_read, n_cycles = len(planned.pulses), planned.scan.cycles
    size = 12 * n_read * n_cycles * planned.scan.n_samples
    with (
        _storage.large_hdf5(trajectory_path(path), size) as file,
        _storage.replacing(path) as temporary,
    ):
        _fill(file, planned)
        sequence.write(str(temporary), check_timing=False, remove_duplicates=False)
    return planned


def trajectory_path(path: str | Path) -> Path:
    """Where `write` puts the trajectory of a Pulseq file: `scan.trajectory.h5` for `scan.seq`."""
    return Path(path).with_suffix(".trajectory.h5")


@dataclass(frozen=True)
class _Repetition:
    """One pulse and the gap after it; `cycle` counts the cycles of all trains, dummies included.

    A dummy has the spoke of the first cycle that is read.
    """

    train: int
    pulse: int
    cycle: int
    spoke: int
    read: bool


def _repetitions(planned: Plan) -> Iterator[_Repetition]:
    n_trains, n_pulses = planned.train.flip_angle.shape
    dummies, cycles = planned.scan.dummy_cycles, planned.scan.cycles
    read = set(planned.pulses.tolist())
    for train in range(n_trains):
        for cycle in range(-dummies, cycles):
            for pulse in range(n_pulses):
                yield _Repetition(
                    train,
                    pulse,
                    train * (dummies + cycles) + dummies + cycle,
                    max(cycle, 0),
                    cycle >= 0 and train * n_pulses + pulse in read,
                )


class _Events:
    """Events of the sequence, each registered once."""

    def __init__(self, planned: Plan, sequence: Any, pypulseq: Any) -> None:
        self._planned, self._sequence, self._pypulseq = planned, sequence, pypulseq
        self._pulses: dict[tuple[int, int, float], Any] = {}
        self._readouts: dict[float, Any] = {}
        self._spokes: dict[tuple[int, int], list[Any]] = {}
        self._crushers: dict[tuple[int, bool], list[Any]] = {}
        time, amplitude = planned.spoke()
        self._time, self._shape = time, amplitude / np.abs(amplitude).max()
        self._peak = np.abs(amplitude).max()
        self._shape_ids: list[int] | None = None

    def pulse(self, train: int, pulse: int, phase: float) -> Any:
        """A rectangular pulse in the middle of its window; the phase in turns."""
        key = train, pulse, phase
        if key not in self._pulses:
            self._pulses[key] = self._rectangle(*key)
        return self._pulses[key]

    def _rectangle(self, train: int, pulse: int, phase: float) -> Any:
        planned, scan, sequence = self._planned, self._planned.scan, self._sequence
        angle = float(planned.train.flip_angle[train, pulse])
        duration = float(planned.train.pulse_duration[train, pulse])
        samples = round(duration / scan.rf_raster)
        delay = (planned.window * GRADIENT_RASTER - samples * scan.rf_raster) / 2
        delay = math.floor(delay / scan.rf_raster + ON_RASTER) * scan.rf_raster
        amplitude = abs(angle) / (2 * np.pi * samples * scan.rf_raster)
        # The file has six digits of the amplitude but nine of the shape that it scales: round
        # up the one, and the other makes up for it.
        written = float(six_digits(amplitude, up=True))
        height = amplitude / written if written else 1.0
        # The model's refocused path keeps x and turns y round, while a pulse turns z into x: the
        # inversion acts about an axis a quarter turn from that of the others.
        phase += 0.25 * (pulse == 0) + 0.5 * (angle < 0)

        def shape(*values: float) -> int:
            number, _ = sequence.shape_library.find_or_insert([len(values), *values])
            return int(number)

        event = self._pypulseq.make_block_pulse(
            flip_angle=1.0,
            duration=samples * scan.rf_raster,
            # The window leaves that time; a product may lack its last digit.
            delay=max(delay, scan.rf_dead_time),
            phase_offset=2 * np.pi * (phase % 1.0),
            system=sequence.system,
            use="inversion" if pulse == 0 else "excitation",
        )
        event.signal = np.full(2, written, dtype=complex)
        event.shape_IDs = [shape(height, height), shape(0.0, 0.0), shape(0.0, float(samples))]
        with np.errstate(invalid="ignore"):  # of a pulse without amplitude
            event.id, _ = sequence.register_rf_event(event)
        return event

    def adc(self, phase: float) -> Any:
        """The readout of a spoke; the phase in turns."""
        if phase not in self._readouts:
            planned = self._planned
            event = self._pypulseq.make_adc(
                num_samples=planned.scan.n_samples,
                dwell=planned.dwell,
                delay=planned.adc_delay,
                phase_offset=2 * np.pi * phase,
                system=self._sequence.system,
            )
            event.id, _ = self._sequence.register_adc_event(event)
            self._readouts[phase] = event
        return self._readouts[phase]

    def gradients(self, played: _Repetition, *, last: bool) -> list[Any]:
        """What is played in the gap after a pulse: a spoke, or the crusher of an inversion."""
        if played.pulse == 0:
            return self._crusher(played.cycle, before=False)
        if played.pulse == self._planned.train.flip_angle.shape[1] - 1:
            # No inversion follows the last cycle.
            return [] if last else self._crusher(played.cycle + 1, before=True)
        return self._spoke(played)

    def _spoke(self, played: _Repetition) -> list[Any]:
        pulse = played.train * self._planned.train.flip_angle.shape[1] + played.pulse
        key = pulse, played.spoke
        if key in self._spokes:
            return self._spokes[key]
        delay = (self._planned.gap - self._planned.spoke_length) // 2 * GRADIENT_RASTER
        events = []
        for channel, part in zip("xyz", self._planned.direction[key], strict=True):
            if part == 0:
                continue
            event = SimpleNamespace(
                type="grad",
                channel=channel,
                waveform=part * self._peak * self._shape,
                tt=self._time,
                delay=delay,
                first=0.0,
                last=0.0,
            )
            if self._shape_ids is not None:
                event.shape_IDs = self._shape_ids
            event.id, self._shape_ids = self._sequence.register_grad_event(event)
            events.append(event)
        # Dummies come first and play the spokes of the first cycle, which are then there.
        if played.spoke == 0:
            self._spokes[key] = events
        return events

    def _crusher(self, cycle: int, *, before: bool) -> list[Any]:
        # Equal moments on both sides bring back what the inversion refocuses; different ones
        # spoil it too.
        if self._planned.train.inversion == "crushed":
            diagonal = cycle % 4
        else:
            diagonal = (2 * cycle + (not before)) % 4
        key = diagonal, before
        if key not in self._crushers:
            lobe = self._planned.crusher
            events = []
            for channel, sign in zip("xyz", _DIAGONALS[diagonal], strict=True):
                event = self._pypulseq.make_trapezoid(
                    channel,
                    amplitude=float(six_digits(sign * lobe.amplitude)),
                    rise_time=lobe.rise * GRADIENT_RASTER,
                    flat_time=lobe.flat * GRADIENT_RASTER,
                    fall_time=lobe.rise * GRADIENT_RASTER,
                    # Next to the inversion.
                    delay=before * (self._planned.gap - lobe.length) * GRADIENT_RASTER,
                    system=self._sequence.system,
                )
                event.id = self._sequence.register_grad_event(event)
                events.append(event)
            self._crushers[key] = events
        return self._crushers[key]


def _fill(file: Any, planned: Plan) -> None:
    """Write the trajectory into an open HDF5 file, one pulse at a time."""
    n_trains = len(planned.train.flip_angle)
    n_read, n_cycles = len(planned.pulses), planned.scan.cycles
    n_samples = planned.scan.n_samples
    spokes = file.create_dataset("trajectory", (n_read, n_cycles, n_samples, 3), dtype="f4")
    for row, pulse in enumerate(planned.pulses):
        spokes[row] = trajectory.spokes(planned.direction[pulse], planned.position)
    file["pulse"] = planned.pulses
    # Of the T' pulses those of one train are read cycle by cycle.
    order = np.arange(n_read * n_cycles).reshape(n_trains, n_cycles, n_read // n_trains)
    file["acquisition"] = order.transpose(0, 2, 1).reshape(n_read, n_cycles)
    start = (planned.window / 2) * GRADIENT_RASTER + planned.adc_delay
    file["sample_time"] = start + (np.arange(n_samples) + 0.5) * planned.dwell
    file["field_of_view"] = planned.scan.field_of_view
    file["matrix"] = planned.scan.matrix
    file["repetition_time"] = planned.train.repetition_time
    file["train_digest"] = planned.train.digest
