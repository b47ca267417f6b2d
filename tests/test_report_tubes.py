"""The figure of the tube phantom, its numbers, and how far estimators are from each other."""

import statistics as stdlib

import numpy as np
import pytest

from fisherprint.models.two_pool import PARAMETERS
from fisherprint.report import TUBE_COLUMNS, TubeEstimates, agreement, tube_boxes, tube_numbers

NAMES = ("m0s", "T2f")
TUBES = ("10 %", "10 % + MnCl2", "20 %")
TRUTH = np.array([[0.06, 0.08], [0.06, 0.04], [0.11, 0.05]])


def tubes(n: int = 25, **changes) -> TubeEstimates:
    """Estimates around the truth, one of which is 10 % too large; some failed."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(1, 4), n)
    spread = 1 + 0.1 * rng.standard_normal((2, len(labels), 2))
    fits, network = spread * TRUTH[labels - 1] * np.array([1, 1.1])[:, None, None]
    fits[3] = np.nan
    given = {
        "parameters": tuple(PARAMETERS[name] for name in NAMES),
        "tubes": TUBES,
        "labels": labels,
        "truth": TRUTH,
        "estimates": {"least squares": fits, "network": network},
    }
    return TubeEstimates(**given | changes)


@pytest.mark.paper("Fig. 9")
def test_boxes_are_quartiles_in_displayed_units_beside_the_truth():
    found = tubes()
    figure = tube_boxes(found)
    assert [axes.get_ylabel() for axes in figure.axes] == ["$m_0^s$", "$T_2^f$ (ms)"]
    ticks = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert ticks == ["10 %", "10 %\n+ MnCl2", "20 %"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["least squares", "network", "truth"]
    for e, (axes, factor) in enumerate(zip(figure.axes, (1, 1e3), strict=True)):
        lines = axes.collections[0].get_segments()
        # Displayed numbers are products in double precision.
        assert [line[0, 1] for line in lines] == pytest.approx(factor * TRUTH[:, e], rel=1e-12)
        for k, (name, values) in enumerate(found.estimates.items()):
            for i, (left, line) in enumerate(zip(range(3), lines, strict=True)):
                inside = factor * values[found.labels == i + 1, e]
                box = axes.patches[3 * k + i].get_path().vertices
                low, high = np.nanquantile(inside, (0.25, 0.75))
                assert (box[:, 1].min(), box[:, 1].max()) == pytest.approx((low, high)), name
                # Within the tube's place, where its truth is drawn.
                assert left - 0.5 < box[:, 0].min() < box[:, 0].max() < left + 0.5
                assert line[0, 0] < box[:, 0].min() and box[:, 0].max() < line[1, 0]


def test_more_estimators_than_colours_are_refused():
    many = {f"{n}": tubes().estimates["network"] for n in range(6)}
    with pytest.raises(ValueError, match="at most 5 estimators in a figure; got 0, 1, 2, 3, 4, 5"):
        tube_boxes(tubes(estimates=many))


def test_numbers_are_those_of_the_voxels_with_an_estimate():
    found = tubes()
    rows = [dict(zip(TUBE_COLUMNS, row, strict=True)) for row in tube_numbers(found)]
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        i, e = TUBES.index(row["tube"]), NAMES.index(row["parameter"])
        assert (row["truth"], row["unit"]) == (TRUTH[i, e], PARAMETERS[row["parameter"]].unit)
        inside = found.estimates[row["estimator"]][found.labels == i + 1, e]
        values = [float(v) for v in inside if np.isfinite(v)]
        low, middle, high = stdlib.quantiles(values, n=4, method="inclusive")
        # Sums and differences of some numbers in double precision.
        assert row["median"] == pytest.approx(middle, rel=1e-12)
        assert (row["lower_quartile"], row["upper_quartile"]) == pytest.approx((low, high))
        assert row["interquartile_range"] == pytest.approx(high - low, rel=1e-9)
        assert row["voxels"] == 25
        assert row["failed"] == pytest.approx((i == 0 and row["estimator"] != "network") / 25)


def test_agreement_is_in_quartile_ranges_of_the_reference():
    labels = np.repeat([1, 2], 5)
    reference = np.array([0.0, 1, 2, 3, 4, 10, 11, 12, 13, 14])[:, None]
    found = TubeEstimates(
        (PARAMETERS["T1"],),
        ("a", "b"),
        labels,
        np.array([[2.0], [12.0]]),
        # One off in the first tube, three in the second; the quartiles are two apart.
        {"fit": reference, "other": reference + np.where(labels == 1, 1, -3)[:, None]},
    )
    assert agreement(found, "fit") == {"other": {"T1": (1 / 2 + 3 / 2) / 2}}
    with pytest.raises(KeyError, match="unknown estimator 'truth'; known are fit, other"):
        agreement(found, "truth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truth": TRUTH[:2]}, r"the truth must have the axes \(tubes=3, E=2\)"),
        ({"estimates": {"fit": np.ones((3, 2))}}, r"estimates of fit must .* \(V=75, E=2\)"),
        ({"labels": np.repeat([0, 1, 2], 25)}, r"voxels of each tube from 1 to 3; got .*\[0, 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tubes(**changes)
