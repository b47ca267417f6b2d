"""Stage 1: the data set of a run, in shards that survive."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from concurrent.futures import Executor
from pathlib import Path

from fisherprint import _storage, files, simulate
from fisherprint.experiment.folder import (
    Progress,
    Run,
    versions,
)
from fisherprint.experiment.schema import inputs
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis, CrbSvd


def simulate_run(run: Run, *, executor: Executor | None = None, progress: Progress) -> None:
    """Stage 1: write the data set; shards that an earlier call has finished are kept.

    Args:
        run: where the data set goes, and until it is complete its shards.
        executor: who computes; threads on all cores of this process if None.
        progress: told how many fingerprints are done.

    Raises:
        BlockingIOError: another process is at work on this run.
    """
    train, simulation, basis = _simulation(run)
    run.folder.mkdir(parents=True, exist_ok=True)
    with _storage.locked(run.folder):
        folder = run.shards / _identity(train, simulation, basis)
        crb_weight = basis.weight if isinstance(basis, CrbSvd) else None
        with simulate.workers(executor) as pool:
            if not isinstance(basis, Basis):
                basis = _kept_basis(folder / "basis.h5", simulation, basis, pool, progress)
            every = [shard for split in simulate.SPLITS for shard in simulation.shards(split)]
            missing = [shard for shard in every if not _is_kept(folder, shard)]
            for part in simulate.reduce(simulation, basis, missing, pool, progress):
                files.write_shard(_shard_file(folder, part.shard), part)
        paths = {
            split: [_shard_file(folder, shard) for shard in simulation.shards(split)]
            for split in simulate.SPLITS
        }
        known = run.experiment.training.inputs
        columns = [simulation.model.index(name) for name in known]
        held = energy = 0.0
        for split in simulate.SPLITS:
            found = []
            for path in paths[split]:
                part = files.read_shard(path)
                found.append(simulate.finite(part.reduced, columns))
                if split == "training":
                    held += simulate.total_energy(part.reduced.coefficients)
                    energy += part.energy
            simulate.require_determined(simulation, basis, split, found, known=known)
        head = simulate.DataSet(simulation.model.names, basis, {}, held / energy, crb_weight)
        files.assemble_dataset(
            run.dataset, paths, head, train, seed=simulation.seed, versions=versions()
        )
        shutil.rmtree(run.shards)


def forecast_run(
    run: Run, *, executor: Executor | None = None, n_workers: int, start: float = 0.0
) -> list[str]:
    """What the simulation of a run would take, from a short measurement, as text.

    Args:
        run: where its shards and its data set would be.
        executor: who would compute.
        n_workers: how many tasks it computes at once.
        start: seconds that the program took to load.
    """
    train, simulation, basis = _simulation(run)
    folder = run.shards / _identity(train, simulation, basis)
    done = sum(_is_kept(folder, s) for split in simulate.SPLITS for s in simulation.shards(split))
    with simulate.workers(executor) as pool:
        ahead = simulate.forecast(simulation, basis, executor=pool, n_workers=n_workers)

    def size(count: int | None) -> str:
        return "unknown on this system" if count is None else f"{count / 1e6:.0f} MB"

    lines = [
        f"fingerprints: {ahead.fingerprints}",
        f"shards: {ahead.shards}, of which {done} are done",
        f"disk: {size(ahead.shard_bytes + ahead.dataset_bytes)} while shards become a data set, "
        f"{size(ahead.dataset_bytes)} afterwards",
        f"peak memory: {size(ahead.memory)}",
        f"expected time: {start + ahead.seconds:.1f} s with {n_workers} workers"
        + (f", of which about {100 * done / ahead.shards:.0f} % are behind" if done else ""),
    ]
    if executor is not None and ahead.worker_memory != ahead.memory:
        lines.insert(4, f"peak memory of a worker: {size(ahead.worker_memory)}")
    return lines


def _simulation(run: Run) -> tuple[PulseTrain, simulate.Simulation, Basis | int | CrbSvd]:
    """Train, simulation, and a basis or what it shall be, of a run."""
    train, model, prior, basis = inputs(run.experiment)
    section = run.experiment.simulation
    sizes = {split: getattr(section, split) for split in simulate.SPLITS}
    simulation = simulate.Simulation(model, prior, sizes, section.seed)
    if isinstance(basis, Basis):
        simulation.require_basis(basis)
    return train, simulation, basis


def _identity(
    train: PulseTrain, simulation: simulate.Simulation, basis: Basis | int | CrbSvd
) -> str:
    """Of all that decides the numbers in a shard: shards of something else are not used."""
    model = simulation.model
    content = (
        train.digest,
        type(model).__name__,
        getattr(model, "saturation", None),
        model.names,
        simulation.prior,
        dict(simulation.sizes),
        simulation.seed,
        basis.digest if isinstance(basis, Basis) else basis,
        simulate.SHARD,
        versions(),
    )
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _shard_file(folder: Path, shard: simulate.Shard) -> Path:
    return folder / f"{shard.split}-{shard.number:06d}.h5"


def _is_kept(folder: Path, shard: simulate.Shard) -> bool:
    """Whether a shard is there and whole."""
    try:
        return files.read_shard(_shard_file(folder, shard)).shard == shard
    except files.UnreadableFileError:
        return False


def _kept_basis(
    path: Path,
    simulation: simulate.Simulation,
    wanted: int | CrbSvd,
    executor: Executor,
    progress: Progress,
) -> Basis:
    """The basis that is to be made, from the file if an earlier call has finished it."""
    with contextlib.suppress(files.UnreadableFileError):
        return files.read_basis(path, key="basis", n_samples=simulation.model.n_samples)
    basis = simulate.fit_basis(simulation, wanted, executor=executor, progress=progress)
    files.write_basis(path, basis)
    return basis
