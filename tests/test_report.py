from __future__ import annotations

import base64
import dataclasses
import re
import typing
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_hex

from fisherprint import report
from fisherprint.evaluate import Audit, Score
from fisherprint.fisher import PriorBounds
from fisherprint.maps import Maps
from fisherprint.parameters import Parameter
from fisherprint.report import figures, images
from fisherprint.report.document import _html_symbol, _uncertain
from fisherprint.sequence import PulseTrain
from fisherprint.simulate import DataSet, Reduced
from fisherprint.subspace import Basis
from fisherprint.train import Epoch, LossName

SHARE = Parameter("m0s", r"$m_0^s$", "", (0, 1))
TIME = Parameter("T2f", r"$T_2^f$", "s", (0, 10), "ms", 1e3)
PARAMETERS = (SHARE, TIME)
NASTY = '<script>alert("1")</script> & Söhne'


@pytest.fixture
def audit() -> Audit:
    """Two levels out of order, one fingerprint without a bound, one failed estimate."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.1, 0.2, (400, 2))
    crb = rng.uniform(1, 9, (400, 2))
    snr = np.array([50.0, 10.0])
    scaled = crb / snr[:, None, None] ** 2
    bias = 0.3 * np.sqrt(scaled) * rng.choice([-1, 1], scaled.shape)
    variance = 0.8 * scaled
    crb[7, 1] = np.inf
    bias[0, 3, 0] = variance[0, 3, 0] = np.nan
    return Audit(("m0s", "T2f"), snr, truth, crb, bias, variance, 300)


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.mark.parametrize("n_trains", [1, 3])
def test_pulse_trains_are_drawn_in_degrees_and_microseconds_one_after_the_other(n_trains):
    rng = np.random.default_rng(1)
    angle = rng.uniform(0, 1, (n_trains, 20))
    angle[:, 0] = np.pi
    train = PulseTrain(angle, rng.uniform(1e-4, 5e-4, angle.shape), 4e-3)
    upper, lower = report.draw_train(train).axes
    for axes, values in ((upper, angle * 180 / np.pi), (lower, train.pulse_duration * 1e6)):
        inversion = lines(axes)["crushed inversion"]
        others = [line.get_xydata() for line in axes.get_lines() if len(line.get_xdata()) == 19]
        drawn = np.concatenate([inversion, *others])
        drawn = drawn[np.argsort(drawn[:, 0])]
        # Computed twice in double precision: equal but for rounding.
        np.testing.assert_allclose(drawn[:, 0], 2e-3 + 4e-3 * np.arange(20 * n_trains))
        np.testing.assert_allclose(drawn[:, 1], values.ravel())
    assert "°" in upper.get_ylabel()
    assert "µs" in lower.get_ylabel()
    assert "(s)" in lower.get_xlabel()


@pytest.mark.paper("Fig. 3")
def test_convergence_draws_epochs_and_log_records_alike():
    log = [Epoch(n, 9.0 / n, 10.0 / n, {"crb": 10.0 / n}, 0.01 / n, 1.0, 5) for n in (1, 2, 3)]
    records = [{"number": e.number, "train_loss": e.train_loss} for e in log]
    for record, epoch in zip(records, log, strict=True):
        record |= {"validation_loss": epoch.validation_loss, "learning_rate": epoch.learning_rate}
    for entries in (log, records):
        axes, rate = report.convergence(entries, "crb").axes
        drawn = lines(axes)
        assert drawn["training"].tolist() == [[1, 9], [2, 4.5], [3, 3]]
        assert drawn["validation"].tolist() == [[1, 10], [2, 5], [3, 10 / 3]]
        assert drawn["efficient and unbiased"][:, 1].tolist() == [1, 1]
        assert lines(rate)["learning rate"][:, 1].tolist() == [0.01, 0.005, 0.01 / 3]
    axes, _ = report.convergence(log, "mse").axes
    assert set(lines(axes)) == {"training", "validation"}
    with pytest.raises(KeyError, match="unknown loss 'l2'; known are crb, mse, relative"):
        report.convergence(log, "l2")


@pytest.mark.parametrize("loss", typing.get_args(LossName))
def test_the_convergence_of_every_loss_is_drawn(loss):
    log = [Epoch(n, 9.0 / n, 10.0 / n, {"crb": 10.0 / n}, 0.01 / n, 1.0, 5) for n in (1, 2, 3)]
    axes, _ = report.convergence(log, loss).axes
    assert lines(axes)["validation"].tolist() == [[1, 10], [2, 5], [3, 10 / 3]]
    assert axes.get_ylabel()


@pytest.mark.paper("Fig. 7")
def test_shares_against_snr_are_the_audits_in_order(audit):
    figure = report.loss_shares(audit, [TIME], training_snr=(10, 100))
    whole, one = figure.axes
    for axes in (whole, one):
        drawn = lines(axes)
        # By construction 0.3² and 0.8 of the bound; the mean of equal numbers only rounds.
        np.testing.assert_allclose(drawn["bias²/CRB"], [[10, 0.09], [50, 0.09]])
        np.testing.assert_allclose(drawn["variance/CRB"], [[10, 0.8], [50, 0.8]])
        np.testing.assert_allclose(drawn["loss (sum)"], [[10, 0.89], [50, 0.89]])
        np.testing.assert_allclose(drawn["variance share / 300"][:, 1], 0.8 / 300)
        assert axes.patches[0].get_extents().transformed(axes.transData.inverted()).intervalx == (
            pytest.approx((10, 100))
        )
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert one.get_title() == TIME.symbol


@pytest.mark.paper("Fig. 5", "Fig. 6")
def test_histograms_count_finite_fingerprints_in_displayed_units(audit):
    audit.bias[0, :, 1] = np.linspace(-2e-3, 5e-3, 400)
    share, time = report.bias_histograms(audit, PARAMETERS, snr=50).axes
    # The middle 98 % of 400 are 392.
    assert sum(bar.get_height() for bar in time.patches) == 392
    left, right = time.patches[0], time.patches[-1]
    # np.percentile of equally spaced values is the share of the way.
    assert left.get_x() == pytest.approx(-2 + 0.01 * 7)
    assert right.get_x() + right.get_width() == pytest.approx(-2 + 0.99 * 7)
    assert time.get_xlabel() == "bias of $T_2^f$ (ms)"
    assert "median 1.50\n8 of 400 beyond" in time.get_title()
    assert "of 399 " in share.get_title()
    share, time = report.std_histograms(audit, PARAMETERS, snr=10).axes
    assert "of 400 " in share.get_title()
    assert "median 0.894" in time.get_title()  # √0.8
    assert "of 399 " in time.get_title()
    with pytest.raises(ValueError, match="expected an SNRmax of the audit: 50, 10; got 30"):
        report.std_histograms(audit, PARAMETERS, snr=30)
    with pytest.raises(KeyError, match="unknown parameter"):
        report.bias_histograms(audit, [Parameter("Rx", "", "1/s", (0, 1))], snr=50)


@pytest.mark.paper("Fig. 8")
def test_shares_by_bound_are_bin_means_against_the_bound_in_displayed_units(audit):
    bound = np.sqrt(audit.crb[:, 1]) / 50
    # A variance share that grows with the bound: its mean over a bin is the mean of the bin's.
    audit.variance[0, :, 1] = bound**3
    _, axes = report.shares_by_bound(audit, PARAMETERS, snr=50).axes
    expected = np.array_split(np.sort(bound[np.isfinite(bound)]), 12)
    drawn = lines(axes)
    # Sums in another order: equal but for rounding.
    np.testing.assert_allclose(
        drawn["variance/CRB"], [[1e3 * np.median(b), b.mean()] for b in expected]
    )
    np.testing.assert_allclose(drawn["bias²/CRB"][:, 1], 0.09)
    assert axes.get_xlabel().endswith("(ms)")


def test_what_has_no_finite_value_is_said_not_raised(audit):
    audit.bias[:] = audit.variance[:] = np.nan
    for draw in (report.bias_histograms, report.std_histograms, report.shares_by_bound):
        figure = draw(audit, PARAMETERS, snr=50)
        assert [axes.texts[0].get_text() for axes in figure.axes] == ["no finite values"] * 2
        figure.draw_without_rendering()
    report.loss_shares(audit, PARAMETERS).draw_without_rendering()
    assert "–" in report.shares_table(audit, PARAMETERS)
    nothing = report.map_panel({"m0s": np.full((4, 5), np.nan)}, [SHARE])
    nothing.draw_without_rendering()


def test_compression_cost_prints_the_medians_of_finite_ratios():
    whole = np.ones((5, 2))
    reduced = np.array([[1, 2, 3, 4, np.inf], [1, 1, 1, 1, 1]]).T
    samples = Reduced(np.ones((5, 2)), np.ones((5, 3), complex), whole, reduced)
    data = DataSet(("T2f", "m0s"), Basis(np.eye(9, 3)), {"test": samples}, 0.9)
    (axes,) = report.compression_cost(data, PARAMETERS).axes
    assert [text.get_text() for text in axes.texts] == ["median 1.00", "median 2.50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [SHARE.symbol, TIME.symbol]
    assert "3 coefficients" in axes.get_xlabel()
    with pytest.raises(KeyError, match="unknown split 'validation'; known are test"):
        report.compression_cost(data, PARAMETERS, split="validation")


def shown(axes):
    return axes.get_images()[0]


@pytest.mark.paper("Fig. 10")
def test_maps_are_upright_in_displayed_units_with_the_given_range():
    plane = np.arange(20.0).reshape(4, 5) * 1e-3
    plane[1, 2] = np.nan
    panel, bar = report.map_panel({"T2f": plane}, [TIME], ranges={"T2f": (2e-3, 0.03)}).axes
    image = shown(panel)
    np.testing.assert_array_equal(image.get_array().filled(np.nan), 1e3 * plane.T)
    assert image.origin == "lower"
    assert image.get_clim() == (2, 30)
    assert bar.get_ylabel() == "$T_2^f$ (ms)"
    panel.figure.draw_without_rendering()
    ticks = [label.get_text() for label in bar.get_yticklabels()]
    assert (ticks[0], ticks[-1]) == ("2", "30")
    assert to_hex(image.get_cmap().get_bad()) == to_hex("0.85")
    assert not panel.texts  # nothing says which side is which


@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_an_affine_brings_any_array_to_the_same_picture(flip, order):
    rng = np.random.default_rng(2)
    upright = rng.uniform(size=(4, 5, 3))
    upright_affine = np.diag([2.0, 3.0, 5.0, 1.0])
    upright_affine[:3, 3] = -4, 7, 11
    # The same volume stored along other axes; `to_upright` takes its indices to those above.
    stored = np.transpose(upright[:: flip[0], :: flip[1], :: flip[2]], order)
    to_upright = np.eye(4)
    for axis, (sign, length) in enumerate(zip(flip, upright.shape, strict=True)):
        to_upright[axis, axis] = sign
        to_upright[axis, 3] = 0 if sign > 0 else length - 1
    columns = [*order, 3]
    affine = upright_affine @ to_upright[:, columns]
    figure = report.map_panel({"m0s": stored}, [SHARE], slices=[0, 2], affine=affine)
    for axes, k in zip(figure.axes[:2], (0, 2), strict=True):
        np.testing.assert_array_equal(shown(axes).get_array(), upright[:, :, k].T)
        assert axes.get_title() == f"z = {11 + 5 * k} mm"
        assert axes.get_aspect() == pytest.approx(3 / 2)
        sides = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert sides["L"] < 0.5 < sides["R"]


def test_truth_estimate_and_difference_share_colours_and_centre_on_zero():
    rng = np.random.default_rng(3)
    truth = {"m0s": rng.uniform(0, 0.3, (6, 7, 2)), "T2f": rng.uniform(0.05, 0.1, (6, 7, 2))}
    estimate = {name: 1.1 * values for name, values in truth.items()}
    maps = Maps(("m0s", "T2f"), np.stack(list(estimate.values()), -1), np.ones((6, 7, 2), bool), 0)
    figure = report.map_panel(maps, PARAMETERS, truth=truth, slices=[1])
    panels = [axes for axes in figure.axes if axes.get_images()]
    for parameter, row in zip(PARAMETERS, np.reshape(panels, (2, 3)), strict=True):
        known, estimated, difference = map(shown, row)
        target = parameter.display_factor * truth[parameter.name][:, :, 1].T
        # A factor applied before or after: equal but for rounding.
        np.testing.assert_allclose(known.get_array(), target)
        np.testing.assert_allclose(estimated.get_array(), 1.1 * target)
        np.testing.assert_allclose(difference.get_array(), 0.1 * target)
        assert known.get_clim() == estimated.get_clim()
        low, high = difference.get_clim()
        assert low == -high
        # 95 % of the differences, to two digits.
        assert high == pytest.approx(np.percentile(0.1 * target, 95), rel=0.05)
    titles = [axes.get_title() for axes in panels[:3]]
    assert titles == ["truth\nslice 1", "estimate\nslice 1", "estimate − truth\nslice 1"]


def test_colours_can_be_told_apart_by_everyone():
    # matplotlib's perceptually uniform maps; ColorBrewer's diverging ones marked as safe.
    assert images.SEQUENTIAL in {"viridis", "cividis"}
    assert images.DIVERGING in {"BrBG", "PiYG", "PRGn", "PuOr", "RdBu", "RdYlBu"}
    # Okabe and Ito 2008.
    assert {figures.BIAS, figures.VARIANCE} <= {"#D55E00", "#0072B2", "#E69F00", "#009E73"}


def test_automatic_ranges_ignore_outliers():
    values = np.concatenate([np.linspace(1, 2, 1000), [1e6, -1e6]]).reshape(2, 501)
    panel, _ = report.map_panel({"m0s": values}, [SHARE]).axes
    # The middle 96 % of 1 to 2, and no more than half a digit beyond.
    low, high = shown(panel).get_clim()
    assert 0.5 <= low <= 1.02
    assert 1.98 <= high <= 2.5


def test_maps_that_do_not_fit_are_refused():
    good = np.ones((4, 5, 2))
    with pytest.raises(ValueError, match="map of m0s must have the axes"):
        report.map_panel({"m0s": np.ones(4)}, [SHARE])
    with pytest.raises(ValueError, match="map of T2f must have the axes"):
        report.map_panel({"m0s": good, "T2f": good[1:]}, PARAMETERS)
    with pytest.raises(IndexError, match="expected slices from 0 to 1; got 2"):
        report.map_panel({"m0s": good}, [SHARE], slices=[2])


class Parsed(HTMLParser):
    """Tags in order, text, attributes that fetch something; an AssertionError if ill-nested."""

    VOID = ("meta", "img", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data.strip())

    def rows(self):
        return [text for text in self.text if text]

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page():
    train = PulseTrain([np.pi, 0.1, 0.2], [5e-4, 2e-4, 3e-4], 4e-3)
    figure = report.draw_train(train)
    sections = [
        report.Section(NASTY, NASTY, figure),
        report.Section("Two", "One sees two.", [figure, "<p>own <b>markup</b></p>"]),
    ]
    return report.page(NASTY, f"{NASTY}\n\nSecond.", sections, provenance={NASTY: NASTY, "n": 3})


def test_the_page_is_well_formed_and_fetches_nothing(page):
    parsed = Parsed(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.named("html") == [{"lang": "en"}]
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    identifiers = {attributes["id"] for attributes in parsed.named("section")}
    assert {attributes["href"] for attributes in parsed.named("a")} == {
        f"#{name}" for name in identifiers
    }
    for _, attributes in parsed.tags:
        assert not {"srcset", "onload", "action", "poster"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in page
    assert "@import" not in page


def test_figures_are_inlined_as_images_with_a_text_for_those_who_cannot_see(page):
    inlined = Parsed(page).named("img")
    assert len(inlined) == 2
    for attributes in inlined:
        assert attributes["alt"] == "Flip angle and pulse duration of each pulse against time"
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        pixels = matplotlib.image.imread(BytesIO(base64.b64decode(data, validate=True)), "png")
        # 10 in at 150 dpi, shown at the 96 pixels an inch of the page.
        assert pixels.shape[1] == 1500
        assert attributes["width"] == "960"


def test_text_is_escaped_and_markup_kept(page):
    parsed = Parsed(page)
    # Title, heading, summary, contents, section heading, caption, and both provenance cells.
    assert sum(text == NASTY for text in parsed.text) == 8
    assert {"markup", "Second.", "3", "Provenance"} <= set(parsed.text)
    assert len(parsed.named("b")) == 1


def test_shares_table_has_a_row_for_each_snr_in_order(audit):
    parsed = Parsed(report.shares_table(audit, [TIME]))
    text = parsed.rows()
    rows = [text[i : i + 9] for i in (text.index("10"), text.index("50"))]
    # The standard deviation over √CRB is √0.8.
    assert rows == [[snr, *["0.0900", "0.800", "0.890", "0.894"] * 2] for snr in ("10", "50")]
    assert sum(int(a.get("colspan", 0)) for a in parsed.named("th")) == 8
    assert all("scope" in attributes for attributes in parsed.named("th"))


def test_score_table_gives_two_digits_of_the_error():
    score = Score(
        ("m0s", "T2f"), 1.23456, 0.0123, np.array([2.0, np.nan]), np.array([0.5, np.nan]), 90, 7, 3
    )
    text = Parsed(report.score_table({NASTY: score}, [TIME, SHARE])).rows()
    assert text[-6:] == [
        NASTY,
        "1.235 ± 0.012",
        "–",
        "2.00 ± 0.50",
        "90",
        "7 without bound, 3 failed",
    ]


def test_regions_show_quartiles_and_what_is_expected_in_displayed_units():
    values = np.full((3, 5), np.nan)
    values[1] = [0.01, 0.02, 0.03, 0.04, 0.05]
    values[2, 0] = 9.0
    regions = {NASTY: np.zeros((3, 5), bool), "empty": np.zeros((3, 5), bool)}
    regions[NASTY][:2] = True
    table = report.roi_table(
        {"T2f": values}, regions, [TIME], expected={NASTY: {"T2f": 0.0333}, "other": {}}
    )
    assert Parsed(table).rows() == [
        *("region", "voxels", "T", "2", "f", "(ms)"),
        *(NASTY, "10", "30.0 [20.0, 40.0]", "expected 33.3", "empty", "0", "–"),
    ]
    with pytest.raises(ValueError, match="mask of a must have the axes"):
        report.roi_table({"T2f": values}, {"a": np.ones((5, 3), bool)}, [TIME])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.9996, "1.00"),
        (9.996, "10.0"),
        (-0.2099, "−0.210"),
        (1234.5, "1234"),
        (1.5e-7, "1.50e−07"),
        (2e7, "2.00e+07"),
        (np.nan, "–"),
        (np.inf, "–"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert figures.number(value) == text


def test_uncertain_without_an_error_is_the_number():
    assert _uncertain(2.5, np.nan) == "2.50"
    assert _uncertain(1234.0, 321.0) == "1234 ± 321"


@pytest.mark.parametrize(
    ("symbol", "html"),
    [
        (r"$m_0^s$", "<i>m<sub>0</sub><sup>s</sup></i>"),
        (r"$T_{2,f}$", "<i>T<sub>2,f</sub></i>"),
        (r"$\omega_0$", "<i>ω<sub>0</sub></i>"),
        (r"$\mathrm{F}$", "a&lt;b"),
        (r"$\frac{a}{b}$", "a&lt;b"),
    ],
)
def test_symbols_become_html_or_the_name(symbol, html):
    assert _html_symbol(Parameter("a<b", symbol, "", (0, 1))) == html


# The prior.


def with_prior(audit: Audit) -> Audit:
    spread = np.array([0.08, 0.03])
    local = spread**2 / np.array([[9.0, 4.0], [3.0, 2.0]])
    return dataclasses.replace(
        audit, prior=PriorBounds(audit.names, audit.snr, spread, local / 2, local)
    )


def test_errors_and_bounds_are_drawn_by_snr_in_displayed_units(audit):
    audit = with_prior(audit)
    share, time = report.errors_and_bounds(audit, PARAMETERS).axes
    drawn = lines(time)
    van_trees = np.array([[10, 30 / 2], [50, 30 / np.sqrt(8)]])
    np.testing.assert_allclose(drawn["van Trees, global"], van_trees)
    np.testing.assert_allclose(drawn["van Trees, local"][:, 1], van_trees[:, 1] * 2**0.5)
    np.testing.assert_allclose(drawn["spread of the prior"][:, 1], 30)
    # Squares are 0.89 of the bound; the median of 400 bounds has one infinite among them.
    finite = 1e3 * np.sqrt(0.89 * (audit.variance[:, :, 1] / 0.8).mean(axis=1))[::-1]
    np.testing.assert_allclose(drawn["error"], np.c_[[10, 50], finite])
    crb = 1e3 * np.sqrt(np.median(audit.crb[:, 1])) / np.array([10, 50])
    np.testing.assert_allclose(drawn[r"$\sqrt{\mathrm{CRB}}$, median"][:, 1], crb)
    assert share.get_title() == "$m_0^s$" and time.get_title() == "$T_2^f$ (ms)"
    assert (time.get_xscale(), time.get_yscale()) == ("log", "log")


def test_the_table_of_the_prior_has_errors_bounds_and_their_ratio(audit):
    with pytest.raises(ValueError, match="got one without"):
        report.prior_table(audit, PARAMETERS)
    audit = with_prior(audit)
    text = report.prior_table(audit, PARAMETERS)
    rows = [re.findall("<td>(.*?)</td>", row) for row in text.split("<tr>")[3:]]
    assert [len(row) for row in rows] == [10, 10]
    ratio, error = audit.over_prior_bound()
    for row, q in zip(rows, (1, 0), strict=True):  # 10, then 50
        error_of_T2f, crb, local, overall, over = row[5:]
        # At least three digits are shown.
        assert float(error_of_T2f) == pytest.approx(1e3 * audit.root_mean_square[q, 1], rel=5e-3)
        assert float(crb) == pytest.approx(1e3 * audit.median_root_crb()[q, 1], rel=5e-3)
        assert float(local) == pytest.approx(30 / np.sqrt((4, 2)[q]), rel=5e-3)
        assert float(overall) == pytest.approx(30 / np.sqrt((8, 4)[q]), rel=5e-3)
        assert over == _uncertain(float(ratio[q, 1]), float(error[q, 1]))
    assert "Spread of the prior: m0s 0.0800, T2f 30.0 ms." in text
