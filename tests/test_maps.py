from __future__ import annotations

import importlib.util
import tracemalloc

import numpy as np
import pytest

from fisherprint import maps
from fisherprint.maps import automatic_mask, estimate_maps

NAMES = ("size", "angle")


def size_and_angle(coefficients):
    """An estimator with a known answer."""
    return np.stack([np.abs(coefficients[..., 0]), np.angle(coefficients[..., 1])], -1)


def random_coefficients(*shape):
    rng = np.random.default_rng(3)
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


@pytest.mark.paper("§3.4")
@pytest.mark.parametrize("spatial", [(11,), (5, 7), (5, 7, 3)])
def test_each_voxel_gets_its_own_estimate_however_the_volume_is_cut(spatial, monkeypatch):
    coefficients = random_coefficients(*spatial, 4)
    mask = np.random.default_rng(4).random(spatial) < 0.7
    whole = estimate_maps(coefficients, size_and_angle, NAMES, mask=mask)
    monkeypatch.setattr(maps, "_CHUNK", 4)
    in_pieces = estimate_maps(coefficients, size_and_angle, NAMES, mask=mask)
    # The same function of the same numbers: equal to the last bit.
    np.testing.assert_array_equal(whole.values[mask], size_and_angle(coefficients[mask]))
    np.testing.assert_array_equal(in_pieces.values, whole.values)
    assert np.isnan(whole.values[~mask]).all()
    assert whole.n_failed == 0
    np.testing.assert_array_equal(whole["angle"], whole.values[..., 1])


def test_unusable_voxels_become_nan_are_counted_and_are_not_shown_to_the_estimator():
    coefficients = random_coefficients(6, 5, 1, 3)
    coefficients[0, 0, 0, 1] = np.nan
    coefficients[1, 1, 0] = np.inf
    coefficients[2, 2] = 0
    coefficients[5, 4, 0, 0] = np.nan  # outside the mask: nobody asked
    mask = np.ones((6, 5, 1), dtype=bool)
    mask[5] = False
    seen = []

    def estimator(given):
        seen.append(given)
        estimates = size_and_angle(given)
        estimates[0, 1] = np.nan
        return estimates

    result = estimate_maps(coefficients, estimator, NAMES, mask=mask)
    assert np.isfinite(np.concatenate(seen)).all()
    assert sum(map(len, seen)) == 25 - 3
    assert result.n_failed == 4
    assert np.isnan(result.values[mask]).all(-1).sum() == 4
    # A voxel with one estimate that is NaN has none.
    assert np.isnan(result.values[0, 1, 0]).all()


def test_a_volume_of_failures_is_no_error():
    coefficients = np.full((2, 2, 1, 3), np.nan + 0j)
    result = estimate_maps(coefficients, size_and_angle, NAMES, mask=np.ones((2, 2, 1), bool))
    assert result.n_failed == 4


def test_progress_ends_with_all_voxels(monkeypatch):
    monkeypatch.setattr(maps, "_CHUNK", 10)
    calls = []
    estimate_maps(
        random_coefficients(25, 2),
        size_and_angle,
        NAMES,
        mask=np.ones(25, bool),
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(10, 25), (20, 25), (25, 25)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": np.ones((7, 5), bool)}, r"\(X=5, Y=7\); got the shape \(7, 5\)"),
        ({"mask": np.zeros((5, 7), bool)}, "at least one voxel"),
        ({"coefficients": np.ones((5, 7, 3))}, "must be complex; got float64"),
        ({"coefficients": np.ones(3, complex)}, "one to three spatial axes"),
        ({"estimator": lambda c: np.ones(len(c))}, r"\(V=35, E=2\); got the shape \(35,\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(change, message):
    arguments = {
        "coefficients": random_coefficients(5, 7, 3),
        "estimator": size_and_angle,
        "mask": np.ones((5, 7), bool),
    } | change
    mask = arguments.pop("mask")
    with pytest.raises(ValueError, match=message):
        estimate_maps(*arguments.values(), NAMES, mask=mask)


def test_an_unknown_map_lists_the_known_ones():
    result = estimate_maps(random_coefficients(3, 2), size_and_angle, NAMES, mask=np.ones(3, bool))
    with pytest.raises(KeyError, match="size, angle"):
        result["T1"]


def test_working_memory_does_not_grow_with_the_volume():
    coefficients = np.ones((60, 60, 60, 13), dtype=np.complex64)
    mask = np.ones((60, 60, 60), dtype=bool)
    tracemalloc.start()
    result = estimate_maps(coefficients, size_and_angle, NAMES, mask=mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Kept: the maps, the mask and a list of its voxels. Beyond this, a few chunks' worth of
    # coefficients (1.7 MB each); a copy of the input would be 22 MB.
    kept = result.values.nbytes + mask.nbytes + 8 * mask.size
    assert peak - kept < 8 * maps._CHUNK * 13 * 8


def ball(shape, centre, radius):
    grid = np.indices(shape).reshape(len(shape), -1).T - np.array(centre)
    return ((grid**2).sum(-1) <= radius**2).reshape(shape)


def noisy(signal, snr, rank=5):
    rng = np.random.default_rng(5)
    direction = np.exp(1j * np.arange(rank))
    noise = rng.normal(size=(2, *signal.shape, rank)) / snr
    return signal[..., None] * direction + noise[0] + 1j * noise[1]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-30])
def test_automatic_mask_is_the_largest_object_with_its_holes_filled(scale):
    shape = (40, 42, 20)
    brain = ball(shape, (18, 20, 10), 9)
    signal = brain * 1.0
    signal[ball(shape, (18, 20, 10), 2)] = 0  # no signal inside, as in a flow void
    signal[ball(shape, (36, 38, 4), 2)] = 2  # bright, apart, small
    # Background norm √10/30 = 0.1, object √5 = 2.2: twenty-fold apart, no voxel in doubt.
    mask = automatic_mask(scale * noisy(signal, 30))
    np.testing.assert_array_equal(mask, brain)


def test_automatic_mask_spans_a_wide_range_of_tissue_signals_and_an_empty_background():
    shape = (40, 42)
    brain = ball(shape, (20, 20), 15)
    signal = np.where(brain, 1.0, 0.0)
    signal[ball(shape, (20, 20), 5)] = 4
    np.testing.assert_array_equal(automatic_mask(signal[..., None] * np.ones(3) + 0j), brain)
    np.testing.assert_array_equal(automatic_mask(noisy(signal, 20)), brain)


def test_automatic_mask_fills_a_hole_in_a_single_slice():
    disc = ball((30, 30), (15, 15), 10)
    ring = disc & ~ball((30, 30), (15, 15), 3)
    mask = automatic_mask((ring[..., None, None] * np.ones(4)) + 0j)
    np.testing.assert_array_equal(mask, disc[..., None])


def test_automatic_mask_of_a_cut_out_without_background_is_all_of_it():
    signal = np.random.default_rng(6).uniform(0.7, 1.3, (12, 12, 3))
    assert automatic_mask(noisy(signal, 50)).all()
    assert automatic_mask(np.ones((4, 4, 3), complex)).all()


def test_automatic_mask_takes_nan_and_inf_for_background():
    disc = ball((30, 30), (15, 15), 10)
    coefficients = np.where(disc, 1.0 + 0j, np.nan)[..., None] * np.ones(3)
    coefficients[0, 0] = np.inf
    np.testing.assert_array_equal(automatic_mask(coefficients), disc)


def test_automatic_mask_finds_a_small_object_in_an_empty_volume():
    # 0.5 % of the voxels: a percentile of all would be zero.
    brain = ball((40, 42, 20), (18, 20, 10), 3)
    assert brain.mean() < 0.005
    np.testing.assert_array_equal(automatic_mask(brain[..., None] * np.ones(3) + 0j), brain)


def test_automatic_mask_looks_at_a_thousandth_of_the_signal_and_no_deeper():
    disc = ball((40, 42), (20, 20), 8)
    # Empty here, rounding errors there: 1e-5 and 0 are both nothing.
    signal = np.where(disc, 1.0, 0.0)
    signal[:, :18] = np.maximum(signal[:, :18], 1e-5)
    np.testing.assert_array_equal(automatic_mask(signal[..., None] * np.ones(3) + 0j), disc)
    # A rim of a twentieth belongs to the object.
    signal = np.where(ball((40, 42), (20, 20), 12), np.where(disc, 1.0, 0.05), 0.0)
    found = automatic_mask(signal[..., None] * np.ones(3) + 0j)
    np.testing.assert_array_equal(found, signal > 0)


@pytest.mark.parametrize(("contrast", "apart"), [(3.5, False), (4.5, True)])
def test_automatic_mask_takes_less_than_fourfold_contrast_for_tissue(contrast, apart):
    disc = ball((40, 42), (20, 20), 12)
    signal = np.where(disc, 1.0, 1 / contrast)
    found = automatic_mask(signal[..., None] * np.ones(3) + 0j)
    np.testing.assert_array_equal(found, disc if apart else np.ones_like(disc))


@pytest.mark.parametrize(("share", "counts"), [(0.15, False), (0.25, True)])
def test_white_matter_is_the_mode_of_largest_m0s_from_a_fifth_of_the_highest_on(share, counts):
    # In the middle of their bins.
    grey, white = (0.1025, 1.5125), (0.2025, 1.0125)
    around = [
        (white[0] * a, white[1] * b) for a, b in ((0.81, 1), (1.195, 1), (1, 0.905), (1, 1.095))
    ]
    beyond = [
        (white[0] * a, white[1] * b) for a, b in ((0.79, 1), (1.21, 1), (1, 0.895), (1, 1.105))
    ]
    n_white = round(1000 * share)
    pairs = [grey] * 1000 + [white] * n_white + around + beyond
    found = maps.white_matter(*np.array(pairs).T)
    is_white = [False] * 1000 + [True] * (n_white + 4) + [False] * 4
    is_grey = [True] * 1000 + [False] * (n_white + 8)
    np.testing.assert_array_equal(found, is_white if counts else is_grey)


def test_automatic_mask_needs_signal():
    with pytest.raises(ValueError, match="needs signal"):
        automatic_mask(np.zeros((3, 3, 2), complex))


@pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn brings the tissue maps"
)
def test_automatic_mask_finds_the_digital_brain():
    from fisherprint.files import read_tissue_maps
    from fisherprint.reconstruct.phantom import digital_brain

    brain = digital_brain(read_tissue_maps(), ["m0s"], voxel_size=4.0)
    # Signals of 2 (fluid) to 1 (the rest) times the water content.
    csf = brain.fractions[..., brain.tissues.index("CSF")]
    mask = automatic_mask(noisy(brain.m0 * (1 + csf), 30))
    # Every voxel of the true mask has |M0| ≥ 0.7, the background a norm of √10/30 = 0.1 against
    # √5 · 0.7 = 1.6: no voxel in doubt.
    np.testing.assert_array_equal(mask, brain.mask)
