"""Figures of pulse trains: what is played, what the magnetization does, what can be seen (§2.8).

As in `figures`: data in, a matplotlib figure out, displayed units, and a label that says in words
what the figure shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.bounds import BoundMap, Sweep
from fisherprint.parameters import Parameter
from fisherprint.report import figures
from fisherprint.report.figures import BIAS, PAGE_WIDTH, VARIANCE, number
from fisherprint.report.images import NO_DATA, SEQUENTIAL
from fisherprint.sequence import PulseTrain

Floats = NDArray[np.float64]

# Okabe and Ito's palette, in an order in which neighbours differ in lightness, too.
COLOURS = (VARIANCE, BIAS, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black")
# Without colours, lines are told apart by these.
_STYLES = ("-", "--", "-.", ":")

# Of protons, in rad/s/T (CODATA 2018, shielded).
_GYROMAGNETIC_RATIO = 2.675153151e8
# Values within this ratio share a linear colour bar.
_LINEAR = 5.0


def draw_train(train: PulseTrain) -> Figure:
    """Flip angle and pulse duration against time, trains one after the other.

    Inversions are triangles; the lines join the other pulses.
    """
    figure = Figure((PAGE_WIDTH, 4.4), layout="constrained")
    figure.set_label("Flip angle and pulse duration of each pulse against time")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, values, label in zip(panels, _pulses(train), _PULSE_LABELS, strict=False):
        _draw_pulses(axes, train, values)
        axes.set_ylabel(label)
    panels[0].set_yticks(np.arange(0, 181, 45))
    panels[-1].set(xlabel="time (s)", xlim=(0, train.duration))
    figures.legend_above(figure, panels[0])
    return figure


def draw_trains(trains: Mapping[str, PulseTrain]) -> Figure:
    """Flip angle, duration and power of each pulse against time, trains side by side.

    The power of a pulse is ω1² averaged over its repetition, α²/(TRF·TR); the mean over the train
    and the largest amplitude stand above.

    Args:
        trains: one column each, by the label that is its title.
    """
    _require_some(trains)
    figure = Figure((PAGE_WIDTH, 6.4), layout="constrained")
    figure.set_label(
        "Flip angle, duration and radio-frequency power of each pulse against time, of "
        + _checks.listing(trains)
    )
    cells = figure.subplots(3, len(trains), squeeze=False, sharex="col", sharey="row")
    for column, (label, train) in zip(cells.T, trains.items(), strict=True):
        for axes, values in zip(column, _pulses(train), strict=True):
            _draw_pulses(axes, train, values)
        amplitude = np.abs(train.flip_angle / train.pulse_duration).max()
        column[0].set_title(
            f"{label}\nmean power {number(1e-6 * train.rf_power)}·10⁶ rad²/s², "
            f"amplitude up to {1e6 * amplitude / _GYROMAGNETIC_RATIO:.1f} µT",
            fontsize=10,
        )
        column[-1].set(xlabel="time (s)", xlim=(0, train.duration))
    for axes, label in zip(cells[:, 0], _PULSE_LABELS, strict=True):
        axes.set_ylabel(label)
    cells[0, 0].set_yticks(np.arange(0, 181, 45))
    figures.legend_above(figure, cells[0, 0])
    return figure


_PULSE_LABELS = ("flip angle (°)", "pulse duration (µs)", "power (10⁶ rad²/s²)")


def _pulses(train: PulseTrain) -> tuple[Floats, Floats, Floats]:
    """What `_PULSE_LABELS` says, shape (trains, pulses) each."""
    power = train.flip_angle**2 / (train.pulse_duration * train.repetition_time)
    return np.rad2deg(train.flip_angle), 1e6 * train.pulse_duration, 1e-6 * power


def _draw_pulses(axes: Axes, train: PulseTrain, values: Floats) -> None:
    time = _pulse_times(train)
    for start, pulses in zip(time, values, strict=True):
        axes.plot(start[1:], pulses[1:], color=VARIANCE, linewidth=1)
    axes.plot(
        time[:, 0],
        values[:, 0],
        "v",
        color=BIAS,
        clip_on=False,
        label=f"{train.inversion} inversion",
    )
    _mark_boundaries(axes, train)
    axes.set_ylim(bottom=min(0, 1.05 * values.min()))
    figures.plain(axes)


def _pulse_times(train: PulseTrain) -> Floats:
    """Middle of each pulse in s, shape (trains, pulses): it is in the middle of its repetition."""
    index = np.arange(train.n_samples, dtype=np.float64).reshape(train.flip_angle.shape)
    return (index + 0.5) * train.repetition_time


def _mark_boundaries(axes: Axes, train: PulseTrain) -> None:
    n_trains, n_pulses = train.flip_angle.shape
    for boundary in np.arange(1, n_trains) * n_pulses * train.repetition_time:
        axes.axvline(boundary, color="0.6", linewidth=0.8, linestyle=":")


def magnetization(train: PulseTrain, states: Mapping[str, Floats]) -> Figure:
    """Magnetization at the echoes along the cycle: both pools along z, and across it.

    Args:
        train: the pulse train, of one or several trains.
        states: x, y, z of the free pool and z of the semi-solid one by tissue, shape (T, 4), for
            M0 = 1. Where no tissue has a semi-solid pool its panel is left out.

    Raises:
        ValueError: arrays of another shape.
    """
    _require_some(states)
    for tissue, state in states.items():
        _checks.shape(
            f"the magnetization of {tissue}", state, [("T", train.n_samples), ("x, y, z, zs", 4)]
        )
    rows: list[tuple[str, Callable[[Floats], Floats]]] = [
        ("free pool, along z ($M_0$)", lambda state: state[:, 2]),
        ("semi-solid pool, along z ($M_0$)", lambda state: state[:, 3]),
        ("free pool, transverse ($M_0$)", lambda state: np.hypot(state[:, 0], state[:, 1])),
    ]
    if not any(state[:, 3].any() for state in states.values()):
        del rows[1]
    figure = Figure((PAGE_WIDTH, 2.2 * len(rows)), layout="constrained")
    figure.set_label(
        "Magnetization of both pools along the cycle, of " + _checks.listing(states)
        if len(rows) == 3
        else "Magnetization along the cycle, of " + _checks.listing(states)
    )
    panels = figure.subplots(len(rows), 1, sharex=True)
    # The echo is TR/2 after the pulse. Trains are cycles of their own, not joined by lines.
    time = _pulse_times(train) + train.repetition_time / 2
    for axes, (label, part) in zip(panels, rows, strict=True):
        for order, ((tissue, state), style) in enumerate(
            zip(states.items(), _styles(), strict=False)
        ):
            # The first tissue is on top: one that alternates from echo to echo fills a band.
            lines = axes.plot(
                time.T,
                part(state).reshape(time.shape).T,
                linewidth=1.2,
                zorder=3 - order / len(states),
                **style,
            )
            lines[0].set_label(tissue)
        _mark_boundaries(axes, train)
        axes.set_ylabel(label, fontsize=9)
        figures.plain(axes)
    panels[-1].set(xlabel="time (s)", xlim=(0, train.duration))
    figures.legend_above(figure, panels[0])
    return figure


def bound_maps(
    maps: Mapping[str, BoundMap], parameters: Sequence[Parameter] | None = None
) -> Figure:
    """√CRB of each parameter over two parameters, in displayed units.

    Colours are shared by the trains. They are logarithmic where the values span more than a
    factor of five, and hold all finite ones; what is infinite, not seen, is grey.

    Args:
        maps: by the train's label, all of the same grid. One train has panels side by side,
            several a column each.
        parameters: those that are shown; all unknown ones if None.

    Raises:
        KeyError: a parameter that the maps lack.
        ValueError: maps of different grids.
    """
    _require_some(maps)
    first = next(iter(maps.values()))
    for label, other in maps.items():
        if _grid_of(other) != _grid_of(first):
            raise ValueError(
                f"expected maps of one grid; that of {label!r} differs from the first. Compute "
                "them over the same parameters and values."
            )
    shown = first.parameters if parameters is None else tuple(parameters)
    figure, cells = _map_cells(len(shown), len(maps))
    figure.set_label(
        f"√CRB of {_checks.listing(p.name for p in shown)} over {first.x.name} and "
        f"{first.y.name}, of {_checks.listing(maps)}"
    )
    unseen = False
    for parameter, row in zip(shown, cells, strict=True):
        values = [
            parameter.display_factor * each.root[..., _column(each, parameter)]
            for each in maps.values()
        ]
        unseen |= any(np.isinf(v).any() for v in values)
        _draw_maps(row, values, first, parameter)
    if len(maps) > 1:
        for axes, label in zip(cells[0], maps, strict=True):
            axes.set_title(label, fontsize=10)
        for axes in cells.ravel():
            axes.label_outer()
    if unseen:
        grey = Patch(facecolor=NO_DATA, edgecolor="0.5", label="not seen: no finite bound")
        figure.legend(handles=[grey], loc="outside upper center", frameon=False)
    return figure


def _column(bounds: BoundMap | Sweep, parameter: Parameter) -> int:
    return _checks.index(parameter.name, [known.name for known in bounds.parameters])


def _grid_of(grid: BoundMap) -> tuple[str, list[float], str, list[float]]:
    return grid.x.name, grid.x_values.tolist(), grid.y.name, grid.y_values.tolist()


def _map_cells(n_parameters: int, n_trains: int) -> tuple[Figure, NDArray[np.object_]]:
    """A figure and its axes (parameters, trains)."""
    across = min(3, n_parameters) if n_trains == 1 else 1
    n_rows, n_columns = -(-n_parameters // across), across * n_trains
    # Two columns need not fill the page.
    width = PAGE_WIDTH if n_columns > 2 else 0.36 * n_columns * PAGE_WIDTH
    figure = Figure((width, 2.5 * n_rows + 0.4), layout="constrained")
    alone = n_trains == 1
    cells = figure.subplots(
        n_rows, n_columns, squeeze=False, sharex=not alone, sharey=not alone
    ).ravel()
    for axes in cells[n_parameters * n_trains :]:
        axes.remove()
    return figure, cells[: n_parameters * n_trains].reshape(n_parameters, n_trains)


def _draw_maps(
    row: NDArray[np.object_], values: Sequence[Floats], grid: BoundMap, parameter: Parameter
) -> None:
    norm = _colour_norm(np.concatenate([v[np.isfinite(v)] for v in values]))
    colormap = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=NO_DATA)
    x = grid.x.display_factor * grid.x_values
    y = grid.y.display_factor * grid.y_values
    for axes, each in zip(row, values, strict=True):
        image = axes.pcolormesh(
            x, y, np.ma.masked_invalid(each), cmap=colormap, norm=norm, shading="nearest"
        )
        axes.set_facecolor(NO_DATA)
        axes.set(xlabel=grid.x.label, ylabel=grid.y.label)
    unit = f" ({parameter.display_unit})" if parameter.display_unit else ""
    bar = row[0].figure.colorbar(
        image, ax=list(row), label=rf"$\sqrt{{\mathrm{{CRB}}}}$ of {parameter.symbol}{unit}"
    )
    if isinstance(norm, LogNorm):
        _label_decades(bar.ax)
    else:
        bar.locator = MaxNLocator(5)
        bar.update_ticks()


def _colour_norm(finite: Floats) -> Normalize:
    if not finite.size:
        return Normalize(0, 1)
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > _LINEAR * low:
        return LogNorm(low, high)
    return Normalize(low, high) if high > low else Normalize(0.9 * low, 1.1 * high or 1)


def bounds_against(
    sweeps: Mapping[str, Sequence[Sweep]], parameters: Sequence[Parameter] | None = None
) -> Figure:
    """√CRB of each parameter against others, such as B0 and B1; several trains by colour.

    Lines are broken where a parameter is not seen.

    Args:
        sweeps: by the train's label; each train has the same ones in the same order, one column
            each.
        parameters: those that are shown, one row each; all unknown ones if None.

    Raises:
        KeyError: a parameter that a sweep lacks.
        ValueError: trains of different sweeps.
    """
    _require_some(sweeps)
    along = [each.parameter for each in next(iter(sweeps.values()))]
    for label, own in sweeps.items():
        if [each.parameter for each in own] != along or not along:
            raise ValueError(
                f"expected sweeps along {_checks.listing(p.name for p in along)}, at least one; "
                f"got {_checks.listing(e.parameter.name for e in own)} for {label!r}. "
                "Sweep the same parameters for each train."
            )
    first = next(iter(sweeps.values()))[0]
    shown = first.parameters if parameters is None else tuple(parameters)
    figure = Figure((PAGE_WIDTH, 1.5 * len(shown) + 0.9), layout="constrained")
    figure.set_label(
        f"√CRB of {_checks.listing(p.name for p in shown)} against "
        f"{_checks.listing(p.name for p in along)}, of {_checks.listing(sweeps)}"
    )
    cells = figure.subplots(len(shown), len(along), squeeze=False, sharex="col", sharey="row")
    for parameter, row in zip(shown, cells, strict=True):
        for axes, column in zip(row, range(len(along)), strict=True):
            for (label, own), style in zip(sweeps.items(), _styles(), strict=False):
                each = own[column]
                root = each.root[
                    :, _checks.index(parameter.name, [p.name for p in each.parameters])
                ]
                axes.plot(
                    each.parameter.display_factor * each.values,
                    np.where(np.isfinite(root), parameter.display_factor * root, np.nan),
                    linewidth=1.5,
                    label=label,
                    **style,
                )
            axes.set_yscale("log")
            figures.plain(axes)
        if not any(np.isfinite(line.get_ydata()).any() for axes in row for line in axes.lines):
            for axes in row:
                figures.say_empty(axes)
        unit = f" ({parameter.display_unit})" if parameter.display_unit else ""
        row[0].set_ylabel(rf"$\sqrt{{\mathrm{{CRB}}}}$ of {parameter.symbol}{unit}", fontsize=9)
        _label_decades(row[0])
    for axes, parameter in zip(cells[-1], along, strict=True):
        axes.set_xlabel(parameter.label)
        axes.margins(x=0)
    if len(sweeps) > 1:
        figures.legend_above(figure, cells[0, 0])
    figure.align_ylabels()
    return figure


def _label_decades(axes: Axes) -> None:
    """Plain numbers on a logarithmic y axis, the more of a decade the fewer decades there are."""
    low, high = axes.get_ylim()
    span = high / low
    subs = {4: (1, 2, 3, 4, 5, 6, 8), 20: (1, 2, 3, 5), 100: (1, 2, 5), np.inf: (1,)}
    axes.yaxis.set_major_locator(LogLocator(subs=next(subs[most] for most in subs if span < most)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _styles() -> Iterable[dict[str, Any]]:
    """Colours, then other line styles with them."""
    return ({"color": c, "linestyle": s} for s in _STYLES for c in COLOURS)


def _require_some(given: Mapping[str, object]) -> None:
    if not given:
        raise ValueError("expected at least one to draw; got none. Name one.")
