"""The paper's figures and numbers from run folders, and trainings that share a data set."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
import sys
import tomllib
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from matplotlib.colors import to_hex

from fisherprint import cli, evaluate, files, report
from fisherprint import experiment as stages
from fisherprint.evaluate import Audit, AuditMap, Interval, Shares
from fisherprint.experiment import claims, reproduction
from fisherprint.parameters import Parameter
from fisherprint.report import Comparison
from fisherprint.sequence import PulseTrain

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
T1 = Parameter("T1", "$T_1$", "s", (0, 10))
T2F = Parameter("T2f", "$T_2^f$", "s", (0, 10), "ms", 1e3)
M0S = Parameter("m0s", "$m_0^s$", "", (0, 1))
POINTS = 6
RANK = 8
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
epochs = 3
batch_size = 64
learning_rate = 1e-3
warmup_steps = 4

[evaluation]
snr = [100, 10, 50]
n_noise = 20
fingerprints = 40
"""
FIGURES = (
    "figure-3-convergence",
    "figure-4-T1-T2f",
    "figure-4-T1-m0s",
    "figure-5-bias",
    "figure-6-std",
    "figure-7-shares-by-snr",
    "figure-8-shares-by-bound",
)


def silent(*_: object) -> None:
    pass


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `fisherprint ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fisherprint", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return leaving.value.code, out.getvalue(), err.getvalue()


def finish(run: stages.Run) -> Path:
    """Train and evaluate."""
    stages.train_run(run, resume=False, say=silent, progress=silent)
    stages.evaluate_run(run, say=silent, progress=silent)
    return run.folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, short_train: PulseTrain) -> dict[str, Path]:
    """Finished runs of both losses and three seeds on one data set, `crb-0` to `mse-2`."""
    folder = tmp_path_factory.mktemp("runs")
    short_train.write(folder / "train.toml")
    (folder / "tiny.toml").write_text(TINY)
    first = stages.start(stages.read(folder / "tiny.toml"), folder / "crb-0")
    stages.simulate_run(first, progress=silent)
    found = {"crb-0": finish(first)}
    for loss in ("crb", "mse"):
        for seed in range(3):
            name = f"{loss}-{seed}"
            if name not in found:
                changes = [f"training.loss={loss}", f"training.seed={seed}"]
                found[name] = finish(stages.vary(first, folder / name, changes))
    return found


def copied(runs: dict[str, Path], name: str, to: Path) -> Path:
    return shutil.copytree(runs[name], to)


# What is measured.


def test_the_grid_holds_every_pair_with_x_varying_fastest(short_train: PulseTrain) -> None:
    model = stages.model(stages.Experiment(), short_train)
    x, y = np.array([0.7, 1.1, 1.9]), np.array([0.04, 0.1])
    theta = reproduction.grid(model, ("T1", x), ("T2f", y))
    # The means of §2.4, design of the prior: docs/decisions/025.
    nominal = {"m0s": 0.12, "Rx": 44.0, "T2s": 12e-6, "B0": 0.0, "B1": 1.0}
    assert [tuple(row) for row in theta[:, [model.index("T1"), model.index("T2f")]]] == [
        (a, b) for b in y for a in x
    ]
    for name, value in nominal.items():
        assert (theta[:, model.index(name)] == value).all()


def audit_of(bias, variance, crb, snr=(50.0,), names=("m0s", "T2f"), n_noise=100) -> Audit:
    truth = np.zeros(np.shape(bias)[1:])
    return Audit(names, np.array(snr), truth, np.array(crb), np.array(bias), variance, n_noise)


@pytest.fixture
def audit_map() -> AuditMap:
    """3 x 2 points whose bias of T2f is 10 times the column plus the row, in ms."""
    rows, columns = np.divmod(np.arange(6), 3)
    T2f = 1e-3 * (10.0 * columns + rows)
    bias = np.stack([np.zeros(6), T2f], axis=1)[None]
    crb = np.stack([np.ones(6), (50 * 1e-3 * (1 + np.arange(6))) ** 2], axis=1)
    crb[5, 1] = np.inf
    return AuditMap(
        T1, T2F, np.array([0.7, 1.0, 1.3]), np.array([0.05, 0.1]),
        audit_of(bias, np.full((1, 6, 2), 4e-6), crb),
    )  # fmt: skip


def test_maps_over_a_grid_are_rows_of_y_and_columns_of_x(audit_map: AuditMap) -> None:
    # Exact but for the rounding of a product.
    np.testing.assert_allclose(audit_map.bias("T2f"), 1e-3 * np.array([[0, 10, 20], [1, 11, 21]]))
    np.testing.assert_allclose(audit_map.std("T2f"), 2e-3)
    np.testing.assert_allclose(audit_map.root("T2f"), 1e-3 * np.array([[1, 2, 3], [4, 5, np.inf]]))
    with pytest.raises(KeyError, match="unknown parameter 'T1'; known are m0s, T2f"):
        audit_map.bias("T1")
    with pytest.raises(ValueError, match=r"axes \(Q=1, Y·X=4, E=2\); got the shape \(1, 6, 2\)"):
        dataclasses.replace(audit_map, x_values=np.array([0.7, 1.0]))


def test_shares_cross_where_the_lines_of_the_figure_do() -> None:
    snr = np.array([100.0, 1.0, 10.0, 1000.0])
    # bias/variance = SNR²/1000 up to 100, then it falls to 0.1 at 1000.
    shares = Shares(np.array([10.0, 1e-3, 0.1, 0.1]), np.ones(4))
    # Log-linear pieces: 10·√10 on the first; on the second from 10 to 0.1, half way.
    np.testing.assert_allclose(evaluate.crossings(snr, shares), [10**1.5, 10**2.5])
    assert evaluate.crossings(snr, Shares(np.full(4, 0.2), np.ones(4))) == ()
    # A level without a share, or with one of zero, hides no crossing beside it.
    for gap in (np.nan, 0.0):
        parts = Shares(np.array([0.1, gap, 10.0]), np.ones(3))
        np.testing.assert_allclose(evaluate.crossings(np.array([1.0, 10.0, 100.0]), parts), [10.0])


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 5)
    found = evaluate.confidence_interval(values, level=0.9)
    expected = scipy.stats.t.interval(0.9, 4, values.mean(), scipy.stats.sem(values))
    # The same quantile by another routine.
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)
    np.testing.assert_allclose(found.mean, values.mean())
    assert found.n == 5
    with pytest.raises(ValueError, match="at least 2 values and a level between 0 and 1; got 1"):
        evaluate.confidence_interval([1.0])
    with pytest.raises(ValueError, match="repetitions must be finite"):
        evaluate.confidence_interval([1.0, np.nan])


def test_plain_squares_are_means_without_the_bound() -> None:
    rng = np.random.default_rng(1)
    bias, variance = rng.normal(size=(2, 30, 2)), rng.uniform(1, 2, (2, 30, 2))
    crb = rng.uniform(1, 9, (30, 2))
    crb[3, 1] = np.inf
    bias[1, 4, 0] = variance[1, 4, 0] = np.nan
    found = audit_of(bias, variance, crb, snr=(10, 50)).mean_squares()
    np.testing.assert_allclose(found.bias, [np.nanmean(part**2) for part in bias])
    np.testing.assert_allclose(found.variance, [np.nanmean(part) for part in variance])


@pytest.mark.paper("§3.1")
def test_rises_count_epochs_above_the_lowest_before() -> None:
    losses = [10.0, 8.0, 8.7, 8.9, 5.0, 5.4, 5.6, 4.0, 4.0]
    # 8.9 and 5.6 are more than a tenth above 8 and 5; 8.7 and 5.4 are not.
    assert claims.rises(losses) == 2 / 8
    assert claims.rises(losses, by=0.0) == 4 / 8
    assert claims.rises([3.0]) == 0


# The command.


@pytest.fixture(scope="module")
def written(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes for those runs."""
    out = tmp_path_factory.mktemp("reproduction")
    quick = [word for folder in runs.values() for word in ("--quick", folder)]
    with mock.patch.object(reproduction, "POINTS", POINTS):
        code, said, error = call(
            *("reproduce", "--crb", runs["crb-0"], "--mse", runs["mse-0"], *quick),
            *("--noise", 50, "-o", out),
        )
    assert code == 0, error
    assert all(f"{out / name}.png" in said for name in FIGURES)
    return out


def test_one_command_writes_figures_table_and_numbers(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {*(f"{name}.png" for name in FIGURES), "table.md", "numbers.json"}
    for name in FIGURES:
        pixels = matplotlib.image.imread(written / f"{name}.png")
        assert pixels.shape[1] > 800 and pixels.std() > 0.02  # neither small nor empty
        assert (written / f"{name}.png").stat().st_size < 300_000


def test_numbers_are_those_of_the_audit(written: Path, runs: dict[str, Path]) -> None:
    found = json.loads((written / "numbers.json").read_text("utf-8"))
    for loss in ("crb", "mse"):
        audit, score = files.read_audit(runs[f"{loss}-0"] / "evaluation.h5")
        numbers = found["full"][loss]
        assert numbers["loss"] == score.loss
        levels = {100: 0, 10: 1, 50: 2}
        assert list(numbers["bias_share"]) == ["10", "50", "100"]
        for snr, q in levels.items():
            share = audit.bias[q] ** 2 * snr**2 / audit.crb
            spread = audit.variance[q] * snr**2 / audit.crb
            # Sums in another order.
            np.testing.assert_allclose(numbers["bias_share"][str(snr)], share.mean())
            np.testing.assert_allclose(numbers["variance_share"][str(snr)], spread.mean())
            both = [share, spread] if loss == "crb" else [audit.bias[q] ** 2, audit.variance[q]]
            part = both[0].mean() / (both[0].mean() + both[1].mean())
            np.testing.assert_allclose(numbers["bias_part"][str(snr)], part)
        for e, name in enumerate(("m0s", "T1", "T2f")):
            ratio = np.sqrt(audit.variance[2, :, e] / audit.crb[:, e]) * 50
            for field, values in (
                ("median_bias_by_parameter", np.abs(audit.bias[2, :, e])),
                ("median_std_ratio_by_parameter", ratio),
                ("std_deviation_by_parameter", np.abs(ratio - 1)),
            ):
                np.testing.assert_allclose(numbers[field][name], np.median(values))
        log = files.read_jsonl(runs[f"{loss}-0"] / "network" / "log.jsonl")
        assert numbers["validation_loss"] == log[-1]["validation_losses"][loss]
    # No folder of this machine.
    assert str(runs["crb-0"].parent) not in (written / "numbers.json").read_text("utf-8")


def test_the_quick_setting_has_an_interval_over_its_seeds(
    written: Path, runs: dict[str, Path]
) -> None:
    found = json.loads((written / "numbers.json").read_text("utf-8"))
    assert list(found["quick"]) == ["0", "1", "2"]
    # Seed 0 is the full-scale pair itself, and the noise is the same for all.
    assert found["quick"]["0"]["mse"] == found["full"]["mse"]
    losses = [files.read_audit(runs[f"crb-{seed}"] / "evaluation.h5")[1].loss for seed in range(3)]
    row = found["comparison"][0]
    low, high = scipy.stats.t.interval(0.95, 2, np.mean(losses), scipy.stats.sem(losses))
    expected = {"mean": np.mean(losses), "low": low, "high": high, "n": 3}
    # The same quantile by another routine.
    assert row["quick"] == pytest.approx(expected, rel=1e-9)
    assert row["ours"] == losses[0]
    assert row["agrees"] is (losses[0] <= 1)
    table = (written / "table.md").read_text("utf-8")
    assert "mean [95 % interval] of 3 seeds" in table
    assert len(table.splitlines()) == 2 + len(found["comparison"])


@pytest.mark.paper("§2.7")
def test_planes_of_a_known_estimator_have_its_bias_and_its_spread(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    """θ̂ = 0.08 s + 3 ms · normal deviates, of T2f; bound and means by plain numpy."""
    draws = np.random.default_rng(2)

    def known(_: object):
        return lambda c: 0.08 + 3e-3 * draws.standard_normal((*c.shape[:-1], 3))

    N = 400
    with (
        mock.patch.object(reproduction, "POINTS", POINTS),
        mock.patch.object(reproduction, "as_estimator", known),
    ):
        stages.reproduce(
            runs["crb-0"], runs["mse-0"], tmp_path, n_noise=N, say=silent, progress=silent
        )
    found = json.loads((tmp_path / "numbers.json").read_text("utf-8"))["full"]["crb"]

    data, _, model = stages.read_data(stages.open_run(runs["crb-0"]))
    theta = np.array(
        [
            [0.12, T1_, T2f, 44.0, 12e-6, 0.0, 1.0]
            for T2f in np.linspace(0.03, 0.15, POINTS)
            for T1_ in np.linspace(0.64, 2.0, POINTS)
        ]
    )
    out = model.simulate(theta)
    U = data.basis.vectors.conj()
    s, J = out.signal @ U, np.einsum("stp,tk->skp", out.jacobian, U)
    G = np.concatenate([J, s[..., None], 1j * s[..., None]], axis=2)
    F = np.einsum("sta,stb->sab", G.conj(), G).real
    d = np.sqrt(np.einsum("saa->sa", F))
    crb = (np.linalg.inv(F / (d[:, :, None] * d[:, None, :]))[:, 2, 2] / d[:, 2] ** 2) / 50**2
    bias = 0.08 - theta[:, 2]
    # The mean of N draws has a standard error of 3 ms/√N at each point, some of it far less than
    # the bias there; five of them for the mean of all.
    error = 3e-3 / np.sqrt(N)
    assert abs(found["plane_bias"] - np.abs(bias).mean()) < 5 * error / POINTS
    # The share has 2·bias·error/CRB at each point, and the offset variance/N.
    share = bias**2 / crb
    scatter = np.sqrt(((2 * bias * error / crb) ** 2).sum()) / POINTS**2
    offset = (error**2 / crb).mean()
    assert abs(found["plane_bias_share"] - share.mean() - offset) < 5 * scatter
    # A variance of N draws has relative standard error √(2/N); at 36 points, weighted by 1/CRB.
    weights = 1 / crb / (1 / crb).sum()
    relative = np.sqrt(2 / N * (weights**2).sum())
    assert abs(found["plane_variance_share"] / (9e-6 / crb).mean() - 1) < 5 * relative + 1 / N
    expected = np.abs(3e-3 / np.sqrt(crb) - 1).mean()
    # A standard deviation of N draws has relative standard error √(1/2N) at each point.
    scatter = (3e-3 / np.sqrt(crb)).max() * np.sqrt(1 / (2 * N))
    assert abs(found["plane_std_deviation"] - expected) < scatter
    assert found["plane_noise"] == pytest.approx(
        error * np.sqrt(2 / np.pi), rel=5 * np.sqrt(1 / (2 * N)) / POINTS + 1 / N
    )


# Wrong input.


@pytest.mark.parametrize(
    ("crb", "mse", "message"),
    [
        ("mse-0", "crb-0", "expected a network of the crb loss in .*mse-0; it is of the mse loss"),
        ("crb-0", "crb-1", "expected a network of the mse loss in .*crb-1; it is of the crb loss"),
        ("none", "mse-0", "expected a run folder with an experiment.toml; .*none has none"),
        ("crb-0", "mse-1", "differ in loss alone; .*crb-0 and .*mse-1 differ in seed"),
    ],
)
def test_other_runs_are_refused(
    crb: str, mse: str, message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    folders = runs | {"none": tmp_path / "none"}
    with pytest.raises(stages.ExperimentError, match=message):
        stages.reproduce(folders[crb], folders[mse], tmp_path / "out", say=silent, progress=silent)
    assert not (tmp_path / "out").exists()


def test_unfinished_runs_are_refused_on_the_command_line(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    bare = copied(runs, "mse-0", tmp_path / "bare")
    (bare / "evaluation.h5").unlink()
    arguments = ("reproduce", "--crb", runs["crb-0"], "--mse", bare, "-o", tmp_path / "out")
    code, _, error = call(*arguments)
    assert code == 2
    assert f"has no audit yet. Evaluate it: fisherprint evaluate {bare}" in error
    (bare / "network" / "card.json").unlink()
    code, _, error = call(*arguments)
    assert code == 2
    assert "expected a trained network" in error


def test_a_run_of_another_data_set_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = copied(runs, "mse-0", tmp_path / "other")
    card = json.loads((other / "network" / "card.json").read_text())
    (other / "network" / "card.json").write_text(json.dumps(card | {"dataset_sha256": "0" * 64}))
    with pytest.raises(stages.ExperimentError, match="networks of one data set"):
        stages.reproduce(runs["crb-0"], other, tmp_path / "out", say=silent, progress=silent)


def test_audits_must_be_of_the_same_fingerprints_and_have_the_papers_snr(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    def again(**change: object) -> Path:
        run = stages.open_run(copied(runs, "mse-0", tmp_path / "-".join(map(str, change))))
        section = run.experiment.evaluation.model_copy(update=change)
        run = stages.Run(run.folder, run.experiment.model_copy(update={"evaluation": section}))
        stages.evaluate_run(run, say=silent, progress=silent)
        return run.folder

    with pytest.raises(stages.ExperimentError, match="audits of the same fingerprints and SNRmax"):
        stages.reproduce(
            runs["crb-0"], again(fingerprints=30), tmp_path / "out", say=silent, progress=silent
        )
    with pytest.raises(ValueError, match="expected an SNRmax of the audit: 50; got 100"):
        stages.reproduce(
            runs["crb-0"], again(snr=(50.0,)), tmp_path / "out", say=silent, progress=silent
        )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("crb-0", "mse-0", "crb-1", "mse-1"), "at least 3 seeds; got 2 seeds. Train more"),
        (
            ("crb-0", "mse-0", "crb-1", "mse-1", "crb-2"),
            "got 3 seeds, of which 2 with one loss alone",
        ),
        (("crb-0", "mse-0", "crb-0"), "got two of seed 0 and the crb loss"),
    ],
)
def test_seeds_must_be_enough_and_complete(
    names: tuple[str, ...], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(stages.ExperimentError, match=message):
        stages.reproduce(
            runs["crb-0"],
            runs["mse-0"],
            tmp_path / "out",
            quick=[runs[name] for name in names],
            say=silent,
            progress=silent,
        )


# Figures and the table.


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.fixture
def audits() -> dict[str, Audit]:
    """Two networks with biases of 0.3 and 0.6 √CRB and variances of 0.8 and 0.5 CRB."""
    rng = np.random.default_rng(0)
    crb = rng.uniform(1, 9, (400, 2))
    snr = np.array([50.0, 10.0])
    scaled = crb / snr[:, None, None] ** 2
    signs = rng.choice([-1, 1], scaled.shape)
    return {
        label: audit_of(part * np.sqrt(scaled) * signs, share * scaled, crb, snr=snr)
        for label, part, share in (("one", 0.3, 0.8), ("two", 0.6, 0.5))
    }


@pytest.mark.paper("Fig. 3")
def test_convergences_stand_side_by_side_with_their_own_losses() -> None:
    logs = {
        loss: [
            {"number": n, "train_loss": a / n, "validation_loss": b / n, "learning_rate": 0.01 / n}
            for n in (1, 2, 3)
        ]
        for loss, a, b in (("crb", 9.0, 10.0), ("mse", 0.3, 0.4))
    }
    crb, mse, *_ = report.convergences(logs).axes
    assert lines(crb)["validation"].tolist() == [[1, 10], [2, 5], [3, 10 / 3]]
    assert lines(mse)["training"].tolist() == [[1, 0.3], [2, 0.15], [3, 0.3 / 3]]
    assert "efficient and unbiased" in lines(crb) and "efficient and unbiased" not in lines(mse)
    assert ("crb" in crb.get_title(), "mse" in mse.get_title()) == (True, True)


@pytest.mark.paper("Fig. 4")
def test_maps_of_bias_and_spread_share_their_scales_and_mark_the_prior(
    audit_map: AuditMap,
) -> None:
    audit = audit_map.audit
    twice = dataclasses.replace(
        audit_map,
        audit=dataclasses.replace(audit, bias=2 * audit.bias, variance=4 * audit.variance),
    )
    figure = report.audit_maps({"A": audit_map, "B": twice}, T2F, marked=(1.0, 0.1))
    shown = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    images = {title: axes.collections[0] for title, axes in shown.items()}
    bound = r"$\sqrt{\mathrm{CRB}}$"
    assert list(images) == ["bias, A", "bias, B", "std, A", "std, B", bound]
    for title, factor in (("bias, A", 1), ("bias, B", 2)):
        values = images[title].get_array().reshape(2, 3)
        np.testing.assert_allclose(values, factor * np.array([[0, 10, 20], [1, 11, 21]]))  # ms
    np.testing.assert_allclose(images["std, B"].get_array(), 4)
    np.testing.assert_allclose(images[bound].get_array().compressed(), [1, 2, 3, 4, 5])
    limits = {title: image.get_clim() for title, image in images.items()}
    assert limits["bias, A"] == limits["bias, B"]
    assert limits["bias, A"][0] == -limits["bias, A"][1]
    assert limits["std, A"] == limits["std, B"] == limits[bound]
    # 2 % of the far end may be beyond: of 12 values up to 42 ms the two highest are near.
    assert 40 <= limits["bias, A"][1] <= 42
    for axes in shown.values():
        assert axes.get_lines()[0].get_xydata().tolist() == [[1.0, 100.0]]
        assert "ms" not in axes.get_xlabel()
        assert "$T_1$" in axes.get_xlabel()
    every = [inner for axes in figure.axes for inner in (*axes.child_axes, axes)]
    labels = {axes.get_ylabel() for axes in every}
    assert {"bias of $T_2^f$ (ms)", "standard deviation of $T_2^f$ (ms)"} < labels


def test_maps_of_different_grids_are_refused(audit_map: AuditMap) -> None:
    other = dataclasses.replace(audit_map, x_values=audit_map.x_values + 0.1)
    with pytest.raises(
        ValueError, match="maps of one grid, SNRmax and bound; that of 'B' differs"
    ):
        report.audit_maps({"A": audit_map, "B": other}, T2F)


@pytest.mark.paper("Fig. 5", "Fig. 6")
def test_histograms_of_both_networks_share_their_bins(audits: dict[str, Audit]) -> None:
    for draw, of, ideal in (
        (report.bias_of_networks, lambda audit: 1e3 * audit.bias[0, :, 1], 0),
        (report.std_of_networks, lambda audit: audit.std_ratio[0, :, 1], 1),
    ):
        _, axes = draw(audits, [M0S, T2F], snr=50).axes
        steps = {patch.get_label(): patch.get_data() for patch in axes.patches}
        assert list(steps) == ["one", "two"]
        for label, audit in audits.items():
            counts, _ = np.histogram(of(audit), steps["one"].edges)
            assert steps[label].values.tolist() == counts.tolist()
        assert (steps["one"].edges == steps["two"].edges).all()
        assert steps["one"].edges[0] <= ideal <= steps["one"].edges[-1]
        colours = [to_hex(patch.get_edgecolor()) for patch in axes.patches]
        assert len(set(colours)) == 2
        with pytest.raises(ValueError, match="at most 3 networks in a figure; got one, two, 3, 4"):
            draw(audits | {"3": audits["one"], "4": audits["one"]}, [M0S], snr=50)
    assert "0.894" in axes.get_title()  # √0.8


@pytest.mark.paper("Fig. 7")
def test_shares_against_snr_are_in_units_of_the_bound_and_without_it(
    audits: dict[str, Audit],
) -> None:
    above_one, above_two, below_one, _ = report.shares_of_networks(audits).axes
    for axes, bias, variance in ((above_one, 0.09, 0.8), (above_two, 0.36, 0.5)):
        drawn = lines(axes)
        # Exact but for rounding.
        np.testing.assert_allclose(drawn["bias"], [[10, bias], [50, bias]])
        np.testing.assert_allclose(drawn["sum"], [[10, bias + variance], [50, bias + variance]])
    crb = audits["one"].crb.mean()
    np.testing.assert_allclose(
        lines(below_one)["variance"], [[10, 0.8 * crb / 100], [50, 0.8 * crb / 2500]]
    )


@pytest.mark.paper("Fig. 8")
def test_shares_against_the_bound_compare_networks_bin_by_bin(audits: dict[str, Audit]) -> None:
    bias, _, variance, _ = report.bound_shares_of_networks(audits, [M0S, T2F], snr=50).axes
    for axes, shares in ((bias, (0.09, 0.36)), (variance, (0.8, 0.5))):
        for label, share in zip(("one", "two"), shares, strict=True):
            drawn = lines(axes)[label]
            assert len(drawn) == 12
            np.testing.assert_allclose(drawn[:, 1], share)
    order = np.sort(np.sqrt(audits["one"].crb[:, 0]) / 50)
    medians = [np.median(part) for part in np.array_split(order, 12)]
    np.testing.assert_allclose(lines(bias)["one"][:, 0], medians)


def test_the_table_says_what_is_asked_and_whether_it_is_met() -> None:
    inf = np.inf
    rows = [
        Comparison("mean |bias|", "§3.2", "5.23 ms", "ms", (-inf, 5.2), 5.3, None),
        Comparison("loss", "§3.1", "≈ 1", "", (-inf, 1.0), 0.5, Interval(0.7, 0.6, 0.8, 3)),
        Comparison("crossing", "§3.2", "", "", (100.0, inf), None, None),
        Comparison("other", "", "", "", (-inf, inf), 2.0, None),
    ]
    assert [row.agrees for row in rows] == [False, True, False, None]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.comparison_table(rows).splitlines()
    ]
    assert len({len(row) for row in cells}) == 1
    assert cells[2] == [
        *("1", "mean &#124;bias&#124;", "§3.2", "5.23 ms", "≤ 5.2 ms", "5.30 ms", "**no**", "–")
    ]
    assert cells[3][4:] == ["≤ 1", "0.500", "yes", "0.700 [0.600, 0.800]"]
    assert cells[4][3:] == ["–", "≥ 100", "–", "**no**", "–"]
    assert cells[5][4:] == ["–", "2.00", "–", "–"]


# Trainings that share a data set.


def test_a_varied_run_shares_the_data_set_and_trains_at_once(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    new = tmp_path / "new"
    code, said, error = call(
        *("vary", runs["crb-0"], "-o", new, "--set", "training.loss = relative"),
        *("--set", 'training.estimated=["T2f", "B1"]', "--set", "evaluation.snr=[20]"),
    )
    assert code == 0, error
    assert f"fisherprint run {new / 'experiment.toml'} -o {new}" in said
    before, after = (
        tomllib.loads((f / "experiment.toml").read_text()) for f in (runs["crb-0"], new)
    )
    assert after["training"] == before["training"] | {
        "loss": "relative",
        "estimated": ["T2f", "B1"],
    }
    assert after["evaluation"] == before["evaluation"] | {"snr": [20.0]}
    assert {k: v for k, v in after.items() if k not in ("training", "evaluation")} == {
        k: v for k, v in before.items() if k not in ("training", "evaluation")
    }
    assert (new / "dataset.h5").read_bytes() == (runs["crb-0"] / "dataset.h5").read_bytes()
    # The next command finds the stage done, and trains on.
    assert stages.start(stages.read(new / "experiment.toml"), new).experiment.title
    finish(stages.open_run(new))
    assert files.read_audit(new / "evaluation.h5")[0].names == ("T2f", "B1")


def test_a_start_is_found_from_the_working_directory_and_can_be_taken_away(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stages.open_run(runs["crb-0"])
    monkeypatch.chdir(runs["crb-0"].parent)
    changes = ["training.start=crb-0", "training.loss=bias-reduced", "training.realizations=4"]
    second = stages.vary(run, tmp_path / "second", [*changes, "training.batch_size=32"])
    assert second.experiment.training.start == runs["crb-0"]
    # As another process reads it, wherever it works.
    monkeypatch.chdir(tmp_path)
    assert stages.open_run(second.folder).experiment == second.experiment
    with pytest.raises(stages.ExperimentError, match="Drop it, or change the loss"):
        stages.vary(second, tmp_path / "third", ["training.loss=crb"])
    unset = ["training.loss=crb", "training.realizations=", "training.start="]
    third = stages.vary(second, tmp_path / "third", unset).experiment.training
    assert (third.start, third.loss) == (None, "crb")


def test_without_links_the_data_set_is_copied(runs: dict[str, Path], tmp_path: Path) -> None:
    with mock.patch("os.link", side_effect=OSError("no links here")):
        run = stages.vary(stages.open_run(runs["crb-0"]), tmp_path / "new", ["title=Other"])
    assert run.dataset.read_bytes() == (runs["crb-0"] / "dataset.h5").read_bytes()
    assert run.dataset.stat().st_nlink == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.loss=crb"], "expected a change of the experiment; got none"),
        (["training.los=mse"], r"training\.los: .*unknown name"),
        (["training.loss=huber"], r"training\.loss: "),
        (["simulation.seed=7"], r"leave the data set as it is; got one of \[simulation\]"),
        (["model.saturation=graham"], r"got one of \[model\]"),
        (["prior.B1={mean=1.0, std=0.1}"], r"got one of \[prior\]"),
        (["training.loss"], "expected changes as TABLE.KEY=VALUE; got 'training.loss'"),
        (["title.x=1"], "'title' of 'title.x=1' is no table"),
        (["training.start="], "by 'training.start='; training.start is not set"),
        (["training.start=nowhere"], "expected a trained network to start from in .*nowhere"),
    ],
)
def test_changes_that_make_no_sense_are_refused(
    changes: list[str], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(stages.ExperimentError, match=message):
        stages.vary(stages.open_run(runs["crb-0"]), tmp_path / "new", changes)
    assert not (tmp_path / "new").exists()


def test_runs_are_not_varied_over_others_or_without_data(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = stages.open_run(runs["crb-0"])
    with pytest.raises(files.OutputExistsError, match=r"mse-0 holds a run\. Choose another name"):
        stages.vary(run, runs["mse-0"], ["training.seed=9"])
    empty = stages.start(run.experiment, tmp_path / "empty")
    with pytest.raises(stages.ExperimentError, match="expected a data set"):
        stages.vary(empty, tmp_path / "new", ["training.seed=9"])


# The experiments.


@pytest.mark.paper("§2.4", "§2.6")
def test_the_papers_experiment_has_its_numbers_and_the_variants_differ_where_they_say() -> None:
    paper, fields, bundled, quick = (
        stages.read(EXPERIMENTS / f"{name}.toml").model_dump(exclude={"title"})
        for name in ("paper", "paper-fields", "paper-bundled", "paper-quick")
    )
    simulation, training = paper["simulation"], paper["training"]
    sizes = [simulation[split] for split in ("training", "validation", "test")]
    assert (sizes, simulation["rank"]) == ([92160, 10240, 9056], 13)
    assert paper["sequence"]["repetition_time"] == 3.5e-3
    expected = {"epochs": 400, "batch_size": 512, "learning_rate": 0.01, "halve_every": 40}
    expected |= {"scale_range": (0.1, 1.0), "noise_std": 0.01, "loss": "crb"}
    assert {name: training[name] for name in expected} == expected
    assert paper["evaluation"]["n_noise"] == 300
    assert (min(paper["evaluation"]["snr"]), max(paper["evaluation"]["snr"])) == (2, 500)

    assert fields["training"].pop("estimated") == (*training["estimated"], "B0", "B1")
    # A tenth of the rate (docs/decisions/025-reproduction.md).
    for name in ("learning_rate", "learning_rate_floor"):
        assert fields["training"].pop(name) == pytest.approx(training[name] / 10, rel=1e-12)
    own = {"estimated", "learning_rate", "learning_rate_floor"}
    B0 = fields["prior"].pop("B0")
    assert (B0["low"], B0["high"]) == pytest.approx(0.8 * np.pi / 3.5e-3 * np.array([-1, 1]), 1e-3)
    assert fields == paper | {"training": {k: v for k, v in training.items() if k not in own}}
    assert bundled["sequence"]["path"] is None
    same = set(paper) - {"sequence", "data"}
    assert {k: bundled[k] for k in same} == {k: paper[k] for k in same}

    assert quick["simulation"]["training"] == simulation["training"] // 10
    assert quick["simulation"]["validation"] == simulation["validation"] // 10
    for name in ("epochs", "halve_every", "batch_size"):
        assert quick["training"][name] == training[name] // 10
    assert quick["training"]["learning_rate"] == training["learning_rate"] / 10
    same = (
        set(training)
        - {"epochs", "halve_every", "batch_size"}
        # Its steps are too few for a mean of a thousand.
        - {*("learning_rate", "learning_rate_floor"), "average_steps"}
    )
    assert {k: quick["training"][k] for k in same} == {k: training[k] for k in same}
