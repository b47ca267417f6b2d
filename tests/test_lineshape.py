from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import oracles
import pytest
from scipy.integrate import quad
from scipy.linalg import expm
from scipy.optimize import brentq

from fisherprint.models import lineshape
from fisherprint.models.lineshape import (
    MAX_ANGLE,
    X_RANGE,
    NoLinearizedRateError,
    check_range,
    exact_rates,
    graham_rate,
    greens_function,
    linearized_rate,
    rate,
    rate_table,
    saturation,
)

X = np.geomspace(*X_RANGE, 23)


@pytest.mark.paper("§2.3")
def test_greens_function_is_the_published_number():
    # Doctest of MRIgeneralizedBloch.jl.
    assert greens_function(10) == pytest.approx(0.14712468680944424, rel=1e-14)


# The method changes at 20.
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0, 5.0, 19.999, 20.001, 60.0, 250.0, 500.0])
def test_greens_function_against_adaptive_quadrature(kappa):
    assert greens_function(kappa) == pytest.approx(oracles.greens_function(kappa), rel=2e-14)
    assert greens_function(-kappa) == greens_function(kappa)


def test_greens_function_far_out():
    # G κ → √(2π/3), the next term of the expansion is 3/2 κ⁻².
    kappa = 1e5
    assert greens_function(kappa) * kappa == pytest.approx(np.sqrt(2 * np.pi / 3), rel=2e-10)
    assert greens_function(np.ones((2, 3))).shape == (2, 3)


@pytest.mark.paper("§2.3")
@pytest.mark.parametrize(
    ("x", "angle"), [(2.0, 4.5), (3.0, 0.5), (9.4, 2.88), (20.0, 4.5), (45.0, 3.14)]
)
def test_saturation_against_time_stepping(x, angle):
    # The oracle's steps are at most 0.075 T2s, and their sixth power is divided by 4³·16.
    assert saturation(x, angle) == pytest.approx(oracles.saturation(x, angle), abs=1e-11)


def test_saturation_without_decay_of_memory_is_a_rotation():
    # G = 1 − κ²/10 + O(κ⁴), so z − cos a vanishes like x²; the x⁴ term makes a few per cent here.
    x = np.array([1.0, 1.25])
    deviation = saturation(x, 2.0) - np.cos(2.0)
    assert deviation[1] / deviation[0] == pytest.approx(1.25**2, rel=0.1)


@pytest.mark.parametrize("angle", [0.3, 2.0, 4.4])
def test_exact_rates_end_the_pulse_with_the_same_zs(angle):
    f = exact_rates(X, np.linspace(0, angle, 100))[:, -1]
    for zs, ρ in zip(saturation(X, angle), f * X, strict=True):
        propagator = expm(np.array([[-ρ, angle], [-angle, 0]]))
        assert propagator[1, 1] == pytest.approx(zs, abs=1e-12)


@pytest.mark.paper("§2.3")
def test_rate_against_reference_values(data):
    golden = np.load(data / "golden" / "signals.npz")
    duration, flip, b1, t2s = golden["r2sl_arguments"].T
    # One of the 60 references errs by 4.9e-7, the others by 4e-9 and less.
    np.testing.assert_allclose(
        linearized_rate(duration, flip * b1, t2s).value, golden["r2sl"], rtol=1e-6
    )


@pytest.mark.paper("§2.3")
@pytest.mark.parametrize(
    ("duration", "angle", "t2s"),
    [(5e-4, np.pi, 12e-6), (1e-4, 0.4, 9e-6), (2.9e-4, 4.39, 12e-6), (94.12e-6, 2.877, 10e-6)],
)
def test_rate_against_root_search(duration, angle, t2s):
    # The table's own error; 1 − zs keeps fewer digits of the oracle at the smallest angle.
    assert linearized_rate(duration, angle, t2s).value == pytest.approx(
        oracles.linearized_rate(duration, angle, t2s), rel=1e-8
    )


def test_table_against_exact_rates():
    angles = np.linspace(0, MAX_ANGLE, 401)  # incommensurate with the cells
    f = linearized_rate(X[:, None], angles, 1.0).value
    np.testing.assert_allclose(f, exact_rates(X, angles), rtol=1e-7)


def test_derivatives_against_differences_of_exact_rates():
    step, t2s = 1e-3, 11e-6
    x = np.geomspace(2.01, 249, 40)
    angles = np.linspace(0, 4.4, 221)
    duration = t2s * x[:, None]
    value, by_t2s, by_angle = linearized_rate(duration, angles, t2s)

    def slope(function):
        near, far = (function(n * step) - function(-n * step) for n in (1, 2))
        return (8 * near - far) / (12 * step)  # error O(step⁴)

    by_log_t2s = slope(lambda e: exact_rates(x * np.exp(-e), angles) * np.exp(-e)) / t2s
    np.testing.assert_allclose(by_t2s * t2s / value, by_log_t2s / value, atol=2e-7)

    inner = angles[1:]
    expected = slope(lambda e: exact_rates(x, inner + e)) / t2s
    np.testing.assert_allclose(by_angle[:, 1:] / value[:, 1:], expected / value[:, 1:], atol=2e-6)
    # In the range of the paper's train the goal is tighter.
    usual, moderate = x > 5, inner < 4.3
    at = np.ix_(usual, moderate)
    np.testing.assert_allclose(
        (by_angle[:, 1:] / value[:, 1:])[at], (expected / value[:, 1:])[at], atol=1e-7
    )


def test_derivatives_belong_to_the_value():
    coefficients = rate_table()
    step = 1e-5
    for x, a in [(2.3, 0.7), (17.0, 3.3), (41.0, 4.49), (249.9, 1.0)]:
        _, by_x, by_a = rate(coefficients, x, a)
        across_x = [rate(coefficients, x + e, a)[0] for e in (-step, step)]
        across_a = [rate(coefficients, x, a + e)[0] for e in (-step, step)]
        # Rounding of the difference: 1e-16 / 1e-5.
        assert by_x == pytest.approx((across_x[1] - across_x[0]) / (2 * step), abs=1e-10)
        assert by_a == pytest.approx((across_a[1] - across_a[0]) / (2 * step), abs=1e-9)


def test_rate_is_even_and_flat_at_zero_angle():
    plus, minus = linearized_rate(3e-4, 2.0, 1e-5), linearized_rate(3e-4, -2.0, 1e-5)
    assert (plus.value, plus.by_t2s) == (minus.value, minus.by_t2s)
    assert plus.by_angle == -minus.by_angle
    none = linearized_rate(X * 1e-5, 0.0, 1e-5)
    assert np.all(none.by_angle == 0)
    # The spline is as even as f, so its slope vanishes at 0 as that of f does.
    slopes = np.array([rate(rate_table(), x, 0.0)[2] for x in X])
    np.testing.assert_allclose(slopes, 0, atol=1e-11)


@pytest.mark.parametrize("x", [2.0, 30.0, 250.0])
def test_small_angles_reach_second_order_perturbation_theory(x):
    # (1 − zs)/a² → ∫₀¹ (1 − u) g(u) du, with g the Green's function of either model.
    wanted = quad(lambda u: (1 - u) * greens_function(x * u), 0, 1, epsabs=1e-13, limit=200)[0]
    ρ = brentq(lambda r: (r - 1 + np.exp(-r)) / r**2 - wanted, 0.01, 100, xtol=1e-14)
    np.testing.assert_allclose(exact_rates([x], [0.0, 1e-12, 1e-8, 1e-5])[0], ρ / x, rtol=1e-9)
    values = linearized_rate(x, [0.0, 1e-12, 1e-8, 1e-5], 1.0).value
    np.testing.assert_allclose(values, ρ / x, rtol=1e-8)


def test_limit_of_existence():
    # Lowest near TRF/T2s = 20; B1·α = 1.4 π, the largest of the prior, is well inside.
    assert 1.4 * np.pi < MAX_ANGLE
    x = np.linspace(14, 40, 53)
    exact_rates(x, np.linspace(0, 4.555, 1000))
    with pytest.raises(NoLinearizedRateError, match=r"below the limit .*got 4\.56\d* rad"):
        exact_rates(x, np.linspace(0, 4.6, 1000))


def test_angle_without_rate_is_refused_by_name():
    message = r"must not exceed 4\.5 rad.*; got 4\.712 rad\. Bound B1 or lower the flip angle\."
    with pytest.raises(NoLinearizedRateError, match=message) as caught:
        linearized_rate(5e-4, [1.0, -1.5 * np.pi], 12e-6)
    assert caught.value.angle == pytest.approx(1.5 * np.pi)
    assert isinstance(caught.value, ValueError)
    # It crosses process borders with what it carries.
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.angle) == (str(caught.value), caught.value.angle)
    check_range(*X_RANGE, MAX_ANGLE)


@pytest.mark.parametrize("duration", [0.5, 10e-6])
def test_durations_in_other_units_are_refused(duration):
    message = r"must lie between 2 and 250, .*; got .*Are the durations in ms, or T2s in µs\?"
    with pytest.raises(ValueError, match=message):
        linearized_rate(duration, 1.0, 12e-6)


def test_values_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="T2s must be positive, in s; got 0"):
        linearized_rate(5e-4, 1.0, 0.0)
    with pytest.raises(ValueError, match="angles must be finite"):
        linearized_rate(5e-4, np.nan, 12e-6)


def test_no_pulse_no_rate():
    assert linearized_rate(np.ones(0), 1.0, 12e-6).value.shape == (0,)
    assert linearized_rate(np.full((2, 1), 5e-4), np.ones(3), 12e-6).by_t2s.shape == (2, 3)


class TestCache:
    read = staticmethod(rate_table.__wrapped__)  # past the memory of the process

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("FISHERPRINT_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.fixture
    def builds(self, monkeypatch) -> list[None]:
        """Grows by one with each table that is built."""
        coefficients, builds = rate_table(), []

        def build():
            builds.append(None)
            return coefficients.copy()

        monkeypatch.setattr(lineshape, "_build", build)
        return builds

    def test_second_table_comes_from_the_disk(self, folder, builds):
        first, second = self.read(), self.read()
        assert len(builds) == 1
        assert len(list(folder.iterdir())) == 1
        np.testing.assert_array_equal(first, second)
        assert not second.flags.writeable

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty", "shape"])
    def test_damaged_file_is_rebuilt(self, folder, builds, damage):
        first = self.read()
        (path,) = folder.iterdir()
        whole = path.read_bytes()
        middle = len(whole) // 2
        if damage == "shape":
            np.savez(path, coefficients=np.ones((3, 3)))
        else:
            path.write_bytes(
                {
                    "truncated": whole[:middle],
                    "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
                    "foreign": b"something else",
                    "empty": b"",
                }[damage]
            )
        for _ in range(2):
            np.testing.assert_array_equal(self.read(), first)
        assert len(builds) == 2  # rebuilt once, and the file is whole again

    def test_other_grid_has_another_file(self, folder, builds, monkeypatch):
        self.read()
        monkeypatch.setattr(lineshape, "_REVISION", lineshape._REVISION + 1)
        self.read()
        assert len(builds) == len(list(folder.iterdir())) == 2

    def test_unwritable_folder_costs_time_alone(self, tmp_path, builds, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("FISHERPRINT_CACHE", str(tmp_path / "file" / "cache"))
        for _ in range(2):
            assert self.read().size
        assert len(builds) == 2


@pytest.mark.parametrize("x", [2.0, 7.0, 33.0, 250.0])
def test_grahams_rate_against_adaptive_quadrature(x):
    duration, angle, t2s = x * 10e-6, 1.3, 10e-6
    w1 = angle / duration
    integral = quad(
        lambda u: (duration - u) * oracles.greens_function(u / t2s),
        0,
        duration,
        points=[min(20 * t2s, duration / 2)],
        epsabs=0,
        epsrel=1e-11,
        limit=400,
    )[0]
    got = graham_rate(duration, angle, t2s)
    # The table is a quintic spline on cells of 5 % in TRF/T2s.
    assert got.value == pytest.approx(w1**2 / duration * integral, rel=1e-9)


def test_derivatives_of_grahams_rate():
    duration, angle, t2s = 300e-6, -1.3, 11e-6
    got = graham_rate(duration, angle, t2s)
    h = 1e-4
    # Central differences: h² = 1e-8.
    by_t2s = graham_rate(duration, angle, t2s * np.array([1 + h, 1 - h])).value
    assert got.by_t2s == pytest.approx((by_t2s[0] - by_t2s[1]) / (2 * h * t2s), rel=1e-7)
    by_angle = graham_rate(duration, angle * np.array([1 + h, 1 - h]), t2s).value
    assert got.by_angle == pytest.approx((by_angle[0] - by_angle[1]) / (2 * h * angle), rel=1e-7)


def graham_saturation(x, angle):
    return np.exp(-graham_rate(x * 10e-6, angle, 10e-6).value * x * 10e-6)


def test_graham_deviates_for_short_pulses_as_published():
    # Doctest of MRIgeneralizedBloch.jl: zs after π/2 in 100 µs with T2s 10 µs by Sled's model,
    # which for a rectangular pulse ends like Graham's; R1s 2/s and a solver of tolerance 1e-3.
    assert graham_saturation(10, np.pi / 2) == pytest.approx(0.4895365449661915, abs=1e-3)
    # The generalized Bloch model saturates more (its own doctest gives 0.0821 of 0.2).
    assert saturation(10, np.pi / 2) == pytest.approx(0.411, abs=1e-3)
    # doi:10.1002/mrm.29071: the models differ most for pulses below 300 µs. After an inversion
    # Graham's zs is positive always, while a short pulse inverts the semi-solid pool too.
    pulses = np.array([2.0, 5, 10, 30, 60, 100, 250])
    apart = graham_saturation(pulses, np.pi) - saturation(pulses, np.pi)
    assert (np.diff(apart) < 0).all()
    assert saturation(10, np.pi) < -0.25 < 0 < graham_saturation(10, np.pi)
    # Towards hard pulses: cos α against exp(−α²/2).
    assert apart[0] > 0.75


def test_graham_is_right_for_weak_pulses():
    for x in (5.0, 30.0, 200.0):
        weak = np.array([0.1, 0.05])
        apart = np.abs(graham_saturation(x, weak) - saturation(x, weak))
        # Both agree to first order in a², so what is left falls with a⁴.
        assert apart[0] / apart[1] == pytest.approx(16, rel=0.05)


def test_graham_needs_long_enough_tables():
    with pytest.raises(ValueError, match=r"TRF/T2s must lie between 2 and 250.*; got 300"):
        graham_rate(3e-3, 1.0, 10e-6)
    # But no angle is too large: the rate grows like its square.
    small, large = graham_rate(300e-6, [2.0, 6.0], 10e-6).value
    assert large == pytest.approx(9 * small, rel=1e-12)
