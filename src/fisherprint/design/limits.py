"""What a train may be: ranges, power, amplitude, smoothness; what breaks a limit, by how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from fisherprint.sequence import PulseTrain

Floats = NDArray[np.float64]

# Limits other than ranges are aimed at with this margin, so that the last train keeps them.
MARGIN = 2e-3


class LimitsError(ValueError):
    """Limits that contradict each other, or a train that breaks them.

    Attributes:
        broken: the limits, by name, with what breaks them.
    """

    def __init__(self, message: str, broken: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.broken = dict(broken or {})


@dataclass(frozen=True)
class Limits:
    """What a train may be. Inversions are left as they are and do not count, except for power.

    Attributes:
        flip_angle: range in rad; kept at every step of the search.
        pulse_duration: range in s; likewise. The other limits are kept by every train that is
            delivered, and by penalties on the way.
        rf_power: largest mean of ω1², in (rad/s)².
        peak_b1: largest ω1 = α/TRF, in rad/s.
        flip_angle_change: largest change of α from pulse to pulse, in rad.
        flip_angle_roughness: largest root mean square of the second difference of α, in rad; slow
            changes keep the spins in a hybrid state (doi:10.1038/s42005-019-0174-0).
        pulse_duration_change: largest change of TRF from pulse to pulse, in s.
        raster: of the durations of a delivered train, in s.

    Raises:
        LimitsError: limits that no train can keep.
    """

    flip_angle: tuple[float, float] = (0.0, np.pi)
    pulse_duration: tuple[float, float] = (100e-6, 500e-6)
    rf_power: float | None = None
    peak_b1: float | None = None
    flip_angle_change: float | None = None
    flip_angle_roughness: float | None = None
    pulse_duration_change: float | None = None
    raster: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("flip_angle", "pulse_duration"):
            low, high = getattr(self, name)
            if not 0 <= low < high < np.inf:
                raise LimitsError(
                    f"expected {name} as [low, high] with 0 ≤ low < high; got [{low}, {high}]. "
                    "Swap or correct them."
                )
        for item in fields(self)[2:]:
            value = getattr(self, item.name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise LimitsError(
                    f"expected {item.name} as a positive number; got {value}. Correct it."
                )
        low, high = self.pulse_duration
        if not 0 < self.raster <= low or np.ceil(low / self.raster) > high / self.raster + 1e-9:
            raise LimitsError(
                f"expected a range of durations above zero with a multiple of the raster "
                f"{self.raster} s in it; got [{low}, {high}] s. Widen it, or refine the raster."
            )
        least = self.flip_angle[0] / high
        if self.peak_b1 is not None and least > self.peak_b1:
            raise LimitsError(
                f"the smallest flip angle {self.flip_angle[0]} rad within the longest duration "
                f"{high} s already needs ω1 = {least:.4g} rad/s; got peak_b1 {self.peak_b1:.4g}. "
                "Raise peak_b1, or allow smaller angles or longer pulses."
            )

    def require_room(self, train: PulseTrain) -> None:
        """Require that a train of this size and inversion can keep the limit of RF power.

        Raises:
            LimitsError: the smallest angles in the longest pulses already exceed it.
        """
        if self.rf_power is None:
            return
        angle, duration = train.flip_angle.copy(), train.pulse_duration.copy()
        angle[:, 1:], duration[:, 1:] = self.flip_angle[0], self.pulse_duration[1]
        least = float((angle**2 / duration).sum() / train.duration)
        if least > self.rf_power:
            raise LimitsError(
                f"the inversions and the smallest flip angles in the longest pulses already take "
                f"an RF power of {least:.4g} (rad/s)²; got the limit {self.rf_power:.4g}. Raise "
                "it, prolong the inversion, or allow smaller angles."
            )

    def broken(self, train: PulseTrain) -> dict[str, str]:
        """The limits that a train does not keep, each with what it has; empty if it keeps all."""
        angle, duration = train.flip_angle[:, 1:], train.pulse_duration[:, 1:]
        result = {}
        for name, values, unit in (
            ("flip_angle", angle, "rad"),
            ("pulse_duration", duration, "s"),
        ):
            low, high = getattr(self, name)
            slack = 1e-9 * high
            if values.min() < low - slack or values.max() > high + slack:
                result[name] = (
                    f"{values.min():.6g} to {values.max():.6g} {unit}, not within {low:.6g} to "
                    f"{high:.6g}"
                )
        for name, value, _ in self._quantities(train):
            limit, worst = getattr(self, name), float(np.max(value))
            if worst > limit * (1 + 1e-9):
                result[name] = f"{worst:.6g}, above {limit:.6g}"
        return result

    def require_kept(self, train: PulseTrain, what: str) -> None:
        """Require that a train keeps all limits.

        Raises:
            LimitsError: it does not; the message and `broken` name each.
        """
        broken = self.broken(train)
        if broken:
            listed = "; ".join(f"{name}: {text}" for name, text in broken.items())
            raise LimitsError(
                f"expected {what} within the limits; got {listed}. Widen these limits, or begin "
                "with another train.",
                broken,
            )

    def on_raster(self, train: PulseTrain) -> PulseTrain:
        """The train with durations on the raster: rounded up, which lowers power and peak."""
        duration = train.pulse_duration.copy()
        # 1e-6 of a step is rounding, not a duration that needs one more.
        steps = np.ceil(duration[:, 1:] / self.raster - 1e-6)
        highest = np.floor(self.pulse_duration[1] / self.raster + 1e-6)
        duration[:, 1:] = self.raster * np.minimum(steps, highest)
        return replace(train, pulse_duration=duration)

    def excess(self, train: PulseTrain) -> tuple[Floats, list[_Pull]]:
        """Limited quantities over their limits, less one; and the transposes of their slopes.

        Ranges are left out. The limits are taken with the margin that a delivered train needs.
        """
        values, pulls = [], []
        for name, value, pull in self._quantities(train):
            limit = getattr(self, name) * (1 - MARGIN)
            if name == "pulse_duration_change":
                # Rounding to the raster may add one step.
                limit = max(limit - self.raster, 0.1 * limit)
            flat = np.ravel(value) / limit
            values.append(flat - 1)
            pulls.append((flat.size, _scaled(pull, np.shape(value), 1 / limit)))
        return (np.concatenate(values) if values else np.empty(0)), pulls

    def _quantities(self, train: PulseTrain) -> Iterator[tuple[str, Floats, _Transpose]]:
        """What has a limit: name, value, and the map from slopes by it to those by (α, TRF)."""
        angle, duration = train.flip_angle, train.pulse_duration
        a, d = angle[:, 1:], duration[:, 1:]
        zero = np.zeros_like(a)
        if self.rf_power is not None:
            total = np.array(train.rf_power)
            yield (
                "rf_power",
                total,
                lambda g: (g * 2 * a / d / train.duration, -g * (a / d) ** 2 / train.duration),
            )
        if self.peak_b1 is not None:
            yield "peak_b1", a / d, lambda g: (g / d, -g * a / d**2)
        if self.flip_angle_change is not None:
            step = np.diff(a, axis=1)
            yield (
                "flip_angle_change",
                np.abs(step),
                lambda g: (_diff_back(g * np.sign(step)), zero),
            )
        if self.flip_angle_roughness is not None:
            bend = np.diff(a, 2, axis=1)
            rough = np.array(np.sqrt((bend**2).mean()))
            yield (
                "flip_angle_roughness",
                rough,
                lambda g: (_diff_back(_diff_back(g * bend / (bend.size * (rough or 1.0)))), zero),
            )
        if self.pulse_duration_change is not None:
            longer = np.diff(d, axis=1)
            yield (
                "pulse_duration_change",
                np.abs(longer),
                lambda g: (zero, _diff_back(g * np.sign(longer))),
            )


_Transpose = Callable[..., tuple[Floats, Floats]]
_Pull = tuple[int, Callable[[Floats], tuple[Floats, Floats]]]


def _scaled(
    pull: _Transpose, shape: tuple[int, ...], factor: float
) -> Callable[[Floats], tuple[Floats, Floats]]:
    return lambda slopes: pull(factor * slopes.reshape(shape))


def _diff_back(slopes: Floats) -> Floats:
    """Transpose of the difference along the last axis."""
    return -np.diff(slopes, axis=1, prepend=0, append=0)
