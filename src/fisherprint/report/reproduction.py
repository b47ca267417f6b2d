"""Figures 3 to 8 of the paper, of several networks side by side, and the table of its statements.

As in `figures`: data in, a matplotlib figure out, displayed units, and a label that says in words
what the figure shows. Networks come by the label that stands in the legend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.evaluate import Audit, AuditMap, Interval
from fisherprint.parameters import Parameter
from fisherprint.report import figures
from fisherprint.report.figures import BIAS, PAGE_WIDTH, TOTAL, VARIANCE, number
from fisherprint.report.images import DIVERGING, NO_DATA, SEQUENTIAL

if TYPE_CHECKING:
    from fisherprint.train import Epoch

Floats = NDArray[np.float64]
_Each = TypeVar("_Each")

# Not the colours of bias and variance; distinct in lightness and by the line as well.
_NETWORKS: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "linestyle": "-"},
    {"color": "#882255", "linestyle": "--"},
    {"color": "#E69F00", "linestyle": "-."},
)
_KINDS = {"bias": "bias", "std": "standard deviation"}


def _styled(networks: Mapping[str, _Each]) -> Iterator[tuple[str, _Each, dict[str, Any]]]:
    """Each with its label and its style; ValueError if there are more of them than styles."""
    if len(networks) > len(_NETWORKS):
        raise ValueError(
            f"expected at most {len(_NETWORKS)} networks in a figure; got "
            f"{_checks.listing(networks)}. Draw another figure for the others."
        )
    return (
        (label, each, style)
        for (label, each), style in zip(networks.items(), _NETWORKS, strict=False)
    )


def convergences(logs: Mapping[str, Sequence[Epoch | Mapping[str, Any]]]) -> Figure:
    """Training and validation loss by epoch of networks of different losses (Fig. 3).

    Args:
        logs: what `train.train` yielded, or the run's log, by the name of the loss.

    Raises:
        KeyError: an unknown loss.
    """
    figure = Figure((PAGE_WIDTH, 3.6), layout="constrained")
    figure.set_label(
        f"Training and validation loss against epoch, of the losses {_checks.listing(logs)}"
    )
    panels = figure.subplots(1, len(logs), squeeze=False)[0]
    for axes, (loss, log) in zip(panels, logs.items(), strict=True):
        rate = figures.draw_convergence(axes, log, loss)
        axes.set_title(f"{loss} loss", fontsize=10)
        axes.legend(handles=[*axes.get_lines(), *rate.get_lines()], fontsize=9)
    return figure


def audit_maps(
    maps: Mapping[str, AuditMap],
    parameter: Parameter,
    *,
    marked: tuple[float, float] | None = None,
) -> Figure:
    """Bias, standard deviation and √CRB of a parameter over two others (Fig. 4).

    The bias of each network stands above its standard deviation, √CRB beside the latter in the
    same colours, which are logarithmic. The scales leave out 2 % at their ends, which have the
    ends' colours; NaN and infinite bounds are grey.

    Args:
        maps: of one grid and one SNRmax.
        parameter: whose bias it is.
        marked: a point (x, y) in SI units that gets a green dot, such as the prior's means.

    Raises:
        KeyError: a parameter that an audit lacks.
        ValueError: maps of different grids, SNRmax or bounds.
    """
    first = next(iter(maps.values()))
    _require_one_grid(maps)
    factor = parameter.display_factor
    biases = [factor * each.bias(parameter.name) for each in maps.values()]
    spreads = [factor * each.std(parameter.name) for each in maps.values()]
    spreads.append(factor * first.root(parameter.name))

    figure = Figure((PAGE_WIDTH, 5.6), layout="constrained")
    figure.set_label(
        f"Bias, standard deviation and √CRB of {parameter.name} over {first.x.name} and "
        f"{first.y.name} at SNR {first.audit.snr[0]:g}, of {_checks.listing(maps)}"
    )
    cells = figure.subplots(2, len(maps) + 1, sharex=True, sharey=True)
    x = first.x.display_factor * first.x_values
    y = first.y.display_factor * first.y_values
    reach = _limits(np.abs(biases))[1]
    for row, kind, panels, norm, colours in (
        (cells[0], "bias", biases, Normalize(-reach, reach), DIVERGING),
        (cells[1], "std", spreads, LogNorm(*_limits(spreads)), SEQUENTIAL),
    ):
        titles = [*(f"{kind}, {label}" for label in maps), r"$\sqrt{\mathrm{CRB}}$"]
        colormap = matplotlib.colormaps[colours].with_extremes(bad=NO_DATA)
        for axes, title, values in zip(row, titles, panels, strict=False):
            image = axes.pcolormesh(
                x, y, np.ma.masked_invalid(values), cmap=colormap, norm=norm, shading="nearest"
            )  # fmt: skip
            axes.set_facecolor(NO_DATA)
            axes.set_title(title, fontsize=10)
            if marked is not None:
                dot = first.x.display_factor * marked[0], first.y.display_factor * marked[1]
                axes.plot(*dot, "o", color="#00C853", markeredgecolor="black", markersize=6)
        where: dict[str, Any] = {"ax": list(row)}
        if kind == "bias":
            # Beside the last map of the bias there is room, above √CRB.
            cells[0, -1].axis("off")
            where = {"cax": cells[0, -1].inset_axes((0.0, 0.0, 0.06, 1.0))}
        label = f"{_KINDS[kind]} of {parameter.label}"
        bar = figure.colorbar(image, label=label, extend="both", **where)
        if kind == "std":
            figures.label_log(bar.ax.yaxis)
    for axes in (*cells[0, :-1], *cells[1]):
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(first.x.label)
    for axes in cells[:, 0]:
        axes.set_ylabel(first.y.label)
    return figure


def bias_of_networks(
    audits: Mapping[str, Audit], parameters: Sequence[Parameter], *, snr: float
) -> Figure:
    """Distribution of the bias over the fingerprints for each network (Fig. 5).

    The axis holds the middle 98 % of all values.

    Args:
        audits: of the same fingerprints.
        parameters: one panel each.
        snr: one of the audits' SNRmax.

    Raises:
        KeyError: a parameter that an audit lacks.
        ValueError: an SNRmax that an audit lacks.
    """
    figure, panels = figures.panels_of(len(parameters), f"Histograms of the bias at SNR {snr:g}")
    for axes, parameter in zip(panels, parameters, strict=True):
        values = {
            label: parameter.display_factor * _column(audit, audit.bias, parameter, snr)
            for label, audit in audits.items()
        }
        _histograms(axes, values, ideal=0, medians=np.abs, median_of="|bias|")
        axes.set_xlabel(f"bias of {parameter.label}")
    panels[0].set_ylabel("fingerprints")
    figures.legend_above(figure, panels[0])
    return figure


def std_of_networks(
    audits: Mapping[str, Audit], parameters: Sequence[Parameter], *, snr: float
) -> Figure:
    """Distribution of the standard deviation over √CRB for each network (Fig. 6).

    1 is efficient. Arguments and errors as for `bias_of_networks`.
    """
    figure, panels = figures.panels_of(len(parameters), f"Histograms of std/√CRB at SNR {snr:g}")
    for axes, parameter in zip(panels, parameters, strict=True):
        values = {
            label: _column(audit, audit.std_ratio, parameter, snr)
            for label, audit in audits.items()
        }
        _histograms(axes, values, ideal=1, medians=np.asarray, median_of="ratio")
        axes.set_xlabel(rf"std / $\sqrt{{\mathrm{{CRB}}}}$ of {parameter.symbol}")
    panels[0].set_ylabel("fingerprints")
    figures.legend_above(figure, panels[0])
    return figure


def shares_of_networks(
    audits: Mapping[str, Audit], *, training_snr: tuple[float, float] = (10, 100)
) -> Figure:
    """Bias and variance share of the loss against SNRmax, a column for each network (Fig. 7).

    Above in units of the bound; below of the plain mean squared error, in mixed units.

    Args:
        audits: means over all their parameters and fingerprints are shown.
        training_snr: range of SNRmax in the training, which is shaded.
    """
    figure = Figure((0.42 * PAGE_WIDTH * len(audits), 6), layout="constrained")
    figure.set_label(f"Shares of the loss against SNR, of {_checks.listing(audits)}")
    cells = figure.subplots(2, len(audits), squeeze=False, sharex=True, sharey="row")
    for column, (label, audit) in zip(cells.T, audits.items(), strict=True):
        order = np.argsort(audit.snr)
        for axes, shares in zip(column, (audit.mean_shares(), audit.mean_squares()), strict=True):
            axes.axvspan(*training_snr, color="0.9", label="training range")
            for values, style, color, name in (
                (shares.bias, "o-", BIAS, "bias"),
                (shares.variance, "s-", VARIANCE, "variance"),
                (shares.loss, "^-", TOTAL, "sum"),
            ):
                axes.plot(
                    audit.snr[order], values[order], style, color=color, label=name, markersize=4
                )
            axes.set(xscale="log", yscale="log")
            figures.label_log(axes.xaxis)
            figures.plain(axes)
        figures.line_at_one(column[0])
        figures.label_log(column[0].yaxis)
        column[0].set_title(label, fontsize=10)
        column[1].set_xlabel("SNR$_{max}$")
    cells[0, 0].set_ylabel("squared error / CRB")
    cells[1, 0].set_ylabel("squared error (mixed units)")
    figures.legend_above(figure, cells[0, 0])
    return figure


def bound_shares_of_networks(
    audits: Mapping[str, Audit], parameters: Sequence[Parameter], *, snr: float
) -> Figure:
    """Bias share above and variance share below against √CRB for each network (Fig. 8).

    The bins are those of `shares_by_bound`. Arguments and errors as for `bias_of_networks`.
    """
    figure = Figure((PAGE_WIDTH, 5.6), layout="constrained")
    figure.set_label(
        f"Shares of the loss against √CRB at SNR {snr:g}, of {_checks.listing(audits)}"
    )
    cells = figure.subplots(2, len(parameters), squeeze=False, sharex="col", sharey="row")
    for column, parameter in zip(cells.T, parameters, strict=True):
        for label, audit, style in _styled(audits):
            bound, shares = figures.binned_shares(audit, parameter, snr=snr)
            for axes, values in zip(column, shares, strict=True):
                axes.plot(bound, values, label=label, marker="o", markersize=4, **style)
        for axes in column:
            figures.line_at_one(axes)
            axes.set(xscale="log", yscale="log")
            figures.label_log(axes.xaxis)
            figures.label_log(axes.yaxis)
            figures.plain(axes)
        column[0].set_title(parameter.symbol)
        column[1].set_xlabel(figures.bound_label(parameter))
    for axes, name in zip(cells[:, 0], ("bias²/CRB", "variance/CRB"), strict=True):
        axes.set_ylabel(name)
    figures.legend_above(figure, cells[0, 0])
    return figure


@dataclass(frozen=True)
class Comparison:
    """A statement of the paper beside ours, in displayed units.

    Attributes:
        statement: what is claimed, and of which number.
        source: section or figure of the paper.
        paper: its number as printed; empty if it gives none.
        unit: of our numbers.
        limits: between which ours must be; infinite where open, both if nothing is asked.
        ours: of the full-scale run; None if there is no such number.
        quick: over the seeds of the quick setting; None without them.
    """

    statement: str
    source: str
    paper: str
    unit: str
    limits: tuple[float, float]
    ours: float | None
    quick: Interval | None

    @property
    def agrees(self) -> bool | None:
        """Whether ours is within the limits; None where nothing is asked."""
        if not np.isfinite(self.limits).any():
            return None
        return self.ours is not None and self.limits[0] <= self.ours <= self.limits[1]


def comparison_table(rows: Sequence[Comparison]) -> str:
    """The statements as a Markdown table, numbered from 1."""
    n = {row.quick.n for row in rows if row.quick is not None}
    seeds = f"quick setting: mean [95 % interval] of {n.pop()} seeds" if n else "quick setting"
    lines = [
        f"| | statement | source | paper | asked | ours | agrees | {seeds} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for i, row in enumerate(rows, start=1):
        quick = "–"
        if row.quick is not None:
            ends = f"{number(row.quick.low)}, {number(row.quick.high)}"
            quick = _with(f"{number(row.quick.mean)} [{ends}]", row.unit)
        verdict = {True: "yes", False: "**no**", None: "–"}[row.agrees]
        ours = "–" if row.ours is None else _with(number(row.ours), row.unit)
        cells = (row.statement, row.source, row.paper or "–", _asked(row), ours, verdict, quick)
        # A bar would end the cell.
        lines.append(f"| {i} | {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _asked(row: Comparison) -> str:
    low, high = row.limits
    if row.agrees is None:
        return "–"
    if np.isinf(low):
        return _with(f"≤ {high:g}", row.unit)
    if np.isinf(high):
        return _with(f"≥ {low:g}", row.unit)
    return _with(f"{low:g} to {high:g}", row.unit)


def _with(text: str, unit: str) -> str:
    return f"{text} {unit}".rstrip()


def _column(audit: Audit, values: Floats, parameter: Parameter, snr: float) -> Floats:
    """Values (Q, S, E) of a parameter at an SNRmax, shape (S,)."""
    return values[audit.level(snr), :, _checks.index(parameter.name, audit.names)]


def _histograms(
    axes: Axes, values: Mapping[str, Floats], *, ideal: float, medians: Any, median_of: str
) -> None:
    """Outlines of the histograms over one axis; above them the medians."""
    finite = {label: each[np.isfinite(each)] for label, each in values.items()}
    every = np.concatenate(list(finite.values()))
    if not every.size:
        figures.say_empty(axes)
        return
    low, high = np.percentile(every, (1, 99))
    low, high = min(low, ideal), max(high, ideal)
    edges = np.linspace(low, high, 61) if low < high else np.linspace(low - 0.5, high + 0.5, 61)
    lines = []
    for label, each, style in _styled(finite):
        counts, _ = np.histogram(each, edges)
        axes.stairs(counts, edges, label=label, linewidth=1.5, **style)
        outside = len(each) - int(counts.sum())
        median = number(float(np.median(medians(each)))) if each.size else "–"
        lines.append(f"{label}: median {median_of} {median}, {outside} beyond")
    axes.axvline(ideal, color="black", linewidth=1, linestyle=":")
    axes.set_title("\n".join(lines), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _limits(values: Sequence[Floats] | Floats) -> tuple[float, float]:
    """The middle 96 % of the finite values above zero, widened to two digits."""
    array = np.asarray(values)
    positive = array[np.isfinite(array) & (array > 0)]
    if not positive.size:
        return 0.1, 1.0
    low, high = np.percentile(positive, (2, 98))
    steps = 10.0 ** (np.floor(np.log10([low, high])) - 1)
    low, high = np.floor(low / steps[0]) * steps[0], np.ceil(high / steps[1]) * steps[1]
    return float(low), float(high if high > low else 1.1 * low)


def _require_one_grid(maps: Mapping[str, AuditMap]) -> None:
    first = next(iter(maps.values()))
    for label, other in maps.items():
        same = (
            (first.x.name, first.y.name) == (other.x.name, other.y.name)
            and np.array_equal(first.x_values, other.x_values)
            and np.array_equal(first.y_values, other.y_values)
            and np.array_equal(first.audit.snr, other.audit.snr)
            and np.array_equal(first.audit.crb, other.audit.crb)
        )
        if not same:
            raise ValueError(
                f"expected maps of one grid, SNRmax and bound; that of {label!r} differs from the "
                "first. Audit the networks on the same grid and data set."
            )
