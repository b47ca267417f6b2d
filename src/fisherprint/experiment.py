"""An experiment: its schema, and its stages over a run folder that explains itself.

RUN/experiment.toml    what was asked for, complete
RUN/dataset.h5         parameters, coefficients, both bounds, basis, train, seed, versions
RUN/network/           weights.safetensors, card.json, checkpoint.safetensors, log.jsonl
RUN/evaluation.h5      bias and variance of each test fingerprint; its loss over M0
RUN/maps/              one NIfTI and one JSON a parameter
RUN/brain/             the digital brain, if asked for: coefficients and truth
RUN/report.html        all of it in pictures
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fisherprint import evaluate as evaluation
from fisherprint import files, maps, parameters, report, sequence, simulate, train
from fisherprint.models import TwoPool
from fisherprint.models.two_pool import PARAMETERS
from fisherprint.network import Network, as_estimator
from fisherprint.parameters import Parameter, Prior, TruncatedNormal, Uniform
from fisherprint.reconstruct import phantom
from fisherprint.sequence import Inversion, PulseTrain
from fisherprint.subspace import Basis


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SequenceSection(_Section):
    """The pulse train; without a path, the one that comes with the package."""

    path: Path | None = Field(None, description=".mat (keys alpha, TRF), .h5 or .toml")
    repetition_time: float | None = Field(None, gt=0, description="TR in s")
    inversion: Inversion | None = Field(None, description="crushed or spoiled")

    @model_validator(mode="after")
    def _describe_a_file(self) -> SequenceSection:
        if self.path is None and not (self.repetition_time is None and self.inversion is None):
            raise ValueError(
                "expected a path with repetition_time or inversion; got none, and the bundled "
                "train has its own. Name a file, or drop both."
            )
        return self


class ModelSection(_Section):
    """The two-pool model."""

    parameters: tuple[str, ...] = Field(
        ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1"),
        description="all that enter the Fisher matrix, with T1 or with T1f and T1s",
    )


class SimulationSection(_Section):
    """The data set."""

    training: int = Field(92160, ge=1, description="fingerprints to train with")
    validation: int = Field(10240, ge=1, description="fingerprints to watch the training with")
    test: int = Field(9056, ge=1, description="fingerprints that the training never sees")
    rank: int = Field(13, ge=2, description="K, coefficients of the SVD basis")
    basis: Path | None = Field(None, description="file of a given basis, instead of the SVD's")
    basis_key: str = Field("U", description="its key")
    seed: int = Field(0, ge=0)


class EvaluationSection(_Section):
    """The audit against the bound."""

    snr: tuple[float, ...] = Field((5, 10, 20, 50, 100, 200), description="values of SNRmax")
    n_noise: int = Field(300, ge=2, description="noise realizations of each fingerprint")
    fingerprints: int = Field(1000, ge=1, description="test fingerprints used, at most")
    seed: int = Field(1, ge=0)


class MapSection(_Section):
    """Coefficient images to map."""

    coefficients: Path = Field(description=".nii(.gz), .cfl, .npy, .mat or .h5")
    key: str | None = Field(None, description="of the images in .mat and .h5")
    mask: Path | None = Field(None, description="NIfTI or .npy; else key, else automatic")
    mask_key: str | None = Field(None, description="of the mask in .mat and .h5")


class BrainSection(_Section):
    """The digital brain, from the tissue maps that ship with nilearn."""

    snr: float = Field(50.0, gt=0, description="SNRmax where |M0| = 1")
    voxel_size: float = Field(2.0, gt=0, description="mm")
    seed: int = Field(2, ge=0)


class Experiment(_Section):
    """One schema for EXPERIMENT.toml, the command line and Python."""

    title: str = "Fisherprint experiment"
    data: Path = Field(Path(), description="folder of the paths below, from this file")
    sequence: SequenceSection = SequenceSection()
    model: ModelSection = ModelSection()
    prior: dict[str, TruncatedNormal | Uniform] = Field(
        {}, description="distributions that replace the paper's"
    )
    simulation: SimulationSection = SimulationSection()
    training: train.TrainingConfig = train.TrainingConfig()
    evaluation: EvaluationSection = EvaluationSection()
    map: MapSection | None = None
    brain: BrainSection | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Experiment:
        for name in (*self.training.estimated, *self.prior):
            if name not in self.model.parameters:
                raise ValueError(
                    f"expected parameters of the model, {', '.join(self.model.parameters)}; "
                    f"got {name!r}. Correct the name, or [model] parameters."
                )
        if self.map is not None and self.brain is not None:
            raise ValueError("expected [map] or [brain]; got both. Keep one.")
        return self


class ExperimentError(ValueError):
    """An experiment file or run folder that is not what it must be."""


Progress = Callable[[str, int, int], None]
"""Called with what is done, how many of it, and of how many."""
Say = Callable[[str], None]
"""Called with a line for people."""

CARD_KEYS = ("parameters", "estimated", "rank", "basis_sha256", "dataset_sha256")


@dataclass(frozen=True)
class Run:
    """A run folder and the experiment in it.

    Attributes:
        folder: where everything is.
        experiment: what was asked for.
    """

    folder: Path
    experiment: Experiment

    dataset = property(lambda self: self.folder / "dataset.h5")
    network = property(lambda self: self.folder / "network")
    checkpoint = property(lambda self: self.network / "checkpoint.safetensors")
    log = property(lambda self: self.network / "log.jsonl")
    audit = property(lambda self: self.folder / "evaluation.h5")
    maps = property(lambda self: self.folder / "maps")
    brain = property(lambda self: self.folder / "brain")
    report = property(lambda self: self.folder / "report.html")


def read(path: Path | None, *, data: Path | None = None) -> Experiment:
    """Read and check EXPERIMENT.toml; None stands for the demo that comes with the package.

    Args:
        path: the file. Its `data`, and the paths that it names, become absolute.
        data: folder to use in place of the file's `data`.

    Raises:
        UnreadableFileError: no such file, or not TOML.
        ExperimentError: the contents do not fit the schema; the message names each field.
    """
    if path is None:
        with resources.as_file(resources.files("fisherprint") / "demo.toml") as demo:
            content, where = files.read_toml(demo), Path()
    else:
        content, where = files.read_toml(path), path.parent
    try:
        experiment = Experiment.model_validate(content)
    except ValidationError as error:
        raise ExperimentError(f"{path}: {_explained(error)}") from error
    folder = (where / experiment.data if data is None else data).resolve()
    return _resolved(experiment, folder)


def open_run(folder: Path) -> Run:
    """A run folder that `start` made.

    Raises:
        ExperimentError: there is none.
    """
    path = folder / "experiment.toml"
    if not path.is_file():
        raise ExperimentError(
            f"expected a run folder with an experiment.toml; {folder} has none. "
            "Make one with: fisherprint simulate EXPERIMENT.toml -o RUN"
        )
    return Run(folder, read(path))


def start(experiment: Experiment, folder: Path, *, force: bool = False) -> Run:
    """Make a run folder, or take one of the same experiment or without results.

    Raises:
        OutputExistsError: the folder holds results of another experiment; `force` removes them.
    """
    path = folder / "experiment.toml"
    run = Run(folder, experiment)
    if force:
        forget_training(run)
        for product in (run.dataset, run.audit, run.maps / "summary.json", run.report):
            product.unlink(missing_ok=True)
    elif run.dataset.exists():
        if _asked_for(open_run(folder).experiment) != _asked_for(experiment):
            raise files.OutputExistsError(
                f"{folder} holds a run of another experiment. Choose another folder, or replace "
                "the run with --force."
            )
        return open_run(folder)
    files.write_toml(path, experiment.model_dump(mode="json", exclude_none=True))
    return run


def _asked_for(experiment: Experiment) -> dict[str, Any]:
    """All that decides the results: with absolute paths, the folder of the paths does not."""
    return experiment.model_dump(exclude={"data"})


def require_absent(product: Path) -> None:
    """Refuse to replace the product of a finished stage.

    Raises:
        OutputExistsError: it is there.
    """
    if product.exists():
        raise files.OutputExistsError(
            f"{product} is already there. Choose another run folder, or replace it with --force."
        )


def forget_training(run: Run) -> None:
    """Remove the network, its checkpoint and its log."""
    for product in (run.checkpoint, run.log, run.network / "card.json"):
        product.unlink(missing_ok=True)


def pulse_train(experiment: Experiment) -> PulseTrain:
    """The experiment's train, read or bundled."""
    section = experiment.sequence
    if section.path is None:
        return sequence.bundled()
    return PulseTrain.read(
        section.path, repetition_time=section.repetition_time, inversion=section.inversion
    )


def prior(experiment: Experiment, repetition_time: float) -> Prior:
    """The paper's prior with the experiment's replacements."""
    default = parameters.paper_prior(experiment.model.parameters, repetition_time=repetition_time)
    return Prior({**default.distributions, **experiment.prior}, default.ordered)


def simulate_run(run: Run, *, progress: Progress) -> None:
    """Stage 1: write the data set."""
    experiment, section = run.experiment, run.experiment.simulation
    pulses = pulse_train(experiment)
    model = TwoPool(pulses, experiment.model.parameters)
    basis: Basis | int = section.rank
    if section.basis is not None:
        basis = files.read_basis(section.basis, key=section.basis_key, n_samples=model.n_samples)
    data = simulate.dataset(
        model,
        prior(experiment, pulses.repetition_time),
        {split: getattr(section, split) for split in simulate.SPLITS},
        basis=basis,
        seed=section.seed,
        progress=progress,
    )
    files.write_dataset(run.dataset, data, pulses, seed=section.seed, versions=versions())


def labelled(data: simulate.DataSet, split: str, names: tuple[str, ...]) -> train.Samples:
    """A split's coefficients with the truth and the coefficients' bound of some parameters."""
    reduced = data.samples[split]
    return train.Samples(
        data.names, reduced.coefficients, reduced.theta, reduced.crb_coefficients
    ).select(names)


def train_run(run: Run, *, resume: bool, say: Say, progress: Progress) -> None:
    """Stage 2: train from the start or from the last epoch; then write weights and card.

    Raises:
        OutputExistsError: there are epochs of an earlier training and `resume` is not given, or
            its network without the checkpoint to go on from.
    """
    config = run.experiment.training
    data, pulses = files.read_dataset(run.dataset)
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
    network, _ = load_network(run.network)
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


def load_network(folder: Path) -> tuple[Network, dict[str, Any]]:
    """A trained network and its card.

    Raises:
        UnreadableFileError: there is none yet, or its files are damaged.
    """
    weights, card = files.load_network_files(folder, required=CARD_KEYS)
    return Network.from_weights(weights).eval(), card


def map_run(
    run: Run,
    section: MapSection,
    out: Path,
    *,
    basis: Path | None = None,
    force: bool = False,
    say: Say,
    progress: Progress,
) -> None:
    """Stage 4: coefficient images to parameter maps.

    Args:
        run: where the network is.
        section: the images, and a mask if there is one.
        out: folder for one NIfTI and one JSON a parameter; `white_matter.nii.gz` and
            `summary.json` with medians and quartiles.
        basis: file of the basis that the images were made with; checked against the network's.
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
    network, card = load_network(run.network)
    volume = files.read_coefficients(
        section.coefficients, key=section.key, mask_key=section.mask_key, rank=card["rank"]
    )
    known = _basis_of(section.coefficients, basis, run, card)
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
    regions = {"all": result.mask}
    longitudinal = next((name for name in ("T1f", "T1") if name in estimated), None)
    if "m0s" in estimated and longitudinal is not None:
        try:
            white = maps.white_matter(result["m0s"], result[longitudinal])
        except ValueError as error:
            say(f"no white matter found: {error}")
        else:
            regions["white matter"] = white
            files.write_mask(out / "white_matter.nii.gz", white, volume=volume)
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


def report_run(run: Run) -> Path:
    """Stage 5: the page, of as many stages as there are.

    Raises:
        UnreadableFileError: there is no data set yet.
    """
    experiment, estimated = run.experiment, run.experiment.training.estimated
    data, pulses = files.read_dataset(run.dataset)
    described = [PARAMETERS[name] for name in estimated]
    everything = [PARAMETERS[name] for name in data.names]
    sections = []
    facts = [
        f"{pulses.n_samples} pulses in {len(pulses.flip_angle)} train(s), "
        f"{pulses.duration:.1f} s, TR {1e3 * pulses.repetition_time:g} ms. "
        f"The Fisher matrix has {', '.join(data.names)} and complex M0 as unknowns."
    ]
    if run.audit.exists():
        audit, score = files.read_audit(run.audit)
        facts.append(
            f"On test data the network's loss, averaged over the training range of M0, is "
            f"{score.loss:.2f} ± {score.standard_error:.2f} (1: as good as any unbiased estimator "
            "can be; shrinking towards the prior can go below)."
        )
    if (run.maps / "summary.json").exists():
        sections += _map_sections(run, described)
    if run.audit.exists():
        sections += _audit_sections(run, audit, score, described)
    if run.log.exists():
        figure = report.convergence(files.read_jsonl(run.log), experiment.training.loss)
        caption = (
            "Loss on the training and on the validation set after each epoch. For the CRB loss, "
            "1 is what a maximally efficient unbiased estimator scores (Fig. 3 of the paper)."
        )
        sections.append(report.Section("Convergence", caption, figure))
    caption = "Flip angle and duration of each pulse; the triangle is the inversion."
    sections.append(report.Section("Pulse train", caption, report.draw_train(pulses)))
    caption = (
        f"By how much {data.basis.rank} coefficients raise the bound of the variance, compared "
        f"with the whole signal. The basis holds {data.energy:.5%} of the signals' energy."
    )
    figure = report.compression_cost(data, everything)
    sections.append(report.Section("What compression costs", caption, figure))
    html = report.page(
        experiment.title, "\n\n".join(facts), sections, provenance=_provenance(run, data, pulses)
    )
    files.write_text(run.report, html)
    return run.report


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
            say(f"{name} ...")
            stage()
    return report_run(run)


class BasisMismatchError(ValueError):
    """Coefficients of one basis, a network of another."""


QUARTILES = ("lower_quartile", "median", "upper_quartile")
# Voxels of the digital brain that count as one tissue: at least this share of it.
_PURE = 0.95
# Voxels simulated at once.
_BRAIN_BATCH = 4096

_EXPECTED_WHITE_MATTER = {"m0s": 0.212, "T1f": 1.84, "T1s": 0.34, "T2f": 76.9e-3, "Rx": 13.6}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("fisherprint", "numpy", "scipy", "numba", "torch")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }


def _explained(error: ValidationError) -> str:
    """One line for each field that does not fit."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "value_error":  # ours, which says what it got
            lines.append(f"{field}: {item['msg'].removeprefix('Value error, ')}")
            continue
        unknown = item["type"] == "extra_forbidden"
        hint = " (an unknown name; check its spelling)" if unknown else ""
        lines.append(f"{field}: {item['msg']}{hint}; got {item['input']!r}")
    return "expected another content; correct these fields:\n  " + "\n  ".join(lines)


def _resolved(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with absolute paths."""

    def moved(section: BaseModel, *fields: str) -> BaseModel:
        paths = {name: getattr(section, name) for name in fields}
        return section.model_copy(
            update={name: folder / path for name, path in paths.items() if path is not None}
        )

    update: dict[str, Any] = {
        "data": folder,
        "sequence": moved(experiment.sequence, "path"),
        "simulation": moved(experiment.simulation, "basis"),
    }
    if experiment.map is not None:
        update["map"] = moved(experiment.map, "coefficients", "mask")
    return experiment.model_copy(update=update)


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


def _basis_of(
    coefficients: Path, basis: Path | None, run: Run, card: Mapping[str, Any]
) -> str | None:
    """Identity of the basis that images were made with, as far as anything tells."""
    if basis is not None:
        _, pulses = files.read_dataset(run.dataset)
        section = run.experiment.simulation
        return files.read_basis(basis, key=section.basis_key, n_samples=pulses.n_samples).digest
    return files.recorded_basis(coefficients)


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


def _audit_sections(
    run: Run, audit: evaluation.Audit, score: evaluation.Score, described: list[Parameter]
) -> list[report.Section]:
    config = run.experiment.training
    low, high = (scale / config.noise_std for scale in config.scale_range)
    near = float(audit.snr[np.abs(np.log(audit.snr / 50)).argmin()])
    return [
        report.Section(
            "Loss and its shares",
            "Mean squared error in units of the bound of the coefficients, split into bias and "
            "variance, against SNRmax; the range of the training is shaded (Fig. 7). A network "
            "may trade bias for variance, so look at both.",
            [
                report.score_table({config.loss: score}, described),
                report.loss_shares(audit, described, training_snr=(low, high)),
                report.shares_table(audit, described),
            ],
        ),
        report.Section(
            f"Bias and standard deviation at SNR {near:g}",
            "Bias of each test fingerprint (Fig. 5), its standard deviation over √CRB (Fig. 6), "
            "and the shares of the loss against √CRB (Fig. 8).",
            [
                report.bias_histograms(audit, described, snr=near),
                report.std_histograms(audit, described, snr=near),
                report.shares_by_bound(audit, described, snr=near),
            ],
        ),
    ]


def _map_sections(run: Run, described: list[Parameter]) -> list[report.Section]:
    estimate = files.read_maps(run.maps, [parameter.name for parameter in described])
    affine = estimate.affine
    if run.experiment.brain is None:
        figure, tables = report.map_panel(estimate.maps, described, affine=affine), []
        caption = "Each voxel estimated by itself."
        if "white matter" in files.read_json(run.maps / "summary.json")["regions"]:
            caption += (
                " White matter is found from the joint mode of m0s and T1 alone; beside its "
                "medians and quartiles stand values of the literature at 3 T."
            )
            white = files.read_mask(run.maps / "white_matter.nii.gz", estimate.mask.shape)
            table = report.roi_table(
                estimate.maps,
                {"white matter": white},
                described,
                expected={"white matter": _EXPECTED_WHITE_MATTER},
            )
            tables.append(table)
        return [report.Section("Parameter maps", caption, [figure, *tables])]
    truth = files.read_maps(run.brain / "truth", [parameter.name for parameter in described])
    regions = {
        path.name.removesuffix(".nii.gz").replace("_", " "): files.read_mask(
            path, estimate.mask.shape
        )
        for path in sorted((run.brain / "tissues").glob("*.nii.gz"))
    }
    expected = {
        name: {p.name: float(np.median(truth.maps[p.name][inside])) for p in described}
        for name, inside in regions.items()
    }
    caption = (
        f"A brain of known parameters, noise at SNR {run.experiment.brain.snr:g}: estimate, truth "
        "and difference. Below, medians and quartiles in voxels of one tissue, beside the truth."
    )
    figure = report.map_panel(estimate.maps, described, truth=truth.maps, affine=affine)
    table = report.roi_table(estimate.maps, regions, described, expected=expected)
    return [report.Section("Digital brain", caption, [figure, table])]


def _provenance(run: Run, data: simulate.DataSet, pulses: PulseTrain) -> dict[str, object]:
    sizes = {split: len(samples.theta) for split, samples in data.samples.items()}
    return {
        "experiment": files.to_toml(run.experiment.model_dump(mode="json", exclude_none=True)),
        "fingerprints": ", ".join(f"{split} {size}" for split, size in sizes.items()),
        "train SHA-256": pulses.digest,
        "basis SHA-256": data.basis.digest,
        "data set SHA-256": files.file_digest(run.dataset),
        **versions(),
    }
