from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_simulate import DECAY_PRIOR, SIZES, Decay

import fisherprint as fp
from fisherprint.models import TorchModel, autograd
from fisherprint.simulate import SPLITS, dataset

TIMES = torch.linspace(0.05, 3, 12, dtype=torch.float64)
T1 = fp.Parameter("T1", "$T_1$", "s", (0.05, 10.0))
OMEGA = fp.Parameter("ω", "$ω$", "rad/s", (-np.inf, np.inf))
R = fp.Parameter("R", "$R$", "1/s", (-np.inf, np.inf))


def recovery(θ):
    """Inversion recovery, off resonance: complex."""
    return (1 - 2 * torch.exp(-TIMES / θ[0])) * torch.exp(1j * θ[1] * TIMES)


def decay(θ):
    return torch.exp(-θ[0] * 0.01 * torch.arange(32))


@pytest.fixture(scope="module")
def model():
    return TorchModel(recovery, [T1, OMEGA])


def theta(size=7):
    rng = np.random.default_rng(0)
    return np.column_stack([rng.uniform(0.3, 3, size), rng.uniform(-5, 5, size)])


def by_hand(θ):
    t, (t1, w) = TIMES.numpy(), θ.T[..., None]
    turn, fall = np.exp(1j * w * t), np.exp(-t / t1)
    signal = (1 - 2 * fall) * turn
    return signal, np.stack([-2 * fall * t / t1**2 * turn, 1j * t * signal], axis=-1)


def test_signal_and_derivatives_are_the_closed_form(model):
    out = model.simulate(theta())
    signal, jacobian = by_hand(theta())
    # Double precision throughout.
    np.testing.assert_allclose(out.signal, signal, atol=1e-14)
    np.testing.assert_allclose(out.jacobian, jacobian, atol=1e-13)
    np.testing.assert_array_equal(model.signal(theta()), out.signal)
    assert out.signal.dtype == out.jacobian.dtype == np.complex128
    assert isinstance(model, fp.SignalModel)
    assert (model.names, model.n_samples, model.index("ω")) == (("T1", "ω"), 12, 1)


def test_the_bound_is_that_of_the_closed_form(model):
    out = model.simulate(theta())
    np.testing.assert_allclose(
        fp.crb(out.signal, out.jacobian), fp.crb(*by_hand(theta())), rtol=1e-10
    )


def test_chunks_do_not_matter(model, monkeypatch):
    whole = model.simulate(theta(50))
    monkeypatch.setattr(autograd, "_CHUNK_BYTES", 16 * 3 * 12 * 8)  # eight at a time
    parts = model.simulate(theta(50))
    np.testing.assert_array_equal(parts.jacobian, whole.jacobian)
    np.testing.assert_array_equal(parts.signal, whole.signal)


def test_a_data_set_is_that_of_the_same_model_in_numpy():
    ours, theirs = (
        dataset(model, DECAY_PRIOR, SIZES, basis=3, seed=1)
        for model in (TorchModel(decay, [R]), Decay())
    )
    for split in SPLITS:
        one, other = ours.samples[split], theirs.samples[split]
        np.testing.assert_array_equal(one.theta, other.theta)
        # exp of two libraries, 1e-16; squared in the basis, and inverted in the bounds.
        np.testing.assert_allclose(one.coefficients, other.coefficients, atol=1e-9)
        np.testing.assert_allclose(one.crb_signal, other.crb_signal, rtol=1e-8)
        np.testing.assert_allclose(one.crb_coefficients, other.crb_coefficients, rtol=1e-6)


def test_a_function_of_a_module_travels(model):
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.signal(theta()), model.signal(theta()))


def test_a_parameter_without_effect_has_no_derivative():
    idle = fp.Parameter("idle", "idle", "", (0.0, 1.0))
    out = TorchModel(decay, [R, idle]).simulate([[3.0, 0.5]])
    np.testing.assert_array_equal(out.jacobian[..., 1], 0)


def test_no_parameter_sets(model):
    out = model.simulate(np.zeros((0, 2)))
    assert (out.signal.shape, out.jacobian.shape) == ((0, 12), (0, 12, 2))


def branching(θ):
    return TIMES if θ[0] > 1 else 2 * TIMES


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda θ: θ[0] ** 2, r"a signal of shape \(T,\), a torch tensor; got the shape \(\)"),
        (lambda θ: torch.outer(θ, TIMES), r"got the shape \(2, 12\)"),
        (lambda θ: 3.0, r"a torch tensor; got 3.0"),
        (lambda θ: TIMES[:0], r"got the shape \(0,\)"),
    ],
)
def test_functions_that_return_no_signal(function, message):
    with pytest.raises(ValueError, match=message):
        TorchModel(function, [T1, OMEGA])


def test_a_function_may_hold_a_matrix_in_double_precision():
    """θ is float64 when the samples are counted, too."""
    A, types = torch.eye(2, dtype=torch.float64), set()

    def function(θ):
        types.add(θ.dtype)
        return torch.exp(-(A @ θ))

    parameters = [fp.Parameter(name, name, "s", (0.1, 2.0)) for name in ("a", "b")]
    model = TorchModel(function, parameters)
    np.testing.assert_allclose(model.signal([[0.5, 1.0]]), np.exp([[-0.5, -1.0]]), rtol=1e-15)
    assert types == {torch.float64}


def test_functions_that_torch_cannot_batch():
    model = TorchModel(branching, [T1, OMEGA])
    with pytest.raises(ValueError, match=r"can batch and differentiate; .*\n.*torch.where"):
        model.simulate(theta())


def test_signals_that_are_not_finite():
    root = TorchModel(lambda θ: torch.sqrt(θ[0] - 0.05) * TIMES, [T1])
    # The signal is 0 there, its derivative infinite.
    assert np.isfinite(root.signal([[0.05]])).all()
    with pytest.raises(ValueError, match=r"NaN or Inf for \{'T1': 0.05\} \(and 0 more\)"):
        root.simulate([[0.05], [1.0]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[20.0, 0.0]], r"T1 must lie in \[0.05, 10.0\] s; got 20.0"),
        ([[1.0, np.nan]], "theta must be finite"),
        ([1.0, 0.0], r"theta must have the axes \(S, P=2\)"),
    ],
)
def test_bad_parameters(model, values, message):
    with pytest.raises(ValueError, match=message):
        model.simulate(values)


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"different names, at least one; got \('T1', 'T1'\)"):
        TorchModel(recovery, [T1, T1])
    with pytest.raises(ValueError, match=r"at least one; got \(\)"):
        TorchModel(recovery, [])


def test_the_physics_loads_no_torch():
    lines = (
        "import sys, fisherprint as fp",
        "from fisherprint import models, simulate, evaluate, maps",
        "assert 'torch' not in sys.modules",
        "models.TorchModel",
        "assert 'torch' in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'TorchModle'"):
        fp.models.TorchModle  # noqa: B018
