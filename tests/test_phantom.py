from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fisherprint.files import read_tissue_maps
from fisherprint.reconstruct.phantom import (
    NUCLEI,
    TISSUE_PARAMETERS,
    TISSUES,
    TissueMaps,
    digital_brain,
)

NAMES = (*TISSUE_PARAMETERS, "B0", "B1")
needs_atlas = pytest.mark.skipif(
    importlib.util.find_spec("nilearn") is None, reason="nilearn brings the tissue maps"
)


def uniform_maps(grey=0.0, white=0.0):
    """A block of 1 mm voxels with one composition, large enough to hold all nuclei."""
    shape = (101, 101, 61)
    affine = np.eye(4)
    affine[:3, 3] = (-50, -60, -25)
    return TissueMaps(
        np.full(shape, grey, np.float32),
        np.full(shape, white, np.float32),
        np.ones(shape, bool),
        affine,
    )


@pytest.fixture(scope="module")
def atlas():
    return read_tissue_maps()


@pytest.fixture(scope="module")
def slab(atlas):
    return digital_brain(atlas, NAMES, voxel_size=2.0)


def voxel(brain, position):
    index = np.linalg.inv(brain.affine) @ (*position, 1)
    return tuple(np.rint(index[:3]).astype(int))


def centroid(brain, share):
    index = np.argwhere(share > 0)
    weights = share[share > 0]
    mean = (index * weights[:, None]).sum(0) / weights.sum()
    return brain.affine[:3, :3] @ mean + brain.affine[:3, 3]


@pytest.mark.parametrize(
    ("probabilities", "tissue"),
    [({"white": 1.0}, "white matter"), ({"grey": 1.0}, "grey matter"), ({}, "CSF")],
)
def test_pure_voxels_have_the_tissues_values(probabilities, tissue):
    box = ((36.0, 42.0), (-40.0, -34.0), (0.0, 4.0))  # lateral of all nuclei
    brain = digital_brain(uniform_maps(**probabilities), TISSUE_PARAMETERS, box=box)
    expected = [getattr(TISSUES[tissue], name) for name in TISSUE_PARAMETERS]
    # Trilinear weights of equal values sum to 1 up to rounding in double precision.
    np.testing.assert_allclose(
        brain.theta, np.broadcast_to(expected, (4, 4, 3, 8)), rtol=1e-12, atol=0
    )


def test_a_mixed_voxel_has_the_weighted_mean():
    box = ((40.0, 40.0), (-40.0, -40.0), (0.0, 0.0))
    brain = digital_brain(uniform_maps(grey=0.25, white=0.5), TISSUE_PARAMETERS, box=box)
    for column, name in enumerate(TISSUE_PARAMETERS):
        expected = (
            0.25 * getattr(TISSUES["grey matter"], name)
            + 0.5 * getattr(TISSUES["white matter"], name)
            + 0.25 * getattr(TISSUES["CSF"], name)
        )
        # 0.25 and 0.5 are exact in float32; the rest is rounding in double precision.
        np.testing.assert_allclose(brain.theta[0, 0, 0, column], expected, rtol=1e-12)


def test_a_voxel_across_a_border_holds_half_of_each():
    maps = uniform_maps()
    maps.white[:90] = 1.0  # up to the voxel at x = 39 mm
    maps.grey[90:] = 1.0
    box = ((39.5, 39.5), (-40.0, -40.0), (0.0, 0.0))
    brain = digital_brain(maps, ["m0s"], box=box, voxel_size=4.0)
    white, grey = TISSUES["white matter"].m0s, TISSUES["grey matter"].m0s
    # Sampling points lie symmetrically about the border, so their mean is exact.
    np.testing.assert_allclose(brain.theta.item(), (white + grey) / 2, rtol=1e-12)


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("nucleus", NUCLEI)
def test_nuclei_replace_matter_but_not_fluid(nucleus, side):
    x, y, z = NUCLEI[nucleus].centre
    box = ((side * x, side * x), (y, y), (z, z))
    solid = digital_brain(uniform_maps(grey=0.5, white=0.5), ["Rx"], box=box)
    fluid = digital_brain(uniform_maps(), ["Rx"], box=box)
    # A voxel of 2 mm lies wholly inside every nucleus's centre.
    np.testing.assert_allclose(solid.theta.item(), TISSUES[nucleus].Rx, rtol=1e-12)
    np.testing.assert_allclose(fluid.theta.item(), TISSUES["CSF"].Rx, rtol=1e-12)


def test_apparent_relaxation_time():
    # White matter by hand: 0.788/1.84 + 0.212/0.34 = 0.428261 + 0.623529 = 1.051790 per second.
    apparent = TISSUES["white matter"].T1
    assert apparent == pytest.approx(1 / 1.051790, rel=1e-6)


def test_columns_follow_the_given_names():
    box = ((36.0, 40.0), (-40.0, -36.0), (0.0, 0.0))
    forward = digital_brain(uniform_maps(grey=1.0), ("T2f", "B1", "m0s"), box=box)
    backward = digital_brain(uniform_maps(grey=1.0), ("m0s", "B1", "T2f"), box=box)
    np.testing.assert_array_equal(forward.theta, backward.theta[..., ::-1])
    assert forward.names == ("T2f", "B1", "m0s")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError, match="'T3'; known are m0s, T1, T1f"):
        digital_brain(uniform_maps(), ["T3"])


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (((500.0, 510.0), (0.0, 1.0), (0.0, 1.0)), "holds none"),
        (((9.0, -9.0), (0.0, 1.0), (0.0, 1.0)), "low ≤ high"),
    ],
)
def test_a_box_without_brain_is_refused(box, message):
    with pytest.raises(ValueError, match=message):
        digital_brain(uniform_maps(), ["m0s"], box=box)


def test_maps_of_different_grids_are_refused():
    maps = uniform_maps()
    odd = TissueMaps(maps.grey, maps.white[:-1], maps.brain, maps.affine)
    with pytest.raises(ValueError, match="white matter must have the axes"):
        digital_brain(odd, ["m0s"])


@needs_atlas
def test_the_whole_brain_has_the_volume_of_one(atlas):
    right_half = ((2.0, 98.0), (-134.0, 98.0), (-72.0, 116.0))  # the template is symmetric
    brain = digital_brain(atlas, ["m0s"], box=right_half, voxel_size=4.0)
    litres = 2 * brain.mask.sum() * 4.0**3 * 1e-6
    # Adult brains with their fluid, as published: 1.1 to 1.9 litres; this template is a large one.
    assert 1.1 < litres < 1.9
    # As many as the template's own voxels: half-full voxels count or not in equal numbers. The
    # surface of some 0.2 m² may shift by 0.2 mm (a 20th of a voxel), which is 2 % of the volume.
    assert litres == pytest.approx(atlas.brain.sum() * 1e-6, rel=0.02)


@needs_atlas
def test_shares_sum_to_one_and_theta_is_known_inside_the_mask_alone(slab):
    np.testing.assert_allclose(slab.fractions[slab.mask].sum(-1), 1, rtol=1e-12)
    assert np.isfinite(slab.theta[slab.mask]).all()
    assert np.isnan(slab.theta[~slab.mask]).all()
    assert not slab.m0[~slab.mask].any()
    water = slab.fractions[slab.mask] @ [tissue.water for tissue in TISSUES.values()]
    np.testing.assert_allclose(np.abs(slab.m0[slab.mask]), water, rtol=1e-12)


@needs_atlas
@pytest.mark.parametrize("nucleus", NUCLEI)
def test_nuclei_lie_where_they_belong(slab, nucleus):
    share = slab.fractions[..., slab.tissues.index(nucleus)]
    right = share.copy()
    right[: voxel(slab, (0, 0, 0))[0]] = 0
    # What fluid and a neighbour take from an ellipsoid moves its centroid by less than a voxel.
    np.testing.assert_allclose(centroid(slab, right), NUCLEI[nucleus].centre, atol=2.0)
    # Twice the right side is both, up to the template's own asymmetry at the ventricles.
    assert share.sum() == pytest.approx(2 * right.sum(), rel=0.02)


@needs_atlas
@pytest.mark.parametrize(
    ("position", "tissue"),
    [
        ((6, 8, 16), "CSF"),  # body of the lateral ventricle
        ((-6, 8, 16), "CSF"),
        ((0, 26, 8), "white matter"),  # genu of the corpus callosum
        ((26, 30, 12), "white matter"),  # frontal
        ((40, -2, 0), "grey matter"),  # insula
    ],
)
def test_landmarks(slab, position, tissue):
    assert slab.fractions[voxel(slab, position)].argmax() == slab.tissues.index(tissue)


@needs_atlas
def test_fields_span_what_is_seen_at_3_tesla_and_are_smooth(slab):
    b0 = np.where(slab.mask, slab.theta[..., slab.names.index("B0")], np.nan)
    b1 = np.where(slab.mask, slab.theta[..., slab.names.index("B1")], np.nan)
    assert -150 < np.nanmin(b0) < -100
    assert 100 < np.nanmax(b0) < 150
    assert 0.8 < np.nanmin(b1) < 0.9
    assert 1.15 < np.nanmax(b1) < 1.25
    # Smooth at the scale of a voxel: neighbours differ by less than a tenth of the span.
    for axis in range(3):
        assert np.nanmax(np.abs(np.diff(b0, axis=axis))) < 20
        assert np.nanmax(np.abs(np.diff(b1, axis=axis))) < 0.03
    # So is the phase of M0, which turns by radians over the head.
    phase = np.angle(slab.m0)
    along = np.angle(slab.m0[:, 1:] * slab.m0[:, :-1].conj())[slab.mask[:, 1:] & slab.mask[:, :-1]]
    size = slab.affine[1, 1]
    np.testing.assert_allclose(along, 1.2 / 88 * size, rtol=1e-6)
    assert np.ptp(phase[slab.mask]) > 1.5
    peak = np.unravel_index(np.nanargmax(b1), b1.shape)
    assert np.linalg.norm(slab.affine[:3, :3] @ peak + slab.affine[:3, 3] - (0, -18, 8)) < 10
    # The frontal sinus is the strongest inhomogeneity.
    worst = np.unravel_index(np.nanargmax(np.abs(b0) * (b0 > 0)), b0.shape)
    assert (slab.affine @ (*worst, 1))[1] > 50
