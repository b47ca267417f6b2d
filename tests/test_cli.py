"""The command line, as a user meets it: in this process, or in one that signals can end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import h5py
import nibabel
import numpy as np
import pytest
import safetensors.torch

from fisherprint import cli, files, sequence
from fisherprint import experiment as stages
from fisherprint.experiment import shipped
from fisherprint.models import TwoPool
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis

RANK = 6
TINY = f"""\
title = "A tiny run"

[sequence]
path = "train.toml"

[simulation]
training = 256
validation = 64
test = 64
rank = {RANK}

[training]
epochs = 2
batch_size = 64
learning_rate = 1e-3
warmup_steps = 4

[evaluation]
snr = [20, 50]
n_noise = 20
fingerprints = 8
"""
BRAIN = """
[brain]
voxel_size = 12.0
"""
COMMANDS = (
    *("simulate", "train", "evaluate", "map", "fit", "report", "crb", "run", "demo"),
    *("design", "export", "vary", "reproduce", "bids", "onnx", "models", "ship"),
    *("reconstruct", "scan", "regions", "convert"),
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def call(*arguments: object) -> Result:
    """`fisherprint ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fisherprint", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return Result(leaving.value.code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    """Output of a command that must succeed."""
    result = call(*arguments)
    assert result.code == 0, result.err
    return result.out


def refused(*arguments: object) -> str:
    """Message of a command that must be refused, without a traceback."""
    result = call(*arguments)
    assert result.code == 2, result
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err
    return result.err


def test_the_bundled_train_has_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    monkeypatch.setattr(stages, "train_page", lambda trains, _: pages.append(trains) or "page")
    out = tmp_path / "page.html"
    assert done("report", "bundled", "-o", out) == f"report: {out}\n"
    ((label, train),) = pages[0].items()
    assert (label, train.digest) == ("bundled", sequence.bundled().digest)


def test_a_hand_written_experiment_in_its_run_folder_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text('# keep me\ntitle = "mine"\n')
    for title, kept in (("mine", True), ("other", False)):
        run = stages.start(stages.Experiment(title=title, data=tmp_path), tmp_path)
        assert stages.open_run(tmp_path).experiment.title == run.experiment.title == title
        assert path.read_text().startswith("# keep me") == kept


def short_train() -> PulseTrain:
    i = np.arange(1, 40)
    angle = np.r_[np.pi, 0.1 + np.sin(np.pi * i / 40) ** 2]
    return PulseTrain(angle, np.r_[500e-6, 1e-6 * (150 + 8 * i)], 3.5e-3)


def write_experiment(folder: Path, text: str = TINY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    short_train().write(folder / "train.toml")
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Each file below a folder; hidden ones too, so that no temporary one goes unnoticed."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def modified(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Experiment file and folder of a finished run; tests must leave both as they are."""
    if importlib.util.find_spec("nilearn") is None:
        pytest.skip("nilearn is not installed")
    folder = tmp_path_factory.mktemp("finished")
    experiment = write_experiment(folder, TINY + BRAIN)
    done("run", experiment, "-o", folder / "run")
    return experiment, folder / "run"


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished run, to do with as one likes."""

    def copy(source: str, target: str) -> None:
        # All writers but the log's replace files, so large ones can be shared.
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    return shutil.copytree(finished[1], tmp_path / "run", copy_function=copy)


@pytest.fixture
def images(finished: tuple[Path, Path]) -> Path:
    """Coefficient images in the basis of the finished run."""
    return finished[1] / "brain" / "coefficients.nii.gz"


# Products.


def test_a_run_leaves_the_products_of_every_stage(finished: tuple[Path, Path]) -> None:
    names = set(modified(finished[1]))
    assert names == {
        *("experiment.toml", "dataset.h5", "evaluation.h5", "report.html"),
        *(f"network/{name}" for name in ("weights.safetensors", "card.json", "log.jsonl")),
        "network/checkpoint.safetensors",
        *(f"maps/{name}.{end}" for name in ("m0s", "T1", "T2f") for end in ("nii.gz", "json")),
        *("maps/white_matter.nii.gz", "maps/summary.json"),
        *("maps/status.nii.gz", "maps/status.json"),
        *("brain/coefficients.nii.gz", "brain/coefficients.json", "brain/mask.nii.gz"),
        *(
            f"brain/truth/{name}.{end}"
            for name in ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
            for end in ("nii.gz", "json")
        ),
        "brain/tissues/white_matter.nii.gz",
    }


def test_the_data_set_holds_what_the_network_is_made_from(finished: tuple[Path, Path]) -> None:
    with h5py.File(finished[1] / "dataset.h5") as file:
        names = list(file.attrs["names"])
        assert names == ["m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1"]
        assert file.attrs["seed"] == 0
        versions = json.loads(file.attrs["versions"])
        for package in ("fisherprint", "numpy", "scipy", "numba", "torch"):
            assert versions[package] == metadata.version(package)
        train = PulseTrain.read_from(file["train"])
        assert train.digest == short_train().digest == file.attrs["train_sha256"]
        U = file["basis"][()]
        assert file.attrs["basis_sha256"] == Basis(U).digest
        sizes = {split: len(file[split]["theta"]) for split in ("training", "validation", "test")}
        test = {name: file["test"][name][()] for name in file["test"]}
    assert sizes == {"training": 256, "validation": 64, "test": 64}
    # Rounding of complex128 over 40 samples.
    np.testing.assert_allclose(U.conj().T @ U, np.eye(RANK), atol=1e-12)

    # Both bounds again, from the formula: F = Re(Gᴴ G), G = [s, i·s, ∂s/∂θ...].
    fingerprints = TwoPool(train).simulate(test["theta"])
    s, J = fingerprints.signal, fingerprints.jacobian
    # Coefficients of up to 1; sums over 40 samples in another order.
    np.testing.assert_allclose(test["coefficients"], s @ U.conj(), atol=1e-14)
    G = np.concatenate([s[..., None], 1j * s[..., None], J], axis=-1)
    bounds = {"crb_signal": G, "crb_coefficients": np.einsum("tk,stp->skp", U.conj(), G)}
    for name, g in bounds.items():
        F = np.einsum("stp,stq->spq", g.conj(), g).real
        d = np.sqrt(np.diagonal(F, axis1=1, axis2=2))
        scaled = np.linalg.inv(F / d[:, :, None] / d[:, None, :])
        expected = (np.diagonal(scaled, axis1=1, axis2=2) / d**2)[:, 2:]
        # Rank 6 barely determines 9 unknowns: inverses agree to 1e-16 times the condition, 1e9 in
        # the middle and below 1e13 (where a direction counts as lost) always.
        np.testing.assert_allclose(test[name], expected, rtol=1e-3)
        assert np.median(np.abs(test[name] / expected - 1)) < 1e-6


def test_the_card_says_what_the_network_is(finished: tuple[Path, Path]) -> None:
    run = finished[1]
    card = json.loads((run / "network" / "card.json").read_text())
    with h5py.File(run / "dataset.h5") as file:
        theta = file["training"]["theta"][()]
        assert card["basis_sha256"] == file.attrs["basis_sha256"]
        assert card["train_sha256"] == file.attrs["train_sha256"]
    for key, path in (
        ("dataset_sha256", "dataset.h5"),
        ("weights_sha256", "network/weights.safetensors"),
    ):
        assert card[key] == hashlib.sha256((run / path).read_bytes()).hexdigest()
    names = ["m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1"]
    assert card["parameters"] == names
    assert card["estimated"] == ["m0s", "T1", "T2f"]
    assert card["units"] == dict(zip(names, ["", "s", "s", "1/s", "s", "rad/s", ""], strict=True))
    limits = np.array([card["ranges"][name] for name in names])
    np.testing.assert_array_equal(limits, np.stack([theta.min(0), theta.max(0)], -1))
    assert card["rank"] == RANK
    # |M0| from 0.1 to 1 over σ = 0.01; both divisions round.
    assert card["snr_range"] == pytest.approx([10, 100], rel=1e-12)
    assert card["fisher_unknowns"] == [*names, "Re M0", "Im M0"]
    assert card["config"]["loss"] == "crb"
    assert card["versions"]["torch"] == metadata.version("torch")
    log = [json.loads(line) for line in (run / "network/log.jsonl").read_text().splitlines()]
    assert [epoch["number"] for epoch in log] == [1, 2]
    assert card["losses"] == {
        "training": log[-1]["train_loss"],
        "validation": log[-1]["validation_losses"],
        "epochs": 2,
    }


def test_the_evaluation_holds_what_was_asked_for(finished: tuple[Path, Path]) -> None:
    audit, score = files.read_audit(finished[1] / "evaluation.h5")
    assert audit.names == score.names == ("m0s", "T1", "T2f")
    np.testing.assert_array_equal(audit.snr, [20, 50])
    assert audit.n_noise == 20
    assert audit.bias.shape == (2, 8, 3)
    with h5py.File(finished[1] / "dataset.h5") as file:
        np.testing.assert_array_equal(audit.truth, file["test"]["theta"][:8, :3])


def test_the_digital_brain_is_mapped_beside_its_truth(finished: tuple[Path, Path]) -> None:
    run = finished[1]
    mask = nibabel.load(run / "brain/mask.nii.gz")
    inside = np.asarray(mask.dataobj) != 0
    assert mask.header.get_zooms() == (12, 12, 12)
    for folder, names in (("maps", ("m0s", "T1", "T2f")), ("brain/truth", ("m0s", "B1"))):
        for name in names:
            image = nibabel.load(run / folder / f"{name}.nii.gz")
            np.testing.assert_array_equal(np.isfinite(np.asarray(image.dataobj)), inside)
            np.testing.assert_array_equal(image.affine, mask.affine)
    tissue = np.asarray(nibabel.load(run / "brain/tissues/white_matter.nii.gz").dataobj) != 0
    m0s = np.asarray(nibabel.load(run / "brain/truth/m0s.nii.gz").dataobj)
    # At least 95 % white matter, of m0s 0.212, the rest of it between 0.001 and 0.212.
    assert (m0s[tissue] > 0.95 * 0.212).all() and (m0s[tissue] <= 0.212 + 1e-6).all()
    summary = json.loads((run / "maps/summary.json").read_text())
    assert summary["regions"]["all"]["voxels"] == inside.sum()
    estimate = np.asarray(nibabel.load(run / "maps/T1.nii.gz").dataobj)[inside]
    # Maps are stored in single precision.
    assert summary["regions"]["all"]["T1"]["median"] == pytest.approx(np.median(estimate), 1e-6)


def test_the_report_shows_every_stage(finished: tuple[Path, Path]) -> None:
    page = (finished[1] / "report.html").read_text()
    for heading in (
        *("A tiny run", "Digital brain", "Loss and its shares", "Convergence", "Pulse train"),
        *("Magnetization", "Bound maps", "Bounds against B0 and B1", "What compression costs"),
    ):
        assert f"{heading}</h" in page
    assert "√CRB of the 6 coefficients" in page
    # The whole of the provenance: what was asked for, and what it was made with.
    assert "voxel_size = 12.0" in page
    assert short_train().digest in page


def test_the_stages_one_by_one_give_what_run_gives(
    finished: tuple[Path, Path], tmp_path: Path
) -> None:
    experiment, whole = finished
    run, maps = tmp_path / "run", tmp_path / "maps"
    images, mask = (whole / "brain" / f"{name}.nii.gz" for name in ("coefficients", "mask"))
    assert str(run / "dataset.h5") in done("simulate", experiment, "-o", run)
    assert "Digital brain" not in done("report", run)
    assert "epoch 2" in done("train", run)
    assert "loss over the training range of M0" in done("evaluate", run)
    assert "0 failed" in done("map", images, "--mask", mask, "--run", run, "-o", maps)
    assert str(run / "report.html") in done("report", run)
    for path in ("network/weights.safetensors", "evaluation.h5"):
        assert (run / path).read_bytes() == (whole / path).read_bytes()
    for name in ("m0s", "T1", "T2f"):
        np.testing.assert_array_equal(
            nibabel.load(maps / f"{name}.nii.gz").get_fdata(),
            nibabel.load(whole / "maps" / f"{name}.nii.gz").get_fdata(),
        )


# Nothing finished is done twice or lost.


def test_run_skips_finished_stages_and_says_so(
    finished: tuple[Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The page is made of what is there, so it is always written anew; that takes seconds.
    monkeypatch.setattr("fisherprint.experiment.stages.report_run", lambda run: run.report)
    before = modified(run)
    said = done("run", finished[0], "-o", run)
    for stage in ("simulate", "train", "evaluate", "map"):
        assert f"{stage}: done before" in said
    assert modified(run) == before

    (run / "evaluation.h5").unlink()
    said = done("run", finished[0], "-o", run)
    assert "evaluate ..." in said and "map: done before" in said
    after = modified(run)
    assert {name for name in before if before[name] != after[name]} == {"evaluation.h5"}
    assert (run / "evaluation.h5").read_bytes() == (finished[1] / "evaluation.h5").read_bytes()


@pytest.mark.parametrize("command", ["run", "simulate"])
def test_a_folder_of_another_experiment_is_refused(
    run: Path, tmp_path: Path, command: str
) -> None:
    other = write_experiment(tmp_path, TINY.replace("epochs = 2", "epochs = 3"))
    before = contents(run)
    message = refused(command, other, "-o", run)
    assert str(run) in message and "another experiment" in message and "--force" in message
    assert contents(run) == before


def test_finished_results_are_kept_without_force(
    finished: tuple[Path, Path], run: Path, images: Path
) -> None:
    before = contents(run)
    for *arguments, option in (
        ("simulate", finished[0], "-o", run, "--force"),
        ("train", run, "--force"),
        ("evaluate", run, "--force"),
        ("map", images, "--run", run, "-o", run / "maps", "--overwrite"),
        ("map", images, "--run", run, "-o", run / "maps", "--force", "--overwrite"),
    ):
        message = refused(*arguments)
        assert "already" in message and option in message
        assert contents(run) == before


def test_the_noise_of_images_is_taken_by_any_network(
    run: Path, finished: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    """For the error bars, which are proportional to it; or there are none."""
    mask = finished[1] / "brain" / "mask.nii.gz"
    arguments = ("map", images, "--mask", mask, "--run", run)
    stds = []
    for noise_std in (0.1, 0.2):
        out = tmp_path / str(noise_std)
        assert f"noise σ {noise_std} as given" in done(
            *arguments, "-o", out, "--noise-std", noise_std
        )
        stds.append(np.asarray(nibabel.load(out / "T1_std.nii.gz").dataobj))
    inside = np.isfinite(stds[0])
    assert inside.any()
    # Stored in single precision.
    np.testing.assert_allclose(stds[1][inside], 2 * stds[0][inside], rtol=1e-6)
    said = done(*arguments, "-o", tmp_path / "bare", "--no-errors")
    assert "noise σ" not in said and "status: " in said
    assert not (tmp_path / "bare" / "T1_std.nii.gz").exists()


def test_a_training_goes_on_or_starts_again(run: Path) -> None:
    before = contents(run)
    message = refused("train", run, "--resume", "--force")
    assert "--resume" in message and "--force" in message and "Drop one" in message
    assert contents(run) == before


def test_a_network_without_its_checkpoint_is_kept_too(run: Path) -> None:
    (run / "network/checkpoint.safetensors").unlink()
    before = contents(run)
    for options in ((), ("--resume",)):
        assert "card.json is already there" in refused("train", run, *options)
        assert contents(run) == before


def test_force_replaces_results_by_equal_ones(
    finished: tuple[Path, Path], run: Path, images: Path
) -> None:
    """The same experiment again: the same numbers in new files."""
    whole = finished[1]
    before = modified(run)
    done("evaluate", run, "--force")
    done("train", run, "--force")
    # They were the replaced network's.
    for product in ("evaluation.h5", "maps/summary.json", "report.html"):
        assert not (run / product).exists()
    done("evaluate", run, "--force")
    mask = whole / "brain/mask.nii.gz"
    done("map", images, "--mask", mask, "--run", run, "-o", run / "maps", "--overwrite")
    for path in ("network/weights.safetensors", "evaluation.h5", "maps/T1.json"):
        assert modified(run)[path] != before[path]
    for path in ("network/weights.safetensors", "evaluation.h5"):
        assert (run / path).read_bytes() == (whole / path).read_bytes()


def test_simulate_with_force_starts_the_run_again(run: Path, tmp_path: Path) -> None:
    other = write_experiment(tmp_path, TINY.replace("rank = 6", "rank = 5"))
    done("simulate", other, "-o", run, "--force")
    with h5py.File(run / "dataset.h5") as file:
        assert file["basis"].shape == (40, 5)
    # What the earlier experiment made must not pass for this one's.
    for path in ("network/card.json", "evaluation.h5", "maps/summary.json", "report.html"):
        assert not (run / path).exists()


@pytest.mark.parametrize("command", ["simulate", "run"])
def test_force_loses_nothing_when_the_new_inputs_are_bad(
    run: Path, tmp_path: Path, command: str
) -> None:
    experiment = write_experiment(tmp_path)
    (tmp_path / "train.toml").write_text("flip_angle = [")
    before = contents(run)
    assert "train.toml" in refused(command, experiment, "-o", run, "--force")
    assert contents(run) == before


def test_a_data_set_of_another_training_is_explained(run: Path, tmp_path: Path) -> None:
    other = write_experiment(tmp_path, TINY.replace("rank = 6", "rank = 6\nseed = 1"))
    done("simulate", other, "-o", tmp_path / "other")
    shutil.copy(tmp_path / "other/dataset.h5", run)
    before = contents(run)
    message = refused("evaluate", run, "--force")
    assert "expected the data set" in message and f"fisherprint train {run} --force" in message
    assert contents(run) == before


def test_a_full_disk_leaves_the_old_result(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(run)
    monkeypatch.setattr(os, "fsync", full)
    for arguments in (
        ("evaluate", run, "--force"),
        ("map", images, "--run", run, "-o", run / "maps", "--overwrite"),
    ):
        assert os.strerror(errno.ENOSPC) in refused(*arguments)
        assert contents(run) == before


# Errors and signals in the middle.


def test_an_error_in_any_stage_leaves_the_run_resumable(
    finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fisherprint.experiment.stages.report_run", lambda run: run.report
    )  # seconds of drawing
    images = finished[1] / "brain/coefficients.nii.gz"
    section = f'\n[map]\ncoefficients = "{images}"\n'
    experiment, run = write_experiment(tmp_path, TINY + section), tmp_path / "run"
    network = {"network/checkpoint.safetensors", "network/log.jsonl"}
    for writer, calls, there in (
        ("write_basis", 1, set()),
        ("write_shard", 2, set()),
        ("assemble_dataset", 1, set()),
        ("write_checkpoint", 2, {"dataset.h5", *network}),
        ("save_network", 1, {"dataset.h5", *network}),
        ("write_audit", 1, {"dataset.h5", *network, "network/card.json"}),
        ("write_mask", 1, {"dataset.h5", *network, "network/card.json", "evaluation.h5"}),
    ):
        working, left = getattr(files, writer), iter(range(calls - 1))

        def failing(*args: object, working=working, left=left, **options: object) -> object:
            if next(left, None) is None:
                raise OSError(errno.EIO, "the disk failed")
            return working(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(files, writer, failing)
            assert "the disk failed" in refused("run", experiment, "-o", run)
        assert there <= set(modified(run))
        assert not list(run.rglob(".part-*"))
    assert not (run / "maps/summary.json").exists()
    assert "evaluate: done before" in done("run", experiment, "-o", run)
    assert (run / "maps/summary.json").exists()
    for path in ("network/weights.safetensors", "evaluation.h5"):
        assert (run / path).read_bytes() == (finished[1] / path).read_bytes()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated run of more epochs than anybody waits for, so that there is one to interrupt."""
    folder = tmp_path_factory.mktemp("long")
    # The network is an average, whose weights and those it goes on from are both kept.
    text = TINY.replace("training = 256", "training = 512").replace(
        "epochs = 2", f"{ENDLESS}\naverage_steps = 5"
    )
    experiment = write_experiment(folder, text.replace("batch_size = 64", "batch_size = 32"))
    done("simulate", experiment, "-o", folder / "run")
    return folder / "run"


ENDLESS = "epochs = 1000000"


def shorten(run: Path, epochs: int) -> None:
    experiment = run / "experiment.toml"
    text = experiment.read_text()
    assert ENDLESS in text
    experiment.write_text(text.replace(ENDLESS, f"epochs = {epochs}"))


def start_training(run: Path) -> subprocess.Popen[str]:
    """`fisherprint train RUN` in a process of its own, its first epoch done."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from fisherprint.cli import main; main()", "train", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint, deadline = run / "network/checkpoint.safetensors", time.monotonic() + 300
    while not checkpoint.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()  # or it would never say what it has said
            pytest.fail(str(process.communicate()))
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    endless: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run, uninterrupted = (shutil.copytree(endless, tmp_path / name) for name in ("run", "other"))
    process = start_training(run)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip() == "interrupted; finished shards, epochs, rounds and stages are kept"
        # Whatever was being written is gone.
        assert not list(run.rglob(".part-*"))
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (run / "network/card.json").exists()

    message = refused("train", run)
    assert "already holds trained epochs" in message
    assert "--resume" in message and "--force" in message
    epochs = len(files.read_jsonl(run / "network/log.jsonl"))
    for folder in (run, uninterrupted):
        shorten(folder, epochs + 2)
    said = done("train", run, "--resume")
    resumed = int(said.split("resuming after epoch ")[1].split()[0])
    # A kill between the two writes leaves an epoch in the log that the checkpoint lacks.
    assert resumed in (epochs - 1, epochs)
    assert f"epoch {resumed}:" not in said and f"epoch {resumed + 1}:" in said
    done("train", uninterrupted)
    weights = [
        safetensors.torch.load_file(folder / "network/weights.safetensors")
        for folder in (run, uninterrupted)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name
    logs = [files.read_jsonl(folder / "network/log.jsonl") for folder in (run, uninterrupted)]
    # Each epoch once, with the same losses; only the time it took may differ.
    for record in (*logs[0], *logs[1]):
        del record["seconds"]
    assert logs[0] == logs[1]


# Networks without a run.


def test_a_shipped_network_maps_without_its_run(
    finished: tuple[Path, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny"
    said = done("ship", finished[1], "-o", folder)
    assert said.startswith(
        f"tiny: m0s, T1, T2f from {RANK} coefficients (svd basis) of its own train"
    )
    mask = finished[1] / "brain" / "mask.nii.gz"
    done("map", images, "--mask", mask, "--model", folder, "-o", tmp_path / "maps")
    old, new = (
        json.loads((maps / "summary.json").read_text())["regions"]["all"]
        for maps in (finished[1] / "maps", tmp_path / "maps")
    )
    assert new["voxels"] == old["voxels"]
    for name in ("m0s", "T1", "T2f"):
        # Weights of 11 bits.
        assert new[name]["median"] == pytest.approx(old[name]["median"], rel=5e-3)
        assert new[name]["median"] != old[name]["median"]

    monkeypatch.setattr(shipped, "folders", lambda: {"tiny": folder})
    assert done("models") == said
    done("map", images, "--mask", mask, "--model", "tiny", "-o", tmp_path / "again")
    message = refused("map", images, "--model", "huge", "-o", tmp_path / "no")
    assert "expected a shipped network (tiny)" in message
    message = refused("ship", finished[1], "-o", folder)
    assert "already there" in message and "--force" in message


def test_maps_are_written_in_the_units_asked_for(
    finished: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    mask = finished[1] / "brain" / "mask.nii.gz"
    arguments = ("map", images, "--mask", mask, "--run", finished[1], "-o", tmp_path / "maps")
    assert "way to state T1 (s): ms, µs; got 'h'" in refused(*arguments, "--as", "T1=h")
    assert "unknown parameter 'Rx'" in refused(*arguments, "--as", "Rx=%")
    for wrong in (["--as", "T1"], ["--as", "T1=ms", "--as", "T1=s"]):
        assert "expected NAME=UNIT" in call(*arguments, *wrong).err
    assert not (tmp_path / "maps").exists()
    done(*arguments, "--as", "T2f=ms", "--as", "m0s=F")
    old, new = (
        {
            path.name.removesuffix(".nii.gz"): nibabel.load(path).get_fdata()
            for path in folder.glob("*.nii.gz")
        }
        for folder in (finished[1] / "maps", tmp_path / "maps")
    )
    for name, values in (
        ("T1", old["T1"]),
        ("T2f", 1e3 * old["T2f"]),
        ("F", old["m0s"] / (1 - old["m0s"])),
    ):
        # Single precision, and a division by 1 - m0s that is far from 0.
        np.testing.assert_allclose(new[name], values, rtol=1e-5)
    assert json.loads((tmp_path / "maps/T2f.json").read_text())["Unit"] == "ms"
    assert "m0s" not in new
    # The summary stays in SI units; so do new maps in the same folder.
    summary = json.loads((tmp_path / "maps/summary.json").read_text())["regions"]["all"]
    assert summary == json.loads((finished[1] / "maps/summary.json").read_text())["regions"]["all"]
    done(*arguments, "--overwrite")
    assert not (tmp_path / "maps/F.nii.gz").exists()
    assert json.loads((tmp_path / "maps/T2f.json").read_text())["Unit"] == "s"


def test_the_networks_of_the_package_are_listed() -> None:
    said = done("models")
    assert said.startswith("bundled: m0s, T1, T2f from ")
    assert "of the bundled train" in said
    assert "bias²/CRB and variance/CRB at SNR 50: m0s " in said


@pytest.mark.slow
def test_the_pretrained_demo_takes_less_than_a_minute(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    began = time.monotonic()
    said = done("demo", "--pretrained", "-o", tmp_path / "out")
    assert time.monotonic() - began < 60
    assert str(tmp_path / "out" / "report.html") in said
    regions = json.loads((tmp_path / "out" / "maps" / "summary.json").read_text())["regions"]
    assert regions["all"]["voxels"] > 20_000


# Calls and messages.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_shows_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = done(command, "--help")
    lines = text.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert f"Example: fisherprint {command} " in text


def test_all_commands_are_listed() -> None:
    text = done("--help")
    assert all(f" {command} " in text for command in COMMANDS)
    assert "--debug" in text
    assert "Example: fisherprint run experiments/bundled.toml -o runs/bundled" in text
    nothing = call()
    assert nothing.code == 2
    assert "Usage" in nothing.out + nothing.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["train"], "RUN"),
        (["train", "run", "--bogus"], "--bogus"),
        (["simulate", "tiny.toml"], "--output"),
        (["map", "x.nii", "-o", "maps"], "--run or --model"),
        (["map", "x.nii", "-o", "m", "--run", "r", "--model", "bundled"], "--run or --model"),
        (["map", "x.nii", "-o", "m", "--run", "r", "--basis", "U.h5"], "--basis-key"),
        (["map", "x.nii", "-o", "m", "--run", "r", "--basis-key", "U"], "belong together"),
    ],
)
def test_a_wrong_call_is_explained(arguments: list[str], expected: str) -> None:
    result = call(*arguments)
    assert result.code == 2
    assert expected in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_where_an_error_comes_from(tmp_path: Path, place: int) -> None:
    arguments = ["report", str(tmp_path)]
    arguments.insert(place, "--debug")
    with (
        mock.patch.object(sys, "argv", ["fisherprint", *arguments]),
        pytest.raises(ValueError, match="expected a run folder"),
    ):
        cli.main()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[simulation]", "[simulation", ["expected TOML", "line 6"]),
        ("rank = 6", "ranks = 6", ["simulation.ranks", "check its spelling", "got 6"]),
        ("rank = 6", 'rank = "six"', ["simulation.rank", "valid integer", "got 'six'"]),
        ("rank = 6", "rank = 1", ["simulation.rank", "greater than or equal to 2", "got 1"]),
        ("rank = 6", "rank = 99", ["rank must lie between 1 and 40", "got 99"]),
        (
            "rank = 6",
            'rank = 6\nbasis = "U.h5"\nbasis_key = "U"',
            ["simulation: expected a rank, or a basis", "got rank 6, basis U.h5"],
        ),
        ("rank = 6", 'basis = "U.h5"', ["simulation: expected a rank", "basis_key None"]),
        (
            "rank = 6",
            'basis = "U.h5"\nbasis_key = "U"',
            ["expected a file", "U.h5", "Check the path"],
        ),
        ("snr = [20, 50]", "snr = []", ["evaluation.snr", "at least 1 item", "got []"]),
        ("snr = [20, 50]", "snr = [20, 0]", ["evaluation.snr.1", "greater than 0", "got 0"]),
        (
            "epochs = 2",
            'estimated = ["T9"]\nepochs = 2',
            ["m0s, T1, T2f, Rx, T2s, B0, B1", "got 'T9'", "Correct the name"],
        ),
        (
            "[simulation]",
            '[model]\nparameters = ["m0s", "T1", "T2f", "T9"]\n[simulation]',
            ["unknown parameter 'T9'", "m0s, T1, T1f"],
        ),
        (
            "[simulation]",
            "[prior.B1]\nmean = 1.0\nsdt = 0.1\n[simulation]",
            ["prior.B1", "sdt", "got 0.1"],
        ),
        (
            "[simulation]",
            "[prior.B1]\nmean = 1.0\nstd = 0.3\nlow = 0.3\nhigh = 2.0\n[simulation]",
            ["B1·α", "rad", "B1"],
        ),
        ('path = "train.toml"', 'inversion = "spoiled"', ["expected a path", "Name a file"]),
        ('path = "train.toml"', 'path = "no.toml"', ["expected a file", "no.toml", "nothing"]),
        ("[evaluation]", "[map]\n[brain]\n[evaluation]", ["map.coefficients", "required"]),
        (
            "[evaluation]",
            '[map]\ncoefficients = "x.nii"\n[brain]\n[evaluation]',
            ["expected [map] or [brain]", "Keep one"],
        ),
    ],
)
def test_a_wrong_experiment_is_explained(
    tmp_path: Path, old: str, new: str, expected: list[str]
) -> None:
    assert old in TINY
    experiment = write_experiment(tmp_path, TINY.replace(old, new))
    message = refused("simulate", experiment, "-o", tmp_path / "run")
    for part in expected:
        assert part in message
    # One corrects the file and calls again: nothing stands in the way.
    experiment.write_text(TINY)
    done("simulate", experiment, "-o", tmp_path / "run")


def test_an_output_that_cannot_be_a_folder_is_explained(tmp_path: Path) -> None:
    experiment = write_experiment(tmp_path)
    assert str(tmp_path / "tiny.toml") in refused("simulate", experiment, "-o", experiment)


def test_an_interrupt_before_the_commands_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class LeftError(Exception):
        """In place of the end of this process."""

    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    def leave(code: int) -> None:
        assert code == 130
        raise LeftError

    monkeypatch.setattr(cli, "app", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(LeftError):
        cli.main()
    assert err.getvalue() == "interrupted; finished shards, epochs, rounds and stages are kept\n"


def test_a_missing_experiment_is_explained(tmp_path: Path) -> None:
    message = refused("simulate", tmp_path / "no.toml", "-o", tmp_path / "run")
    assert "expected a file" in message and "no.toml" in message and "Check the path" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "factor", "hint"),
    [
        ("pulse_duration", 1e3, "Are the durations in ms?"),
        ("flip_angle", 180 / np.pi, "Are the angles in degrees?"),
    ],
)
def test_a_train_in_other_units_is_explained(
    tmp_path: Path, key: str, factor: float, hint: str
) -> None:
    experiment = write_experiment(tmp_path)
    train = files.read_toml(tmp_path / "train.toml")
    train[key] = (factor * np.array(train[key])).tolist()
    files.write_toml(tmp_path / "train.toml", train)
    message = refused("simulate", experiment, "-o", tmp_path / "run")
    assert "got" in message and hint in message


@pytest.mark.parametrize("command", ["train", "evaluate", "report"])
def test_a_folder_that_is_no_run_is_explained(tmp_path: Path, command: str) -> None:
    message = refused(command, tmp_path)
    assert str(tmp_path) in message and "expected a run folder" in message
    assert "fisherprint simulate" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "map"])
def test_a_run_without_a_network_is_explained(
    run: Path, images: Path, tmp_path: Path, command: str
) -> None:
    (run / "network/card.json").unlink()
    (run / "evaluation.h5").unlink()
    map_arguments = (images, "--run", run, "-o", tmp_path / "maps")
    message = refused(command, *(map_arguments if command == "map" else (run,)))
    assert "expected a trained network" in message
    assert f"Train it: fisherprint train {run}" in message
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    ("damaged", "command"),
    [
        ("dataset.h5", "evaluate"),
        ("dataset.h5", "report"),
        ("network/weights.safetensors", "evaluate"),
        ("network/card.json", "evaluate"),
        ("evaluation.h5", "report"),
        ("maps/m0s.nii.gz", "report"),
    ],
)
def test_truncated_products_are_explained(run: Path, damaged: str, command: str) -> None:
    path = run / damaged
    data = path.read_bytes()
    path.unlink()  # it may be shared with the finished run
    path.write_bytes(data[: len(data) // 2])
    before = contents(run)
    message = refused(command, run, *(["--force"] if command == "evaluate" else []))
    assert "expected" in message and str(path) in message
    assert "truncated" in message or "damaged" in message
    assert contents(run) == before


def test_a_truncated_checkpoint_is_explained(run: Path) -> None:
    path = run / "network/checkpoint.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])
    message = refused("train", run, "--resume")
    assert "expected a checkpoint" in message and str(path) in message


# Maps.


def coefficients(rank: int = RANK) -> np.ndarray:
    rng = np.random.default_rng(7)
    return (rng.normal(size=(5, 4, 3, rank, 2)) @ [1, 1j]).astype(np.complex64)


def foreign_nifti(folder: Path) -> list[object]:
    (folder / "x.nii.gz").write_text("not an image")
    return [folder / "x.nii.gz"]


def truncated_cfl(folder: Path) -> list[object]:
    (folder / "x.hdr").write_text(f"# Dimensions\n5 4 3 1 1 1 {RANK}\n")
    (folder / "x.cfl").write_bytes(coefficients().tobytes(order="F")[:-100])
    return [folder / "x.cfl"]


def missing_key(folder: Path) -> list[object]:
    with h5py.File(folder / "x.h5", "w") as file:
        file["first"] = file["second"] = coefficients()
    return [folder / "x.h5", "--key", "third"]


def no_key(folder: Path) -> list[object]:
    return missing_key(folder)[:1]


def other_rank(folder: Path) -> list[object]:
    np.save(folder / "x.npy", coefficients(RANK - 1))
    return [folder / "x.npy"]


def magnitudes(folder: Path) -> list[object]:
    np.save(folder / "x.npy", np.abs(coefficients()))
    return [folder / "x.npy"]


def some_nan(folder: Path) -> list[object]:
    images = coefficients()
    images[2, 3, 1, 0] = np.nan
    np.save(folder / "x.npy", images)
    return [folder / "x.npy"]


def empty_mask(folder: Path) -> list[object]:
    np.save(folder / "x.npy", coefficients())
    np.save(folder / "mask.npy", np.zeros((5, 4, 3)))
    return [folder / "x.npy", "--mask", folder / "mask.npy"]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (foreign_nifti, ["expected a NIfTI image", "12 bytes", "Copy or export it again"]),
        (truncated_cfl, ["expected 2880 bytes", "got 2780", "truncated"]),
        (missing_key, ["expected the key 'third'", "first, second", "Name another key"]),
        (no_key, ["needs the key", "first, second", "--key"]),
        (other_rank, ["expected 6 coefficients", "(5, 4, 3, 5)", "share one basis?"]),
        (magnitudes, ["expected complex", "got float32", "not their magnitude"]),
        (some_nan, ["must be finite", "got 1 other NaN", "(2, 3, 1, 0)", "Set those voxels"]),
        (empty_mask, ["mask", "must be nonzero somewhere", "got zeros"]),
    ],
)
def test_wrong_images_are_explained(
    finished: tuple[Path, Path], tmp_path: Path, write, expected: list[str]
) -> None:
    arguments = write(tmp_path)
    message = refused("map", *arguments, "--run", finished[1], "-o", tmp_path / "maps")
    for part in (*expected, str(tmp_path)):
        assert part in message
    assert not (tmp_path / "maps").exists()


def test_images_of_another_basis_need_force(
    finished: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    for suffix in (".nii.gz", ".json"):
        shutil.copy(images.with_name("coefficients" + suffix), tmp_path)
    files.write_json(tmp_path / "coefficients.json", {"BasisSHA256": "0" * 64})
    arguments = ("map", tmp_path / images.name, "--run", finished[1], "-o", tmp_path / "maps")
    message = refused(*arguments)
    own = json.loads((finished[1] / "network/card.json").read_text())["basis_sha256"]
    assert own[:12] in message and "0" * 12 in message and "--force" in message
    assert not (tmp_path / "maps").exists()
    assert "another basis; mapped all the same" in done(*arguments, "--force")
    sidecar = json.loads((tmp_path / "maps/T1.json").read_text())
    assert sidecar["Provenance"]["basis_of_images_sha256"] == "0" * 64


def test_the_basis_may_come_as_a_file(finished: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", coefficients())
    with h5py.File(finished[1] / "dataset.h5") as file:
        own = file["basis"][()]
    path = tmp_path / "basis.h5"
    with h5py.File(path, "w") as file:
        # As basis vectors, as the matrix that makes coefficients of signals, and another basis.
        file["U"], file["UH"], file["other"] = own, own.conj().T, own[:, ::-1]
    arguments = ("map", tmp_path / "x.npy", "--run", finished[1], "-o", tmp_path / "maps")
    assert "only the rank was checked" in done(*arguments)
    for key in ("U", "UH"):
        said = done(*arguments, "--basis", path, "--basis-key", key, "--overwrite")
        assert "was checked" not in said and "another basis" not in said
    shutil.rmtree(tmp_path / "maps")
    message = refused(*arguments, "--basis", path, "--basis-key", "other")
    assert "expected coefficients in the network's basis" in message
    message = refused(*arguments, "--basis", path, "--basis-key", "nothing")
    assert "expected the key 'nothing'" in message and "U, UH, other" in message
    assert not (tmp_path / "maps").exists()


def test_run_refuses_images_of_another_basis(
    finished: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    """In `run` nobody has said --force for the basis."""
    shutil.copy(images, tmp_path)
    files.write_json(tmp_path / "coefficients.json", {"BasisSHA256": "0" * 64})
    section = f'\n[map]\ncoefficients = "{images.name}"\n'
    experiment = write_experiment(tmp_path, TINY + section)
    message = refused("run", experiment, "-o", tmp_path / "run")
    assert "expected coefficients in the network's basis" in message
    assert not (tmp_path / "run/maps/summary.json").exists()


def test_no_nilearn_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = write_experiment(tmp_path, TINY.replace("epochs = 2", "epochs = 1") + BRAIN)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused("run", experiment, "-o", tmp_path / "run")
    assert "nilearn" in message and "pip install" in message


# Known maps.


def test_known_maps_from_the_experiment_to_the_report(
    finished: tuple[Path, Path], images: Path, tmp_path: Path
) -> None:
    """A network that is told B0 and B1, on the data set of one that is not, by commands alone."""
    run = tmp_path / "told"
    said = done("vary", finished[1], "-o", run, "--set", 'training.inputs=["B0","B1"]')
    assert f"next: fisherprint run {run / 'experiment.toml'} -o {run}" in said
    said = done("run", run / "experiment.toml", "-o", run)
    assert "known B0: median" in said and "known B1: median" in said
    assert "RMSE/√global" in said
    assert json.loads((run / "network/card.json").read_text())["inputs"] == ["B0", "B1"]
    # The brain's own maps by hand: the same values.
    known = [f"--known={name}={run}/brain/truth/{name}.nii.gz" for name in ("B1", "B0")]
    again = tmp_path / "maps"
    mask = ["--mask", run / "brain/mask.nii.gz"]
    done("map", run / "brain/coefficients.nii.gz", "--run", run, "-o", again, *known, *mask)
    for name in ("m0s", "T1", "T2f"):
        first, second = (
            np.asarray(nibabel.load(folder / f"{name}.nii.gz").dataobj)
            for folder in (run / "maps", again)
        )
        np.testing.assert_array_equal(first, second)
    page = (run / "report.html").read_text()
    assert "The network is told B0 and B1." in page
    # And what is wrong with them.
    elsewhere = tmp_path / "x"
    command = ["map", run / "brain/coefficients.nii.gz", "--run", run, "-o", elsewhere]
    assert "missing are B0, superfluous are (none)" in refused(*command, known[0])
    for wrong in ("B1", "B1=", "=b1.nii"):
        result = call(*command, "--known", wrong)
        assert result.code == 2 and "--known NAME=FILE" in result.err
    assert "once a name" in call(*command, known[0], known[0]).err
    percent = tmp_path / "percent.nii.gz"
    image = nibabel.load(run / "brain/truth/B1.nii.gz")
    nibabel.save(nibabel.Nifti1Image(100 * image.get_fdata(), image.affine), percent)
    message = refused(*command, known[1], f"--known=B1={percent}", *mask)
    assert "Is it in percent? 1 is the nominal value." in message
    assert not elsewhere.exists()
