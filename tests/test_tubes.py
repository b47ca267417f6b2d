import numpy as np
import pytest

from fisherprint.reconstruct.tubes import CONCENTRATIONS, digital_tubes, mixture

NAMES = ("m0s", "T1", "T2f", "Rx", "T2s", "B0", "B1")


@pytest.mark.paper("§2.8")
def test_the_undoped_mixture_of_15_percent_is_the_measured_one():
    measured = {"m0s": 0.085, "T1": 0.835, "T2f": 0.052, "Rx": 71.0, "T2s": 13e-6}
    # Sums and inverses in double precision.
    assert dict(mixture(15.0, doped=False)) == pytest.approx(measured, rel=1e-14)


def test_mixtures_scale_with_the_concentration():
    plain, doped = ([mixture(c, doped=d) for c in CONCENTRATIONS] for d in (False, True))
    for mixtures in (plain, doped):
        # Equal steps of the concentration are equal steps of m0s and of both rates.
        for value in ("m0s", "T1", "T2f"):
            inverse = 1 if value == "m0s" else -1
            assert np.diff([m[value] ** inverse for m in mixtures], n=2) == pytest.approx(
                0, abs=1e-12
            )
    for without, with_ in zip(plain, doped, strict=True):
        assert 1 / with_["T1"] - 1 / without["T1"] == pytest.approx(0.7)
        assert 1 / with_["T2f"] - 1 / without["T2f"] == pytest.approx(10)
    # Without protein, water: T1 of 2.9 s and T2 of 2 s.
    water = mixture(1e-9, doped=False)
    assert (1 / water["T1"], 1 / water["T2f"]) == pytest.approx((0.35, 0.5))
    with pytest.raises(ValueError, match=r"concentration \(%\) must be a positive"):
        mixture(0.0, doped=True)


@pytest.mark.parametrize("size", [1.0, 2.0])
def test_tubes_are_discs_of_one_mixture_each(size):
    tubes = digital_tubes(NAMES, voxel_size=size)
    assert len(tubes.tubes) == 6 and len(set(tubes.tubes)) == 6
    assert tubes.theta.shape == (*tubes.labels.shape, 7) and tubes.labels.shape[2] == 1
    assert np.array_equal(np.isnan(tubes.theta).any(-1), tubes.labels == 0)
    assert np.array_equal(np.abs(tubes.m0) > 0, tubes.labels > 0)
    expected = [mixture(c, doped=d) for d in (False, True) for c in CONCENTRATIONS]
    for label, values in enumerate(expected, start=1):
        inside, eroded = tubes.labels == label, tubes.eroded == label
        # The area of a circle of 14 mm, to within half of the voxels on its edge.
        edge = 2 * np.pi * 14 / size
        assert abs(inside.sum() - np.pi * 14**2 / size**2) < edge / 2
        assert eroded.sum() < inside.sum() - 1.5 * edge and not (eroded & ~inside).any()
        for name in ("m0s", "T1", "T2f", "Rx", "T2s"):
            assert np.all(tubes.theta[inside, NAMES.index(name)] == values[name])
        x, y = (tubes.affine[:3] @ [*np.argwhere(inside).mean(0), 1])[:2]
        # The centre of all voxels of a disc: symmetric up to single voxels on its edge.
        assert np.hypot(x, y) == pytest.approx(40, abs=0.1 * size)
    # B1 falls from 1.1 in the middle with the square of the distance, by 0.3 at 64 mm.
    b1 = tubes.theta[..., NAMES.index("B1")]
    assert np.nanmean(b1) == pytest.approx(1.1 - 0.3 * (40**2 + 14**2 / 2) / 64**2, abs=2e-3)
    # M0 turns by 0.8 rad over 64 mm to the right.
    along = np.angle(tubes.m0[1:] * tubes.m0[:-1].conj())[
        (tubes.labels[1:] > 0) & (tubes.labels[:-1] > 0)
    ]
    np.testing.assert_allclose(along, 0.8 / 64 * size, rtol=1e-9)
    reordered = digital_tubes(("B1", "T1"), voxel_size=size)
    assert np.array_equal(reordered.theta, tubes.theta[..., [6, 1]], equal_nan=True)


def test_what_there_is_not_is_refused():
    with pytest.raises(KeyError, match="unknown parameter 'T1s'"):
        digital_tubes(("T1s",))
    with pytest.raises(ValueError, match=r"at most 4\.7 mm; got 6"):
        digital_tubes(NAMES, voxel_size=6.0)
