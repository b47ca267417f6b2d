"""Stage 2: the network of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fisherprint import _storage, files, fisher, simulate, train
from fisherprint.experiment.folder import (
    Progress,
    Run,
    Say,
    forget_results,
    forget_training,
    read_data,
    require_absent,
    versions,
)
from fisherprint.experiment.mapping import CARD_KEYS
from fisherprint.experiment.schema import ExperimentError, network_folder
from fisherprint.models.protocol import SignalModel
from fisherprint.sequence import PulseTrain


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
    run: Run,
    *,
    resume: bool,
    force: bool = False,
    ranks: train.Ranks | None = None,
    say: Say,
    progress: Progress,
) -> None:
    """Stage 2: train from the start or from the last epoch; then write weights and card.

    Args:
        run: where the data set is.
        resume: go on after the last finished epoch, if there is one.
        force: forget earlier epochs and all that came of them, once the data set is known to be
            readable.
        ranks: the processes that train together on one run folder; the first one writes. If
            None, this process on its own, on a GPU if there is one.
        say: told each epoch's losses.
        progress: told how many epochs are done.

    Raises:
        BlockingIOError: another process is at work on this run.
        OutputExistsError: there are epochs of an earlier training and `resume` is not given, or
            its network without the checkpoint to go on from.
        ExperimentError: there is no data set, or the earlier epochs are of another one; or there
            is no network to start from, or it has another basis or other parameters.
        ValueError: both `resume` and `force`, a start with other options, known inputs and a
            data set of an early version, or what processes cannot share.
    """
    if resume and force:
        raise ValueError(
            "expected --resume, which keeps the earlier epochs, or --force, which forgets them; "
            "got both. Drop one."
        )
    ranks = train.alone() if ranks is None else ranks
    config = run.experiment.training.config
    data, pulses, model = read_data(run)
    digest = files.file_digest(run.dataset)
    # What cannot be replaced is not removed, and what has begun needs no start.
    training, validation = (
        labelled(data, split, config.estimated, known=config.inputs)
        for split in ("training", "validation")
    )
    # The first process writes for all of them.
    with _storage.locked(run.folder) if ranks.rank == 0 else contextlib.nullcontext():
        start, start_digest = None, None
        if run.experiment.training.start is not None and (force or not run.checkpoint.exists()):
            start, start_digest = read_start(run.experiment.training.start, config, data)
        if force:
            ranks.first(lambda: forget_training(run))
        state = None
        if run.checkpoint.exists():
            if not resume:
                raise files.OutputExistsError(
                    f"{run.network} already holds trained epochs. Go on with --resume, or start "
                    "again with --force."
                )
            state, start_digest = _read_state(run, digest)
            say(f"resuming after epoch {state.epochs} of {config.epochs}")
        else:
            require_absent(run.network / "card.json")
        done = state.epochs if state else 0
        if ranks.rank == 0:
            # A kill between the two writes leaves an epoch in the log that the checkpoint lacks.
            log = files.read_jsonl(run.log) if run.log.exists() else []
            files.write_jsonl(run.log, [record for record in log if record["number"] <= done])
        if ranks.device.type != "cpu" and ranks.rank == 0:
            say(f"training on {ranks.device}")
        progress("epochs", done, config.epochs)
        epochs = train.train(
            training,
            validation,
            config,
            start=start,
            state=state,
            device=ranks.device,
            ranks=ranks,
        )
        for epoch, state in epochs:
            if ranks.rank == 0:
                tensors = {f"weights/{key}": value for key, value in state.weights.items()}
                tensors |= {f"moments/{key}": value for key, value in state.moments.items()}
                tensors |= {f"last/{key}": value for key, value in state.last.items()}
                content = {
                    "epochs": state.epochs,
                    "config": state.config.model_dump(mode="json"),
                    "dataset_sha256": digest,
                    "start_sha256": start_digest,
                }
                if state.epochs == done + 1:
                    # A network of fewer epochs, and what it gave, are no longer those of this run.
                    (run.network / "card.json").unlink(missing_ok=True)
                    forget_results(run)
                files.append_jsonl(run.log, vars(epoch))
                files.write_checkpoint(run.checkpoint, tensors, content)
            progress("epochs", epoch.number, config.epochs)
            say(
                f"epoch {epoch.number}: {config.loss} loss {epoch.train_loss:.4g}, "
                f"validation {epoch.validation_loss:.4g}"
            )
        if state is not None and ranks.rank == 0:
            card = _card(run, state.config, data, pulses, model)
            card |= {"dataset_sha256": digest, "start_sha256": start_digest}
            files.save_network(run.network, state.weights, card)


def read_start(
    folder: Path, config: train.TrainingConfig, data: simulate.DataSet
) -> tuple[dict[str, Any], str]:
    """Weights to start from, of a run or network folder, and their SHA-256.

    Raises:
        ExperimentError: none is there, or it has another basis, rank or other parameters.
        UnreadableFileError: its files are damaged.
    """
    network = network_folder(folder)
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

    parts = (under(prefix) for prefix in ("weights/", "moments/", "last/"))
    state = train.State(content["epochs"], before, *parts)
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
