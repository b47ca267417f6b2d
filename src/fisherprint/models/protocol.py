"""What every signal model offers; nothing downstream knows which model it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks
from fisherprint.parameters import Parameter


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
