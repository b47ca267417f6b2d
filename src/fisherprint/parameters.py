"""Parameters by name, other ways to state them, and priors that samples are drawn from (§2.4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from fisherprint import _checks


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signal model.

    Attributes:
        name: the field's name, by which all code refers to it.
        symbol: LaTeX symbol for figures.
        unit: SI unit of all stored numbers; empty if dimensionless.
        bounds: physical limits in that unit; a model refuses what lies outside.
        display_unit: unit in which people read it (figures, reports).
        display_factor: stored value times this is the displayed value.
    """

    name: str
    symbol: str
    unit: str
    bounds: tuple[float, float]
    display_unit: str = ""
    display_factor: float = 1.0

    @property
    def label(self) -> str:
        """Symbol with the unit in which it is displayed."""
        return f"{self.symbol} ({self.display_unit})" if self.display_unit else self.symbol


@dataclass(frozen=True, eq=False)
class Conversion:
    """Another way to state a parameter where people read and write; inside, all numbers are SI.

    Attributes:
        parameter: as it is stated: its name, symbol, unit and bounds.
        forward: from the number inside to the stated one.
        slope: derivative of `forward`, which carries standard deviations over.
        backward: from the stated number to that inside.
        formula: what was done, for people.
    """

    parameter: Parameter
    forward: Callable[[NDArray[np.floating]], NDArray[np.floating]]
    slope: Callable[[NDArray[np.floating]], NDArray[np.floating]]
    backward: Callable[[NDArray[np.floating]], NDArray[np.floating]]
    formula: str


RATIO = "F"
"""Name of m0s stated as the ratio of both pools."""
# Stated units of an SI unit: how many of them it holds.
_UNITS = {
    "s": {"ms": 1e3, "µs": 1e6},
    "rad/s": {"Hz": 1 / (2 * np.pi)},
    "": {"%": 100.0},
}


def convert(parameter: Parameter, to: str) -> Conversion:
    r"""State a parameter otherwise: times in ms or µs, B0 in Hz, fractions in %, m0s as F.

    F is the ratio of both pools, m0s/m0f, that other tools use; with m0s + m0f = 1

        F = m0s / (1 − m0s),   dF/dm0s = 1 / (1 − m0s)²,   m0s = F / (1 + F)

    Args:
        parameter: in SI units.
        to: a unit, or "F" for m0s.

    Raises:
        ValueError: no such way to state this parameter; the message lists those there are.
    """
    if parameter.name == "m0s" and to == RATIO:
        low, high = parameter.bounds
        ratio = Parameter(RATIO, "$F$", "", (low / (1 - low), high / (1 - high)))
        return Conversion(
            ratio,
            forward=lambda m0s: m0s / (1 - m0s),
            slope=lambda m0s: 1 / (1 - m0s) ** 2,
            backward=lambda F: F / (1 + F),
            formula="F = m0s/(1 - m0s)",
        )
    known = _UNITS.get(parameter.unit, {})
    if to not in known:
        ways = [*known, *([RATIO] if parameter.name == "m0s" else [])]
        raise ValueError(
            f"expected a way to state {parameter.name} ({parameter.unit or 'no unit'}): "
            f"{_checks.listing(ways)}; got {to!r}. Name one, or leave it in SI units."
        )
    factor = known[to]
    low, high = (bound * factor for bound in parameter.bounds)
    stated = Parameter(parameter.name, parameter.symbol, to, (low, high), to)
    return Conversion(
        stated,
        forward=lambda values: values * factor,
        slope=lambda values: np.full_like(values, factor),
        backward=lambda values: values / factor,
        formula=f"{parameter.name} in {to} = {factor:.6g} {parameter.name}"
        + (f" in {parameter.unit}" if parameter.unit else ""),
    )


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal distribution N(mean, std²) restricted to [low, high]."""

    mean: float
    std: float
    low: float = -np.inf
    high: float = np.inf

    def __post_init__(self) -> None:
        _checks.positive("std of a truncated normal", self.std)
        if not (np.isfinite(self.mean) and self.low < self.high):
            raise ValueError(
                "a truncated normal needs a finite mean and low < high; got "
                f"mean {self.mean}, low {self.low}, high {self.high}. Are the limits swapped?"
            )
        below, above = self._probabilities()
        if not below < above:
            raise ValueError(
                f"a truncated normal needs limits within reach of its mean {self.mean} ± "
                f"{self.std}; got low {self.low}, high {self.high}, between which there is no "
                "probability. Move the mean, or use a uniform distribution."
            )

    def sample(self, size: int, *, rng: Generator) -> NDArray[np.float64]:
        """`size` draws by inversion of the cumulative distribution."""
        draws = self.mean + self._side * self.std * ndtri(
            rng.uniform(*self._probabilities(), size)
        )
        # Inversion rounds to a hair outside the limits at their very edge.
        return np.clip(draws, self.low, self.high)

    @property
    def _side(self) -> int:
        """-1 where both limits lie above the mean: probabilities near 1 have no digits left."""
        return -1 if self.low > self.mean else 1

    def _probabilities(self) -> tuple[float, float]:
        limits = self._side * (np.array([self.low, self.high]) - self.mean) / self.std
        below, above = np.sort(ndtr(limits))
        return float(below), float(above)


@dataclass(frozen=True)
class Uniform:
    """Uniform distribution on [low, high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"a uniform distribution needs finite low < high; got {self.low} and {self.high}. "
                "Are the limits swapped?"
            )

    def sample(self, size: int, *, rng: Generator) -> NDArray[np.float64]:
        """`size` independent draws."""
        return rng.uniform(self.low, self.high, size)


Distribution = TruncatedNormal | Uniform


@dataclass(frozen=True)
class Prior:
    """Independent distributions by parameter name, with order constraints between parameters.

    Attributes:
        distributions: one distribution for each name; their order is the order of columns.
        ordered: pairs (a, b) that must satisfy a ≤ b; joint draws that violate one are rejected.
    """

    distributions: Mapping[str, Distribution]
    ordered: Sequence[tuple[str, str]] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "distributions", MappingProxyType(dict(self.distributions)))
        for pair in self.ordered:
            for name in pair:
                _checks.index(name, self.names)

    def __reduce__(self) -> tuple[type[Prior], tuple[dict[str, Distribution], Any]]:
        # A read-only view cannot be pickled, and worker processes need the prior.
        return Prior, (dict(self.distributions), self.ordered)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the sampled columns."""
        return tuple(self.distributions)

    def sample(self, size: int, *, rng: Generator) -> NDArray[np.float64]:
        """`size` accepted joint draws, shape (S, P), in SI units.

        Raises:
            ValueError: the order constraints reject more than 99.9 % of the draws.
        """
        accepted: list[NDArray[np.float64]] = []
        missing, tried = size, 0
        while missing > 0:
            draws = np.stack(
                [d.sample(2 * missing + 16, rng=rng) for d in self.distributions.values()], axis=1
            )
            keep = np.ones(len(draws), dtype=bool)
            for lower, upper in self.ordered:
                columns = draws[:, self.names.index(lower)], draws[:, self.names.index(upper)]
                keep &= columns[0] <= columns[1]
            accepted.append(draws[keep][:missing])
            missing -= len(accepted[-1])
            tried += len(draws)
            if tried > 100_000 and (size - missing) < 1e-3 * tried:
                raise ValueError(
                    f"expected distributions that allow {list(self.ordered)} (a ≤ b); only "
                    f"{size - missing} of {tried} draws did. Shift their limits."
                )
        return np.concatenate(accepted) if accepted else np.empty((0, len(self.names)))


def paper_prior(names: Sequence[str], *, repetition_time: float) -> Prior:
    """The paper's prior (§2.4) with the gaps closed as docs/decisions/002-priors.md says.

    Args:
        names: parameters of the two-pool model, with `T1`, or with `T1f` and `T1s`; or of the
            single pool, whose T2 has the prior of T2f.
        repetition_time: TR in s; B0 is uniform in ±π/TR, one period of the signal.

    Raises:
        KeyError: a name without a distribution here.
    """
    known: dict[str, Distribution] = {
        "m0s": TruncatedNormal(0.12, 0.08, low=0.0, high=0.6),
        "T1": TruncatedNormal(1.6, 0.8, low=0.1, high=10.0),
        "T1f": Uniform(0.5, 5.0),
        "T1s": Uniform(0.1, 1.0),
        "T2f": TruncatedNormal(0.1, 0.2, low=2e-3, high=10.0),
        "Rx": TruncatedNormal(44.0, 20.0, low=0.0, high=200.0),
        "T2s": TruncatedNormal(12e-6, 3e-6, low=6e-6, high=20e-6),
        "B0": Uniform(-np.pi / repetition_time, np.pi / repetition_time),
        "B1": TruncatedNormal(1.0, 0.3, low=0.3, high=1.4),
    }
    known["T2"] = known["T2f"]
    for name in names:
        _checks.index(name, tuple(known))
    longitudinal = "T1f" if "T1f" in names else "T1"
    transverse = "T2" if "T2" in names else "T2f"
    ordered = ((transverse, longitudinal),) if {transverse, longitudinal} <= set(names) else ()
    return Prior({name: known[name] for name in names}, ordered)
