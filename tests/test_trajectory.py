"""Directions of the spokes and the positions of their samples."""

import numpy as np
import pytest

from fisherprint.reconstruct.trajectory import GOLDEN_MEANS, koosh_ball, readout, spokes


def test_golden_means_are_the_eigenvector_of_the_generalized_fibonacci_matrix():
    # Chan et al.: the sequence v(n+1) = M v(n) tends to the eigenvector of the largest
    # eigenvalue, and the means are the ratios of its components. Printed: 0.4656, 0.6823.
    values, vectors = np.linalg.eig([[0, 1, 0], [0, 0, 1], [1, 0, 1]])
    v = vectors[:, np.abs(values).argmax()].real
    np.testing.assert_allclose(GOLDEN_MEANS, (v[0] / v[2], v[1] / v[2]), rtol=1e-14)
    np.testing.assert_array_equal(np.round(GOLDEN_MEANS, 4), (0.4656, 0.6823))


def test_first_directions_by_hand():
    direction = koosh_ball(3)
    # n = 0 lies on the equator; n = 2 by the printed means, good to four digits.
    np.testing.assert_array_equal(direction[0], (1, 0, 0))
    z, azimuth = 2 * 0.4656 % 1, 2 * np.pi * (2 * 0.6823 % 1)
    across = np.sqrt(1 - z**2)
    by_hand = (across * np.cos(azimuth), across * np.sin(azimuth), z)
    # Rounded means shift the azimuth by 2π·2·5e-5 at most, and the slope of √(1 - z²) at
    # z = 0.93 is 2.6.
    np.testing.assert_allclose(direction[2], by_hand, atol=1e-3)


def test_directions_are_unit_vectors_of_half_a_sphere():
    direction = koosh_ball(10_000)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1, rtol=1e-14)
    assert direction[:, 2].min() >= 0
    assert koosh_ball(0).shape == (0, 3)


def _coverage(direction):
    """Largest angle in rad from any direction, both ways, to the nearest spoke."""
    # A dense set of directions that shares nothing with the golden means.
    probe = np.random.default_rng(0).normal(size=(4000, 3))
    probe /= np.linalg.norm(probe, axis=1)[:, None]
    nearest = np.abs(probe @ direction.T).max(axis=1)
    return np.arccos(np.minimum(nearest, 1)).max()


@pytest.mark.parametrize("first", [0, 777])
@pytest.mark.parametrize("size", [100, 1000])
def test_any_run_of_spokes_is_spread_evenly(first, size):
    direction = koosh_ball(first + size)[first:]
    # Spread evenly, the mean of d dᵀ is a third of the identity. Random directions miss it by
    # about 0.3/√size, 3 to 10 times this bound; even ones by the weight of a spoke or two.
    moment = direction.T @ direction / size
    np.testing.assert_allclose(moment, np.eye(3) / 3, atol=2 / size)
    # Hexagonal packing, the best there is, leaves holes of radius √(4π/(3√3 · size)) on half a
    # sphere. A generic lattice is less than twice as coarse; random directions are 2.4 times.
    best = np.sqrt(4 * np.pi / (3 * np.sqrt(3) * size))
    assert _coverage(direction) < 1.9 * best


def test_each_pulse_sees_spread_directions_over_the_cycles():
    # The spokes of one pulse of a train of 1142, over 180 cycles: every 1142nd. Bound as above.
    direction = koosh_ball(1142 * 180).reshape(180, 1142, 3)
    for pulse in (1, 500, 1140):
        moment = direction[:, pulse].T @ direction[:, pulse] / 180
        np.testing.assert_allclose(moment, np.eye(3) / 3, atol=2 / 180)


def test_readout_is_symmetric_and_within_the_matrix():
    # By hand: four voxels, sampled twice as densely as 1/FOV.
    np.testing.assert_array_equal(readout(4), (-1.5, -0.5, 0.5, 1.5))
    np.testing.assert_array_equal(
        readout(4, 2), (-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75)
    )
    assert np.abs(readout(256, 2)).max() < 128


def test_spokes_have_the_axes_of_the_reconstruction():
    direction = koosh_ball(6).reshape(2, 3, 3)
    k = spokes(direction, readout(8))
    assert k.shape == (2, 3, 8, 3)
    assert k.dtype == np.float32
    # One element by hand; float32 has a relative accuracy of 6e-8.
    np.testing.assert_allclose(k[1, 2, 5], 1.5 * direction[1, 2], rtol=1e-7)


def test_a_negative_number_of_spokes_is_refused():
    with pytest.raises(ValueError, match=r"must not be negative; got -1. Give 0 or more"):
        koosh_ball(-1)
