"""Experiments: the schema, the stages over a run folder, and that every option does something."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
import torch
from pydantic import BaseModel, ValidationError

from fisherprint import (
    _storage,
    evaluate,
    files,
    fisher,
    fit,
    inference,
    maps,
    report,
    sequence,
)
from fisherprint import experiment as stages
from fisherprint.error_bars import ErrorBars, Noise
from fisherprint.experiment import BasisMismatchError, Experiment, ExperimentError, Run
from fisherprint.files import OutputExistsError, UnreadableFileError
from fisherprint.models.protocol import SignalModel
from fisherprint.models.two_pool import PARAMETERS
from fisherprint.network import as_estimator
from fisherprint.parameters import TruncatedNormal, Uniform
from fisherprint.reconstruct.phantom import TissueMaps
from fisherprint.subspace import Basis
from fisherprint.train import TrainingConfig

SHAPE = (7, 5, 2)
RANK = 6


def silent(*_: object) -> None:
    """Takes what a stage says and keeps it to itself."""


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Nested tables with some entries replaced, or removed by None."""
    result = dict(base)
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return {key: value for key, value in result.items() if value is not None}


def read(folder: Path, content: dict[str, Any], **options: Any) -> Experiment:
    """The experiment of a TOML file in the folder."""
    files.write_toml(folder / "experiment-of-a-test.toml", content)
    return stages.read(folder / "experiment-of-a-test.toml", **options)


TINY = {
    "sequence": {"path": "train.mat", "repetition_time": 3.5e-3},
    "simulation": {"training": 128, "validation": 32, "test": 32, "rank": RANK},
    "training": {
        "estimated": ["m0s", "T2f"],
        "epochs": 1,
        "batch_size": 64,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
    },
    "evaluation": {"snr": [20, 50], "n_noise": 10, "fingerprints": 8},
}
MAP = {"map": {"coefficients": "images.h5", "key": "x"}}
CRB_SVD = {"simulation": {"basis_method": "crb-svd"}}
BASIS = {"simulation": {"rank": None, "basis": "basis.h5", "basis_key": "U"}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trains, four bases, four images and three masks; `trained` adds its own
    basis."""
    folder = tmp_path_factory.mktemp("inputs")
    i = np.arange(1, 40)
    angle = np.r_[np.pi, 0.1 + np.sin(np.pi * i / 40) ** 2]
    duration = np.r_[500e-6, 1e-6 * (150 + 8 * i)]
    for name, scale in (("train", 1.0), ("other", 0.9)):
        scaled = np.r_[np.pi, scale * angle[1:]]
        scipy.io.savemat(folder / f"{name}.mat", {"alpha": scaled, "TRF": duration})
    rng = np.random.default_rng(5)
    for name in ("basis", "bases"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for key in ("U", "V"):
                file[key] = np.linalg.qr(rng.normal(size=(40, RANK)))[0]
    for name in ("images", "others"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for key in ("x", "y"):
                file[key] = rng.normal(size=(*SHAPE, RANK, 2)) @ [1, 1j]
            for key in ("inside", "left"):
                file[key] = rng.random(SHAPE) < 0.5
    np.save(folder / "mask.npy", rng.random(SHAPE) < 0.5)
    for name in ("b1", "other-b1"):
        np.save(folder / f"{name}.npy", rng.uniform(0.8, 1.2, SHAPE))
    return folder


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a data set and a network; tests must leave it as it is."""
    run = stages.start(read(inputs, TINY), tmp_path_factory.mktemp("trained"))
    stages.simulate_run(run, progress=silent)
    stages.train_run(run, resume=False, say=silent, progress=silent)
    (inputs / "trained").symlink_to(run.folder)
    vectors = files.read_dataset(run.dataset)[0].basis.vectors
    with h5py.File(inputs / "own.h5", "w") as file:
        file["U"], file["UH"], file["V"] = vectors, vectors.conj().T, vectors[:, ::-1]
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    """A copy of that run."""
    return Run(shutil.copytree(trained.folder, tmp_path / "run"), trained.experiment)


# The schema.


def test_the_demo_needs_no_files() -> None:
    demo = stages.read(None)
    assert demo.sequence.path is None and demo.brain is not None
    train, model, prior, rank = stages.inputs(demo)
    assert train.digest == sequence.bundled().digest
    assert prior.names == model.names
    assert rank == 20  # docs/decisions/003-bundled-train.md
    assert stages.inputs(Experiment())[3] == 13  # the paper's, §2.4


EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_that_come_along_fit_the_schema(path: Path) -> None:
    assert stages.read(path).title != Experiment().title


def test_the_help_names_an_experiment_that_comes_along() -> None:
    """`experiments/bundled.toml`, at a scale between the demo and the paper, without files."""
    bundled, demo = (
        stages.read(path) for path in (next(p for p in EXPERIMENTS if p.stem == "bundled"), None)
    )
    train, *_ = stages.inputs(bundled)
    assert train.digest == sequence.bundled().digest
    trained = [e.simulation.training * e.training.epochs for e in (demo, bundled, Experiment())]
    assert trained == sorted(set(trained))


def test_two_experiments_compare_two_trains() -> None:
    bundled, papers = (
        next(p for p in EXPERIMENTS if p.stem == stem) for stem in ("bundled", "papers-train")
    )
    same = {"title": True, "sequence": True}
    contents = [
        stages.read(path).model_dump(exclude=same | {"data": True}) for path in (bundled, papers)
    ]
    assert contents[0] == contents[1]


def test_paths_are_relative_to_the_data_folder_and_that_to_the_file(tmp_path: Path) -> None:
    content = merged(TINY, {"data": "data"} | BASIS | MAP)
    content = merged(content, {"map": {"basis": "own.h5", "basis_key": "U"}})
    for options, folder in (({}, tmp_path / "data"), ({"data": tmp_path / "x"}, tmp_path / "x")):
        experiment = read(tmp_path, content, **options)
        assert experiment.sequence.path == folder / "train.mat"
        assert experiment.simulation.basis == folder / "basis.h5"
        assert experiment.map.coefficients == folder / "images.h5"
        assert experiment.map.basis == folder / "own.h5"
        assert experiment.map.mask is None
    absolute = merged(content, {"sequence": {"path": "/elsewhere/train.mat"}})
    assert read(tmp_path, absolute).sequence.path == Path("/elsewhere/train.mat")


def test_an_experiment_survives_its_file(inputs: Path, tmp_path: Path) -> None:
    prior = {
        "B1": {"mean": 1.0, "std": 0.1},  # without limits, that is, infinite ones
        "T2f": {"low": 0.01, "high": 0.2},
    }
    experiment = read(inputs, merged(TINY, {"prior": prior, "title": "É ≠ E"} | MAP))
    assert experiment.prior["B1"] == TruncatedNormal(1.0, 0.1)
    assert experiment.prior["T2f"] == Uniform(0.01, 0.2)
    stages.start(experiment, tmp_path)
    assert stages.open_run(tmp_path).experiment == experiment


def test_the_prior_replaces_the_papers_in_its_order() -> None:
    experiment = Experiment(prior={"T2f": Uniform(0.01, 0.2)})
    train, _, prior, _ = stages.inputs(experiment)
    assert prior.names == experiment.model.parameters
    assert prior.distributions["T2f"] == Uniform(0.01, 0.2)
    limit = np.pi / train.repetition_time
    assert prior.distributions["B0"] == Uniform(-limit, limit)
    assert prior.ordered == (("T2f", "T1"),)


@pytest.mark.parametrize(
    ("change", "method", "weight"),
    [
        ({}, "svd", None),
        (CRB_SVD, "crb-svd", 0.5),
        ({"simulation": CRB_SVD["simulation"] | {"basis_weight": 0.25}}, "crb-svd", 0.25),
        (BASIS, "given", None),
    ],
)
def test_data_set_and_card_say_how_the_basis_was_made(
    change: dict[str, Any], method: str, weight: float | None, inputs: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path, read(inputs, merged(TINY, change)))
    stages.simulate_run(run, progress=silent)
    data, _ = files.read_dataset(run.dataset)
    assert data.crb_weight == weight
    with h5py.File(run.dataset) as file:
        # Files of other bases have kept their bytes.
        assert file.attrs.get("basis_method") == ("crb-svd" if weight else None)
    stages.train_run(run, resume=False, say=silent, progress=silent)
    card = stages.load_network(run)[1]
    assert (card["basis_method"], card["basis_weight"]) == (method, weight)


def test_a_crb_svd_begun_before_goes_on_with_the_same_basis(inputs: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill_after_the_basis(what: str, done: int, total: int) -> None:
        if "fingerprints" in what:
            raise Killed

    experiment = read(inputs, merged(TINY, CRB_SVD))
    stages.simulate_run(Run(tmp_path / "whole", experiment), progress=silent)
    folder = tmp_path / "killed"
    # What an SVD left in the same folder is not taken for it.
    for asked in (read(inputs, TINY), experiment):
        with pytest.raises(Killed):
            stages.simulate_run(Run(folder, asked), progress=kill_after_the_basis)
    seen: list[str] = []
    again = Run(folder, experiment)
    stages.simulate_run(again, progress=lambda what, done, total: seen.append(what))
    assert "signals for the basis" not in seen
    digests = {files.file_digest(path / "dataset.h5") for path in (tmp_path / "whole", folder)}
    assert len(digests) == 1


def test_a_given_basis_takes_the_place_of_a_rank(inputs: Path) -> None:
    assert stages.inputs(read(inputs, TINY)).basis == RANK
    basis = stages.inputs(read(inputs, merged(TINY, BASIS))).basis
    assert isinstance(basis, Basis)
    with h5py.File(inputs / "basis.h5") as file:
        np.testing.assert_array_equal(basis.vectors, file["U"][()])
    # Of the bundled train it can be none: that has another number of pulses.
    longer = merged(TINY, {"sequence": None} | BASIS)
    with pytest.raises(ValueError, match=r"expected a basis of T=\d+ time points"):
        stages.inputs(read(inputs, longer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence": {"inversion": "spoiled"}}, "expected a path"),
        ({"sequence": {"repetition_time": 3.5e-3}}, "expected a path"),
        ({"simulation": {"basis": "U.h5"}}, "expected a rank, or a basis with its basis_key"),
        ({"simulation": {"basis_key": "U"}}, "expected a rank, or a basis with its basis_key"),
        (
            {"simulation": {"basis": "U.h5", "basis_key": "U", "rank": 5}},
            "got rank 5, basis U.h5 and basis_key U",
        ),
        ({"simulation": {"basis_weight": 0.5}}, "for basis_method = .crb-svd. alone; got 0.5"),
        (merged(BASIS, CRB_SVD), r"a given basis, or a basis_method .* basis\.h5, crb-svd and"),
        (merged(BASIS, {"simulation": {"basis_weight": 0.3}}), r"basis\.h5, svd and 0\.3"),
        (merged(MAP, {"map": {"basis": "U.h5"}}), "expected a basis with its basis_key"),
        (merged(MAP, {"map": {"basis_key": "U"}}), "expected a basis with its basis_key"),
        (merged(MAP, {"map": {"ranges": {"T9": [0, 1]}}}), "m0s, T1, T2f; got 'T9'"),
        (MAP | {"brain": {}}, r"expected \[map\] or \[brain\]"),
        (merged(MAP, {"training": {"snr_input": True}}), "got None and snr_input = True"),
        ({"training": {"inputs": ["B2"]}}, "expected parameters of the model.*got 'B2'"),
        (merged(MAP, {"training": {"inputs": ["B1"]}}), r"inputs, B1; missing are B1, superf"),
        (merged(MAP, {"map": {"known": {"B1": "b1.npy"}}}), r"\(none\), superfluous are B1\. "),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate(change)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
@pytest.mark.parametrize(
    ("section", "field"),
    [("sequence", "repetition_time"), ("evaluation", "snr"), ("brain", "voxel_size")],
)
def test_what_must_be_positive_and_finite_is_refused_by_name(
    section: str, field: str, value: float
) -> None:
    """Before hours of training, not after them."""
    given = [20, value] if field == "snr" else value
    with pytest.raises(ValidationError) as caught:
        Experiment.model_validate({section: {field: given}})
    assert [error["loc"][:2] for error in caught.value.errors()] == [(section, field)]


def test_an_empty_list_and_a_reversed_range_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"evaluation.snr\n.*at least 1 item"):
        Experiment.model_validate({"evaluation": {"snr": []}})
    with pytest.raises(ValidationError, match=r"range of T1 as \[low, high\]; got \[2, 1\]"):
        Experiment.model_validate(merged(MAP, {"map": {"ranges": {"T1": [2, 1]}}}))


# Every option does something. What each field changes, and how that shows.


def data_set(run: Run) -> list[np.ndarray]:
    stages.simulate_run(run, progress=silent)
    data, pulses = files.read_dataset(run.dataset)
    arrays = [data.basis.vectors, pulses.flip_angle, np.array(data.names)]
    for samples in data.samples.values():
        arrays += [samples.theta, samples.coefficients, samples.crb_coefficients]
    return arrays


def weights(run: Run) -> list[np.ndarray]:
    stages.train_run(run, resume=False, say=silent, progress=silent)
    return [tensor.detach().numpy() for tensor in stages.load_network(run)[0].parameters()]


def audit(run: Run) -> list[np.ndarray]:
    stages.evaluate_run(run, say=silent, progress=silent)
    result, score = files.read_audit(run.audit)
    return [result.snr, result.bias, result.variance, score.loss_by_parameter]


def mapped(run: Run) -> list[np.ndarray]:
    stages.map_run(run, run.experiment.map, run.maps, say=silent, progress=silent)
    # NaN is not equal to itself.
    return [np.nan_to_num(files.read_maps(run.maps, ["m0s", "T2f"]).maps.values, nan=-1)]


def trained_and_mapped(run: Run) -> list[np.ndarray]:
    weights(run)
    return mapped(run)


def brain(run: Run) -> list[np.ndarray]:
    section = stages.make_brain(run, progress=silent)
    return [files.read_coefficients(section.coefficients).data]


def brain_asks(run: Run) -> list[np.ndarray]:
    """Whether its maps are to have error bars."""
    return [np.array(stages.make_brain(run, progress=silent).errors)]


def compared(run: Run) -> list[np.ndarray]:
    """Which basis the images are said to have, whether or not it is the network's."""
    section = run.experiment.map
    stages.map_run(run, section, run.maps, force=True, say=silent, progress=silent)
    provenance = files.read_json(run.maps / "summary.json")["provenance"]
    return [np.array(provenance["basis_of_images_sha256"])]


def beside(run: Run) -> list[np.ndarray]:
    """What there is beside the estimates."""
    mapped(run)
    return [np.array(sorted(path.name for path in run.maps.glob("*.nii.gz")))]


def picture(run: Run) -> list[np.ndarray]:
    """The report's images; its text would repeat the options, used or not."""
    mapped(run)
    text = stages.report_run(run).read_text()
    return [np.array(re.findall('<img src="([^"]*)"', text))]


def heading(run: Run) -> list[np.ndarray]:
    return [np.array(re.findall("<h1>(.*)</h1>", stages.report_run(run).read_text()))]


def train_file(run: Run) -> list[np.ndarray]:
    return [stages.inputs(run.experiment).train.flip_angle]


OWN = merged(MAP, {"map": {"basis": "own.h5", "basis_key": "U"}})
SNR_INPUT = merged(MAP, {"map": {"noise_std": 0.5}, "training": {"snr_input": True}})
FLOAT32 = merged(MAP, {"map": {"precision": "float32"}})
KNOWN = merged(MAP, {"map": {"known": {"B1": "b1.npy"}}, "training": {"inputs": ["B1"]}})
INSIDE = merged(MAP, {"map": {"mask_key": "inside"}})
SPLIT = ["m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1"]
# Field: where it shows, the experiment without the change (beyond TINY), and the change.
FIELDS: dict[str, tuple[Callable[[Run], list[np.ndarray]], dict[str, Any], dict[str, Any]]] = {
    "title": (heading, {}, {"title": "Another"}),
    "data": (train_file, {}, {"data": "elsewhere"}),
    "sequence.path": (data_set, {}, {"sequence": {"path": "other.mat"}}),
    "sequence.repetition_time": (data_set, {}, {"sequence": {"repetition_time": 4e-3}}),
    "sequence.inversion": (data_set, {}, {"sequence": {"inversion": "spoiled"}}),
    "sequence.phase_increment": (data_set, {}, {"sequence": {"phase_increment": 3.0}}),
    "model.parameters": (data_set, {}, {"model": {"parameters": SPLIT}}),
    "model.saturation": (data_set, {}, {"model": {"saturation": "graham"}}),
    "prior": (data_set, {}, {"prior": {"B1": {"mean": 1.0, "std": 0.1, "high": 1.4}}}),
    "simulation.training": (data_set, {}, {"simulation": {"training": 129}}),
    "simulation.validation": (data_set, {}, {"simulation": {"validation": 33}}),
    "simulation.test": (data_set, {}, {"simulation": {"test": 33}}),
    "simulation.rank": (data_set, {}, {"simulation": {"rank": RANK + 1}}),
    "simulation.basis_method": (data_set, {}, {"simulation": {"basis_method": "crb-svd"}}),
    "simulation.basis_weight": (data_set, CRB_SVD, {"simulation": {"basis_weight": 0.3}}),
    "simulation.basis": (data_set, BASIS, {"simulation": {"basis": "bases.h5"}}),
    "simulation.basis_key": (data_set, BASIS, {"simulation": {"basis_key": "V"}}),
    "simulation.seed": (data_set, {}, {"simulation": {"seed": 1}}),
    # Its other fields: tests/test_train.py.
    "training": (weights, {}, {"training": {"seed": 1}}),
    "training.start": (weights, {}, {"training": {"start": "trained"}}),
    "evaluation.snr": (audit, {}, {"evaluation": {"snr": [20, 51]}}),
    "evaluation.n_noise": (audit, {}, {"evaluation": {"n_noise": 11}}),
    "evaluation.fingerprints": (audit, {}, {"evaluation": {"fingerprints": 9}}),
    "evaluation.seed": (audit, {}, {"evaluation": {"seed": 3}}),
    "map.coefficients": (mapped, MAP, {"map": {"coefficients": "others.h5"}}),
    "map.key": (mapped, MAP, {"map": {"key": "y"}}),
    "map.mask": (mapped, MAP, {"map": {"mask": "mask.npy"}}),
    "map.mask_key": (mapped, INSIDE, {"map": {"mask_key": "left"}}),
    "map.noise_std": (trained_and_mapped, SNR_INPUT, {"map": {"noise_std": 0.6}}),
    "map.errors": (beside, MAP, {"map": {"errors": False}}),
    "map.precision": (mapped, FLOAT32, {"map": {"precision": "bfloat16"}}),
    "map.known": (trained_and_mapped, KNOWN, {"map": {"known": {"B1": "other-b1.npy"}}}),
    "map.basis": (compared, OWN, {"map": {"basis": "basis.h5"}}),
    "map.basis_key": (compared, OWN, {"map": {"basis_key": "V"}}),
    "map.quarter_turns": (picture, MAP, {"map": {"quarter_turns": 1}}),
    "map.ranges": (picture, MAP, {"map": {"ranges": {"T2f": [0.0, 1.0]}}}),
    "brain.snr": (brain, {"brain": {}}, {"brain": {"snr": 51.0}}),
    "brain.voxel_size": (brain, {"brain": {}}, {"brain": {"voxel_size": 60.0}}),
    "brain.errors": (brain_asks, {"brain": {}}, {"brain": {"errors": True}}),
    "brain.seed": (brain, {"brain": {}}, {"brain": {"seed": 3}}),
}


def fields() -> list[str]:
    """All options of an experiment, but for those of `TrainingConfig`."""
    names = []
    for name, field in Experiment.model_fields.items():
        types = (field.annotation, *get_args(field.annotation))
        sections = [t for t in types if inspect.isclass(t) and issubclass(t, BaseModel)]
        if sections and name != "training":
            names += [f"{name}.{inner}" for inner in sections[0].model_fields]
        else:
            names.append(name)
            own = [] if not sections else sections[0].model_fields
            names += [
                f"{name}.{inner}" for inner in own if inner not in TrainingConfig.model_fields
            ]
    return names


def synthetic_tissues() -> TissueMaps:
    """A head of white matter in grey matter in fluid, on a grid of 50 mm: sampled in no time."""
    x = np.stack(np.meshgrid(*[np.arange(-125.0, 126.0, 50)] * 3, indexing="ij"), -1)
    radius = np.linalg.norm(x, axis=-1)
    affine = np.diag([50.0, 50.0, 50.0, 1.0])
    affine[:3, 3] = -125
    white = (radius < 50).astype(np.float32)
    grey = ((radius >= 50) & (radius < 80)).astype(np.float32)
    return TissueMaps(grey, white, radius < 150, affine)


@pytest.mark.parametrize("name", fields())
def test_every_field_matters(
    name: str, inputs: Path, trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in FIELDS, f"add {name} to FIELDS: what does it change?"
    observe, given, change = FIELDS[name]
    monkeypatch.setattr(files, "read_tissue_maps", synthetic_tissues)
    base = merged(TINY, given)
    if "brain" in base:
        base = merged({"brain": {"voxel_size": 50.0}}, base)
    (inputs / "elsewhere").mkdir(exist_ok=True)
    shutil.copy(inputs / "other.mat", inputs / "elsewhere" / "train.mat")
    results = []
    for number, content in enumerate((base, base, merged(base, change))):
        folder = tmp_path / str(number)
        folder.mkdir()
        if observe is not data_set:
            (folder / "dataset.h5").symlink_to(trained.dataset)
        if observe in (audit, mapped, beside, compared, picture):
            (folder / "network").symlink_to(trained.network)
        results.append(observe(Run(folder, read(inputs, content))))
    first, again, changed = results
    same = [np.array_equal(a, b) for a, b in zip(first, again, strict=True)]
    assert all(same), "the same experiment must give the same result"
    kept = [np.array_equal(a, b) for a, b in zip(first, changed, strict=True)]
    assert not all(kept)


def test_every_entry_of_the_table_is_a_field() -> None:
    assert list(FIELDS) == fields()


# The run folder.


def test_a_folder_without_results_may_change_its_experiment(inputs: Path, tmp_path: Path) -> None:
    stages.start(read(inputs, TINY), tmp_path)
    other = read(inputs, merged(TINY, {"simulation": {"rank": 5}}))
    assert stages.start(other, tmp_path).experiment == other
    assert stages.open_run(tmp_path).experiment == other


def test_the_same_experiment_from_another_folder_is_the_same(run: Run, tmp_path: Path) -> None:
    """Only what the paths name counts, not from where they are counted."""
    path = str(run.experiment.sequence.path)
    content = merged(TINY, {"sequence": {"path": path}})
    before = (run.folder / "experiment.toml").read_bytes()
    assert stages.start(read(tmp_path, content), run.folder).folder == run.folder
    assert (run.folder / "experiment.toml").read_bytes() == before
    with pytest.raises(OutputExistsError, match="another experiment"):
        stages.start(read(tmp_path, TINY), run.folder)


@pytest.mark.parametrize("left", ["network/card.json", "network/checkpoint.safetensors"])
def test_a_network_without_its_data_set_keeps_its_experiment(
    run: Run, inputs: Path, left: str
) -> None:
    """Else it would pass for a network of the other data."""
    for path in (run.dataset, run.checkpoint, run.network / "card.json"):
        if path != run.folder / left:
            path.unlink()
    other = read(inputs, merged(TINY, {"simulation": {"seed": 1}}))
    with pytest.raises(OutputExistsError, match="another experiment"):
        stages.start(other, run.folder)
    assert stages.start(run.experiment, run.folder).experiment == run.experiment


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": {"path": "missing.mat"}},
        merged(BASIS, {"simulation": {"basis": "missing.h5"}}),
        merged(BASIS, {"simulation": {"basis_key": "missing"}}),
        {"sequence": None} | BASIS,
        {"training": {"start": "nowhere"}},
        {"sequence": None, "prior": {"B1": {"low": 4.0, "high": 5.0}}},
    ],
    ids=[
        *("no train", "no basis", "no key", "basis of another train", "no start"),
        "no rate for the prior",
    ],
)
def test_force_removes_nothing_that_cannot_be_made_anew(
    run: Run, inputs: Path, change: dict[str, Any]
) -> None:
    audit(run)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"expected|must not exceed"):
        stages.start(read(inputs, merged(TINY, change)), run.folder, force=True)
    after = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert after == before


def test_force_does_not_remove_what_the_new_training_starts_from(run: Run, inputs: Path) -> None:
    for folder in (run.folder, run.network):
        own = merged(TINY, {"training": {"start": str(folder)}})
        with pytest.raises(ExperimentError, match=r"which --force would remove"):
            stages.start(read(inputs, own), run.folder, force=True)
    assert stages.load_network(run)[1]["rank"] == RANK


def test_a_forced_training_keeps_the_network_if_the_data_set_is_damaged(run: Run) -> None:
    run.dataset.write_bytes(run.dataset.read_bytes()[:2000])
    with pytest.raises(UnreadableFileError, match="truncated"):
        stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    assert run.checkpoint.exists() and run.log.exists()
    assert stages.load_network(run)[1]["rank"] == RANK


def test_an_untrained_run_says_how_to_train_it(run: Run) -> None:
    (run.network / "card.json").unlink()
    for end in (" --resume", ""):
        with pytest.raises(ExperimentError, match=rf"none yet. .*train {run.folder}{end}$"):
            stages.load_network(run)
        run.checkpoint.unlink(missing_ok=True)


@pytest.mark.parametrize("stage", [weights, audit, mapped, stages.report_run])
def test_a_run_without_a_data_set_says_how_to_simulate_it(
    run: Run, inputs: Path, stage: Callable[[Run], object]
) -> None:
    run.dataset.unlink()
    run = Run(run.folder, read(inputs, merged(TINY, MAP)))
    command = f"fisherprint simulate {run.folder}/experiment.toml -o {run.folder}"
    with pytest.raises(ExperimentError, match=f"Simulate first: {command}$"):
        stage(run)


def test_the_signal_model_is_the_one_that_was_asked_for(inputs: Path) -> None:
    experiment = read(inputs, merged(TINY, {"model": {"parameters": SPLIT}}))
    train = sequence.bundled()
    model = stages.model(experiment, train)
    assert isinstance(model, SignalModel)
    assert [parameter.name for parameter in model.parameters] == SPLIT
    assert model.n_samples == train.n_samples


def test_files_to_map_are_missed_before_the_simulation(inputs: Path, tmp_path: Path) -> None:
    changes = ({"coefficients": "no.h5"}, {"mask": "no.npy"}, {"basis": "no.mat"})
    for change in (*changes, {"known": {"B1": "no.npy"}}):
        content = merged(TINY, merged(OWN, {"map": change}))
        content = merged(content, {"training": {"inputs": list(change.get("known", {}))}})
        run = stages.start(read(inputs, content), tmp_path)
        with pytest.raises(UnreadableFileError, match=r"expected a file at .*no\."):
            stages.run_all(run, say=silent, progress=silent)
        assert not run.dataset.exists()


def test_what_later_stages_need_is_missed_before_the_simulation(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stages.start(
        read(inputs, merged(TINY, {"training": {"start": "no-run"}})), tmp_path / "start"
    )
    with pytest.raises(ExperimentError, match=r"network to start from in .*no-run; there is none"):
        stages.run_all(run, say=silent, progress=silent)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nilearn" else found(name)
    )
    run = stages.start(read(inputs, merged(TINY, {"brain": {}})), tmp_path / "brain")
    with pytest.raises(ModuleNotFoundError, match="tissue maps of nilearn"):
        stages.run_all(run, say=silent, progress=silent)


def test_a_single_pool_has_a_digital_brain_and_no_saturation(inputs: Path, tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    single = {
        "model": {"parameters": ["T1", "T2", "B0", "B1"]},
        "training": {"estimated": ["T1", "T2"]},
        "brain": {"voxel_size": 50.0},
    }
    run = stages.start(read(inputs, merged(TINY, single)), tmp_path)
    stages.simulate_run(run, progress=silent)
    stages.make_brain(run, progress=silent)
    truth = files.read_maps(run.brain / "truth", ["T1", "T2"]).maps
    # Between white matter and fluid (`phantom.TISSUES`); voxels so large hold some of each.
    assert 0.07 < np.nanmin(truth["T2"]) < np.nanmax(truth["T2"]) < 2.0
    assert 1.1 < np.nanmin(truth["T1"]) < np.nanmax(truth["T1"]) < 4.0
    wrong = merged(single, {"model": {"saturation": "graham"}})
    with pytest.raises(ExperimentError, match=r"not there; got 'graham'\. Drop it"):
        read(inputs, merged(TINY, wrong))


def test_a_checkpoint_goes_on_with_its_own_data_set_alone(run: Run, inputs: Path) -> None:
    changed = {"training": {"epochs": 2}}
    other = Run(run.folder, read(inputs, merged(TINY, changed | {"simulation": {"seed": 1}})))
    stages.simulate_run(other, progress=silent)
    before = run.checkpoint.read_bytes()
    with pytest.raises(ExperimentError, match=r"expected the data set that .*train .* --force$"):
        stages.train_run(other, resume=True, say=silent, progress=silent)
    assert run.checkpoint.read_bytes() == before
    # Early versions did not write which data set it was.
    tensors, content = files.read_checkpoint(run.checkpoint)
    del content["dataset_sha256"]
    files.write_checkpoint(run.checkpoint, tensors, content)
    stages.train_run(other, resume=True, say=silent, progress=silent)
    assert stages.load_network(other)[1]["losses"]["epochs"] == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_one_process_at_a_time_simulates_and_trains(run: Run) -> None:
    checkpoint = run.checkpoint.read_bytes()
    with _storage.locked(run.folder):
        with pytest.raises(BlockingIOError, match="another one is at work there"):
            stages.simulate_run(run, progress=silent)
        with pytest.raises(BlockingIOError, match="another one is at work there"):
            stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    assert run.checkpoint.read_bytes() == checkpoint
    stages.train_run(run, resume=True, say=silent, progress=silent)


def test_a_forced_training_removes_what_the_old_one_gave(run: Run, inputs: Path) -> None:
    run = Run(run.folder, read(inputs, merged(TINY, MAP)))
    stages.run_all(run, say=silent, progress=silent)
    products = (run.audit, run.maps / "summary.json", run.report)
    assert all(product.exists() for product in products)
    with pytest.raises(ValueError, match="got both"):
        stages.train_run(run, resume=True, force=True, say=silent, progress=silent)
    assert all(product.exists() for product in products)
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    assert not any(product.exists() for product in products)


def test_a_report_names_no_folder_of_this_machine(run: Run, inputs: Path, tmp_path: Path) -> None:
    shutil.copy(inputs / "mask.npy", tmp_path / "mask.npy")
    change = {"map": {"mask": str(tmp_path / "mask.npy")}}
    run = Run(run.folder, read(inputs, merged(TINY, merged(MAP, change))))
    mapped(run)
    text = stages.report_run(run).read_text()
    for line in ("path = &quot;train.mat", "coefficients = &quot;images.h5", "= &quot;mask.npy"):
        assert line in text
    for path in (run.report, *run.maps.glob("*.json")):
        assert not any(str(folder) in path.read_text() for folder in (inputs, tmp_path))
    assert files.read_json(run.maps / "m0s.json")["Source"] == "images.h5"


def test_a_network_is_audited_on_its_own_data_set(run: Run, inputs: Path) -> None:
    audit(run)
    before = run.audit.read_bytes()
    other = Run(run.folder, read(inputs, merged(TINY, {"simulation": {"seed": 1}})))
    stages.simulate_run(other, progress=silent)
    with pytest.raises(ExperimentError, match=r"expected the data set that .*train .* --force$"):
        stages.evaluate_run(other, say=silent, progress=silent)
    assert run.audit.read_bytes() == before


def test_only_a_run_folder_can_be_opened(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="has none"):
        stages.open_run(tmp_path)
    stages.start(read(inputs, TINY), tmp_path)
    (tmp_path / "experiment.toml").write_text("rank = [")
    with pytest.raises(files.UnreadableFileError, match="cannot be parsed"):
        stages.open_run(tmp_path)


def test_more_epochs_replace_what_the_shorter_training_gave(run: Run) -> None:
    """An audit must be one of the weights beside it."""
    before = audit(run)
    more = read(run.folder, merged(TINY, {"training": {"epochs": 2}}))
    longer = Run(run.folder, more)
    said: list[str] = []
    stages.train_run(longer, resume=True, say=said.append, progress=silent)
    assert said[0] == "resuming after epoch 1 of 2"
    assert not run.audit.exists()
    assert not all(map(np.array_equal, before, audit(longer)))
    # Nothing left to train: nothing to replace.
    stages.train_run(longer, resume=True, say=silent, progress=silent)
    assert run.audit.exists()


def test_a_longer_training_that_was_killed_goes_on(run: Run, inputs: Path) -> None:
    """Its first new epoch stored, the network of fewer epochs is no longer that of the run."""
    finished = Run(run.folder, read(inputs, merged(TINY, MAP)))
    stages.run_all(finished, say=silent, progress=silent)
    longer = Run(run.folder, read(inputs, merged(merged(TINY, MAP), {"training": {"epochs": 3}})))

    def killed(what: str, done: int, _: int) -> None:
        if what == "epochs" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run_all(longer, say=silent, progress=killed)
    assert not any(path.exists() for path in (run.audit, run.report, run.maps / "summary.json"))
    with pytest.raises(ExperimentError, match=r"--resume$"):
        stages.load_network(longer)
    said: list[str] = []
    stages.run_all(longer, say=said.append, progress=silent)
    assert "resuming after epoch 2 of 3" in said
    assert stages.load_network(longer)[1]["losses"]["epochs"] == 3
    assert run.report.exists()
    said.clear()
    stages.run_all(longer, say=said.append, progress=silent)
    assert sum("done before" in line for line in said) == 4


@pytest.mark.parametrize(
    "change", [{"estimated": ["T2f", "m0s"]}, {"noise_std": 0.05}, {"scale_range": [0.2, 1.0]}]
)
def test_a_network_is_audited_for_what_it_was_trained_for(
    run: Run, inputs: Path, change: dict[str, Any]
) -> None:
    other = Run(run.folder, read(inputs, merged(TINY, {"training": change})))
    (key,) = change
    with pytest.raises(ExperimentError, match=rf"another {key}\. Change it back, or train again"):
        stages.evaluate_run(other, say=silent, progress=silent)
    # How long and how fast is another matter.
    fewer = merged(TINY, {"training": {"epochs": 7, "precision": "bfloat16", "compiled": True}})
    audit(Run(run.folder, read(inputs, fewer)))


def test_maps_of_other_parameters_do_not_stay_beside_new_ones(run: Run, inputs: Path) -> None:
    finished = Run(run.folder, read(inputs, merged(TINY, MAP)))
    stages.run_all(finished, say=silent, progress=silent)
    assert (run.maps / "T2f.nii.gz").exists() and (run.maps / "T2f_std.nii.gz").exists()
    one = Run(
        run.folder, read(inputs, merged(merged(TINY, MAP), {"training": {"estimated": ["m0s"]}}))
    )
    stages.train_run(one, resume=False, force=True, say=silent, progress=silent)
    stages.run_all(one, say=silent, progress=silent)
    names = {path.name.split(".")[0] for path in run.maps.glob("*.nii.gz")}
    assert {"m0s", "m0s_std", "status"} <= names
    assert not {"T2f", "T2f_std"} & names


def test_a_resumed_training_must_be_the_same(run: Run, inputs: Path) -> None:
    other = read(inputs, merged(TINY, {"training": {"seed": 1, "epochs": 2}}))
    with pytest.raises(ValueError, match="another seed"):
        stages.train_run(Run(run.folder, other), resume=True, say=silent, progress=silent)


def test_an_epoch_that_only_the_log_has_is_trained_again(run: Run, inputs: Path) -> None:
    """A kill between the two writes: the log is ahead of the checkpoint."""
    longer = Run(run.folder, read(inputs, merged(TINY, {"training": {"epochs": 2}})))
    (record,) = files.read_jsonl(run.log)
    files.append_jsonl(run.log, record | {"number": 2, "train_loss": -1.0})
    stages.train_run(longer, resume=True, say=silent, progress=silent)
    log = files.read_jsonl(run.log)
    assert [epoch["number"] for epoch in log] == [1, 2]
    assert log[0] == record and log[1]["train_loss"] > 0


def test_the_summary_in_text_is_the_audit(run: Run) -> None:
    stages.evaluate_run(run, say=silent, progress=silent)
    result, score = files.read_audit(run.audit)
    # One fingerprint without a bound is left out of all columns.
    result = dataclasses.replace(result, crb=result.crb.copy())
    result.crb[0, 1] = np.inf
    lines = stages.summary(result, score)
    assert f"{score.loss:.3f} ± {score.standard_error:.3f}" in lines[0]
    assert lines[8] == "over the standard deviation of the prior:"
    assert stages.summary(dataclasses.replace(result, prior=None), score) == lines[:8]
    for part in (lines[1:8], lines[9:]):
        assert len({len(line) for line in part}) == 1  # columns are aligned
    rows = iter(lines[2:8])
    for q, snr in enumerate(result.snr):
        crb = result.crb / snr**2
        bias, variance = result.bias[q] ** 2 / crb, result.variance[q] / crb
        bias[0, 1] = variance[0, 1] = np.nan
        for name, column in (("all", slice(None)), ("m0s", 0), ("T2f", 1)):
            words = next(rows).split()
            assert words[:2] == [f"{snr:g}", name]
            expected = [
                *(np.nanmean(bias[:, column]), np.nanmean(variance[:, column])),
                np.nanmedian(np.sqrt(variance[:, column])),
            ]
            # Three decimals are printed.
            assert [float(word) for word in words[2:]] == pytest.approx(expected, abs=5.01e-4)
    rows = iter(lines[10:])
    ratio, error = result.over_prior_bound()
    for q, snr in enumerate(result.snr):
        for e, name in enumerate(result.names):
            words = next(rows).split()
            assert words[:2] == [f"{snr:g}", name]
            spread = result.prior.spread[e]
            expected = [
                np.sqrt(np.mean(result.bias[q, :, e] ** 2 + result.variance[q, :, e])) / spread,
                np.sqrt(np.median(result.crb[:, e])) / snr / spread,
                np.sqrt(result.prior.local[q, e]) / spread,
                np.sqrt(result.prior.overall[q, e]) / spread,
            ]
            found = [float(word) for word in words[2:] if word != "±"]
            assert found[:4] == pytest.approx(expected, abs=5.01e-4)
            # Two decimals are printed.
            assert found[4:] == pytest.approx([ratio[q, e], error[q, e]], abs=5.01e-3)
    assert next(rows, None) is None


# A start, and inputs beside the coefficients.


def test_a_start_is_recorded_and_not_needed_again(run: Run, inputs: Path) -> None:
    parent = files.read_json(run.network / "card.json")["weights_sha256"]
    shutil.copytree(run.network, inputs / "parent")
    content = merged(TINY, {"training": {"start": "parent", "epochs": 1}})
    run = Run(run.folder, read(inputs, content))
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    shutil.rmtree(inputs / "parent")
    longer = Run(run.folder, read(inputs, merged(content, {"training": {"epochs": 2}})))
    stages.train_run(longer, resume=True, say=silent, progress=silent)
    card = stages.load_network(run)[1]
    assert card["start_sha256"] == parent
    assert card["losses"]["epochs"] == 2
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(ExperimentError, match=r"network to start from in .*parent; there is none"):
        stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    assert {path: path.read_bytes() for path in before} == before


def test_a_start_of_other_parameters_or_another_basis_is_refused(run: Run, inputs: Path) -> None:
    shutil.copytree(run.network, inputs / "foreign")
    card = files.read_json(inputs / "foreign" / "card.json")
    for key, value in (("estimated", ["T1"]), ("rank", 3), ("basis_sha256", "0" * 64)):
        files.write_json(inputs / "foreign" / "card.json", card | {key: value})
        other = Run(run.folder, read(inputs, merged(TINY, {"training": {"start": "foreign"}})))
        with pytest.raises(ExperimentError, match=f"of this run's {key}, .*foreign has"):
            stages.train_run(other, resume=False, force=True, say=silent, progress=silent)
    shutil.rmtree(inputs / "foreign")


def test_a_network_with_an_snr_input_needs_the_noise_and_is_for_the_snr_of_its_training(
    run: Run, inputs: Path
) -> None:
    # In float32 on any processor, as the estimator by hand.
    run = Run(run.folder, read(inputs, merged(TINY, merged(SNR_INPUT, FLOAT32))))
    silent_map = {"overwrite": True, "say": silent, "progress": silent}
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    stages.evaluate_run(run, say=silent, progress=silent)
    assert np.isfinite(files.read_audit(run.audit)[1].loss)
    # Voxels of the given noise: what is mapped is what an estimator by hand gives.
    stages.map_run(run, run.experiment.map, run.maps, **silent_map)
    result = files.read_maps(run.maps, ["m0s", "T2f"]).maps
    with h5py.File(inputs / "images.h5") as file:
        x = file["x"][()][result.mask]
    extra = np.log(np.linalg.norm(x, axis=-1, keepdims=True) / 0.5)
    network, _ = stages.load_network(run)
    expected = as_estimator(network)(np.hstack([x, extra]))
    # Maps are stored in single precision.
    np.testing.assert_allclose(result.values[result.mask], expected, rtol=1e-5, atol=1e-6)
    for precision, used in (("float32", "float32"), (None, inference.fastest())):
        section = run.experiment.map.model_copy(update={"precision": precision})
        stages.map_run(run, section, run.maps, **silent_map)
        assert files.read_json(run.maps / "m0s.json")["Provenance"]["precision"] == used
    # Too dark or too bright to be like the training, |M0|/σ 10 to 100, is outside of its range.
    x = stages.read_data(run)[0].samples["training"].coefficients[:40]
    scales = 0.5 * np.geomspace(1, 1000, len(x))
    np.save(inputs / "scaled.npy", (scales[:, None] * x).reshape(-1, 1, 1, x.shape[-1]))
    np.save(inputs / "all.npy", np.ones((len(x), 1, 1), dtype=np.uint8))
    scaled = {"coefficients": inputs / "scaled.npy", "mask": inputs / "all.npy", "key": None}
    section = run.experiment.map.model_copy(update=scaled | {"mask_key": None})
    stages.map_run(run, section, run.maps, **silent_map)
    snr = images_of(run.maps / "M0.nii.gz").ravel() / 0.5
    outside = files.read_status(run.maps, (len(x), 1, 1)).ravel() == maps.Status.OUTSIDE_RANGE
    assert outside[(snr < 9.4) | (snr > 105.1)].mean() > 0.5
    assert not outside[(snr > 9.6) & (snr < 104.9)].any()
    bare = run.experiment.map.model_copy(update={"noise_std": None})
    with pytest.raises(ExperimentError, match=r"got None, and .* snr_input = True"):
        stages.map_run(run, bare, run.maps, **silent_map)


# Error bars.


def images_of(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def noisy_volume(trained: Run, out: Path) -> stages.MapSection:
    """Fingerprints of the training with noise of σ = 0.01, one voxel without signal, one unlike
    any; a mask that leaves out two."""
    data, _, _ = stages.read_data(trained)
    rng = np.random.default_rng(13)
    x = data.samples["training"].coefficients[:60]
    x = x + 0.01 * rng.standard_normal((*x.shape, 2)) @ [1, 1j]
    x[5] = 0
    x[6] = x[6, ::-1] + 0.5
    np.save(out / "x.npy", x.reshape(5, 4, 3, RANK))
    inside = np.ones((5, 4, 3), dtype=bool)
    inside.flat[:2] = False
    np.save(out / "mask.npy", inside)
    return stages.MapSection(
        coefficients=out / "x.npy", mask=out / "mask.npy", noise_std=0.01, precision="float32"
    )


def test_beside_estimates_are_error_bars_scale_misfit_and_status(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, said = noisy_volume(run, tmp_path), []
    # A range that leaves out half of what the network says, and a bound that it passes.
    network, card = stages.load_network(run)
    x = np.load(section.coefficients).astype(np.complex64)
    inside = np.load(section.mask)
    inside.flat[5] = False
    estimates = np.full((*inside.shape, 2), np.nan)
    estimates[inside] = as_estimator(network, precision="float32")(x[inside])
    m0s, T2f = np.moveaxis(estimates, -1, 0)
    card["ranges"]["T2f"] = [float(np.nanmedian(T2f)), 10.0]
    files.save_network(run.network, network.state_dict(), card)
    stages.map_run(run, section, run.maps, say=said.append, progress=silent)
    data, _, model = stages.read_data(run)
    entries = fit.Dictionary(
        data.names, data.samples["training"].theta, data.samples["training"].coefficients
    )
    bounds = {name: tuple(limits) for name, limits in card["ranges"].items()}
    names = ("m0s", "T2f")
    bars = ErrorBars(model, data.basis, names, (), entries, bounds)(x[inside], estimates[inside])
    for e, name in enumerate(names):
        found = images_of(run.maps / f"{name}_std.nii.gz")
        # The same numbers in the same batch, stored in single precision.
        np.testing.assert_allclose(found[inside], 0.01 * bars.std[:, e], rtol=1e-5)
        assert np.isnan(found[~inside]).all()
        about = files.read_json(run.maps / f"{name}_std.json")
        assert (about["Kind"], about["Parameter"]) == ("standard deviation", name)
        assert about["Provenance"]["noise"]["source"] == "given"
    M0, phase, relative = (
        images_of(run.maps / f"{name}.nii.gz")[inside] for name in ("M0", "M0_phase", "residual")
    )
    np.testing.assert_allclose(M0 * np.exp(1j * phase), bars.m0, rtol=1e-5)
    norm = np.linalg.norm(x[inside], axis=1)
    np.testing.assert_allclose(relative, bars.residual / norm, rtol=1e-5)
    # What is wrong with each voxel, from the first code to the last.
    status = files.read_status(run.maps, inside.shape)
    expected = np.zeros(inside.shape, dtype=np.uint8)
    misfit = np.zeros(inside.shape, dtype=bool)
    limit = 2 * Noise(0.01, "given", 0.01).largest_residual(2 * RANK - 7)
    misfit[inside] = bars.residual > limit
    margin = 0.05 * np.ptp(card["ranges"]["T2f"])
    expected[misfit] = maps.Status.MISFIT
    expected[T2f < np.nanmedian(T2f) - margin] = maps.Status.OUTSIDE_RANGE
    expected[(m0s <= 0) | (T2f <= 1e-4)] = maps.Status.AT_BOUND
    expected.flat[5] = maps.Status.NOT_FINITE
    expected.flat[:2] = maps.Status.OUTSIDE_MASK
    np.testing.assert_array_equal(status, expected)
    assert misfit.flat[6]
    summary = files.read_json(run.maps / "summary.json")
    assert summary["status"] == maps.counted(expected) and summary["failed_voxels"] == 1
    assert summary["provenance"]["noise"]["std"] == 0.01
    assert any(line.startswith("noise σ 0.01 as given; the residuals tell ") for line in said)
    assert any(re.match(r"status: .*\b1 not finite", line) for line in said)
    # Who computes does not matter.
    monkeypatch.setattr("fisherprint.experiment.bars._CHUNK", 7)
    with ThreadPoolExecutor(3) as pool:
        for name, executor in (("default", None), ("three", pool)):
            out = tmp_path / name
            stages.map_run(run, section, out, executor=executor, say=silent, progress=silent)
    for name in ("m0s_std", "M0", "residual", "status"):
        one, other, whole = (
            images_of(folder / f"{name}.nii.gz")
            for folder in (tmp_path / "default", tmp_path / "three", run.maps)
        )
        np.testing.assert_array_equal(one, other)
        # In other batches, rounding decides where a few searches in so poor a basis turn.
        assert np.isclose(one, whole, rtol=1e-3, equal_nan=True).mean() > 0.9, name
    # The report shows them.
    shown = Run(run.folder, run.experiment.model_copy(update={"map": section}))
    text = stages.report_run(shown).read_text()
    assert "Error bars" in text and "(from: given)" in text
    # Without, none of these are left, and the status is that of the estimates.
    bare = section.model_copy(update={"errors": False})
    stages.map_run(run, bare, run.maps, overwrite=True, say=silent, progress=silent)
    left = {path.name.split(".")[0] for path in run.maps.glob("*.json")}
    assert left == {"m0s", "T2f", "status", "summary"}
    expected[expected == maps.Status.MISFIT] = maps.Status.FINE
    np.testing.assert_array_equal(files.read_status(run.maps, inside.shape), expected)
    assert "noise" not in files.read_json(run.maps / "summary.json")["provenance"]
    assert "Error bars" in stages.report_run(shown).read_text()


def test_what_error_bars_take_is_said_before(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, said = noisy_volume(run, tmp_path), []
    monkeypatch.setattr("fisherprint.experiment.bars._SMALL", 10)
    monkeypatch.setattr("fisherprint.experiment.bars._FEW", 4)
    seen = []
    stages.map_run(
        run,
        section.model_copy(update={"noise_std": None}),
        run.maps,
        say=said.append,
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    told = r"error bars of 57 voxels take about \d+ s \([\d.]+ ms each\); --no-errors leaves"
    assert any(re.match(told, line) for line in said)
    assert seen[-1] == ("error bars", 57, 57)
    # Nobody gave σ, and there is no background.
    noise = files.read_json(run.maps / "status.json")["Provenance"]["noise"]
    assert noise["source"] == "residuals" and noise["std"] == noise["of_residuals"] > 0


# Known maps.


def told(run: Run, inputs: Path, *names: str, **known: str) -> Run:
    """The run's folder with an experiment whose network is told these parameters."""
    # In float32 on any processor.
    section = {"known": known, "precision": "float32"}
    change = {"map": section, "training": {"inputs": list(names)}}
    return Run(run.folder, read(inputs, merged(merged(TINY, MAP), change)))


def test_a_network_that_is_told_b0_and_b1_from_the_bound_to_the_map(
    run: Run, inputs: Path
) -> None:
    B0, B1 = np.random.default_rng(12).uniform([-500, 0.7], [500, 1.3], (*SHAPE, 2)).T
    B0, B1 = B0.T, B1.T
    B1[2, 3, 1] = np.nan
    np.save(inputs / "b0.npy", B0)
    with h5py.File(inputs / "field.h5", "w") as file:
        file["B1"], file["B0"] = B1, 0 * B1
    run = told(run, inputs, "B0", "B1", B1="field.h5", B0="b0.npy")
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    network, card = stages.load_network(run)
    assert card["inputs"] == ["B0", "B1"]
    assert card["fisher_unknowns"] == ["m0s", "T1", "T2f", "Rx", "T2s", "Re M0", "Im M0"]
    # The audit knows the truth of both, and measures by the bound that does.
    stages.evaluate_run(run, say=silent, progress=silent)
    audit, score = files.read_audit(run.audit)
    data, *_ = stages.read_data(run)
    columns = [data.names.index(name) for name in ("m0s", "T2f")]
    crb = data.crb("test", known=["B0", "B1"])[:, columns]
    np.testing.assert_array_equal(audit.crb, crb[:8])
    assert (crb < data.crb("test")[:, columns]).all()
    fields = data.samples["test"].theta[:, [data.names.index(name) for name in ("B0", "B1")]]
    again = evaluate.loss_over_scales(
        as_estimator(network),
        stages.labelled(data, "test", ("m0s", "T2f"), known=("B0", "B1")).select(("m0s", "T2f")),
        beside=lambda c, part, _: np.repeat(fields[part, None], c.shape[1], axis=1),
        rng=np.random.default_rng(1),
    )
    assert score.loss == again.loss
    # The references of the prior know them, too.
    unknown = fisher.given(data.information("test"), [data.names.index(n) for n in ("B0", "B1")])
    lower = fisher.bounds(unknown)[:, [0, 2]].min(axis=0) / 50**2
    assert (audit.prior.overall[1] < audit.prior.spread**2).all()
    assert (audit.prior.overall[1] > np.minimum(lower, audit.prior.spread**2) / 10).all()
    # What is mapped is what an estimator by hand gives, but for the voxel without B1.
    said: list[str] = []
    stages.map_run(
        run, run.experiment.map, run.maps, overwrite=True, say=said.append, progress=silent
    )
    result = files.read_maps(run.maps, ["m0s", "T2f"]).maps
    with h5py.File(inputs / "images.h5") as file:
        x = file["x"][()]
    expected = as_estimator(network)(np.concatenate([x, np.stack([B0, B1], -1)], axis=-1))
    assert np.isnan(result.values[2, 3, 1]).all()
    inside = np.isfinite(result.values).all(axis=-1)
    assert inside.sum() == maps.automatic_mask(x).sum() - 1
    # Maps are stored in single precision.
    np.testing.assert_allclose(result.values[inside], expected[inside], rtol=1e-5, atol=1e-6)
    assert any(re.match(r"known B0: median -?[\d.]+ \[.*\] rad/s$", line) for line in said)
    assert any(re.match(r"known B1: median [\d.]+ \[[\d., ]+\]$", line) for line in said)
    assert any(line.startswith("no estimate in 1 voxels whose B1") for line in said)
    digest = files.read_json(run.maps / "summary.json")["provenance"]["known_sha256"]
    assert digest["B0"] == files.file_digest(inputs / "b0.npy")
    text = stages.report_run(run).read_text()
    assert "The Fisher matrix has m0s, T1, T2f, Rx, T2s and complex M0 as unknowns." in text
    assert "The network is told B0 and B1." in text
    assert "Unknowns: m0s, T1, T2f, Rx, T2s and complex M0." in text
    assert "Here all parameters are unknown." in text
    assert "Where the prior matters" in text


def test_no_signal_or_a_value_beyond_the_training_is_no_estimate(run: Run, inputs: Path) -> None:
    B1 = np.full((6, 5, 1), 1.0)
    B1[0] = 0.0  # as maps are where they were not measured
    images = np.random.default_rng(0).normal(size=(6, 5, 1, RANK, 2)) @ [1, 1j]
    images[1, 1] = 0
    np.save(run.folder / "b1.npy", B1)
    np.save(run.folder / "x.npy", images)
    np.save(run.folder / "mask.npy", np.ones_like(B1))
    run = told(run, inputs, "B1", B1="b1.npy")
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    section = stages.MapSection(
        coefficients=run.folder / "x.npy",
        mask=run.folder / "mask.npy",
        known={"B1": run.folder / "b1.npy"},
    )
    said: list[str] = []
    stages.map_run(run, section, run.maps, overwrite=True, say=said.append, progress=silent)
    assert "30 voxels mapped, 6 failed" in said
    failed = np.isnan(files.read_maps(run.maps, ["m0s"]).maps.values).any(axis=-1)
    assert failed[0].all() and failed[1, 1] and failed.sum() == 6
    assert any(line.startswith("no estimate in 5 voxels whose B1 is unknown or") for line in said)


@pytest.mark.parametrize(
    ("names", "known", "message"),
    [
        (["B1"], {}, r"network's inputs, B1; missing are B1, superfluous are \(none\)"),
        ([], {"B1": 1.0}, r"inputs, \(none\); missing are \(none\), superfluous are B1"),
        (["B0", "B1"], {"B1": 1.0, "T1": 1.0}, "missing are B0, superfluous are T1"),
        (["B1"], {"B1": 100.0}, r"B1 in the range of the training, 0\.\d+ to 1\.\d+; .*\.npy has "
                                r"median 100 \[100, 100\]\. Is it in percent\?"),
        (["B0"], {"B0": 4096.0}, r"range .*, -\d+\.?\d* to \d+\.?\d* rad/s; .* 2π times Hz\."),
        (["T1"], {"T1": 1600.0}, r"has median 1600 \[1600, 1600\] s\. Is it in ms or µs\?"),
        (["B1"], {"B1": np.nan}, "expected values of B1 inside the mask; .* has none there"),
        (["B1"], {"B1": np.ones((2, 2, 2))}, r"axes \(X=7, Y=5, Z=2\); got the shape \(2, 2, 2"),
    ],
)  # fmt: skip
def test_known_maps_that_do_not_fit_are_explained(
    run: Run, inputs: Path, names: list[str], known: dict[str, Any], message: str
) -> None:
    own = told(run, inputs, *names, **dict.fromkeys(names, "b1.npy"))
    stages.train_run(own, resume=False, force=True, say=silent, progress=silent)
    paths = {name: run.folder / f"{name}.npy" for name in known}
    for name, value in known.items():
        np.save(paths[name], value if np.ndim(value) else np.full(SHAPE, value))
    section = own.experiment.map.model_copy(update={"known": paths})
    with pytest.raises(ValueError, match=message):
        stages.map_run(own, section, run.maps, say=silent, progress=silent)
    assert not run.maps.exists()


def test_the_brain_tells_the_network_its_true_fields(
    run: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "read_tissue_maps", synthetic_tissues)
    content = merged(TINY, {"training": {"inputs": ["B1"]}, "brain": {"voxel_size": 50.0}})
    own = Run(run.folder, read(inputs, content))
    stages.train_run(own, resume=False, force=True, say=silent, progress=silent)
    section = stages.make_brain(own, progress=silent)
    assert list(section.known) == ["B1"]
    mask = files.read_mask(
        section.mask, files.read_coefficients(section.coefficients).data.shape[:3]
    )
    truth = files.read_map(section.known["B1"], mask.shape, name="B1")
    np.testing.assert_array_equal(np.isfinite(truth), mask)
    assert 0.7 < truth[mask].min() < truth[mask].max() < 1.3
    stages.map_run(own, section, own.maps, say=silent, progress=silent)
    assert files.read_json(own.maps / "summary.json")["failed_voxels"] == 0


def without_information(run: Run) -> None:
    """Make its data set one of an early version."""
    path = run.dataset.resolve()
    with h5py.File(path, "r+") as file:
        for split in ("training", "validation", "test"):
            del file[split]["information"]


def test_an_early_data_set_serves_all_but_what_needs_the_information(
    run: Run, inputs: Path, tmp_path: Path
) -> None:
    without_information(run)
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    said: list[str] = []
    stages.evaluate_run(run, say=said.append, progress=silent)
    assert any("is of an early version, without the information" in line for line in said)
    assert files.read_audit(run.audit)[0].prior is None
    assert "Where the prior matters" not in stages.report_run(run).read_text()
    with pytest.raises(ValueError, match=r"one of an early version, .* Simulate it again"):
        stages.vary(run, tmp_path / "new", ['training.inputs=["B1"]'])
    assert not (tmp_path / "new").exists()
    stages.vary(run, tmp_path / "new", ["training.seed=1"])
    with pytest.raises(ValueError, match=r"one of an early version, .* Simulate it again"):
        stages.train_run(
            told(run, inputs, "B1", B1="b1.npy"),
            resume=False,
            force=True,
            say=silent,
            progress=silent,
        )
    assert stages.load_network(run)[1]["inputs"] == []


def test_too_few_fingerprints_for_the_prior_are_no_error(inputs: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, read(inputs, merged(TINY, {"simulation": {"test": 7}})))
    stages.simulate_run(run, progress=silent)
    stages.train_run(run, resume=False, say=silent, progress=silent)
    said: list[str] = []
    stages.evaluate_run(run, say=said.append, progress=silent)
    assert "7 test fingerprints are too few for the prior's bounds" in said
    assert files.read_audit(run.audit)[0].prior is None


def test_a_data_set_serves_networks_that_are_told_something_else(
    trained: Run, tmp_path: Path
) -> None:
    for number, names in enumerate((["B1"], ["B0", "B1"])):
        listed = ", ".join(f'"{name}"' for name in names)
        new = stages.vary(trained, tmp_path / str(number), [f"training.inputs=[{listed}]"])
        stages.train_run(new, resume=False, say=silent, progress=silent)
        network, card = stages.load_network(new)
        assert card["inputs"] == names and network.n_extra == len(names)
        assert card["dataset_sha256"] == files.file_digest(trained.dataset)


# Maps.


def test_the_key_of_a_mask_is_one_in_the_masks_own_file(run: Run, inputs: Path) -> None:
    """The key of the images' file only where no other file holds the mask."""
    for mask, key, source in (
        (None, "left", "images"),
        ("others.h5", "left", "others"),
        ("others.h5", "inside", "others"),
    ):
        change = merged(MAP, {"map": {"mask": mask, "mask_key": key}})
        run = Run(run.folder, read(inputs, merged(TINY, change)))
        stages.map_run(
            run, run.experiment.map, run.maps, overwrite=True, say=silent, progress=silent
        )
        with h5py.File(inputs / f"{source}.h5") as file:
            expected = file[key][()]
        np.testing.assert_array_equal(files.read_maps(run.maps, ["m0s"]).mask, expected)
    # A key that the mask's file cannot have is refused, not ignored.
    section = run.experiment.map.model_copy(update={"mask": inputs / "mask.npy"})
    with pytest.raises(ValueError, match="holds one array without a name; got the key 'inside'"):
        stages.map_run(run, section, run.folder / "other", say=silent, progress=silent)


def test_only_overwrite_replaces_maps(run: Run, inputs: Path) -> None:
    run = Run(run.folder, read(inputs, merged(TINY, MAP)))
    mapped(run)
    for force in (False, True):
        with pytest.raises(OutputExistsError, match=r"already holds maps.*--overwrite\."):
            stages.map_run(
                run, run.experiment.map, run.maps, force=force, say=silent, progress=silent
            )


def test_an_interrupted_overwrite_leaves_no_summary_of_earlier_maps(
    run: Run, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(run.folder, read(inputs, merged(TINY, MAP)))
    mapped(run)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_status", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stages.map_run(
            run, run.experiment.map, run.maps, overwrite=True, say=silent, progress=silent
        )
    assert not (run.maps / "summary.json").exists()


def test_fluid_is_shown_where_there_is_enough_of_it(run: Run, inputs: Path) -> None:
    content = merged(TINY, {"training": {"estimated": ["m0s", "T1"]}} | MAP)
    run = Run(run.folder, read(inputs, content))
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    network, card = stages.load_network(run)
    # An estimator of m0s 0.1 and T1 4 s everywhere: all is fluid.
    state = network.state_dict()
    state |= {"output_mean": torch.tensor([0.1, 4.0]), "output_spread": torch.full((2,), 1e-6)}
    files.save_network(run.network, state, card)
    images = np.ones((5, 4, 1, RANK), dtype=np.complex64)
    path = run.folder / "x.npy"
    for missing in (0, 1):
        images[0, 0] = 1 - missing
        np.save(path, images)
        mask = images[..., 0].real > 0
        np.save(run.folder / "mask.npy", mask)
        section = stages.MapSection(coefficients=path, mask=run.folder / "mask.npy")
        stages.map_run(run, section, run.maps, overwrite=True, say=silent, progress=silent)
        regions = files.read_json(run.maps / "summary.json")["regions"]
        text = stages.report_run(run).read_text()
        enough = not missing  # of 20 voxels
        assert ("CSF" in regions) is (run.maps / "csf.nii.gz").exists() is enough
        assert ("CSF is where T1 is at least 3.5 s" in text) is enough
        # The apparent T1 of TISSUES["CSF"]: 1 / (0.999 / 4 + 0.001 / 0.33) = 3.956 s.
        assert ("<small>expected 3.96</small>" in text) is enough
        if enough:
            assert regions["CSF"]["voxels"] == 20
            found = files.read_mask(run.maps / "csf.nii.gz", mask.shape)
            np.testing.assert_array_equal(found, mask)


def test_maps_that_fail_everywhere_are_said_to(run: Run) -> None:
    images = np.zeros((3, 2, 1, RANK), dtype=np.complex64)
    images[0] = 1
    np.save(run.folder / "x.npy", images)
    np.save(run.folder / "mask.npy", images[..., 0] == 0)
    section = stages.MapSection(coefficients=run.folder / "x.npy", mask=run.folder / "mask.npy")
    said: list[str] = []
    stages.map_run(run, section, run.maps, say=said.append, progress=silent)
    assert "4 voxels mapped, 4 failed" in said
    assert "all: m0s failed everywhere" in said
    summary = files.read_json(run.maps / "summary.json")
    assert summary["failed_voxels"] == summary["regions"]["all"]["voxels"] == 4


@pytest.mark.parametrize(("key", "known"), [("U", True), ("UH", True), ("V", False)])
def test_the_basis_of_the_images_is_compared_by_its_hash(
    run: Run, inputs: Path, key: str, known: bool
) -> None:
    section = read(inputs, merged(OWN, {"map": {"basis_key": key}})).map
    said: list[str] = []

    def map_images(*, force: bool = False) -> None:
        stages.map_run(run, section, run.maps, force=force, say=said.append, progress=silent)

    if known:
        map_images()
        assert not any("basis" in line for line in said)
        return
    with pytest.raises(BasisMismatchError, match="expected coefficients in the network's basis"):
        map_images()
    assert not run.maps.exists()
    map_images(force=True)
    assert "the images were made with another basis; mapped all the same" in said


@pytest.mark.parametrize(
    ("affine", "turns", "corner"),
    [(None, 0, (4, 0)), (None, 1, (2, 4)), (None, -1, (0, 0)), (np.eye(4), 1, (4, 0))],
)
def test_pictures_turn_counter_clockwise_where_no_affine_tells(
    trained: Run,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    affine: np.ndarray | None,
    turns: int,
    corner: tuple[int, int],
) -> None:
    """The first axis points to the right, the second up: the lower right corner goes up."""
    run = Run(tmp_path, read(inputs, merged(TINY | MAP, {"map": {"quarter_turns": turns}})))
    shutil.copy(trained.dataset, run.dataset)
    values = np.full((5, 3, 1, 2), 0.1)
    values[4, 0] = 0.2
    files.write_maps(
        maps.Maps(("m0s", "T2f"), values, np.ones((5, 3, 1), bool), 0),
        run.maps,
        volume=files.Volume(np.ones((5, 3, 1, RANK), np.complex64), affine),
        parameters=[PARAMETERS["m0s"], PARAMETERS["T2f"]],
        provenance={},
    )
    files.write_json(run.maps / "summary.json", {"regions": {"all": {}}})
    drawn, draw = [], report.map_panel

    def drawing(estimate: Any, *arguments: Any, **options: Any) -> Any:
        drawn.append(estimate["m0s"])
        return draw(estimate, *arguments, **options)

    monkeypatch.setattr(report, "map_panel", drawing)
    stages.report_run(run)
    (shown,) = drawn
    assert np.unravel_index(shown.argmax(), shown.shape)[:2] == corner


@pytest.mark.parametrize(
    ("estimated", "found"), [(("m0s", "T1"), True), (("m0s", "T2f"), False), (("T1",), False)]
)
def test_white_matter_is_shown_where_it_can_be_found(
    trained: Run, inputs: Path, tmp_path: Path, estimated: tuple[str, ...], found: bool
) -> None:
    """It needs m0s and T1; without them there are maps and a report all the same."""
    content = merged(TINY, {"training": {"estimated": list(estimated)}} | MAP)
    run = Run(tmp_path, read(inputs, content))
    shutil.copy(trained.dataset, run.dataset)
    weights(run)
    stages.map_run(run, run.experiment.map, run.maps, say=silent, progress=silent)
    assert (run.maps / "white_matter.nii.gz").exists() is found
    regions = files.read_json(run.maps / "summary.json")["regions"]
    assert ("white matter" in regions) is found
    text = stages.report_run(run).read_text()
    assert "Parameter maps" in text
    assert ("joint mode of m0s and T1" in text) is found


def test_what_is_no_brain_has_no_white_matter(run: Run, inputs: Path) -> None:
    content = merged(TINY, {"training": {"estimated": ["m0s", "T1"]}} | MAP)
    run = Run(run.folder, read(inputs, content))
    stages.train_run(run, resume=False, force=True, say=silent, progress=silent)
    # A phantom of long T1.
    network, card = stages.load_network(run)
    state = network.state_dict() | {"output_mean": torch.tensor([0.0, 20.0])}
    files.save_network(run.network, state, card)
    said: list[str] = []
    run.maps.mkdir()
    (run.maps / "white_matter.nii.gz").write_bytes(b"of earlier maps")
    stages.map_run(run, run.experiment.map, run.maps, say=said.append, progress=silent)
    assert any(line.startswith("no white matter found") for line in said)
    assert not (run.maps / "white_matter.nii.gz").exists()
    # By its T1, all of it is fluid.
    assert list(files.read_json(run.maps / "summary.json")["regions"]) == ["all", "CSF"]


def test_fluid_is_what_relaxes_slowly() -> None:
    T1 = np.array([[1.3, 3.499, 3.5], [4.0, np.nan, np.inf]])
    np.testing.assert_array_equal(maps.fluid(T1), [[False, False, True], [True, False, True]])


def tissue_modes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """m0s and T1 of fluid, grey and white matter, and which one each voxel is (0, 1, 2)."""
    sizes, m0s, T1 = (3000, 6000, 4000), (0.02, 0.10, 0.21), (3.5, 1.9, 1.3)
    tissue = np.repeat(np.arange(3), sizes)
    spread = rng.normal(size=(2, len(tissue)))
    m0s_map = np.abs(np.array(m0s)[tissue] + 0.012 * spread[0])
    return m0s_map, np.array(T1)[tissue] + 0.08 * spread[1], tissue


def test_white_matter_is_the_mode_of_largest_m0s() -> None:
    m0s, T1, tissue = tissue_modes(np.random.default_rng(11))
    # White matter is neither the largest mode nor the only one; a few voxels beyond it are none.
    m0s[:20], T1[:20] = 0.45, 0.6
    m0s[20:40] = np.nan
    T1[40:60] = np.nan
    found = maps.white_matter(m0s, T1)
    assert not found[tissue != 2].any()
    # The window of 20 % is 3.5 standard deviations of m0s, that of 10 % is 1.6 of T1: it holds
    # 0.896 of the voxels; a mode that is off by a bin, 25 ms, still leaves 0.87.
    assert found[tissue == 2].mean() == pytest.approx(0.896, abs=0.03)
    # Medians of the window: the mode, within half a bin or four standard errors, 1 and 8 ms.
    assert np.median(m0s[found]) == pytest.approx(0.21, abs=0.0025)
    assert np.median(T1[found]) == pytest.approx(1.3, abs=0.0125)
    # Voxels are judged one by one: their order and shape do not matter.
    square = maps.white_matter(m0s[::-1].reshape(130, 100), T1[::-1].reshape(130, 100))
    np.testing.assert_array_equal(square.ravel()[::-1], found)


@pytest.mark.parametrize("factors", [(1.0, 1e3), (1e3, 1.0)])
def test_white_matter_in_other_units_is_refused(factors: tuple[float, float]) -> None:
    m0s, T1, _ = tissue_modes(np.random.default_rng(11))
    with pytest.raises(ValueError, match=r"got none.*units"):
        maps.white_matter(factors[0] * (m0s + 0.01), factors[1] * T1)
    with pytest.raises(ValueError, match="T1 must have the axes"):
        maps.white_matter(m0s, T1[:-1])
