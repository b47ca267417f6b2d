"""Dictionary matching: against plain loops, on models with a closed form, and its memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

import fisherprint as fp
from fisherprint import evaluate, fit
from fisherprint.fit import Dictionary, LeastSquares, matching
from fisherprint.models import TorchModel

TIMES = torch.logspace(np.log10(0.03), np.log10(5), 16, dtype=torch.float64)
ECHOES = torch.arange(1, 21, dtype=torch.float64) * 0.01
T1 = fp.Parameter("T1", "$T_1$", "s", (0.05, 10.0), "s")
T2 = fp.Parameter("T2", "$T_2$", "s", (1e-3, 5.0), "ms", 1e3)
EFFICIENCY = fp.Parameter("efficiency", "inversion efficiency", "", (0.0, 1.0))
OFFSET = fp.Parameter("offset", "offset", "", (0.0, 1.0))

MODELS = {
    "inversion recovery": (
        TorchModel(lambda θ: 1 - (1 + θ[1]) * torch.exp(-TIMES / θ[0]), [T1, EFFICIENCY]),
        {"T1": np.geomspace(0.4, 3, 60), "efficiency": np.linspace(0.8, 1, 21)},
    ),
    "multi-echo": (
        TorchModel(lambda θ: torch.exp(-ECHOES / θ[0]) + θ[1], [T2, OFFSET]),
        {"T2": np.geomspace(0.02, 0.3, 60), "offset": np.linspace(0, 0.3, 21)},
    ),
}


def noise(shape, rng):
    return rng.standard_normal((*shape, 2)).view(np.complex128)[..., 0]


@pytest.fixture(scope="module", params=MODELS)
def matched(request):
    model, values = MODELS[request.param]
    theta = fit.grid(model, values)
    basis = fp.subspace.fit(model.signal(theta), rank=6)
    return model, basis, fit.dictionary(model, basis, theta)


def test_the_grid_holds_all_combinations():
    model, _ = MODELS["multi-echo"]
    # Whatever the order in which they are named, columns are the model's.
    got = fit.grid(model, {"offset": [0.0, 0.1], "T2": [0.05, 0.1, 0.2]})
    expected = [[t2, offset] for t2 in (0.05, 0.1, 0.2) for offset in (0.0, 0.1)]
    np.testing.assert_array_equal(got, expected)
    assert fit.grid(model, {"offset": 0.2, "T2": 0.1}).tolist() == [[0.1, 0.2]]


def test_an_entry_finds_itself_whatever_its_scale(matched):
    _, _, entries = matched
    rng = np.random.default_rng(0)
    some = rng.permutation(len(entries.theta))[:200]
    m0 = 1e-3 * noise((200, 1), rng)
    np.testing.assert_array_equal(entries(m0 * entries.coefficients[some]), entries.theta[some])


def test_it_is_the_least_squares_estimate_among_the_entries(matched):
    model, basis, entries = matched
    rng = np.random.default_rng(1)
    clean = basis.compress(model.signal(entries.theta[rng.integers(len(entries.theta), size=12)]))
    x = clean + 0.05 * noise(clean.shape, rng)
    d = basis.compress(model.signal(entries.theta))
    for voxel, found in zip(x, entries.nearest(x, 3), strict=True):
        m0 = (d.conj() @ voxel) / (np.abs(d) ** 2).sum(1)
        residual = np.linalg.norm(voxel - m0[:, None] * d, axis=1)
        np.testing.assert_array_equal(found, entries.theta[np.argsort(residual)[:3]])


def test_cut_in_pieces_it_is_the_same(matched, monkeypatch):
    _, _, entries = matched
    x = noise((5, 4, 6), np.random.default_rng(2))
    whole = entries(x)
    assert whole.shape == (5, 4, 2)
    monkeypatch.setattr(matching, "_PRODUCT_BYTES", 1)
    np.testing.assert_array_equal(entries(x), whole)


def test_unusable_voxels_are_nan(matched):
    _, _, entries = matched
    x = noise((4, 6), np.random.default_rng(3))
    x[1], x[2, 3] = 0, np.inf
    got = entries(x)
    assert np.isnan(got).all(axis=1).tolist() == [False, True, True, False]
    np.testing.assert_array_equal(got[[0, 3]], entries(x[[0, 3]]))


def test_it_is_an_estimator_near_the_bound_and_a_start(matched):
    """With a fine grid it errs as least squares do; from its match the fit ends in the minimum."""
    model, basis, entries = matched
    theta = entries.theta[[300, 640, 905]]
    out = model.simulate(theta)
    c = basis.compress(out.signal)

    class Test:
        names = model.names

    test = Test()
    test.theta, test.coefficients = theta, c
    test.crb = fp.crb(c, basis.compress(out.jacobian))
    # At this level √CRB is some steps of the grid, and its rounding a small share.
    rng = np.random.default_rng(4)
    by_match = evaluate.audit(entries, test, snr=(30,), n_noise=300, rng=rng)
    assert 0.5 < np.median(by_match.shares.variance) < 1.5
    start = LeastSquares(model, basis, start=entries)
    x = c + 0.01 * noise(c.shape, rng)
    from_truth = LeastSquares(model, basis, start=theta).fit(x, start=theta)
    np.testing.assert_allclose(start(x), from_truth.theta, rtol=1e-4)


def test_memory_is_forecast_before_anything_is_simulated(matched, monkeypatch):
    model, basis, entries = matched
    size = len(entries.theta)
    assert fit.forecast(model, basis, 10**7) > 10**7 * 16 * basis.rank
    monkeypatch.setattr(type(model), "signal", lambda *_: pytest.fail("it simulated"))
    with pytest.raises(MemoryError, match="1260 entries of 6 coefficients take"):
        fit.dictionary(model, basis, entries.theta, memory_limit=1e5)
    monkeypatch.undo()
    tracemalloc.start()
    made = fit.dictionary(model, basis, entries.theta)
    made(noise((3000, 6), np.random.default_rng(5)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < fit.forecast(model, basis, size)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, b, e: fit.grid(m, {"T9": [1.0]}), KeyError, "unknown parameter 'T9'"),
        (lambda m, b, e: fit.grid(m, {m.names[0]: [1.0]}), ValueError, "got none of"),
        (lambda m, b, e: e(np.ones((2, 5))), ValueError, r"\(\.\.\., 6\); got \(2, 5\)"),
        (lambda m, b, e: e.nearest(np.ones((2, 6)), 0), ValueError, "expected 1 to 1260"),
        (lambda m, b, e: fit.dictionary(m, b, np.ones((2, 3))), ValueError, r"P=2"),
        (
            lambda m, b, e: Dictionary(m.names, e.theta[:2], np.zeros((2, 6))),
            ValueError,
            "got 2 of 2 without",
        ),
        (lambda m, b, e: Dictionary(m.names, e.theta, e.coefficients[:5]), ValueError, "N=1260"),
    ],
)
def test_what_does_not_fit_is_refused(matched, call, error, message):
    with pytest.raises(error, match=message):
        call(*matched)
