"""Training: losses, augmentation by M0 and noise, and the one loop (§2.2, §2.6)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Generator, Tensor
from torch.optim import Adam

from fisherprint import _checks
from fisherprint.network import Network

LossName = Literal["crb", "mse", "relative"]

# |θ| below this fraction of the prior spread counts as that fraction in the relative loss.
RELATIVE_FLOOR = 0.01

# Streams of random numbers: epochs have their number, 1, 2, ...
_INITIAL_WEIGHTS = 0
_VALIDATION_SEED = 20220701
_VALIDATION_CHUNK = 16384


class TrainingConfig(BaseModel):
    """How a network is trained; the defaults are the paper's (§2.4, §2.6), but for the warm-up."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    estimated: tuple[str, ...] = Field(
        default=("m0s", "T1", "T2f"),
        min_length=1,
        description="parameters that the network estimates",
    )
    loss: LossName = Field(default="crb", description="crb (Eq. 1 of the paper), mse or relative")
    epochs: int = Field(default=400, ge=1, description="passes through the training set")
    batch_size: int = Field(default=512, ge=1, description="samples in one step")
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
    seed: int = Field(
        default=0, ge=0, description="of the initial weights, the order and the noise"
    )

    @field_validator("estimated")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError(f"expected different parameters; got {names}. Name each once.")
        return names

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


@dataclass(frozen=True)
class Epoch:
    """What happened in one epoch.

    Attributes:
        number: counted from 1.
        train_loss: mean of the chosen loss over the steps, before each step's update.
        validation_loss: the chosen loss on the validation set after the epoch.
        validation_losses: all losses on the validation set, by name; its noise is always the same.
        learning_rate: of Adam in the last step.
        seconds: wall time.
        steps: updates of the weights.
    """

    number: int
    train_loss: float
    validation_loss: float
    validation_losses: dict[str, float]
    learning_rate: float
    seconds: float
    steps: int


@dataclass(frozen=True, eq=False)
class State:
    """All that is needed to use the network or to train on: copies, on the CPU.

    Attributes:
        epochs: epochs done.
        config: how it was trained.
        weights: the network's `state_dict`; `Network.from_weights` makes the network.
        moments: Adam's tensors, keyed `<number of the weight>.<name>`; empty before the first
            epoch.
    """

    epochs: int
    config: TrainingConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


class DivergedError(ArithmeticError):
    """The loss became NaN or infinite.

    Attributes:
        state: the state after the last good epoch (the initial weights if the first one failed).
    """

    def __init__(self, epoch: int, loss: float, state: State) -> None:
        super().__init__(
            f"expected a finite loss; got {loss} in epoch {epoch}, after {state.epochs} good "
            "ones. Lower learning_rate and start again with --force."
        )
        self.state = state


def crb_loss(estimate: Tensor, truth: Tensor, crb: Tensor) -> Tensor:
    r"""Mean squared error in units of the Cramér-Rao bound (Eq. 1).

        L = 1/(S E) Σ_s Σ_e (θ̂ − θ)² / CRB

    A maximally efficient unbiased estimator scores 1. Where the bound is infinite there is no
    information: such terms weigh nothing and are not counted in S E.

    Args:
        estimate: θ̂, shape (S, E), in the parameters' units.
        truth: θ, shape (S, E), the same units.
        crb: bound of θ for this noise and this M0, shape (S, E), those units squared.
    """
    return ((estimate - truth).square() / crb).sum() / crb.isfinite().sum().clamp(min=1)


def mse_loss(estimate: Tensor, truth: Tensor) -> Tensor:
    r"""Mean squared error in the parameters' units, which it adds up all the same (§2.6).

        L = 1/(S E) Σ_s Σ_e (θ̂ − θ)²

    Args:
        estimate: θ̂, shape (S, E).
        truth: θ, shape (S, E).
    """
    return (estimate - truth).square().mean()


def relative_loss(estimate: Tensor, truth: Tensor, floor: Tensor) -> Tensor:
    r"""Mean relative absolute error (refs. 16, 17 and 27 of the paper).

        L = 1/(S E) Σ_s Σ_e |θ̂ − θ| / max(|θ|, floor)

    Args:
        estimate: θ̂, shape (S, E).
        truth: θ, shape (S, E).
        floor: smallest |θ| that is divided by, shape (E,); θ = 0 (no semi-solid pool) is legal.
    """
    return ((estimate - truth).abs() / truth.abs().maximum(floor)).mean()


def augment(
    coefficients: Tensor, crb: Tensor, config: TrainingConfig, generator: Generator
) -> tuple[Tensor, Tensor]:
    r"""Random M0 and noise for each sample, with the bound that goes with them (§2.4).

        c' = M0 c + ε,   |M0| ~ U(scale_range),  arg M0 ~ U(0, 2π),  Re ε, Im ε ~ N(0, σ²)
        CRB' = (σ/|M0|)² CRB

    The basis is orthonormal, so coefficients have the noise of the signal.

    Args:
        coefficients: c for M0 = 1, shape (S, K), complex.
        crb: bound for σ = |M0| = 1, shape (S, E).
        config: `scale_range` and σ = `noise_std`.
        generator: on the device of the tensors.

    Returns:
        c' and CRB', of the same shapes.
    """

    def uniform() -> Tensor:
        return torch.rand((len(crb), 1), generator=generator, dtype=crb.dtype, device=crb.device)

    low, high = config.scale_range
    scale = low + (high - low) * uniform()
    phase = 2 * torch.pi * uniform()
    noise = torch.randn(
        (*coefficients.shape, 2), generator=generator, dtype=crb.dtype, device=crb.device
    )
    noisy = torch.polar(scale, phase) * coefficients
    noisy = noisy + config.noise_std * torch.view_as_complex(noise)
    return noisy, crb * (config.noise_std / scale).square()


def train(
    training: Samples,
    validation: Samples,
    config: TrainingConfig,
    *,
    state: State | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[Epoch, State]]:
    """Train a network, yielding after each epoch what happened and the state to go on from (§2.6).

    Each epoch draws its order, its M0 and its noise anew, from a generator that depends on the
    seed and the epoch's number alone: a run resumed from a `state` repeats an uninterrupted one,
    bit for bit on the CPU. All draws are made on the CPU, so that devices see the same noise.

    Args:
        training: at least the parameters that `config.estimated` names.
        validation: likewise; its noise is the same in each epoch and for each seed.
        config: all else.
        state: where to resume; its config may differ in `epochs` alone.
        device: where the network is trained.

    Raises:
        KeyError: samples lack a parameter that is to be estimated.
        ValueError: samples or a state that do not fit the config or each other.
        DivergedError: the loss became NaN or infinite; it carries the last good state.
    """
    training, validation = training.select(config.estimated), validation.select(config.estimated)
    network, optimizer, state = _start(training, validation, config, state, torch.device(device))
    losses, products = _losses(network), getattr(torch, config.precision)
    clean = _tensors(training)
    held_out = _noisy(_tensors(validation), config, _generator(_VALIDATION_SEED))
    held_out = tuple(part.to(device) for part in held_out)
    for number in range(state.epochs + 1, config.epochs + 1):
        began = time.perf_counter()
        generator = _generator(config.seed, number)
        noisy = _noisy(clean, config, generator)
        order = torch.randperm(len(training.theta), generator=generator)
        shuffled = [part[order].to(device) for part in noisy]

        starts = range(0, len(order), config.batch_size)
        total = torch.zeros((), device=device)
        for step, start in enumerate(starts, start=1 + (number - 1) * len(starts)):
            coefficients, truth, crb = (p[start : start + config.batch_size] for p in shuffled)
            estimate = network(coefficients, products=products)
            loss = losses[config.loss](estimate, truth, crb)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch lacks the annotation
            rate = config.learning_rate_at(number, step)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            total += loss.detach() * len(truth)

        train_loss = float(total) / len(order)
        validated = _validate(network, losses, held_out)
        for value in (train_loss, validated[config.loss]):
            if not math.isfinite(value):
                raise DivergedError(number, value, state)
        state = _snapshot(number, config, network, optimizer)
        seconds, steps = time.perf_counter() - began, len(starts)
        yield (
            Epoch(number, train_loss, validated[config.loss], validated, rate, seconds, steps),
            state,
        )


_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _losses(network: Network) -> dict[str, _Loss]:
    """Each loss by name, as a function of estimate, truth and bound."""
    floor = RELATIVE_FLOOR * network.output_spread
    return {
        "crb": crb_loss,
        "mse": lambda estimate, truth, _: mse_loss(estimate, truth),
        "relative": lambda estimate, truth, _: relative_loss(estimate, truth, floor),
    }


def _start(
    training: Samples,
    validation: Samples,
    config: TrainingConfig,
    state: State | None,
    device: torch.device,
) -> tuple[Network, Adam, State]:
    """Network and optimizer as `state` left them, or new ones."""
    rank = training.coefficients.shape[1]
    _checks.shape("validation coefficients", validation.coefficients, [("S", None), ("K", rank)])
    if state is None:
        network = Network(
            rank,
            training.theta.mean(axis=0),
            training.theta.std(axis=0),
            remove_phase=config.remove_phase,
            generator=_generator(config.seed, _INITIAL_WEIGHTS),
        )
    else:
        _require_same(state.config, config)
        network = Network.from_weights(state.weights)
        if network.rank != rank:
            raise ValueError(
                f"expected coefficients of rank {network.rank}, which the resumed network takes; "
                f"got rank {rank}. Use the basis of the first run."
            )
    network.to(device)
    optimizer = Adam(network.parameters(), lr=config.learning_rate)
    if state is None:
        return network, optimizer, _snapshot(0, config, network, optimizer)
    by_weight: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.moments.items():
        index, name = key.split(".")
        # Adam updates its tensors in place; those of `state` belong to the caller.
        by_weight.setdefault(int(index), {})[name] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_weight, "param_groups": groups})
    return network, optimizer, state


def _require_same(before: TrainingConfig, now: TrainingConfig) -> None:
    old, new = before.model_dump(), now.model_dump()
    changed = [name for name in old if name != "epochs" and old[name] != new[name]]
    if changed:
        raise ValueError(
            f"expected the config of the run that is resumed; got another {', '.join(changed)}. "
            "Only epochs may change: start a new run for anything else."
        )


def _snapshot(epochs: int, config: TrainingConfig, network: Network, optimizer: Adam) -> State:
    weights = {name: _copy(tensor) for name, tensor in network.state_dict().items()}
    moments = {
        f"{index}.{name}": _copy(tensor)
        for index, tensors in optimizer.state_dict()["state"].items()
        for name, tensor in tensors.items()
    }
    return State(epochs, config, weights, moments)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().cpu()


def _generator(*stream: int) -> Generator:
    """A generator on the CPU for a stream of random numbers that is independent of all others."""
    seed = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return Generator().manual_seed(int(seed[0]))


_Tensors = tuple[Tensor, ...]


def _tensors(samples: Samples) -> _Tensors:
    """Coefficients, θ and bound in single precision."""
    return (
        torch.as_tensor(np.array(samples.coefficients, dtype=np.complex64)),
        torch.as_tensor(np.array(samples.theta, dtype=np.float32)),
        torch.as_tensor(np.array(samples.crb, dtype=np.float32)),
    )


def _noisy(clean: _Tensors, config: TrainingConfig, generator: Generator) -> _Tensors:
    """Coefficients, θ and bound with an M0 and noise."""
    coefficients, theta, crb = clean
    coefficients, crb = augment(coefficients, crb, config, generator)
    return coefficients, theta, crb


@torch.inference_mode()
def _validate(network: Network, losses: Mapping[str, _Loss], noisy: _Tensors) -> dict[str, float]:
    """Each loss on samples with their noise."""
    coefficients, theta, crb = noisy
    starts = range(0, len(theta), _VALIDATION_CHUNK)
    estimate = torch.cat([network(coefficients[i : i + _VALIDATION_CHUNK]) for i in starts])
    return {name: float(loss(estimate, theta, crb)) for name, loss in losses.items()}
