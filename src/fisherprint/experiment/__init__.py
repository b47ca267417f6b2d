"""An experiment: its schema, and its stages over a run folder that explains itself.

RUN/experiment.toml    what was asked for, complete
RUN/shards/            parts of the data set, until it is complete
RUN/dataset.h5         parameters, coefficients, their information and bounds, basis, train, seed
RUN/network/           weights.safetensors, card.json, checkpoint.safetensors, log.jsonl
RUN/evaluation.h5      bias and variance of each test fingerprint; its loss over M0
RUN/maps/              one NIfTI and one JSON a parameter
RUN/brain/             the digital brain, if asked for: coefficients and truth
RUN/report.html        all of it in pictures
"""

from __future__ import annotations

from fisherprint.experiment import shipped
from fisherprint.experiment.bound_pages import (
    BUNDLED,
    TRAIN_SUFFIXES,
    Question,
    bound_table,
    read_trains,
    train_page,
    write_bounds_csv,
    write_bounds_json,
)
from fisherprint.experiment.cluster import workers
from fisherprint.experiment.designing import Design, design_train, read_design
from fisherprint.experiment.digital_scan import DigitalScan, scan_phantom
from fisherprint.experiment.exchange import write_onnx
from fisherprint.experiment.fitting import fit_run
from fisherprint.experiment.folder import (
    Run,
    open_run,
    read_data,
    require_absent,
    start,
    versions,
)
from fisherprint.experiment.mapping import (
    BasisMismatchError,
    Trained,
    load_network,
    make_brain,
    map_run,
    open_trained,
    write_brain,
)
from fisherprint.experiment.pages import report_run
from fisherprint.experiment.reconstructing import Reconstruction, reconstruct_run
from fisherprint.experiment.regional import region_table
from fisherprint.experiment.reproduction import reproduce
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
from fisherprint.experiment.simulating import forecast_run, simulate_run
from fisherprint.experiment.stages import evaluate_run, run_all, summary
from fisherprint.experiment.training import labelled, train_run
from fisherprint.experiment.varying import vary

__all__ = [
    "BUNDLED",
    "TRAIN_SUFFIXES",
    "BasisMismatchError",
    "BrainSection",
    "Design",
    "DigitalScan",
    "EvaluationSection",
    "Experiment",
    "ExperimentError",
    "Inputs",
    "MapSection",
    "ModelSection",
    "Question",
    "Reconstruction",
    "Run",
    "SequenceSection",
    "SimulationSection",
    "Trained",
    "bound_table",
    "design_train",
    "evaluate_run",
    "fit_run",
    "forecast_run",
    "inputs",
    "labelled",
    "load_network",
    "make_brain",
    "map_run",
    "model",
    "open_run",
    "open_trained",
    "read",
    "read_data",
    "read_design",
    "read_trains",
    "reconstruct_run",
    "region_table",
    "report_run",
    "reproduce",
    "require_absent",
    "run_all",
    "scan_phantom",
    "shareable",
    "shipped",
    "simulate_run",
    "start",
    "summary",
    "train_page",
    "train_run",
    "vary",
    "versions",
    "workers",
    "write_bounds_csv",
    "write_bounds_json",
    "write_brain",
    "write_onnx",
]
