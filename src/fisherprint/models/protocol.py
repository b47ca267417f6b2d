"""What every signal model offers; nothing downstream knows which model it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.parameters import Parameter
from fisherprint.sequence import PulseTrain


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """Signals of many parameter sets for M0 = 1, with their derivatives.

    Attributes:
        theta: parameters, shape (S, P), SI units.
        signal: shape (S, T), complex128.
        jacobian: ∂signal/∂θ, shape (S, T, P), complex128.
    """

    theta: NDArray[np.float64]
    signal: NDArray[np.complex128]
    jacobian: NDArray[np.complex128]


@dataclass(frozen=True, eq=False)
class ControlSlopes:
    """Slopes of a number J by the controls of a pulse train.

    Attributes:
        flip_angle: ∂J/∂α in 1/rad, shape (trains, pulses).
        pulse_duration: ∂J/∂TRF in 1/s, the same shape.
    """

    flip_angle: NDArray[np.float64]
    pulse_duration: NDArray[np.float64]


@runtime_checkable
class SignalModel(Protocol):
    """A map from tissue and system parameters to a sampled complex signal."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The P parameters, in the order of the columns of θ."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        ...

    @property
    def n_samples(self) -> int:
        """T, the number of time points."""
        ...

    def index(self, name: str) -> int:
        """Column of a parameter; an unknown name raises a KeyError that lists the known ones."""
        ...

    def simulate(self, theta: NDArray[np.float64]) -> Fingerprints:
        """Signal and exact Jacobian for θ of shape (S, P)."""
        ...

    def signal(self, theta: NDArray[np.float64]) -> NDArray[np.complex128]:
        """The signal alone, shape (S, T): the same numbers at a fraction of the cost."""
        ...


@runtime_checkable
class PulsedModel(SignalModel, Protocol):
    """A signal model of a pulse train that can be differentiated by the train."""

    @property
    def train(self) -> PulseTrain:
        """The pulse train."""
        ...

    def of(self, train: PulseTrain) -> PulsedModel:
        """The same model of another train."""
        ...

    def control_slopes(
        self,
        theta: NDArray[np.float64],
        by_signal: NDArray[np.complex128],
        by_jacobian: NDArray[np.complex128] | None = None,
    ) -> ControlSlopes:
        """From slopes by signal (S, T) and Jacobian (S, T, P) to those by the train, exactly.

        A slope by a complex number z is ∂J/∂Re z + i ∂J/∂Im z.
        """
        ...

    def magnetization(self, theta: NDArray[np.float64]) -> NDArray[np.float64]:
        """x, y and z of the free and z of the semi-solid pool at the echoes, shape (S, T, 4)."""
        ...


class Named:
    """Names and columns of a model's parameters."""

    parameters: tuple[Parameter, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the columns of θ."""
        return tuple(parameter.name for parameter in self.parameters)

    def index(self, name: str) -> int:
        """Column of a parameter; an unknown name raises a KeyError that lists the known ones."""
        return _checks.index(name, self.names)


def checked(theta: ArrayLike, parameters: Sequence[Parameter]) -> NDArray[np.float64]:
    """θ of shape (S, P) as float64, each value finite and within its parameter's bounds.

    Raises:
        ValueError: another shape, NaN or Inf, or a value outside the bounds.
    """
    theta = np.array(theta, dtype=np.float64)
    _checks.shape("theta", theta, [("S", None), ("P", len(parameters))])
    _checks.finite("theta", theta)
    for parameter, values in zip(parameters, theta.T, strict=True):
        low, high = parameter.bounds
        outside = (values < low) | (values > high)
        if outside.any():
            raise ValueError(
                f"{parameter.name} must lie in [{low}, {high}] {parameter.unit}; got "
                f"{values[outside][0]} (and {outside.sum() - 1} more). "
                "Check the units (SI) and the order of the parameters."
            )
    return theta
