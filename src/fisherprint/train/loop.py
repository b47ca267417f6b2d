"""The one loop (§2.6)."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Generator, Tensor
from torch.optim import Adam

from fisherprint import _checks, inference
from fisherprint.network import Network
from fisherprint.train.augmentation import (
    Tensors,
    augmented,
    batches,
    first_layer_inputs,
    to_tensors,
)
from fisherprint.train.config import Samples, TrainingConfig
from fisherprint.train.losses import (
    RELATIVE_FLOOR,
    bayesian_loss,
    bias_reduced_loss,
    crb_loss,
    mse_loss,
    relative_loss,
    terms,
)
from fisherprint.train.ranks import ALONE, Ranks
from fisherprint.train.steps import Mean, Recorded

# Losses that every training is validated by.
_ORDINARY = ("crb", "mse", "relative")

# Streams of random numbers: epochs have their number, 1, 2, ...
_INITIAL_WEIGHTS = 0
_VALIDATION_SEED = 20220701
_VALIDATION_CHUNK = 16384


@dataclass(frozen=True)
class Epoch:
    """What happened in one epoch.

    Attributes:
        number: counted from 1.
        train_loss: mean of the chosen loss over the steps, before each step's update.
        validation_loss: the chosen loss on the validation set after the epoch.
        validation_losses: losses on the validation set, by name; its noise is always the same.
            The Bayesian and the bias-reduced one are among them where they are chosen.
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
        config: how it was trained; `compiled` says what was really done.
        weights: the network's `state_dict`; `Network.from_weights` makes the network.
        moments: Adam's tensors, keyed `<number of the weight>.<name>`; empty before the first
            epoch.
        last: where `weights` are an average, those of the last step, from which Adam goes on.
    """

    epochs: int
    config: TrainingConfig
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    last: Mapping[str, Tensor] = field(default_factory=dict)


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


def train(
    training: Samples,
    validation: Samples,
    config: TrainingConfig,
    *,
    start: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    device: str | torch.device = "cpu",
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Epoch, State]]:
    """Train a network, yielding after each epoch what happened and the state to go on from (§2.6).

    Each epoch draws its order, its M0 and its noise anew, on the device, from a generator that
    depends on the seed and the epoch's number alone: a run resumed from a `state` repeats an
    uninterrupted one, bit for bit on the CPU. Data stay on the device. Validation noise is drawn
    on the CPU: it is the same everywhere. One process on a GPU records a step and repeats it.

    Args:
        training: at least the parameters that `config` names. Their bounds must be those of an
            estimator that knows `config.inputs`.
        validation: likewise; its noise is the same in each epoch and for each seed.
        config: all else.
        start: weights to start from instead of random ones, a network's `state_dict`; its scaling
            of inputs and outputs stays. One that knows every phase may go on with the phase
            removed.
        state: where to resume; its config may differ in `epochs`. Where it was not compiled or
            not in bfloat16, it goes on so, whatever `config` says.
        device: where the network is trained.
        ranks: the processes that train it together, each of which calls this with the same
            arguments, takes its share of each batch and yields the same.

    Raises:
        KeyError: samples lack a parameter that is to be estimated or known.
        ValueError: samples, a start or a state that do not fit the config or each other, or both
            a start and a state; or processes that begin with different ones, batch normalization
            in several processes, or a last batch too small for them.
        RuntimeError: the state's steps were compiled, and here nothing can be.
        DivergedError: the loss became NaN or infinite; it carries the last good state.
    """
    device = torch.device(device)
    config = _with_possible(config, state, device)
    ranks.require_shares(len(training.theta), config)
    recorded = _recordable(device, ranks)
    network, optimizer, state = _begin(
        training, validation, config, start, state, device, recorded=recorded
    )
    n_steps = math.ceil(len(training.theta) / config.fingerprints)
    mean = Mean(network, config.average_steps) if config.average_steps else None
    if mean is not None and state.epochs:
        mean.network.load_state_dict(state.weights)
    losses, products = _losses(network, config), getattr(torch, config.precision)
    step_layers = network.from_features
    if config.compiled:
        step_layers = torch.compile(step_layers, fullgraph=True, dynamic=False)
    clean = [part.to(device) for part in to_tensors(training, config)]
    held_out = to_tensors(validation, config)
    noisy = augmented(held_out, config, _generator(_VALIDATION_SEED))
    noisy = [part.to(device) for part in noisy]
    ranks.require_same(_beginning(clean, config, state))
    parallel, total = ranks.parallel(network), torch.zeros((), device=device)

    def update(batch: Tensors) -> None:
        """One step of Adam, whose loss is added to the total of the epoch."""
        share = [part[ranks.rows(len(part))] for part in batch]
        coefficients, truth, crb, known = share
        x = first_layer_inputs(network, coefficients, known, config)
        # The last batch may be smaller: not worth another minute of compilation.
        full = len(batch[0]) == config.fingerprints
        layers = step_layers if full else network.from_features
        estimate = parallel(layers, x, products).reshape(*coefficients.shape[:-1], -1)
        # A share counts by its terms: then the mean over the processes is the batch's loss.
        weight = ranks.size * terms(config.loss, crb) / terms(config.loss, batch[2])
        loss = weight * losses[config.loss](estimate, truth, crb)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch lacks the annotation
        optimizer.step()
        total.add_(loss.detach() * len(batch[0]) / ranks.size)

    full_update = Recorded(update) if recorded else update
    for number in range(state.epochs + 1, config.epochs + 1):
        began = time.perf_counter()
        n_samples, first = len(clean[0]), 1 + (number - 1) * n_steps
        generator = _generator(config.seed, number, device=device)
        network.train()
        total.zero_()
        for step, batch in enumerate(batches(clean, config, generator), start=first):
            rate = config.learning_rate_at(number, step)
            _set_rate(optimizer, rate)
            (full_update if len(batch[0]) == config.fingerprints else update)(batch)
            if mean is not None:
                mean.move(step)

        train_loss = float(ranks.sum(total)) / n_samples
        result = network if mean is None else mean.network
        validated = _validate(result.eval(), losses, held_out, noisy, config, ranks)
        for value in (train_loss, validated[config.loss]):
            if not math.isfinite(value):
                raise DivergedError(number, value, state)
        last = {} if mean is None else network.state_dict()
        state = _snapshot(number, config, result, optimizer, last)
        seconds, steps = time.perf_counter() - began, step - first + 1
        yield (
            Epoch(number, train_loss, validated[config.loss], validated, rate, seconds, steps),
            state,
        )


def compilable(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device; None if something can."""
    try:
        # Whether compiler, headers and libraries fit together, only a trial tells.
        torch.compile(torch.neg, fullgraph=True)(torch.ones(1, device=device))
    except Exception as error:  # of many kinds, by what is missing
        # A paragraph without instructions for torch's developers.
        return " ".join(str(error).split("\n\n")[0].split())
    return None


def _with_possible(
    config: TrainingConfig, state: State | None, device: torch.device
) -> TrainingConfig:
    """The config with what this machine can do, or with what the resumed run did.

    Steps are not compiled where that is impossible, and products are not rounded to bfloat16 on a
    CPU that converts number by number: it takes several times as long as with float32.
    """
    if state is not None:
        changes = {name: getattr(state.config, name) for name in ("compiled", "precision")}
        # Perhaps it was impossible there. Other changes are refused later.
        lost = {
            name: value
            for name, value in changes.items()
            if value == TrainingConfig.model_fields[name].default
        }
        config = config.model_copy(update=lost)
    slow = device.type == "cpu" and inference.fastest() == "float32"
    if config.precision == "bfloat16" and slow:
        if state is None:
            config = config.model_copy(update={"precision": "float32"})
        warnings.warn(
            "expected a processor with instructions for bfloat16 (AVX-512 BF16, AMX); this one "
            "has none: training "
            + ("in float32 instead." if state is None else "on slowly, as the run began."),
            stacklevel=3,
        )
    if not config.compiled:
        return config
    reason = compilable(device)
    if reason is None:
        return config
    if state is not None:
        raise RuntimeError(
            "expected to compile the steps, as the run that is resumed did; got: "
            f"{reason}. Install a C++ compiler, or start again with compiled = false."
        )
    warnings.warn(
        f"training without compiled steps, which takes longer: {reason}. Install a C++ compiler.",
        stacklevel=3,
    )
    return config.model_copy(update={"compiled": False})


def _beginning(clean: Tensors, config: TrainingConfig, state: State) -> dict[str, object]:
    """What all processes must have in common."""
    size, device = len(clean[0]), clean[0].device
    # Unlike devices may draw unlike numbers, and an order tells.
    order = torch.randperm(size, generator=_generator(config.seed, device=device), device=device)
    return {
        "config": config.model_dump(),
        "epochs done": state.epochs,
        "fingerprints": size,
        "energy of the signals": float(clean[0].abs().square().sum()),
        "random order": order[:8].tolist(),
    }


_Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _losses(network: Network, config: TrainingConfig) -> dict[str, _Loss]:
    """Each loss by name, as a function of estimate, truth and bound."""
    floor = RELATIVE_FLOOR * network.output_spread
    return {
        "crb": crb_loss,
        "mse": lambda estimate, truth, _: mse_loss(estimate, truth),
        "relative": lambda estimate, truth, _: relative_loss(estimate, truth, floor),
        "bayesian": functools.partial(bayesian_loss, spread=network.output_spread),
        "bias-reduced": functools.partial(
            bias_reduced_loss,
            variance_weight=config.variance_weight,
            variance_limit=config.variance_limit,
        ),
    }


def _begin(
    training: Samples,
    validation: Samples,
    config: TrainingConfig,
    start: Mapping[str, Tensor] | None,
    state: State | None,
    device: torch.device,
    *,
    recorded: bool,
) -> tuple[Network, Adam, State]:
    """Network and optimizer as `state` left them, or new ones."""
    size, rank = training.coefficients.shape
    _checks.shape("validation coefficients", validation.coefficients, [("S", None), ("K", rank)])
    last = (size % config.fingerprints or config.fingerprints) * math.prod(config.noises)
    if config.normalization == "batch" and last == 1:
        raise ValueError(
            f"expected batches of more than one sample; got {size} in batches of "
            f"{config.fingerprints}: the last has no spread to normalize by. Change batch_size."
        )
    if state is not None:
        if start is not None:
            raise ValueError("expected a start or a state to resume; got both. Drop one.")
        _require_same(state.config, config)
        network = Network.from_weights(state.last or state.weights)
        if network.rank != rank:
            raise ValueError(
                f"expected coefficients of rank {network.rank}, which the resumed network takes; "
                f"got rank {rank}. Use the basis of the first run."
            )
    else:
        network = _new_network(training, config)
        if start is not None:
            if config.remove_phase:
                # A network that has seen every phase knows this one.
                start = {"without_phase": torch.tensor(True), **start}
            new, old = (_shapes(weights) for weights in (network.state_dict(), start))
            if new != old:
                unlike = sorted(name for name, _ in new.items() ^ old.items())
                raise ValueError(
                    "expected a start of the network's rank, parameters and options; got other "
                    f"{_checks.listing(dict.fromkeys(unlike))}. Start from another network, or "
                    "set the options of its training."
                )
            network.load_state_dict(start)
    network.to(device)
    optimizer = _adam(network, config, recorded=recorded)
    if state is None:
        return network, optimizer, _snapshot(0, config, network, optimizer, {})
    by_weight: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.moments.items():
        index, name = key.split(".")
        # Adam updates its tensors in place; those of `state` belong to the caller.
        by_weight.setdefault(int(index), {})[name] = tensor.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": by_weight, "param_groups": groups})
    return network, optimizer, state


def _new_network(training: Samples, config: TrainingConfig) -> Network:
    """Random weights, inputs and outputs scaled by the training set."""
    theta = training.select(config.estimated).theta
    extra = list(training.select(config.inputs).theta.T) if config.inputs else []
    if config.snr_input:
        scales = np.linspace(*config.scale_range, 101)
        norms = np.linalg.norm(training.coefficients, axis=1)
        extra.append(np.log(scales[:, None] * norms / config.noise_std))
    return Network(
        training.coefficients.shape[1],
        theta.mean(axis=0),
        theta.std(axis=0),
        output_range=[theta.min(axis=0), theta.max(axis=0)] if config.bounded else None,
        extra_inputs=[[x.mean() for x in extra], [x.std() for x in extra]] if extra else None,
        normalization=config.normalization,
        remove_phase=config.remove_phase,
        generator=_generator(config.seed, _INITIAL_WEIGHTS),
    )


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _require_same(before: TrainingConfig, now: TrainingConfig) -> None:
    old, new = before.model_dump(), now.model_dump()
    # `compiled` says what could be done where the run began, not what was asked for.
    changed = [name for name in old if name != "epochs" and old[name] != new[name]]
    if changed:
        raise ValueError(
            f"expected the config of the run that is resumed; got another {', '.join(changed)}. "
            "Only epochs may change: start a new run for anything else."
        )


def _recordable(device: torch.device, ranks: Ranks) -> bool:
    """Whether steps are recorded; processes exchange gradients within a step."""
    return device.type == "cuda" and ranks.size == 1


def _adam(network: Network, config: TrainingConfig, *, recorded: bool) -> Adam:
    # A recording reads the rate from the GPU.
    rate = config.learning_rate
    lr = torch.tensor(rate, device=network.output_mean.device) if recorded else rate
    return Adam(network.parameters(), lr=lr, fused=config.compiled, capturable=recorded)


def _set_rate(optimizer: Adam, rate: float) -> None:
    group = optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _snapshot(
    epochs: int,
    config: TrainingConfig,
    network: Network,
    optimizer: Adam,
    last: Mapping[str, Tensor],
) -> State:
    weights = {name: _copy(tensor) for name, tensor in network.state_dict().items()}
    moments = {
        f"{index}.{name}": _copy(tensor)
        for index, tensors in optimizer.state_dict()["state"].items()
        for name, tensor in tensors.items()
    }
    return State(
        epochs, config, weights, moments, {name: _copy(tensor) for name, tensor in last.items()}
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().cpu()


def _generator(*stream: int, device: str | torch.device = "cpu") -> Generator:
    """A generator for a stream of random numbers that is independent of all others."""
    seed = np.random.SeedSequence(stream).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(seed[0]))


@torch.inference_mode()
def _validate(
    network: Network,
    losses: Mapping[str, _Loss],
    clean: Tensors,
    noisy: Tensors,
    config: TrainingConfig,
    ranks: Ranks,
) -> dict[str, float]:
    """The losses on samples with the same noise in each epoch."""

    def estimate(coefficients: Tensor, known: Tensor) -> Tensor:
        own = ranks.rows(len(coefficients))
        x = first_layer_inputs(network, coefficients[own], known[own], config)
        y = [
            network.from_features(part, torch.float32)
            for part in torch.split(x, _VALIDATION_CHUNK)
        ]
        estimates = torch.cat(y).reshape(*coefficients[own].shape[:-1], -1)
        return ranks.whole(estimates, len(coefficients))

    coefficients, theta, crb, known = noisy
    estimates = estimate(coefficients, known)
    named = _ORDINARY if config.noises else dict.fromkeys((*_ORDINARY, config.loss))
    found = {name: float(losses[name](estimates, theta, crb)) for name in named}
    if config.noises:
        generator = _generator(_VALIDATION_SEED, config.realizations)
        parts = []
        # As many at once as in a step, which fit into memory.
        for some in zip(*(torch.split(t, config.fingerprints) for t in clean), strict=True):
            drawn = augmented(some, config, generator, noises=config.noises)
            c, _, bound, given = (tensor.to(theta.device) for tensor in drawn)
            parts.append((estimate(c, given), bound))
        estimates, crb = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        found[config.loss] = float(losses[config.loss](estimates, theta, crb))
    return found
