"""Stage 3, the audit of a run, and all stages in their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import evaluate as evaluation
from fisherprint import files, fisher, train
from fisherprint.experiment.folder import (
    Progress,
    Run,
    Say,
    read_data,
)
from fisherprint.experiment.mapping import load_network, make_brain, map_run
from fisherprint.experiment.pages import report_run
from fisherprint.experiment.schema import ExperimentError
from fisherprint.experiment.simulating import simulate_run
from fisherprint.experiment.training import labelled, train_run
from fisherprint.network import as_estimator

# How far a training went, and how fast: no other estimates are asked for.
_MAY_DIFFER = ("epochs", "compiled", "precision")


def evaluate_run(run: Run, *, say: Say, progress: Progress) -> None:
    """Stage 3: bias and variance on the test set against the bound of the coefficients.

    In float32 on any processor, so that audits compare (docs/decisions/027).

    Raises:
        ExperimentError: there is no data set or no network yet, or the network was trained with
            another data set or other settings than the experiment has now.
        UnreadableFileError: their files are damaged.
    """
    section = run.experiment.evaluation
    data, _, _ = read_data(run)
    network, card = load_network(run)
    config = _trained_with(run, card)
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


def _trained_with(run: Run, card: Mapping[str, Any]) -> train.TrainingConfig:
    """What a network was trained with, which must be what its run's experiment says."""
    config = train.TrainingConfig.model_validate(card["config"])
    before, now = config.model_dump(), run.experiment.training.config.model_dump()
    changed = [key for key in before if key not in _MAY_DIFFER and before[key] != now[key]]
    if changed:
        raise ExperimentError(
            f"expected the [training] that {run.network} came from; {run.folder}/experiment.toml "
            f"has another {', '.join(changed)}. Change it back, or train again: fisherprint "
            f"train {run.folder} --force"
        )
    return config


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


def run_all(run: Run, *, executor: Executor | None = None, say: Say, progress: Progress) -> Path:
    """All stages in their order, skipping those whose results are there; the report's path.

    The executor is that of the simulation and of error bars.
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
            map_run(run, section, run.maps, executor=executor, say=say, progress=progress)

        stages.append(("map", run.maps / "summary.json", map_stage))
    for name, product, stage in stages:
        if product.exists() and not (name == "train" and _is_to_go_on(run)):
            say(f"{name}: done before ({product})")
        else:
            say(f"{name} ...")
            stage()
    return report_run(run)


def _is_to_go_on(run: Run) -> bool:
    """Whether the experiment asks for more epochs than the network has."""
    done = files.read_json(run.network / "card.json")["losses"]["epochs"]
    return bool(done < run.experiment.training.epochs) and run.checkpoint.exists()
