"""An experiment: its schema, and its stages over a run folder that explains itself.

RUN/experiment.toml    what was asked for, complete
RUN/shards/            parts of the data set, until it is complete
RUN/dataset.h5         parameters, coefficients, both bounds, basis, train, seed, versions
RUN/network/           weights.safetensors, card.json, checkpoint.safetensors, log.jsonl
RUN/evaluation.h5      bias and variance of each test fingerprint; its loss over M0
RUN/maps/              one NIfTI and one JSON a parameter
RUN/brain/             the digital brain, if asked for: coefficients and truth
RUN/report.html        all of it in pictures
"""

from __future__ import annotations

from fisherprint.experiment.cluster import workers
from fisherprint.experiment.folder import (
    Run,
    open_run,
    read_data,
    require_absent,
    start,
    versions,
)
from fisherprint.experiment.pages import report_run
from fisherprint.experiment.schema import (
    BrainSection,
    EvaluationSection,
    Experiment,
    ExperimentError,
    Inputs,
    MapSection,
    ModelSection,
    SequenceSection,
    SimulationSection,
    inputs,
    model,
    read,
    shareable,
)
from fisherprint.experiment.stages import (
    BasisMismatchError,
    evaluate_run,
    forecast_run,
    labelled,
    load_network,
    make_brain,
    map_run,
    run_all,
    simulate_run,
    summary,
    train_run,
)

__all__ = [
    "BasisMismatchError",
    "BrainSection",
    "EvaluationSection",
    "Experiment",
    "ExperimentError",
    "Inputs",
    "MapSection",
    "ModelSection",
    "Run",
    "SequenceSection",
    "SimulationSection",
    "evaluate_run",
    "forecast_run",
    "inputs",
    "labelled",
    "load_network",
    "make_brain",
    "map_run",
    "model",
    "open_run",
    "read",
    "read_data",
    "report_run",
    "require_absent",
    "run_all",
    "shareable",
    "simulate_run",
    "start",
    "summary",
    "train_run",
    "versions",
    "workers",
]
