"""The two-pool magnetization-transfer model with generalized Bloch saturation (§2.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.models import kernels, lineshape
from fisherprint.models.protocol import Fingerprints
from fisherprint.parameters import Parameter
from fisherprint.sequence import PulseTrain

_INF = float("inf")
PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter("m0s", r"$m_0^s$", "", (0.0, 0.999)),
        Parameter("T1", r"$T_1$", "s", (1e-3, _INF), "s"),
        Parameter("T1f", r"$T_1^f$", "s", (1e-3, _INF), "s"),
        Parameter("T1s", r"$T_1^s$", "s", (1e-3, _INF), "s"),
        Parameter("T2f", r"$T_2^f$", "s", (1e-4, _INF), "ms", 1e3),
        Parameter("Rx", r"$R_x$", "1/s", (0.0, 1e4), "1/s"),
        Parameter("T2s", r"$T_2^s$", "s", (1e-6, 1e-4), "µs", 1e6),
        Parameter("B0", r"$\omega_0$", "rad/s", (-_INF, _INF), "rad/s"),
        Parameter("B1", r"$B_1$", "", (1e-3, 10.0)),
    )
}
APPARENT = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
_SEPARATE = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1")

# Physical parameters of the kernel that each model parameter sets; those of a time by its inverse.
_SETS = {
    "m0s": ("m0s",),
    "T1": ("R1f", "R1s"),
    "T1f": ("R1f",),
    "T1s": ("R1s",),
    "T2f": ("R2f",),
    "Rx": ("Rx",),
    "T2s": ("T2s",),
    "B0": ("B0",),
    "B1": ("B1",),
}
_AS_RATE = ("T1", "T1f", "T1s", "T2f")


class TwoPool:
    """Free and semi-solid protons through a periodic pulse train, M0 = 1.

    The free pool follows the Bloch equations, the semi-solid pool the linearized generalized
    Bloch equation with a super-Lorentzian lineshape; both relax and exchange (§2.3;
    doi:10.1002/mrm.29071). The sample of a pulse is xf + i·yf at its echo, TR/2 after its centre.

    Args:
        train: the pulse train; several trains give their signals one after the other.
        parameters: names in the wanted order, with `T1` (apparent, both pools) or with `T1f`
            and `T1s`.

    Raises:
        KeyError: an unknown name.
        ValueError: a name is missing or comes twice.
    """

    def __init__(self, train: PulseTrain, parameters: Sequence[str] = APPARENT) -> None:
        for name in parameters:
            _checks.index(name, tuple(PARAMETERS))
        if sorted(parameters) not in (sorted(APPARENT), sorted(_SEPARATE)):
            raise ValueError(
                f"expected the parameters {APPARENT} or {_SEPARATE}, in any order; "
                f"got {tuple(parameters)}. Give all of one set, each once."
            )
        self.train = train
        self.parameters = tuple(PARAMETERS[name] for name in parameters)
        self._seed = np.zeros((len(self.parameters), len(kernels.PHYSICAL)))
        for row, parameter in enumerate(self.parameters):
            for name in _SETS[parameter.name]:
                self._seed[row, kernels.PHYSICAL.index(name)] = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the columns of θ."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def n_samples(self) -> int:
        """T: pulses of all trains."""
        return self.train.n_samples

    def index(self, name: str) -> int:
        """Column of a parameter; an unknown name raises a KeyError that lists the known ones."""
        return _checks.index(name, self.names)

    def simulate(self, theta: ArrayLike) -> Fingerprints:
        """Signals and exact derivatives for M0 = 1.

        Args:
            theta: parameter sets, shape (S, P), SI units.

        Returns:
            signal (S, T) and jacobian (S, T, P), complex128.

        Raises:
            ValueError: wrong shape, NaN or Inf, or a value outside the parameter's bounds.
            NoLinearizedRateError: B1·α beyond the angle up to which the semi-solid pool has a
                linearized rate.
        """
        theta = self._checked(theta)
        result = self._run(theta, self._seed)
        for column, name in enumerate(self.names):
            if name in _AS_RATE:
                # d/dT = -1/T² d/dR
                result[:, 1 + column] /= -(theta[:, None, column] ** 2)
        # Without a semi-solid pool nothing depends on its relaxation and exchange. Rounding would
        # remain, 1e-18, and nobody downstream could tell it from a derivative.
        empty = theta[:, self.index("m0s")] == 0
        for name in {"Rx", "T1s", "T2s"}.intersection(self.names):
            result[empty, 1 + self.index(name)] = 0
        return Fingerprints(theta, result[:, 0], result[:, 1:].mT)

    def signal(self, theta: ArrayLike) -> NDArray[np.complex128]:
        """The signal alone, shape (S, T); arguments and errors as for `simulate`."""
        return self._run(self._checked(theta), self._seed[:0])[:, 0]

    def _checked(self, theta: ArrayLike) -> NDArray[np.float64]:
        theta = np.array(theta, dtype=np.float64)
        _checks.shape("theta", theta, [("S", None), ("P", len(self.parameters))])
        _checks.finite("theta", theta)
        for parameter, values in zip(self.parameters, theta.T, strict=True):
            low, high = parameter.bounds
            outside = (values < low) | (values > high)
            if outside.any():
                raise ValueError(
                    f"{parameter.name} must lie in [{low}, {high}] {parameter.unit}; got "
                    f"{values[outside][0]} (and {outside.sum() - 1} more). "
                    "Check the units (SI) and the order of the parameters."
                )
        durations, angles = self.train.pulse_duration, self.train.flip_angle
        t2s, b1 = theta[:, self.index("T2s")], theta[:, self.index("B1")]
        if len(theta):
            lineshape.check_range(
                durations.min() / t2s.max(),
                durations.max() / t2s.min(),
                np.abs(angles).max() * b1.max(),
            )
        return theta

    def _physical(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        tissue = np.empty((len(kernels.PHYSICAL), len(theta)))
        for parameter, values in zip(self.parameters, theta.T, strict=True):
            for name in _SETS[parameter.name]:
                rate = parameter.name in _AS_RATE
                tissue[kernels.PHYSICAL.index(name)] = 1 / values if rate else values
        return tissue

    def _run(
        self, theta: NDArray[np.float64], seed: NDArray[np.float64]
    ) -> NDArray[np.complex128]:
        """Signal and derivatives along the directions of `seed`, shape (S, 1 + D, T).

        Groups of lanes are spread over the cores.
        """
        tissue = self._physical(theta)
        table = kernels.entries(seed)
        coefficients = lineshape.rate_table()
        n_trains, n_pulses = self.train.flip_angle.shape
        result = np.empty((len(theta), 1 + len(seed), self.n_samples), dtype=np.complex128)

        def group(first: int) -> None:
            # A last group that is not full repeats its last member.
            members = np.minimum(np.arange(first, first + kernels.LANES), len(theta) - 1)
            for train in range(n_trains):
                kernels.train_signal(
                    np.ascontiguousarray(tissue[:, members]),
                    seed,
                    table,
                    self.train.flip_angle[train],
                    self.train.pulse_duration[train],
                    self.train.repetition_time,
                    self.train.inversion == "crushed",
                    coefficients,
                    result,
                    first,
                    train * n_pulses,
                )

        # The kernel releases the interpreter's lock, so threads run at once.
        with ThreadPoolExecutor(_usable_cores()) as pool:
            list(pool.map(group, range(0, len(theta), kernels.LANES)))
        return result


def _usable_cores() -> int | None:
    """Cores that this process may use: not all of the machine's in a job or a container."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
