import pickle

import numpy as np
import pytest

import fisherprint as fp
from fisherprint import fisher, subspace
from fisherprint.fisher import SingularInformationError

NAMES = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")


def slow_bounds(signal, jacobian, noise_std=1.0):
    """Bounds of one signal (T,) with Jacobian (T, P): the covariance of linear least squares.

    Real and imaginary parts stand below each other; the inverse of GᵀG is that of R in G = QR.
    """
    columns = [*jacobian.T, signal, 1j * signal]
    G = np.array([np.r_[column.real, column.imag] for column in columns]).T
    scale = np.linalg.norm(G, axis=0)
    inverse = np.linalg.inv(np.linalg.qr(G / scale, mode="r"))
    variance = noise_std**2 * (inverse**2).sum(axis=1) / scale**2
    return variance[: jacobian.shape[1]]


def random_problem(S=5, T=30, P=4, seed=0):
    rng = np.random.default_rng(seed)
    signal, jacobian = (
        rng.normal(size=shape) + 1j * rng.normal(size=shape) for shape in ((S, T), (S, T, P))
    )
    return signal, jacobian


@pytest.fixture(scope="module")
def voxels(short_train, white_matter):
    """Twenty fingerprints of the two-pool model."""
    rng = np.random.default_rng(0)
    return fp.TwoPool(short_train).simulate(white_matter * rng.uniform(0.8, 1.2, (20, 7)))


@pytest.mark.paper("§2.1")
def test_decaying_oscillation_in_closed_form():
    # s = exp((iω - R) t) at t = 0, d, 2d ...: with q = exp(-2 R d) and the sums Σ qⁿ, Σ n qⁿ,
    # Σ n² qⁿ, CRB(R) = CRB(ω) = σ² (1-q)³ / (q d²) if M0 is complex and unknown.
    R, ω, d, σ = 3.0, 40.0, 0.02, 0.1
    t = d * np.arange(400)
    s = np.exp((1j * ω - R) * t)
    got = fp.crb(s[None], np.stack([-t * s, 1j * t * s], axis=-1)[None], noise_std=σ)
    q = np.exp(-2 * R * d)
    # The sums end at q^400 = 1e-21; rounding times a condition of about 10.
    np.testing.assert_allclose(got, [[σ**2 * (1 - q) ** 3 / (q * d**2)] * 2], rtol=1e-12)


@pytest.mark.paper("§2.1")
def test_linear_model_in_closed_form():
    # s = M0 (a + θ b) with a ⟂ b: projecting the signal out of b leaves
    # CRB(θ) = σ² (1/|b|² + θ²/|a|²).
    a, b = np.array([3, 4j, 0, 0]), np.array([0, 0, 1, 1j])
    θ = np.array([-2, 0, 0.5])
    signal, jacobian = a + θ[:, None] * b, np.tile(b[:, None], (3, 1, 1))
    got = fp.crb(signal, jacobian, noise_std=2.0)[:, 0]
    np.testing.assert_allclose(got, 4 * (1 / 2 + θ**2 / 25), rtol=1e-14)


def test_derivatives_by_a_factor_i_apart_are_told_apart():
    # A complex information would find them dependent (docs/decisions/001).
    a, b = np.array([[1, 0]]), np.array([0, 0.5])
    np.testing.assert_allclose(fp.crb(a, np.stack([b, 1j * b], -1)[None]), [[4, 4]], rtol=1e-14)


def test_agrees_with_a_slow_computation():
    signal, jacobian = random_problem()
    expected = [slow_bounds(s, J, 0.3) for s, J in zip(signal, jacobian, strict=True)]
    # A condition below 100.
    np.testing.assert_allclose(fp.crb(signal, jacobian, noise_std=0.3), expected, rtol=1e-12)


@pytest.mark.paper("§2.1")
def test_agrees_with_a_slow_computation_for_the_two_pool_model(voxels):
    expected = [slow_bounds(s, J) for s, J in zip(voxels.signal, voxels.jacobian, strict=True)]
    # Rounding 1e-16 over the smallest eigenvalue of the equilibrated information, 6e-8: 2e-9.
    np.testing.assert_allclose(fp.crb(voxels.signal, voxels.jacobian), expected, rtol=1e-7)


def test_published_value():
    # design value: the bound of m0s with a real M0, hence 9 parameters, by an independent
    # implementation (3938.9 "to 1e-4"). Whether the others are rates or times does not matter.
    i = np.arange(1, 201)
    angle, duration = np.abs(np.sin(2 * np.pi * i / 200)), np.full(200, 300e-6)
    angle[0], duration[0] = np.pi, 500e-6
    names = ("m0s", "T1f", "T2f", "Rx", "T1s", "T2s", "B0", "B1")
    model = fp.TwoPool(fp.PulseTrain(angle, duration, 3.5e-3), names)
    out = model.simulate([[0.15, 1 / 0.5, 1 / 15, 30, 1 / 3, 10e-6, 0, 1]])
    F = fisher.information(out.signal, out.jacobian, noise_std=1.0)[:, :9, :9]
    assert fisher.bounds(F)[0, 0] == pytest.approx(3938.9, rel=1e-4)


def test_information_holds_the_inner_products():
    signal, jacobian = random_problem(S=1, T=6, P=2)
    G = np.c_[jacobian[0], signal[0], 1j * signal[0]]
    expected = [[np.vdot(g, h).real / 0.5**2 for h in G.T] for g in G.T]
    got = fisher.information(signal, jacobian, noise_std=0.5)
    np.testing.assert_allclose(got, [expected], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("T", [1, 7])
def test_the_layout_in_memory_does_not_matter(order, transposed, T):
    signal, jacobian = random_problem(S=3, T=T, P=2)
    expected = [
        np.real(np.conj(G).T @ G)
        for G in (np.c_[J, s, 1j * s] for s, J in zip(signal, jacobian, strict=True))
    ]
    other = jacobian.mT.copy(order=order).mT if transposed else jacobian.copy(order=order)
    for first in (signal.copy(), signal.copy(order="F")):
        got = fisher.information(first, other, noise_std=1.0)
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


def test_single_precision_and_real_input():
    signal, jacobian = random_problem()
    single = fp.crb(signal.astype(np.complex64), jacobian.astype(np.complex64))
    # The input is rounded to 6e-8; a condition below 100.
    np.testing.assert_allclose(single, fp.crb(signal, jacobian), rtol=1e-5)
    real = fp.crb(signal.real, jacobian.real)
    np.testing.assert_array_equal(real, fp.crb(signal.real + 0j, jacobian.real + 0j))


def test_the_bound_goes_with_the_inverse_square_of_m0(voxels):
    M0 = 0.3 * np.exp(2j)
    scaled = fp.crb(M0 * voxels.signal, M0 * voxels.jacobian)
    # Rounding 1e-16 over the smallest eigenvalue, 6e-8.
    np.testing.assert_allclose(
        scaled * abs(M0) ** 2, fp.crb(voxels.signal, voxels.jacobian), rtol=1e-7
    )


def test_the_bound_goes_with_the_square_of_the_noise(voxels):
    one = fp.crb(voxels.signal, voxels.jacobian)
    # A power of two scales without rounding.
    np.testing.assert_array_equal(
        fp.crb(voxels.signal, voxels.jacobian, noise_std=0.25), one * 0.25**2
    )
    assert fp.crb(voxels.signal, voxels.jacobian, noise_std=0.01) / one == pytest.approx(1e-4)


def test_fewer_unknowns_never_raise_a_bound(voxels):
    F = fisher.information(voxels.signal, voxels.jacobian, noise_std=1.0)
    everything = fisher.bounds(F)
    for left_out in range(F.shape[1]):
        rest = np.delete(np.arange(F.shape[1]), left_out)
        fewer = fisher.bounds(F[:, rest[:, None], rest])
        # Up to the rounding of both inverses.
        assert (fewer <= everything[:, rest] * (1 + 1e-6)).all()


@pytest.mark.parametrize("rank", [5, 10, 20])
def test_compression_never_lowers_a_bound(voxels, rank):
    basis = subspace.fit(voxels.signal, rank=rank)
    whole = fp.crb(voxels.signal, voxels.jacobian)
    coefficients = fp.crb(basis.compress(voxels.signal), basis.compress(voxels.jacobian))
    assert (coefficients >= whole * (1 - 1e-6)).all()


def test_a_complete_basis_keeps_the_bound():
    signal, jacobian = random_problem(T=12)
    rng = np.random.default_rng(1)
    unitary = np.linalg.qr(rng.normal(size=(12, 12)) + 1j * rng.normal(size=(12, 12)))[0]
    basis = fp.Basis(unitary)
    got = fp.crb(basis.compress(signal), basis.compress(jacobian))
    # A condition of some thousands: 5 complex samples beyond the unknowns.
    np.testing.assert_allclose(got, fp.crb(signal, jacobian), rtol=1e-10)


def test_units_do_not_matter(voxels):
    one = fp.crb(voxels.signal, voxels.jacobian)
    # Powers of two near 1e±12 scale without rounding, and so does the equilibration.
    units = 2.0 ** np.array([40, -40, 0, 40, -40, 20, -20])
    np.testing.assert_array_equal(fp.crb(voxels.signal, voxels.jacobian * units), one / units**2)
    # Powers of ten round: 1e-16 over the smallest eigenvalue, 6e-8.
    units = 10.0 ** np.array([12, -12, 0, 12, -12, 6, -6])
    np.testing.assert_allclose(
        fp.crb(voxels.signal, voxels.jacobian * units), one / units**2, rtol=1e-7
    )


def test_rates_in_place_of_times(voxels):
    # R1 = 1/T1: ∂s/∂R = -T² ∂s/∂T, CRB(R) = CRB(T)/T⁴, and nothing else changes.
    T1 = voxels.theta[:, 1]
    jacobian = voxels.jacobian.copy()
    jacobian[..., 1] *= -(T1[:, None] ** 2)
    expected = fp.crb(voxels.signal, voxels.jacobian)
    expected[:, 1] /= T1**4
    # Rounding 1e-16 over the smallest eigenvalue, 6e-8.
    np.testing.assert_allclose(fp.crb(voxels.signal, jacobian), expected, rtol=1e-7)


def test_a_parameter_without_effect_has_an_infinite_bound_and_costs_nothing():
    signal, jacobian = random_problem(S=2)
    jacobian[0, :, 1] = 0
    got = fp.crb(signal, jacobian)
    assert np.isinf(got[0, 1])
    rest = [0, 2, 3]
    expected = slow_bounds(signal[0], jacobian[0][:, rest])
    np.testing.assert_allclose(got[0, rest], expected, rtol=1e-12)
    np.testing.assert_allclose(got[1], slow_bounds(signal[1], jacobian[1]), rtol=1e-12)


@pytest.mark.parametrize("factor", [1.0, -3.0, 1e9])
def test_parameters_that_act_alike_have_infinite_bounds_and_the_others_do_not(factor):
    signal, jacobian = random_problem(S=2)
    jacobian[0, :, 3] = factor * jacobian[0, :, 0]
    got = fp.crb(signal, jacobian)
    assert np.isinf(got[0, [0, 3]]).all()
    expected = slow_bounds(signal[0], jacobian[0][:, :3])[1:]
    np.testing.assert_allclose(got[0, [1, 2]], expected, rtol=1e-12)
    assert np.isfinite(got[1]).all()


def test_a_parameter_that_acts_like_the_scale_cannot_be_told():
    signal, jacobian = random_problem(S=2, P=3)
    jacobian[0, :, 2] = (1 - 2j) * signal[0]
    got = fp.crb(signal, jacobian)
    np.testing.assert_array_equal(np.isinf(got), [[False, False, True], [False] * 3])


def test_weak_dependence_is_finite():
    # Two columns at an angle ε: the bound of each is 1/sin² ε of its own.
    ε = 1e-5
    signal = np.array([[0, 0, 1.0]])
    jacobian = np.array([[[1, np.cos(ε)], [0, np.sin(ε)], [0, 0]]])
    # Eigenvalue ε²/2 = 5e-11 with an error of 1e-16.
    np.testing.assert_allclose(fp.crb(signal, jacobian), np.full((1, 2), ε**-2), rtol=1e-5)


def test_without_semisolid_pool_only_its_parameters_are_lost(short_train, white_matter):
    theta = np.vstack([white_matter, white_matter])
    theta[0, 0] = 0
    out = fp.TwoPool(short_train).simulate(theta)
    got = fp.crb(out.signal, out.jacobian)
    lost = np.isin(NAMES, ("Rx", "T2s"))
    np.testing.assert_array_equal(np.isinf(got), [lost, np.zeros(7, bool)])
    np.testing.assert_allclose(
        got[0, ~lost], slow_bounds(out.signal[0], out.jacobian[0][:, ~lost]), rtol=1e-6
    )


def test_nothing_to_be_told_raises_with_the_information():
    # s = M0 (θ1 a + θ2 b): each θ, and M0, can make up for the others.
    a, b = np.array([1, 2j, 0]), np.array([0, 1, 1.0])
    signal, jacobian = (a + 2 * b)[None], np.stack([a, b], axis=-1)[None]
    with pytest.raises(SingularInformationError, match=r"bound of 0, 1 in every") as caught:
        fp.crb(signal, jacobian)
    assert isinstance(caught.value, ArithmeticError)
    assert caught.value.names == ("0", "1")
    np.testing.assert_array_equal(
        caught.value.information, fisher.information(signal, jacobian, noise_std=1.0)
    )


def test_one_parameter_without_effect_on_any_sample_raises():
    signal, jacobian = random_problem()
    jacobian[..., 2] = 0
    with pytest.raises(SingularInformationError, match=r"bound of 2 in every sample\. Leave"):
        fp.crb(signal, jacobian)
    names = ("m0s", "T1", "Rx", "B0")
    with pytest.raises(SingularInformationError, match="bound of Rx in every sample") as caught:
        fp.crb(signal, jacobian, names=names)
    assert caught.value.names == ("Rx",)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.names) == (str(caught.value), ("Rx",))
    np.testing.assert_array_equal(again.information, caught.value.information)


def test_each_parameter_has_a_name():
    with pytest.raises(ValueError, match=r"each of the 4 parameters .* got m0s, T1\. Give"):
        fp.crb(*random_problem(), names=("m0s", "T1"))


def test_no_samples_have_no_bounds():
    signal, jacobian = random_problem(S=0)
    assert fp.crb(signal, jacobian).shape == (0, 4)


@pytest.mark.parametrize("noise_std", [0, -1, np.nan, np.inf])
def test_noise_must_be_positive(noise_std):
    with pytest.raises(ValueError, match="noise_std must be a positive finite number"):
        fp.crb(*random_problem(), noise_std=noise_std)


@pytest.mark.parametrize(
    ("signal", "jacobian", "message"),
    [
        ((30,), (5, 30, 4), r"signal must have the axes \(S, T\); got the shape \(30,\)"),
        ((5, 30), (5, 30), r"jacobian must have the axes \(S=5, T=30, P\); got the shape"),
        ((5, 30), (5, 4, 30), r"\(S=5, T=30, P\); got the shape \(5, 4, 30\)"),
        ((5, 30), (1, 30, 4), r"\(S=5, T=30, P\); got the shape \(1, 30, 4\)"),
    ],
)
def test_shapes_must_agree(signal, jacobian, message):
    with pytest.raises(ValueError, match=message):
        fp.crb(np.ones(signal), np.ones(jacobian))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1j * np.nan])
def test_values_must_be_finite(bad):
    signal, jacobian = random_problem()
    broken = jacobian.copy()
    broken[2, 3, 1] = bad
    with pytest.raises(ValueError, match=r"jacobian must be finite; got 1 .* index \(2, 3, 1\)"):
        fp.crb(signal, broken)
    signal[4, 0] = bad
    with pytest.raises(ValueError, match=r"signal must be finite; got 1 .* index \(4, 0\)"):
        fp.crb(signal, jacobian)
    with pytest.raises(ValueError, match="the Fisher information must be finite; got 1 NaN"):
        fisher.bounds(np.diag([1, np.nan])[None])


def matrix(*columns, noise_std=1.0):
    """Information of one sample whose last two columns are those of M0 = 1."""
    G = np.array(columns).T
    parameters, signal = G[:, :-1], G[:, -1]
    return fisher.information(signal[None], parameters[None], noise_std=noise_std)[0]


def independent(n, T=12, seed=0):
    rng = np.random.default_rng(seed)
    return list(rng.normal(size=(n, T)) + 1j * rng.normal(size=(n, T)))


def test_a_regular_information_confounds_nothing():
    assert fisher.confounded(matrix(*independent(4)), ("a", "b", "c")) == ()


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_proportional_derivatives_form_a_group_in_any_unit(unit):
    a, b, c, s = independent(4)
    F = matrix(a, b, -3 * unit * a, c, s)
    assert fisher.confounded(F, ("a", "b", "a'", "c")) == (("a", "a'"),)
    assert np.isinf(fisher.bounds(F)).tolist() == [True, False, True, False, False, False]


def test_groups_are_as_small_as_the_null_space_allows():
    a, b, c, d, s = independent(5)
    names = ("a", "b", "sum", "c", "none", "2c", "3c", "d")
    F = matrix(a, b, 1e6 * (a + b), c, 0 * c, 2 * c, 3e-6 * c, d, s)
    # One direction of three, two directions of three, one of one; d is seen.
    assert fisher.confounded(F, names) == (("a", "b", "sum"), ("c", "2c", "3c"), ("none",))
    assert fisher.explained(("none",)) == "none has no effect on the signal"
    assert fisher.explained(("a", "b", "sum")) == "a, b and sum cannot be told apart"


def test_a_parameter_may_be_confounded_with_the_scale():
    a, s = independent(2)
    # It turns the signal as M0 does; a change of both parts of M0 takes all three.
    assert fisher.confounded(matrix(a, 1j * s, s), ("a", "φ")) == (("φ", "Im M0"),)
    both = matrix(a, (1 + 1j) * s, s)
    assert fisher.confounded(both, ("a", "φ")) == (("φ", "Re M0", "Im M0"),)
    # All unknowns may be named, too.
    assert fisher.confounded(both, ("a", "φ", "x", "y")) == (("φ", "x", "y"),)


def test_confounded_needs_a_finite_matrix_with_names():
    F = matrix(*independent(3))
    with pytest.raises(ValueError, match=r"information must have the axes \(Q=3, Q=3\); got"):
        fisher.confounded(F, ("a", "b", "c"))
    with pytest.raises(ValueError, match="must be finite"):
        fisher.confounded(F * np.nan, ("a", "b"))


def test_an_empty_semi_solid_pool_hides_its_parameters_one_by_one(short_train, white_matter):
    theta = white_matter.copy()
    theta[NAMES.index("m0s")] = 0
    out = fp.TwoPool(short_train).simulate(theta[None])
    F = fisher.information(out.signal, out.jacobian, noise_std=1.0)[0]
    assert fisher.confounded(F, NAMES) == (("Rx",), ("T2s",))


def test_the_error_says_what_cannot_be_told_apart():
    signal, jacobian = random_problem()
    jacobian[..., 3] = -2 * jacobian[..., 1]
    jacobian[0, :, 3] = jacobian[0, :, 0]
    jacobian[0, :, 1] = 0
    with pytest.raises(SingularInformationError) as caught:
        fp.crb(signal, jacobian, names=("m0s", "T1", "T2f", "Rx"))
    # T1 and Rx in four samples; in one T1 alone, and Rx with m0s.
    assert caught.value.names == ("T1", "Rx")
    assert caught.value.groups == (("T1", "Rx"),)
    assert "(T1 and Rx cannot be told apart), with an infinite bound of T1, Rx" in str(
        caught.value
    )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.groups) == (str(caught.value), caught.value.groups)


def real(columns):
    """Real and imaginary part below each other."""
    return np.concatenate([columns.real, columns.imag])


def test_an_efficient_direction_is_what_no_other_unknown_imitates():
    signal, jacobian = random_problem()
    directions = fisher.efficient_directions(signal, jacobian)
    bound = fp.crb(signal, jacobian)
    for s, J, D, crb in zip(signal, jacobian, directions, bound, strict=True):
        # A condition below 100.
        np.testing.assert_allclose(np.linalg.norm(D, axis=1), 1, rtol=1e-12)
        products = real(np.c_[J, s, 1j * s]).T @ real(D.T)
        expected = np.vstack([np.diag(1 / np.sqrt(crb)), np.zeros((2, 4))])
        np.testing.assert_allclose(products, expected, atol=1e-12)


def test_efficient_directions_of_the_two_pool_model(voxels):
    directions = fisher.efficient_directions(voxels.signal, voxels.jacobian)
    # Rounding 1e-16 over the smallest eigenvalue of the equilibrated information, 6e-8: 2e-9.
    np.testing.assert_allclose(np.linalg.norm(directions, axis=-1), 1, rtol=1e-7)
    own = np.einsum("stp,spt->sp", voxels.jacobian.conj(), directions).real
    np.testing.assert_allclose(own**-2, fp.crb(voxels.signal, voxels.jacobian), rtol=1e-6)


def test_nothing_is_left_of_what_cannot_be_told():
    signal, jacobian = random_problem(S=3)
    jacobian[0, :, 1] = 0
    jacobian[1, :, 3] = -2 * jacobian[1, :, 0]
    jacobian[2, :, 2] = 1j * signal[2]
    directions = fisher.efficient_directions(signal, jacobian)
    norms = np.linalg.norm(directions, axis=-1)
    expected = [[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]]
    # A condition below 100.
    np.testing.assert_allclose(norms, expected, atol=1e-12)


COVARIANCE = np.array([[4.0, 0.3], [0.3, 0.25]])


def linear_problem(noise_std, T=9):
    """A signal that is linear in θ, with M0 among the unknowns: real G, F and the prior's root."""
    rng = np.random.default_rng(3)
    G = rng.normal(size=(2 * T, 4)) * [1.0, 5.0, 2.0, 2.0]
    return G, G.T @ G / noise_std**2, np.linalg.cholesky(COVARIANCE)


@pytest.mark.parametrize("noise_std", [0.5, 5.0, 50.0])
def test_the_least_error_of_a_linear_model_with_a_normal_prior_is_the_bound(noise_std):
    G, F, root = linear_problem(noise_std)
    bound = fisher.van_trees(F, COVARIANCE)
    # The posterior mean, as least squares with the prior's equations below the data's.
    stacked = np.vstack([G / noise_std, np.c_[np.linalg.inv(root), np.zeros((2, 2))]])
    n = 20_000
    rng = np.random.default_rng(4)
    θ = root @ rng.normal(size=(2, n))
    unknowns = np.vstack([θ, np.full((2, n), [[1.0], [-2.0]])])
    y = G @ unknowns + noise_std * rng.normal(size=(len(G), n))
    mean = np.linalg.lstsq(stacked, np.vstack([y / noise_std, np.zeros((2, n))]))[0][:2]
    error = ((mean - θ) ** 2).mean(axis=1)
    # The mean of N squares of Gaussian errors has relative standard error √(2/N); allow four.
    np.testing.assert_allclose(error, bound, rtol=4 * np.sqrt(2 / n))
    # In closed form: what that least squares leaves. A condition of some hundred.
    covariance = np.linalg.inv(np.linalg.qr(stacked, mode="r"))
    np.testing.assert_allclose(bound, (covariance**2).sum(axis=1)[:2], rtol=1e-10)


def test_without_noise_it_is_the_bound_and_without_signal_the_prior(voxels):
    spread = 0.3 * np.abs(voxels.theta).mean(axis=0)
    covariance = np.diag(spread**2)
    F = fisher.information(voxels.signal, voxels.jacobian, noise_std=1.0)
    crb = fisher.bounds(F)[:, :7]
    # Relative deviations are CRB/prior and prior/CRB.
    np.testing.assert_allclose(fisher.van_trees(1e20 * F, covariance), 1e-20 * crb, rtol=1e-6)
    still = fisher.van_trees(1e-20 * F, covariance)
    np.testing.assert_allclose(still, np.tile(spread**2, (20, 1)), rtol=1e-6)
    # Between them below both.
    middle = fisher.van_trees(F, covariance)
    assert (middle <= np.minimum(crb, spread**2) * (1 + 1e-6)).all()


def test_the_mean_of_local_ones_is_above_the_global_bound(voxels):
    covariance = np.diag((0.3 * np.abs(voxels.theta).mean(axis=0)) ** 2)
    for noise_std in (1e-3, 1e-2, 0.1):
        F = fisher.information(voxels.signal, voxels.jacobian, noise_std=noise_std)
        mean = fisher.van_trees(F, covariance).mean(axis=0)
        whole = fisher.van_trees(F.mean(axis=0), covariance)
        # Jensen's inequality, up to the rounding of both inverses.
        assert (whole <= mean * (1 + 1e-6)).all()
        assert whole.shape == (7,)


def test_the_global_bound_holds_for_a_nonlinear_model():
    # s_t = M0 exp(-R t) with R normal. The posterior mean by sums over a grid, complex M0
    # integrated out with a flat prior, is the best estimator there is.
    rng = np.random.default_rng(6)
    t, noise_std, n = 0.05 * np.arange(12), 0.3, 4000
    grid = np.linspace(1.0, 9.0, 801)
    weight = np.exp(-0.5 * (grid - 5) ** 2)
    decay = np.exp(-grid[:, None] * t)
    R = 5 + rng.normal(size=n)
    inside = np.abs(R - 5) < 4
    y = np.exp(-R[:, None] * t) + noise_std * rng.normal(size=(n, 12, 2)) @ [1, 1j]
    power = (decay**2).sum(axis=1)
    logarithm = np.abs(y @ decay.T) ** 2 / (2 * noise_std**2 * power) - np.log(power)
    posterior = weight * np.exp(logarithm - logarithm.max(axis=1, keepdims=True))
    estimate = posterior @ grid / posterior.sum(axis=1)
    squares = ((estimate - R) ** 2)[inside]
    signal = np.exp(-R[:, None] * t)
    F = fisher.information(signal, (-t * signal)[..., None], noise_std=noise_std)
    bound = fisher.van_trees(F.mean(axis=0), np.eye(1))[0]
    # Four standard errors of the mean of the squares.
    slack = 4 * squares.std() / np.sqrt(len(squares))
    assert bound < squares.mean() + slack
    # It says something: neither the prior alone nor the data alone are as good.
    assert bound < 0.9
    assert bound < fisher.bounds(F)[:, 0].mean()
    assert squares.mean() < 1


def test_a_prior_makes_every_bound_finite(short_train, white_matter):
    theta = white_matter.copy()
    theta[0] = 0  # no semi-solid pool, so Rx and T2s have no effect
    out = fp.TwoPool(short_train).simulate(theta[None])
    F = fisher.information(out.signal, out.jacobian, noise_std=0.01)
    spread = np.array([0.08, 0.8, 0.2, 20.0, 3e-6, 900.0, 0.3])
    got = fisher.van_trees(F, np.diag(spread**2))[0]
    lost = np.isin(NAMES, ("Rx", "T2s"))
    # The prior is all there is; rounding of an inverse.
    np.testing.assert_allclose(got[lost], spread[lost] ** 2, rtol=1e-9)
    assert (got[~lost] < spread[~lost] ** 2).all()


def test_units_do_not_matter_for_the_bound_with_a_prior():
    signal, jacobian = random_problem(P=2)
    units = np.array([1e6, 1e-9])
    one = fisher.van_trees(fisher.information(signal, jacobian, noise_std=5.0), COVARIANCE)
    other = fisher.van_trees(
        fisher.information(signal, jacobian / units, noise_std=5.0),
        COVARIANCE * np.outer(units, units),
    )
    # A condition below 100.
    np.testing.assert_allclose(other, one * units**2, rtol=1e-12)


@pytest.mark.parametrize(
    ("covariance", "message"),
    [
        (np.ones((2, 2)), "symmetric and positive definite; got correlations with the eigen"),
        (np.diag([1.0, 0.0]), "positive definite"),
        (np.diag([1.0, -1.0]), "positive definite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (np.eye(3), r"information must have the axes \(S, P \+ 2=5, P \+ 2=5\); got"),
        (np.ones((2, 3)), r"covariance of the prior must have the axes \(P, P=2\)"),
        (np.diag([1.0, np.nan]), "covariance of the prior must be finite"),
    ],
)
def test_a_covariance_that_is_none(covariance, message):
    F = fisher.information(*random_problem(P=2), noise_std=1.0)
    with pytest.raises(ValueError, match=message):
        fisher.van_trees(F, covariance)


# What is known, and what is stored.


def test_packing_loses_nothing():
    signal, jacobian = random_problem(P=5)
    F = fisher.information(signal, jacobian, noise_std=0.3)
    triangle = fisher.packed(F)
    assert triangle.shape == (5, 28)  # 7 · 8/2
    np.testing.assert_array_equal(fisher.unpacked(triangle), np.tril(F) + np.tril(F, -1).mT)
    np.testing.assert_array_equal(fisher.packed(fisher.unpacked(triangle)), triangle)
    # The decomposition reads the lower triangle alone: the bounds are the same bit for bit.
    np.testing.assert_array_equal(fisher.bounds(fisher.unpacked(triangle)), fisher.bounds(F))


def test_what_is_known_leaves_the_information_as_if_it_had_no_column():
    signal, jacobian = random_problem(P=4)
    F = fisher.information(signal, jacobian, noise_std=1.0)
    left = fisher.information(signal, jacobian[..., [0, 3]], noise_std=1.0)
    # Sums of the same products, perhaps in another order.
    np.testing.assert_allclose(fisher.given(F, [2, 1]), left, rtol=1e-12)
    np.testing.assert_array_equal(fisher.given(F, []), F)


def test_the_prior_of_what_is_left_is_the_one_given_what_is_known():
    """Without data, the variance of one normal variable given another: C_aa - C_ab²/C_bb."""
    F = 1e-20 * np.eye(4)
    (bound,) = fisher.van_trees(F, COVARIANCE, known=[1])
    assert bound == pytest.approx(4.0 - 0.3**2 / 0.25, rel=1e-9)
    # With data: what is known does not matter where it is exact, that is, measured for ever.
    F = np.diag([0.7, 1e15, 1.0, 1.0])
    (bound,) = fisher.van_trees(F, COVARIANCE, known=[1])
    assert bound == pytest.approx(fisher.van_trees(F, COVARIANCE)[0], rel=1e-9)
    assert bound == pytest.approx(1 / (0.7 + 1 / 3.64), rel=1e-9)


def test_both_forms_over_draws_of_a_prior():
    θ = np.random.default_rng(7).normal(size=(500, 3)) * [1.0, 10.0, 0.1]
    C = np.cov(θ.T)
    # Information that differs from draw to draw, of uncoupled parameters.
    F = np.zeros((500, 5, 5))
    F[:, range(5), range(5)] = np.exp(θ[:, :1]) * [1.0, 0.01, 100.0, 1.0, 1.0]
    found = fisher.prior_bounds(F, θ, ("a", "b", "c"), snr=[1.0, 5.0], known=["b"])
    assert found.names == ("a", "c")
    np.testing.assert_allclose(found.spread, θ[:, [0, 2]].std(axis=0), rtol=1e-12)
    prior = np.linalg.inv(C)[np.ix_([0, 2], [0, 2])]
    for level, overall, local in zip([1, 5], found.overall, found.local, strict=True):
        data = level**2 * F[:, [0, 2]][:, :, [0, 2]]
        # A condition of some hundred.
        expected = np.diag(np.linalg.inv(data.mean(axis=0) + prior))
        np.testing.assert_allclose(overall, expected, rtol=1e-10)
        each = np.diagonal(np.linalg.inv(data + prior), axis1=1, axis2=2)
        np.testing.assert_allclose(local, each.mean(axis=0), rtol=1e-10)
    assert (found.overall < found.local).all()
    twice = fisher.prior_bounds(F, θ, ("a", "b", "c"), snr=[1.0, 5.0], known=["b", "b"])
    np.testing.assert_array_equal(twice.overall, found.overall)
    one = found.select(["c"])
    np.testing.assert_array_equal(one.overall, found.overall[:, 1:])
    np.testing.assert_array_equal(one.spread, found.spread[1:])
    with pytest.raises(KeyError, match="unknown parameter 'b'; known are a, c"):
        found.select(["b"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"snr": [0.0]}, ValueError, "SNRmax must be a positive"),
        ({"known": ["x"]}, KeyError, "unknown parameter 'x'; known are a, b"),
        ({"known": ["a", "b"]}, ValueError, "at least one unknown parameter; got all of a, b"),
        ({"theta": np.ones((2, 2))}, ValueError, "more draws .* than its 2 parameters; got 2"),
    ],
)
def test_bounds_of_a_prior_refuse(change, error, message):
    theta = change.pop("theta", np.random.default_rng(0).normal(size=(9, 2)))
    F = np.tile(np.eye(4), (len(theta), 1, 1))
    with pytest.raises(error, match=message):
        fisher.prior_bounds(F, theta, ("a", "b"), **{"snr": [1.0], **change})
