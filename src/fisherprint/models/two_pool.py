"""The two-pool magnetization-transfer model (§2.3), and the single pool it is without one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.models import cycle, kernels, lineshape
from fisherprint.models.cycle import Saturation
from fisherprint.models.protocol import ControlSlopes, Fingerprints, Named, checked
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
        Parameter("T2", r"$T_2$", "s", (1e-4, _INF), "ms", 1e3),
        Parameter("T2f", r"$T_2^f$", "s", (1e-4, _INF), "ms", 1e3),
        Parameter("Rx", r"$R_x$", "1/s", (0.0, 1e4), "1/s"),
        Parameter("T2s", r"$T_2^s$", "s", (1e-6, 1e-4), "µs", 1e6),
        Parameter("B0", r"$\omega_0$", "rad/s", (-_INF, _INF), "rad/s"),
        Parameter("B1", r"$B_1$", "", (1e-3, 10.0)),
    )
}
APPARENT = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
SEPARATE = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1")
SINGLE = ("T1", "T2", "B0", "B1")

# The physical parameter that each model parameter sets; those of a time by its inverse.
_SETS = {
    **{name: name for name in ("m0s", "Rx", "T2s", "B0", "B1")},
    **{"T1": "R1f", "T1f": "R1f", "T1s": "R1s", "T2": "R2f", "T2f": "R2f"},
}
_AS_RATE = ("T1", "T1f", "T1s", "T2", "T2f")


class TwoPool(Named):
    """Free and semi-solid protons through a periodic pulse train, M0 = 1.

    The free pool follows the Bloch equations, the semi-solid pool the generalized Bloch equation
    with a super-Lorentzian lineshape; both relax and exchange (§2.3; doi:10.1002/mrm.29071). The
    sample of a pulse is xf + i·yf at its echo, TR/2 after its centre.

    Args:
        train: the pulse train; several trains give their signals one after the other.
        parameters: names in the wanted order, with `T1` (apparent, both pools) or with `T1f`
            and `T1s`.
        saturation: of the semi-solid pool during a pulse. `linearized`: the linear rate that
            ends the pulse with the zs of the generalized Bloch equation. `graham`: Graham's
            saturation rate, as in older work. `generalized Bloch`: the integro-differential
            equation itself, a reference some thousand times slower.

    Raises:
        KeyError: an unknown name.
        ValueError: a name is missing or comes twice, or another saturation.
    """

    def __init__(
        self,
        train: PulseTrain,
        parameters: Sequence[str] = APPARENT,
        *,
        saturation: Saturation = "linearized",
    ) -> None:
        for name in parameters:
            _checks.index(name, tuple(known for known in PARAMETERS if known != "T2"))
        if sorted(parameters) not in (sorted(APPARENT), sorted(SEPARATE)):
            raise ValueError(
                f"expected the parameters {APPARENT} or {SEPARATE}, in any order; "
                f"got {tuple(parameters)}. Give all of one set, each once."
            )
        if saturation not in get_args(Saturation):
            raise ValueError(
                f"expected a saturation of {_checks.listing(get_args(Saturation))}; got "
                f"{saturation!r}. Choose one of them."
            )
        self.train = train
        self.parameters = tuple(PARAMETERS[name] for name in parameters)
        self.saturation: Saturation = saturation

    @property
    def n_samples(self) -> int:
        """T: pulses of all trains."""
        return self.train.n_samples

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
        by = [_SETS[name] for name in self.names]
        result = cycle.signals(
            self.train, self._tissue(theta), self.saturation, by, self._scale(theta)
        )
        return Fingerprints(theta, result[:, 0], result[:, 1:].mT)

    def signal(self, theta: ArrayLike) -> NDArray[np.complex128]:
        """The signal alone, shape (S, T); arguments and errors as for `simulate`."""
        theta = self._checked(theta)
        return cycle.signals(self.train, self._tissue(theta), self.saturation)[:, 0]

    def of(self, train: PulseTrain) -> TwoPool:
        """The same model of another train."""
        return TwoPool(train, self.names, saturation=self.saturation)

    def control_slopes(
        self, theta: ArrayLike, by_signal: ArrayLike, by_jacobian: ArrayLike | None = None
    ) -> ControlSlopes:
        """From slopes by signal and Jacobian to those by flip angles and durations, exactly.

        Reverse mode: the cycle forwards, then one adjoint pass backwards (`models.adjoint`).

        Args:
            theta: parameter sets, shape (S, P), SI units.
            by_signal: ∂J/∂Re s + i ∂J/∂Im s of a number J, shape (S, T).
            by_jacobian: the same by the Jacobian, shape (S, T, P); None: J does not depend on it.

        Returns:
            ∂J/∂α and ∂J/∂TRF, each summed over the parameter sets.

        Raises:
            ValueError: as for `simulate`; or the saturation is `generalized Bloch`.
        """
        theta = self._checked(theta)
        return _control_slopes(
            self,
            theta,
            self._tissue(theta),
            self.saturation,
            self._scale(theta),
            by_signal,
            by_jacobian,
        )

    def magnetization(self, theta: ArrayLike) -> NDArray[np.float64]:
        """x, y and z of the free and z of the semi-solid pool at the echoes, shape (S, T, 4).

        In units of the equilibrium magnetization of both pools together; arguments and errors as
        for `control_slopes`.
        """
        theta = self._checked(theta)
        return cycle.magnetization(self.train, self._tissue(theta), self.saturation)

    def _scale(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        scale = _chain_rule(theta, self.parameters)
        # Without a semi-solid pool nothing depends on its relaxation and exchange. Rounding would
        # remain, 1e-18, and nobody downstream could tell it from a derivative.
        empty = theta[:, self.index("m0s")] == 0
        for name in {"Rx", "T1s", "T2s"}.intersection(self.names):
            scale[self.index(name), empty] = 0
        return scale

    def _checked(self, theta: ArrayLike) -> NDArray[np.float64]:
        theta = checked(theta, self.parameters)
        durations, angles = self.train.pulse_duration, self.train.flip_angle
        t2s, b1 = theta[:, self.index("T2s")], theta[:, self.index("B1")]
        if len(theta):
            lineshape.check_range(
                durations.min() / t2s.max(),
                durations.max() / t2s.min(),
                # Of the three only the linearized rate ends to exist at some angle.
                np.abs(angles).max() * b1.max() if self.saturation == "linearized" else 0.0,
            )
        return theta

    def _tissue(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        tissue = _physical(theta, self.parameters)
        if "T1" in self.names:
            tissue[kernels.R1S] = tissue[kernels.R1F]
        return tissue


class SinglePool(Named):
    """Free protons alone, by the Bloch equations with pulses of finite duration, M0 = 1.

    The two-pool model at m0s = 0 without its cost; parameters T1, T2, B0 and B1.

    Args:
        train: the pulse train; several trains give their signals one after the other.
        parameters: names in the wanted order.

    Raises:
        KeyError: an unknown name.
        ValueError: a name is missing or comes twice.
    """

    def __init__(self, train: PulseTrain, parameters: Sequence[str] = SINGLE) -> None:
        for name in parameters:
            _checks.index(name, SINGLE)
        if sorted(parameters) != sorted(SINGLE):
            raise ValueError(
                f"expected the parameters {SINGLE}, in any order; got {tuple(parameters)}. "
                "Give each of them once."
            )
        self.train = train
        self.parameters = tuple(PARAMETERS[name] for name in parameters)

    @property
    def n_samples(self) -> int:
        """T: pulses of all trains."""
        return self.train.n_samples

    def simulate(self, theta: ArrayLike) -> Fingerprints:
        """Signals and exact derivatives; arguments, results and errors as for `TwoPool`."""
        theta = checked(theta, self.parameters)
        by = [_SETS[name] for name in self.names]
        scale = _chain_rule(theta, self.parameters)
        result = cycle.signals(self.train, self._tissue(theta), None, by, scale)
        return Fingerprints(theta, result[:, 0], result[:, 1:].mT)

    def signal(self, theta: ArrayLike) -> NDArray[np.complex128]:
        """The signal alone, shape (S, T)."""
        theta = checked(theta, self.parameters)
        return cycle.signals(self.train, self._tissue(theta), None)[:, 0]

    def of(self, train: PulseTrain) -> SinglePool:
        """The same model of another train."""
        return SinglePool(train, self.names)

    def control_slopes(
        self, theta: ArrayLike, by_signal: ArrayLike, by_jacobian: ArrayLike | None = None
    ) -> ControlSlopes:
        """Slopes by flip angles and durations; arguments, result and errors as for `TwoPool`."""
        theta = checked(theta, self.parameters)
        scale = _chain_rule(theta, self.parameters)
        return _control_slopes(
            self, theta, self._tissue(theta), None, scale, by_signal, by_jacobian
        )

    def magnetization(self, theta: ArrayLike) -> NDArray[np.float64]:
        """x, y and z at the echoes and a zero, shape (S, T, 4)."""
        theta = checked(theta, self.parameters)
        return cycle.magnetization(self.train, self._tissue(theta), None)

    def _tissue(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        tissue = _physical(theta, self.parameters)
        # Equal rates keep the closed form of the recovery on its exact branch.
        tissue[kernels.R1S] = tissue[kernels.R1F]
        return tissue


def _control_slopes(
    model: TwoPool | SinglePool,
    theta: NDArray[np.float64],
    tissue: NDArray[np.float64],
    saturation: Saturation | None,
    scale: NDArray[np.float64],
    by_signal: ArrayLike,
    by_jacobian: ArrayLike | None,
) -> ControlSlopes:
    sets, samples = ("S", len(theta)), ("T", model.n_samples)
    by_signal = _checks.finite("slopes by the signal", by_signal)
    _checks.shape("slopes by the signal", by_signal, [sets, samples])
    names: tuple[str, ...] = ()
    rows = [by_signal[:, None]]
    if by_jacobian is not None:
        names = model.names
        by_jacobian = _checks.finite("slopes by the jacobian", by_jacobian)
        _checks.shape("slopes by the jacobian", by_jacobian, [sets, samples, ("P", len(names))])
        rows.append(by_jacobian.mT)
    by_sample = np.concatenate(rows, axis=1).astype(np.complex128, order="C")
    by = [_SETS[name] for name in names]
    slopes = cycle.control_slopes(
        model.train, tissue, saturation, by, scale[: len(names)], by_sample
    ).sum(axis=0)
    angle, duration = slopes.reshape(2, *model.train.flip_angle.shape)
    return ControlSlopes(angle, duration)


def _physical(theta: NDArray[np.float64], parameters: Sequence[Parameter]) -> NDArray[np.float64]:
    """`kernels.PHYSICAL` as far as the parameters say it, shape (8, S); else 0."""
    tissue = np.zeros((len(kernels.PHYSICAL), len(theta)))
    for parameter, values in zip(parameters, theta.T, strict=True):
        row = kernels.PHYSICAL.index(_SETS[parameter.name])
        tissue[row] = 1 / values if parameter.name in _AS_RATE else values
    return tissue


def _chain_rule(
    theta: NDArray[np.float64], parameters: Sequence[Parameter]
) -> NDArray[np.float64]:
    """∂(physical parameter)/∂(model parameter), shape (P, S): dR/dT = -1/T², else 1."""
    scale = np.ones(theta.T.shape)
    for row, (parameter, values) in enumerate(zip(parameters, theta.T, strict=True)):
        if parameter.name in _AS_RATE:
            scale[row] = -1 / values**2
    return scale
