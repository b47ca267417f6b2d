from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from fisherprint import evaluate, fisher
from fisherprint.evaluate import audit, loss_over_scales
from fisherprint.train import Samples

N = 300


class Calibrated:
    """A linear problem whose phase and scale an estimator can undo: c = (1, Aθ), both times M0.

    The first coefficient is so large that its noise does not matter: M0 = c[0]/BIG. Least squares
    on the others is then unbiased and efficient, with covariance σ²/|M0|² (AᵀA)⁻¹.
    """

    BIG = 1e6
    A = np.array([[1.0, 0.3], [0.2, 2.0], [0.5, -0.4]])

    def __init__(self, size: int, *, seed: int) -> None:
        theta = np.random.default_rng(seed).uniform(-1, 1, (size, 2))
        crb = np.tile(np.diag(np.linalg.inv(self.A.T @ self.A)), (size, 1))
        c = np.hstack([np.full((size, 1), self.BIG), theta @ self.A.T])
        self.samples = Samples(("a", "b"), c.astype(complex), theta, crb)

    def least_squares(self, c: np.ndarray) -> np.ndarray:
        # Only the real part of c/M0 carries θ.
        signal = (c[..., 1:] / (c[..., :1] / self.BIG)).real
        return signal @ np.linalg.pinv(self.A).T

    def shrunk(self, factor: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda c: factor * self.least_squares(c)


PROBLEM = Calibrated(400, seed=0)
TEST = PROBLEM.samples


@pytest.fixture(scope="module")
def efficient() -> evaluate.Audit:
    return audit(
        PROBLEM.least_squares, TEST, snr=[10, 50], n_noise=N, rng=np.random.default_rng(1)
    )


@pytest.mark.paper("Eq. 5", "§2.7")
def test_an_efficient_estimator_has_no_bias_and_variance_1(efficient: evaluate.Audit) -> None:
    shares = efficient.mean_shares_by_parameter()
    # The mean of N unbiased estimates has bias² = v/N, itself of relative standard deviation √2;
    # the variance about that mean is short of it by v/N. Over S fingerprints, four standard
    # errors.
    S = len(TEST.theta)
    assert np.abs(shares.bias - 1 / N).max() < 4 * np.sqrt(2 / S) / N
    assert np.abs(shares.variance - (1 - 1 / N)).max() < 4 * np.sqrt(2 / (N * S))
    total = efficient.mean_shares()
    np.testing.assert_allclose(total.bias, shares.bias.mean(axis=1))
    np.testing.assert_allclose(total.loss, shares.loss.mean(axis=1))
    # A standard deviation of N draws has relative standard error √(1/2N); five for 1600 of them.
    assert np.abs(efficient.std_ratio - 1).max() < 5 * np.sqrt(1 / (2 * N))


@pytest.mark.paper("Eq. 2", "Eq. 3")
def test_shrinking_trades_variance_for_a_known_bias() -> None:
    factor, snr = 0.8, 20
    result = audit(
        PROBLEM.shrunk(factor), TEST, snr=[snr], n_noise=N, rng=np.random.default_rng(2)
    )
    std = factor * np.sqrt(TEST.crb) / snr
    # Five standard errors of a mean and of a variance of N draws, for 800 of each.
    deviation = np.abs(result.bias[0] - (factor - 1) * TEST.theta)
    assert (deviation < 5 * std / np.sqrt(N)).all()
    assert (np.abs(result.variance[0] / std**2 - 1) < 5 * np.sqrt(2 / N)).all()


@pytest.mark.paper("Eq. 4")
def test_shares_add_up_to_the_loss_of_the_same_draws() -> None:
    seen = []

    def estimator(c: np.ndarray) -> np.ndarray:
        seen.append(PROBLEM.shrunk(0.9)(c))
        return seen[-1]

    result = audit(estimator, TEST, snr=[30], n_noise=20, rng=np.random.default_rng(3))
    estimates = np.concatenate(seen)
    loss = ((estimates - TEST.theta[:, None]) ** 2).mean(axis=1) / (TEST.crb / 30**2)
    # An identity, exact but for rounding.
    np.testing.assert_allclose(result.shares.loss[0], loss, rtol=1e-9)


@pytest.mark.paper("Eq. 1")
def test_an_estimator_drawn_from_the_bound_scores_1_at_every_scale() -> None:
    draws = np.random.default_rng(4)
    truth = TEST.theta[:, None]

    def estimator(c: np.ndarray) -> np.ndarray:
        M0 = np.abs(c[..., :1]) / PROBLEM.BIG
        std = 0.01 / M0 * np.sqrt(TEST.crb[:, None])
        return truth + std * draws.standard_normal((*c.shape[:-1], 2))

    score = loss_over_scales(estimator, TEST, n_noise=50, rng=np.random.default_rng(5))
    assert abs(score.loss - 1) < 4 * score.standard_error
    assert (np.abs(score.loss_by_parameter - 1) < 4 * score.standard_error_by_parameter).all()
    # 400 x 50 squares of normal deviates, of variance 2; the error of the error is 1/√(2 S) = 4 %.
    expected = np.sqrt(2 / (400 * 50))
    np.testing.assert_allclose(score.standard_error_by_parameter, expected, rtol=0.2)
    np.testing.assert_allclose(score.standard_error, expected / np.sqrt(2), rtol=0.2)


def test_every_phase_of_m0_is_met_at_every_scale() -> None:
    seen = []

    def estimator(c: np.ndarray) -> np.ndarray:
        seen.append(c[..., 0].ravel() / PROBLEM.BIG)
        return np.broadcast_to(TEST.theta[:, None], (*c.shape[:-1], 2))

    loss_over_scales(estimator, TEST, n_noise=50, noise_std=1e-9, rng=np.random.default_rng(8))
    m0 = np.concatenate(seen)
    # Means of cos and sin of 20,000 uniform angles: standard error 1/√40000 each.
    assert abs(np.mean(m0 / np.abs(m0))) < 5 / 200
    # Uniform from 0.1 to 1.
    assert np.abs(m0).min() == pytest.approx(0.1, abs=0.01)
    assert np.abs(m0).mean() == pytest.approx(0.55, abs=5 * 0.26 / np.sqrt(m0.size))


def test_scale_range_and_noise_matter_as_in_the_bound() -> None:
    """A fixed error e scores E|M0|² e²/(σ² CRB): for |M0| ~ U(a, b), E|M0|² = (a² + ab + b²)/3."""
    result = loss_over_scales(
        lambda c: np.broadcast_to(TEST.theta[:, None] + 0.1, (*c.shape[:-1], 2)),
        TEST,
        scale_range=(0.5, 2.0),
        noise_std=0.03,
        n_noise=100,
        rng=np.random.default_rng(6),
    )
    expected = (0.25 + 1 + 4) / 3 * 0.01 / (0.03**2 * TEST.crb[0])
    # |M0|² has relative standard deviation 0.65; 40000 draws, five standard errors.
    np.testing.assert_allclose(result.loss_by_parameter, expected, rtol=5 * 0.65 / 200)


def test_noise_and_phase_are_what_snr_says() -> None:
    seen = []

    def estimator(c: np.ndarray) -> np.ndarray:
        seen.append(c)
        return np.zeros((*c.shape[:-1], 2))

    audit(estimator, TEST, snr=[5], n_noise=50, rng=np.random.default_rng(7))
    c = np.concatenate(seen)
    M0 = c[:, :, 0] / PROBLEM.BIG
    phase = np.angle(M0[:, :1])
    # One phase for each fingerprint; noise of 0.2/BIG.
    np.testing.assert_allclose(M0, np.exp(1j * phase) * np.ones(50), atol=1e-5)
    # Mean of 400 unit phasors: standard deviation 1/√400; four of them.
    assert abs(np.exp(1j * phase).mean()) < 4 / 20
    noise = c[:, :, 1:] - np.exp(1j * phase)[..., None] * TEST.coefficients[:, None, 1:]
    for part in (noise.real, noise.imag):
        # Relative standard error of a standard deviation of n draws is √(1/2n); allow four.
        assert abs(part.std() * 5 - 1) < 4 * np.sqrt(1 / (2 * part.size))


def test_parts_do_not_change_the_result(
    monkeypatch: pytest.MonkeyPatch, efficient: evaluate.Audit
) -> None:
    monkeypatch.setattr(evaluate, "_CHUNK", 7 * N * 4)
    lengths = []

    def estimator(c: np.ndarray) -> np.ndarray:
        lengths.append(len(c))
        return PROBLEM.least_squares(c)

    done = []
    result = audit(
        estimator,
        TEST,
        snr=[10, 50],
        n_noise=N,
        progress=lambda *counts: done.append(counts),
        rng=np.random.default_rng(1),
    )
    assert lengths == ([7] * 57 + [1]) * 2
    assert done == [(n, 800) for n in np.cumsum(lengths)]
    # The same draws; products of other sizes may be summed in another order.
    np.testing.assert_allclose(result.bias, efficient.bias, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.variance, efficient.variance, rtol=1e-9)


def test_the_seed_decides(efficient: evaluate.Audit) -> None:
    same, other = (
        audit(PROBLEM.least_squares, TEST, snr=[10, 50], n_noise=N, rng=np.random.default_rng(k))
        for k in (1, 2)
    )
    np.testing.assert_array_equal(same.bias, efficient.bias)
    assert (other.bias != efficient.bias).all()


def test_failures_and_infinite_bounds_are_left_out_and_counted() -> None:
    crb = TEST.crb.copy()
    crb[:40, 1] = np.inf
    test = dataclasses.replace(TEST, crb=crb)

    def estimator(c: np.ndarray) -> np.ndarray:
        estimates = PROBLEM.least_squares(c)
        estimates[:40, :, 1] = 1e6
        estimates[30:50, 3] = np.nan
        estimates[50:60, 5, 0] = np.inf
        return estimates

    result = audit(estimator, test, snr=[10, 20], n_noise=50, rng=np.random.default_rng(8))
    assert result.n_unbounded == 40
    np.testing.assert_array_equal(result.n_failed, [30, 30])
    assert np.isnan(result.bias[:, 30:50]).all()
    assert np.isnan(result.shares.bias[:, :40, 1]).all()
    # 1600 variances of 50 draws each: four standard errors.
    assert np.abs(result.mean_shares().loss - 1).max() < 4 * np.sqrt(2 / (50 * 600))

    score = loss_over_scales(estimator, test, n_noise=50, rng=np.random.default_rng(9))
    assert (score.n_used, score.n_unbounded, score.n_failed) == (340, 40, 20)
    assert abs(score.loss - 1) < 4 * score.standard_error


def test_determined_is_what_the_bound_knows_three_times_better_than_the_prior() -> None:
    # Spread 3, so that √CRB must be below 1: 2 and 0.5 at SNR 1, 0.2 and 0.05 at SNR 10.
    found = evaluate.Audit(
        names=("a",),
        snr=np.array([1.0, 10.0, 0.1]),
        truth=np.array([[0.0], [6.0]]),
        crb=np.array([[4.0], [0.25]]),
        bias=np.ones((3, 2, 1)),
        variance=np.full((3, 2, 1), 2.0),
        n_noise=300,
    )
    wanted = [[False, True], [True, True], [False, False]]
    np.testing.assert_array_equal(found.determined[..., 0], wanted)
    shares = found.mean_determined_shares()
    bias = [1 / 0.25, (1 / 0.04 + 1 / 0.0025) / 2, np.nan]
    np.testing.assert_allclose(shares.bias[:, 0], bias, rtol=1e-12)
    np.testing.assert_allclose(shares.variance[:, 0], 2 * np.array(bias), rtol=1e-12)


def test_nothing_left_is_nan() -> None:
    def hopeless(c: np.ndarray) -> np.ndarray:
        return np.full((*c.shape[:-1], 2), np.nan)

    result = audit(hopeless, TEST, snr=[10], n_noise=2, rng=np.random.default_rng(0))
    assert np.isnan(result.mean_shares().loss).all()
    score = loss_over_scales(hopeless, TEST, rng=np.random.default_rng(0))
    assert np.isnan([score.loss, score.standard_error]).all()
    assert score.n_failed == 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snr": []}, "at least one SNRmax and 2 noise realizations; got 0"),
        ({"snr": [10, 0]}, "SNRmax must be a positive"),
        ({"n_noise": 1}, "2 noise realizations; got 1 and 1"),
    ],
)
def test_audit_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"snr": [10], "n_noise": 2, "rng": np.random.default_rng(0)} | change
    with pytest.raises(ValueError, match=message):
        audit(PROBLEM.least_squares, TEST, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_range": (0.0, 1.0)}, "expected 0 < low ≤ high"),
        ({"n_noise": 0}, "at least 1 noise realization"),
        ({"noise_std": 0.0}, "noise_std must be a positive"),
    ],
)
def test_loss_over_scales_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_over_scales(PROBLEM.least_squares, TEST, rng=np.random.default_rng(0), **change)


def test_an_estimator_of_other_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axes \(S=400, N=2, E=2\); got the shape \(400, 2, 4\)"):
        audit(lambda c: c.real, TEST, snr=[10], n_noise=2, rng=np.random.default_rng(0))


# The prior.


class Prior(NamedTuple):
    """`Calibrated` with a normal prior, and its information with the two columns of M0."""

    samples: Samples
    information: np.ndarray
    covariance: np.ndarray

    def best(self, snr: float) -> Callable[[np.ndarray], np.ndarray]:
        """The posterior mean: least squares, shrunk by F (F + C⁻¹)⁻¹; the prior's mean is 0."""
        F = snr**2 * PROBLEM.A.T @ PROBLEM.A
        gain = np.linalg.solve(F + np.linalg.inv(self.covariance), F)
        return lambda c: PROBLEM.least_squares(c) @ gain.T


@pytest.fixture(scope="module")
def normal() -> Prior:
    covariance = np.array([[1.0, 0.3], [0.3, 0.25]])
    root = np.linalg.cholesky(covariance)
    theta = np.random.default_rng(10).normal(size=(4000, 2)) @ root.T
    signal = np.hstack([np.full((4000, 1), PROBLEM.BIG), theta @ PROBLEM.A.T]).astype(complex)
    jacobian = np.tile(np.vstack([np.zeros(2), PROBLEM.A]).astype(complex), (4000, 1, 1))
    information = fisher.information(signal, jacobian, noise_std=1.0)
    crb = fisher.bounds(information)[:, :2]
    return Prior(Samples(("a", "b"), signal, theta, crb), information, covariance)


def against(
    normal: Prior, estimator: Callable[[np.ndarray], np.ndarray], snr: float
) -> tuple[np.ndarray, np.ndarray]:
    found = audit(estimator, normal.samples, snr=[snr], n_noise=10, rng=np.random.default_rng(11))
    prior = fisher.prior_bounds(normal.information, normal.samples.theta, found.names, snr=[snr])
    ratio, error = dataclasses.replace(found, prior=prior).over_prior_bound()
    return ratio[0], error[0]


@pytest.mark.parametrize("snr", [0.1, 0.6, 3.0])
def test_no_estimator_beats_the_bound_with_the_prior_and_the_posterior_mean_reaches_it(
    normal: Prior, snr: float
) -> None:
    ratio, error = against(normal, normal.best(snr), snr)
    # Its squares have relative standard deviation √2 at most, of 4000 fingerprints: 2 % of the
    # mean, 1 % of its root; as much for the variance of the draws in the bound. Four of both.
    assert (error < 0.0125).all()
    assert np.abs(ratio - 1).max() < 4 * np.hypot(0.011, 0.011)
    # Without bias the data's bound is reached, without the data the prior's spread.
    F, prior = snr**2 * PROBLEM.A.T @ PROBLEM.A, np.linalg.inv(normal.covariance)
    best = np.diag(np.linalg.inv(F + prior))
    for estimator, variance in (
        (PROBLEM.least_squares, np.linalg.inv(F)),
        (PROBLEM.shrunk(0.0), normal.covariance),
    ):
        ratio, error = against(normal, estimator, snr)
        assert (ratio > 1 - 4 * np.hypot(error, 0.011)).all()
        expected = np.sqrt(np.diag(variance) / best)
        np.testing.assert_allclose(ratio, expected, rtol=4 * np.hypot(0.011, 0.011))


def test_errors_count_fingerprints_without_a_bound_but_not_failed_ones() -> None:
    found = evaluate.Audit(
        names=("a",),
        snr=np.array([2.0]),
        truth=np.zeros((4, 1)),
        crb=np.array([[1.0], [4.0], [9.0], [np.inf]]),
        bias=np.array([[[1.0], [np.nan], [3.0], [2.0]]]),
        variance=np.array([[[0.0], [np.nan], [3.0], [4.0]]]),
        n_noise=300,
        prior=fisher.PriorBounds(("a",), np.array([2.0]), np.ones(1), *np.full((2, 1, 1), 5.25)),
    )
    # Squares of 1, 12 and 8: their mean is 7, its standard error √(62/2)/√3 = 3.2146.
    assert found.root_mean_square == pytest.approx(np.sqrt(7))
    ratio, error = found.over_prior_bound()
    assert ratio == pytest.approx(np.sqrt(7 / 5.25))
    assert error == pytest.approx(np.sqrt(7 / 5.25) * np.sqrt(62 / 2 / 3) / 14)
    # One fingerprint has no scatter.
    alone = dataclasses.replace(
        found, bias=np.where(np.arange(4)[:, None] < 1, found.bias, np.nan)
    )
    ratio, error = alone.over_prior_bound()
    assert ratio == pytest.approx(np.sqrt(1 / 5.25)) and np.isnan(error).all()
    # Of 1, 2, 3 and ∞, the middle two: √((4 + 9)/2) over the SNR.
    assert found.median_root_crb() == pytest.approx(np.sqrt(6.5) / 2)


def test_an_audit_without_the_prior_says_how_to_get_it(efficient: evaluate.Audit) -> None:
    with pytest.raises(ValueError, match=r"bounds of the prior; got one without\. Evaluate again"):
        efficient.over_prior_bound()
