"""How a network is trained, and what from (§2.4, §2.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fisherprint import _checks
from fisherprint.network import Normalization

LossName = Literal["crb", "mse", "relative", "bayesian", "bias-reduced"]

# Fields of the config that the bias-reduced loss alone uses.
_BIAS_REDUCED = ("realizations", "variance_weight", "variance_limit")


class TrainingConfig(BaseModel):
    """How a network is trained; the defaults are the paper's (§2.4, §2.6), but for the warm-up."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimated: tuple[str, ...] = Field(
        default=("m0s", "T1", "T2f"),
        min_length=1,
        description="parameters that the network estimates",
    )
    inputs: tuple[str, ...] = Field(
        default=(), description="parameters known from maps, which the network is given"
    )
    snr_input: bool = Field(
        default=False, description="give the network log(‖x‖/σ) beside the coefficients x"
    )
    bounded: bool = Field(
        default=False, description="keep the estimates within the range of the training set"
    )
    normalization: Normalization = Field(
        default="group", description="group, or batch as in the authors' code"
    )
    loss: LossName = Field(
        default="crb",
        description="crb (Eq. 1 of the paper), mse, relative, bayesian or bias-reduced",
    )
    realizations: int = Field(
        default=200, ge=2, description="N_r of the bias-reduced loss: noises of one fingerprint"
    )
    variance_weight: float = Field(
        default=1.0, ge=0, description="λ of the bias-reduced loss: of variance beyond the limit"
    )
    variance_limit: float = Field(
        default=1.0, ge=0, description="δ of the bias-reduced loss: free variance, in bounds"
    )
    epochs: int = Field(default=400, ge=1, description="passes through the training set")
    batch_size: int = Field(
        default=512,
        ge=1,
        description="inputs of the network in one step: fingerprints, times realizations",
    )
    learning_rate: float = Field(
        default=0.01, gt=0, description="step size of Adam in the first epochs"
    )
    # The paper names no warm-up. Without it the first steps of Adam at this rate move all weights
    # together and can silence half of the ReLUs: the loss then stays at that of a constant.
    warmup_steps: int = Field(
        default=200, ge=0, description="steps over which the rate rises from 0"
    )
    halve_every: int = Field(
        default=40, ge=1, description="epochs after which the learning rate halves"
    )
    learning_rate_floor: float = Field(
        default=1e-5, ge=0, description="the learning rate stops here"
    )
    average_steps: int = Field(
        default=0,
        ge=0,
        description="steps over which the network's weights are averaged; 0 takes the last ones",
    )
    scale_range: tuple[float, float] = Field(
        default=(0.1, 1.0), description="limits of the uniformly drawn |M0|"
    )
    noise_std: float = Field(
        default=0.01,
        gt=0,
        description="σ of the real and of the imaginary part each; SNRmax = |M0|/σ",
    )
    remove_phase: bool = Field(
        default=False, description="turn the coefficients so that the first is real"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the wide matrix products; weights and sums stay float32"
    )
    compiled: bool = Field(
        default=False,
        description="compile the step; pays for its minute from some thousand steps on",
    )
    seed: int = Field(
        default=0, ge=0, description="of the initial weights, the order and the noise"
    )

    @field_validator("estimated", "inputs")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"expected different parameters; got {names}. Name each once.")
        return names

    @model_validator(mode="after")
    def _known_or_estimated(self) -> Self:
        both = set(self.inputs) & set(self.estimated)
        if both:
            raise ValueError(
                f"expected inputs that are not estimated; got {_checks.listing(sorted(both))} in "
                "both. Drop each from one."
            )
        return self

    @model_validator(mode="after")
    def _options_of_the_loss(self) -> Self:
        if self.loss == "bias-reduced":
            if self.batch_size % self.realizations:
                raise ValueError(
                    "expected a batch_size that is a multiple of realizations = "
                    f"{self.realizations}; got {self.batch_size}. It counts inputs of the "
                    f"network: {32 * self.realizations} are 32 fingerprints."
                )
            return self
        for name in _BIAS_REDUCED:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f'expected {name} with loss = "bias-reduced"; got it with {self.loss!r}, '
                    "which has no use for it. Drop it, or change the loss."
                )
        return self

    @field_validator("scale_range")
    @classmethod
    def _positive_range(cls, limits: tuple[float, float]) -> tuple[float, float]:
        if not 0 < limits[0] <= limits[1]:
            raise ValueError(
                f"expected 0 < low ≤ high; got {limits}. A signal of scale 0 has no bound."
            )
        return limits

    @model_validator(mode="after")
    def _floor_below_start(self) -> Self:
        if self.learning_rate_floor > self.learning_rate:
            raise ValueError(
                f"expected learning_rate_floor ≤ learning_rate = {self.learning_rate}; got "
                f"{self.learning_rate_floor}. Lower the floor."
            )
        return self

    @property
    def noises(self) -> tuple[int, ...]:
        """Axis of noise realizations of one fingerprint and M0: (N_r,), or () where it has one."""
        return (self.realizations,) if self.loss == "bias-reduced" else ()

    @property
    def fingerprints(self) -> int:
        """Fingerprints in a step."""
        return self.batch_size // math.prod(self.noises)

    def learning_rate_at(self, epoch: int, step: int) -> float:
        """Learning rate of a step: halved every `halve_every` epochs, after the warm-up (§2.6).

        Args:
            epoch: counted from 1.
            step: counted from 1 since the start of the training, not of the epoch.
        """
        halvings = (epoch - 1) // self.halve_every
        rate = max(self.learning_rate * 0.5**halvings, self.learning_rate_floor)
        return rate * min(1.0, step / self.warmup_steps) if self.warmup_steps else rate


@dataclass(frozen=True, eq=False)
class Samples:
    """Fingerprints in the subspace with their truth and their bounds.

    Attributes:
        names: parameters, in the order of the columns.
        coefficients: for M0 = 1 without noise, shape (S, K), complex.
        theta: true parameters, shape (S, E), SI units.
        crb: bound of θ from the coefficients for σ = |M0| = 1, shape (S, E), those units squared;
            infinite where the Fisher information is singular.

    Raises:
        ValueError: shapes that do not fit, no samples, NaN, or a bound that is not positive.
    """

    names: tuple[str, ...]
    coefficients: NDArray[Any]
    theta: NDArray[np.float64]
    crb: NDArray[np.float64]

    def __post_init__(self) -> None:
        _checks.shape("coefficients", self.coefficients, [("S", None), ("K", None)])
        axes = [("S", len(self.coefficients)), ("E", len(self.names))]
        _checks.shape("theta", self.theta, axes)
        _checks.shape("crb", self.crb, axes)
        if len(self.theta) == 0:
            raise ValueError("samples must not be empty; got S = 0. Simulate some.")
        _checks.finite("coefficients", self.coefficients)
        _checks.finite("theta", self.theta)
        bad = ~(self.crb > 0)
        if bad.any():
            raise ValueError(
                f"crb must be positive or infinite; got {self.crb[bad][0]} in {int(bad.sum())} "
                f"of {bad.size} values. Give an infinite bound where the information is singular."
            )

    def select(self, names: Sequence[str]) -> Samples:
        """The same samples with these parameters alone, in this order; KeyError if unknown."""
        columns = [_checks.index(name, self.names) for name in names]
        return Samples(
            tuple(names), self.coefficients, self.theta[:, columns], self.crb[:, columns]
        )
