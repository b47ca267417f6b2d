"""Pulse trains: flip angles, pulse durations, repetition time, inversion (§2.8)."""

from __future__ import annotations

import hashlib
import traceback
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import h5py
import numpy as np
import tomli_w
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks, _storage

Inversion = Literal["crushed", "spoiled"]
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class PulseTrain:
    """One or several trains of radio-frequency pulses, each repeated for ever (§2.8).

    The first pulse of each train is the inversion. From pulse to pulse the phase grows by a fixed
    increment, and the receiver follows. Several trains are several cycles: each is periodic by
    itself, and their signals stand one after the other.

    Attributes:
        flip_angle: α in rad, shape (trains, pulses); one train may be given as (pulses,).
        pulse_duration: TRF in s, the same shape.
        repetition_time: TR in s.
        inversion: `crushed` (gradients refocus the inverted path) or `spoiled` (all transverse
            magnetization is lost before and after it).
        phase_increment: in rad, within ±2π: by this the magnetization turns against the pulses
            in each repetition, in the sense of a positive B0. So the phase of the RF pulses
            falls by it from one to the next; π alternates it.

    Raises:
        ValueError: values that are not finite, not of one shape, not in SI units, or a pulse
            that outlasts the repetition time.
    """

    flip_angle: NDArray[np.float64]
    pulse_duration: NDArray[np.float64]
    repetition_time: float
    inversion: Inversion = "crushed"
    phase_increment: float = np.pi

    def __post_init__(self) -> None:
        angle = _as_trains("flip angles", self.flip_angle)
        duration = _as_trains("pulse durations", self.pulse_duration)
        _checks.shape(
            "pulse durations", duration, [("trains", angle.shape[0]), ("pulses", angle.shape[1])]
        )
        repetition_time = _checks.positive("the repetition time", self.repetition_time)
        if repetition_time > 0.5:
            raise ValueError(
                f"the repetition time must be in s and below 0.5 s; got {repetition_time}. "
                "Is it in ms?"
            )
        if duration.min() <= 0:
            raise ValueError(
                f"pulse durations must be positive; got {duration.min()} s. "
                "Drop pulses that are not played."
            )
        if duration.max() >= repetition_time:
            raise ValueError(
                f"pulse durations must stay below the repetition time {repetition_time} s; "
                f"got {duration.max()} s. {_duration_hint(duration, repetition_time)}"
            )
        if np.abs(angle).max() > 2 * np.pi:
            raise ValueError(
                "flip angles must lie within ±2π rad; got "
                f"{angle.flat[np.abs(angle).argmax()]}. Are the angles in degrees?"
            )
        if np.abs(angle[:, 0] - np.pi).max() > 0.2:
            raise ValueError(
                "the first pulse of each train must be the inversion, π within 0.2 rad; got "
                f"{angle[:, 0]}. Roll the train so that it starts with its inversion, "
                "and give angles in rad."
            )
        if self.inversion not in get_args(Inversion):
            raise ValueError(
                f"the inversion must be one of {get_args(Inversion)}; got {self.inversion!r}. "
                "Choose `crushed` if gradients flank the pulse, else `spoiled`."
            )
        if not abs(self.phase_increment) <= 2 * np.pi:  # NaN included
            raise ValueError(
                f"the phase increment must lie within ±2π rad; got {self.phase_increment}. "
                "Is it in degrees?"
            )
        object.__setattr__(self, "phase_increment", float(self.phase_increment))
        angle.setflags(write=False)
        duration.setflags(write=False)
        object.__setattr__(self, "flip_angle", angle)
        object.__setattr__(self, "pulse_duration", duration)
        object.__setattr__(self, "repetition_time", repetition_time)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle forgets what is read-only. Without it a worker's train could be changed, and the
        # kernels, compiled for read-only arrays, would be compiled once more.
        for name in ("flip_angle", "pulse_duration"):
            state[name].setflags(write=False)
        self.__dict__.update(state)

    @property
    def n_samples(self) -> int:
        """T: pulses of all trains, one sample each."""
        return self.flip_angle.size

    @property
    def duration(self) -> float:
        """Length of one cycle through all trains, in s."""
        return self.n_samples * self.repetition_time

    @property
    def rf_power(self) -> float:
        """Mean over time of ω1², in (rad/s)²: Σ α²/TRF over the duration."""
        return float((self.flip_angle**2 / self.pulse_duration).sum() / self.duration)

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies the train: all its attributes."""
        kind = np.frombuffer(self.inversion.encode(), dtype=np.uint8)
        # Left out where it is π: trains had that increment alone before there was a choice.
        increment = [] if self.phase_increment == np.pi else [np.array(self.phase_increment)]
        return _storage.digest(
            self.flip_angle, self.pulse_duration, np.array(self.repetition_time), kind, *increment
        )

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        repetition_time: float | None = None,
        inversion: Inversion | None = None,
        phase_increment: float | None = None,
    ) -> PulseTrain:
        """Read a train from `.mat` (v5, v7.3), `.h5`, `.toml` or `.seq`.

        A `.mat` file has the keys `alpha` (rad) and `TRF` (s), one train a column; our own
        formats have `flip_angle`, `pulse_duration` (trains, pulses), `repetition_time`,
        `inversion` and `phase_increment`. Of a `.seq` file, as `pulseq.write` makes it, angles
        and durations are those of its pulses; it needs the optional package pypulseq.

        Args:
            path: the file; its suffix says the format.
            repetition_time: TR in s; required for `.mat`, which holds none. Where the file has
                one, it must agree.
            inversion: likewise; `crushed` where neither says.
            phase_increment: likewise, in rad; π where neither says.

        Raises:
            UnreadableFileError: no such file, damaged, foreign, or without a key.
            ValueError: contents that are no pulse train, or that disagree with an argument.
            ImportError: a `.seq` file without pypulseq.
        """
        path = Path(path)
        readers = {
            ".mat": _read_mat,
            ".h5": _read_hdf5,
            ".hdf5": _read_hdf5,
            ".toml": _read_toml,
            ".seq": _read_seq,
        }
        if path.suffix.lower() not in readers:
            raise _storage.UnreadableFileError(
                f"expected a pulse train as {_checks.listing(readers)}; got {path}. "
                "Rename the file if it has one of these formats, else convert it."
            )
        contents = readers[path.suffix.lower()](path)
        angle, duration, own_time, own_inversion, own_increment = contents
        time = _agreed("repetition time", own_time, repetition_time, path)
        if time is None:
            raise ValueError(
                f"{path} holds no repetition time. Give one: repetition_time in s, or "
                "--repetition-time in ms."
            )
        kind = _agreed("inversion", own_inversion, inversion, path)
        increment = _agreed("phase increment", own_increment, phase_increment, path)
        return cls(
            angle,
            duration,
            time,
            "crushed" if kind is None else kind,
            np.pi if increment is None else increment,
        )

    def write(self, path: str | Path) -> None:
        """Write the train as `.toml` or `.h5`; an existing file is replaced whole or not at all.

        Raises:
            ValueError: another suffix.
        """
        path = Path(path)
        if path.suffix == ".toml":
            content = {
                "repetition_time": self.repetition_time,
                "inversion": self.inversion,
                "phase_increment": self.phase_increment,
                "flip_angle": self.flip_angle.tolist(),
                "pulse_duration": self.pulse_duration.tolist(),
            }
            with _storage.replacing(path) as temporary:
                temporary.write_bytes(tomli_w.dumps(content).encode())
        elif path.suffix in (".h5", ".hdf5"):
            with _storage.new_hdf5(path) as file:
                self.write_to(file)
        else:
            raise ValueError(
                f"a pulse train is written as .toml or .h5; got {path}. Change the suffix."
            )

    def write_to(self, group: h5py.Group) -> None:
        """Store the train in an open HDF5 group."""
        group["flip_angle"] = self.flip_angle
        group["pulse_duration"] = self.pulse_duration
        group["repetition_time"] = self.repetition_time
        group["inversion"] = self.inversion
        group["phase_increment"] = self.phase_increment

    @classmethod
    def read_from(cls, group: h5py.Group) -> PulseTrain:
        """The train stored in an HDF5 group by `write_to`."""
        return cls(
            group["flip_angle"][()],
            group["pulse_duration"][()],
            float(group["repetition_time"][()]),
            group["inversion"].asstr()[()],
            # Files of early versions have none.
            float(group["phase_increment"][()]) if "phase_increment" in group else np.pi,
        )


def bundled() -> PulseTrain:
    """The train that comes with the package: 1142 pulses, TR 3.5 ms (4 s), crushed inversion.

    `fisherprint design designs/bundled.toml` found it (docs/decisions/003-bundled-train.md).
    """
    with resources.as_file(resources.files("fisherprint") / "bundled.toml") as path:
        return PulseTrain.read(path)


# Angles and durations as the file has them; repetition time, inversion and phase increment if it
# has them.
_Contents = tuple[Any, Any, float | None, Any, float | None]


def _read_mat(path: Path) -> _Contents:
    arrays = _storage.read_arrays(path, ["alpha", "TRF"])
    return _columns_to_trains(arrays["alpha"]), _columns_to_trains(arrays["TRF"]), None, None, None


def _columns_to_trains(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """MATLAB holds a train as a column; a single row is one train too."""
    return array if array.ndim == 2 and array.shape[0] == 1 else array.T


def _read_hdf5(path: Path) -> _Contents:
    keys = ["flip_angle", "pulse_duration", "repetition_time", "inversion"]
    there = "phase_increment" in _storage.array_names(path)
    arrays = _storage.read_arrays(path, [*keys, "phase_increment"] if there else keys)
    kind = arrays["inversion"].item()
    return (
        arrays["flip_angle"],
        arrays["pulse_duration"],
        float(arrays["repetition_time"]),
        kind.decode() if isinstance(kind, bytes) else str(kind),
        float(arrays["phase_increment"]) if there else None,
    )


def _read_toml(path: Path) -> _Contents:
    content = _storage.read_toml(path)
    for key in ("flip_angle", "pulse_duration", "repetition_time"):
        if key not in content:
            raise _storage.UnreadableFileError(
                f"expected the key {key!r} in {path}; it has {_checks.listing(content)}. "
                "Add it, or name a file with a pulse train."
            )
    for key in ("repetition_time", "phase_increment"):
        if not isinstance(content.get(key, 0.0), float | int):
            raise ValueError(
                f"expected {key} as a number, in s or rad, in {path}; got {content[key]!r}. "
                "Write it without quotes."
            )
    return (
        content["flip_angle"],
        content["pulse_duration"],
        content["repetition_time"],
        content.get("inversion"),
        content.get("phase_increment"),
    )


def load_pypulseq() -> Any:
    """The optional package pypulseq.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import pypulseq
    except ImportError as error:
        raise ImportError(
            "Pulseq files need the optional package pypulseq, which is not installed. "
            'Install it: pip install "fisherprint[pulseq]".'
        ) from error
    return pypulseq


def _read_seq(path: Path) -> _Contents:
    """Trains of a Pulseq file of `pulseq.write`: what its pulses play, checked in all cycles."""
    pypulseq = load_pypulseq()
    _require_signature(path)
    sequence = pypulseq.Sequence()
    with warnings.catch_warnings():
        # It warns of files of other versions, and leaves open a file that it cannot read.
        warnings.simplefilter("ignore")
        try:
            sequence.read(str(path), remove_duplicates=False)
        except Exception as error:  # many kinds
            traceback.clear_frames(error.__traceback__)
            raise _storage.UnreadableFileError(
                f"expected a Pulseq file; {path} cannot be read: {error!r}. Export it again."
            ) from error
    keys = ["RepetitionTime", "PhaseIncrement", "Inversion", "Trains", "PulsesPerCycle"]
    for key in (*keys, "Cycles", "DummyCycles"):
        if key not in sequence.definitions:
            raise _foreign(
                path, f"the definition {key}", _checks.listing(sorted(sequence.definitions))
            )
    time, increment = (float(sequence.definitions[key]) for key in keys[:2])
    n_trains, n_pulses, cycles, dummies = (
        int(sequence.definitions[key])
        for key in ("Trains", "PulsesPerCycle", "Cycles", "DummyCycles")
    )
    blocks = np.array(list(sequence.block_events.values()), dtype=np.int64).reshape(-1, 7)
    played = np.flatnonzero(blocks[:, 1])
    if len(played) != n_trains * (dummies + cycles) * n_pulses:
        raise _foreign(
            path,
            f"{n_trains} x {dummies + cycles} cycles of {n_pulses} pulses",
            f"{len(played)} pulses",
        )
    known, which = np.unique(blocks[played, 1], return_inverse=True)
    # Flip angle without sign, duration, phase, and the middle of the pulse in its block.
    table = np.array([_rectangle(sequence, number, path) for number in known])
    angle, duration, phase, middle = table[which].T
    starts = np.r_[0, np.cumsum(list(sequence.block_durations.values()))[:-1]]
    spacing = np.diff(starts[played] + middle)
    if np.abs(spacing - time).max() > 1.01 * sequence.rf_raster_time:
        raise _foreign(
            path,
            f"pulses every {time} s",
            f"distances of {spacing.min():.9g} to {spacing.max():.9g} s",
        )
    # The magnetization turns against the pulses; the inversion acts about an axis a quarter turn
    # from that of the other pulses.
    expected = -increment * np.arange(len(played))
    expected[::n_pulses] += np.pi / 2
    sign = np.cos(phase - expected)
    if np.abs(np.abs(sign) - 1).max() > 1e-6:
        number = int(np.abs(np.abs(sign) - 1).argmax())
        raise _foreign(
            path,
            f"phases that change by {-increment} rad",
            f"{phase[number]:.6g} rad at pulse {number} of the scan",
        )
    shape = (n_trains, dummies + cycles, n_pulses)
    angle, duration = (np.sign(sign) * angle).reshape(shape), duration.reshape(shape)
    for what, values in (("flip angles", angle), ("pulse durations", duration)):
        if np.ptp(values, axis=1).max() > 1e-9:
            raise _foreign(path, f"the same {what} in each cycle", "others in some")
    return angle[:, 0], duration[:, 0], time, str(sequence.definitions["Inversion"]), increment


def _require_signature(path: Path) -> None:
    """The last section of a Pulseq file hashes what precedes it; pypulseq does not look."""
    _storage.require_file(path)
    content, mark, signature = (
        path.read_bytes().replace(b"\r\n", b"\n").rpartition(b"\n[SIGNATURE]")
    )
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if not mark or digest.encode() not in signature:
        what = "another signature than its contents have" if mark else "none"
        raise _storage.UnreadableFileError(
            f"expected a Pulseq file that ends with its signature; {path} has {what}: it is "
            "truncated, was changed, or is no such file. Export or copy it again."
        )


def _rectangle(sequence: Any, number: int, path: Path) -> tuple[float, float, float, float]:
    """Flip angle, duration, phase and the middle in its block, of a rectangular pulse."""
    pulse = sequence.rf_from_lib_data(sequence.rf_library.data[number])
    height, duration = np.abs(pulse.signal), float(pulse.t[-1] - pulse.t[0])
    if duration <= 0 or np.ptp(height) > 1e-6 * height.max():
        raise _foreign(path, "rectangular pulses", f"another shape in RF event {number}")
    angle = 2 * np.pi * float(np.trapezoid(height, pulse.t))
    phase = float(pulse.phase_offset + np.angle(pulse.signal[0]))
    return angle, duration, phase, float(pulse.delay + (pulse.t[0] + pulse.t[-1]) / 2)


def _foreign(path: Path, expected: str, got: str) -> _storage.UnreadableFileError:
    return _storage.UnreadableFileError(
        f"expected a Pulseq file of a pulse train, as `fisherprint export` writes it, with "
        f"{expected}; {path} has {got}. Give a file of this kind, or the train itself."
    )


def _agreed(what: str, own: _T | None, asked: _T | None, path: Path) -> _T | None:
    if own is not None and asked is not None and own != asked:
        raise ValueError(
            f"{path} says {what} {own}, the call says {asked}. Drop the argument or mend the file."
        )
    return asked if own is None else own


def _as_trains(name: str, values: ArrayLike) -> NDArray[np.float64]:
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex ones; the phase alternates by π and is not given")
        array = np.array(values, dtype=np.float64, ndmin=2)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be real numbers of shape (trains, pulses), trains of equal length; "
            f"got {error}. Give one row a train, as real numbers."
        ) from error
    _checks.finite(name, array)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            f"{name} must have the axes (trains, pulses) with at least 2 pulses; "
            f"got the shape {array.shape}. Give one row a train, its inversion first."
        )
    return array


def _duration_hint(duration: NDArray[np.float64], repetition_time: float) -> str:
    for factor, unit in ((1e-3, "ms"), (1e-6, "µs")):
        # A wrong unit makes all pulses too long, not one of them.
        if np.median(duration) > repetition_time > factor * duration.max():
            return f"Are the durations in {unit}?"
    return "Shorten the pulses."
