"""DESIGN.toml, the search beside its train, and the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fisherprint as fp
from fisherprint import design, files
from fisherprint import experiment as stages
from fisherprint.experiment import Design, designing
from fisherprint.experiment.schema import ExperimentError
from fisherprint.models import SinglePool, TwoPool
from fisherprint.parameters import paper_prior
from fisherprint.reconstruct import phantom
from tests.test_cli import call

DESIGNS = sorted((Path(__file__).parents[1] / "designs").glob("*.toml"))

SMALL = """
title = "small"
[start]
pulses = 60
repetition_time = 10e-3
seed = 1
[model]
parameters = ["T1", "T2", "B0", "B1"]
[goal]
weights = { T1 = 1.0, T2 = 2.0 }
tissues = ["white matter", "gel"]
B1 = [0.9, 1.1]
known = ["B0", "B1"]
[tissue.gel]
T1 = 0.8
T2 = 0.05
[limits]
flip_angle = [0.01, 1.2]
rf_power = 2e5
flip_angle_roughness = 0.02
[search]
rounds = 4
iterations = 8
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "design.toml"
    path.write_text(SMALL)
    return path


def run(path, output, **options):
    lines = []
    state = stages.design_train(
        stages.read_design(path),
        output,
        say=lines.append,
        progress=lambda what, done, total: None,
        **options,
    )
    return state, lines


def test_the_problem_of_a_file(small):
    wanted = stages.read_design(small)
    model, goal, limits = designing.problem(wanted)
    assert isinstance(model, SinglePool)
    assert (model.train.n_samples, model.train.repetition_time) == (60, 10e-3)
    assert goal.theta[0, 0] == phantom.TISSUES["white matter"].T1
    # Each tissue at each B1, in this order.
    assert goal.theta[:, model.index("B1")].tolist() == [0.9, 1.1, 0.9, 1.1]
    assert goal.theta[2:, 0].tolist() == [0.8, 0.8]
    assert dict(goal.weights) == {"T1": 1.0, "T2": 2.0}
    assert goal.known == ("B0", "B1")
    assert limits == design.Limits(flip_angle=(0.01, 1.2), rf_power=2e5, flip_angle_roughness=0.02)
    assert limits.broken(model.train) == {}


def test_a_basis_of_the_prior(small):
    small.write_text(SMALL.replace("[tissue.gel]", "rank = 5\nfingerprints = 30\n[tissue.gel]"))
    _, goal, _ = designing.problem(stages.read_design(small))
    assert (goal.rank, goal.basis_theta.shape, goal.mirrored) == (5, (30, 4), True)


def test_tissues_drawn_from_the_prior(small):
    options = "drawn = 500\ndrawn_share = 0.25\ndrawn_snr = 20.0\n[tissue.gel]"
    small.write_text(SMALL.replace("[tissue.gel]", options))
    model, goal, _ = designing.problem(stages.read_design(small))
    prior = paper_prior(model.names, repetition_time=model.train.repetition_time)
    assert goal.theta.shape == (504, 4)
    t1 = goal.theta[4:, model.index("T1")]
    assert t1.min() > prior.distributions["T1"].low
    # 500 draws: their mean is off by 4 % of the spread, which they tell to 3 %.
    everybody = prior.sample(100_000, rng=np.random.default_rng(9))[:, model.index("T1")]
    assert t1.mean() == pytest.approx(everybody.mean(), abs=0.2 * everybody.std())
    assert t1.std() == pytest.approx(everybody.std(), rel=0.15)
    assert goal.shares[:4].tolist() == pytest.approx([0.75 / 4] * 4)
    assert goal.shares[4:].sum() == pytest.approx(0.25)
    # Named tissues: relative to themselves, and nothing is known of them beforehand.
    np.testing.assert_array_equal(goal.sizes[:4], np.abs(goal.theta[:4]))
    assert not goal.foreknown[:4].any()
    # Drawn ones: relative to the paper's nominal values; at SNR 20 the spread of the prior counts.
    assert set(goal.sizes[4:, model.index("T1")]) == {1.6}
    known = 1 / (20 * everybody.std()) ** 2
    np.testing.assert_allclose(goal.foreknown[4:, model.index("T1")], known, rtol=0.05)
    again = designing.problem(stages.read_design(small))[1]
    np.testing.assert_array_equal(again.theta, goal.theta)


def test_it_keeps_the_best_train_and_goes_on(small, tmp_path):
    output = tmp_path / "whole.toml"
    whole, lines = run(small, output)
    assert fp.PulseTrain.read(output).digest == whole.best.digest
    assert whole.number == 4
    assert [line.split(":")[0] for line in lines] == [f"round {k}" for k in range(5)]
    assert "√CRB/θ of the signal, SNR 1: T1 " in lines[-1]

    # Stopped after the second round, and resumed with more.
    part = tmp_path / "part.toml"
    small.write_text(SMALL.replace("rounds = 4", "rounds = 2"))
    stopped, _ = run(small, part)
    assert stopped.number == 2
    small.write_text(SMALL)
    resumed, _ = run(small, part, resume=True)
    assert resumed.best.digest == whole.best.digest
    assert fp.PulseTrain.read(part).digest == whole.best.digest

    with pytest.raises(files.OutputExistsError, match="Go on with --resume"):
        run(small, part)
    forced, _ = run(small, part, force=True)
    assert forced.best.digest == whole.best.digest


def test_it_stops_after_its_minutes(small, tmp_path):
    state, _ = run(small, tmp_path / "a.h5", minutes=0)
    assert state.number == 1


def test_each_field_changes_the_design(small, tmp_path):
    """Every field of DESIGN.toml does something."""
    base = stages.read_design(small)
    reference = run(small, tmp_path / "reference.toml")[0].best.digest
    train = fp.PulseTrain(np.r_[np.pi, np.full(59, 0.1)], np.full(60, 300e-6), 10e-3, "crushed")
    train.write(tmp_path / "start.toml")
    train_mat = tmp_path / "start.h5"
    train.write(train_mat)
    with_rank = {"goal": {"rank": 6, "fingerprints": 20}}
    changes = {
        "start.path": {
            "start": {
                "path": tmp_path / "start.toml",
                "pulses": None,
                "seed": None,
                "repetition_time": None,
            }
        },
        "start.repetition_time": {"start": {"repetition_time": 9e-3}},
        "start.inversion": {"start": {"inversion": "spoiled"}},
        "start.pulses": {"start": {"pulses": 50}},
        "start.inversion_duration": {"start": {"inversion_duration": 400e-6}},
        "start.seed": {"start": {"seed": 2}},
        "model.parameters": {"model": {"parameters": ("T2", "T1", "B1", "B0")}},
        "model.saturation": None,  # of the two-pool model; below
        "goal.weights": {"goal": {"weights": {"T1": 1.0}}},
        "goal.tissues": {"goal": {"tissues": ("gel",)}},
        "goal.B0": {"goal": {"B0": (10.0,)}},
        "goal.B1": {"goal": {"B1": (1.0,)}},
        "goal.drawn": {"goal": {"drawn": 4}},
        "goal.drawn_share": {"goal": {"drawn": 4, "drawn_share": 0.2}},
        "goal.drawn_snr": {"goal": {"drawn": 4, "drawn_snr": 5.0}},
        "goal.known": {"goal": {"known": ()}},
        "goal.phase_known": {"goal": {"phase_known": True, "known": ()}},
        "goal.rank": with_rank,
        "goal.signal_share": {"goal": {**with_rank["goal"], "signal_share": 0.5}},
        "goal.fingerprints": {"goal": {**with_rank["goal"], "fingerprints": 30}},
        "goal.seed": {"goal": {**with_rank["goal"], "seed": 3}},
        "limits.flip_angle": {"limits": {"flip_angle": (0.1, 1.2)}},
        "limits.pulse_duration": {"limits": {"pulse_duration": (200e-6, 400e-6)}},
        "limits.rf_power": {"limits": {"rf_power": 1e5}},
        "limits.peak_b1": {"limits": {"peak_b1": 1500.0}},
        "limits.flip_angle_change": {"limits": {"flip_angle_change": 0.03}},
        "limits.flip_angle_roughness": {"limits": {"flip_angle_roughness": 0.01}},
        "limits.pulse_duration_change": {"limits": {"pulse_duration_change": 5e-6}},
        "limits.raster": {"limits": {"raster": 10e-6}},
        "search.rounds": {"search": {"rounds": 2}},
        "search.iterations": {"search": {"iterations": 5}},
        "search.knots": {"search": {"knots": (10,)}},
    }
    named = {
        f"{section}.{field}"
        for section in ("start", "model", "goal", "limits", "search")
        for field in getattr(base, section).__class__.model_fields
    }
    assert set(changes) == named
    digests = {"": reference}
    for number, (name, change) in enumerate(changes.items()):
        if change is None:
            continue
        content = base.model_dump()
        for section, values in change.items():
            content[section].update(values)
        wanted = Design.model_validate(content)
        state = stages.design_train(
            wanted,
            tmp_path / f"{number}.toml",
            say=lambda line: None,
            progress=lambda what, done, total: None,
        )
        digests[name] = state.best.digest
        if name in ("goal.B0", "model.parameters"):
            # On resonance or not, T1 and T2 are told alike; the order of names does not matter to
            # the physics either. The problem is another one all the same.
            model, goal, _ = designing.problem(wanted)
            assert (model.names, goal.theta.tolist()) != (
                designing.problem(base)[0].names,
                designing.problem(base)[1].theta.tolist(),
            )
            del digests[name]
    seen: dict[str, str] = {}
    for name, digest in digests.items():
        assert digest not in seen, (name, seen[digest])
        seen[digest] = name
    two_pool = Design.model_validate({"model": {"saturation": "graham"}})
    assert designing.problem(two_pool)[0].saturation == "graham"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("T2 = 2.0 }", "T3 = 2.0 }", "expected parameters of the model, T1, T2, B0, B1; got 'T3'"),
        ('"gel"]', '"gel", "jelly"]', r"got 'jelly'. Correct the name, or describe it"),
        ("T2 = 0.05", "T2f = 0.05", r"expected T1, T2 of the tissue 'gel'; got T1, T2f"),
        ("pulses = 60", 'pulses = 60\npath = "a.toml"', "expected a path, or pulses"),
        ("rf_power = 2e5", "rf_pover = 2e5", "limits.rf_pover: .*an unknown name"),
        ("known = [", "signal_share = 0.5\nknown = [", "expected a rank with fingerprints"),
        ("known = [", "seed = 5\nknown = [", "expected something to draw with a seed"),
        ("known = [", "drawn_snr = 5.0\nknown = [", "expected a number of drawn tissues"),
        ("rounds = 4", "rounds = 0", "search.rounds: "),
    ],
)
def test_files_that_are_refused(small, old, new, message):
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(ExperimentError, match=message):
        stages.read_design(small)


def test_limits_that_contradict_and_a_start_outside(small, tmp_path):
    small.write_text(SMALL.replace("rf_power = 2e5", "rf_power = 2e3"))
    with pytest.raises(design.LimitsError, match="the inversions and the smallest flip angles"):
        run(small, tmp_path / "a.toml")
    fp.PulseTrain(np.r_[np.pi, np.full(59, 2.0)], np.full(60, 3e-4), 0.01).write(
        tmp_path / "start.toml"
    )
    text = SMALL.replace("pulses = 60\nrepetition_time = 10e-3\nseed = 1", 'path = "start.toml"')
    small.write_text(text)
    with pytest.raises(design.LimitsError, match="expected a start within the limits; got flip_"):
        run(small, tmp_path / "a.toml")
    # Milliseconds for seconds.
    small.write_text(SMALL.replace("[limits]", "[limits]\npulse_duration = [0.1, 0.5]"))
    with pytest.raises(ValueError, match="pulse durations must stay below the repetition time"):
        run(small, tmp_path / "a.toml")
    assert not (tmp_path / "a.toml").exists()


def test_what_no_train_can_see(small, tmp_path):
    text = SMALL.replace('parameters = ["T1", "T2", "B0", "B1"]', "")
    text = text.replace('known = ["B0", "B1"]', "").replace("T2 = 2.0 }", "Rx = 2.0 }")
    text = text.replace(
        "T1 = 0.8\nT2 = 0.05", "m0s = 0.0\nT1 = 0.8\nT2f = 0.05\nRx = 20\nT2s = 1e-5"
    )
    small.write_text(text.replace('tissues = ["white matter", "gel"]', 'tissues = ["gel"]'))
    with pytest.raises(fp.SingularInformationError, match="Rx"):
        run(small, tmp_path / "a.toml")


def test_nothing_to_resume_or_another_design(small, tmp_path):
    output = tmp_path / "a.toml"
    with pytest.raises(ExperimentError, match="Begin one without --resume"):
        run(small, output, resume=True)
    with pytest.raises(ExperimentError, match="got both --resume and --force"):
        run(small, output, resume=True, force=True)
    run(small, output, minutes=0)
    small.write_text(SMALL.replace("rf_power = 2e5", "rf_power = 1e5"))
    with pytest.raises(ExperimentError, match="is the search of another design"):
        run(small, output, resume=True)
    (tmp_path / "a.search.h5").write_bytes(b"damaged")
    with pytest.raises(files.UnreadableFileError, match="expected an HDF5"):
        run(small, output, resume=True)
    with pytest.raises(ValueError, match=r"written as \.toml or \.h5; got .*a\.seq"):
        run(small, tmp_path / "a.seq")


def test_the_command(small, tmp_path):
    output = tmp_path / "out.toml"
    result = call("design", small, "-o", output, "--minutes", "0")
    assert result.code == 0
    assert f"train: {output}" in result.out
    assert "round 1: cost " in result.out
    again = call("design", small, "-o", output)
    assert again.code != 0
    assert call("design", small, "-o", output, "--resume").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_and_resumed_it_ends_like_another(small, tmp_path):
    small.write_text(SMALL.replace("rounds = 4", "rounds = 40"))
    whole = tmp_path / "whole.toml"
    reference, _ = run(small, whole)
    output = tmp_path / "killed.toml"
    command = [sys.executable, "-m", "fisherprint.cli", "design", str(small), "-o", str(output)]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    record = tmp_path / "killed.search.h5"
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if record.exists() and files.read_search(record)[0].number >= 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = fp.PulseTrain.read(output)
    # What is there is a whole train within the limits.
    _, _, limits = designing.problem(stages.read_design(small))
    assert limits.broken(kept) == {}
    state, _ = run(small, output, resume=True)
    assert state.best.digest == reference.best.digest


@pytest.mark.parametrize("path", DESIGNS, ids=lambda path: path.stem)
def test_the_designs_that_come_along(path):
    if "title" not in files.read_toml(path):
        return  # a train that one of them starts from
    model, goal, limits = designing.problem(stages.read_design(path))
    assert isinstance(model, TwoPool)
    start = design.begin(model, goal, limits)
    assert np.isfinite(start.cost)
