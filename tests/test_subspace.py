import h5py
import numpy as np
import pytest
from scipy.linalg import subspace_angles

import fisherprint as fp
from fisherprint import subspace
from fisherprint.models import Fingerprints
from fisherprint.parameters import paper_prior

S, T, K = 60, 24, 7


def complex_normal(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def signals(singular_values):
    """Signals (S, T) with these singular values and random singular vectors."""
    left = np.linalg.qr(complex_normal((S, T), 1))[0]
    right = np.linalg.qr(complex_normal((T, T), 2))[0]
    return left * singular_values @ right


# From 1 down to 1e-4 at the K-th, one decade lower beyond.
SINGULAR = np.r_[np.logspace(0, -4, K), np.logspace(-5, -6, T - K)]
SIGNAL = signals(SINGULAR)


@pytest.mark.paper("§2.4")
def test_the_subspace_is_that_of_the_svd():
    basis = subspace.fit(SIGNAL, rank=K)
    expected = np.linalg.svd(SIGNAL, full_matrices=False)[2][:K].T
    # The squared singular values span (1e-4)² = 1e-8 of which 1e-16 is rounding.
    assert np.sin(subspace_angles(basis.vectors, expected)).max() < 1e-7
    # Not only the subspace, each vector, up to its phase.
    overlap = np.abs((basis.vectors.conj() * expected).sum(axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-12)


def test_vectors_are_orthonormal():
    vectors = subspace.fit(SIGNAL, rank=K).vectors
    assert vectors.shape == (T, K)
    # Rounding of an eigendecomposition of 24 rows.
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(K), atol=1e-13)


def test_the_largest_entry_of_a_vector_is_real_and_positive():
    vectors = subspace.fit(SIGNAL, rank=K).vectors
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(K)]
    assert (largest.real > 0).all()
    np.testing.assert_allclose(largest.imag, 0, atol=1e-16)


def test_phases_of_the_signals_do_not_matter():
    phases = np.exp(2j * np.pi * np.random.default_rng(3).uniform(size=(S, 1)))
    turned = subspace.fit(phases * SIGNAL, rank=K).vectors
    # As exact as the vectors themselves.
    np.testing.assert_allclose(turned, subspace.fit(SIGNAL, rank=K).vectors, atol=1e-7)


@pytest.mark.parametrize("size", [1, 7, 60, 100])
def test_batches_are_as_good_as_the_whole(size):
    batches = (SIGNAL[first : first + size] for first in range(0, S, size))
    got = subspace.fit(batches, rank=K).vectors
    np.testing.assert_allclose(got, subspace.fit(SIGNAL, rank=K).vectors, atol=1e-7)


def test_single_precision_signals_lose_no_more_than_their_own_digits():
    expected = subspace.fit(SIGNAL, rank=4).vectors
    got = subspace.fit(SIGNAL.astype(np.complex64), rank=4).vectors
    # Rounding 6e-8 of a largest singular value of 1 over that of the fourth vector, 1e-2, and T.
    np.testing.assert_allclose(got, expected, atol=6e-8 / 1e-2 * np.sqrt(T))


def test_real_signals_have_a_real_basis():
    vectors = subspace.fit(SIGNAL.real, rank=3).vectors
    np.testing.assert_array_equal(vectors.imag, 0)


def test_the_energy_is_that_of_the_singular_values():
    for rank in (1, K, T):
        kept = (SINGULAR[:rank] ** 2).sum() / (SINGULAR**2).sum()
        # Rounding of sums of S·T squares.
        assert subspace.fit(SIGNAL, rank=rank).energy(SIGNAL) == pytest.approx(kept, abs=1e-13)


@pytest.mark.paper("§2.4")
def test_no_other_subspace_of_that_rank_holds_more_energy():
    best = subspace.fit(SIGNAL, rank=3).energy(SIGNAL)
    for seed in range(5):
        other = fp.Basis(np.linalg.qr(complex_normal((T, 3), seed))[0])
        assert other.energy(SIGNAL) < best


@pytest.fixture
def basis():
    return fp.Basis(np.linalg.qr(complex_normal((T, K), 4))[0])


def test_compress_is_the_adjoint_and_expand_its_inverse_within(basis):
    coefficients = complex_normal((5, K), 5)
    inside = basis.expand(coefficients)
    # Both as sums over one axis, in the order that the formulas have: s = U c, c = Uᴴ s.
    U = basis.vectors
    np.testing.assert_allclose(inside, np.einsum("tk,sk->st", U, coefficients), atol=1e-14)
    other = complex_normal((5, T), 6)
    expected = np.einsum("tk,st->sk", U.conj(), other)
    np.testing.assert_allclose(basis.compress(other), expected, atol=1e-13)
    np.testing.assert_allclose(basis.compress(inside), coefficients, atol=1e-13)
    assert basis.energy(inside) == pytest.approx(1, abs=1e-14)


def test_what_expand_leaves_is_orthogonal(basis):
    other = complex_normal((5, T), 7)
    projected = basis.expand(basis.compress(other))
    np.testing.assert_allclose(basis.compress(other - projected), 0, atol=1e-13)
    kept = np.linalg.norm(projected) ** 2 / np.linalg.norm(other) ** 2
    assert basis.energy(other) == pytest.approx(kept, rel=1e-13)
    assert basis.energy(other - projected) == pytest.approx(0, abs=1e-26)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_jacobian_is_compressed_column_by_column(basis, order):
    jacobian = complex_normal((5, T, 3), 8).copy(order=order)
    got = basis.compress(jacobian)
    assert got.shape == (5, K, 3)
    for p in range(3):
        np.testing.assert_allclose(got[..., p], basis.compress(jacobian[..., p]), atol=1e-13)


def test_values_are_frozen_and_not_shared_with_the_caller():
    vectors = np.eye(4, 2, dtype=complex)
    own = fp.Basis(vectors)
    vectors[:] = 0
    np.testing.assert_array_equal(own.vectors, np.eye(4, 2))
    with pytest.raises(ValueError, match="read-only"):
        own.vectors[0, 0] = 0


def test_the_digest_changes_with_the_content(basis):
    assert fp.Basis(basis.vectors).digest == basis.digest
    moved = basis.vectors.copy()
    moved[3, 2] = moved[3, 2].real + 1j * np.nextafter(moved[3, 2].imag, 1)
    others = (moved, basis.vectors[:, :-1], basis.vectors[:, ::-1])
    assert len({basis.digest} | {fp.Basis(vectors).digest for vectors in others}) == 4


def test_a_basis_in_single_precision_is_accepted(basis):
    single = fp.Basis(basis.vectors.astype(np.complex64))
    assert single.vectors.dtype == np.complex128
    assert single.rank == K


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.eye(3) * 1.001, r"orthonormal columns .* off the identity by 0.002\. Transpose or"),
        (np.eye(5, 3).T, r"orthonormal columns of a \(T, K\) array; got the shape \(3, 5\)"),
        (np.ones(3), r"must have the axes \(T, K\); got the shape \(3,\)"),
        (np.array([[1, np.nan], [0, 1]]), "basis vectors must be finite; got 1 NaN or Inf of 4"),
    ],
)
def test_no_basis(vectors, message):
    with pytest.raises(ValueError, match=message):
        fp.Basis(vectors)


@pytest.mark.parametrize("rank", [0, -1, T + 1])
def test_impossible_ranks(rank):
    with pytest.raises(ValueError, match=f"between 1 and {T}, .*; got {rank}"):
        subspace.fit(SIGNAL, rank=rank)


def test_the_rank_is_at_most_the_number_of_signals():
    with pytest.raises(ValueError, match=r"between 1 and 5, .*; got 6"):
        subspace.fit(SIGNAL[:5], rank=6)
    with pytest.raises(ValueError, match=r"between 1 and 5, .*; got 6"):
        subspace.fit((SIGNAL[s : s + 1] for s in range(5)), rank=6)
    with pytest.raises(ValueError, match="between 1 and 0"):
        subspace.fit(iter(()), rank=1)


def test_axes_that_do_not_belong_to_the_basis(basis):
    with pytest.raises(ValueError, match=r"signal must have the axes \(S, T=24\).* \(5, 23\)"):
        basis.compress(np.ones((5, 23)))
    with pytest.raises(ValueError, match=r"signal must have the axes \(S, T=24, P\).* \(5, 3, 24"):
        basis.compress(np.ones((5, 3, 24)))
    with pytest.raises(ValueError, match=r"coefficients must have the axes \(S, K=7\).* \(5, 8\)"):
        basis.expand(np.ones((5, 8)))
    with pytest.raises(ValueError, match=r"signal must have the axes \(S, T=24\).* \(2, 23\)"):
        subspace.fit([np.ones((2, 24)), np.ones((2, 23))], rank=1)


def test_signals_must_be_finite():
    broken = SIGNAL.copy()
    broken[3, 4] = np.nan
    with pytest.raises(ValueError, match="signal must be finite; got 1 NaN or Inf"):
        subspace.fit([SIGNAL, broken], rank=1)


def fingerprints(n_parameters=3, seed=10):
    shape = (S, T, n_parameters)
    return Fingerprints(np.zeros((S, n_parameters)), SIGNAL, complex_normal(shape, seed))


def slow_columns(given, weight):
    """[(1 - l)·s, l·d⊥_1 ... l·d⊥_P] of each fingerprint, (T, S (1 + P)), by least squares.

    What is left of a derivative after the best fit, in real and imaginary part, of all the others
    and of s and i·s.
    """
    columns = []
    for s, J in zip(given.signal, given.jacobian, strict=True):
        columns.append((1 - weight) * s)
        for p in range(J.shape[1]):
            others = np.c_[np.delete(J, p, axis=1), s, 1j * s]
            parts, own = (np.concatenate([z.real, z.imag]) for z in (others, J[:, p]))
            left = own - parts @ np.linalg.lstsq(parts, own)[0]
            if np.linalg.norm(left) > 1e-9 * np.linalg.norm(own):
                left /= np.linalg.norm(left)
                columns.append(weight * (left[:T] + 1j * left[T:]))
    return np.array(columns).T


def assert_same_subspace(got, expected, atol):
    np.testing.assert_allclose(
        got.vectors @ got.vectors.conj().T, expected @ expected.conj().T, atol=atol
    )


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_the_crb_svd_is_the_svd_of_signals_and_what_is_left_of_the_derivatives(weight):
    given = fingerprints()
    got = subspace.fit(given, rank=K, method="crb-svd", weight=weight)
    expected = np.linalg.svd(slow_columns(given, weight), full_matrices=False)[0][:, :K]
    # Rounding of some hundred columns over gaps of some percent between the singular values.
    assert_same_subspace(got, expected, atol=1e-10)
    assert weight != 0.5 or np.array_equal(
        got.vectors, subspace.fit(given, rank=K, method="crb-svd").vectors
    )


def test_without_weight_the_crb_svd_is_the_svd():
    got = subspace.fit(fingerprints(), rank=4, method="crb-svd", weight=0)
    # Sums of zeros in other blocks: singular values down to 1e-2, squared.
    assert_same_subspace(got, subspace.fit(SIGNAL, rank=4).vectors, atol=1e-10)


def test_neither_units_nor_order_of_the_parameters_matter():
    given = fingerprints()
    other = Fingerprints(
        given.theta, given.signal, (given.jacobian * [1e-9, -1.0, 1e12])[..., [2, 0, 1]]
    )
    one, another = (subspace.fit(x, rank=K, method="crb-svd") for x in (given, other))
    # Rounding, as above.
    assert_same_subspace(one, another.vectors, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_of_fingerprints_are_as_good_as_the_whole(size):
    given = fingerprints()
    batches = (
        Fingerprints(*(part[first : first + size] for part in vars(given).values()))
        for first in range(0, S, size)
    )
    got = subspace.fit(batches, rank=K, method="crb-svd")
    assert_same_subspace(got, subspace.fit(given, rank=K, method="crb-svd").vectors, atol=1e-10)


def test_a_derivative_that_vanishes_or_cannot_be_told_adds_nothing():
    given = fingerprints(n_parameters=2)
    idle = np.zeros((S, T, 1))
    twin = 3 * given.jacobian[..., 1:]
    scale = (2 - 1j) * given.signal[..., None]
    for extra in (idle, scale):
        more = Fingerprints(
            given.theta, given.signal, np.concatenate([given.jacobian, extra], axis=-1)
        )
        got = subspace.fit(more, rank=K, method="crb-svd")
        expected = subspace.fit(given, rank=K, method="crb-svd")
        # Rounding of an information of another size.
        assert_same_subspace(got, expected.vectors, atol=1e-10)
    # Of two that act alike nothing is left, of the other all but what they imitate.
    more = Fingerprints(given.theta, given.signal, np.concatenate([given.jacobian, twin], axis=-1))
    expected = np.linalg.svd(slow_columns(more, 0.5), full_matrices=False)[0][:, :K]
    assert_same_subspace(subspace.fit(more, rank=K, method="crb-svd"), expected, atol=1e-10)


def test_an_empty_semi_solid_pool_adds_nothing_of_its_parameters(short_train, white_matter):
    names = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")
    theta = np.tile(white_matter, (6, 1))
    theta[:, names.index("m0s")] = 0
    theta[:, names.index("T1")] = np.linspace(0.8, 2, 6)
    with_pool = fp.TwoPool(short_train).simulate(theta)
    seen = [names.index(name) for name in ("m0s", "T1", "T2f", "B0", "B1")]
    without = Fingerprints(
        with_pool.theta[:, seen], with_pool.signal, with_pool.jacobian[..., seen]
    )
    one, other = (subspace.fit(given, rank=8, method="crb-svd") for given in (with_pool, without))
    # Their columns are zeros, which an information of another size rounds otherwise: 1e-16 over
    # its smallest eigenvalue of 1e-7, and over gaps between the singular values of a few percent.
    assert_same_subspace(one, other.vectors, atol=1e-6)


def test_a_basis_of_the_directions_alone_loses_nothing_of_the_bound():
    # One fingerprint: s and all d⊥ span what F needs.
    given = fingerprints()
    one = Fingerprints(*(part[:1] for part in vars(given).values()))
    basis = subspace.fit(one, rank=4, method="crb-svd")
    whole = fp.crb(one.signal, one.jacobian)
    got = fp.crb(basis.compress(one.signal), basis.compress(one.jacobian))
    # Not so the largest four directions of signals and derivatives as they are.
    plain = subspace.fit(np.concatenate([SIGNAL[:1], SIGNAL[1:4]]), rank=4)
    worse = fp.crb(plain.compress(one.signal), plain.compress(one.jacobian))
    # A condition below 100.
    np.testing.assert_allclose(got, whole, rtol=1e-11)
    assert (worse > 1.1 * whole).all()


def test_the_crb_svd_keeps_the_bound_where_the_svd_does_not(paper_train):
    model = fp.TwoPool(paper_train)
    prior = paper_prior(model.names, repetition_time=paper_train.repetition_time)
    rng = np.random.default_rng(0)
    batches = [model.simulate(prior.sample(128, rng=rng)) for _ in range(4)]
    test = model.simulate(prior.sample(512, rng=rng))
    whole = fp.crb(test.signal, test.jacobian)
    costs, lost = {}, {}
    for method, given in (("svd", [batch.signal for batch in batches]), ("crb-svd", batches)):
        basis = subspace.fit(given, rank=13, method=method)
        bound = fp.crb(basis.compress(test.signal), basis.compress(test.jacobian))
        cost = np.median(bound / whole, axis=0)
        costs[method] = {name: cost[model.index(name)] for name in ("m0s", "T1", "T2f")}
        lost[method] = 1 - basis.energy(test.signal)
    # Of 2,048 fingerprints: 2.05, 1.10 and 1.69, against 3.14, 1.27 and 2.91; of 512, within 5 %.
    assert costs["crb-svd"]["m0s"] < 2.2
    assert costs["crb-svd"]["T2f"] < 1.9
    assert costs["svd"]["m0s"] > 2.8
    assert costs["svd"]["T2f"] > 2.6
    assert costs["crb-svd"]["T1"] < costs["svd"]["T1"]
    # 0.29 % of the energy is the price; with 512 fingerprints 0.2 to 0.3 %.
    assert 0 < lost["crb-svd"] - lost["svd"] < 0.005


def test_what_the_methods_take():
    given = fingerprints()
    with pytest.raises(TypeError, match="with their Jacobians; got ndarray"):
        subspace.fit(SIGNAL, rank=2, method="crb-svd")
    with pytest.raises(TypeError, match="expected signals; got Fingerprints"):
        subspace.fit([given], rank=2)
    with pytest.raises(ValueError, match="expected the method svd or crb-svd; got 'pca'"):
        subspace.fit(given, rank=2, method="pca")
    with pytest.raises(ValueError, match=r"no weight for the SVD.*got 0\.5\. Drop it"):
        subspace.fit(SIGNAL, rank=2, weight=0.5)
    for weight in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=f"between 0, signals alone, and 1; got {weight}"):
            subspace.fit(given, rank=2, method="crb-svd", weight=weight)
    with pytest.raises(ValueError, match=r"jacobian must have the axes \(S=60, T=24, P\); got"):
        flat = Fingerprints(given.theta, SIGNAL, given.jacobian[..., 0])
        subspace.fit(flat, rank=2, method="crb-svd")
    broken = given.jacobian.copy()
    broken[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match=r"jacobian must be finite; got 1 .* \(1, 2, 0\)"):
        subspace.fit(Fingerprints(given.theta, SIGNAL, broken), rank=2, method="crb-svd")


# m0s, T1f, T1s, T2f, Rx, T2s at 3 T: white and grey matter, caudate, putamen, pallidum, thalamus.
BRAIN = np.array(
    [
        [0.212, 1.84, 0.340, 76.9e-3, 13.6, 12.5e-6],
        [0.098, 2.46, 0.420, 83.0e-3, 14.0, 14.4e-6],
        [0.113, 1.95, 0.432, 73.3e-3, 13.8, 15.1e-6],
        [0.118, 1.84, 0.385, 67.4e-3, 14.9, 15.4e-6],
        [0.164, 1.66, 0.351, 59.3e-3, 15.8, 14.9e-6],
        [0.158, 2.02, 0.396, 70.8e-3, 14.2, 13.0e-6],
    ]
)


def test_a_published_subspace_holds_the_signals_of_its_trains(data):
    with h5py.File(data / "invivo" / "basis15.h5") as file:
        basis = fp.Basis(file["U"][()].T)
    trains = fp.PulseTrain.read(data / "invivo" / "control.mat", repetition_time=3.5e-3)
    model = fp.TwoPool(trains, ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s", "B0", "B1"))
    signal = model.signal(np.c_[BRAIN, np.full(6, 100.0), np.ones(6)])
    # Of such signals, 13 to 15 coefficients of a prior of the authors' own lose 1e-4 to 1e-3.
    assert 1 - basis.energy(signal) < 1.5e-3
    # Trains in another order, of the same energy, do not belong to it.
    assert 1 - basis.energy(np.roll(signal, 1142, axis=1)) > 0.5
