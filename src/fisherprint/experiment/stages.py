"""The stages of an experiment over its run folder, one function each, and their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import evaluate as evaluation
from fisherprint import files, maps, simulate, train
from fisherprint.experiment.folder import Run, forget_training, require_absent, versions
from fisherprint.experiment.pages import report_run
from fisherprint.experiment.schema import ExperimentError, MapSection, inputs
from fisherprint.models import TwoPool
from fisherprint.models.two_pool import PARAMETERS
from fisherprint.network import Network, as_estimator
from fisherprint.reconstruct import phantom
from fisherprint.sequence import PulseTrain

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many of it, and of how many."""
Say = Callable[[str], None]
"""Called with a line for people."""

COMPILING = " (after installation the model is compiled first, about half a minute)"
CARD_KEYS = ("parameters", "estimated", "rank", "basis_sha256", "dataset_sha256")
QUARTILES = ("lower_quartile", "median", "upper_quartile")
# Voxels of the digital brain that count as one tissue: at least this share of it.
_PURE = 0.95
# Voxels simulated at once.
_BRAIN_BATCH = 4096


class BasisMismatchError(ValueError):
    """Coefficients of one basis, a network of another."""


def simulate_run(run: Run, *, progress: Progress) -> None:
    """Stage 1: write the data set."""
    model, prior, basis = inputs(run.experiment)
    section = run.experiment.simulation
    data = simulate.dataset(
        model,
        prior,
        {split: getattr(section, split) for split in simulate.SPLITS},
        basis=basis,
        seed=section.seed,
        progress=progress,
    )
    files.write_dataset(run.dataset, data, model.train, seed=section.seed, versions=versions())


def labelled(data: simulate.DataSet, split: str, names: tuple[str, ...]) -> train.Samples:
    """A split's coefficients with the truth and the coefficients' bound of some parameters."""
    reduced = data.samples[split]
    return train.Samples(
        data.names, reduced.coefficients, reduced.theta, reduced.crb_coefficients
    ).select(names)


def train_run(
    run: Run, *, resume: bool, force: bool = False, say: Say, progress: Progress
) -> None:
    """Stage 2: train from the start or from the last epoch; then write weights and card.

    Args:
        run: where the data set is.
        resume: go on after the last finished epoch, if there is one.
        force: forget earlier epochs, once the data set is known to be readable.
        say: told each epoch's losses.
        progress: told how many epochs are done.

    Raises:
        OutputExistsError: there are epochs of an earlier training and `resume` is not given, or
            its network without the checkpoint to go on from.
    """
    config = run.experiment.training
    data, pulses = files.read_dataset(run.dataset)
    if force:
        forget_training(run)
    state = None
    if run.checkpoint.exists():
        if not resume:
            raise files.OutputExistsError(
                f"{run.network} already holds trained epochs. Go on with --resume, or start again "
                "with --force."
            )
        state = _read_state(run.checkpoint, config)
        say(f"resuming after epoch {state.epochs} of {config.epochs}")
    else:
        require_absent(run.network / "card.json")
    done = state.epochs if state else 0
    # A kill between the two writes leaves an epoch in the log that the checkpoint lacks.
    log = files.read_jsonl(run.log) if run.log.exists() else []
    files.write_jsonl(run.log, [record for record in log if record["number"] <= done])
    training, validation = (
        labelled(data, split, config.estimated) for split in ("training", "validation")
    )
    progress("epochs", done, config.epochs)
    epochs = train.train(training, validation, config, state=state)
    for epoch, state in epochs:
        tensors = {f"weights/{key}": value for key, value in state.weights.items()}
        tensors |= {f"moments/{key}": value for key, value in state.moments.items()}
        content = {"epochs": state.epochs, "config": config.model_dump(mode="json")}
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
            for product in (run.audit, run.maps / "summary.json"):
                product.unlink(missing_ok=True)
        files.save_network(run.network, state.weights, _card(run, data, pulses))


def evaluate_run(run: Run, *, say: Say, progress: Progress) -> None:
    """Stage 3: bias and variance on the test set against the bound of the coefficients."""
    section, config = run.experiment.evaluation, run.experiment.training
    data, _ = files.read_dataset(run.dataset)
    network, card = load_network(run)
    if card["dataset_sha256"] != files.file_digest(run.dataset):
        raise ExperimentError(
            f"expected the data set that {run.network} was trained with; {run.dataset} is "
            f"another. Train again: fisherprint train {run.folder} --force"
        )
    test = labelled(data, "test", config.estimated)
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
        rng=rng,
    )
    audit = evaluation.audit(
        as_estimator(network),
        few,
        snr=section.snr,
        n_noise=section.n_noise,
        progress=lambda done, total: progress("fingerprints x SNR levels", done, total),
        rng=rng,
    )
    files.write_audit(run.audit, audit, score)
    for line in summary(audit, score):
        say(line)


def summary(audit: evaluation.Audit, score: evaluation.Score) -> list[str]:
    """The audit in lines of text: the loss over the training range, then both shares by SNR."""
    lines = [
        f"loss over the training range of M0: {score.loss:.3f} ± {score.standard_error:.3f} ("
        + ", ".join(
            f"{name} {loss:.3f}"
            for name, loss in zip(score.names, score.loss_by_parameter, strict=True)
        )
        + ")",
        "  SNR   bias²/CRB   variance/CRB   loss",
    ]
    shares = audit.mean_shares()
    for snr, bias, variance in zip(audit.snr, shares.bias, shares.variance, strict=True):
        lines.append(f"{snr:5g}   {bias:9.3f}   {variance:12.3f}   {bias + variance:.3f}")
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
            f"Train it: fisherprint train {run.folder}"
        )
    weights, card = files.load_network_files(run.network, required=CARD_KEYS)
    return Network.from_weights(weights).eval(), card


def map_run(
    run: Run,
    section: MapSection,
    out: Path,
    *,
    force: bool = False,
    say: Say,
    progress: Progress,
) -> None:
    """Stage 4: coefficient images to parameter maps.

    Args:
        run: where the network is.
        section: the images, a mask if there is one, their basis if its file is known.
        out: folder for one NIfTI and one JSON a parameter; `white_matter.nii.gz` and
            `summary.json` with medians and quartiles.
        force: map images of another basis all the same, and replace maps that are there.
        say: told what is assumed and found.
        progress: told how many voxels are done.

    Raises:
        BasisMismatchError: the images were made with another basis, or have another rank.
        OutputExistsError: `out` already holds maps.
    """
    if (out / "summary.json").exists() and not force:
        raise files.OutputExistsError(
            f"{out} already holds maps. Choose another folder, or replace them with --force."
        )
    network, card = load_network(run)
    volume = files.read_coefficients(
        section.coefficients, key=section.key, mask_key=section.mask_key, rank=card["rank"]
    )
    known = _basis_of(section, run)
    if known is None:
        say("the images do not say which basis they were made with; only the rank was checked")
    elif known != card["basis_sha256"]:
        if not force:
            raise BasisMismatchError(
                f"expected coefficients in the network's basis {card['basis_sha256'][:12]}...; "
                f"{section.coefficients} was made with {known[:12]}.... Reconstruct it with the "
                "basis of this run, or map it all the same with --force."
            )
        say("the images were made with another basis; mapped all the same")
    mask = volume.mask
    if section.mask is not None:
        mask = files.read_mask(section.mask, volume.data.shape[:3])
    estimated = tuple(card["estimated"])
    result = maps.estimate_maps(
        volume.data,
        as_estimator(network),
        estimated,
        mask=mask,
        on_progress=lambda done, total: progress("voxels", done, total),
    )
    described = [PARAMETERS[name] for name in estimated]
    provenance = {
        "fisherprint": versions()["fisherprint"],
        "network_sha256": card["weights_sha256"],
        "dataset_sha256": card["dataset_sha256"],
        "basis_sha256": card["basis_sha256"],
        "basis_of_images_sha256": known,
        "loss": card["config"]["loss"],
    }
    files.write_maps(result, out, volume=volume, parameters=described, provenance=provenance)
    white_matter = out / "white_matter.nii.gz"
    white_matter.unlink(missing_ok=True)  # of earlier maps
    regions = {"all": result.mask}
    longitudinal = next((name for name in ("T1f", "T1") if name in estimated), None)
    if "m0s" in estimated and longitudinal is not None:
        try:
            white = maps.white_matter(result["m0s"], result[longitudinal])
        except ValueError as error:
            say(f"no white matter found: {error}")
        else:
            regions["white matter"] = white
            files.write_mask(white_matter, white, volume=volume)
    statistics = {name: _statistics(result, inside) for name, inside in regions.items()}
    files.write_json(
        out / "summary.json",
        {"regions": statistics, "failed_voxels": result.n_failed, "provenance": provenance},
    )
    say(f"{int(result.mask.sum())} voxels mapped, {result.n_failed} failed")
    for region, numbers in statistics.items():
        for name in estimated:
            parameter, value = PARAMETERS[name], numbers[name]
            if value["median"] is None:
                say(f"{region}: {name} failed everywhere")
                continue
            low, median, high = (parameter.display_factor * value[key] for key in QUARTILES)
            say(f"{region}: {name} {median:.4g} [{low:.4g}, {high:.4g}] {parameter.display_unit}")


def make_brain(run: Run, *, progress: Progress) -> MapSection:
    """The digital brain's noisy coefficient images and its true maps, in `RUN/brain`."""
    section = run.experiment.brain
    if section is None:
        raise ExperimentError("expected a [brain] section in the experiment; it has none.")
    data, pulses = files.read_dataset(run.dataset)
    model = TwoPool(pulses, run.experiment.model.parameters)
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
    return MapSection(coefficients=coefficients, mask=run.brain / "mask.nii.gz")


def run_all(run: Run, *, say: Say, progress: Progress) -> Path:
    """All stages in their order, skipping those whose results are there; the report's path."""
    stages: list[tuple[str, Path, Callable[[], object]]] = [
        ("simulate", run.dataset, lambda: simulate_run(run, progress=progress)),
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
            say(f"{name} ..." + (COMPILING if name == "simulate" else ""))
            stage()
    return report_run(run)


def _read_state(path: Path, config: train.TrainingConfig) -> train.State:
    tensors, content = files.read_checkpoint(path)
    before = train.TrainingConfig.model_validate(content["config"])

    def under(prefix: str) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return train.State(content["epochs"], before, under("weights/"), under("moments/"))


def _card(run: Run, data: simulate.DataSet, pulses: PulseTrain) -> dict[str, Any]:
    """What the network is: enough to use it without any other file."""
    config = run.experiment.training
    theta = data.samples["training"].theta
    last = files.read_jsonl(run.log)[-1]
    sigma = config.noise_std
    return {
        "parameters": list(data.names),
        "units": {name: PARAMETERS[name].unit for name in data.names},
        "estimated": list(config.estimated),
        "rank": data.basis.rank,
        "ranges": {
            name: [float(column.min()), float(column.max())]
            for name, column in zip(data.names, theta.T, strict=True)
        },
        "snr_range": [scale / sigma for scale in config.scale_range],
        "fisher_unknowns": [*data.names, "Re M0", "Im M0"],
        "losses": {
            "training": last["train_loss"],
            "validation": last["validation_losses"],
            "epochs": last["number"],
        },
        "config": config.model_dump(mode="json"),
        "basis_sha256": data.basis.digest,
        "train_sha256": pulses.digest,
        "dataset_sha256": files.file_digest(run.dataset),
        "versions": versions(),
    }


def _basis_of(section: MapSection, run: Run) -> str | None:
    """Identity of the basis that images were made with, as far as anything tells."""
    if section.basis is None or section.basis_key is None:
        return files.recorded_basis(section.coefficients)
    _, pulses = files.read_dataset(run.dataset)
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
