"""Run folders: what lies where, and who may overwrite it."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from fisherprint import files
from fisherprint.experiment import schema
from fisherprint.experiment.schema import Experiment, ExperimentError, inputs, read
from fisherprint.models.protocol import SignalModel
from fisherprint.sequence import PulseTrain
from fisherprint.simulate import DataSet

Progress = Callable[[str, int, int], None]
"""Called with what is done, how many of it, and of how many."""
Say = Callable[[str], None]
"""Called with a line for people."""


# Fingerprints of the prior that a forced run must be able to simulate.
_TRIED = 64


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
    shards = property(lambda self: self.folder / "shards")
    network = property(lambda self: self.folder / "network")
    checkpoint = property(lambda self: self.network / "checkpoint.safetensors")
    log = property(lambda self: self.network / "log.jsonl")
    audit = property(lambda self: self.folder / "evaluation.h5")
    maps = property(lambda self: self.folder / "maps")
    brain = property(lambda self: self.folder / "brain")
    report = property(lambda self: self.folder / "report.html")


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


def read_data(run: Run) -> tuple[DataSet, PulseTrain, SignalModel]:
    """The data set of a run, the train it was simulated with, and the model of that train.

    Raises:
        ExperimentError: there is none yet.
        UnreadableFileError: it is damaged.
    """
    if not run.dataset.exists():
        raise ExperimentError(
            f"expected a data set in {run.folder}; there is none yet. Simulate first: "
            f"fisherprint simulate {run.folder / 'experiment.toml'} -o {run.folder}"
        )
    data, pulses = files.read_dataset(run.dataset)
    return data, pulses, schema.model(run.experiment, pulses)


def start(experiment: Experiment, folder: Path, *, force: bool = False) -> Run:
    """Make a run folder, or take one of the same experiment or without results.

    Raises:
        OutputExistsError: the folder holds results of another experiment; `force` removes them,
            unless the inputs of the new one are missing or damaged, which raises as `inputs`, or
            its prior cannot be simulated, which raises as the model.
        ExperimentError: with `force`, a training that starts from this very folder.
    """
    path = folder / "experiment.toml"
    run = Run(folder, experiment)
    if force:
        # What cannot be made anew is not removed.
        given, seed = inputs(experiment), experiment.simulation.seed
        given.model.simulate(given.prior.sample(_TRIED, rng=np.random.default_rng(seed)))
        begin = experiment.training.start
        if begin is not None and schema.network_folder(begin).resolve() == run.network.resolve():
            raise ExperimentError(
                f"expected a training that starts from another run; got {begin}, which --force "
                "would remove. Choose another folder."
            )
        forget_training(run)
        run.dataset.unlink(missing_ok=True)
        shutil.rmtree(run.shards, ignore_errors=True)
    elif any(path.exists() for path in (run.dataset, run.checkpoint, run.network / "card.json")):
        if _asked_for(open_run(folder).experiment) != _asked_for(experiment):
            raise files.OutputExistsError(
                f"{folder} holds a run of another experiment. Choose another folder, or replace "
                "the run with --force."
            )
        return open_run(folder)
    with contextlib.suppress(ExperimentError, files.UnreadableFileError):
        if _asked_for(read(path)) == _asked_for(experiment):
            # Perhaps written by hand, in other words.
            return run
    files.write_toml(path, experiment.model_dump(mode="json", exclude_none=True))
    return run


def _asked_for(experiment: Experiment) -> dict[str, Any]:
    """All that decides the results: with absolute paths, the folder of the paths does not."""
    return experiment.model_dump(exclude={"data"})


def region_file(region: str) -> str:
    """Name of the mask of a region beside the maps."""
    return f"{region.lower().replace(' ', '_')}.nii.gz"


def require_absent(product: Path, *, replaced: str = "it") -> None:
    """Refuse to replace the product of a finished stage.

    Args:
        product: its file.
        replaced: what --force would replace.

    Raises:
        OutputExistsError: it is there.
    """
    if product.exists():
        raise files.OutputExistsError(
            f"{product} is already there. Choose another name, or replace {replaced} with --force."
        )


def forget_training(run: Run) -> None:
    """Remove the network, its checkpoint, its log and its results."""
    for product in (run.checkpoint, run.log, run.network / "card.json"):
        product.unlink(missing_ok=True)
    forget_results(run)


def forget_results(run: Run) -> None:
    """Remove what earlier weights gave: the audit, what marks maps as finished, the report."""
    for product in (run.audit, run.maps / "summary.json", run.report):
        product.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("fisherprint", "numpy", "scipy", "numba", "torch")
    return {"python": platform.python_version()} | {
        package: metadata.version(package) for package in packages
    }
