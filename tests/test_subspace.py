import h5py
import numpy as np
import pytest
from scipy.linalg import subspace_angles

import fisherprint as fp
from fisherprint import subspace

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
