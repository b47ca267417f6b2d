"""A scan worked out: timing, gradients and trajectory, before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.reconstruct import trajectory
from fisherprint.sequence import PulseTrain

Array = NDArray[np.float64]

# Of protons, as pypulseq has it. The file holds frequencies; tesla are for people.
GAMMA = 42.576e6  # Hz/T
# Rasters of the format and of common scanners, s.
GRADIENT_RASTER = 10e-6
ADC_RASTER = 100e-9
# Those that fit the gradient raster and the microseconds in which the file holds delays.
RF_RASTERS = (1e-7, 2e-7, 5e-7, 1e-6, 2e-6, 5e-6, 1e-5)
# Part of a raster time by which a time may miss it: rounding of a file, not another duration.
ON_RASTER = 1e-4
# Amplitudes have six digits in the file; gradients stay that far below their limits.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Scan:
    """How a train is played and read out.

    Attributes:
        field_of_view: edge of the imaged cube, m.
        matrix: voxels along this edge.
        cycles: how often the train is played and read out; each time with other spokes.
        dummy_cycles: how often it is played before, without readout, until steady.
        readout_time: of a spoke, s; None for the longest that the repetition time allows.
        oversampling: samples along a spoke for each voxel.
        crusher: cycles of phase across a voxel by the gradient on each side of the inversion.
        max_gradient: limit for each axis, T/m.
        max_slew: limit for each axis, T/m/s.
        rf_raster: on which pulses start and last, s; one of `RF_RASTERS`.
        rf_dead_time: before a pulse, s.
        rf_ringdown_time: after a pulse, s.
        adc_dead_time: before and after a readout, s.

    Raises:
        ValueError: a value that is not positive, or not in SI units.
    """

    field_of_view: float = 0.256
    matrix: int = 256
    cycles: int = 180
    dummy_cycles: int = 2
    readout_time: float | None = None
    oversampling: int = 2
    crusher: float = 4.0
    max_gradient: float = 40e-3
    max_slew: float = 150.0
    rf_raster: float = 1e-6
    rf_dead_time: float = 100e-6
    rf_ringdown_time: float = 30e-6
    adc_dead_time: float = 10e-6

    def __post_init__(self) -> None:
        for name, low, high, unit, hint in (
            ("field_of_view", 1e-3, 2.0, "m", "Is it in mm?"),
            ("max_gradient", 1e-3, 1.0, "T/m", "Is it in mT/m?"),
            ("max_slew", 1.0, 1e3, "T/m/s", "Is it in mT/m/s?"),
            ("crusher", 0.5, 100.0, "cycles across a voxel", "Is it in rad?"),
        ):
            _within(name, getattr(self, name), low, high, unit, hint)
        for name, low in (("matrix", 2), ("cycles", 1), ("dummy_cycles", 0), ("oversampling", 1)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < low:
                raise ValueError(
                    f"{name} must be a whole number of at least {low}; got {value!r}. Correct it."
                )
        if self.readout_time is not None:
            _within("readout_time", self.readout_time, 1e-5, 0.1, "s", "Is it in ms?")
        for name in ("rf_dead_time", "rf_ringdown_time", "adc_dead_time"):
            _within(name, getattr(self, name), 0.0, 5e-3, "s", "Is it in µs?")
        if not any(math.isclose(self.rf_raster, known, rel_tol=1e-6) for known in RF_RASTERS):
            raise ValueError(
                f"rf_raster must be one of {_checks.listing(f'{r:g}' for r in RF_RASTERS)} s; "
                f"got {self.rf_raster}. Is it in µs?"
            )
        if self.n_samples % 4:
            raise ValueError(
                "matrix · oversampling must be a multiple of 4, as scanners read samples in "
                f"fours; got {self.matrix} · {self.oversampling}. Change one of them."
            )

    @property
    def n_samples(self) -> int:
        """R: samples along a spoke."""
        return int(self.matrix * self.oversampling)


@dataclass(frozen=True)
class Trapezoid:
    """A gradient with equal ramps.

    Attributes:
        rise: duration of each ramp, in gradient rasters.
        flat: duration between them, likewise.
        amplitude: Hz/m.
    """

    rise: int
    flat: int
    amplitude: float

    @property
    def length(self) -> int:
        """In gradient rasters."""
        return 2 * self.rise + self.flat

    @property
    def slew(self) -> float:
        """Hz/m/s."""
        return abs(self.amplitude) / (self.rise * GRADIENT_RASTER)


@dataclass(frozen=True)
class Plan:
    """The scan worked out, before anything is written.

    Attributes:
        train: what is played.
        scan: how.
        window: duration of the block with the pulse, in gradient rasters.
        gap: of the block with the spoke, likewise.
        readout: gradient of a spoke during its readout.
        rewinder: gradient before and after it.
        crusher: gradient on each axis, on each side of an inversion.
        dwell: from sample to sample, s.
        adc_delay: from the start of the gap to that of the readout, s.
        position: of the samples along a spoke, shape (R,), in 1/(field of view).
        direction: of the spokes, shape (T, S, 3): all pulses, cycles. Of unit length to the six
            digits of the file.
        pulses: which of the T pulses are read out, shape (T',).
    """

    train: PulseTrain
    scan: Scan
    window: int
    gap: int
    readout: Trapezoid
    rewinder: Trapezoid
    crusher: Trapezoid
    dwell: float
    adc_delay: float
    position: Array
    direction: Array
    pulses: NDArray[np.int64]

    @property
    def n_repetitions(self) -> int:
        """Pulses of the whole scan, dummy cycles included."""
        return self.train.n_samples * (self.scan.dummy_cycles + self.scan.cycles)

    @property
    def duration(self) -> float:
        """Of the scan, s."""
        return self.n_repetitions * self.train.repetition_time

    @property
    def readout_time(self) -> float:
        """Of a spoke, s."""
        return self.scan.n_samples * self.dwell

    @property
    def peak_gradient(self) -> float:
        """On an axis, T/m."""
        return max(abs(g.amplitude) for g in self._gradients) / GAMMA

    @property
    def peak_slew(self) -> float:
        """On an axis, T/m/s."""
        return max(g.slew for g in self._gradients) / GAMMA

    @property
    def peak_b1(self) -> float:
        """Largest α/TRF, T."""
        rate = np.abs(self.train.flip_angle) / self.train.pulse_duration
        return float(rate.max() / (2 * np.pi * GAMMA))

    @property
    def _gradients(self) -> tuple[Trapezoid, ...]:
        return self.readout, self.rewinder, self.crusher

    @property
    def spoke_length(self) -> int:
        """Of all three lobes, in gradient rasters."""
        return self.readout.length + 2 * self.rewinder.length

    def spoke(self) -> tuple[Array, Array]:
        """Corners of the gradient along a spoke: time from its start in s, amplitude in Hz/m."""
        time, amplitude = [0], [0.0]
        for lobe in (self.rewinder, self.readout, self.rewinder):
            for lasts, value in (
                (lobe.rise, lobe.amplitude),
                (lobe.flat, lobe.amplitude),
                (lobe.rise, 0.0),
            ):
                if lasts:
                    time.append(time[-1] + lasts)
                    amplitude.append(value)
        return np.array(time) * GRADIENT_RASTER, np.array(amplitude)


def plan(train: PulseTrain, scan: Scan | None = None) -> Plan:
    """Work out a scan: timing, gradients, trajectory.

    Args:
        train: the pulse train; several are played one after the other, each with its dummies.
        scan: how it is played; the defaults where it is None.

    Raises:
        ValueError: times off their raster, or gradients that do not fit into the repetition
            time; the message says what would fit.
    """
    scan = Scan() if scan is None else scan
    if train.flip_angle.shape[1] < 3:
        raise ValueError(
            "a scan needs a train of at least 3 pulses, as no spoke is read beside the "
            f"inversion; got {train.flip_angle.shape[1]}. Give a longer train."
        )
    _require_raster(train, scan.rf_raster)
    repetition = round(train.repetition_time / GRADIENT_RASTER)
    if abs(train.repetition_time / GRADIENT_RASTER - repetition) > ON_RASTER:
        raise ValueError(
            f"the repetition time must be a multiple of {1e6 * GRADIENT_RASTER:g} µs, the raster "
            f"of gradients and blocks; got {1e6 * train.repetition_time:.9g} µs. "
            f"Take {10 * repetition} µs and simulate with that."
        )
    # The same margin on both sides, so that the middle of the pulse is that of the window.
    margin = max(scan.rf_dead_time, scan.rf_ringdown_time)
    margin = math.ceil(margin / scan.rf_raster - ON_RASTER) * scan.rf_raster
    window = _rasters(train.pulse_duration.max() + 2 * margin)
    gap = repetition - window
    readout, rewinder, dwell = _spoke(scan, gap, train.repetition_time)
    crusher = _trapezoid(scan.crusher * scan.matrix / scan.field_of_view / math.sqrt(3), scan)
    if crusher.length > gap:
        raise ValueError(
            f"the crushers need {_ms(crusher.length)} on each side of the inversion; the "
            f"repetition time of {1e3 * train.repetition_time:g} ms leaves {_ms(gap)}. Lower "
            f"crusher from {scan.crusher:g} cycles across a voxel, or raise the limits of the "
            "gradients."
        )
    # The file holds delays in whole µs; the trajectory has what rounding moves.
    step = max(scan.rf_raster, 1e-6)
    length, middle = scan.n_samples * dwell, gap * GRADIENT_RASTER / 2
    adc_delay = round((middle - length / 2) / step) * step
    shift = (adc_delay + length / 2 - middle) / (dwell * scan.oversampling)
    n_trains, n_pulses = train.flip_angle.shape
    # Consecutive in time over the whole scan, read out or not.
    ball = trajectory.koosh_ball(n_trains * scan.cycles * n_pulses)
    ball = ball.reshape(n_trains, scan.cycles, n_pulses, 3).transpose(0, 2, 1, 3)
    peak = max(abs(readout.amplitude), abs(rewinder.amplitude))
    # The two gaps beside an inversion have its crushers instead of a spoke.
    read = np.ones((n_trains, n_pulses), dtype=bool)
    read[:, [0, -1]] = False
    return Plan(
        train=train,
        scan=scan,
        window=window,
        gap=gap,
        readout=readout,
        rewinder=rewinder,
        crusher=crusher,
        dwell=dwell,
        adc_delay=adc_delay,
        position=trajectory.readout(scan.matrix, scan.oversampling) + shift,
        direction=six_digits(peak * ball.reshape(train.n_samples, scan.cycles, 3)) / peak,
        pulses=np.flatnonzero(read),
    )


def on_raster(train: PulseTrain, raster: float = 1e-6) -> PulseTrain:
    """The train with its pulse durations rounded to a raster; flip angles stay as they are."""
    duration = np.maximum(np.round(train.pulse_duration / raster), 1) * raster
    return PulseTrain(
        train.flip_angle,
        duration,
        train.repetition_time,
        train.inversion,
        train.phase_increment,
    )


def _spoke(scan: Scan, gap: int, repetition_time: float) -> tuple[Trapezoid, Trapezoid, float]:
    """Readout, rewinder and dwell time of the longest readout, or of the one asked for."""
    limit = GAMMA * scan.max_gradient * (1 - _ROUNDING)
    # The start of the readout is moved to its raster, by half a step at most.
    slack = max(scan.rf_raster, 1e-6)
    unit = scan.n_samples * ADC_RASTER
    # The shortest readout is that of the strongest gradient, area N / (field of view).
    fewest = math.ceil(scan.matrix / (scan.field_of_view * limit * unit))
    if scan.readout_time is None:
        # Beyond the strongest gradient too: its ramps are the longest.
        most = max(2 * fewest, math.floor((gap * GRADIENT_RASTER - slack) / unit))
    else:
        most = max(1, math.floor(scan.readout_time / unit + ON_RASTER))
        if most < fewest:
            raise ValueError(
                f"readout_time must be at least {1e3 * fewest * unit:.4g} ms for this "
                f"field_of_view and matrix, by max_gradient {1e3 * scan.max_gradient:g} mT/m; "
                f"got {1e3 * scan.readout_time:.4g} ms. Is it in ms? Else read out longer."
            )
        fewest = most
    shortest = math.inf
    for dwells in range(most, fewest - 1, -1):
        dwell = dwells * ADC_RASTER
        amplitude = scan.matrix / (scan.field_of_view * scan.n_samples * dwell)
        flat = _rasters(dwells * unit + slack)
        # With the parity of the gap the spoke sits in its middle.
        flat += (gap - flat) % 2
        rise = _rasters(amplitude / (GAMMA * scan.max_slew * (1 - _ROUNDING)))
        readout = Trapezoid(rise, flat, amplitude)
        rewinder = _trapezoid(amplitude * (flat + rise) * GRADIENT_RASTER / 2, scan)
        needed = readout.length + 2 * rewinder.length
        needed = max(needed, flat + 2 * _rasters(scan.adc_dead_time))
        if needed <= gap:
            rewinder = Trapezoid(rewinder.rise, rewinder.flat, -rewinder.amplitude)
            return readout, rewinder, dwell
        shortest = min(shortest, needed)
    shorter = "" if scan.readout_time is None else " a shorter readout_time,"
    raise ValueError(
        f"the gradients of a spoke need {_ms(shortest)}; the repetition time of "
        f"{1e3 * repetition_time:g} ms leaves {_ms(max(gap, 0))} beside the pulse. Take a "
        f"repetition time longer by {_ms(shortest - gap)},{shorter} a larger field_of_view, a "
        "smaller matrix, or higher limits of the gradients."
    )


def _trapezoid(area: float, scan: Scan) -> Trapezoid:
    """The shortest trapezoid of this area, in 1/m, within the limits of one axis."""
    gradient = GAMMA * scan.max_gradient * (1 - _ROUNDING)
    slew = GAMMA * scan.max_slew * (1 - _ROUNDING)
    if area * slew <= gradient**2:
        rise, flat = _rasters(math.sqrt(area / slew)), 0
    else:
        rise = _rasters(gradient / slew)
        flat = max(_rasters(area / gradient) - rise, 0)
    return Trapezoid(rise, flat, area / ((rise + flat) * GRADIENT_RASTER))


def _require_raster(train: PulseTrain, raster: float) -> None:
    steps = train.pulse_duration / raster
    off = np.abs(steps - np.round(steps)) > ON_RASTER
    if off.any():
        which, pulse = (int(i) for i in np.argwhere(off)[0])
        fits = [r for r in RF_RASTERS if _all_on(train.pulse_duration, r)]
        remedy = (
            f"Set rf_raster={max(fits):g} if the scanner has it, or round"
            if fits
            else "No raster fits: round"
        )
        raise ValueError(
            f"pulse durations must be multiples of the RF raster {1e6 * raster:g} µs; got "
            f"{int(off.sum())} of {off.size} that are not, the first "
            f"{1e6 * train.pulse_duration[which, pulse]:.9g} µs at pulse {pulse} of train "
            f"{which}. {remedy} them with pulseq.on_raster (--round-durations), and simulate "
            "with the rounded train."
        )


def _all_on(duration: Array, raster: float) -> bool:
    steps = duration / raster
    return bool((np.abs(steps - np.round(steps)) <= ON_RASTER).all())


def six_digits(values: ArrayLike, *, up: bool = False) -> Array:
    """Values as the file holds amplitudes; rounded up in magnitude, or to the nearest."""
    array = np.asarray(values, dtype=np.float64)
    safe = np.where(array == 0, 1.0, np.abs(array))
    unit = 10.0 ** (np.floor(np.log10(safe)) - 5)
    if not up:
        return np.round(array / unit) * unit
    # What has six digits already keeps them.
    return np.sign(array) * np.ceil(np.abs(array) / unit * (1 - 1e-12)) * unit


def _rasters(time: float) -> int:
    """Gradient rasters that hold a time."""
    return math.ceil(time / GRADIENT_RASTER - ON_RASTER)


def _ms(rasters: float) -> str:
    return f"{1e3 * rasters * GRADIENT_RASTER:.2f} ms"


def _within(name: str, value: float, low: float, high: float, unit: str, hint: str) -> None:
    if not low <= value <= high:  # NaN included
        raise ValueError(
            f"{name} must lie within {low:g} and {high:g} {unit}; got {value}. "
            f"{hint if value > high else 'Check its unit.'}"
        )
