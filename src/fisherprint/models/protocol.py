"""What every signal model offers; nothing downstream knows which model it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

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
