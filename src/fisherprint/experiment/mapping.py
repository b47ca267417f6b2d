"""Stage 4: coefficient images to parameter maps, with a network of a run or a shipped one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import files, fit, inference, maps, train
from fisherprint.error_bars import ErrorBars
from fisherprint.experiment import bars, schema
from fisherprint.experiment.folder import (
    Progress,
    Run,
    Say,
    read_data,
    region_file,
    versions,
)
from fisherprint.experiment.known import read_known
from fisherprint.experiment.schema import BrainSection, ExperimentError, MapSection
from fisherprint.models.protocol import SignalModel
from fisherprint.network import Network, as_estimator
from fisherprint.parameters import Parameter
from fisherprint.reconstruct import phantom
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis

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


@dataclass(frozen=True, eq=False)
class Trained:
    """A network with all that maps are made with, of a run or shipped with the package.

    Attributes:
        folder: of its weights and its card.
        network: ready to estimate.
        card: what it is and how it came about.
        basis: of its coefficients.
        train: whose signals they are.
        model: of that train.
        fingerprints: some of its data set; None where that is not at hand.
    """

    folder: Path
    network: Network
    card: Mapping[str, Any]
    basis: Basis
    train: PulseTrain
    model: SignalModel
    fingerprints: fit.Dictionary | None = None


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


def open_trained(run: Run) -> Trained:
    """What a run has for making maps.

    Raises:
        ExperimentError: there is no data set or no network yet.
        UnreadableFileError: their files are damaged.
    """
    data, pulses, model = read_data(run)
    network, card = load_network(run)
    some = data.samples["training"]
    fingerprints = fit.Dictionary(
        data.names, some.theta[: bars.ENTRIES], some.coefficients[: bars.ENTRIES]
    )
    return Trained(run.network, network, card, data.basis, pulses, model, fingerprints)


def map_run(
    run: Run | Trained,
    section: MapSection,
    out: Path,
    *,
    force: bool = False,
    stated: Mapping[str, str] | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    say: Say,
    progress: Progress,
) -> None:
    """Stage 4: coefficient images to parameter maps, with their error bars.

    Args:
        run: where the data set and the network are; or what else is at hand to make maps with.
        section: the images, a mask if there is one, their basis if its file is known.
        out: folder for one NIfTI and one JSON a parameter, its standard deviation (`<name>_std`),
            M0, its phase, the relative residual and the `maps.Status` of each voxel;
            `white_matter.nii.gz` and `csf.nii.gz` where they can be found, and `summary.json`
            with medians and quartiles and how many voxels have each status.
        force: map images of another basis all the same.
        stated: units to write parameters in by name, as for `files.state_maps`; else SI.
        overwrite: replace maps that are there.
        executor: who computes the error bars; threads on all cores of this process if None.
        say: told what is assumed and found.
        progress: told how many voxels are done.

    Raises:
        BasisMismatchError: the images were made with another basis.
        OutputExistsError: `out` already holds maps.
        ExperimentError: there is no data set or no network yet, or the images' noise is missing
            or of no use.
        ValueError: images of another rank; known maps that are not those of the network's
            inputs, or do not fit the images, or are mostly outside of the range of its training.
    """
    if (out / "summary.json").exists() and not overwrite:
        raise files.OutputExistsError(
            f"{out} already holds maps. Choose another folder, or replace them with --overwrite."
        )
    trained = run if isinstance(run, Trained) else open_trained(run)
    network, card, model = trained.network, trained.card, trained.model
    # What cannot be stated is refused now.
    files.conversions([model.parameters[model.index(n)] for n in card["estimated"]], stated or {})
    volume = files.read_coefficients(
        section.coefficients,
        key=section.key,
        mask_key=section.mask_key if section.mask is None else None,
        rank=card["rank"],
    )
    basis = basis_of_images(section, trained.train)
    if basis is None:
        say("the images do not say which basis they were made with; only the rank was checked")
    elif basis != card["basis_sha256"]:
        if not force:
            raise BasisMismatchError(
                f"expected coefficients in the network's basis {card['basis_sha256'][:12]}...; "
                f"{section.coefficients} was made with {basis[:12]}.... Reconstruct it with the "
                "basis of this network, or map it all the same with --force."
            )
        say("the images were made with another basis; mapped all the same")
    mask = volume.mask
    if section.mask is not None:
        mask = files.read_mask(section.mask, volume.data.shape[:3], key=section.mask_key)
    estimated = tuple(card["estimated"])
    images = volume.data
    # What stands beside the coefficients must not make a mask, nor noise of the background.
    mask = maps.automatic_mask(images) if mask is None else mask
    known = np.empty((*mask.shape, 0))
    config = train.TrainingConfig.model_validate(card["config"])
    if section.noise_std is None and config.snr_input:
        raise ExperimentError(
            "expected the noise_std of the images for a network with snr_input; got None, and "
            f"{trained.folder} has snr_input = True. Measure it in a region without signal."
        )
    schema.require_maps("the network's inputs", config.inputs, section.known)
    if config.inputs or config.snr_input:
        told = [model.parameters[model.index(name)] for name in config.inputs]
        known = read_known(section.known, told, card.get("ranges", {}), mask, say=say)
        # Without signal there is no estimate, whatever is known.
        known[~images.any(axis=-1)] = np.nan
        # Where σ is not given, nothing looks at it.
        noise_std = np.nan if section.noise_std is None else section.noise_std
        extra = train.extra_inputs(config, images, known, noise_std=noise_std)
        images = np.concatenate([images, extra.astype(images.real.dtype)], axis=-1)
    # A place where nothing can be written is found now.
    out.mkdir(parents=True, exist_ok=True)
    precision = section.precision or inference.fastest()
    result = maps.estimate_maps(
        images,
        as_estimator(network, precision=precision),
        estimated,
        mask=mask,
        on_progress=lambda done, total: progress("voxels", done, total),
    )
    described = [model.parameters[model.index(name)] for name in estimated]
    ranges = card.get("ranges", {})
    beside = None
    if section.errors:
        beside = bars.beside_estimates(
            _error_bars(trained, config.inputs),
            volume.data,
            result,
            known,
            noise_std=section.noise_std,
            executor=executor,
            say=say,
            progress=progress,
        )
    provenance = {
        "fisherprint": versions()["fisherprint"],
        "network_sha256": card["weights_sha256"],
        "dataset_sha256": card["dataset_sha256"],
        "basis_sha256": card["basis_sha256"],
        "basis_of_images_sha256": basis,
        "loss": card["config"]["loss"],
        "precision": precision,
        "known_sha256": {name: files.file_digest(path) for name, path in section.known.items()},
        **({} if beside is None else {"noise": beside.noise.recorded}),
    }
    place: dict[str, Any] = {"volume": volume, "provenance": provenance}
    written = files.write_maps(result, out, parameters=described, **place)
    (out / "summary.json").unlink(missing_ok=True)  # of earlier maps
    if beside is not None:
        written += _write_beside(beside, result, out, described, place)
    snr_range = card.get("snr_range") if config.snr_input else None
    status = bars.network_status(result, beside, described, ranges, snr_range=snr_range)
    written.append(files.write_status(status, out, **place))
    files.keep_maps(written)
    regions = regions_of(result, say)
    for name in REGIONS:
        path = out / region_file(name)
        path.unlink(missing_ok=True)  # of earlier maps
        if name in regions:
            files.write_mask(path, regions[name], volume=volume)
    regions = {"all": result.mask} | regions
    statistics = {name: region_statistics(result, inside) for name, inside in regions.items()}
    files.write_json(
        out / "summary.json",
        {
            "regions": statistics,
            "failed_voxels": result.n_failed,
            "status": maps.counted(status),
            "provenance": provenance,
        },
    )
    if stated:
        files.state_maps(out, stated)
    say(f"{int(result.mask.sum())} voxels mapped, {result.n_failed} failed")
    say_status(status, say)
    for region, numbers in statistics.items():
        for parameter in described:
            name, value = parameter.name, numbers[parameter.name]
            if value["median"] is None:
                say(f"{region}: {name} failed everywhere")
                continue
            low, median, high = (parameter.display_factor * value[key] for key in QUARTILES)
            say(f"{region}: {name} {median:.4g} [{low:.4g}, {high:.4g}] {parameter.display_unit}")


def _error_bars(trained: Trained, known: Sequence[str]) -> ErrorBars:
    """What computes error bars of a network's estimates."""
    card, model = trained.card, trained.model
    ranges = card.get("ranges", {})
    fingerprints = trained.fingerprints
    if fingerprints is None:
        fingerprints = bars.drawn(model, trained.basis, trained.train, ranges)
    limits = {}
    for parameter in model.parameters:
        low, high = ranges.get(parameter.name, parameter.bounds)
        limits[parameter.name] = max(low, parameter.bounds[0]), min(high, parameter.bounds[1])
    return ErrorBars(
        model,
        trained.basis,
        estimated=tuple(card["estimated"]),
        known=tuple(known),
        fingerprints=fingerprints,
        bounds=limits,
    )


def _write_beside(
    beside: bars.Beside,
    result: maps.Maps,
    out: Path,
    described: list[Parameter],
    place: Mapping[str, Any],
) -> list[Path]:
    """Error bars, M0 and the residual."""
    names = tuple(parameter.name for parameter in bars.BESIDE)
    std = maps.Maps(result.names, beside.std, result.mask, result.n_failed)
    others = maps.Maps(names, beside.beside, result.mask, result.n_failed)
    written = files.write_maps(std, out, parameters=described, kind="standard deviation", **place)
    return written + files.write_maps(others, out, parameters=bars.BESIDE, **place)


def say_status(status: NDArray[np.uint8], say: Say) -> None:
    """How many voxels of the mask are fine, and how many are not, and why."""
    numbers = maps.counted(status)
    inside = {
        name.replace("_", " "): number
        for name, number in numbers.items()
        if number and name != maps.Status.OUTSIDE_MASK.name.lower()
    }
    say("status: " + ", ".join(f"{number} {name}" for name, number in inside.items()))


def make_brain(run: Run, *, progress: Progress) -> MapSection:
    """The digital brain's noisy coefficient images and its true maps, in `RUN/brain`.

    The maps that the network is told are the true ones.
    """
    section = run.experiment.brain
    if section is None:
        raise ExperimentError("expected a [brain] section in the experiment; it has none.")
    data, _, model = read_data(run)
    config = run.experiment.training.config
    return write_brain(section, config, data.basis, model, run.brain, progress=progress)


def write_brain(
    section: BrainSection,
    config: train.TrainingConfig,
    basis: Basis,
    model: SignalModel,
    out: Path,
    *,
    progress: Progress,
) -> MapSection:
    """The digital brain's noisy coefficient images and its true maps, in a folder.

    Args:
        section: its voxels and its noise.
        config: of the network that it is for, which may be told the noise and true maps.
        basis: of the coefficients.
        model: of the signals.
        out: for all files.
        progress: told how many voxels are done.
    """
    brain = phantom.digital_brain(
        files.read_tissue_maps(), model.names, voxel_size=section.voxel_size
    )
    theta = brain.theta[brain.mask]
    images = np.zeros((*brain.mask.shape, basis.rank), dtype=np.complex64)
    inside = np.empty((len(theta), basis.rank), dtype=np.complex128)
    for first in range(0, len(theta), _BRAIN_BATCH):
        part = slice(first, first + _BRAIN_BATCH)
        inside[part] = basis.compress(model.signal(theta[part]))
        progress("voxels of the digital brain", min(first + _BRAIN_BATCH, len(theta)), len(theta))
    rng = np.random.default_rng(section.seed)
    noise = rng.standard_normal((*inside.shape, 2)).view(np.complex128)[..., 0]
    images[brain.mask] = brain.m0[brain.mask][:, None] * inside + noise / section.snr
    coefficients = out / "coefficients.nii.gz"
    volume = files.Volume(images, brain.affine)
    files.write_coefficients(coefficients, volume, basis_sha256=basis.digest)
    truth = maps.Maps(brain.names, brain.theta, brain.mask, 0)
    files.write_maps(
        truth,
        out / "truth",
        volume=volume,
        parameters=model.parameters,
        provenance={"fisherprint": versions()["fisherprint"], "kind": "digital brain, truth"},
    )
    for tissue, share in zip(brain.tissues, np.moveaxis(brain.fractions, -1, 0), strict=True):
        path = out / "tissues" / f"{tissue.replace(' ', '_')}.nii.gz"
        path.unlink(missing_ok=True)
        # Large voxels leave small tissues without a pure one.
        if (share > _PURE).any():
            files.write_mask(path, share > _PURE, volume=volume)
    files.write_mask(out / "mask.nii.gz", brain.mask, volume=volume)
    return MapSection(
        coefficients=coefficients,
        mask=out / "mask.nii.gz",
        noise_std=1 / section.snr,
        errors=section.errors,
        known={name: out / "truth" / f"{name}.nii.gz" for name in config.inputs},
    )


def regions_of(result: maps.Maps, say: Say) -> dict[str, NDArray[np.bool_]]:
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


def basis_of_images(section: MapSection, pulses: PulseTrain) -> str | None:
    """Identity of the basis that images were made with, as far as anything tells."""
    if section.basis is None or section.basis_key is None:
        return files.recorded_basis(section.coefficients)
    return files.read_basis(
        section.basis, key=section.basis_key, n_samples=pulses.n_samples
    ).digest


def region_statistics(result: maps.Maps, inside: NDArray[np.bool_]) -> dict[str, Any]:
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
