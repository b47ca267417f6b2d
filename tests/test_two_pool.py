import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

import fisherprint as fp
from fisherprint import _threads
from fisherprint.models import SinglePool, cycle, kernels, lineshape

APPARENT = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
SEPARATE = ("m0s", "T1f", "T2f", "Rx", "T1s", "T2s", "B0", "B1")
TIMES = [1, 2, 4]
ONE_POOL = {"T1": 1.3, "T2": 0.08, "B0": 80.0, "B1": 1.05}


def from_rates(rates):
    """m0s, R1f, R2f, Rx, R1s, T2s, B0, B1 to the same with times."""
    theta = np.atleast_2d(np.array(rates, dtype=float))
    theta[:, TIMES] = 1 / theta[:, TIMES]
    return theta


@pytest.fixture(scope="module")
def golden(data):
    with np.load(data / "golden" / "signals.npz") as file:
        return dict(file)


def relative(got, expected):
    """Norm of the deviation over time, relative to the norm."""
    return np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.paper("§2.3")
def test_golden_signals_and_derivatives(golden, paper_train):
    model = fp.TwoPool(paper_train, SEPARATE)
    theta = from_rates(golden["parameters"])
    out = model.simulate(theta)
    # Required; reached: 1.1e-10.
    assert relative(out.signal, golden["signal"]).max() < 1e-6
    by_rate = out.jacobian.copy()
    by_rate[:, :, TIMES] *= -(theta[:, None, TIMES] ** 2)
    expected = golden["dsignal"].transpose(0, 2, 1)
    norms = np.linalg.norm(expected, axis=1)
    deviation = np.linalg.norm(by_rate - expected, axis=1)
    # At m0s = 0 three derivatives vanish; there, rounding alone may remain.
    assert (deviation[norms == 0] < 1e-12).all()
    assert (deviation[norms > 0] / norms[norms > 0]).max() < 1e-5


def test_published_signal_values(paper_train):
    model = fp.TwoPool(paper_train, SEPARATE)
    theta = from_rates(
        [[0.15, 0.5, 15, 30, 3, 10e-6, 0, 1], [0.15, 0.5, 17, 30, 3, 12e-6, 100, 0.9]]
    )
    signal = model.signal(theta)
    # Eight decimals are given, but with rates of the semi-solid pool that differ by 1e-6: the
    # golden file, to which we agree to 1e-10, is 1.2e-7 off them too.
    np.testing.assert_allclose(signal[0, :3], [-0.35590021, -0.25879679, -0.14199183], atol=3e-7)
    np.testing.assert_allclose(signal[0, -1], 0.37508414, atol=3e-7)
    np.testing.assert_allclose(
        signal[1, [0, -1]], [-0.32521709 + 0.00938911j, 0.35381319 + 0.01021469j], atol=3e-7
    )


@pytest.mark.parametrize("inversion", ["crushed", "spoiled"])
def test_agrees_with_slow_oracle(short_train, white_matter, inversion):
    train = fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration, 3.5e-3, inversion)
    m0s, T1, T2f, Rx, T2s, B0, B1 = white_matter
    tissue = {
        "m0s": m0s,
        "R1f": 1 / T1,
        "R2f": 1 / T2f,
        "Rx": Rx,
        "R1s": 1 / T1,
        "T2s": T2s,
        "B0": B0,
        "B1": B1,
    }
    angle, duration = train.flip_angle[0], train.pulse_duration[0]
    expected = oracles.two_pool_signal(
        tissue,
        angle,
        duration,
        3.5e-3,
        inversion,
        r2sl=lineshape.linearized_rate(duration, B1 * angle, T2s).value,
    )
    # Series of the pulses: 2e-10 a step; the oracle repeats to 1e-13.
    np.testing.assert_allclose(fp.TwoPool(train).signal([white_matter])[0], expected, atol=1e-9)


def test_one_pulse_of_the_published_doctest():
    # MRIgeneralizedBloch.jl: π pulse of 500 µs, given R2sl = 1e5/s; here through the oracle's H.
    m0s, R1f, R2f, Rx, R1s, rate, w1 = 0.1, 1, 15, 30, 6.5, 1e5, np.pi / 500e-6
    m0f = 1 - m0s
    H = np.array(
        [
            [-R2f, 0, w1, 0, 0, 0],
            [0, -R2f, 0, 0, 0, 0],
            [-w1, 0, -R1f - Rx * m0s, 0, Rx * m0f, R1f * m0f],
            [0, 0, 0, -rate, w1, 0],
            [0, 0, Rx * m0s, -w1, -R1s - Rx * m0f, R1s * m0s],
            [0, 0, 0, 0, 0, 0],
        ]
    )
    expected = [
        0.0010647535813058293,
        0,
        -0.8957848274535014,
        0.005126529591877105,
        0.08122007142111888,
    ]
    start = np.array([0, 0, m0f, 0, m0s, 1])
    np.testing.assert_allclose((expm(H * 500e-6) @ start)[:5], expected, atol=1e-14)

    # The kernel's series of the same pulse, with decay R2sl·TRF = 50 in it.
    tissue = np.outer([m0s, R1f, R2f, Rx, R1s, 10e-6, 0, 1], np.ones(kernels.LANES))
    rates = np.outer([rate, 0, 0], np.ones(kernels.LANES))
    steps, order, shift = kernels.series(tissue, rates, 500e-6, np.pi)
    assert steps > 1  # the longest step is 8, and half of the decay is 25
    h = np.zeros((15, kernels.LANES))
    kernels.generator(
        tissue, kernels.LINEARIZED, rates, 500e-6 / steps, np.pi / steps, shift, False, h
    )
    m = np.zeros((1, 5, kernels.LANES))
    m[0, [kernels.Z, kernels.ZS]] = [[m0f], [m0s]]
    for _ in range(steps):
        r, one = m.copy(), 1.0
        for k in range(order, 0, -1):
            kernels.term(h, 1 / k, one, True, m, r, 0)
            one = 1 + shift / k * one
        m = np.exp(-shift) * r
    # The series is cut at 1e-12 of a step.
    x, y, z, zs, xs = m[0, :, 0]
    np.testing.assert_allclose([x, y, z, xs, zs], expected, atol=1e-11)


DIFFERENTIATED = {
    "apparent T1": fp.TwoPool,
    "T1f and T1s": lambda train: fp.TwoPool(train, SEPARATE),
    "another order": lambda train: fp.TwoPool(train, APPARENT[::-1]),
    "Graham": lambda train: fp.TwoPool(train, saturation="graham"),
    "Graham, T1f and T1s": lambda train: fp.TwoPool(train, SEPARATE, saturation="graham"),
    "single pool": SinglePool,
}


@pytest.mark.parametrize(
    ("inversion", "increment"), [("crushed", np.pi), ("spoiled", np.pi), ("crushed", 1.0)]
)
@pytest.mark.parametrize("make", DIFFERENTIATED.values(), ids=DIFFERENTIATED)
def test_derivatives_by_central_differences(short_train, inversion, increment, make):
    model = make(
        fp.PulseTrain(
            short_train.flip_angle, short_train.pulse_duration, 3.5e-3, inversion, increment
        )
    )
    values = {
        "m0s": 0.18,
        "T1": 1.1,
        "T1f": 1.7,
        "T1s": 0.4,
        "T2": 0.06,
        "T2f": 0.07,
        "Rx": 20.0,
        "T2s": 11e-6,
        "B0": 150.0,
        "B1": 0.9,
    }
    theta = np.array([[values[name] for name in model.names]])
    out = model.simulate(theta)
    for column, name in enumerate(model.names):
        # Fourth-order differences: (1e-3)^4 truncation against 1e-13 / 1e-3 rounding.
        step = 1e-3 * values[name]
        shifted = []
        for times in (1, -1, 2, -2):
            moved = theta.copy()
            moved[0, column] += times * step
            shifted.append(model.signal(moved)[0])
        near, far = shifted[0] - shifted[1], shifted[2] - shifted[3]
        expected = (8 * near - far) / (12 * step)
        error = np.linalg.norm(out.jacobian[0, :, column] - expected) / np.linalg.norm(expected)
        # The spline's derivative is exact for the spline; the series adds 1e-10 / 1e-3.
        assert error < 1e-6, name


def test_signal_alone_is_the_same(short_train, white_matter):
    model = fp.TwoPool(short_train)
    # To rounding: the compiler may fuse other operations.
    np.testing.assert_allclose(
        model.signal([white_matter]), model.simulate([white_matter]).signal, atol=1e-14
    )


@settings(max_examples=15, deadline=None)
@given(
    m0s=st.floats(0, 0.3),
    T1=st.floats(0.3, 3),
    T2f=st.floats(0.01, 0.3),
    Rx=st.floats(0, 100),
    B0=st.floats(-900, 900),
    B1=st.floats(0.5, 1.4),
)
def test_off_resonance_conjugates(short_train, m0s, T1, T2f, Rx, B0, B1):
    there = np.array([[m0s, T1, T2f, Rx, 12e-6, B0, B1]])
    back = there * np.array([1, 1, 1, 1, 1, -1, 1])
    model = fp.TwoPool(short_train)
    # s(-ω0) = conj s(ω0) to rounding.
    np.testing.assert_allclose(model.signal(back), model.signal(there).conj(), atol=1e-12)


def test_b0_is_periodic_within_two_percent(paper_train, white_matter):
    model = fp.TwoPool(paper_train)
    shifted = white_matter + np.array([0, 0, 0, 0, 0, 2 * np.pi / 3.5e-3, 0])
    first, second = model.signal([white_matter, shifted])
    # design §4b: a period 2π/TR turns the sign; finite pulses leave about 2 %.
    assert np.linalg.norm(first + second) < 0.02 * np.linalg.norm(first)


def bloch_signal(train, T1, T2, w0, B1):
    """A single pool by 4x4 matrix exponentials, played until the cycle repeats."""
    angle, duration = train.flip_angle[0], train.pulse_duration[0]

    def bloch(w1, time):
        A = np.array(
            [[-1 / T2, -w0, w1, 0], [w0, -1 / T2, 0, 0], [-w1, 0, -1 / T1, 1 / T1], [0, 0, 0, 0]]
        )
        return expm(A * time)

    c, s = np.cos(train.phase_increment), np.sin(train.phase_increment)
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    m = np.array([0, 0, 1.0, 1])
    for _ in range(100):
        signal = []
        for i in range(angle.size):
            if i == 0:
                half = bloch(0, 3.5e-3 / 2)
                s2 = np.sin(B1 * angle[0] / 2) ** 2 if train.inversion == "crushed" else 0.0
                pulse = np.diag([s2, -s2, np.cos(B1 * angle[0]), 1])
            else:
                half = bloch(0, (3.5e-3 - duration[i]) / 2)
                pulse = bloch(B1 * angle[i] / duration[i], duration[i])
            m = half @ pulse @ turn @ half @ m
            signal.append(m[0] + 1j * m[1])
    return np.array(signal)


@pytest.mark.parametrize("inversion", ["crushed", "spoiled"])
@pytest.mark.parametrize("increment", [np.pi, 0.0, 2.0])
def test_without_semisolid_pool_it_is_the_bloch_model(short_train, inversion, increment):
    train = fp.PulseTrain(
        short_train.flip_angle, short_train.pulse_duration, 3.5e-3, inversion, increment
    )
    T1, T2, w0, B1 = ONE_POOL.values()
    expected = bloch_signal(train, T1, T2, w0, B1)
    got = fp.TwoPool(train).signal([[0, T1, T2, 30, 12e-6, w0, B1]])[0]
    # Series of the pulses: 1e-12 each; the oracle repeats to e^(-14 s / 1.3 s), 2e-5, of what the
    # inversion leaves of the state after a cycle: far below rounding after 100 of them.
    np.testing.assert_allclose(got, expected, atol=1e-10)
    np.testing.assert_allclose(
        SinglePool(train).signal([[T1, T2, w0, B1]])[0], expected, atol=1e-10
    )


def test_a_single_pool_takes_angles_beyond_the_linearized_rate(short_train):
    # B1·α = 6.3 rad for the inversion has no linearized rate; the Bloch equations do not mind.
    T1, T2, w0, B1 = 1.3, 0.08, -50.0, 2.0
    got = SinglePool(short_train).signal([[T1, T2, w0, B1]])[0]
    np.testing.assert_allclose(got, bloch_signal(short_train, T1, T2, w0, B1), atol=1e-10)


def test_trains_stand_one_after_the_other(short_train, white_matter):
    other = short_train.flip_angle * np.r_[1, np.full(39, 0.6)]
    both = fp.PulseTrain(
        np.vstack([short_train.flip_angle, other]),
        np.vstack([short_train.pulse_duration] * 2),
        3.5e-3,
    )
    alone = fp.PulseTrain(other, short_train.pulse_duration, 3.5e-3)
    expected = [fp.TwoPool(train).simulate([white_matter]) for train in (short_train, alone)]
    got = fp.TwoPool(both).simulate([white_matter])
    # The same computation, to rounding.
    signal, jacobian = (
        np.hstack([getattr(e, part) for e in expected]) for part in ("signal", "jacobian")
    )
    np.testing.assert_allclose(got.signal, signal, atol=1e-14)
    scale = np.abs(jacobian).max(axis=(0, 1))
    assert (np.abs(got.jacobian - jacobian) < 1e-12 * scale).all()


def test_apparent_t1_is_both_pools_at_once(short_train):
    apparent = fp.TwoPool(short_train).simulate([[0.2, 1.1, 0.07, 20, 12e-6, 50, 1]])
    names = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1")
    separate = fp.TwoPool(short_train, names).simulate([[0.2, 1.1, 1.1, 0.07, 20, 12e-6, 50, 1]])
    np.testing.assert_allclose(apparent.signal, separate.signal, rtol=1e-12)
    total = separate.jacobian[..., 1] + separate.jacobian[..., 2]
    np.testing.assert_allclose(apparent.jacobian[..., 1], total, atol=1e-12)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 40])
def test_batches_do_not_matter(short_train, white_matter, size):
    rng = np.random.default_rng(size)
    theta = white_matter * rng.uniform(0.9, 1.1, (size, 7))
    model = fp.TwoPool(short_train)
    together = model.simulate(theta)
    for s in (0, size // 2, size - 1):
        alone = model.simulate(theta[s : s + 1])
        # Lanes share the number of squarings, so a neighbour changes the series' error: 1e-10 of
        # the signal and, for T2s, some 1e-7 of the derivative.
        np.testing.assert_allclose(alone.signal[0], together.signal[s], atol=1e-9)
        scale = np.abs(together.jacobian[s]).max(axis=0)
        assert (np.abs(alone.jacobian[0] - together.jacobian[s]) < 1e-6 * scale).all()


def test_names_and_index(short_train):
    model = fp.TwoPool(short_train)
    assert model.names == ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
    assert model.index("T2f") == 2
    assert isinstance(model, fp.SignalModel)
    with pytest.raises(KeyError, match="unknown parameter 'T2'; known are m0s, T1, T2f"):
        model.index("T2")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"T1": np.nan}, ValueError, "theta must be finite; got 1 NaN or Inf"),
        ({"B0": np.inf}, ValueError, "theta must be finite"),
        ({"m0s": 1.2}, ValueError, r"m0s must lie in \[0.0, 0.999\]"),
        ({"T2s": 12.0}, ValueError, "T2s must lie in .* Check the units"),
        ({"B1": 1.6}, lineshape.NoLinearizedRateError, r"Bound B1 or lower the flip angle"),
    ],
)
def test_bad_parameters(short_train, white_matter, change, error, message):
    model = fp.TwoPool(short_train)
    theta = white_matter.copy()
    for name, value in change.items():
        theta[model.index(name)] = value
    with pytest.raises(error, match=message):
        model.simulate([theta])


def test_bad_shapes_and_names(short_train):
    with pytest.raises(
        ValueError, match=r"theta must have the axes \(S, P=7\); got the shape \(1, 6\)"
    ):
        fp.TwoPool(short_train).simulate(np.ones((1, 6)))
    with pytest.raises(KeyError, match="unknown parameter 'T2'; known are m0s, T1"):
        fp.TwoPool(short_train, ("m0s", "T2"))
    with pytest.raises(ValueError, match="expected the parameters"):
        fp.TwoPool(short_train, ("m0s", "T1", "T1f", "T2f", "Rx", "T2s", "B0", "B1"))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no such limit on this system")
@pytest.mark.parametrize("cores", [1, 2])
def test_threads_are_as_many_as_the_cores_of_this_process(
    short_train, white_matter, monkeypatch, cores
):
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, n_threads):
            asked.append(n_threads)
            super().__init__(n_threads)

    monkeypatch.setattr(cycle, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(3, 3 + cores)))
    theta = np.tile(white_matter, (2 * kernels.LANES, 1))
    fp.TwoPool(short_train).signal(theta)
    assert asked == [2] * (cores == 2)  # one core needs no pool
    with _threads.one_thread():
        fp.TwoPool(short_train).signal(theta)
    assert len(asked) == (cores == 2)


def test_the_first_call_says_that_it_compiles(tmp_path):
    # A process with an empty cache compiles, and says so; the next one finds it compiled.
    lines = (
        "import hashlib, numpy as np, fisherprint as fp",
        "from fisherprint import models",
        "angle = np.r_[np.pi, 0.1 + np.sin(np.arange(99) / 20) ** 2]",
        "train = fp.PulseTrain(angle, np.r_[5e-4, 2e-4 + 3e-6 * np.arange(99)], 3.5e-3)",
        "print(models.compiled())",
        "theta = np.array([[.2, 1.1, .07, 20, 12e-6, 50, .9]])",
        "theta = theta * np.random.default_rng(0).uniform(.9, 1.1, (40, 7))",
        "one = models.SinglePool(train).simulate(theta[:, [1, 2, 5, 6]])",
        "two = models.TwoPool(train).simulate(theta)",
        "alone = models.TwoPool(train).signal(theta)",
        "arrays = one.signal, one.jacobian, two.signal, two.jacobian, alone",
        "digests = [hashlib.sha256(array.tobytes()).hexdigest() for array in arrays]",
        "print(models.compiled(), *digests)",
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        for _ in range(2)
    ]
    first, second = (run.stdout.split() for run in runs)
    assert "compiling the signal model" in runs[0].stderr
    assert "compiling" not in runs[1].stderr
    assert (first[:2], second[:2]) == (["False", "True"], ["True", "True"])
    # Freshly compiled and read from the cache it gives the same bits.
    assert first[2:] == second[2:]


def test_a_single_pool_is_two_pools_without_the_second(short_train):
    one = SinglePool(short_train).simulate([list(ONE_POOL.values())])
    T1, T2, B0, B1 = ONE_POOL.values()
    two = fp.TwoPool(short_train).simulate([[0, T1, T2, 30, 12e-6, B0, B1]])
    # Series of other lengths, each cut at 1e-12 a pulse.
    np.testing.assert_allclose(one.signal, two.signal, atol=1e-10)
    for ours, theirs in (("T1", "T1"), ("T2", "T2f"), ("B0", "B0"), ("B1", "B1")):
        got = one.jacobian[0, :, list(ONE_POOL).index(ours)]
        expected = two.jacobian[0, :, fp.TwoPool(short_train).index(theirs)]
        assert np.linalg.norm(got - expected) < 1e-9 * np.linalg.norm(expected), ours


def test_names_of_a_single_pool(short_train):
    with pytest.raises(KeyError, match="unknown parameter 'T2f'; known are T1, T2, B0, B1"):
        SinglePool(short_train, ("T1", "T2f", "B0", "B1"))
    with pytest.raises(ValueError, match="expected the parameters"):
        SinglePool(short_train, ("T1", "T2", "B0"))
    turned = SinglePool(short_train, ("B1", "T2", "T1", "B0")).simulate([[1.05, 0.08, 1.3, 80.0]])
    straight = SinglePool(short_train).simulate([list(ONE_POOL.values())])
    np.testing.assert_array_equal(turned.jacobian[..., 2], straight.jacobian[..., 0])
    np.testing.assert_array_equal(turned.jacobian[..., 0], straight.jacobian[..., 3])


def test_unknown_saturation(short_train):
    with pytest.raises(ValueError, match=r"a saturation of linearized, graham, .* got 'Graham'"):
        fp.TwoPool(short_train, saturation="Graham")
