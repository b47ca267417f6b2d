"""Trained networks as small folders that need no run: made of runs, shipped with the package.

FOLDER/weights.safetensors   wide matrices in half precision
FOLDER/card.json             the run's card, sizes of its data set, its audit, what rounding costs
FOLDER/basis.h5              the basis of the coefficients
FOLDER/train.toml            the pulse train, unless it is the bundled one
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fisherprint import _checks, _storage, files, report, sequence, train
from fisherprint.experiment import bound_pages, pages, schema
from fisherprint.experiment.folder import (
    Progress,
    Run,
    Say,
    read_data,
    require_absent,
    versions,
)
from fisherprint.experiment.mapping import (
    CARD_KEYS,
    Trained,
    load_network,
    map_run,
    write_brain,
)
from fisherprint.experiment.schema import ExperimentError
from fisherprint.experiment.training import labelled
from fisherprint.network import Network, as_estimator
from fisherprint.sequence import PulseTrain

DEFAULT = "bundled"
"""The shipped network of the bundled train."""

# What a card says beyond that of a run.
_KEYS = (*CARD_KEYS, "model", "fingerprints", "audit", "rounding", "train_sha256", "date")
# Layers narrower than this hold 1 % of the weights, and errors at the input and the output count
# most.
_WIDE = 128
# √CRB: adds 0.0004 to a loss of 1.
_MAX_ROUNDING = 0.02
_AUDITED_SNR = 50.0
# Larger voxels than the demo's: less than a minute on two cores, with compilation.
_BRAIN = schema.BrainSection(voxel_size=3.0)


def folders() -> dict[str, Path]:
    """Folders of the networks that come with the package, by name."""
    folder = resources.files("fisherprint") / "networks"
    if not folder.is_dir():
        return {}
    with resources.as_file(folder) as path:
        return {card.parent.name: card.parent for card in sorted(path.glob("*/card.json"))}


def load(network: str | Path = DEFAULT) -> Trained:
    """A network that was shipped, ready to estimate, with its basis, train and model.

    Args:
        network: one of `folders`, or a folder that `make` made.

    Raises:
        KeyError: neither of them; the message lists what is shipped.
        UnreadableFileError: a file is missing or damaged, or belongs to another network.
    """
    known = folders()
    folder = known.get(str(network), Path(network))
    if not (folder / "card.json").is_file():
        raise KeyError(
            f"expected a shipped network ({_checks.listing(known) or 'there is none'}), or a "
            f"folder that `fisherprint ship` made; got {network}. Correct the name."
        )
    # Half precision becomes single precision in the network.
    weights, card = files.load_network_files(folder, required=_KEYS)
    own = folder / "train.toml"
    pulses = PulseTrain.read(own) if own.exists() else sequence.bundled()
    basis = files.read_basis(folder / "basis.h5", key="basis", n_samples=pulses.n_samples)
    for what, found in (("basis", basis.digest), ("train", pulses.digest)):
        if found != card[f"{what}_sha256"]:
            raise files.UnreadableFileError(
                f"expected the {what} {card[f'{what}_sha256'][:12]}... that {folder} was trained "
                f"with; got {found[:12]}.... Ship the network again, with this version."
            )
    model = schema.signal_model(schema.ModelSection.model_validate(card["model"]), pulses)
    return Trained(folder, Network.from_weights(weights), card, basis, pulses, model)


def make(run: Run, folder: Path, *, today: date, force: bool = False) -> Trained:
    """Make a network of an evaluated run a folder that needs no run.

    Args:
        run: trained and evaluated.
        folder: made if absent.
        today: for the card.
        force: replace a network that is there.

    Raises:
        OutputExistsError: a network is there, and `force` is not given.
        ExperimentError: the run is not trained or not evaluated, its data set is another one, or
            half precision moves its estimates by more than 2 % of √CRB.
    """
    if not force:
        require_absent(folder / "card.json")
    data, pulses, _ = read_data(run)
    network, card = load_network(run)
    if card["dataset_sha256"] != files.file_digest(run.dataset) or not run.audit.exists():
        raise ExperimentError(
            f"expected a network evaluated on the data set that it was trained with; {run.folder} "
            f"has another data set or no audit. Evaluate it: fisherprint evaluate {run.folder}"
        )
    weights = _rounded(network.state_dict())
    config = train.TrainingConfig.model_validate(card["config"])
    everything = labelled(data, "test", config.estimated, known=config.inputs)
    test, known = everything.select(config.estimated), everything.select(config.inputs).theta
    moved = _moved(network, Network.from_weights(weights), test, known, config)
    # A NaN is refused as well.
    if not all(value <= _MAX_ROUNDING for value in moved.values()):
        raise ExperimentError(
            f"expected half precision to move estimates by at most {_MAX_ROUNDING:g} √CRB; got "
            f"{moved}. Train the network with smaller weights, or share its run folder."
        )
    card |= {
        "model": run.experiment.model.model_dump(mode="json"),
        "fingerprints": {split: len(part.theta) for split, part in data.samples.items()},
        "test_sha256": _storage.digest(test.theta, test.coefficients, test.crb),
        "audit": _audit(run),
        "rounding": moved,
        "date": today.isoformat(),
        "shipped_by": versions(),
    }
    # The card comes last: with it the folder is whole.
    (folder / "card.json").unlink(missing_ok=True)
    (folder / "train.toml").unlink(missing_ok=True)
    files.write_basis(folder / "basis.h5", data.basis)
    if pulses.digest != sequence.bundled().digest:
        pulses.write(folder / "train.toml")
    files.save_network(folder, weights, card)
    return load(folder)


def described(trained: Trained) -> list[str]:
    """What a shipped network is, and how well it does, as lines for people."""
    card, audit = trained.card, trained.card["audit"]
    config = train.TrainingConfig.model_validate(card["config"])
    size = sum(path.stat().st_size for path in trained.folder.iterdir())
    own = "its own" if (trained.folder / "train.toml").exists() else "the bundled"
    low, high = card["snr_range"]
    sizes = card["fingerprints"]
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in audit["loss_by_parameter"].items())
    shares = ", ".join(
        f"{name} {audit['bias'][name]:.3f} and {audit['variance'][name]:.3f}"
        for name in card["estimated"]
    )
    unknown = [name for name in card["parameters"] if name not in config.inputs]
    told = f"; told {', '.join(config.inputs)}" if config.inputs else ""
    start = " from a trained start" if card.get("start_sha256") else ""
    return [
        f"{trained.folder.name}: {', '.join(card['estimated'])} from {card['rank']} coefficients "
        f"({card['basis_method']} basis) of {own} train, {trained.train.duration:.2f} s",
        f"  unknown beside M0: {', '.join(unknown)}{told}; SNR {low:g} to {high:g}; "
        f"{size / 1e6:.1f} MB",
        f"  trained with the {config.loss} loss on {sizes['training']} fingerprints for "
        f"{card['losses']['epochs']} epochs{start}; fisherprint "
        f"{card['versions']['fisherprint']}, {card['date']}",
        f"  loss on {audit['fingerprints']} test fingerprints over this SNR: {audit['loss']:.3f} "
        f"± {audit['standard_error']:.3f} ({losses}); rounding the weights moves estimates by "
        f"{max(card['rounding'].values()):.2g} √CRB at most",
        f"  bias²/CRB and variance/CRB at SNR {audit['snr']:g}: {shares}",
    ]


def demonstrate(trained: Trained, out: Path, *, force: bool, say: Say, progress: Progress) -> Path:
    """Map the digital brain, simulated through a network's train and basis; the page's path.

    Args:
        trained: the network.
        out: for the brain, its maps and the page.
        force: replace those of an earlier call.
        say: told what is found.
        progress: told how many voxels are done.

    Raises:
        OutputExistsError: maps are there and `force` is not given, or `out` is a run folder.
    """
    if (out / "experiment.toml").exists():
        raise files.OutputExistsError(
            f"{out} is a run folder with results of its own. Choose another folder."
        )
    title = f"Pretrained network, digital brain: {trained.folder.name}"
    run = Run(out, schema.Experiment(title=title, brain=_BRAIN))
    if not force:
        require_absent(run.maps / "summary.json")
    say("digital brain ...")
    config = train.TrainingConfig.model_validate(trained.card["config"])
    section = write_brain(
        _BRAIN, config, trained.basis, trained.model, run.brain, progress=progress
    )
    say("map ...")
    map_run(trained, section, run.maps, overwrite=force, say=say, progress=progress)
    return write_page(trained, run)


def write_page(trained: Trained, run: Run) -> Path:
    """The report of maps that a shipped network made; its path.

    Args:
        trained: the network.
        run: a folder of these maps, by the title of its experiment.

    Raises:
        UnreadableFileError: there are no maps yet, or they are damaged.
    """
    shown = [
        trained.model.parameters[trained.model.index(name)] for name in trained.card["estimated"]
    ]
    html = report.page(
        run.experiment.title,
        "\n\n".join(line.strip() for line in described(trained)),
        [
            *pages.map_sections(run, shown),
            bound_pages.train_section({"train": trained.train}),
        ],
        provenance={
            "network SHA-256": trained.card["weights_sha256"],
            "basis SHA-256": trained.basis.digest,
            "train SHA-256": trained.train.digest,
            **versions(),
        },
    )
    files.write_text(run.report, html)
    return run.report


def _rounded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wide matrices in half precision: 11 bits, and half of the bytes of the file."""
    return {
        name: tensor.half() if tensor.ndim == 2 and min(tensor.shape) >= _WIDE else tensor
        for name, tensor in weights.items()
    }


def _moved(
    network: Network,
    rounded: Network,
    test: train.Samples,
    known: NDArray[np.float64],
    config: train.TrainingConfig,
) -> dict[str, float]:
    """Root mean square of what rounding moves, in √CRB, at the largest SNR of the training."""
    scale, sigma = config.scale_range[1], config.noise_std
    rng = np.random.default_rng(0)
    M0 = scale * np.exp(2j * np.pi * rng.random((len(test.theta), 1)))
    noise = rng.standard_normal((*test.coefficients.shape, 2)).view(np.complex128)[..., 0]
    images: NDArray[Any] = M0 * test.coefficients + sigma * noise
    extra = train.extra_inputs(config, images, known, noise_std=sigma)
    images = np.concatenate([images, extra], axis=-1)
    difference = as_estimator(network)(images) - as_estimator(rounded)(images)
    # Where the bound is infinite nothing counts.
    squares = difference**2 / (test.crb * (sigma / scale) ** 2)
    count = np.isfinite(test.crb).sum(axis=0).clip(min=1)
    return dict(zip(test.names, np.sqrt(squares.sum(axis=0) / count).tolist(), strict=True))


def _audit(run: Run) -> dict[str, Any]:
    """Loss over the training range of M0, and its shares near SNR 50, of a run's test set."""
    audit, score = files.read_audit(run.audit)
    q = int(np.abs(np.log(audit.snr / _AUDITED_SNR)).argmin())
    shares = audit.mean_shares_by_parameter()

    def named(values: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(audit.names, values.tolist(), strict=True))

    return {
        "loss": score.loss,
        "standard_error": score.standard_error,
        "loss_by_parameter": named(score.loss_by_parameter),
        "fingerprints": score.n_used,
        "snr": float(audit.snr[q]),
        "shares_of": len(audit.truth),
        "n_noise": audit.n_noise,
        "bias": named(shares.bias[q]),
        "variance": named(shares.variance[q]),
    }
