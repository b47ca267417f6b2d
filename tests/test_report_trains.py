"""Figures of trains: what is drawn, in which units, and what is said."""

import dataclasses

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import LogNorm, to_hex
from test_report import SHARE, TIME, Parsed, lines

from fisherprint import report
from fisherprint.bounds import BoundMap, BoundTable, Sweep
from fisherprint.parameters import Parameter
from fisherprint.report import images, trains
from fisherprint.report.figures import percent
from fisherprint.sequence import PulseTrain

FIELD = Parameter("B0", r"$\omega_0$", "rad/s", (-np.inf, np.inf), "rad/s")
TRANSMIT = Parameter("B1", "$B_1$", "", (0, 10))
NASTY = "<b> & $x"


def train(n_trains=1, n_pulses=20, seed=1):
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 1, (n_trains, n_pulses))
    angle[:, 0] = np.pi
    return PulseTrain(angle, rng.uniform(1e-4, 5e-4, angle.shape), 4e-3)


def ordered(axes):
    """All points of all lines, in the order of time."""
    points = np.concatenate([line.get_xydata() for line in axes.get_lines()])
    return points[np.argsort(points[:, 0], kind="stable")]


@pytest.mark.parametrize("n_trains", [1, 3])
def test_trains_stand_side_by_side_with_their_power(n_trains):
    both = {"one": train(n_trains), "two": train(1, 30, seed=2)}
    figure = report.draw_trains(both)
    cells = np.array(figure.axes).reshape(3, 2)
    for column, (label, each) in zip(cells.T, both.items(), strict=True):
        n = each.n_samples
        power = 1e-6 * each.flip_angle**2 / (each.pulse_duration * 4e-3)
        quantities = (np.rad2deg(each.flip_angle), 1e6 * each.pulse_duration, power)
        for axes, values in zip(column, quantities, strict=True):
            points = ordered(axes)
            # Boundaries between trains are drawn as lines of two points with one x.
            points = points[~np.isin(points[:, 0], 4e-3 * 20 * np.arange(1, n_trains))]
            # Computed twice in double precision: equal but for rounding.
            np.testing.assert_allclose(points[:, 0], 2e-3 + 4e-3 * np.arange(n))
            np.testing.assert_allclose(points[:, 1], values.ravel())
        title = column[0].get_title()
        assert title.startswith(f"{label}\n")
        # The mean of what is drawn is the train's mean power, to three digits.
        mean = float(title.split("mean power ")[1].split("·")[0])
        assert mean == pytest.approx(power.mean(), rel=5e-3)
        assert mean == pytest.approx(1e-6 * each.rf_power, rel=5e-3)
        # γ/2π = 42.577 MHz/T of protons in water.
        peak = np.abs(each.flip_angle / each.pulse_duration).max() / (2 * np.pi * 42.577)
        assert float(title.split("up to ")[1].split(" µT")[0]) == pytest.approx(peak, abs=0.051)
    assert [axes.get_ylabel() for axes in cells[:, 0]] == [
        *("flip angle (°)", "pulse duration (µs)", "power (10⁶ rad²/s²)")
    ]
    assert all(axes.get_xlabel() == "time (s)" for axes in cells[-1])
    assert figure.get_label().endswith("of one, two")
    # One scale for both: heights compare.
    assert cells[2, 0].get_ylim() == cells[2, 1].get_ylim()


@pytest.mark.parametrize("n_trains", [1, 2])
def test_magnetization_is_drawn_at_the_echoes(n_trains):
    rng = np.random.default_rng(3)
    each = train(n_trains, 10)
    states = {name: rng.normal(size=(10 * n_trains, 4)) for name in ("white matter", "CSF")}
    figure = report.magnetization(each, states)
    along, semisolid, across = figure.axes
    parts = (
        (along, lambda m: m[:, 2]),
        (semisolid, lambda m: m[:, 3]),
        (across, lambda m: np.hypot(m[:, 0], m[:, 1])),
    )
    colours = {}
    for axes, part in parts:
        drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 10]
        assert len(drawn) == 2 * n_trains
        for i, (name, state) in enumerate(states.items()):
            own = drawn[i * n_trains : (i + 1) * n_trains]
            points = np.concatenate([line.get_xydata() for line in own])
            # The echo is TR/2 after the pulse, which is TR/2 after the start.
            np.testing.assert_allclose(points[:, 0], 4e-3 * np.arange(1, 10 * n_trains + 1))
            np.testing.assert_array_equal(points[:, 1], part(state))
            assert own[0].get_label() == name
            colours.setdefault(name, set()).update(line.get_color() for line in own)
        assert "$M_0$" in axes.get_ylabel()
    # One colour a tissue, the same in all panels.
    assert [len(own) for own in colours.values()] == [1, 1]
    assert "both pools" in figure.get_label()
    figure.draw_without_rendering()


def test_a_single_pool_has_no_panel_of_a_second_one():
    state = np.ones((20, 4))
    state[:, 3] = 0
    figure = report.magnetization(train(), {"water": state})
    assert [axes.get_ylabel()[:9] for axes in figure.axes] == ["free pool"] * 2
    with pytest.raises(ValueError, match=r"of water must have the axes \(T=20, x, y, z, zs=4\)"):
        report.magnetization(train(), {"water": state[1:]})
    with pytest.raises(ValueError, match="at least one to draw"):
        report.magnetization(train(), {})


def bound_map(scale=1.0):
    """m0s and T2f over B1 and T2f, X ≠ Y; m0s spans decades, T2f a little."""
    root = np.empty((3, 4, 2))
    root[..., 0] = scale * np.logspace(-3, 0, 12).reshape(3, 4)
    root[..., 1] = scale * np.linspace(1e-3, 2e-3, 12).reshape(3, 4)
    x, y = np.linspace(0.7, 1.3, 4), np.array([0.03, 0.06, 0.09])
    return BoundMap(TRANSMIT, TIME, x, y, (SHARE, TIME), root)


def mesh(axes):
    (found,) = axes.collections
    return found


def test_bound_maps_are_in_displayed_units_and_logarithmic_over_decades():
    one = bound_map()
    figure = report.bound_maps({"train": one})
    share, time, *bars = figure.axes
    np.testing.assert_array_equal(mesh(share).get_array(), one.root[..., 0])
    np.testing.assert_array_equal(mesh(time).get_array(), 1e3 * one.root[..., 1])
    assert isinstance(mesh(share).norm, LogNorm)
    assert not isinstance(mesh(time).norm, LogNorm)
    # The colours hold all values; x and y in displayed units, each cell around its point.
    assert mesh(time).get_clim() == (1, 2)
    corners = mesh(share).get_coordinates()
    np.testing.assert_allclose(corners[0, :, 0], [0.6, 0.8, 1.0, 1.2, 1.4])
    np.testing.assert_allclose(corners[:, 0, 1], [15, 45, 75, 105])
    assert (share.get_xlabel(), share.get_ylabel()) == ("$B_1$", "$T_2^f$ (ms)")
    labels = [bar.get_ylabel() for bar in bars]
    assert labels[0].endswith("of $m_0^s$")
    assert labels[1].endswith("of $T_2^f$ (ms)")
    assert all(r"\mathrm{CRB}" in label for label in labels)
    assert figure.get_label() == "√CRB of m0s, T2f over B1 and T2f, of train"
    assert not figure.legends
    assert mesh(share).get_cmap().name == images.SEQUENTIAL
    figure.draw_without_rendering()
    ticks = [text.get_text() for text in bars[0].get_yticklabels()]
    assert {"0.001", "0.01", "0.1", "1"} <= set(ticks)


def test_what_is_not_seen_is_grey_and_said():
    one = bound_map()
    one.root[0, 0, 0] = np.inf
    figure = report.bound_maps({"train": one}, [SHARE])
    axes, _ = figure.axes
    assert mesh(axes).get_array().mask.tolist()[0] == [True, False, False, False]
    assert to_hex(mesh(axes).get_cmap().get_bad()) == to_hex(images.NO_DATA)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["not seen: no finite bound"]
    one.root[:] = np.inf
    report.bound_maps({"train": one}).draw_without_rendering()


def test_maps_of_several_trains_share_their_colours():
    figure = report.bound_maps({"a": bound_map(), NASTY: bound_map(3.0)}, [TIME])
    left, right, _ = figure.axes
    assert mesh(left).get_clim() == mesh(right).get_clim() == pytest.approx((1, 6))
    assert isinstance(mesh(left).norm, LogNorm)
    assert [left.get_title(), right.get_title()] == ["a", NASTY]


def test_maps_of_other_grids_or_parameters_are_refused():
    other = dataclasses.replace(bound_map(), x_values=np.linspace(0.8, 1.3, 4))
    with pytest.raises(ValueError, match="maps of one grid; that of 'b' differs"):
        report.bound_maps({"a": bound_map(), "b": other})
    with pytest.raises(KeyError, match="unknown parameter 'B0'; known are m0s, T2f"):
        report.bound_maps({"a": bound_map()}, [FIELD])
    with pytest.raises(ValueError, match="at least one to draw"):
        report.bound_maps({})


def sweeps(scale=1.0):
    rng = np.random.default_rng(4)
    return [
        Sweep(along, values, (SHARE, TIME), scale * rng.uniform(1e-3, 1, (values.size, 2)))
        for along, values in ((FIELD, np.linspace(-900, 900, 7)), (TRANSMIT, np.linspace(1, 2, 5)))
    ]


def test_bounds_against_others_have_a_row_a_parameter_and_a_colour_a_train():
    both = {"one": sweeps(), "two": sweeps(2.0)}
    both["one"][0].root[3, 1] = np.inf
    figure = report.bounds_against(both)
    cells = np.array(figure.axes).reshape(2, 2)
    for row, (parameter, factor) in enumerate(((SHARE, 1), (TIME, 1e3))):
        for column, unit in enumerate((" (rad/s)", "")):
            axes = cells[row, column]
            drawn = lines(axes)
            for label, own in both.items():
                expected = factor * own[column].root[:, row]
                expected[np.isinf(expected)] = np.nan
                np.testing.assert_array_equal(drawn[label][:, 0], own[column].values)
                np.testing.assert_array_equal(drawn[label][:, 1], expected)
            assert axes.get_yscale() == "log"
            assert len({line.get_color() for line in axes.get_lines()}) == 2
            assert cells[1, column].get_xlabel().endswith(unit)
        label = cells[row, 0].get_ylabel()
        assert label.endswith(f"of {parameter.label}")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert figure.get_label() == "√CRB of m0s, T2f against B0, B1, of one, two"
    figure.draw_without_rendering()


def test_curves_that_are_nowhere_seen_are_said_to_be():
    alone = sweeps()
    for each in alone:
        each.root[:, 0] = np.inf
    figure = report.bounds_against({"one": alone})
    assert [len(axes.texts) for axes in figure.axes] == [1, 1, 0, 0]
    assert not figure.legends
    figure.draw_without_rendering()


def test_sweeps_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match="sweeps along B0, B1, at least one; got B0 for 'b'"):
        report.bounds_against({"a": sweeps(), "b": sweeps()[:1]})
    with pytest.raises(ValueError, match="at least one; got"):
        report.bounds_against({"a": []})


def test_trains_are_told_apart_by_everyone():
    # Okabe and Ito 2008, without their yellow, which is too light for a line.
    assert set(trains.COLOURS) == {
        *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
    }
    styles = [tuple(style.items()) for style in trains._styles()]
    assert len(set(styles)) == len(styles) > 20
    assert images.SEQUENTIAL in matplotlib.colormaps


def bound_table(**changes):
    """Two trains, two tissues, m0s and B0 = 0; the second train does not see m0s in `b`."""
    signal = np.array([[[0.02, 3.0], [0.04, 5.0]], [[0.01, 6.0], [np.inf, 7.0]]])
    table = BoundTable(
        trains=("first", NASTY),
        tissues=("a", "b"),
        parameters=(SHARE, FIELD),
        known=(),
        theta=np.array([[0.2, 0.0], [0.1, 0.0]]),
        signal=signal,
        coefficients=None,
        rank=None,
        basis_method="svd",
        confounded={("first", "a"): (), (NASTY, "b"): (("m0s", "Re M0"),)},
        snr=50,
        scan_time=12,
        durations=(4.0, 6.0),
    )
    return dataclasses.replace(table, **changes)


def test_the_table_has_a_row_for_each_tissue_and_train():
    text = Parsed(report.bounds_table(bound_table())).rows()
    assert text[:4] == ["tissue", "m", "0", "s"]
    assert text[text.index("a") :] == [
        *("a", "first", "0.0200", "10 %", "3.00"),
        *("a", NASTY, "0.0100", "5.0 %", "× 0.500", "6.00", "× 2.00"),
        *("b", "first", "0.0400", "40 %", "5.00"),
        *("b", NASTY, "not seen", "7.00", "× 1.40"),
        "√CRB, the least standard deviation of an unbiased estimate, at SNR 50 (|M0|/σ of one "
        "cycle) and a scan of 12 s; below it that over the value, and over the bound of first. "
        "Unknowns: m0s, B0 and complex M0.",
        f"Not seen in b by {NASTY}: m0s and Re M0 cannot be told apart.",
    ]


def test_the_lines_say_the_same_as_the_table():
    head, rows, notes = report.bound_lines(bound_table(known=("B1",)))
    assert head == ["tissue", "parameter", "value", "first", "/ value", NASTY, "/ value", "ratio"]
    assert rows == [
        ["a", "m0s", "0.200", "0.0200", "10 %", "0.0100", "5.0 %", "0.500"],
        ["", "B0 (rad/s)", "0", "3.00", "", "6.00", "", "2.00"],
        ["b", "m0s", "0.100", "0.0400", "40 %", "not seen", "", "–"],
        ["", "B0 (rad/s)", "0", "5.00", "", "7.00", "", "1.40"],
    ]
    assert notes == [
        "√CRB at SNR 50 (|M0|/σ of one cycle) and a scan of 12 s "
        f"(first 3 x 4 s, {NASTY} 2 x 6 s).",
        "Unknowns: m0s, B0 and complex M0. Known: B1.",
        f"Not seen in b by {NASTY}: m0s and Re M0 cannot be told apart.",
    ]


def test_coefficients_stand_beside_the_signal():
    table = bound_table()
    table = bound_table(coefficients=2 * table.signal, rank=13)
    head, rows, _ = report.bound_lines(table)
    assert head[3:7] == ["first\nsignal", "/ value", "first\n13 coefficients", "/ value"]
    assert rows[0][3:7] == ["0.0200", "10 %", "0.0400", "20 %"]
    text = Parsed(report.bounds_table(table)).rows()
    start = text.index("a")
    assert text[start : start + 3] == ["a", "first", "signal"]
    assert "13 coefficients" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        *((0.00123, "0.12 %"), (0.0994, "9.9 %"), (0.05, "5.0 %"), (0.0996, "10 %")),
        *((0.234, "23 %"), (1.5, "150 %"), (99.0, "9900 %"), (1e3, "> 10000 %")),
    ],
)
def test_shares_have_two_digits(share, text):
    assert percent(share) == text
