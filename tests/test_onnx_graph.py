from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fisherprint import experiment, files
from fisherprint.cli import app
from fisherprint.network import Network, as_estimator
from fisherprint.onnx_graph import as_onnx

onnxruntime = pytest.importorskip("onnxruntime")

MEAN, SPREAD = np.array([0.12, 1.6, 0.1]), np.array([0.08, 0.8, 0.1])
EXTRA = np.array([[0.0, 1.0], [500.0, 0.2]])
OPTIONS = {
    "plain": {},
    "bounded": {"output_range": [[0.0, 0.1, 0.002], [0.6, 10.0, 1.0]]},
    "extra inputs": {"extra_inputs": EXTRA},
    "batch": {"normalization": "batch"},
    "without phase": {"remove_phase": True},
    "batch, extra": {"normalization": "batch", "extra_inputs": EXTRA},
    "all": {
        "output_range": [[0.0, 0.1, 0.002], [0.6, 10.0, 1.0]],
        "extra_inputs": EXTRA,
        "remove_phase": True,
    },
}


def network(rank: int = 5, **options: object) -> Network:
    """A network whose every weight and statistic matters."""
    generator = torch.Generator().manual_seed(3)
    made = Network(rank, MEAN, SPREAD, **options, generator=generator).eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if ("norm" in name or "bias" in name) and tensor.is_floating_point():
                tensor += 0.3 * torch.rand(tensor.shape, generator=generator)
    return made


def voxels(rank: int, n_extra: int, n: int = 40) -> np.ndarray:
    rng = np.random.default_rng(4)
    c = rng.standard_normal((n, rank)) + 1j * rng.standard_normal((n, rank))
    c[3, 0] = 0  # no phase to turn by
    c[4], c[5, 1], c[6, 2], c[7, 0] = 0, np.nan, np.inf, 1j * np.nan
    extra = EXTRA[0] + EXTRA[1] * rng.standard_normal((n, 2))
    extra[8, 1], extra[9, 0] = np.nan, np.inf
    return np.hstack([c, extra[:, :n_extra]])


def run(model: bytes, rank: int, given: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    c = given[:, :rank]
    inputs = {"coefficients": np.hstack([c.real, c.imag]).astype(np.float32)}
    if given.shape[1] > rank:
        inputs["extra"] = given[:, rank:].real.astype(np.float32)
    assert {i.name for i in session.get_inputs()} == set(inputs)
    (estimates,) = session.run(["estimates"], inputs)
    return estimates


@pytest.mark.parametrize("name", OPTIONS)
def test_onnxruntime_estimates_what_torch_does(name: str) -> None:
    made = network(**OPTIONS[name])
    given = voxels(5, made.n_extra)
    with torch.inference_mode():
        tensor = torch.from_numpy(given)
        expected = made(tensor[:, :5], tensor[:, 5:].real).numpy()
    found = run(as_onnx(made, {}), 5, given)
    bad = 4 + 2 * bool(made.n_extra)
    assert np.isnan(expected).all(axis=1).sum() == bad
    # Single precision, 1e-7, through 14 layers.
    np.testing.assert_allclose(found / SPREAD, expected / SPREAD, rtol=0, atol=2e-5)
    # Any number of voxels, alone or together.
    alone = run(as_onnx(made, {}), 5, given[:1])
    np.testing.assert_allclose((alone - found[:1]) / SPREAD, 0, atol=2e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_the_coefficients_does_not_matter(scale: float) -> None:
    made = network(remove_phase=True)
    given = voxels(5, 0)[10:]
    model = as_onnx(made, {})
    # What is left is the rounding of the scaled input, 1e-7.
    np.testing.assert_allclose(run(model, 5, scale * given), run(model, 5, given), rtol=1e-4)


def test_the_model_says_what_it_is_told_to() -> None:
    session = onnxruntime.InferenceSession(as_onnx(network(), {"estimated": '["m0s"]', "ü": "µ"}))
    assert session.get_modelmeta().custom_metadata_map == {"estimated": '["m0s"]', "ü": "µ"}
    shapes = {i.name: i.shape for i in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {"coefficients": ["B", 10], "estimates": ["B", 3]}


def test_the_weights_are_copied_from_the_network_in_evaluation_mode() -> None:
    made = network(normalization="batch")
    expected = as_estimator(made)(voxels(5, 0))
    model = as_onnx(made.train(), {})
    assert made.training
    found = run(model, 5, voxels(5, 0))
    np.testing.assert_allclose(found / SPREAD, expected / SPREAD, rtol=0, atol=2e-5)


def test_without_onnx_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "fisherprint\[onnx\]"'):
        as_onnx(network(), {})


# The verb.


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with a network of an SNR input and nothing else."""
    made = network(extra_inputs=[[3.0], [1.0]])
    config = {"inputs": [], "snr_input": True}
    card = {
        "parameters": ["m0s", "T1", "T2f", "B1"],
        "units": {"m0s": "", "T1": "s", "T2f": "s", "B1": ""},
        "estimated": ["m0s", "T1", "T2f"],
        "rank": 5,
        "basis_sha256": "b" * 64,
        "dataset_sha256": "d" * 64,
        "config": config,
    }
    files.save_network(tmp_path / "network", made.state_dict(), card)
    files.write_toml(tmp_path / "experiment.toml", {"title": "ONNX"})
    return tmp_path


def test_the_verb_writes_a_model_that_explains_itself(run_folder: Path) -> None:
    path = run_folder / "network.onnx"
    said = CliRunner().invoke(app, ["onnx", str(run_folder), "-o", str(path)])
    assert said.exit_code == 0, said.output
    assert f"network: {path}" in said.output.replace("\n", "")
    session = onnxruntime.InferenceSession(path)
    told = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert told["estimated"] == ["m0s", "T1", "T2f"]
    assert told["units"] == ["", "s", "s"]
    assert told["extra"] == ["log(|x|/sigma)"]
    assert (told["rank"], told["basis_sha256"]) == (5, "b" * 64)
    card = files.read_json(run_folder / "network" / "card.json")
    assert told["weights_sha256"] == card["weights_sha256"]
    given = voxels(5, 1)
    expected = as_estimator(network(extra_inputs=[[3.0], [1.0]]))(given)
    found = run(path.read_bytes(), 5, given)
    # Single precision, 1e-7, through 14 layers.
    np.testing.assert_allclose(found / SPREAD, expected / SPREAD, rtol=0, atol=2e-5)


def test_a_model_that_is_there_is_replaced_by_force_alone(run_folder: Path) -> None:
    path = run_folder / "network.onnx"
    path.write_text("mine")
    opened = experiment.open_run(run_folder)
    with pytest.raises(files.OutputExistsError, match="replace it with --force"):
        experiment.write_onnx(opened, path)
    assert path.read_text() == "mine"
    experiment.write_onnx(opened, path, force=True)
    assert path.stat().st_size > 4 * 2_600_000


def test_a_run_without_a_network_says_how_to_get_one(run_folder: Path) -> None:
    (run_folder / "network" / "card.json").unlink()
    with pytest.raises(experiment.ExperimentError, match="Train it: fisherprint train"):
        experiment.write_onnx(experiment.open_run(run_folder), run_folder / "network.onnx")
