import statistics as stdlib

import numpy as np
import pytest

from fisherprint import regions


def test_statistics_are_those_of_the_voxels_with_an_estimate():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (6, 5, 4))
    m0s, T1 = rng.random(labels.shape), 1 + rng.random(labels.shape)
    m0s[labels == 3] = np.nan
    T1[0, 0, :] = np.inf
    errors = {"T1": np.where(rng.random(labels.shape) < 0.2, np.nan, 0.1 * T1)}
    table = regions.statistics(
        {"m0s": m0s, "T1": T1}, labels, errors=errors, names={1: "white matter"}
    )
    assert [(r.label, r.region, r.parameter) for r in table] == [
        (label, name, parameter)
        for label, name in ((1, "white matter"), (2, "2"), (3, "3"))
        for parameter in ("m0s", "T1")
    ]
    for row in table:
        image = {"m0s": m0s, "T1": T1}[row.parameter]
        inside = [float(v) for v in image[labels == row.label]]
        values = [v for v in inside if np.isfinite(v)]
        assert row.voxels == len(inside)
        # Means of a few tens of values, in double precision, in another order.
        assert row.failed == pytest.approx(1 - len(values) / len(inside), abs=1e-12)
        if row.label == 3 and row.parameter == "m0s":
            assert row.failed == 1 and np.isnan([row.median, row.mean, row.sd]).all()
            continue
        assert row.median == pytest.approx(stdlib.median(values), rel=1e-12)
        assert row.mean == pytest.approx(stdlib.fmean(values), rel=1e-12)
        assert row.sd == pytest.approx(stdlib.stdev(values), rel=1e-12)
        low, _, high = stdlib.quantiles(values, n=4, method="inclusive")
        assert (row.lower_quartile, row.upper_quartile) == pytest.approx((low, high), rel=1e-12)
        if row.parameter == "m0s":
            assert np.isnan(row.mean_error)
        else:
            bars = [v for v in errors["T1"][labels == row.label] if np.isfinite(v)]
            assert row.mean_error == pytest.approx(stdlib.fmean(bars), rel=1e-12)


def test_an_error_bar_without_end_is_not_left_out():
    maps, bars = {"T1": np.array([1.0, 2.0, np.nan])}, {"T1": np.array([0.1, np.inf, 0.3])}
    (row,) = regions.statistics(maps, np.array([1, 1, 1]), errors=bars)
    assert np.isinf(row.mean_error)
    bars["T1"][1] = np.nan
    (row,) = regions.statistics(maps, np.array([1, 1, 1]), errors=bars)
    # That of a voxel without an estimate is.
    assert row.mean_error == 0.1


def test_a_region_of_one_voxel_has_no_spread():
    (row,) = regions.statistics({"T1": np.array([1.0, 2.0])}, np.array([0, 7]))
    assert (row.label, row.voxels, row.median, row.mean) == (7, 1, 2.0, 2.0)
    assert np.isnan(row.sd)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (np.zeros(3, dtype=int), {}, "zeros alone"),
        (np.ones(3), {}, "must be integers; got float64"),
        (np.ones(4, dtype=int), {}, r"map of T1 must have the axes \(X=4\); got the shape \(3,\)"),
        (np.ones(3, dtype=int), {"names": {2: "CSF"}}, "got one of 2, 'CSF'"),
        (np.ones(3, dtype=int), {"errors": {"T1": np.ones(2)}}, "error of T1 must have the axes"),
    ],
)
def test_what_does_not_fit_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        regions.statistics({"T1": np.ones(3)}, labels, **options)


def test_errors_of_an_unknown_parameter_are_refused():
    with pytest.raises(KeyError, match="unknown parameter 'T2'; known are T1"):
        regions.statistics({"T1": np.ones(3)}, np.ones(3, int), errors={"T2": np.ones(3)})
