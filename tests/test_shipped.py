"""Networks without a run: made, found, refused, and the one that comes with the package."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import safetensors.torch
import torch

import fisherprint as fp
from fisherprint import evaluate as evaluation
from fisherprint import experiment as stages
from fisherprint import files, sequence, subspace
from fisherprint.experiment import (
    BasisMismatchError,
    BrainSection,
    ExperimentError,
    Run,
    Trained,
    shipped,
)
from fisherprint.files import OutputExistsError, UnreadableFileError
from fisherprint.network import as_estimator
from fisherprint.parameters import paper_prior
from fisherprint.train import Samples

TODAY = date(2030, 1, 2)
RANK = 6
TINY: dict[str, Any] = {
    "sequence": {"path": "train.toml"},
    "simulation": {"training": 256, "validation": 32, "test": 64, "rank": RANK},
    "training": {
        **{"epochs": 2, "batch_size": 64, "warmup_steps": 2, "learning_rate": 1e-3},
        **{"estimated": ["m0s", "T1"], "snr_input": True, "remove_phase": True},
    },
    "evaluation": {"snr": [20, 40], "n_noise": 10, "fingerprints": 8},
}


def silent(*_: object) -> None:
    """Takes what a stage says and keeps it to itself."""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, short_train: fp.PulseTrain) -> Run:
    """An evaluated run of a train of its own; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("evaluated")
    short_train.write(folder / "train.toml")
    files.write_toml(folder / "tiny.toml", TINY)
    run = stages.start(stages.read(folder / "tiny.toml"), folder / "run")
    stages.simulate_run(run, progress=silent)
    stages.train_run(run, resume=False, say=silent, progress=silent)
    stages.evaluate_run(run, say=silent, progress=silent)
    return run


@pytest.fixture(scope="module")
def told(evaluated: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One whose network is told B1, on the same data set."""
    run = stages.vary(
        evaluated, tmp_path_factory.mktemp("told") / "run", ['training.inputs=["B1"]']
    )
    stages.train_run(run, resume=False, say=silent, progress=silent)
    stages.evaluate_run(run, say=silent, progress=silent)
    return run


@pytest.fixture(scope="module")
def made(evaluated: Run, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """That run's network, shipped; tests must leave it as it is."""
    return shipped.make(evaluated, tmp_path_factory.mktemp("made") / "tiny", today=TODAY)


@pytest.fixture
def folder(made: Trained, tmp_path: Path) -> Path:
    """A copy of its folder."""
    return shutil.copytree(made.folder, tmp_path / "copy")


@pytest.fixture
def run(evaluated: Run, tmp_path: Path) -> Run:
    """A copy of the run."""
    return Run(shutil.copytree(evaluated.folder, tmp_path / "run"), evaluated.experiment)


# Making.


def test_a_shipped_network_is_that_of_its_run_in_half_precision(
    evaluated: Run, made: Trained, short_train: fp.PulseTrain
) -> None:
    names = {path.name for path in made.folder.iterdir()}
    assert names == {"weights.safetensors", "card.json", "basis.h5", "train.toml"}
    old, new = (
        safetensors.torch.load_file(folder / "weights.safetensors")
        for folder in (evaluated.network, made.folder)
    )
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        wide = tensor.ndim == 2 and min(tensor.shape) >= 128
        assert new[name].dtype == (torch.float16 if wide else tensor.dtype), name
        assert torch.equal(new[name], tensor.to(new[name].dtype)), name
    # All that is not wide: the matrices are half as large.
    assert sum(t.nbytes for t in new.values()) < 0.52 * sum(t.nbytes for t in old.values())
    assert made.basis.digest == files.read_dataset(evaluated.dataset)[0].basis.digest
    assert made.train.digest == short_train.digest
    assert made.model.names == ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")


def test_its_card_has_the_numbers_of_the_audit(evaluated: Run, made: Trained) -> None:
    audit, score = files.read_audit(evaluated.audit)
    shares = audit.mean_shares_by_parameter()
    card = made.card["audit"]
    assert (card["loss"], card["standard_error"]) == (score.loss, score.standard_error)
    # Of the two, the nearest to 50.
    assert card["snr"] == audit.snr[1] == 40
    for e, name in enumerate(("m0s", "T1")):
        assert card["loss_by_parameter"][name] == score.loss_by_parameter[e]
        assert card["bias"][name] == shares.bias[1, e]
        assert card["variance"][name] == shares.variance[1, e]
    assert made.card["fingerprints"] == {"training": 256, "validation": 32, "test": 64}
    assert made.card["date"] == "2030-01-02"
    # What the card of the run says, it says too, but for the digest of other weights.
    own = files.read_json(evaluated.network / "card.json")
    digest = own.pop("weights_sha256")
    assert {key: made.card[key] for key in own} == own
    assert made.card["weights_sha256"] != digest


@pytest.mark.parametrize("inputs", [(), ("B1",)])
def test_rounding_is_measured_in_bounds(
    inputs: tuple[str, ...], evaluated: Run, told: Run, made: Trained, tmp_path: Path
) -> None:
    """Again, with noise of its own: the spread of the difference at the largest SNR, 100.

    What is known makes the bound smaller, and is given beside the coefficients.
    """
    if inputs:
        evaluated, made = told, shipped.make(told, tmp_path / "told", today=TODAY)
        assert "unknown beside M0: m0s, T1, T2f, Rx, T2s, B0; told B1; SNR" in "".join(
            shipped.described(made)
        )
    data, _ = files.read_dataset(evaluated.dataset)
    everything = stages.labelled(data, "test", ("m0s", "T1"), known=inputs)
    test, known = everything.select(("m0s", "T1")), everything.select(inputs).theta
    bounded = np.isfinite(test.crb).sum(axis=0)
    old, new = (
        as_estimator(trained.network) for trained in (stages.open_trained(evaluated), made)
    )
    rng = np.random.default_rng(7)
    squares = []
    for _ in range(20):
        noise = rng.standard_normal((2, *test.coefficients.shape))
        M0 = np.exp(2j * np.pi * rng.random((len(test.theta), 1)))
        images = M0 * test.coefficients + 0.01 * (noise[0] + 1j * noise[1])
        snr = np.log(np.linalg.norm(images, axis=1, keepdims=True) / 0.01)
        images = np.concatenate([images, known, snr], axis=1)
        difference = old(images) - new(images)
        squares.append((difference**2 / (1e-4 * test.crb)).sum(axis=0) / bounded)
    spread = np.sqrt(np.mean(squares, axis=0))
    scatter = np.std(np.sqrt(squares), axis=0)
    for e, name in enumerate(("m0s", "T1")):
        # One draw against the mean of 20; allow four of the standard deviation of a draw.
        assert abs(made.card["rounding"][name] - spread[e]) < 4 * scatter[e]
        assert 0 < made.card["rounding"][name] < 0.02


def test_a_network_of_the_bundled_train_has_none_of_its_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_train: fp.PulseTrain
) -> None:
    monkeypatch.setattr(sequence, "bundled", lambda: short_train)
    made = shipped.make(run, tmp_path / "made", today=TODAY)
    assert not (made.folder / "train.toml").exists()
    assert made.train.digest == short_train.digest
    assert "of the bundled train, 0.14 s" in shipped.described(made)[0]


def test_what_is_not_ready_is_not_shipped(run: Run, made: Trained, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="already there"):
        shipped.make(run, made.folder, today=TODAY)
    weights = safetensors.torch.load_file(run.network / "weights.safetensors")
    card = files.read_json(run.network / "card.json")
    # Normalized away in the next layer, and beyond the largest half-precision number.
    wide = {**weights, "linear.4.weight": 1e6 * weights["linear.4.weight"]}
    files.save_network(run.network, wide, card)
    with pytest.raises(ExperimentError, match=r"half precision .* at most 0\.02 √CRB; got .*nan"):
        shipped.make(run, tmp_path / "made", today=TODAY)
    files.save_network(run.network, weights, card)
    run.audit.unlink()
    with pytest.raises(ExperimentError, match=r"no audit\. Evaluate it: fisherprint evaluate"):
        shipped.make(run, tmp_path / "made", today=TODAY)
    assert not (tmp_path / "made").exists()


def test_a_network_is_replaced_by_force(run: Run, folder: Path) -> None:
    made = shipped.make(run, folder, today=date(2031, 1, 1), force=True)
    assert made.card["date"] == "2031-01-01"


# Finding.


def test_an_unknown_name_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "folders", lambda: {"one": Path("one"), "two": Path("two")})
    with pytest.raises(KeyError, match=r"shipped network \(one, two\).*; got three"):
        shipped.load("three")


def test_a_basis_or_train_of_another_network_is_refused(folder: Path) -> None:
    whole = (folder / "basis.h5").read_bytes()
    other = np.linalg.qr(np.random.default_rng(0).normal(size=(40, RANK)))[0]
    files.write_basis(folder / "basis.h5", subspace.Basis(other))
    with pytest.raises(UnreadableFileError, match="expected the basis"):
        shipped.load(folder)
    (folder / "basis.h5").write_bytes(whole)
    train = shipped.load(folder).train
    fp.PulseTrain(train.flip_angle, 1.1 * train.pulse_duration, 3.5e-3).write(
        folder / "train.toml"
    )
    with pytest.raises(UnreadableFileError, match="expected the train"):
        shipped.load(folder)
    content = files.read_json(folder / "card.json")
    del content["audit"]
    (folder / "card.json").write_text(json.dumps(content))
    with pytest.raises(UnreadableFileError, match="expected the keys audit"):
        shipped.load(folder)


# Mapping.


def write_images(path: Path, made: Trained, basis: subspace.Basis) -> Path:
    """Coefficients of fingerprints of the prior in a volume, said to be of a basis."""
    prior = paper_prior(made.model.names, repetition_time=3.5e-3)
    theta = prior.sample(60, rng=np.random.default_rng(3))
    images = made.basis.compress(made.model.signal(theta)).astype(np.complex64)
    volume = files.Volume(images.reshape(5, 4, 3, RANK), np.eye(4))
    files.write_coefficients(path, volume, basis_sha256=basis.digest)
    return path


def test_maps_need_no_run(evaluated: Run, made: Trained, tmp_path: Path) -> None:
    path = write_images(tmp_path / "images.nii.gz", made, made.basis)
    # In float32 on any processor: 11 bits show, not the 8 of bfloat16.
    section = stages.MapSection(coefficients=path, noise_std=0.01, precision="float32")
    for name, source in (("run", evaluated), ("shipped", made)):
        stages.map_run(source, section, tmp_path / name, say=silent, progress=silent)
    for name in ("m0s", "T1"):
        old, new = (
            np.asarray(nibabel.load(tmp_path / folder / f"{name}.nii.gz").dataobj)
            for folder in ("run", "shipped")
        )
        assert np.isfinite(old).all() and not np.array_equal(old, new)
        # 11 bits of each weight, of some hundred in a sum: a few times 2^-11 of the spread.
        np.testing.assert_allclose(new, old, atol=5e-3 * old.std())
    provenance = files.read_json(tmp_path / "shipped" / "summary.json")["provenance"]
    assert provenance["network_sha256"] == made.card["weights_sha256"]
    assert provenance["basis_sha256"] == made.basis.digest

    flipped = subspace.Basis(made.basis.vectors[:, ::-1])
    path = write_images(tmp_path / "others.nii.gz", made, flipped)
    section = stages.MapSection(coefficients=path, noise_std=0.01)
    with pytest.raises(BasisMismatchError, match="basis of this network"):
        stages.map_run(made, section, tmp_path / "no", say=silent, progress=silent)


def test_the_digital_brain_of_a_shipped_network(
    made: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nilearn")
    monkeypatch.setattr(shipped, "_BRAIN", BrainSection(voxel_size=12.0))
    out, said = tmp_path / "out", []
    page = shipped.demonstrate(made, out, force=False, say=said.append, progress=silent)
    text = page.read_text()
    assert "Pretrained network, digital brain: tiny" in text
    for line in shipped.described(made):
        assert line.strip().replace("<", "&lt;") in text
    assert made.card["weights_sha256"] in text
    assert any(line.endswith("voxels mapped, 0 failed") for line in said)
    # Coarse voxels and a network without training: what it finds is no white matter.
    assert any(line.startswith("all: T1 ") and line.endswith("] s") for line in said)
    with pytest.raises(OutputExistsError):
        shipped.demonstrate(made, out, force=False, say=silent, progress=silent)
    before = (out / "maps" / "summary.json").stat().st_mtime_ns
    shipped.demonstrate(made, out, force=True, say=silent, progress=silent)
    assert (out / "maps" / "summary.json").stat().st_mtime_ns > before
    (out / "experiment.toml").touch()
    with pytest.raises(OutputExistsError, match="run folder"):
        shipped.demonstrate(made, out, force=True, say=silent, progress=silent)


# The one that comes with the package.


def test_the_package_has_a_network_of_the_bundled_train() -> None:
    assert list(shipped.folders()) == ["bundled"]
    network = shipped.load()
    assert network.train.digest == sequence.bundled().digest
    assert not (network.folder / "train.toml").exists()
    assert sum(path.stat().st_size for path in network.folder.iterdir()) <= 6_000_000
    assert network.card["estimated"] == ["m0s", "T1", "T2f"]
    assert max(network.card["rounding"].values()) <= 0.02


def test_the_shipped_network_has_the_loss_that_its_card_says() -> None:
    """On fingerprints that nobody has seen, with bounds computed here."""
    network = shipped.load()
    card, model = network.card, network.model
    prior = paper_prior(model.names, repetition_time=network.train.repetition_time)
    theta = prior.sample(256, rng=np.random.default_rng(11))
    out = model.simulate(theta)
    c, J = network.basis.compress(out.signal), network.basis.compress(out.jacobian)
    bound = fp.crb(c, J, noise_std=1.0)
    usable = np.isfinite(bound).all(axis=1)
    fresh = Samples(model.names, c[usable], theta[usable], bound[usable])
    score = evaluation.loss_over_scales(
        as_estimator(network.network),
        fresh.select(card["estimated"]),
        scale_range=tuple(card["config"]["scale_range"]),
        noise_std=card["config"]["noise_std"],
        rng=np.random.default_rng(12),
    )
    error = np.hypot(score.standard_error, card["audit"]["standard_error"])
    assert abs(score.loss - card["audit"]["loss"]) < 4 * error
