"""Error bars of estimates: against the bound, the noise that was added, and what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fisherprint as fp
from fisherprint import error_bars, files, fit
from fisherprint.error_bars import ErrorBars, noise_of_background, noise_of_residuals
from fisherprint.maps import Status, classified, counted
from fisherprint.models import Fingerprints, SignalModel
from fisherprint.models.protocol import Named
from fisherprint.subspace import Basis


class Echoes(Named):
    """Spin echoes after an inversion that is not perfect."""

    parameters = (
        fp.Parameter("T1", "$T_1$", "s", (0.1, 5.0), "s"),
        fp.Parameter("T2", "$T_2$", "s", (0.01, 1.0), "ms", 1e3),
        fp.Parameter("efficiency", "inversion efficiency", "", (0.0, 1.0)),
    )
    inversion, echo = (t.ravel() for t in np.meshgrid(np.geomspace(0.03, 5, 8), [0.01, 0.04, 0.1]))
    n_samples = 24

    def simulate(self, theta: np.ndarray) -> Fingerprints:
        theta = np.asarray(theta, dtype=float)
        if not (theta[:, 1] > 0).all():
            raise ValueError("T2 must be positive")
        T1, T2, efficiency = theta.T[..., None]
        recovery, decay = np.exp(-self.inversion / T1), np.exp(-self.echo / T2)
        signal = (1 - (1 + efficiency) * recovery) * decay
        slopes = [
            -(1 + efficiency) * recovery * self.inversion / T1**2 * decay,
            signal * self.echo / T2**2,
            -recovery * decay,
        ]
        return Fingerprints(theta, signal + 0j, np.stack(slopes, axis=-1) + 0j)

    def signal(self, theta: np.ndarray) -> np.ndarray:
        return self.simulate(theta).signal


RANK = 8
BOUNDS = {p.name: p.bounds for p in Echoes.parameters}


def parameter_sets(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform([0.5, 0.05, 0.8], [2.0, 0.12, 0.97], (size, 3))


@pytest.fixture(scope="module")
def echoes() -> tuple[SignalModel, Basis, fit.Dictionary]:
    """Model, basis, and fingerprints to start from."""
    model, theta = Echoes(), parameter_sets(500, 0)
    basis = fp.subspace.fit(model.signal(theta), rank=RANK)
    return model, basis, fit.dictionary(model, basis, theta)


def bars_of(
    echoes: tuple[SignalModel, Basis, fit.Dictionary],
    estimated: tuple[str, ...],
    known: tuple[str, ...] = (),
) -> ErrorBars:
    model, basis, entries = echoes
    return ErrorBars(model, basis, estimated, known, entries, BOUNDS)


def noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """σ of real and imaginary part is 1."""
    return rng.standard_normal((*shape, 2)).view(np.complex128)[..., 0]


@pytest.mark.parametrize(
    ("estimated", "known"),
    [
        (("T1", "T2", "efficiency"), ()),
        (("T2", "T1"), ()),
        (("T2",), ()),
        (("T1",), ("efficiency",)),
        (("T2", "efficiency"), ("T1",)),
    ],
)
def test_at_the_truth_they_are_the_bound_of_all_unknowns(
    echoes: tuple[SignalModel, Basis, fit.Dictionary],
    estimated: tuple[str, ...],
    known: tuple[str, ...],
) -> None:
    model, basis, _ = echoes
    theta = parameter_sets(30, 1)
    out = model.simulate(theta)
    m0 = 3 * np.exp(1j * np.arange(30))
    c = basis.compress(out.signal)
    told = theta[:, [model.index(name) for name in (*estimated, *known)]]
    bars = bars_of(echoes, estimated, known)
    found = bars(m0[:, None] * c, told)
    unknown = [name for name in model.names if name not in known]
    columns = [model.index(name) for name in unknown]
    bound = fp.crb(c, basis.compress(out.jacobian[..., columns]), noise_std=1.0)
    expected = np.sqrt(bound[:, [unknown.index(name) for name in estimated]]) / 3
    # Without noise the others are found to a small part of their own bar in the steps allowed.
    np.testing.assert_allclose(found.std, expected, rtol=1e-3)
    np.testing.assert_allclose(found.m0, m0, rtol=1e-3)
    assert found.residual.max() < 1e-3
    assert bars.degrees == 2 * RANK - 2 - (3 - len(estimated) - len(known))


def test_an_interval_holds_the_truth_as_often_as_it_says(
    echoes: tuple[SignalModel, Basis, fit.Dictionary],
) -> None:
    """Least squares of a model that is nearly linear over the noise is efficient."""
    model, basis, entries = echoes
    size, snr = 4000, 300.0
    theta = np.tile([1.2, 0.08, 0.9], (size, 1))
    c = basis.compress(model.signal(theta[:1]))
    x = c + noise((size, RANK), np.random.default_rng(2)) / snr
    found = fit.LeastSquares(model, basis, start=entries).fit(x)
    for estimated in (("T1", "T2", "efficiency"), ("T2", "T1")):
        columns = [model.index(name) for name in estimated]
        bars = bars_of(echoes, estimated)(x, found.theta[:, columns])
        level = error_bars.noise(x, np.ones(size, dtype=bool), bars.residual, 2 * RANK - 5)
        assert level.source == "residuals"
        # All three were fitted: 11 degrees of freedom. The median of 4000 has a relative
        # standard error of 1.25 √(2/11) / √4000 / 2; allow four.
        assert level.std == pytest.approx(1 / snr, rel=4 * 0.0042)
        held = np.abs(found.theta[:, columns] - theta[:, columns]) < bars.std * level.std
        # erf(1/√2), and four standard errors of a share of 4000.
        np.testing.assert_allclose(held.mean(axis=0), 0.6827, atol=4 * 0.0074)


def test_what_the_model_refuses_is_moved_to_its_bounds_or_has_no_bars(
    echoes: tuple[SignalModel, Basis, fit.Dictionary],
) -> None:
    model, basis, _ = echoes
    x = basis.compress(model.signal(parameter_sets(4, 3)))
    beyond = np.array([[9.0, 0.08], [1.2, -3.0], [1.2, 0.08], [1.2, 0.08]])
    moved = np.clip(beyond, [0.1, 0.01], [5.0, 1.0])
    bars = bars_of(echoes, ("T1", "T2"))
    np.testing.assert_array_equal(bars(x, beyond).std, bars(x, moved).std)
    # A known value is not moved: nobody knows better.
    found = bars_of(echoes, ("T1",), ("T2",))(x, beyond)
    for part in (found.std, found.m0, found.residual):
        np.testing.assert_array_equal(np.isfinite(part).reshape(4), [True, False, True, True])
    # Nor does a voxel without a neighbour stop a volume.
    assert bars(x[:0], beyond[:0]).std.shape == (0, 2)


# σ.


def background(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images of σ = 2 with an object inside of noise."""
    images = 2 * noise((*shape, RANK), np.random.default_rng(4))
    mask = np.zeros(shape, dtype=bool)
    mask[8:-8, 8:-8] = True
    images[mask] += 50
    return images, mask


def test_noise_is_read_off_the_background() -> None:
    images, mask = background((40, 40, 1))
    # Next to the object there is some of it.
    images[7:-7, 7:-7] += 20
    found = noise_of_background(images, mask)
    # The median of |x|² of the 10,000 numbers has a relative error of 1/(√n ln 2), σ half of it.
    assert found == pytest.approx(2, rel=4 * 0.0075)
    level = error_bars.noise(images, mask, np.full(9, 3.0), 10)
    assert (level.source, level.std) == ("background", found)
    assert level.of_residuals == noise_of_residuals(np.full(9, 3.0), 10)
    assert "from the background; the residuals tell" in level.described
    level = error_bars.noise(images, mask, np.full(9, 3.0), 10, given=7.0)
    assert (level.source, level.std) == ("given", 7.0)


@pytest.mark.parametrize("what", ["zeros", "NaN", "signal", "too little"])
def test_a_background_without_noise_tells_nothing(what: str) -> None:
    images, mask = background((40, 40, 1))
    if what == "zeros":
        images[~mask] = 0
    elif what == "NaN":
        images[~mask] = np.nan
    elif what == "signal":
        images[..., 0] += 20 * noise(mask.shape, np.random.default_rng(5))
    else:
        mask[2:-2, 2:-2] = True
    assert noise_of_background(images, mask) is None
    level = error_bars.noise(images, mask, np.full(9, 3.0), 10)
    assert level.source == "residuals" and level.std == level.of_residuals


def test_noise_of_residuals_and_the_limit_of_a_misfit() -> None:
    degrees, size = 11, 100_000
    residual = 2 * np.sqrt(np.random.default_rng(6).chisquare(degrees, size))
    # Relative standard error of the median of √χ²: 1.25 √(1/22) / √n.
    assert noise_of_residuals(residual, degrees) == pytest.approx(2, rel=4 * 8.5e-4)
    # Outliers and voxels without a residual do not count.
    spoiled = np.r_[residual, np.full(1000, 1e6), np.full(1000, np.nan)]
    assert noise_of_residuals(spoiled, degrees) == pytest.approx(2, rel=0.01)
    given = error_bars.Noise(2.0, "given", 2.0)
    limit = given.largest_residual(degrees)
    expected = 1e-3 * size
    assert abs((residual > limit).sum() - expected) < 4 * np.sqrt(expected)
    assert given.largest_residual(degrees, allowance=2.0) == 2 * limit
    # Half as much noise as the residuals show: most voxels are misfits.
    assert (residual > error_bars.Noise(1.0, "given", 2.0).largest_residual(degrees)).mean() > 0.5
    # Without σ there is only the comparison with other voxels.
    own = error_bars.Noise(2.0, "residuals", 2.0)
    assert own.largest_residual(degrees) == pytest.approx(3 * np.median(residual), rel=0.01)
    assert np.isnan(noise_of_residuals(residual[:0], degrees))
    assert np.isnan(noise_of_residuals(residual, 0))
    assert error_bars.Noise(np.nan, "residuals", np.nan).recorded["std"] is None


# Status.


def test_of_several_the_smallest_code_counts() -> None:
    a, b = np.array([[True, False], [True, False]]), np.array([[True, True], [False, False]])
    found = classified({Status.MISFIT: a, Status.AT_BOUND: b})
    np.testing.assert_array_equal(found, [[4, 4], [6, 0]])
    assert counted(found) == {
        "fine": 1,
        "outside_mask": 0,
        "not_finite": 0,
        "not_converged": 0,
        "at_bound": 2,
        "outside_range": 0,
        "misfit": 1,
    }


def test_the_file_of_a_status_has_its_codes(tmp_path: Path) -> None:
    status = np.arange(6, dtype=np.uint8).reshape(3, 2, 1)
    volume = files.Volume(np.ones((3, 2, 1, RANK), np.complex64), np.diag([2.0, 2.0, 3.0, 1.0]))
    path = files.write_status(status, tmp_path, volume=volume, provenance={"loss": "crb"})
    np.testing.assert_array_equal(files.read_status(tmp_path, (3, 2, 1)), status)
    import nibabel

    image = nibabel.load(path)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(image.affine, volume.affine)
    about = files.read_json(tmp_path / "status.json")
    assert about["Codes"]["6"] == "misfit" and len(about["Codes"]) == len(Status)
    assert about["NumberOfVoxels"]["not_finite"] == 1
    with pytest.raises(ValueError, match="X=4"):
        files.read_status(tmp_path, (4, 2, 1))


@pytest.mark.slow
def test_intervals_in_white_matter_hold_the_truth_as_often_as_they_say() -> None:
    """All white matter of the digital brain at SNR 50 where |M0| = 1, the bundled train."""
    pytest.importorskip("nilearn")
    from fisherprint import network
    from fisherprint.experiment import shipped
    from fisherprint.parameters import paper_prior
    from fisherprint.reconstruct import phantom

    trained, rng, sigma = shipped.load(), np.random.default_rng(7), 1 / 50
    model, basis, names = trained.model, trained.basis, trained.model.names
    brain = phantom.digital_brain(files.read_tissue_maps(), names, voxel_size=3.0)
    white = brain.fractions[..., list(brain.tissues).index("white matter")] > 0.95
    theta, m0 = brain.theta[white], brain.m0[white]
    c = basis.compress(model.signal(theta))
    x = m0[:, None] * c + sigma * noise(c.shape, rng)

    prior = paper_prior(names, repetition_time=trained.train.repetition_time)
    limits = prior.distributions
    bounds = {
        p.name: (
            max(p.bounds[0], limits[p.name].low),
            min(p.bounds[1], limits[p.name].high),
        )
        for p in model.parameters
    }
    fingerprints = fit.dictionary(model, basis, prior.sample(2048, rng=rng))
    estimated = tuple(trained.card["estimated"])
    columns = [names.index(name) for name in estimated]
    estimates = np.asarray(network.as_estimator(trained.network)(x), dtype=np.float64)
    bars = error_bars.ErrorBars(model, basis, estimated, (), fingerprints, bounds)
    start = fingerprints.nearest(x, 1)
    start[:, 0, columns] = estimates
    found = fit.LeastSquares(model, basis, start=theta[0], bounds=bounds).fit(
        x, start=start, noise_std=sigma
    )
    for values, std in (
        (estimates, sigma * bars(x, estimates).std),
        (found.theta[:, columns], found.std[:, columns]),
    ):
        held = (np.abs(values - theta[:, columns]) < std).mean(axis=0)
        # 68 % of an unbiased normal estimate; 3700 voxels tell it to 0.8 %.
        assert ((held > 0.63) & (held < 0.73)).all(), held
