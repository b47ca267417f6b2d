"""Non-linear least squares: against scipy, closed forms, the bound, and other ways to the same."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.optimize

import fisherprint as fp
from fisherprint import evaluate, fisher, maps, sequence
from fisherprint.fit import Dictionary, LeastSquares, Reason, least_squares
from fisherprint.fit.least_squares import projected
from fisherprint.fit.minimize import Local, few_steps, minimize
from fisherprint.models import Fingerprints
from fisherprint.models.protocol import Named


class Recovery(Named):
    """The inversion recovery of examples/inversion_recovery.py, by hand."""

    parameters = (
        fp.Parameter("T1", "$T_1$", "s", (0.05, 10.0), "s"),
        fp.Parameter("efficiency", "inversion efficiency", "", (0.0, 1.0)),
    )
    times = np.geomspace(0.03, 5, 16)
    n_samples = 16

    def simulate(self, theta):
        theta = np.asarray(theta)
        t1, efficiency = theta.T[..., None]
        decay = np.exp(-self.times / t1)
        slopes = [-(1 + efficiency) * decay * self.times / t1**2, -decay]
        return Fingerprints(theta, self.signal(theta), np.stack(slopes, axis=-1) + 0j)

    def signal(self, theta):
        t1, efficiency = np.asarray(theta).T[..., None]
        return 1 - (1 + efficiency) * np.exp(-self.times / t1) + 0j


def noise(shape, rng):
    return rng.standard_normal((*shape, 2)).view(np.complex128)[..., 0]


@pytest.fixture(scope="module")
def inversion():
    """Model, basis of 5 coefficients, and 40 parameter sets."""
    model = Recovery()
    rng = np.random.default_rng(0)
    theta = np.column_stack([rng.uniform(0.5, 2.5, 40), rng.uniform(0.8, 0.97, 40)])
    return model, fp.subspace.fit(model.signal(theta), rank=5), theta


@pytest.fixture(scope="module")
def two_pool(short_train):
    """Model, basis of 13 coefficients, and 32 parameter sets of a short train."""
    model = fp.TwoPool(short_train)
    rng = np.random.default_rng(1)
    low = [0.05, 0.8, 0.04, 20.0, 9e-6, -300.0, 0.8]
    high = [0.25, 2.0, 0.12, 60.0, 15e-6, 300.0, 1.1]
    theta = rng.uniform(low, high, (32, 7))
    basis = fp.subspace.fit(model.simulate(theta), rank=13, method="crb-svd")
    return model, basis, theta


# Bounds that the 4.65 rad of the linearized rate and the table of rates allow.
BOUNDS = {
    "m0s": (0.0, 0.6),
    "T1": (0.1, 10.0),
    "T2f": (2e-3, 10.0),
    "Rx": (0.0, 200.0),
    "T2s": (6e-6, 20e-6),
    "B1": (0.3, 1.4),
}


def coefficients(model, basis, theta):
    out = model.simulate(theta)
    return basis.compress(out.signal), basis.compress(out.jacobian)


def root_bound(model, basis, theta, std):
    """√CRB for |M0| = 1, complex M0 unknown."""
    return np.sqrt(fp.crb(*coefficients(model, basis, theta), noise_std=std))


# The minimizer on functions whose minima are published (Moré, Garbow, Hillstrom 1981).


def rosenbrock(x):
    r = np.stack([10 * (x[:, 1] - x[:, 0] ** 2), 1 - x[:, 0]], axis=1)
    J = np.zeros((len(x), 2, 2))
    J[:, 0, 0], J[:, 0, 1], J[:, 1, 0] = -20 * x[:, 0], 10, -1
    return r, J


def brown_and_dennis(x):
    t = np.arange(1, 21) / 5
    a = x[:, :1] + t * x[:, 1:2] - np.exp(t)
    b = x[:, 2:3] + np.sin(t) * x[:, 3:] - np.cos(t)
    J = np.stack([2 * a, 2 * a * t, 2 * b, 2 * b * np.sin(t)], axis=-1)
    return a**2 + b**2, J


def search(function, start, low=-np.inf, high=np.inf, iterations=200):
    start = np.atleast_2d(np.asarray(start, dtype=float))

    def evaluate(x, which):
        assert ((x >= low) & (x <= high)).all()
        r, J = function(x)
        return Local((r**2).sum(1) / 2, (J.mT @ r[..., None])[..., 0], J.mT @ J)

    limits = (np.broadcast_to(limit, start.shape).astype(float) for limit in (low, high))
    return minimize(evaluate, start, *limits, degrees=1, floor=1e-9, iterations=iterations)


def test_a_curved_valley_is_followed_to_its_end():
    # Many at once, each from its own place, some from the minimum itself.
    starts = np.r_[[[-1.2, 1.0], [1.0, 1.0]], np.random.default_rng(0).uniform(-3, 3, (30, 2))]
    found = search(rosenbrock, starts)
    # Zero residual: the last steps converge quadratically.
    np.testing.assert_allclose(found.point, 1, atol=1e-8)
    # No residual is left: the end may be one of rounding.
    assert (found.reason <= Reason.COST).all()
    assert (found.iterations[1], found.reason[1]) == (0, Reason.GRADIENT)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((-5.0, -5.0), (0.5, 5.0), (0.5, 0.25)),
        # With x₂ held at 2, 100 (2 - x²)² + (1 - x)² is least where 200 x (x² - 2) = 1 - x.
        ((-5.0, 2.0), (5.0, 5.0), (np.roots([200, 0, -399, -1])[0], 2.0)),
        ((2.0, -5.0), (5.0, 3.0), (2.0, 3.0)),
    ],
)
def test_a_minimum_at_bounds(low, high, expected):
    found = search(rosenbrock, np.clip([[0.3, 2.5], [4.0, -3.0]], low, high), low, high)
    # Both of them, whatever bounds they met on the way.
    np.testing.assert_allclose(found.point, [expected, expected], atol=1e-6)
    assert (found.reason <= Reason.COST).all()


def test_a_large_residual_needs_its_curvature():
    """Gauss-Newton converges slowly where the residual is large; the secant term mends that."""
    found = search(brown_and_dennis, [25.0, 5.0, -5.0, -1.0])
    # Published with 6 digits.
    assert 2 * found.local.cost[0] == pytest.approx(85822.2, rel=1e-6)
    assert found.reason[0] == Reason.GRADIENT
    # lmder of MINPACK, without the term, takes several hundred evaluations of it.
    assert found.iterations[0] < 60


def test_the_last_iteration_is_the_last():
    found = search(rosenbrock, [-1.2, 1.0], iterations=3)
    assert (found.iterations[0], found.reason[0]) == (3, Reason.ITERATIONS)
    assert found.local.cost[0] < 24.2 / 2  # the start's


# A few steps.


def test_few_steps_solve_what_they_say_and_are_moved_within_the_bounds():
    rng = np.random.default_rng(4)
    J, y, start = rng.standard_normal((9, 3)), rng.standard_normal(9), np.ones((2, 3))

    def evaluate(x, which):
        r = x @ J.T - y
        return Local((r**2).sum(1) / 2, r @ J, np.broadcast_to(J.T @ J, (len(x), 3, 3)))

    expected = np.linalg.lstsq(J, y)[0]
    low = np.array([[-9.0, -9.0, -9.0], [-9.0, -9.0, expected[2] + 0.5]])
    high, none = np.full((2, 3), 9.0), np.zeros((2, 3))
    found = few_steps(evaluate, start, low, high, [none])
    # A linear problem is at its end after one step that is not damped.
    np.testing.assert_allclose(found.point[0], expected, rtol=1e-9)
    # Unlike a search, the others do not follow the one that is moved.
    np.testing.assert_allclose(found.point[1], [*expected[:2], expected[2] + 0.5], rtol=1e-9)
    assert (found.reason == Reason.FEW_STEPS).all() and (found.iterations == 1).all()
    assert Reason.FEW_STEPS.is_converged and not Reason.FEW_STEPS.is_failed

    # Each damped step ends where ½‖r‖² + ½ Σ w (x - where it began)² is smallest.
    weights = [np.array([[0.3, 5.0, 100.0]] * 2), np.array([[40.0, 1e-3, 0.0]] * 2)]
    found = few_steps(evaluate, start, -high, high, weights)
    x = start[0]
    for weight in weights:
        stacked = np.concatenate([J, np.diag(np.sqrt(weight[0]))])
        x = np.linalg.lstsq(stacked, np.concatenate([y, np.sqrt(weight[0]) * x]))[0]
    np.testing.assert_allclose(found.point, [x, x], rtol=1e-9)
    assert (found.iterations == 2).all()


def test_a_step_out_of_the_model_is_no_estimate():
    """A cost that is not finite where a step begins or ends is refused, alone."""

    def evaluate(x, which):
        goal, inside = np.array([1.0, 1.0, 5.0])[which], x[:, 0] < 2
        away = np.where(inside, x[:, 0] - goal, np.nan)[:, None]
        cost = np.where(inside, away[:, 0] ** 2 / 2, np.inf)
        return Local(cost, away, np.where(inside, 1.0, np.nan)[:, None, None])

    start, wide = np.array([[0.0], [3.0], [0.0]]), np.full((3, 1), 9.0)
    found = few_steps(evaluate, start, -wide, wide, [np.zeros((3, 1))] * 2)
    assert found.reason.tolist() == [Reason.FEW_STEPS, Reason.REFUSED, Reason.REFUSED]
    assert found.iterations.tolist() == [2, 0, 1]
    assert found.point[0, 0] == pytest.approx(1, abs=1e-12)


def test_steps_are_damped_by_their_standard_deviations(inversion):
    """In units of parameters and σ, whatever the scale of the coefficients; of several starts."""
    model, basis, theta = inversion
    rng, sigma = np.random.default_rng(6), 0.01
    true = theta[:6]
    starts = np.stack([true * 0.95, true * [1.04, 0.97]], axis=1)
    scales = np.linspace(1, 4, 6)[:, None]
    x = 1j * scales * basis.compress(model.signal(true))
    x = x + sigma * noise((6, basis.rank), rng)
    steps = [{"T1": 0.003, "efficiency": 0.002}, {"T1": 0.01}]
    estimator = LeastSquares(model, basis, start=true[0], noise_std=sigma, steps=steps)
    found = estimator.fit(x, start=starts)

    def closed(begun, steps, free):
        for step in steps:
            c, jacobian = least_squares.simulated(model, basis, begun)
            local = least_squares.projected(x, c, jacobian[..., free])
            inverse = [step.get(model.names[column], np.inf) ** -2.0 for column in free]
            matrix = local.curvature / sigma**2 + np.diag(inverse)
            move = np.linalg.solve(matrix, local.gradient[..., None])[..., 0] / sigma**2
            begun = begun.copy()
            begun[:, free] -= move
        return begun, least_squares.projected(
            x, *least_squares.simulated(model, basis, begun)
        ).cost

    ends, costs = zip(*(closed(starts[:, r], steps, [0, 1]) for r in (0, 1)), strict=True)
    best = np.argmin(costs, axis=0)
    assert set(best) == {0, 1}
    np.testing.assert_allclose(found.theta, np.stack(ends)[best, np.arange(6)], rtol=1e-7)
    free, _ = closed(starts[:, 0], [{}, {}], [0, 1])
    assert np.abs(ends[0] / free - 1).max() > 1e-2
    np.testing.assert_allclose(
        estimator.fit(2 * x, start=starts, noise_std=2 * sigma).theta, found.theta, rtol=1e-9
    )
    # Without damping no σ is needed.
    known = LeastSquares(model, basis, start=true[0], known={"efficiency": 0.9}, steps=[{}])
    begun = np.column_stack([starts[:, 0, 0], np.full(6, 0.9)])
    np.testing.assert_allclose(
        known.fit(x, start=begun).theta, closed(begun, [{}], [0])[0], rtol=1e-7
    )


def test_one_step_from_noisy_starts_is_efficient(inversion):
    """Le Cam: starts as wide as the bound leave its variance, and none of their own bias."""
    model, basis, theta = inversion
    rng, sigma, n = np.random.default_rng(5), 0.002, 400
    c, jacobian = least_squares.simulated(model, basis, theta[:8])
    crb = fisher.bounds(fisher.information(c, jacobian, noise_std=sigma))[:, :2]  # less M0's
    x = np.repeat(c, n, axis=0)
    x = x + sigma * noise(x.shape, rng)
    # Each start misses by one bound in all directions, always the same way, and by noise.
    start = np.repeat(theta[:8] + np.sqrt(crb), n, axis=0)
    start += np.repeat(np.sqrt(crb), n, axis=0) * rng.standard_normal(start.shape)
    estimator = LeastSquares(model, basis, start=theta[0], steps=[{}])
    found = estimator.fit(x, start=start)
    z = (found.theta.reshape(8, n, 2) - theta[:8, None]) / np.sqrt(crb)[:, None]
    # Four standard errors of a mean and of a variance; second order is far below at this noise.
    assert np.abs(z.mean(axis=1)).max() < 4 / np.sqrt(n)
    assert np.abs(z.var(axis=1, ddof=1) - 1).max() < 4 * np.sqrt(2 / n)
    assert found.converged.all() and (found.iterations == 1).all()
    # It is no search: the gradient is not zero there, and the smallest residual lies elsewhere.
    searched = LeastSquares(model, basis, start=theta[0], noise_std=sigma).fit(x, start=start)
    assert (found.residual >= searched.residual * (1 - 1e-9)).all()
    assert (found.residual > searched.residual * (1 + 1e-9)).any()


# Variable projection.


def test_slopes_of_the_projected_sum_are_differences(two_pool):
    model, basis, theta = two_pool
    rng = np.random.default_rng(2)
    x = noise((1, 13), rng) + coefficients(model, basis, theta[:1])[0]
    there = theta[1:2]
    local = projected(x, *coefficients(model, basis, there))

    def cost(θ):
        c = basis.compress(model.signal(θ))[0]
        r = x[0] - c * np.vdot(c, x[0]) / np.vdot(c, c)
        return np.vdot(r, r).real / 2

    assert local.cost[0] == pytest.approx(cost(there), rel=1e-12)
    for p, size in enumerate(there[0]):
        step = np.zeros((1, 7))
        step[0, p] = 1e-4 * abs(size)
        slope = (cost(there + step) - cost(there - step)) / (2 * step[0, p])
        # Central differences err by the square of the step, and by rounding over the step.
        assert local.gradient[0, p] == pytest.approx(slope, rel=1e-5), model.names[p]


def test_its_curvature_is_the_information_with_complex_m0_unknown(two_pool):
    model, basis, theta = two_pool
    c, jacobian = coefficients(model, basis, theta)
    m0 = 0.7 * np.exp(0.4j)
    local = projected(m0 * c, c, jacobian)
    information = fisher.information(m0 * c, m0 * jacobian, noise_std=1.0)
    # By Schur's complement, the inverse of the whole without the rows of M0.
    whole = np.linalg.inv(information)[:, :7, :7]
    scale = np.sqrt(np.diagonal(whole, axis1=1, axis2=2))
    units = scale[:, :, None] * scale[:, None, :]
    # The inverse is as good as the equilibrated condition number allows.
    np.testing.assert_allclose(np.linalg.inv(local.curvature) / units, whole / units, atol=1e-5)


# The fit.


def together(simulate, number):
    """Each of some threads asks for one parameter set; they are simulated at once."""
    turn, wanted, ready, left = threading.Condition(), {}, {}, [number]

    def serve():
        if wanted and len(wanted) == left[0]:
            c, jacobian = simulate(np.array(list(wanted.values())))
            ready.update({key: (c[i], jacobian[i]) for i, key in enumerate(wanted)})
            wanted.clear()
            turn.notify_all()

    def ask(key, theta):
        with turn:
            wanted[key] = theta
            serve()
            turn.wait_for(lambda: key in ready)
            return ready.pop(key)

    def leave():
        with turn:
            left[0] -= 1
            serve()

    return ask, leave


def by_scipy(model, basis, x, start, low, high):
    """Each voxel by scipy's trust region with the exact Jacobian of Golub and Pereyra.

    In flat valleys its trust region shrinks to nothing some 1e-4 √CRB from the minimum (status 3,
    "xtol"). So it searches on from there, in coordinates in which JᵀJ is one.
    """
    ask, leave = together(lambda theta: coefficients(model, basis, theta), len(x))

    def one(k):
        kept = {}

        def at(theta):
            key = theta.tobytes()
            if key not in kept:
                kept.clear()
                kept[key] = ask(k, theta)
            c, jacobian = kept[key]
            energy = np.vdot(c, c).real
            m0 = np.vdot(c, x[k]) / energy
            return c, jacobian, energy, m0, x[k] - m0 * c

        def residual(theta):
            r = at(theta)[-1]
            return np.r_[r.real, r.imag]

        def slopes(theta):
            c, jacobian, energy, m0, r = at(theta)
            along = np.outer(c, c.conj() @ jacobian / energy)
            J = -m0 * (jacobian - along) - np.outer(c, jacobian.conj().T @ r) / energy
            return np.concatenate([J.real, J.imag])

        limit = {"ftol": 1e-15, "xtol": 1e-15, "gtol": 1e-15, "max_nfev": 500}
        room = 1e-9 * np.where(np.isfinite(high - low), high - low, 1)
        try:
            found = scipy.optimize.least_squares(
                residual,
                np.clip(start[k], low + room, high - room),
                jac=slopes,
                bounds=(low, high),
                x_scale="jac",
                **limit,
            )
            # Bounds that hold: scipy stays just inside of them.
            free = (found.x > low + 2 * room) & (found.x < high - 2 * room)
            # Where nothing tells a parameter there are no such coordinates.
            size = np.linalg.norm(found.jac, axis=0) * np.where(room > 0, room, 1)
            free &= size > 1e-6 * size.max()
            steps = np.zeros((len(low), free.sum()))
            steps[free] = np.linalg.inv(np.linalg.qr(found.jac[:, free])[1])

            def place(z):
                return np.clip(found.x + steps @ z, low, high)

            on = scipy.optimize.least_squares(
                lambda z: residual(place(z)),
                np.zeros(free.sum()),
                jac=lambda z: slopes(place(z)) @ steps,
                **limit,
            )
            if on.cost <= found.cost:
                found.x, found.cost = place(on.x), on.cost
            return found
        finally:
            leave()

    with ThreadPoolExecutor(len(x)) as pool:
        return list(pool.map(one, range(len(x))))


def compared(model, basis, theta, std, rng):
    """Largest difference to scipy's estimates in √CRB, and ours less its cost, by voxel.

    √CRB where the estimates are: the valley that rounding blurs is the one there, and may be ten
    times as flat as at the truth.
    """
    x = coefficients(model, basis, theta)[0] * np.exp(2j * np.pi * rng.random((len(theta), 1)))
    x += std * noise(x.shape, rng)
    estimator = LeastSquares(model, basis, start=theta[0], bounds=BOUNDS)
    ours = estimator.fit(x, start=theta)
    root = root_bound(model, basis, ours.theta, std)
    low, high = estimator._limits
    theirs = by_scipy(model, basis, x, theta, low, high)
    difference = np.abs(ours.theta - [found.x for found in theirs]) / root
    # Scipy stays just inside of bounds; at m0s = 0 nothing tells Rx and T2s.
    free = ours["m0s"] < 1e-9
    difference[np.ix_(free, [model.index("Rx"), model.index("T2s")])] = 0
    lower = ours.residual**2 / 2 - [found.cost for found in theirs]
    return difference.max(axis=1), lower, ours


@pytest.mark.paper("§2.8")
def test_the_optimum_is_that_of_scipy(two_pool):
    model, basis, theta = two_pool
    # A short train tells little: without much noise the minimum is one.
    difference, lower, ours = compared(model, basis, theta, 2e-5, np.random.default_rng(3))
    assert ours.converged.all()
    same = difference < 1e-4
    assert same.mean() > 0.95
    assert (lower[~same] < 0).all()


@pytest.mark.slow
def test_200_voxels_of_the_bundled_train_against_scipy():
    """Of the whole prior, at a signal-to-noise ratio where there is mostly one minimum nearby.

    How often there is another, and at which ratio: docs/decisions/032-local-minima.md.
    """
    train = sequence.bundled()
    model = fp.TwoPool(train)
    prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
    rng = np.random.default_rng(4)
    basis = fp.subspace.fit(
        (model.simulate(prior.sample(128, rng=rng)) for _ in range(16)), rank=13, method="crb-svd"
    )
    difference, lower, _ = compared(model, basis, prior.sample(200, rng=rng), 5e-3, rng)
    same = difference < 1e-4
    assert same.mean() >= 0.99
    assert (lower[~same] < 0).mean() >= 0.5


def test_without_noise_the_truth_comes_back(two_pool):
    model, basis, theta = two_pool
    rng = np.random.default_rng(5)
    m0 = noise((len(theta),), rng)
    x = m0[:, None] * coefficients(model, basis, theta)[0]
    estimator = LeastSquares(model, basis, start=theta[0], bounds=BOUNDS)
    found = estimator.fit(x, start=theta * rng.uniform(0.97, 1.03, theta.shape))
    root = root_bound(model, basis, theta, 1e-6)
    # The search stops within 2e-6 of the noise that is believed, 1e-6 of the norm.
    assert (np.abs(found.theta - theta) < 1e-3 * root).all()
    np.testing.assert_allclose(found.m0, m0, rtol=1e-6)
    assert (found.residual < 1e-9 * np.linalg.norm(x, axis=1)).all()
    assert found.converged.all()


def test_where_noise_leaves_no_macromolecules_it_is_the_fit_without(two_pool):
    """At the bound m0s = 0 the other parameters are those of a fit with m0s known to be 0."""
    model, basis, theta = two_pool
    theta = theta.copy()
    theta[:, 0] = 0
    rng = np.random.default_rng(6)
    x = coefficients(model, basis, theta)[0]
    x += 1e-5 * noise(x.shape, rng)
    found = LeastSquares(model, basis, start=theta[0], bounds=BOUNDS).fit(x, start=theta + 1e-9)
    # Started so near, a search may end before it touches: processors differ in which ones do.
    at_bound = found["m0s"] < 1e-11
    assert 8 < at_bound.sum() < 24  # half of them, for noise has no side
    without = LeastSquares(model, basis, start=theta[0], known={"m0s": 0.0}, bounds=BOUNDS)
    other = without.fit(x[at_bound], start=theta[at_bound])
    seen = [model.index(name) for name in ("T1", "T2f", "B0", "B1")]
    np.testing.assert_allclose(found.theta[at_bound][:, seen], other.theta[:, seen], rtol=1e-5)
    at_bound = found["m0s"] == 0
    assert at_bound.any()
    variance = np.diagonal(found.covariance, axis1=1, axis2=2)[at_bound]
    assert np.isinf(variance[:, model.index("Rx")]).all()
    assert np.isfinite(variance[:, seen]).all()
    # Limits are all that tells Rx there: a uniform distribution between them.
    low, high = BOUNDS["Rx"]
    spread = (high - low) / np.sqrt(12)
    np.testing.assert_allclose(found.std[at_bound][:, model.index("Rx")], spread, rtol=1e-6)


def test_it_is_efficient_and_knows_its_error(inversion):
    """Many noise realizations: no bias, the variance of the bound, errors as announced."""
    model, basis, theta = inversion
    n, std = 400, 0.01
    theta = theta[:5]
    x = coefficients(model, basis, theta)[0].repeat(n, axis=0)
    x = x + std * noise(x.shape, np.random.default_rng(7))
    found = LeastSquares(model, basis, start=[1.0, 0.9]).fit(x)
    root = root_bound(model, basis, theta, std)
    error = (found.theta.reshape(5, n, 2) - theta[:, None]) / root[:, None]
    # Four standard errors of each; at this noise the model is linear to a few percent of √CRB.
    assert np.abs(error.mean(axis=1)).max() < 4 / np.sqrt(n) + 0.05
    assert np.abs(error.var(axis=1) - 1).max() < 4 * np.sqrt(2 / n)
    # σ² of the residual has 2·5 - 2 - 2 = 6 degrees of freedom: its mean is unbiased, with a
    # relative standard error of √(2/6/2000); the bend of the model costs some more.
    assert np.mean(found.noise_std**2) / std**2 == pytest.approx(1, abs=4 * np.sqrt(2 / 6 / 2000))
    given = LeastSquares(model, basis, start=[1.0, 0.9]).fit(x, noise_std=std)
    assert np.median(given.std / root.repeat(n, axis=0)) == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(given.theta, found.theta)


@pytest.mark.parametrize("known", [{}, {"B0": 100.0, "B1": 0.95}])
def test_the_covariance_is_the_inverse_information(two_pool, white_matter, known):
    model, basis, _ = two_pool
    theta = white_matter[None]
    m0, std = 2 - 1j, 1e-4
    c, jacobian = coefficients(model, basis, theta)
    x = m0 * c
    estimator = LeastSquares(model, basis, start=white_matter, known=known, bounds=BOUNDS)
    found = estimator.fit(x, noise_std=std)
    free = [column for column, name in enumerate(model.names) if name not in known]
    information = fisher.information(m0 * c, m0 * jacobian[..., free], noise_std=std)
    inverse = np.linalg.inv(information)[0][: len(free), : len(free)]
    units = np.outer(*[np.sqrt(np.diagonal(inverse))] * 2)
    got = found.covariance[0][np.ix_(free, free)]
    # As good as the equilibrated condition number allows.
    np.testing.assert_allclose(got / units, inverse / units, atol=1e-5)
    for name in known:
        column = model.index(name)
        assert not found.covariance[0][column].any() and not found.covariance[0][:, column].any()
    assert estimator(x).shape == (1, len(free))


def test_known_parameters_by_value_and_by_map(inversion):
    """With the efficiency known T1 is the minimum along a line, voxel by voxel."""
    model, basis, theta = inversion
    rng = np.random.default_rng(8)
    x = coefficients(model, basis, theta)[0]
    x = x + 0.02 * noise(x.shape, rng)
    efficiency = rng.uniform(0.8, 1.0, len(theta))

    def expected(k, value):
        def cost(t1):
            c = basis.compress(model.signal([[t1, value]]))[0]
            return np.linalg.norm(x[k] - c * np.vdot(c, x[k]) / np.vdot(c, c)) ** 2

        return scipy.optimize.minimize_scalar(cost, bounds=(0.2, 6), options={"xatol": 1e-9}).x

    by_map = LeastSquares(model, basis, start=[1.0, 0.5], inputs=["efficiency"])
    got = by_map(np.column_stack([x, efficiency]))
    assert got.shape == (40, 1)
    some = slice(0, 6)
    # A parabola cannot be told from its minimum closer than the root of the rounding.
    np.testing.assert_allclose(
        got[some, 0], [expected(k, efficiency[k]) for k in range(6)], rtol=1e-6
    )
    # From several starts, and from those that are most alike, each voxel keeps its own value.
    entries = Dictionary(model.names, theta, coefficients(model, basis, theta)[0])
    for start in ([[1.0, 0.5], [3.0, 0.7]], entries):
        from_others = LeastSquares(model, basis, start=start, inputs=["efficiency"])
        # Where a search ends depends on where it began, within decision 031's 1e-6 √CRB.
        np.testing.assert_allclose(from_others(np.column_stack([x, efficiency])), got, rtol=1e-6)
    by_value = LeastSquares(model, basis, start=[1.0, 0.5], known={"efficiency": 0.9})
    np.testing.assert_allclose(by_value(x[some])[:, 0], [expected(k, 0.9) for k in range(6)],
                               rtol=1e-6)  # fmt: skip
    np.testing.assert_array_equal(by_value.fit(x[some])["efficiency"], 0.9)


class Beat(Named):
    """exp(iωt): sums of squares over ω have many minima. It refuses ω between 4 and 5."""

    parameters = (fp.Parameter("ω", "$ω$", "rad/s", (-20.0, 20.0)),)
    times = np.linspace(0, 1, 24)

    n_samples = 24

    def simulate(self, theta):
        signal = self.signal(theta)
        return Fingerprints(np.asarray(theta), signal, (1j * self.times * signal)[..., None])

    def signal(self, theta):
        theta = np.asarray(theta)
        if (np.abs(theta - 4.5) < 0.5).any():
            raise ValueError("expected ω outside of [4, 5] rad/s.")
        return np.exp(1j * theta * self.times)


@pytest.fixture(scope="module")
def beat():
    model = Beat()
    assert isinstance(model, fp.SignalModel)
    omega = np.linspace(-16, 16, 60)
    basis = fp.subspace.fit(model.signal(omega[np.abs(omega - 4.5) > 0.5][:, None]), rank=12)
    return model, basis


def test_of_several_starts_the_best_counts(beat):
    model, basis = beat
    truth = np.array([[-15.0], [0.0], [15.0]])
    x = basis.compress(model.signal(truth))
    starts = truth + 0.5
    many = LeastSquares(model, basis, start=starts)(x)
    np.testing.assert_allclose(many, truth, atol=1e-6)
    for start in starts:
        one = LeastSquares(model, basis, start=start)(x)
        # Further than the first zero of the sinc, 2π, other minima are in the way.
        assert (np.abs(one - truth) > 0.1).sum() >= 1
    # The same by a function, and by what is given with the voxels.
    by_voxel = np.broadcast_to(starts, (3, 3, 1))
    function = LeastSquares(model, basis, start=lambda given: by_voxel[: len(given)])
    np.testing.assert_array_equal(function(x), many)
    given = LeastSquares(model, basis, start=starts[0]).fit(x, start=truth + 0.3)
    np.testing.assert_allclose(given.theta, truth, atol=1e-6)


def test_a_bad_voxel_fails_alone(beat):
    model, basis = beat
    truth = np.linspace(-15, 3, 12)[:, None]
    x = basis.compress(model.signal(truth))
    start = truth + 0.2
    whole = LeastSquares(model, basis, start=start[0]).fit(x, start=start)
    spoiled, starts = x.copy(), start.copy()
    spoiled[1], spoiled[4, 3], starts[6], starts[9] = 0, np.nan, 4.4, np.nan
    found = LeastSquares(model, basis, start=start[0]).fit(spoiled, start=starts)
    expected = np.zeros(12)
    expected[[1, 4]], expected[[6, 9]] = Reason.NO_SIGNAL, Reason.REFUSED
    np.testing.assert_array_equal(found.reason, expected)
    good = expected == 0
    np.testing.assert_allclose(found.theta[good], whole.theta[good], atol=1e-12)
    np.testing.assert_allclose(found.theta[good], truth[good], atol=1e-6)
    for values in (found.theta, found.m0, found.residual, found.covariance, found.noise_std):
        assert np.isnan(values[~good]).all() and np.isfinite(values[good]).all()
    np.testing.assert_array_equal(found.converged, good)
    # On its way a search may meet what the model refuses: it goes no further.
    through = LeastSquares(model, basis, start=[3.9]).fit(basis.compress(model.signal([[5.5]])))
    assert through.theta[0, 0] < 4 or through.theta[0, 0] > 5


def test_a_volume_without_signal_is_no_error(beat):
    found = LeastSquares(*beat, start=[0.0]).fit(np.zeros((3, 12), complex))
    assert (found.reason == Reason.NO_SIGNAL).all()
    assert LeastSquares(*beat, start=[0.0])(np.zeros((0, 12), complex)).shape == (0, 1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_the_scale_of_the_coefficients_does_not_matter(inversion, scale):
    model, basis, theta = inversion
    x = coefficients(model, basis, theta)[0]
    x = x + 0.02 * noise(x.shape, np.random.default_rng(9))
    one, other = (LeastSquares(model, basis, start=[1.0, 0.9]).fit(s * x) for s in (1.0, scale))
    np.testing.assert_allclose(other.theta, one.theta, rtol=1e-9)
    np.testing.assert_allclose(other.std, one.std, rtol=1e-6)
    np.testing.assert_allclose(other.m0, scale * one.m0, rtol=1e-9)
    np.testing.assert_allclose(other.residual, scale * one.residual, rtol=1e-9)


def test_cut_in_pieces_it_is_the_same(inversion, monkeypatch):
    model, basis, theta = inversion
    x = coefficients(model, basis, theta)[0]
    x = x + 0.02 * noise(x.shape, np.random.default_rng(10))
    whole = LeastSquares(model, basis, start=[1.0, 0.9]).fit(x)
    monkeypatch.setattr(least_squares, "_VOXELS", 7)
    monkeypatch.setattr(least_squares, "_BATCH_MULTIPLE", 3)
    monkeypatch.setattr(least_squares, "_BATCH_BYTES", 1)
    pieces = LeastSquares(model, basis, start=[1.0, 0.9]).fit(x)
    # Batches round differently.
    np.testing.assert_allclose(pieces.theta, whole.theta, rtol=1e-9)
    short = LeastSquares(model, basis, start=[1.0, 0.9]).fit(x, iterations=1)
    assert (short.reason == Reason.ITERATIONS).any() and not short.converged.all()
    assert np.isfinite(short.theta).all()


def test_it_is_an_estimator_for_audits_and_maps(inversion):
    model, basis, theta = inversion

    class Test:
        names = ("efficiency", "T1")

    truth = theta[:6, ::-1]
    test = Test()
    test.theta, test.coefficients = truth, coefficients(model, basis, theta[:6])[0]
    test.crb = root_bound(model, basis, theta[:6], 1.0)[:, ::-1] ** 2
    estimator = LeastSquares(model, basis, start=[1.0, 0.9], estimated=("efficiency", "T1"))
    audit = evaluate.audit(estimator, test, snr=(100,), n_noise=100, rng=np.random.default_rng(11))
    # 12 shares of relative standard error √(2/100): four of those of their mean.
    assert audit.mean_shares().variance[0] == pytest.approx(1, abs=4 * np.sqrt(2 / 100 / 12))
    volume = test.coefficients.reshape(2, 3, 5)
    result = maps.estimate_maps(volume, estimator, estimator.estimated, mask=np.ones((2, 3), bool))
    np.testing.assert_allclose(result["T1"], truth[:, 1].reshape(2, 3), rtol=1e-6)
    assert result.n_failed == 0
    again = pickle.loads(pickle.dumps(estimator))  # as to other processes
    np.testing.assert_array_equal(again(volume), estimator(volume))


# With a prior


def test_the_most_probable_estimate_is_that_of_scipy(inversion):
    """The same sum with the prior's squares as residuals, and M0 as two more unknowns."""
    model, basis, theta = inversion
    std, prior = 0.05, {"T1": (1.2, 0.3), "efficiency": (0.9, 0.02)}
    x = coefficients(model, basis, theta)[0]
    x = 3j * (x + std * noise(x.shape, np.random.default_rng(12)))
    estimator = LeastSquares(model, basis, start=[1.0, 0.9], prior=prior, noise_std=3 * std)
    found = estimator.fit(x)

    def residuals(unknown, voxel):
        theta, m0 = unknown[:2], complex(*unknown[2:])
        r = (voxel - m0 * basis.compress(model.signal(theta[None]))[0]) / (3 * std)
        return np.r_[r.real, r.imag, (theta[0] - 1.2) / 0.3, (theta[1] - 0.9) / 0.02]

    for k, voxel in enumerate(x):
        best = scipy.optimize.least_squares(
            residuals,
            [1.0, 0.9, 0.0, 3.0],
            args=(voxel,),
            bounds=([0.05, 0.0, -np.inf, -np.inf], [10.0, 1.0, np.inf, np.inf]),
            x_scale=[1.0, 0.1, 3.0, 3.0],
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-14),
        )
        # Differences of two points leave scipy's slopes 1e-8 off, and a bound its own margin.
        np.testing.assert_allclose(found.theta[k], best.x[:2], atol=1e-4 * 0.02)
        np.testing.assert_allclose(found.m0[k], complex(*best.x[2:]), rtol=1e-4)
        # The residual is that of the signal alone.
        misfit = 3 * std * np.linalg.norm(residuals(best.x, voxel)[:-2])
        assert found.residual[k] == pytest.approx(misfit, rel=1e-4)
    np.testing.assert_array_equal(estimator(x), found.theta)
    # Twice the noise with twice the M0 is the same voxel.
    np.testing.assert_allclose(estimator.fit(2 * x, noise_std=6 * std).theta, found.theta, 1e-6)


def test_over_the_prior_errors_are_as_announced(inversion):
    """Parameters from the prior, then noise: the mean square error is the announced variance."""
    model, basis, _ = inversion
    rng = np.random.default_rng(13)
    mean, spread, std, n = np.array([1.2, 0.88]), np.array([0.1, 0.04]), 0.1, 4000
    theta = mean + spread * rng.standard_normal((n, 2))
    x = coefficients(model, basis, theta)[0]
    x = x + std * noise(x.shape, rng)
    arguments = {"start": mean, "noise_std": std}
    prior = dict(zip(model.names, zip(mean, spread, strict=True), strict=True))
    found = LeastSquares(model, basis, prior=prior, **arguments).fit(x)
    ratio = np.mean((found.theta - theta) ** 2, axis=0) / np.mean(found.std**2, axis=0)
    # Four standard errors √(2/n), and what a bent model costs where noise is as wide as the prior.
    np.testing.assert_allclose(ratio, 1, atol=4 * np.sqrt(2 / n) + 0.05)
    np.testing.assert_allclose(found.std**2, np.diagonal(found.covariance, 0, 1, 2), rtol=1e-9)
    # The data alone do worse, by more than that.
    alone = LeastSquares(model, basis, **arguments).fit(x)
    assert (
        np.mean((alone.theta - theta) ** 2, axis=0) > 1.3 * np.mean(found.std**2, axis=0)
    ).all()


def test_what_the_signal_does_not_tell_the_prior_does(two_pool):
    """Without macromolecules Rx and T2s have no effect: the estimate is what was known before."""
    model, basis, theta = two_pool
    none = theta[:8].copy()
    none[:, 0] = 0
    x = coefficients(model, basis, none)[0]
    prior = {"m0s": (0.0, 1e-9), "Rx": (44.0, 20.0), "T2s": (12e-6, 3e-6)}
    estimator = LeastSquares(
        model, basis, start=theta[0], bounds=BOUNDS, prior=prior, noise_std=1e-3
    )
    found = estimator.fit(x, start=none)
    for name in ("Rx", "T2s"):
        mean, std = prior[name]
        np.testing.assert_allclose(found[name], mean, rtol=1e-4)
        np.testing.assert_allclose(found.std[:, model.index(name)], std, rtol=1e-4)
    np.testing.assert_allclose(found["T1"], none[:, 1], rtol=1e-4)


def test_a_wide_prior_says_nothing(two_pool):
    model, basis, theta = two_pool
    x = coefficients(model, basis, theta)[0]
    x = x + 1e-4 * noise(x.shape, np.random.default_rng(14))
    prior = dict.fromkeys(model.names, (1.0, 1000000.0))
    without = LeastSquares(model, basis, start=theta[0], bounds=BOUNDS)
    weighed = LeastSquares(
        model, basis, start=theta[0], bounds=BOUNDS, prior=prior, noise_std=1e-4
    )
    one, other = (e.fit(x, start=theta, noise_std=1e-4) for e in (without, weighed))
    units = np.sqrt(np.diagonal(one.covariance, axis1=1, axis2=2))
    # Where a search ends (decision 031), and rounding in its steps.
    assert np.median(np.abs(one.theta - other.theta) / units) < 1e-5
    np.testing.assert_allclose(other.residual, one.residual, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"known": {"T3": 1.0}}, KeyError, "known are T1, efficiency"),
        ({"inputs": ["T3"]}, KeyError, "known are T1, efficiency"),
        ({"bounds": {"T3": (0, 1)}}, KeyError, "known are T1, efficiency"),
        ({"estimated": ["T3"]}, KeyError, "unknown parameter"),
        ({"estimated": ["T1"], "known": {"T1": 1.0}}, KeyError, "known are efficiency"),
        ({"estimated": ["T1", "T1"]}, ValueError, "each estimated parameter once; got T1, T1"),
        ({"known": {"T1": 20.0}}, ValueError, r"expected T1 in \[0.05, 10\]; got 20"),
        ({"known": {"T1": 1.0}, "inputs": ["T1"]}, ValueError, "each known parameter once"),
        ({"inputs": ["T1", "efficiency"]}, ValueError, "not all of T1, efficiency"),
        ({"bounds": {"T1": (3, 1)}}, ValueError, r"got \[3, 1\]. Check their order"),
        ({"bounds": {"T1": (0.01, 1)}}, ValueError, r"within the model's \[0.05, 10\]"),
        ({"start": [1.0]}, ValueError, r"\(P=2\); got the shape \(1,\)"),
        ({"start": np.ones((2, 2, 2))}, ValueError, "the start must have the axes"),
        ({"prior": {"T3": (1.0, 1.0)}}, KeyError, "known are T1, efficiency"),
        ({"prior": {"T1": (1.0, 1.0)}, "known": {"T1": 1.0}}, KeyError, "known are efficiency"),
        ({"prior": {"T1": (1.0, 0.5)}}, ValueError, "expected a noise_std, against which"),
        ({"prior": {"T1": (1.0, 0.0)}}, ValueError, "standard deviation of T1's prior must be"),
        ({"prior": {"T1": (np.nan, 1.0)}}, ValueError, "mean of T1's prior must be finite"),
        ({"steps": [{}, {"T3": 1.0}]}, KeyError, "known are T1, efficiency"),
        ({"steps": [{"T1": 0.0}], "noise_std": 1.0}, ValueError, "deviation of T1 in a step must"),
        ({"steps": [{"T1": 1.0}]}, ValueError, "against which the damping of steps weighs; got"),
        ({"noise_std": -1.0}, ValueError, "noise_std must be a positive"),
        ({"basis": fp.Basis(np.eye(9, 3))}, ValueError, "model's 16 time points; got 9"),
    ],
)
def test_what_cannot_be_is_refused(inversion, change, error, message):
    model, basis, _ = inversion
    arguments = {"basis": basis, "start": [1.0, 0.9]} | change
    with pytest.raises(error, match=message):
        LeastSquares(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"given": np.ones((3, 4), complex)}, r"\(V, K \+ n=5\); got the shape \(3, 4\)"),
        ({"start": np.ones((2, 2))}, r"\(V=3, R, P=2\)"),
        ({"noise_std": 0.0}, "positive noise_std; got 0"),
        ({"noise_std": [1.0, np.nan, 1.0]}, "positive noise_std; got nan"),
    ],
)
def test_what_does_not_fit_is_refused(inversion, arguments, message):
    model, basis, _ = inversion
    given = {"given": np.ones((3, 5), complex)} | arguments
    with pytest.raises(ValueError, match=message):
        LeastSquares(model, basis, start=[1.0, 0.9]).fit(**given)


def test_too_few_coefficients_tell_no_noise(inversion):
    """Two complex coefficients fit two parameters and M0 exactly: nothing is left for σ."""
    model, basis, theta = inversion
    two = fp.Basis(basis.vectors[:, :2])
    estimator = LeastSquares(model, two, start=[1.0, 0.9], known={"efficiency": 0.9})
    one = LeastSquares(model, two, start=[1.0, 0.9])
    x = two.compress(model.signal(theta[:3]))
    assert np.isnan(one.fit(x).std).all()
    assert np.isfinite(estimator.fit(x).std).all()
