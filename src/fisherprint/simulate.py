"""A model and a prior give a data set: coefficients and both bounds, batch by batch (§2.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, fisher
from fisherprint.models import SignalModel
from fisherprint.parameters import Prior
from fisherprint.subspace import Basis, fit

# Largest Jacobian held at once, in bytes; several arrays of that size exist for a moment.
_BATCH_BYTES = 64e6
# Batches are whole groups of the compiled kernel's lanes on a few cores.
_BATCH_MULTIPLE = 64

SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class Reduced:
    """Fingerprints in the subspace, for M0 = 1, with their bounds for σ = |M0| = 1.

    Attributes:
        theta: parameters, shape (S, P), SI units.
        coefficients: shape (S, K), complex128.
        crb_signal: bound of the whole signal, shape (S, P).
        crb_coefficients: bound of the coefficients, shape (S, P); never below `crb_signal`.
    """

    theta: NDArray[np.float64]
    coefficients: NDArray[np.complex128]
    crb_signal: NDArray[np.float64]
    crb_coefficients: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training, validation and test samples in one basis.

    Attributes:
        names: parameters, in the order of the columns of θ and of the bounds.
        basis: the subspace of all coefficients.
        samples: by split, of `SPLITS`.
        energy: share of the training signals' energy that the basis holds.
    """

    names: tuple[str, ...]
    basis: Basis
    samples: dict[str, Reduced]
    energy: float


def dataset(
    model: SignalModel,
    prior: Prior,
    sizes: dict[str, int],
    *,
    basis: Basis | int,
    seed: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> DataSet:
    """Draw parameter sets, simulate them, and reduce each batch at once (§2.4).

    Without a given basis the training signals are simulated twice: first alone, for the SVD,
    then with their derivatives. Jacobians exist for one batch at a time.

    Args:
        model: the signal model; the prior must name its parameters in its order.
        prior: where the parameters are drawn from.
        sizes: number of samples of each split, of `SPLITS`.
        basis: a basis, or the rank of an SVD basis of the training signals.
        seed: of all draws; each split has a stream of its own.
        progress: called with what is done, how many of them, and of how many.

    Raises:
        ValueError: the prior's parameters are not the model's, or a size below 1.
        KeyError: a size of an unknown split.
        SingularInformationError: a parameter that no sample determines.
    """
    if prior.names != model.names:
        raise ValueError(
            f"expected a prior for {model.names}, in this order; got {prior.names}. "
            "Give its distributions in the model's order."
        )
    for split in sizes:
        _checks.index(split, SPLITS, what="split")
    for split in SPLITS:
        if sizes.get(split, 0) < 1:
            raise ValueError(
                f"expected at least 1 {split} sample; got {sizes.get(split)}. "
                f"Give the sizes of {_checks.listing(SPLITS)}."
            )
    streams = np.random.default_rng(seed).spawn(len(SPLITS))
    theta = {
        split: prior.sample(sizes[split], rng=rng)
        for split, rng in zip(SPLITS, streams, strict=True)
    }
    if not isinstance(basis, Basis):
        basis = fit(_signals(model, theta["training"], progress), rank=basis)
    elif len(basis.vectors) != model.n_samples:
        raise ValueError(
            f"expected a basis of {model.n_samples} time points, as the train has; got "
            f"{len(basis.vectors)}. Do the basis and the train belong together?"
        )
    reduced = {
        split: reduce(model, theta[split], basis, f"fingerprints for {split}", progress)
        for split in SPLITS
    }
    # Both are energies of the same signals: in the subspace, and in all.
    training, held = reduced["training"]
    return DataSet(
        names=model.names,
        basis=basis,
        samples={split: samples for split, (samples, _) in reduced.items()},
        energy=float(np.linalg.norm(training.coefficients) ** 2 / held),
    )


def reduce(
    model: SignalModel,
    theta: NDArray[np.float64],
    basis: Basis,
    what: str,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Reduced, float]:
    """Coefficients and both bounds of parameter sets (S, P), S ≥ 1, and the signals' energy."""
    size, n_parameters = theta.shape
    coefficients = np.empty((size, basis.rank), dtype=np.complex128)
    crb_signal, crb_coefficients = np.empty(theta.shape), np.empty(theta.shape)
    energy = 0.0
    for part in _batches(size, model):
        fingerprints = model.simulate(theta[part])
        signal, jacobian = fingerprints.signal, fingerprints.jacobian
        coefficients[part] = basis.compress(signal)
        energy += float(np.linalg.norm(signal) ** 2)
        whole = fisher.information(signal, jacobian, noise_std=1.0)
        compressed = fisher.information(
            coefficients[part], basis.compress(jacobian), noise_std=1.0
        )
        crb_signal[part] = fisher.bounds(whole)[:, :n_parameters]
        crb_coefficients[part] = fisher.bounds(compressed)[:, :n_parameters]
        progress(what, part.stop, size)
    # If all samples are singular, those of the last batch are.
    fisher.require_determined(crb_signal, whole, model.names)
    fisher.require_determined(crb_coefficients, compressed, model.names)
    return Reduced(theta, coefficients, crb_signal, crb_coefficients), energy


def _signals(
    model: SignalModel, theta: NDArray[np.float64], progress: Callable[[str, int, int], None]
) -> Iterator[NDArray[np.complex128]]:
    _checks.finite("theta", theta)
    for part in _batches(len(theta), model):
        yield model.signal(theta[part])
        progress("signals for the basis", part.stop, len(theta))


def _batches(size: int, model: SignalModel) -> Iterator[slice]:
    each = 16.0 * model.n_samples * len(model.parameters)
    length = max(1, int(_BATCH_BYTES / each / _BATCH_MULTIPLE)) * _BATCH_MULTIPLE
    for first in range(0, size, length):
        yield slice(first, min(first + length, size))
