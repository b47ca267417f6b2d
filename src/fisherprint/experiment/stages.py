"""The stages of an experiment over its run folder, one function each, and their order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import evaluate as evaluation
from fisherprint import files, fisher, inference, maps, simulate, train
from fisherprint.experiment import schema
from fisherprint.experiment.folder import (
    Run,
    forget_results,
    forget_training,
    read_data,
    region_file,
    require_absent,
    versions,
)
from fisherprint.experiment.known import read_known
from fisherprint.experiment.pages import report_run
from fisherprint.experiment.schema import ExperimentError, MapSection, inputs
from fisherprint.models.protocol import SignalModel
from fisherprint.network import Network, as_estimator
from fisherprint.reconstruct import phantom
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis, CrbSvd

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many of it, and of how many."""
Say = Callable[[str], None]
"""Called with a line for people."""

CARD_KEYS = ("parameters", "estimated", "rank", "basis_sha256", "dataset_sha256")
REGIONS = ("white matter", "CSF")
QUARTILES = ("lower_quartile", "median", "upper_quartile")
# Voxels of the digital brain that count as one tissue: at least this share of it.
_PURE = 0.95
# Fewer voxels than this are no region: quartiles of five numbers each.
_MIN_REGION = 20
# Voxels simulated at once.
_BRAIN_BATCH = 4096


class BasisMismatchError(ValueError):
    """Coefficients of one basis, a network of another."""


def simulate_run(run: Run, *, executor: Executor | None = None, progress: Progress) -> None:
    """Stage 1: write the data set; shards that an earlier call has finished are kept.

    Args:
        run: where the data set goes, and until it is complete its shards.
        executor: who computes; threads on all cores of this process if None.
        progress: told how many fingerprints are done.
    """
    train, simulation, basis = _simulation(run)
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


def labelled(
    data: simulate.DataSet, split: str, names: Sequence[str], *, known: Sequence[str] = ()
) -> train.Samples:
    """A split's coefficients with the truth and the coefficients' bound of some parameters.

    Behind them are the known parameters, of which the bound of the others knows.

    Raises:
        ValueError: known parameters, and a data set of an early version.
        SingularInformationError: a parameter that no sample determines.
    """
    reduced = data.samples[split]
    crb = data.crb(split, known=known)
    every = train.Samples(data.names, reduced.coefficients, reduced.theta, crb)
    return every.select((*names, *known))


def train_run(
    run: Run, *, resume: bool, force: bool = False, say: Say, progress: Progress
) -> None:
    """Stage 2: train from the start or from the last epoch; then write weights and card.

    Args:
        run: where the data set is.
        resume: go on after the last finished epoch, if there is one.
        force: forget earlier epochs and all that came of them, once the data set is known to be
            readable.
        say: told each epoch's losses.
        progress: told how many epochs are done.

    Raises:
        OutputExistsError: there are epochs of an earlier training and `resume` is not given, or
            its network without the checkpoint to go on from.
        ExperimentError: there is no data set, or the earlier epochs are of another one; or there
            is no network to start from, or it has another basis or other parameters.
        ValueError: both `resume` and `force`, a start with other options, or known inputs and a
            data set of an early version.
    """
    if resume and force:
        raise ValueError(
            "expected --resume, which keeps the earlier epochs, or --force, which forgets them; "
            "got both. Drop one."
        )
    config = run.experiment.training.config
    data, pulses, model = read_data(run)
    digest = files.file_digest(run.dataset)
    # What cannot be replaced is not removed, and what has begun needs no start.
    training, validation = (
        labelled(data, split, config.estimated, known=config.inputs)
        for split in ("training", "validation")
    )
    start, start_digest = None, None
    if run.experiment.training.start is not None and (force or not run.checkpoint.exists()):
        start, start_digest = _read_start(run.experiment.training.start, config, data)
    if force:
        forget_training(run)
    state = None
    if run.checkpoint.exists():
        if not resume:
            raise files.OutputExistsError(
                f"{run.network} already holds trained epochs. Go on with --resume, or start again "
                "with --force."
            )
        state, start_digest = _read_state(run, digest)
        say(f"resuming after epoch {state.epochs} of {config.epochs}")
    else:
        require_absent(run.network / "card.json")
    done = state.epochs if state else 0
    # A kill between the two writes leaves an epoch in the log that the checkpoint lacks.
    log = files.read_jsonl(run.log) if run.log.exists() else []
    files.write_jsonl(run.log, [record for record in log if record["number"] <= done])
    progress("epochs", done, config.epochs)
    epochs = train.train(training, validation, config, start=start, state=state)
    for epoch, state in epochs:
        tensors = {f"weights/{key}": value for key, value in state.weights.items()}
        tensors |= {f"moments/{key}": value for key, value in state.moments.items()}
        content = {
            "epochs": state.epochs,
            "config": state.config.model_dump(mode="json"),
            "dataset_sha256": digest,
            "start_sha256": start_digest,
        }
        files.append_jsonl(run.log, vars(epoch))
        files.write_checkpoint(run.checkpoint, tensors, content)
        progress("epochs", epoch.number, config.epochs)
        say(
            f"epoch {epoch.number}: {config.loss} loss {epoch.train_loss:.4g}, "
            f"validation {epoch.validation_loss:.4g}"
        )
    if state is not None:
        if state.epochs > done:
            # Results of other weights, if there are any.
            forget_results(run)
        card = _card(run, state.config, data, pulses, model)
        card |= {"dataset_sha256": digest, "start_sha256": start_digest}
        files.save_network(run.network, state.weights, card)


def evaluate_run(run: Run, *, say: Say, progress: Progress) -> None:
    """Stage 3: bias and variance on the test set against the bound of the coefficients.

    In float32 on any processor, so that audits compare (docs/decisions/027).
    """
    section, config = run.experiment.evaluation, run.experiment.training
    data, _, _ = read_data(run)
    network, card = load_network(run)
    if card["dataset_sha256"] != files.file_digest(run.dataset):
        raise ExperimentError(
            f"expected the data set that {run.network} was trained with; {run.dataset} is "
            f"another. Train again: fisherprint train {run.folder} --force"
        )
    everything = labelled(data, "test", config.estimated, known=config.inputs)
    test, known = everything.select(config.estimated), everything.select(config.inputs).theta

    def extra(coefficients: NDArray[Any], part: slice, std: float) -> NDArray[np.float64]:
        return train.extra_inputs(config, coefficients, known[part, None], noise_std=std)

    beside = extra if config.inputs or config.snr_input else None

    few = train.Samples(
        test.names,
        *(part[: section.fingerprints] for part in (test.coefficients, test.theta, test.crb)),
    )
    rng = np.random.default_rng(section.seed)
    score = evaluation.loss_over_scales(
        as_estimator(network),
        test,
        scale_range=config.scale_range,
        noise_std=config.noise_std,
        beside=beside,
        rng=rng,
    )
    audit = evaluation.audit(
        as_estimator(network),
        few,
        snr=section.snr,
        n_noise=section.n_noise,
        beside=beside,
        progress=lambda done, total: progress("fingerprints x SNR levels", done, total),
        rng=rng,
    )
    theta = data.samples["test"].theta
    if not data.has_information:
        say("the data set is of an early version, without the information for the prior's bounds")
    elif len(theta) <= len(data.names):
        say(f"{len(theta)} test fingerprints are too few for the prior's bounds")
    else:
        prior = fisher.prior_bounds(
            data.information("test"), theta, data.names, snr=section.snr, known=config.inputs
        )
        audit = dataclasses.replace(audit, prior=prior.select(config.estimated))
    files.write_audit(run.audit, audit, score)
    for line in summary(audit, score):
        say(line)


def summary(audit: evaluation.Audit, score: evaluation.Score) -> list[str]:
    """The audit as text: the loss over the training range, then a row for SNR and parameter."""
    lines = [
        f"loss over the training range of M0: {score.loss:.3f} ± {score.standard_error:.3f} ("
        + ", ".join(
            f"{name} {loss:.3f}"
            for name, loss in zip(score.names, score.loss_by_parameter, strict=True)
        )
        + ")",
        "    SNR  parameter     bias²/CRB  variance/CRB  median std/√CRB",
    ]
    mean, by_parameter = audit.mean_shares(), audit.mean_shares_by_parameter()
    columns = [
        np.column_stack(parts)
        for parts in (
            (mean.bias, by_parameter.bias),
            (mean.variance, by_parameter.variance),
            (audit.median_std_ratio(), audit.median_std_ratio_by_parameter()),
        )
    ]
    for q, snr in enumerate(audit.snr):
        for e, name in enumerate(("all", *audit.names)):
            bias, variance, std = (column[q, e] for column in columns)
            lines.append(f"{snr:7g}  {name:9}  {bias:12.3f}  {variance:12.3f}  {std:15.3f}")
    return lines + _prior_lines(audit)


def _prior_lines(audit: evaluation.Audit) -> list[str]:
    """The error beside the bounds without and with the prior, all over the prior's spread."""
    if audit.prior is None:
        return []
    lines = [
        "over the standard deviation of the prior:",
        "    SNR  parameter      RMSE  median √CRB  √van Trees: local  global  RMSE/√global",
    ]
    with_prior = np.sqrt([audit.prior.local, audit.prior.overall])
    roots = [audit.root_mean_square, audit.median_root_crb(), *with_prior]
    relative = np.stack(roots) / audit.prior.spread
    ratio, error = audit.over_prior_bound()
    for q, snr in enumerate(audit.snr):
        for e, name in enumerate(audit.names):
            rmse, crb, local, overall = relative[:, q, e]
            lines.append(
                f"{snr:7g}  {name:9}  {rmse:8.3f}  {crb:11.3f}  {local:17.3f}  {overall:6.3f}  "
                f"{ratio[q, e]:5.2f} ± {error[q, e]:.2f}"
            )
    return lines


def load_network(run: Run) -> tuple[Network, dict[str, Any]]:
    """The trained network of a run, and its card.

    Raises:
        ExperimentError: there is none yet.
        UnreadableFileError: its files are damaged.
    """
    if not (run.network / "card.json").exists():
        raise ExperimentError(
            f"expected a trained network in {run.network}; there is none yet. "
            f"Train it: fisherprint train {run.folder}{' --resume' * run.checkpoint.exists()}"
        )
    weights, card = files.load_network_files(run.network, required=CARD_KEYS)
    return Network.from_weights(weights).eval(), card


def map_run(
    run: Run,
    section: MapSection,
    out: Path,
    *,
    force: bool = False,
    overwrite: bool = False,
    say: Say,
    progress: Progress,
) -> None:
    """Stage 4: coefficient images to parameter maps.

    Args:
        run: where the data set and the network are.
        section: the images, a mask if there is one, their basis if its file is known.
        out: folder for one NIfTI and one JSON a parameter; `white_matter.nii.gz` and `csf.nii.gz`
            where they can be found, and `summary.json` with medians and quartiles.
        force: map images of another basis all the same.
        overwrite: replace maps that are there.
        say: told what is assumed and found.
        progress: told how many voxels are done.

    Raises:
        BasisMismatchError: the images were made with another basis, or have another rank.
        OutputExistsError: `out` already holds maps.
        ExperimentError: there is no data set or no network yet, or the images' noise is missing
            or of no use.
        ValueError: known maps that are not those of the network's inputs, or do not fit the
            images, or are mostly outside of the range of its training.
    """
    if (out / "summary.json").exists() and not overwrite:
        raise files.OutputExistsError(
            f"{out} already holds maps. Choose another folder, or replace them with --overwrite."
        )
    _, pulses, model = read_data(run)
    network, card = load_network(run)
    volume = files.read_coefficients(
        section.coefficients,
        key=section.key,
        mask_key=section.mask_key if section.mask is None else None,
        rank=card["rank"],
    )
    basis = _basis_of(section, pulses)
    if basis is None:
        say("the images do not say which basis they were made with; only the rank was checked")
    elif basis != card["basis_sha256"]:
        if not force:
            raise BasisMismatchError(
                f"expected coefficients in the network's basis {card['basis_sha256'][:12]}...; "
                f"{section.coefficients} was made with {basis[:12]}.... Reconstruct it with the "
                "basis of this run, or map it all the same with --force."
            )
        say("the images were made with another basis; mapped all the same")
    mask = volume.mask
    if section.mask is not None:
        mask = files.read_mask(section.mask, volume.data.shape[:3], key=section.mask_key)
    estimated = tuple(card["estimated"])
    images = volume.data
    config = train.TrainingConfig.model_validate(card["config"])
    if (section.noise_std is None) == config.snr_input:
        raise ExperimentError(
            "expected the noise_std of the images for a network with snr_input, and none without; "
            f"got {section.noise_std}, and {run.network} has snr_input = {config.snr_input}. "
            "Measure it in a region without signal, or drop it."
        )
    schema.require_maps("the network's inputs", config.inputs, section.known)
    if config.inputs or config.snr_input:
        # What stands beside the coefficients must not make a mask.
        mask = maps.automatic_mask(images) if mask is None else mask
        told = [model.parameters[model.index(name)] for name in config.inputs]
        known = read_known(section.known, told, card.get("ranges", {}), mask, say=say)
        # Without signal there is no estimate, whatever is known.
        known[~images.any(axis=-1)] = np.nan
        # Where σ is not given, nothing looks at it.
        noise_std = np.nan if section.noise_std is None else section.noise_std
        extra = train.extra_inputs(config, images, known, noise_std=noise_std)
        images = np.concatenate([images, extra.astype(images.real.dtype)], axis=-1)
    precision = section.precision or inference.fastest()
    result = maps.estimate_maps(
        images,
        as_estimator(network, precision=precision),
        estimated,
        mask=mask,
        on_progress=lambda done, total: progress("voxels", done, total),
    )
    described = [model.parameters[model.index(name)] for name in estimated]
    provenance = {
        "fisherprint": versions()["fisherprint"],
        "network_sha256": card["weights_sha256"],
        "dataset_sha256": card["dataset_sha256"],
        "basis_sha256": card["basis_sha256"],
        "basis_of_images_sha256": basis,
        "loss": card["config"]["loss"],
        "precision": precision,
        "known_sha256": {name: files.file_digest(path) for name, path in section.known.items()},
    }
    files.write_maps(result, out, volume=volume, parameters=described, provenance=provenance)
    regions = _regions(result, say)
    for name in REGIONS:
        path = out / region_file(name)
        path.unlink(missing_ok=True)  # of earlier maps
        if name in regions:
            files.write_mask(path, regions[name], volume=volume)
    regions = {"all": result.mask} | regions
    statistics = {name: _statistics(result, inside) for name, inside in regions.items()}
    files.write_json(
        out / "summary.json",
        {"regions": statistics, "failed_voxels": result.n_failed, "provenance": provenance},
    )
    say(f"{int(result.mask.sum())} voxels mapped, {result.n_failed} failed")
    for region, numbers in statistics.items():
        for parameter in described:
            name, value = parameter.name, numbers[parameter.name]
            if value["median"] is None:
                say(f"{region}: {name} failed everywhere")
                continue
            low, median, high = (parameter.display_factor * value[key] for key in QUARTILES)
            say(f"{region}: {name} {median:.4g} [{low:.4g}, {high:.4g}] {parameter.display_unit}")


def _regions(result: maps.Maps, say: Say) -> dict[str, NDArray[np.bool_]]:
    """Regions that the maps themselves tell apart, as far as their parameters allow it."""
    regions: dict[str, NDArray[np.bool_]] = {}
    longitudinal = maps.longitudinal(result.names)
    if longitudinal is None:
        return regions
    if "m0s" in result.names:
        try:
            regions["white matter"] = maps.white_matter(result["m0s"], result[longitudinal])
        except ValueError as error:
            say(f"no white matter found: {error}")
    fluid = maps.fluid(result[longitudinal])
    if fluid.sum() >= _MIN_REGION:
        regions["CSF"] = fluid
    return regions


def make_brain(run: Run, *, progress: Progress) -> MapSection:
    """The digital brain's noisy coefficient images and its true maps, in `RUN/brain`.

    The maps that the network is told are the true ones.
    """
    section = run.experiment.brain
    if section is None:
        raise ExperimentError("expected a [brain] section in the experiment; it has none.")
    data, _, model = read_data(run)
    brain = phantom.digital_brain(
        files.read_tissue_maps(), model.names, voxel_size=section.voxel_size
    )
    theta = brain.theta[brain.mask]
    images = np.zeros((*brain.mask.shape, data.basis.rank), dtype=np.complex64)
    inside = np.empty((len(theta), data.basis.rank), dtype=np.complex128)
    for first in range(0, len(theta), _BRAIN_BATCH):
        part = slice(first, first + _BRAIN_BATCH)
        inside[part] = data.basis.compress(model.signal(theta[part]))
        progress("voxels of the digital brain", min(first + _BRAIN_BATCH, len(theta)), len(theta))
    rng = np.random.default_rng(section.seed)
    noise = rng.standard_normal((*inside.shape, 2)).view(np.complex128)[..., 0]
    images[brain.mask] = brain.m0[brain.mask][:, None] * inside + noise / section.snr
    coefficients = run.brain / "coefficients.nii.gz"
    volume = files.Volume(images, brain.affine)
    files.write_coefficients(coefficients, volume, basis_sha256=data.basis.digest)
    truth = maps.Maps(brain.names, brain.theta, brain.mask, 0)
    files.write_maps(
        truth,
        run.brain / "truth",
        volume=volume,
        parameters=model.parameters,
        provenance={"fisherprint": versions()["fisherprint"], "kind": "digital brain, truth"},
    )
    for tissue, share in zip(brain.tissues, np.moveaxis(brain.fractions, -1, 0), strict=True):
        path = run.brain / "tissues" / f"{tissue.replace(' ', '_')}.nii.gz"
        path.unlink(missing_ok=True)
        # Large voxels leave small tissues without a pure one.
        if (share > _PURE).any():
            files.write_mask(path, share > _PURE, volume=volume)
    files.write_mask(run.brain / "mask.nii.gz", brain.mask, volume=volume)
    return MapSection(
        coefficients=coefficients,
        mask=run.brain / "mask.nii.gz",
        noise_std=1 / section.snr if run.experiment.training.snr_input else None,
        known={
            name: run.brain / "truth" / f"{name}.nii.gz" for name in run.experiment.training.inputs
        },
    )


def run_all(run: Run, *, executor: Executor | None = None, say: Say, progress: Progress) -> Path:
    """All stages in their order, skipping those whose results are there; the report's path.

    The executor is that of the simulation.
    """
    stages: list[tuple[str, Path, Callable[[], object]]] = [
        ("simulate", run.dataset, lambda: simulate_run(run, executor=executor, progress=progress)),
        (
            "train",
            run.network / "card.json",
            lambda: train_run(run, resume=True, say=say, progress=progress),
        ),
        ("evaluate", run.audit, lambda: evaluate_run(run, say=say, progress=progress)),
    ]
    if run.experiment.map is not None or run.experiment.brain is not None:

        def map_stage() -> None:
            section = run.experiment.map or make_brain(run, progress=progress)
            map_run(run, section, run.maps, say=say, progress=progress)

        stages.append(("map", run.maps / "summary.json", map_stage))
    for name, product, stage in stages:
        if product.exists():
            say(f"{name}: done before ({product})")
        else:
            say(f"{name} ...")
            stage()
    return report_run(run)


def _read_start(
    folder: Path, config: train.TrainingConfig, data: simulate.DataSet
) -> tuple[dict[str, Any], str]:
    """Weights to start from, of a run or network folder, and their SHA-256."""
    network = folder if (folder / "card.json").exists() else folder / "network"
    if not (network / "card.json").exists():
        raise ExperimentError(
            f"expected a trained network to start from in {folder}; there is none. Train it "
            "first, or correct [training] start."
        )
    weights, card = files.load_network_files(network, required=CARD_KEYS)
    for key, wanted in (
        ("estimated", list(config.estimated)),
        ("inputs", list(config.inputs)),
        ("rank", data.basis.rank),
        ("basis_sha256", data.basis.digest),
    ):
        # Cards of early versions know no inputs.
        if card.get(key, []) != wanted:
            raise ExperimentError(
                f"expected a network of this run's {key}, {wanted}, to start from; {network} has "
                f"{card.get(key)}. Start from another one, or take over its data set and settings."
            )
    return weights, card["weights_sha256"]


def _read_state(run: Run, dataset_sha256: str) -> tuple[train.State, str | None]:
    """The state after the last finished epoch, of a training on this data set.

    With it the SHA-256 of the weights that the training started from, if it did.
    """
    tensors, content = files.read_checkpoint(run.checkpoint)
    # Checkpoints of early versions do not tell.
    if content.get("dataset_sha256", dataset_sha256) != dataset_sha256:
        raise ExperimentError(
            f"expected the data set that {run.checkpoint} was trained with; {run.dataset} is "
            f"another. Train again: fisherprint train {run.folder} --force"
        )
    before = train.TrainingConfig.model_validate(content["config"])

    def under(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    state = train.State(content["epochs"], before, under("weights/"), under("moments/"))
    return state, content.get("start_sha256")


def _card(
    run: Run,
    config: train.TrainingConfig,
    data: simulate.DataSet,
    pulses: PulseTrain,
    model: SignalModel,
) -> dict[str, Any]:
    """What the network is: enough to use it without any other file."""
    theta = data.samples["training"].theta
    last = files.read_jsonl(run.log)[-1]
    sigma = config.noise_std
    given = run.experiment.simulation.basis is not None
    return {
        "parameters": list(data.names),
        "units": {parameter.name: parameter.unit for parameter in model.parameters},
        "estimated": list(config.estimated),
        "inputs": list(config.inputs),
        "rank": data.basis.rank,
        "ranges": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(data.names, theta.T, strict=True)
        },
        "snr_range": [scale / sigma for scale in config.scale_range],
        "fisher_unknowns": [*(n for n in data.names if n not in config.inputs), *fisher.SCALE],
        "losses": {
            "training": last["train_loss"],
            "validation": last["validation_losses"],
            "epochs": last["number"],
        },
        "config": config.model_dump(mode="json"),
        "basis_method": "given" if given else "svd" if data.crb_weight is None else "crb-svd",
        "basis_weight": data.crb_weight,
        "basis_sha256": data.basis.digest,
        "train_sha256": pulses.digest,
        "versions": versions(),
    }


def _basis_of(section: MapSection, pulses: PulseTrain) -> str | None:
    """Identity of the basis that images were made with, as far as anything tells."""
    if section.basis is None or section.basis_key is None:
        return files.recorded_basis(section.coefficients)
    return files.read_basis(
        section.basis, key=section.basis_key, n_samples=pulses.n_samples
    ).digest


def _statistics(result: maps.Maps, inside: NDArray[np.bool_]) -> dict[str, Any]:
    """Median and quartiles of each map over a region, SI units."""
    statistics: dict[str, Any] = {"voxels": int(inside.sum())}
    for name in result.names:
        values = result[name][inside]
        finite = values[np.isfinite(values)]
        quartiles = np.percentile(finite, (25, 50, 75)) if finite.size else [None] * 3
        statistics[name] = dict(
            zip(QUARTILES, [None if q is None else float(q) for q in quartiles], strict=True)
        )
    return statistics
