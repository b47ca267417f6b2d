"""The stage `fit`: a volume in chunks, killed and resumed, against the fit of each voxel."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest

import fisherprint as fp
from fisherprint import cli, error_bars, files, fit, maps
from fisherprint import experiment as stages
from fisherprint.experiment import Run, fit_inputs, fitting
from fisherprint.network import as_estimator
from fisherprint.sequence import PulseTrain

RANK = 13
EXPERIMENT = f"""\
[sequence]
path = "train.toml"

[simulation]
training = 512
validation = 32
test = 32
rank = {RANK}
basis_method = "crb-svd"

[training]
epochs = 1
batch_size = 128
warmup_steps = 1
"""
SHAPE = (6, 5, 2)
STD = 2e-6
B1 = 0.95


def silent(*_: object) -> None:
    """Takes what a stage says and keeps it to itself."""


@pytest.fixture(scope="module")
def run(short_train: PulseTrain, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A data set and a network that has learned nothing."""
    folder = tmp_path_factory.mktemp("fit")
    short_train.write(folder / "train.toml")
    (folder / "experiment.toml").write_text(EXPERIMENT)
    run = stages.start(stages.read(folder / "experiment.toml"), folder / "run")
    stages.simulate_run(run, progress=silent)
    stages.train_run(run, resume=False, say=silent, progress=silent)
    return run


@pytest.fixture(scope="module")
def images(run: Run) -> Path:
    """Noisy images in the run's basis with one bad voxel; beside them mask and true maps."""
    data, _, model = stages.read_data(run)
    rng = np.random.default_rng(1)
    low = [0.1, 0.8, 0.04, 30.0, 10e-6, -200.0, B1]
    theta = rng.uniform(low, [0.2, 1.6, 0.1, 60.0, 14e-6, 200.0, B1], (60, 7))
    x = data.basis.compress(model.signal(theta))
    x = 100 * (x + STD * (rng.standard_normal((*x.shape, 2)) @ [1, 1j]))
    x[7] = 0
    volume = files.Volume(x.reshape(*SHAPE, RANK).astype(np.complex64), np.diag([2.0, 2, 3, 1]))
    folder = run.folder.parent
    files.write_coefficients(folder / "x.nii.gz", volume, basis_sha256=data.basis.digest)
    mask = np.ones(SHAPE, dtype=bool)
    mask[0, 0] = False
    files.write_mask(folder / "mask.nii.gz", mask, volume=volume)
    truth = theta.reshape(*SHAPE, 7)
    for name, values in zip(model.names, np.moveaxis(truth, -1, 0), strict=True):
        image = nibabel.Nifti1Image(values, np.diag([2.0, 2, 3, 1]))
        (folder / "truth").mkdir(exist_ok=True)
        nibabel.save(image, folder / "truth" / f"{name}.nii.gz")
    return folder / "x.nii.gz"


def section(images: Path, **options: object) -> stages.MapSection:
    return stages.MapSection(coefficients=images, mask=images.parent / "mask.nii.gz", **options)


def fitted(run: Run, images: Path, out: Path, **options: object) -> dict[str, np.ndarray]:
    """The maps that the stage writes."""
    words = {"start": images.parent / "truth", "known": {"B1": B1}} | options
    noise_std = words.pop("noise_std", None)
    stages.fit_run(
        run,
        section(images, noise_std=noise_std),
        out,
        say=silent,
        progress=silent,
        **words,
    )
    return {
        path.name[:-7]: np.asarray(nibabel.load(path).dataobj) for path in out.glob("*.nii.gz")
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def alone(run: Run, images: Path, **options: object) -> fit.Fit:
    """Each voxel from the truth, without the stage."""
    data, _, model = stages.read_data(run)
    folder = images.parent / "truth"
    truth = np.column_stack(
        [nibabel.load(folder / f"{name}.nii.gz").get_fdata().ravel() for name in model.names]
    )
    estimator = fit.LeastSquares(model, data.basis, start=truth[0], known={"B1": B1}, **options)
    x = np.asarray(nibabel.load(images).dataobj).reshape(-1, RANK)
    return estimator.fit(x, start=truth)


@pytest.fixture(scope="module")
def expected(run: Run, images: Path) -> fit.Fit:
    """Each voxel by itself, without the stage."""
    bounds = {
        "m0s": (0.0, 0.6),
        "T1": (0.1, 10.0),
        "T2f": (2e-3, 10.0),
        "Rx": (0.0, 200.0),
        "T2s": (6e-6, 20e-6),
        "B0": (-np.pi / 3.5e-3, np.pi / 3.5e-3),
    }
    return alone(run, images, bounds=bounds)


def test_a_volume_is_the_fit_of_its_voxels(
    run: Run, images: Path, expected: fit.Fit, tmp_path: Path
) -> None:
    found = fitted(run, images, tmp_path / "maps")
    mask = np.asarray(nibabel.load(images.parent / "mask.nii.gz").dataobj) != 0
    x = np.asarray(nibabel.load(images).dataobj)
    columns = {name: expected.theta[:, p] for p, name in enumerate(expected.names)}
    columns |= {f"{name}_std": expected.std[:, p] for p, name in enumerate(expected.names)}
    columns |= {
        "M0": np.abs(expected.m0),
        "residual": expected.residual / np.maximum(np.linalg.norm(x, axis=-1).ravel(), 1e-30),
    }
    del columns["B1"], columns["B1_std"]
    for name, values in columns.items():
        values = np.where(mask, values.reshape(SHAPE), np.nan)
        # Batches of other voxels round differently: far within the noise, where searches end.
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)
    # Which of the good ends comes first is rounding, too: in 1 of the 58 voxels, whose estimates
    # are 6e-6 standard deviations apart. The bad ends are the same.
    ends, wanted = found["reason"][mask], expected.reason.reshape(SHAPE)[mask]
    assert (ends != wanted).mean() < 0.05
    np.testing.assert_array_equal(
        np.maximum(ends, fit.Reason.COST), np.maximum(wanted, fit.Reason.COST)
    )
    assert np.isnan(found["reason"][~mask]).all()
    assert set(found) == {*columns, "M0_phase", "iterations", "reason", "status"} | (
        {"white_matter", "csf"} & set(found)
    )
    assert found["reason"].ravel()[7] == fit.Reason.NO_SIGNAL
    check_status(found, expected, mask, run)
    # Wherever there is signal: within five standard deviations of the truth.
    error = found["T1"] - nibabel.load(images.parent / "truth" / "T1.nii.gz").get_fdata()
    assert np.nanmax(np.abs(error / found["T1_std"])) < 5
    summary = json.loads((tmp_path / "maps" / "summary.json").read_text())
    assert summary["failed_voxels"] == 1
    assert sum(summary["reasons"].values()) == mask.sum()
    assert summary["reasons"]["no_signal"] == 1
    assert summary["status"]["not_finite"] == 1
    assert sum(summary["status"].values()) == mask.size
    assert summary["provenance"]["noise"]["source"] == "residuals"
    assert summary["provenance"]["known"] == {"B1": B1}
    assert summary["regions"]["all"]["T1"]["median"] == pytest.approx(np.nanmedian(found["T1"]))
    assert not (tmp_path / "maps" / "chunks").exists()


def test_two_steps_of_a_volume_are_those_of_its_voxels(
    run: Run, images: Path, expected: fit.Fit, tmp_path: Path
) -> None:
    std = 100 * STD
    found = fitted(run, images, tmp_path / "maps", noise_std=std, two_steps=True)
    mask = np.asarray(nibabel.load(images.parent / "mask.nii.gz").dataobj) != 0
    good = mask & (np.arange(mask.size).reshape(SHAPE) != 7)
    assert (found["reason"][good] == fit.Reason.FEW_STEPS).all()
    assert found["reason"].ravel()[7] == fit.Reason.NO_SIGNAL
    assert (found["iterations"][good] == 2).all()
    # No failure, no lack of convergence; and not what the search finds.
    left_over = {maps.Status.NOT_CONVERGED, maps.Status.NOT_FINITE} & set(found["status"][good])
    assert not left_over
    assert np.abs(found["T1"][good] / expected["T1"].reshape(SHAPE)[good] - 1).max() > 1e-3
    # From the truth, two steps are the noise: within five standard deviations.
    error = found["T1"] - nibabel.load(images.parent / "truth" / "T1.nii.gz").get_fdata()
    assert np.nanmax(np.abs(error / found["T1_std"])) < 5

    _, pulses, model = stages.read_data(run)
    prior = fit_inputs.prior_of(run, model, pulses)
    steps = fit_inputs.steps_of(prior, {*model.names} - {"B1"})
    bounds = fit_inputs.bounds_of(prior, model)
    wanted = alone(run, images, bounds=bounds, noise_std=std, steps=steps)
    for name in ("m0s", "T1", "Rx", "B0"):
        values = wanted[name].reshape(SHAPE)[good]
        np.testing.assert_allclose(found[name][good], values, rtol=1e-6, err_msg=name)

    summary = json.loads((tmp_path / "maps" / "summary.json").read_text())
    assert summary["failed_voxels"] == 1
    assert summary["reasons"] == {"few_steps": int(good.sum()), "no_signal": 1}
    assert summary["provenance"]["estimator"] == "non-linear least squares, two steps"
    assert [step["T1"] for step in summary["provenance"]["steps"]] == [0.4, 12.0]


def test_two_steps_have_the_priors_spread() -> None:
    """Half of it, then 15 times; of the paper's prior (§2.3), where B0 is uniform."""
    names = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
    prior = fp.parameters.paper_prior(names, repetition_time=3.5e-3)
    spread = {"m0s": 0.08, "T1": 0.8, "T2f": 0.2, "Rx": 20.0, "T2s": 3e-6}
    spread["B0"] = 2 * np.pi / 3.5e-3 / np.sqrt(12)
    steps = fit_inputs.steps_of(prior, {*names} - {"B1"})
    for step, width in zip(steps, (0.5, 15), strict=True):
        assert step == pytest.approx({name: width * std for name, std in spread.items()})


def test_two_steps_start_from_every_parameter_or_not_at_all(
    run: Run, images: Path, tmp_path: Path
) -> None:
    options = {"noise_std": 100 * STD, "two_steps": True}
    # The network of this run tells three of six.
    with pytest.raises(stages.ExperimentError, match="estimates of Rx, T2s, B0, too, to start"):
        fitted(run, images, tmp_path / "maps", start=run.folder, **options)
    with pytest.raises(stages.ExperimentError, match="a similar fingerprint is too far away"):
        fitted(run, images, tmp_path / "maps", start=4, **options)
    # A voxel without an estimate has none afterwards, and stops no other.
    truth = shutil.copytree(images.parent / "truth", tmp_path / "truth")
    image = nibabel.load(truth / "Rx.nii.gz")
    values = image.get_fdata()
    values[3, 2] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), truth / "Rx.nii.gz")
    found = fitted(run, images, tmp_path / "maps", start=truth, **options)
    assert (found["status"][3, 2] == maps.Status.NOT_FINITE).all()
    assert (found["reason"][3, 2] == fit.Reason.REFUSED).all()
    # What a search left behind when it was killed is not taken for steps.
    with (
        mock.patch.object(fitting, "_write", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        fitted(run, images, tmp_path / "all")
    assert list((tmp_path / "all" / "chunks").glob("*/*.h5"))
    other = fitted(run, images, tmp_path / "all", **options)
    assert np.nanmax(other["iterations"]) == 2
    same = np.isfinite(values) & np.isfinite(other["T1"])
    np.testing.assert_allclose(found["T1"][same], other["T1"][same], rtol=1e-9)
    assert same.sum() == np.isfinite(found["T1"]).sum()


def check_status(
    found: dict[str, np.ndarray], expected: fit.Fit, mask: np.ndarray, run: Run
) -> None:
    """What is wrong with each voxel, of what the fit itself says."""
    _, pulses, model = stages.read_data(run)
    limits = fit_inputs.bounds_of(fit_inputs.prior_of(run, model, pulses), model)
    at_bound = np.zeros(len(expected.theta), dtype=bool)
    # Those that a network of the run would tell.
    for name in ("m0s", "T1", "T2f"):
        low, high = limits[name]
        at_bound |= (expected[name] <= low) | (expected[name] >= high)
    status = np.full(len(at_bound), maps.Status.FINE)
    # Of the residuals of voxels in the mask: 2K - F - 2 = 18 degrees, three times the median.
    inside = expected.residual[mask.ravel()]
    status[expected.residual > 3 * np.nanmedian(inside)] = maps.Status.MISFIT
    status[at_bound] = maps.Status.AT_BOUND
    status[expected.reason == fit.Reason.ITERATIONS] = maps.Status.NOT_CONVERGED
    status[expected.reason == fit.Reason.NO_SIGNAL] = maps.Status.NOT_FINITE
    status[~mask.ravel()] = maps.Status.OUTSIDE_MASK
    np.testing.assert_array_equal(found["status"].ravel(), status)
    assert found["status"].dtype == np.uint8
    assert (status == maps.Status.FINE).sum() > 20


def test_limits_of_what_no_network_would_tell_are_no_status(run: Run) -> None:
    """T2s stands at a limit in half of all white matter: that is no news (decision 040)."""
    _, pulses, model = stages.read_data(run)
    bounds = fit_inputs.bounds_of(fit_inputs.prior_of(run, model, pulses), model)
    middle = np.array([np.mean(bounds[name]) for name in model.names])
    theta = np.tile(middle, (3, 1))
    theta[1, model.index("T2s")] = bounds["T2s"][1]
    theta[2, model.index("m0s")] = bounds["m0s"][0]
    found = {"theta": theta, "reason": np.zeros(3), "residual": np.zeros(3)}
    estimator = fit.LeastSquares(model, stages.read_data(run)[0].basis, middle, bounds=bounds)
    status = fitting._status(found, estimator, list(run.experiment.training.estimated), 1.0)
    assert list(status) == [maps.Status.FINE, maps.Status.FINE, maps.Status.AT_BOUND]


def test_what_is_known_by_a_map_is_known_voxel_by_voxel(
    run: Run, images: Path, tmp_path: Path
) -> None:
    by_value = fitted(run, images, tmp_path / "value", noise_std=100 * STD)
    by_map = fitted(
        run,
        images,
        tmp_path / "map",
        known={"B1": images.parent / "truth" / "B1.nii.gz"},
        noise_std=100 * STD,
    )
    np.testing.assert_allclose(by_map["T1"], by_value["T1"], rtol=1e-5)
    asked = section(
        images, known={"B1": images.parent / "truth" / "B1.nii.gz"}, noise_std=100 * STD
    )
    start = images.parent / "truth"
    stages.fit_run(run, asked, tmp_path / "asked", start=start, say=silent, progress=silent)
    assert not (tmp_path / "asked" / "B1.nii.gz").exists()
    found = nibabel.load(tmp_path / "asked" / "T1.nii.gz").dataobj
    np.testing.assert_array_equal(np.asarray(found), by_map["T1"])
    free = fitted(run, images, tmp_path / "free", known={}, noise_std=100 * STD)
    # One unknown more raises every bound; the estimates at which it is taken differ a little.
    assert np.nanmedian(free["m0s_std"] / by_value["m0s_std"]) > 1
    assert "B1" in free and "B1" not in by_map


def test_a_known_map_in_another_unit_is_refused(run: Run, images: Path, tmp_path: Path) -> None:
    true = nibabel.load(images.parent / "truth" / "B1.nii.gz")
    percent = nibabel.Nifti1Image(100 * true.get_fdata(), true.affine)
    nibabel.save(percent, tmp_path / "percent.nii.gz")
    with pytest.raises(ValueError, match=r"range of the fit, 0.3 to 1.4; .* Is it in percent\?"):
        fitted(run, images, tmp_path / "maps", known={"B1": tmp_path / "percent.nii.gz"})
    assert not (tmp_path / "maps").exists()
    # Some voxels beyond are voxels that fail.
    values = true.get_fdata()
    values[1, 1] = 3.0
    nibabel.save(nibabel.Nifti1Image(values, true.affine), tmp_path / "some.nii.gz")
    found = fitted(run, images, tmp_path / "maps", known={"B1": tmp_path / "some.nii.gz"})
    assert np.isnan(found["T1"][1, 1]).all() and np.isfinite(found["T1"][2, 2]).all()


def test_a_network_that_is_told_what_is_known_is_a_start(
    run: Run, images: Path, tmp_path: Path
) -> None:
    """With B1 known by value or by map it starts the fit; without, others do, and it is said."""
    told = stages.vary(run, tmp_path / "told", ['training.inputs=["B1"]'])
    stages.train_run(told, resume=False, say=silent, progress=silent)
    network, _ = stages.load_network(told)
    x = nibabel.load(images).get_fdata(dtype=np.complex64)[1:]
    expected = as_estimator(network)(np.concatenate([x, np.full((*x.shape[:3], 1), B1)], -1))
    seen = []

    class Spy(fit.LeastSquares):
        def fit(self, given, *, start, **options):
            seen.append(start)
            return super().fit(given, start=start, **options)

    with mock.patch.object(fit, "LeastSquares", Spy):
        for known in ({"B1": B1}, {"B1": images.parent / "truth" / "B1.nii.gz"}):
            seen.clear()
            fitted(
                told, images, tmp_path / f"{len(known)}", start=None, known=known, overwrite=True
            )
            # The last voxels of the mask, in its order; single precision.
            assert seen[-1].shape == (58, 1, 7)
            np.testing.assert_allclose(
                seen[-1][-50:, 0, 0], expected.reshape(-1, 3)[:, 0], rtol=1e-4
            )
        said: list[str] = []
        stages.fit_run(
            told, section(images), tmp_path / "without", say=said.append, progress=silent
        )
        assert "not started from the run's network, which must be told B1" in said
        assert seen[-1].shape == (58, 4, 7)
    with pytest.raises(stages.ExperimentError, match="expected a known B1, which"):
        fitted(run, images, tmp_path / "other", start=told.folder, known={})


def test_the_prior_of_the_run_weighs_in(run: Run, images: Path, tmp_path: Path) -> None:
    """As the estimator with the same normal distributions; a narrow one is all that counts."""
    std = 100 * STD
    _, pulses, model = stages.read_data(run)
    prior = fit_inputs.prior_of(run, model, pulses)
    normals = {
        name: (normal.mean, 0.5 * normal.std)
        for name, normal in prior.distributions.items()
        if name not in ("B0", "B1")  # B0 is uniform, B1 known
    }
    bounds = fit_inputs.bounds_of(prior, model)
    expected = alone(run, images, bounds=bounds, prior=normals, noise_std=std)
    found = fitted(run, images, tmp_path / "maps", noise_std=std, prior=0.5)
    inside = np.isfinite(found["T1"])
    for name in ("m0s", "T1", "Rx"):
        values = expected[name].reshape(SHAPE)[inside]
        np.testing.assert_allclose(found[name][inside], values, rtol=1e-4, err_msg=name)
    summary = json.loads((tmp_path / "maps" / "summary.json").read_text())
    assert summary["provenance"]["estimator"] == "non-linear least squares with a prior"
    assert summary["provenance"]["prior"]["T1"] == [1.6, 0.4]
    assert set(summary["provenance"]["prior"]) == {"m0s", "T1", "T2f", "Rx", "T2s"}
    narrow = fitted(run, images, tmp_path / "narrow", noise_std=std, prior=1e-6)
    np.testing.assert_allclose(narrow["Rx"][np.isfinite(narrow["Rx"])], 44.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("way", "least"), [({"prior": 1.0, "start": 1}, 1.0), ({"two_steps": True}, 0.01)]
)
def test_the_background_tells_the_noise_that_is_weighed_against(
    run: Run, images: Path, way: dict[str, object], least: float, tmp_path: Path
) -> None:
    """As if it had been given; a factor of ten from the true one would change the maps."""
    wide = [(0, 14), (0, 10), (0, 2)]  # room for noise that is not next to the mask
    volume = files.read_coefficients(images)
    rng = np.random.default_rng(2)
    x = np.pad(volume.data, [*wide, (0, 0)])
    noise = 100 * STD * (rng.standard_normal((*x.shape, 2)) @ [1, 1j])
    mask = np.pad(np.asarray(nibabel.load(images.parent / "mask.nii.gz").dataobj) != 0, wide)
    x = np.where(mask[..., None], x, noise).astype(np.complex64)
    padded = files.Volume(x, volume.affine)
    basis = stages.read_data(run)[0].basis
    files.write_coefficients(tmp_path / "x.nii.gz", padded, basis_sha256=basis.digest)
    files.write_mask(tmp_path / "mask.nii.gz", mask, volume=padded)
    std = error_bars.noise_of_background(x, mask)
    assert std == pytest.approx(100 * STD, rel=0.05)  # 13 coefficients of some thousand voxels

    # Not quite the truth, so that what damps a step shows.
    for path in (images.parent / "truth").glob("*.nii.gz"):
        near = np.pad(0.97 * nibabel.load(path).get_fdata(), wide, mode="edge")
        (tmp_path / "near").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(near, volume.affine), tmp_path / "near" / path.name)
    options = {"start": tmp_path / "near"} | way

    def mapped(out: str, std: float | None) -> dict[str, np.ndarray]:
        return fitted(run, tmp_path / "x.nii.gz", tmp_path / out, noise_std=std, **options)

    found, given, other = (
        mapped(*each) for each in (("found", None), ("given", std), ("other", 10 * std))
    )
    for name in found:
        np.testing.assert_array_equal(found[name], given[name], err_msg=name)
    assert np.nanmax(np.abs(other["Rx"] - found["Rx"])) > least
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert summary["provenance"]["noise"]["source"] == "background"
    assert summary["provenance"]["noise"]["std"] == std


def test_a_uniform_prior_has_nothing_to_weigh_in(run: Run) -> None:
    _, pulses, model = stages.read_data(run)
    prior = fit_inputs.prior_of(run, model, pulses)
    assert fit_inputs.normals_of(prior, None, {"T1", "B0"}) == {}
    assert fit_inputs.normals_of(prior, 2.0, {"T1", "B0"}) == {"T1": (1.6, 1.6)}
    with pytest.raises(ValueError, match="the prior of B0 is uniform"):
        fit_inputs.normals_of(prior, 1.0, {"B0"})


def test_other_units_are_written_and_not_taken_to_start_from(
    run: Run, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    with pytest.raises(KeyError, match="unknown parameter 'B1'"):
        fitted(run, images, out, stated={"B1": "%"})
    with pytest.raises(ValueError, match="way to state T1"):
        fitted(run, images, out, stated={"T1": "min"})
    assert not out.exists()
    usual = fitted(run, images, tmp_path / "usual")
    stated = fitted(run, images, out, stated={"T1": "ms", "m0s": "F"})
    for name, values in (
        ("T1_std", 1e3 * usual["T1_std"]),
        ("F", usual["m0s"] / (1 - usual["m0s"])),
        ("F_std", usual["m0s_std"] / (1 - usual["m0s"]) ** 2),
        ("T2f", usual["T2f"]),
    ):
        # Single precision.
        np.testing.assert_allclose(stated[name], values, rtol=1e-6, err_msg=name)
    assert "m0s" not in stated
    with pytest.raises(ValueError, match=r"expected T1 in s; .* holds T1 in ms"):
        fitted(run, images, tmp_path / "again", start=out)


def test_starts_of_several_kinds(run: Run, images: Path, tmp_path: Path) -> None:
    """From the network, another run's network, and the most similar fingerprints."""
    from_truth = fitted(run, images, tmp_path / "truth")
    few = fitted(run, images, tmp_path / "few", start=1)
    many = fitted(run, images, tmp_path / "many", start=6)
    by_network = fitted(run, images, tmp_path / "network", start=None)
    by_run = fitted(run, images, tmp_path / "run", start=run.folder)
    np.testing.assert_array_equal(by_run["T1"], by_network["T1"])
    assert not np.array_equal(by_network["iterations"], few["iterations"])
    good = np.isfinite(few["residual"])
    # More starts never end higher, but for where the best one is rounded.
    assert (many["residual"] <= few["residual"] * (1 + 1e-4))[good].all()
    # Most of the minima from the truth are found again.
    near = np.abs(many["T1"] - from_truth["T1"])[good] < 0.1 * from_truth["T1_std"][good]
    assert near.mean() > 0.6


def test_who_computes_does_not_matter(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CHUNK", 9)
    fitted(run, images, tmp_path / "default")
    with ThreadPoolExecutor(3) as pool:
        fitted(run, images, tmp_path / "three", executor=pool)
    assert contents(tmp_path / "default") == contents(tmp_path / "three")


def test_dask_workers_give_the_same_maps(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(fitting, "CHUNK", 15)
    fitted(run, images, tmp_path / "local")
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=50,
        ) as running,
        stages.workers(scheduler=running.scheduler_address) as pool,
    ):
        assert pool.number == 2
        fitted(run, images, tmp_path / "dask", executor=pool.executor, n_workers=2)
    assert contents(tmp_path / "dask") == contents(tmp_path / "local")


def test_the_forecast_counts_what_is_left(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks once a call, a measurement of any fits takes one second."""
    ticks = itertools.count()
    monkeypatch.setattr(fitting, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(fitting, "_PROBE", 4)
    monkeypatch.setattr(fitting, "CHUNK", 8)
    # No groups, for which the next test is.
    monkeypatch.setattr(fitting, "_GROUP", 1e-9)
    said: list[str] = []
    options = {"say": said.append, "progress": silent, "known": {"B1": B1}}
    options |= {"start": images.parent / "truth", "n_workers": 2}
    stages.fit_run(run, section(images), tmp_path / "maps", dry_run=True, **options)
    # 58 voxels, of which 2 workers fit 8 in that second.
    assert said[-1] == f"expected time: {58 / 8:.0f} s with 2 workers"
    # Of ten workers, eight get a chunk of 8 voxels; each has fitted 4 in that second.
    more = options | {"n_workers": 10}
    stages.fit_run(run, section(images), tmp_path / "maps", dry_run=True, **more)
    assert said[-1] == "expected time: 2 s with 10 workers"
    assert not (tmp_path / "maps").exists()
    # A volume that takes long is forecast unasked, and then fitted.
    monkeypatch.setattr(fitting, "_WORTH", 0.2)
    said.clear()
    stages.fit_run(run, section(images), tmp_path / "maps", **options)
    assert f"expected time: {58 / 8:.0f} s with 2 workers" in said
    assert (tmp_path / "maps" / "summary.json").exists()


def test_a_forecast_knows_that_few_voxels_cost_a_whole_group() -> None:
    iterations = np.array([1, 1, 3, 3])
    # The start and one step of all, two steps of half of them, in groups of 32.
    assert fitting._groups(iterations, 64) == 2 + 2 + 1 + 1
    assert fitting._groups(iterations, 4) == 4
    assert fitting._groups(np.array([0]), 65) == 3


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (119, "119 s"), (3600, "60 min"), (9000, "2.5 h")]
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert fitting._duration(seconds) == words


CHUNKED = """
import sys
from fisherprint import cli
from fisherprint.experiment import fitting
fitting.CHUNK = 8
sys.argv[0] = "fisherprint"
cli.main()
"""


def words(run: Run, images: Path, out: Path) -> list[str]:
    truth, mask = images.parent / "truth", images.parent / "mask.nii.gz"
    return [
        *("fit", str(images), "--run", str(run.folder), "-o", str(out), "--workers", "1"),
        *("--mask", str(mask), "--known", f"B1={truth / 'B1.nii.gz'}", "--start", str(truth)),
    ]


def test_killed_and_repeated_it_is_the_same(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "CHUNK", 8)
    known: dict[str, float | Path] = {"B1": images.parent / "truth" / "B1.nii.gz"}
    fitted(run, images, tmp_path / "undisturbed", known=known)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", CHUNKED, *words(run, images, out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("chunks/*/chunk-*.h5"))) < 3:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    kept = sorted(out.glob("chunks/*/chunk-*.h5"))
    # One of them is damaged since.
    kept[0].write_bytes(kept[0].read_bytes()[:-50])
    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert f"58 voxels in 8 chunks, of which {len(kept) - 1} are done" in again.stdout
    assert contents(out) == contents(tmp_path / "undisturbed")


def call(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fisherprint", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return leaving.value.code, out.getvalue()


def test_the_command_says_what_it_finds(run: Run, images: Path, tmp_path: Path) -> None:
    arguments = words(run, images, tmp_path / "maps")
    code, said = call(*arguments, "--dry-run")
    assert code == 0 and "58 voxels in 1 chunks\nexpected time: " in said
    assert not (tmp_path / "maps").exists()
    code, said = call(*arguments)
    assert code == 0, said
    assert "58 voxels fitted, 1 failed, 0 did not converge" in said
    assert "all: T1 1." in said
    code, said = call(*arguments)
    assert code == 2 and "already holds maps" in said and "--overwrite" in said
    assert call(*arguments, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--known", "B1"], "NAME=VALUE or NAME=FILE, once a name"),
        (["--known", "B1=1", "--known", "B1=0.9"], "'B1=0.9'"),
        (["--known", "T9=1"], "unknown parameter 'T9'"),
        (["--known", "B1=7"], "expected B1 in [0.3, 1.4]; got 7"),
        (["--known", "B1=absent.nii"], "expected a file at absent.nii"),
        (["--start", "0"], "at least 1 start"),
        (["--start", "absent"], "there is none"),
        (["--prior", "1"], "expected a noise_std, against which the prior weighs"),
        (["--two-steps", "--start", "TRUTH"], "against which the damping of steps weighs"),
        (["--two-steps"], "Start from a network or maps of every parameter"),
        (
            ["--prior", "0", "--noise-std", "1"],
            "the width of the prior must be a positive finite number",
        ),
        (["--noise-std", "-1"], "noise_std: Input should be greater than 0; got -1.0"),
        (["--scheduler", "tcp://nobody:1", "--workers", "1"], "drop one"),
    ],
)
def test_a_wrong_call_is_explained(
    run: Run, images: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    plain = ["fit", str(images), "--run", str(run.folder), "-o", str(tmp_path / "maps")]
    truth = str(images.parent / "truth")
    code, said = call(*plain, *(truth if word == "TRUTH" else word for word in change))
    assert code == 2
    assert message in " ".join(said.split())


def test_a_network_of_another_basis_is_no_start(run: Run, images: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run.folder, tmp_path / "other")
    card = files.read_json(other / "network" / "card.json")
    files.write_json(other / "network" / "card.json", card | {"basis_sha256": "0" * 64})
    with pytest.raises(stages.BasisMismatchError, match="has 000000000000"):
        fitted(run, images, tmp_path / "maps", start=other)


def test_images_of_another_basis_are_refused(run: Run, images: Path, tmp_path: Path) -> None:
    other = tmp_path / "x.nii.gz"
    other.write_bytes(images.read_bytes())
    files.write_json(tmp_path / "x.json", {"BasisSHA256": "0" * 64})
    with pytest.raises(stages.BasisMismatchError, match="was made with 0000"):
        stages.fit_run(
            run,
            stages.MapSection(coefficients=other),
            tmp_path / "maps",
            say=silent,
            progress=silent,
        )
