"""A model and a prior give a data set: coefficients and their bounds, shard by shard (§2.4).

A shard is a fixed number of fingerprints with a seed of its own, simulated by one worker with one
thread. So the data set depends neither on the number of workers nor on their order, bit for bit,
and what is finished can be kept. Who the workers are, an Executor decides.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _threads, fisher
from fisherprint.models import Fingerprints, SignalModel
from fisherprint.parameters import Prior
from fisherprint.subspace import Basis, CrbSvd, fit

SPLITS = ("training", "validation", "test")

SHARD = 1024
"""Fingerprints of a shard; the last one of a split has fewer."""

MOST_FOR_BASIS = 131_072
"""Columns that the SVD of a basis takes at most; more would not turn its vectors."""

# Largest Jacobian held at once, in bytes; several arrays of that size exist for a moment.
_BATCH_BYTES = 24e6
# Batches are whole groups of the compiled kernel's lanes.
_BATCH_MULTIPLE = 64
# Tasks that are submitted before their turn, and what their results may take in memory. The
# signals for a basis are large, a reduced shard is not.
_AHEAD = 64
_AHEAD_BYTES = 160e6

Progress = Callable[[str, int, int], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Reduced:
    """Fingerprints in the subspace, for M0 = 1, with their bounds for σ = |M0| = 1.

    Attributes:
        theta: parameters, shape (S, P), SI units.
        coefficients: shape (S, K), complex128.
        crb_signal: bound of the whole signal, shape (S, P).
        crb_coefficients: bound of the coefficients, shape (S, P); never below `crb_signal`.
        information: Fisher information of the coefficients, `fisher.packed`, shape
            (S, (P + 2)(P + 3)/2): the bounds with some parameters known, and those with a prior,
            follow from it. None in data sets of early versions.
    """

    theta: NDArray[np.float64]
    coefficients: NDArray[np.complex128]
    crb_signal: NDArray[np.float64]
    crb_coefficients: NDArray[np.float64]
    information: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class DataSet:
    """Training, validation and test samples in one basis.

    Attributes:
        names: parameters, in the order of the columns of θ and of the bounds.
        basis: the subspace of all coefficients.
        samples: by split, of `SPLITS`.
        energy: share of the training signals' energy that the basis holds.
        crb_weight: weight of the derivatives in a CRB-SVD basis; None of any other.
    """

    names: tuple[str, ...]
    basis: Basis
    samples: dict[str, Reduced]
    energy: float
    crb_weight: float | None = None

    @property
    def has_information(self) -> bool:
        """Whether the samples have their Fisher information; those of early versions have not."""
        return all(reduced.information is not None for reduced in self.samples.values())

    def information(self, split: str) -> NDArray[np.float64]:
        """Fisher information of a split's coefficients for σ = |M0| = 1, (S, P + 2, P + 2).

        Raises:
            ValueError: a data set of an early version, without it.
        """
        triangle = self.samples[split].information
        if triangle is None:
            raise ValueError(
                "expected a data set with the Fisher information of its coefficients, from which "
                "bounds with known parameters follow; got one of an early version, without it. "
                "Simulate it again: fisherprint simulate EXPERIMENT.toml -o RUN --force"
            )
        return fisher.unpacked(triangle)

    def crb(self, split: str, *, known: Sequence[str] = ()) -> NDArray[np.float64]:
        """Bound of a split's coefficients where some parameters are known, shape (S, P).

        Args:
            split: of `SPLITS`.
            known: parameters that leave the Fisher matrix. Nobody estimates them: their columns
                are infinite.

        Raises:
            KeyError: a known parameter that the data set lacks.
            ValueError: as for `information`, where something is known.
            SingularInformationError: another parameter that no sample of the split determines.
        """
        columns = [_checks.index(name, self.names) for name in known]
        crb = self.samples[split].crb_coefficients
        if known:
            crb = _crb(self.information(split), columns)
        unknown = [column for column in range(len(self.names)) if column not in columns]
        if np.isinf(crb[:, unknown]).all(axis=0).any():
            # It was determined when it was simulated, since more was known then.
            few = fisher.given(self.information(split)[:_BATCH_MULTIPLE], columns)
            names = [self.names[column] for column in unknown]
            fisher.require_determined(crb[:, unknown], few, names)
        return crb


def _crb(information: NDArray[np.float64], known: Sequence[int]) -> NDArray[np.float64]:
    """The bounds of P parameters, infinite for those that are known."""
    n_parameters = information.shape[-1] - len(fisher.SCALE)
    crb = np.full((len(information), n_parameters), np.inf)
    unknown = np.delete(np.arange(n_parameters), list(known))
    crb[:, unknown] = fisher.bounds(fisher.given(information, known))[:, : unknown.size]
    return crb


@dataclass(frozen=True)
class Shard:
    """A part of a split.

    Attributes:
        split: of `SPLITS`.
        number: of the shard in its split, from 0.
        size: fingerprints in it.
    """

    split: str
    number: int
    size: int


@dataclass(frozen=True, eq=False)
class Finished:
    """A shard and what became of it.

    Attributes:
        shard: which one.
        reduced: its fingerprints.
        energy: of its signals, Σ |s|².
    """

    shard: Shard
    reduced: Reduced
    energy: float


@dataclass(frozen=True, eq=False)
class Simulation:
    """All that decides a data set but its basis.

    Attributes:
        model: the signal model; the prior must name its parameters in its order.
        prior: where the parameters are drawn from.
        sizes: number of samples of each split, of `SPLITS`.
        seed: of all draws; each shard has a stream of its own.

    Raises:
        ValueError: the prior's parameters are not the model's, or a size below 1.
        KeyError: a size of an unknown split.
    """

    model: SignalModel
    prior: Prior
    sizes: Mapping[str, int]
    seed: int

    def __post_init__(self) -> None:
        if self.prior.names != self.model.names:
            raise ValueError(
                f"expected a prior for {self.model.names}, in this order; got "
                f"{self.prior.names}. Give its distributions in the model's order."
            )
        for split in self.sizes:
            _checks.index(split, SPLITS, what="split")
        for split in SPLITS:
            if self.sizes.get(split, 0) < 1:
                raise ValueError(
                    f"expected at least 1 {split} sample; got {self.sizes.get(split)}. "
                    f"Give the sizes of {_checks.listing(SPLITS)}."
                )

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The parts of a split, in order."""
        size = self.sizes[split]
        return tuple(
            Shard(split, number, min(SHARD, size - first))
            for number, first in enumerate(range(0, size, SHARD))
        )

    def theta(self, shard: Shard) -> NDArray[np.float64]:
        """The parameter sets of a shard, shape (size, P)."""
        stream = np.random.SeedSequence(
            self.seed, spawn_key=(SPLITS.index(shard.split), shard.number)
        )
        return self.prior.sample(shard.size, rng=np.random.default_rng(stream))

    def require_basis(self, basis: Basis) -> Basis:
        """The basis, if it has the model's time points.

        Raises:
            ValueError: it has not.
        """
        if len(basis.vectors) != self.model.n_samples:
            raise ValueError(
                f"expected a basis of {self.model.n_samples} time points, as the train has; got "
                f"{len(basis.vectors)}. Do the basis and the train belong together?"
            )
        return basis


def _silent(what: str, done: int, total: int) -> None:
    pass


def dataset(
    model: SignalModel,
    prior: Prior,
    sizes: Mapping[str, int],
    *,
    basis: Basis | int | CrbSvd,
    seed: int,
    executor: Executor | None = None,
    progress: Progress = _silent,
) -> DataSet:
    """Draw parameter sets, simulate them, and reduce each batch at once (§2.4).

    Without a given basis the training signals are simulated twice: first alone for an SVD, or
    some of them with derivatives for a CRB-SVD, then all with their derivatives. Jacobians exist
    for one batch of each worker at a time.

    Args:
        model: as for `Simulation`.
        prior: likewise.
        sizes: likewise.
        seed: likewise.
        basis: a basis, the rank of an SVD basis of the training signals, or a `CrbSvd` for one
            that holds what they tell about the parameters too.
        executor: who computes; threads on all cores of this process if None. The result is the
            same, bit for bit, on processors of one kind.
        progress: called with what is done, how many of them, and of how many.

    Raises:
        ValueError, KeyError: as for `Simulation`; or a basis of other time points.
        SingularInformationError: a parameter that no sample of a split determines.
    """
    simulation = Simulation(model, prior, sizes, seed)
    crb_weight = basis.weight if isinstance(basis, CrbSvd) else None
    with workers(executor) as pool:
        if isinstance(basis, Basis):
            simulation.require_basis(basis)
        else:
            basis = fit_basis(simulation, basis, executor=pool, progress=progress)
        every = [shard for split in SPLITS for shard in simulation.shards(split)]
        finished = {part.shard: part for part in reduce(simulation, basis, every, pool, progress)}
    samples = {}
    for split in SPLITS:
        parts = [finished[shard].reduced for shard in simulation.shards(split)]
        require_determined(simulation, basis, split, map(finite, parts))
        samples[split] = Reduced(
            *(
                np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(Reduced)
            )
        )
    training = [finished[shard] for shard in simulation.shards("training")]
    held = sum(total_energy(part.reduced.coefficients) for part in training)
    energy = held / sum(part.energy for part in training)
    return DataSet(model.names, basis, samples, energy, crb_weight)


@contextmanager
def workers(executor: Executor | None) -> Iterator[Executor]:
    """The executor, or threads on all cores of this process for the length of the block."""
    if executor is not None:
        yield executor
    else:
        # Kernels and linear algebra release the interpreter's lock, so threads run at once.
        with ThreadPoolExecutor(_threads.usable()) as pool:
            yield pool


def fit_basis(
    simulation: Simulation,
    basis: int | CrbSvd,
    *,
    executor: Executor,
    progress: Progress = _silent,
) -> Basis:
    """The basis of the training fingerprints, of `MOST_FOR_BASIS` columns at most (§2.4).

    Args:
        simulation: of the data set.
        basis: the rank of an SVD basis, or what a CRB-SVD basis shall be.
        executor: who simulates; this process sums the second moments.
        progress: as for `dataset`.
    """
    parts = _parts_for_basis(simulation, basis)
    total, columns = _size(parts), _columns(simulation, basis) * _size(parts[:1])
    ahead = int(_AHEAD_BYTES / (16 * columns * simulation.model.n_samples))

    def batches(task: Callable[[tuple[Shard, slice]], _Result]) -> Iterator[_Result]:
        done = 0
        for (_, part), batch in apply(executor, task, parts, ahead=max(2, ahead), ordered=True):
            done += part.stop - part.start
            progress("signals for the basis", done, total)
            yield batch

    with _threads.one_thread():
        if isinstance(basis, CrbSvd):
            fingerprints = batches(functools.partial(_fingerprints, simulation))
            return fit(fingerprints, rank=basis.rank, method="crb-svd", weight=basis.weight)
        return fit(batches(functools.partial(_signals, simulation)), rank=basis)


def _columns(simulation: Simulation, basis: int | CrbSvd) -> int:
    """Columns of each fingerprint that the basis is made of: signal, and derivatives."""
    return 1 + len(simulation.model.parameters) if isinstance(basis, CrbSvd) else 1


def _parts_for_basis(simulation: Simulation, basis: int | CrbSvd) -> list[tuple[Shard, slice]]:
    """What one task each simulates for a basis: a shard, or one batch of it with derivatives."""
    n_shards = MOST_FOR_BASIS // _columns(simulation, basis) // SHARD
    shards = simulation.shards("training")[: max(1, n_shards)]
    if not isinstance(basis, CrbSvd):
        return [(shard, slice(0, shard.size)) for shard in shards]
    return [(shard, part) for shard in shards for part in _batches(simulation.model, shard.size)]


def _size(parts: Sequence[tuple[Shard, slice]]) -> int:
    return sum(part.stop - part.start for _, part in parts)


def reduce(
    simulation: Simulation,
    basis: Basis,
    shards: Sequence[Shard],
    executor: Executor,
    progress: Progress = _silent,
) -> Iterator[Finished]:
    """Coefficients and both bounds of some shards, in the order of completion.

    `progress` counts each split's fingerprints in these shards.
    """
    task = functools.partial(_reduced, simulation, basis)
    done: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for shard in shards:
        total[shard.split] += shard.size
    for shard, (reduced, energy) in apply(executor, task, shards, ahead=_AHEAD, ordered=False):
        done[shard.split] += shard.size
        progress(f"fingerprints for {shard.split}", done[shard.split], total[shard.split])
        yield Finished(shard, reduced, energy)


def total_energy(values: NDArray[np.complex128]) -> float:
    """Σ |v|², summed in an order that does not depend on the number of threads."""
    return float(np.square(np.ascontiguousarray(values).view(np.float64)).sum())


def finite(reduced: Reduced, known: Sequence[int] = ()) -> NDArray[np.bool_]:
    """Parameters with a finite bound in some sample, of the signal and of the coefficients.

    With known parameters, by their columns: of the coefficients alone, since a signal determines
    all that its coefficients do. The known ones count as finite.
    """
    bounds = [reduced.crb_signal, reduced.crb_coefficients]
    if known and reduced.information is not None:
        bounds = [_crb(fisher.unpacked(reduced.information), known)]
    found = np.array([np.isfinite(crb).any(axis=0) for crb in bounds])
    found[:, list(known)] = True
    return found


def require_determined(
    simulation: Simulation,
    basis: Basis,
    split: str,
    found: Iterable[NDArray[np.bool_]],
    *,
    known: Sequence[str] = (),
) -> None:
    """Require that some sample of a split determines each parameter that is not known.

    Args:
        simulation: of the split.
        basis: of its coefficients.
        split: which one.
        found: the result of `finite` for each of its shards, with the same known ones.
        known: parameters that are no unknowns.

    Raises:
        SingularInformationError: a parameter whose bound is infinite in every sample; it carries
            the information of some of them.
    """
    if np.logical_or.reduce(list(found)).all():
        return
    model = simulation.model
    out = model.simulate(simulation.theta(simulation.shards(split)[-1])[-_BATCH_MULTIPLE:])
    unknown = [name for name in model.names if name not in known]
    jacobian = out.jacobian[..., [model.index(name) for name in unknown]]
    for observed, derivative in (
        (out.signal, jacobian),
        (basis.compress(out.signal), basis.compress(jacobian)),
    ):
        matrices = fisher.information(observed, derivative, noise_std=1.0)
        bounds = fisher.bounds(matrices)[:, : len(unknown)]
        fisher.require_determined(bounds, matrices, unknown)


def _signals(simulation: Simulation, item: tuple[Shard, slice]) -> NDArray[np.complex128]:
    """Signals of a part of a shard, shape (size, T)."""
    shard, inside = item
    theta = simulation.theta(shard)[inside]
    result = np.empty((len(theta), simulation.model.n_samples), dtype=np.complex128)
    with _threads.one_thread():
        for part in _batches(simulation.model, len(theta)):
            result[part] = simulation.model.signal(theta[part])
    return result


def _fingerprints(simulation: Simulation, item: tuple[Shard, slice]) -> Fingerprints:
    """Fingerprints of a part of a shard."""
    shard, inside = item
    with _threads.one_thread():
        return simulation.model.simulate(simulation.theta(shard)[inside])


def _reduced(simulation: Simulation, basis: Basis, shard: Shard) -> tuple[Reduced, float]:
    """Coefficients, their information and both bounds of a shard, and its signals' energy."""
    model, theta = simulation.model, simulation.theta(shard)
    size, n_parameters = theta.shape
    coefficients = np.empty((size, basis.rank), dtype=np.complex128)
    crb_signal, crb_coefficients = np.empty(theta.shape), np.empty(theta.shape)
    information = np.empty((size, _triangle(n_parameters)))
    energy = 0.0
    with _threads.one_thread():
        for part in _batches(model, size):
            fingerprints = model.simulate(theta[part])
            signal, jacobian = fingerprints.signal, fingerprints.jacobian
            coefficients[part] = basis.compress(signal)
            energy += total_energy(signal)
            whole = fisher.information(signal, jacobian, noise_std=1.0)
            compressed = fisher.information(
                coefficients[part], basis.compress(jacobian), noise_std=1.0
            )
            crb_signal[part] = fisher.bounds(whole)[:, :n_parameters]
            crb_coefficients[part] = fisher.bounds(compressed)[:, :n_parameters]
            information[part] = fisher.packed(compressed)
    return Reduced(theta, coefficients, crb_signal, crb_coefficients, information), energy


def _triangle(n_parameters: int) -> int:
    """Entries of a packed Fisher information, with the two of M0."""
    size = n_parameters + len(fisher.SCALE)
    return size * (size + 1) // 2


def _batches(model: SignalModel, size: int) -> Iterator[slice]:
    each = 16.0 * model.n_samples * len(model.parameters)
    length = max(1, int(_BATCH_BYTES / each / _BATCH_MULTIPLE)) * _BATCH_MULTIPLE
    for first in range(0, size, length):
        yield slice(first, min(first + length, size))


def apply(
    executor: Executor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    ahead: int,
    ordered: bool,
) -> Iterator[tuple[_Item, _Result]]:
    """A function of each item on an executor, in the items' order or as they are completed.

    Only some tasks are submitted before their turn, so that results do not pile up. What has not
    begun is cancelled when the caller stops, as on an error or an interrupt.
    """
    left = iter(items)
    pending: dict[Future[_Result], _Item] = {}
    try:
        while True:
            for item in itertools.islice(left, ahead - len(pending)):
                pending[executor.submit(function, item)] = item
            if not pending:
                return
            if ordered:
                future = next(iter(pending))
            else:
                future = next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
            item = pending.pop(future)
            yield item, future.result()
    finally:
        for future in pending:
            future.cancel()


@dataclass(frozen=True)
class Forecast:
    """What a simulation will take.

    Attributes:
        shards: how many there are.
        fingerprints: in all of them.
        seconds: of the simulation, after the start of the program.
        memory: peak of this process, in bytes; None where the system does not tell.
        worker_memory: peak of a worker's process, likewise; the same for local threads.
        shard_bytes: disk that the shards take until the data set is complete.
        dataset_bytes: disk that the data set takes.
    """

    shards: int
    fingerprints: int
    seconds: float
    memory: int | None
    worker_memory: int | None
    shard_bytes: int
    dataset_bytes: int


def forecast(
    simulation: Simulation, basis: Basis | int | CrbSvd, *, executor: Executor, n_workers: int
) -> Forecast:
    """Measure a few shards of each worker, and count the rest.

    Args:
        simulation: of the data set.
        basis: its basis, or what one to be made shall be.
        executor: who computes.
        n_workers: how many tasks it computes at once.
    """
    model, sizes = simulation.model, dict(simulation.sizes)
    seconds = 0.0

    def some(each: int) -> Simulation:
        """Training shards for every worker."""
        return Simulation(
            model, simulation.prior, sizes | {"training": n_workers * each}, simulation.seed
        )

    # Compilation, the table of rates and the start of the workers belong to no shard.
    few, many = some(SHARD), some(3 * SHARD)
    tasks = apply(executor, functools.partial(_signals, few), _parts_for_basis(few, 1),
                   ahead=n_workers, ordered=True)  # fmt: skip
    for _ in tasks:
        pass
    if not isinstance(basis, Basis):
        share = _size(_parts_for_basis(simulation, basis)) / _size(_parts_for_basis(many, basis))
        began = time.perf_counter()
        times: list[float] = []
        basis = fit_basis(
            many, basis, executor=executor, progress=lambda *_: times.append(time.perf_counter())
        )
        # Each part its fingerprints and its share of the sum; then the eigenvectors.
        seconds += (times[-1] - began) * share + time.perf_counter() - times[-1]
    began = time.perf_counter()
    for _ in reduce(many, basis, many.shards("training"), executor):
        pass
    total = sum(sizes.values())
    seconds += (time.perf_counter() - began) * total / many.sizes["training"]
    n_parameters = len(model.parameters)
    each = 8 * (3 * n_parameters + 2 * basis.rank + _triangle(n_parameters))
    n_shards = sum(len(simulation.shards(split)) for split in SPLITS)
    return Forecast(
        shards=n_shards,
        fingerprints=total,
        seconds=seconds,
        memory=peak_memory(),
        worker_memory=executor.submit(peak_memory).result(),
        shard_bytes=total * each + n_shards * _SHARD_OVERHEAD + basis.vectors.nbytes,
        dataset_bytes=total * each + basis.vectors.nbytes,
    )


# What HDF5 adds to the arrays of a shard.
_SHARD_OVERHEAD = 6000


def peak_memory() -> int | None:
    """Largest memory that this process has held, in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
