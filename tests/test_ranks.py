"""Several processes that train one network: as one process does, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fisherprint import cli, files
from fisherprint.experiment import Run, open_run, simulate_run, start, train_run
from fisherprint.experiment import read as read_experiment
from fisherprint.sequence import PulseTrain
from fisherprint.train import (
    ALONE,
    LossName,
    Ranks,
    Samples,
    TrainingConfig,
    bias_reduced_loss,
    crb_loss,
    mse_loss,
    together,
    train,
)
from fisherprint.train.losses import terms

# Batches of 33 are unequal shares of two, the last one (80 = 2·33 + 14) is smaller.
BASE: dict[str, Any] = {
    **{"epochs": 2, "batch_size": 33, "halve_every": 1, "warmup_steps": 6},
    **{"learning_rate": 1e-3, "learning_rate_floor": 1e-5},
}
CASES: dict[str, dict[str, Any]] = {
    "crb": {},
    "mse": {"loss": "mse"},
    "bias-reduced": {"loss": "bias-reduced", "realizations": 3, "batch_size": 99},
}
WORKER = """\
import json, sys
import numpy as np
from fisherprint.train import Samples, TrainingConfig, together, train

folder, case = sys.argv[1:]
held = np.load(f"{folder}/samples.npz")
training, validation = (
    Samples(("R", "w"), *(held[f"{split}_{name}"] for name in ("coefficients", "theta", "crb")))
    for split in ("training", "validation")
)
with together() as ranks:
    if case == "failing" and ranks.rank == 1:
        raise ValueError("expected better; got worse. Try again.")
    for name, content in json.load(open(f"{folder}/configs.json")).items():
        if case == "unlike" and ranks.rank == 1:
            content["seed"] = 5
        config = TrainingConfig.model_validate(content)
        *_, = epochs = list(train(training, validation, config, ranks=ranks))
        record = [
            {"train": e.train_loss, **e.validation_losses, "steps": e.steps} for e, _ in epochs
        ]
        weights = {key: w.tolist() for key, w in epochs[-1][1].weights.items() if w.ndim == 1}
        with open(f"{folder}/{name}-{ranks.rank}-of-{ranks.size}.json", "w") as file:
            json.dump([record, weights], file)
"""


def decay(size: int, *, seed: int) -> Samples:
    """Exponential decays of a rate and a frequency; a third of the bounds is infinite."""
    rng = np.random.default_rng(seed)
    theta = np.column_stack([rng.uniform(0.2, 2, size), rng.uniform(-0.5, 0.5, size)])
    s = np.exp((-theta[:, :1] + 1j * theta[:, 1:]) * np.linspace(0, 1.5, 8))
    crb = 10 ** rng.uniform(-1, 1, theta.shape)
    crb[rng.random(theta.shape) < 1 / 3] = np.inf
    return Samples(("R", "w"), s, theta, crb)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes of one thread on this machine, which talk by its loopback alone."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *map(str, arguments)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def write_worker(folder: Path, cases: dict[str, dict[str, Any]]) -> Path:
    """The script of a worker, with what it trains on."""
    held = {
        f"{split}_{name}": getattr(samples, name)
        for split, samples in (("training", decay(80, seed=0)), ("validation", decay(21, seed=1)))
        for name in ("coefficients", "theta", "crb")
    }
    np.savez(folder / "samples.npz", **held)
    configs = {name: BASE | {"estimated": ["R", "w"]} | case for name, case in cases.items()}
    (folder / "configs.json").write_text(json.dumps(configs))
    (folder / "worker.py").write_text(WORKER)
    return folder / "worker.py"


# Shares.


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_are_shared_without_gap_or_overlap(size: int) -> None:
    for n in (5, 48, 10, 1023):
        shares = [range(n)[Ranks(rank, size).rows(n)] for rank in range(size)]
        assert [row for share in shares for row in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_torchrun_a_process_is_alone_on_the_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for available, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        with together() as ranks:
            assert (ranks.rank, ranks.size, ranks.device.type) == (0, 1, device)


def test_what_cannot_be_shared_is_refused() -> None:
    three = Ranks(1, 3)
    config = TrainingConfig(estimated=("R",), batch_size=48)
    three.require_shares(99, config)
    with pytest.raises(ValueError, match=r"each of 3 processes.*98 fingerprints .* last of 2\."):
        three.require_shares(98, config)
    batch = config.model_copy(update={"normalization": "batch"})
    with pytest.raises(ValueError, match="group normalization in 3 processes; got batch"):
        three.require_shares(99, batch)
    ALONE.require_shares(98, batch)


@pytest.mark.parametrize("name", ["crb", "mse", "bias-reduced"])
def test_shares_weighed_by_their_terms_make_the_loss_of_the_batch(name: LossName) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = decay(7, seed=2)
    truth, crb = torch.tensor(samples.theta), torch.tensor(samples.crb)
    noise = torch.randn((7, 3, 2), generator=generator, dtype=torch.float64)
    estimate = truth[:, None] + noise

    def loss(rows: slice) -> float:
        if name == "bias-reduced":
            return float(bias_reduced_loss(estimate[rows], truth[rows], crb[rows]))
        pair = estimate[rows, 0], truth[rows]
        return float(crb_loss(*pair, crb[rows]) if name == "crb" else mse_loss(*pair))

    shares = [Ranks(rank, 3).rows(7) for rank in range(3)]
    weights = [float(terms(name, crb[rows]) / terms(name, crb)) for rows in shares]
    whole = sum(w * loss(rows) for w, rows in zip(weights, shares, strict=True))
    # Ratios of counts are in single precision.
    assert whole == pytest.approx(loss(slice(None)), rel=1e-6)
    # Shares of unequal size, and with unequal numbers of finite bounds, must not count the same.
    assert abs(np.mean([loss(rows) for rows in shares]) / whole - 1) > 0.01


# The steps.


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("pair")
    found = torchrun(write_worker(folder, CASES), folder, "")
    assert found.returncode == 0, found.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(pair: Path, case: str) -> None:
    check_alike(pair, case, CASES[case])


@pytest.mark.slow
# torch's compiler uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_steps_are_shared_as_well(tmp_path: Path) -> None:
    change = {"compiled": True}
    found = torchrun(write_worker(tmp_path, {"compiled": change}), tmp_path, "")
    assert found.returncode == 0, found.stderr
    check_alike(tmp_path, "compiled", change)


def check_alike(folder: Path, case: str, change: dict[str, Any]) -> None:
    """What two processes wrote is what one does."""
    config = TrainingConfig.model_validate(BASE | {"estimated": ("R", "w")} | change)
    alone = list(train(decay(80, seed=0), decay(21, seed=1), config))
    first, second = (
        json.loads((folder / f"{case}-{rank}-of-2.json").read_text()) for rank in (0, 1)
    )
    # Both have the same mean of slopes, hence the same weights, bit for bit.
    assert first == second
    record, weights = first
    for (epoch, _), found in zip(alone, record, strict=True):
        expected = {"train": epoch.train_loss, **epoch.validation_losses, "steps": epoch.steps}
        # Sums of single precision in another order, 1e-7, times what six steps make of it: Adam
        # divides by the root of the second moment, so that where a slope is hardly more than
        # rounding, a weight may move by a learning rate the other way.
        assert found == pytest.approx(expected, rel=2e-4)
    for name, weight in alone[-1][1].weights.items():
        if weight.ndim == 1:
            difference = np.abs(np.subtract(weights[name], weight.numpy()))
            assert np.median(difference) < 1e-6, name
            assert difference.max() <= 6 * 2 * config.learning_rate, name


def test_a_process_that_fails_ends_all(tmp_path: Path) -> None:
    found = torchrun(write_worker(tmp_path, CASES), tmp_path, "failing")
    assert found.returncode != 0
    assert "ValueError: expected better; got worse. Try again." in found.stderr
    assert not list(tmp_path.glob("*-of-2.json"))


def test_processes_that_begin_differently_are_refused(tmp_path: Path) -> None:
    found = torchrun(write_worker(tmp_path, {"crb": {}}), tmp_path, "unlike")
    assert found.returncode != 0
    assert (
        "expected all 2 processes to begin with the same; got by process: config" in found.stderr
    )
    assert not list(tmp_path.glob("*-of-2.json"))


# The command.

TINY = """\
[sequence]
path = "train.toml"

[simulation]
training = 250
validation = 64
test = 64
rank = 6

[training]
epochs = 2
batch_size = 63
learning_rate = 1e-3
warmup_steps = 4
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a data set."""
    folder = tmp_path_factory.mktemp("simulated")
    i = np.arange(1, 40)
    angle = np.r_[np.pi, 0.1 + np.sin(np.pi * i / 40) ** 2]
    PulseTrain(angle, np.r_[500e-6, 1e-6 * (150 + 8 * i)], 3.5e-3).write(folder / "train.toml")
    (folder / "tiny.toml").write_text(TINY)
    run = start(read_experiment(folder / "tiny.toml"), folder / "run")
    simulate_run(run, progress=lambda *_: None)
    return run.folder


def copied(simulated: Path, folder: Path, epochs: int) -> Run:
    """The data set in another run folder, to be trained for so many epochs."""
    folder.mkdir(exist_ok=True)
    if not (folder / "dataset.h5").exists():
        (folder / "dataset.h5").hardlink_to(simulated / "dataset.h5")
    text = (simulated / "experiment.toml").read_text()
    (folder / "experiment.toml").write_text(text.replace("epochs = 2", f"epochs = {epochs}"))
    return open_run(folder)


def test_the_command_trains_and_resumes_in_two_processes(simulated: Path, tmp_path: Path) -> None:
    alone = copied(simulated, tmp_path / "alone", 3)
    train_run(alone, resume=False, say=lambda _: None, progress=lambda *_: None)

    both = copied(simulated, tmp_path / "both", 2)
    found = torchrun("-m", "fisherprint.cli", "train", both.folder)
    assert found.returncode == 0, found.stderr
    # One of them speaks and writes.
    assert found.stdout.count("network: ") == found.stdout.count("epoch 2: ") == 1
    copied(simulated, both.folder, 3)
    found = torchrun("-m", "fisherprint.cli", "train", both.folder, "--resume")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("resuming after epoch 2 of 3") == 1

    names = [sorted(path.name for path in run.network.iterdir()) for run in (alone, both)]
    assert names[0] == names[1]
    expected, log = (files.read_jsonl(run.log) for run in (alone, both))
    assert [record["number"] for record in log] == [1, 2, 3]
    for own, other in zip(expected, log, strict=True):
        # As in the steps above.
        assert other["train_loss"] == pytest.approx(own["train_loss"], rel=2e-4)
        assert other["validation_losses"] == pytest.approx(own["validation_losses"], rel=2e-4)
    for one, two in zip(
        files.read_checkpoint(alone.checkpoint)[0].items(),
        files.read_checkpoint(both.checkpoint)[0].items(),
        strict=True,
    ):
        assert (one[0], one[1].shape, one[1].dtype) == (two[0], two[1].shape, two[1].dtype)

    # One process goes on where two were, and without --resume all refuse.
    copied(simulated, both.folder, 4)
    train_run(open_run(both.folder), resume=True, say=lambda _: None, progress=lambda *_: None)
    found = torchrun("-m", "fisherprint.cli", "train", both.folder)
    assert found.returncode != 0
    assert "already holds trained epochs" in found.stderr


def test_torchrun_is_for_train_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(sys, "argv", ["fisherprint", "demo"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert "torchrun is for train alone; got demo" in capsys.readouterr().err
