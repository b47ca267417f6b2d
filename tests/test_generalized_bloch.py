from __future__ import annotations

import numpy as np
import oracles
import pytest
from scipy.linalg import expm

import fisherprint as fp
from fisherprint.models import generalized_bloch, kernels, lineshape

NAMES = kernels.PHYSICAL
TISSUE = dict(zip(NAMES, (0.15, 0.5, 15.0, 30.0, 3.0, 10e-6, 100.0, 0.95), strict=True))
SEPARATE = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1")


def column(**changes):
    return np.array([[(TISSUE | changes)[name]] for name in NAMES])


def after(tissue, angle, duration, start):
    m = generalized_bloch.propagators(tissue, angle, duration, [])[0, 0] @ [*start, 1.0]
    return m[:4]


@pytest.mark.paper("§2.3")
@pytest.mark.parametrize(
    ("x", "angle"), [(2.0, 4.5), (10.0, np.pi), (45.0, 3.14), (249.0, 0.5), (249.0, 4.5)]
)
def test_an_isolated_pool_against_the_series_in_the_angle(x, angle):
    got = generalized_bloch.propagators(column(B1=1.0), angle, x * 10e-6, [], free=False)
    # Polynomials of degree 39 leave 3e-11 in the longest, strongest pulse and 1e-13 elsewhere.
    assert got[0, 0, 3, 3] == pytest.approx(float(lineshape.saturation(x, angle)), abs=1e-10)


@pytest.mark.parametrize(("angle", "duration"), [(np.pi, 100e-6), (1.0, 300e-6)])
def test_a_pulse_against_time_stepping(angle, duration):
    start = np.array([0.1, -0.2, 0.7, 0.12])
    expected = oracles.generalized_bloch_pulse(TISSUE, angle, duration, start, steps=150)
    # The oracle's steps are at most 0.2 T2s, and their sixth power is divided by 4³·16.
    np.testing.assert_allclose(after(column(), angle, duration, start), expected, atol=1e-8)


def test_the_published_pulse():
    # Doctest of MRIgeneralizedBloch.jl: π/2 in 100 µs, by an adaptive solver at tolerances
    # of 1e-3 and 1e-6.
    tissue = column(m0s=0.2, R1f=1 / 3, R2f=15, Rx=30, R1s=2, T2s=10e-6, B0=0, B1=1)
    published = [0.7994211188442756, 0.0, 0.0004403374305009168, 0.08214809659226184]
    got = after(tissue, np.pi / 2, 100e-6, [0, 0, 0.8, 0.2])
    np.testing.assert_allclose(got, published, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("free", [True, False])
def test_derivatives_of_a_pulse_by_central_differences(name, free):
    angle, duration = 2.0, 250e-6

    def pulse(value):
        return generalized_bloch.propagators(
            column(**{name: value}), angle, duration, [], free=free
        )[0]

    step = 1e-3 * TISSUE[name]
    near, far = (pulse(TISSUE[name] + k * step) - pulse(TISSUE[name] - k * step) for k in (1, 2))
    expected = (8 * near - far) / (12 * step)
    got = generalized_bloch.propagators(column(), angle, duration, [name], free=free)[1]
    # (1e-3)^4 of truncation, 1e-14 / 1e-3 of rounding, in units of a change by 100 %.
    np.testing.assert_allclose(TISSUE[name] * got, TISSUE[name] * expected, atol=1e-10)


def linear(angle, duration, rate):
    """(xf, yf, zf, zs, 1) through a pulse of the linearized or, with xs decoupled, any model."""
    m0s, R1f, R2f, Rx, R1s, _, B0, B1 = TISSUE.values()
    m0f, w1 = 1 - m0s, B1 * angle / duration
    H = np.array(
        [
            [-R2f, -B0, w1, 0, 0, 0],
            [B0, -R2f, 0, 0, 0, 0],
            [-w1, 0, -R1f - Rx * m0s, 0, Rx * m0f, R1f * m0f],
            [0, 0, 0, -rate, w1, 0],
            [0, 0, Rx * m0s, -w1, -R1s - Rx * m0f, R1s * m0s],
            [0, 0, 0, 0, 0, 0],
        ]
    )
    keep = [0, 1, 2, 4, 5]
    return expm(H * duration)[np.ix_(keep, keep)]


@pytest.mark.paper("§2.3")
def test_the_linearized_pulse_agrees_with_the_full_one():
    m0s, B1, T2s = (TISSUE[name] for name in ("m0s", "B1", "T2s"))
    start = np.array([0, 0, 1 - m0s, m0s])
    full = after(column(), np.pi / B1, 100e-6, start)
    rate = float(lineshape.linearized_rate(100e-6, np.pi, T2s).value)
    xf, yf, zf, zs, _ = linear(np.pi / B1, 100e-6, rate) @ [*start, 1.0]
    # Published for a π pulse of 100 µs: both end with the same zs but for exchange meanwhile.
    assert abs(xf - full[0]) < 2e-5
    assert abs(yf - full[1]) < 2e-5
    assert abs(zf - full[2]) < 2e-5
    assert abs(zs / full[3] - 1) < 2e-4


@pytest.mark.parametrize("inversion", ["crushed", "spoiled"])
def test_the_linearized_model_agrees_with_the_full_one_along_a_train(
    short_train, white_matter, inversion
):
    train = fp.PulseTrain(short_train.flip_angle, short_train.pulse_duration, 3.5e-3, inversion)
    full = fp.TwoPool(train, saturation="generalized Bloch").simulate([white_matter])
    linearized = fp.TwoPool(train).simulate([white_matter])
    graham = fp.TwoPool(train, saturation="graham").simulate([white_matter])

    def apart(model, part):
        a, b = getattr(model, part), getattr(full, part)
        return (np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max()

    # Pulses of 150 to 460 µs differ by less than that of 100 µs, 2e-5, and errors of many
    # pulses add up to about one of them, since zs forgets within 1/Rx.
    assert apart(linearized, "signal") < 5e-5
    # The derivative by T2s alone sees what is left of the semi-solid pool's history.
    assert apart(linearized, "jacobian") < 2e-3
    # Graham's rate is off by a per cent and more, in ∂/∂T2s by a third.
    assert apart(graham, "signal") > 100 * apart(linearized, "signal")
    assert apart(graham, "jacobian") > 0.1


@pytest.mark.parametrize("increment", [np.pi, 1.0])
@pytest.mark.parametrize("names", [SEPARATE, ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")])
def test_derivatives_along_a_train_by_central_differences(names, increment):
    train = fp.PulseTrain(
        np.r_[np.pi, 0.4, 0.9, 0.2, 1.1], 1e-6 * np.r_[500, 200, 300, 150, 400], 3.5e-3,
        "crushed", increment,
    )  # fmt: skip
    model = fp.TwoPool(train, names, saturation="generalized Bloch")
    values = {"m0s": 0.2, "T1": 1.1, "T1f": 1.7, "T1s": 0.4, "T2f": 0.07, "Rx": 20.0}
    values |= {"T2s": 11e-6, "B0": 150.0, "B1": 0.9}
    theta = np.array([values[name] for name in names])
    out = model.simulate([theta])
    for p, name in enumerate(names):
        step = 1e-3 * np.eye(len(names))[p] * theta
        shifted = model.signal([theta + step, theta - step, theta + 2 * step, theta - 2 * step])
        difference = (8 * (shifted[0] - shifted[1]) - (shifted[2] - shifted[3])) / 12e-3
        # (1e-3)^4 of truncation and 1e-14 / 1e-3 of rounding.
        np.testing.assert_allclose(
            theta[p] * out.jacobian[0, :, p], difference, atol=1e-9, err_msg=name
        )


def test_without_semisolid_pool_it_is_the_bloch_model(short_train):
    two = fp.TwoPool(short_train, saturation="generalized Bloch")
    got = two.signal([[0.0, 1.3, 0.08, 30.0, 12e-6, 80.0, 1.05]])
    expected = fp.models.SinglePool(short_train).signal([[1.3, 0.08, 80.0, 1.05]])
    # The kernel's series are cut at 1e-12 a pulse.
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_several_trains_and_no_limit_of_the_angle(short_train, white_matter):
    both = fp.PulseTrain(
        np.vstack([short_train.flip_angle, 0.5 * short_train.flip_angle])
        + np.pi / 2 * np.array([[0], [1]]) * (np.arange(40) == 0),
        np.vstack([short_train.pulse_duration] * 2),
        3.5e-3,
    )
    # B1·α = 1.45 π: no linearized rate exists.
    theta = white_matter * np.array([1, 1, 1, 1, 1, 1, 1.45 / 0.95])
    model = fp.TwoPool(both, saturation="generalized Bloch")
    with pytest.raises(lineshape.NoLinearizedRateError):
        fp.TwoPool(both).signal([theta])
    alone = fp.PulseTrain(both.flip_angle[1], both.pulse_duration[1], 3.5e-3)
    np.testing.assert_array_equal(
        model.signal([theta])[:, 40:],
        fp.TwoPool(alone, saturation="generalized Bloch").signal([theta]),
    )
