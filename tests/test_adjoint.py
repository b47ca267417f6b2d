"""The adjoint pass against finite differences, for every kind of control, model and inversion."""

from dataclasses import replace

import numpy as np
import pytest

import fisherprint as fp
from fisherprint import models
from fisherprint.models import SinglePool, TwoPool, lineshape

WHITE = [0.2, 1.1, 0.07, 20.0, 12e-6, 100.0, 0.95]
GREY = [0.1, 1.6, 0.1, 44.0, 14e-6, -50.0, 1.05]
WHITE_ORDER = ("T2s", "m0s", "B1", "T1", "B0", "Rx", "T2f")
SEPARATE = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1")


def linear(model, theta, by_signal, by_jacobian):
    out = model.simulate(theta)
    value = (by_signal.conj() * out.signal).real.sum()
    return value + (by_jacobian.conj() * out.jacobian).real.sum()


def weights(model, theta, rng):
    """Random slopes that give each derivative the same say."""
    out = model.simulate(theta)
    size = np.abs(out.jacobian).max(axis=(0, 1))
    shape = out.jacobian.shape
    by_signal = rng.normal(size=shape[:2]) + 1j * rng.normal(size=shape[:2])
    by_jacobian = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / size
    return by_signal, by_jacobian


def central(function, step):
    """Fourth order: what is left is step⁴ of the fifth derivative, and rounding over the step."""
    near, far = (function(+k * step) - function(-k * step) for k in (1, 2))
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("inversion", ["crushed", "spoiled"])
@pytest.mark.parametrize(
    ("make", "theta"),
    [
        (TwoPool, [WHITE, GREY]),
        (lambda train: TwoPool(train, saturation="graham"), [WHITE, GREY]),
        (lambda train: TwoPool(train, SEPARATE), [[0.2, 1.8, 0.4, *WHITE[2:]]]),
        (lambda train: TwoPool(train, WHITE_ORDER), [[WHITE[i] for i in (4, 0, 6, 1, 5, 3, 2)]]),
        (SinglePool, [[1.1, 0.07, 100.0, 0.95]]),
    ],
    ids=["two-pool", "graham", "T1f and T1s", "another order", "single pool"],
)
def test_slopes_by_every_kind_of_control(short_train, make, theta, inversion):
    train = replace(short_train, inversion=inversion)
    model, theta = make(train), np.array(theta)
    by_signal, by_jacobian = weights(model, theta, np.random.default_rng(0))
    slopes = model.control_slopes(theta, by_signal, by_jacobian)

    def moved(name, pulse, change):
        values = getattr(train, name).copy()
        values[0, pulse] += change
        return linear(make(replace(train, **{name: values})), theta, by_signal, by_jacobian)

    # The inversion, its successor, long and short pulses, the last. Rounding of J, 1e-15 of some
    # 1e3 terms, over the step leaves 1e-8 of the largest slope, truncation less.
    for name, step in (("flip_angle", 1e-3), ("pulse_duration", 1e-6)):
        found = getattr(slopes, name)[0]
        for pulse in (0, 1, 2, 20, 39):
            expected = central(lambda change: moved(name, pulse, change), step)  # noqa: B023
            assert abs(found[pulse] - expected) < 1e-6 * np.abs(found).max(), (name, pulse)


def test_several_trains_and_another_phase_increment(short_train):
    angle = np.stack([short_train.flip_angle[0], short_train.flip_angle[0] * 0.9 + 0.1 * np.pi])
    duration = np.stack([short_train.pulse_duration[0]] * 2)
    train = fp.PulseTrain(angle, duration, 3.5e-3, phase_increment=2.0)
    model, theta = TwoPool(train), np.array([WHITE])
    by_signal, by_jacobian = weights(model, theta, np.random.default_rng(1))
    slopes = model.control_slopes(theta, by_signal, by_jacobian)
    rng = np.random.default_rng(2)
    for name, size in (("flip_angle", 1e-3), ("pulse_duration", 1e-6)):
        direction = rng.normal(size=angle.shape)

        def along(change, name=name, direction=direction, size=size):
            values = getattr(train, name) + change * size * direction
            return linear(TwoPool(replace(train, **{name: values})), theta, by_signal, by_jacobian)

        found = size * (getattr(slopes, name) * direction).sum()
        # As above.
        assert found == pytest.approx(central(along, 1.0), rel=1e-6)


def test_pulses_in_several_steps_of_the_series(short_train):
    # A soft T2s and long pulses need more than one step, and so does the adjoint.
    train = replace(short_train, pulse_duration=np.full((1, 40), 1.2e-3))
    model, theta = TwoPool(train), np.array([[0.2, 1.1, 0.07, 20.0, 6e-6, 100.0, 1.3]])
    by_signal, by_jacobian = weights(model, theta, np.random.default_rng(3))
    slopes = model.control_slopes(theta, by_signal, by_jacobian).pulse_duration
    direction = np.random.default_rng(4).normal(size=40)

    def along(change):
        duration = train.pulse_duration + 1e-6 * change * direction
        return linear(
            TwoPool(replace(train, pulse_duration=duration)), theta, by_signal, by_jacobian
        )

    assert 1e-6 * slopes[0] @ direction == pytest.approx(central(along, 1.0), rel=1e-6)


def test_by_the_signal_alone(short_train):
    model, theta = TwoPool(short_train), np.array([WHITE, GREY])
    by_signal, by_jacobian = weights(model, theta, np.random.default_rng(5))
    alone = model.control_slopes(theta, by_signal)
    with_zeros = model.control_slopes(theta, by_signal, 0 * by_jacobian)
    # The same sums in another order: the closing of the cycle is found in one pass or in two.
    size = np.abs(with_zeros.flip_angle).max()
    assert alone.flip_angle == pytest.approx(with_zeros.flip_angle, abs=1e-11 * size)
    size = np.abs(with_zeros.pulse_duration).max()
    assert alone.pulse_duration == pytest.approx(with_zeros.pulse_duration, abs=1e-11 * size)


def test_it_is_linear_and_sums_over_parameter_sets(short_train):
    model, theta = TwoPool(short_train), np.array([WHITE, GREY] * 20)  # more than one group
    by_signal, by_jacobian = weights(model, theta, np.random.default_rng(6))
    whole = model.control_slopes(theta, by_signal, by_jacobian)
    parts = [
        model.control_slopes(theta[i : i + 1], by_signal[i : i + 1], by_jacobian[i : i + 1])
        for i in range(len(theta))
    ]
    total = sum(part.flip_angle for part in parts)
    # Sums of forty terms in another order.
    assert whole.flip_angle == pytest.approx(total, abs=1e-12 * np.abs(total).max() * len(theta))


@pytest.mark.parametrize("saturation", ["linearized", "graham"])
def test_magnetization_at_the_echoes(short_train, saturation):
    theta = np.array([WHITE, GREY])
    model = TwoPool(short_train, saturation=saturation)
    states = model.magnetization(theta)
    assert states.shape == (2, 40, 4)
    signal = model.signal(theta)
    # The same kernel, compiled once more: some roundings differ.
    assert states[..., 0] + 1j * states[..., 1] == pytest.approx(signal, abs=1e-13)


def test_magnetization_without_pulses_is_in_equilibrium(short_train):
    # An inversion by 2.94 rad, then next to nothing: recovery of both pools towards m0f and m0s.
    angle = np.r_[np.pi - 0.19, np.full(3999, 1e-9)]
    train = fp.PulseTrain(angle, np.full(4000, 200e-6), 3.5e-3)
    states = TwoPool(train).magnetization(np.array([WHITE]))[0]
    # 14 s are 12.7 T1; e^-12.7 = 3e-6 times the inverted magnetization.
    assert states[-1, 2] == pytest.approx(0.8, abs=1e-5)
    assert states[-1, 3] == pytest.approx(0.2, abs=1e-5)
    single = SinglePool(train).magnetization(np.array([[1.1, 0.07, 0.0, 1.0]]))[0]
    # Without exchange: z = 1 - (1 - z0) e^(-t/T1), with z0 at the first echo.
    time = 3.5e-3 * np.arange(4000)
    expected = 1 - (1 - single[0, 2]) * np.exp(-time / 1.1)
    assert single[:, 2] == pytest.approx(expected, abs=1e-6)
    assert (single[:, 3] == 0).all()


def test_second_derivatives_of_the_tables():
    for table, value, bends in (
        (lineshape.rate_table(), lineshape.rate, lineshape.rate_bends),
        (lineshape.graham_table(), lineshape.graham, lineshape.graham_bends),
    ):
        for x, a in ((25.0, 1.3), (8.0, 0.2), (60.0, 3.1)):
            f_xx, f_xa, f_aa = bends(table, x, a)
            # Of the slopes, which other tests compare with the exact rate; a quintic spline has
            # four continuous derivatives, so that a step of 1e-4 leaves 1e-8.
            by_x = [value(table, x * (1 + h), a) for h in (1e-4, -1e-4)]
            by_a = [value(table, x, a + h) for h in (1e-4, -1e-4)]
            scale = abs(value(table, x, a)[0])
            assert f_xx == pytest.approx(
                x * (by_x[0][1] - by_x[1][1]) / 2e-4, rel=1e-6, abs=1e-7 * scale
            )
            assert f_xa == pytest.approx(
                x * (by_a[0][1] - by_a[1][1]) / 2e-4, rel=1e-6, abs=1e-7 * scale
            )
            assert f_aa == pytest.approx(
                (by_a[0][2] - by_a[1][2]) / 2e-4, rel=1e-6, abs=1e-7 * scale
            )


def test_what_is_refused(short_train):
    model, theta = TwoPool(short_train), np.array([WHITE])
    with pytest.raises(ValueError, match=r"slopes by the signal must have the axes \(S=1, T=40\)"):
        model.control_slopes(theta, np.zeros((1, 39)))
    with pytest.raises(ValueError, match=r"slopes by the jacobian must have the axes"):
        model.control_slopes(theta, np.zeros((1, 40)), np.zeros((1, 40, 3)))
    with pytest.raises(ValueError, match="slopes by the signal must be finite"):
        model.control_slopes(theta, np.full((1, 40), np.nan))
    slow = TwoPool(short_train, saturation="generalized Bloch")
    with pytest.raises(ValueError, match="expected the saturation `linearized` or `graham`"):
        slow.control_slopes(theta, np.zeros((1, 40)))


def test_models_of_a_train_can_be_designed(short_train):
    other = replace(short_train, repetition_time=4e-3)
    for model in (TwoPool(short_train, saturation="graham"), SinglePool(short_train)):
        assert isinstance(model, models.PulsedModel)
        moved = model.of(other)
        assert (moved.names, moved.train.repetition_time) == (model.names, 4e-3)
    assert TwoPool(short_train, saturation="graham").of(other).saturation == "graham"
