"""One function per figure of the report: data in, a matplotlib figure out (Fig. 3 and 5 to 8).

Numbers come in SI units and are shown in the parameters' displayed units, with the unit printed.
The label of each figure says in words what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.evaluate import Audit, Shares
from fisherprint.parameters import Parameter
from fisherprint.simulate import DataSet

if TYPE_CHECKING:
    from fisherprint.train import Epoch

Floats = NDArray[np.float64]

# Okabe and Ito's palette, distinct for all common kinds of colour vision.
BIAS, VARIANCE, TOTAL = "#D55E00", "#0072B2", "black"

# Full width of the page in inches; with its 96 pixels an inch, text of 10 points stays readable.
PAGE_WIDTH = 10.0

_LOSS_LABELS = {
    "crb": "loss (mean squared error / CRB)",
    "mse": "mean squared error (mixed units)",
    "relative": "mean relative absolute error",
    "bayesian": "loss (mean squared error / CRB and prior)",
    "bias-reduced": "loss (bias² and variance in excess / CRB)",
}


def convergence(log: Sequence[Epoch | Mapping[str, Any]], loss_name: str) -> Figure:
    """Training and validation loss by epoch, with the learning rate (Fig. 3).

    Args:
        log: what `train.train` yielded, or the same fields as read from the run's log.
        loss_name: `crb`, which has a line at 1, or another of `train.LossName`.

    Raises:
        KeyError: an unknown loss.
    """
    figure = Figure((PAGE_WIDTH, 3.8), layout="constrained")
    figure.set_label("Training and validation loss and learning rate against epoch")
    axes = figure.subplots()
    rate = draw_convergence(axes, log, loss_name)
    axes.legend(handles=[*axes.get_lines(), *rate.get_lines()], loc="upper right")
    return figure


def draw_convergence(axes: Axes, log: Sequence[Epoch | Mapping[str, Any]], loss_name: str) -> Axes:
    """Draw what `convergence` shows; returns the axes of the learning rate."""
    _checks.index(loss_name, tuple(_LOSS_LABELS), what="loss")
    records = [entry if isinstance(entry, Mapping) else asdict(entry) for entry in log]
    epochs = [record["number"] for record in records]
    rate: Axes = axes.twinx()
    rates = [record["learning_rate"] for record in records]
    rate.step(epochs, rates, where="mid", color="0.65", linewidth=1, label="learning rate")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate", color="0.4")
    rate.tick_params(which="both", colors="0.4")
    rate.spines[["top", "left", "right"]].set_visible(False)
    marker = "o" if len(records) < 40 else ""
    for key, color, label in (
        ("train_loss", BIAS, "training"),
        ("validation_loss", VARIANCE, "validation"),
    ):
        losses = [record[key] for record in records]
        axes.plot(epochs, losses, color=color, label=label, marker=marker, markersize=3)
    if loss_name == "crb":
        line_at_one(axes)
        axes.get_lines()[-1].set_label("efficient and unbiased")
    axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel=_LOSS_LABELS[loss_name])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    plain(axes)
    # The losses lie over the learning rate, whose axes would else be drawn last.
    axes.set_zorder(rate.get_zorder() + 1)
    axes.patch.set_visible(False)
    return rate


def loss_shares(
    audit: Audit,
    parameters: Sequence[Parameter],
    *,
    training_snr: tuple[float, float] = (10, 100),
) -> Figure:
    """Bias and variance share of the loss against SNRmax (Fig. 7).

    The first panel is the mean over all of the audit's parameters. The dotted line is the variance
    share over N: what N noise realizations show as bias share of an unbiased estimator.

    Args:
        audit: Q ≥ 1 values of SNRmax.
        parameters: those that get a panel of their own.
        training_snr: range of SNRmax in the training, which is shaded.

    Raises:
        KeyError: a parameter that the audit lacks.
    """
    figure, panels = panels_of(1 + len(parameters), "Shares of the loss against SNR", sharey=True)
    by_parameter = audit.mean_shares_by_parameter()
    shares = [audit.mean_shares()]
    for parameter in parameters:
        column = _checks.index(parameter.name, audit.names)
        shares.append(Shares(*(share[:, column] for share in by_parameter)))
    titles = ["all parameters", *(parameter.symbol for parameter in parameters)]
    order = np.argsort(audit.snr)
    for axes, title, share in zip(panels, titles, shares, strict=True):
        axes.axvspan(*training_snr, color="0.9", label="training range")
        _draw_shares(axes, audit.snr[order], Shares(*(part[order] for part in share)))
        floor = share.variance[order] / audit.n_noise
        label = f"variance share / {audit.n_noise}"
        axes.plot(audit.snr[order], floor, ":", color=BIAS, linewidth=1, label=label)
        axes.set(title=title, xlabel="SNR$_{max}$")
    panels[0].set_ylabel("share of the loss")
    legend_above(figure, panels[0])
    return figure


def errors_and_bounds(audit: Audit, parameters: Sequence[Parameter]) -> Figure:
    """Root mean squared error against SNRmax, beside the bounds without and with the prior.

    Args:
        audit: with the bounds of the prior.
        parameters: one panel each, in the displayed unit.

    Raises:
        KeyError: a parameter that the audit lacks.
        ValueError: an audit without the bounds of the prior.
    """
    prior, order = audit.require_prior(), np.argsort(audit.snr)
    figure, panels = panels_of(len(parameters), "Errors and bounds against SNR")
    crb, error = audit.median_root_crb(), audit.root_mean_square
    for axes, parameter in zip(panels, parameters, strict=True):
        column, factor = _checks.index(parameter.name, audit.names), parameter.display_factor
        spread = factor * prior.spread[column]
        axes.axhline(spread, color="0.4", linewidth=1, linestyle="--", label="spread of the prior")
        for values, style, color, label in (
            (crb, "s:", VARIANCE, r"$\sqrt{\mathrm{CRB}}$, median"),
            (np.sqrt(prior.local), "-", BIAS, "van Trees, local"),
            (np.sqrt(prior.overall), ":", BIAS, "van Trees, global"),
            (error, "^-", TOTAL, "error"),
        ):
            y = factor * values[order, column]
            axes.plot(audit.snr[order], y, style, color=color, label=label, markersize=4)
        axes.set(xscale="log", yscale="log", title=parameter.label, xlabel="SNR$_{max}$")
        label_log(axes.xaxis)
        label_log(axes.yaxis)
    panels[0].set_ylabel("root mean square")
    legend_above(figure, panels[0])
    return figure


def bias_histograms(audit: Audit, parameters: Sequence[Parameter], *, snr: float) -> Figure:
    """Distribution of the bias over the fingerprints, in the displayed unit (Fig. 5).

    Args:
        audit: bias and variance of each fingerprint.
        parameters: one panel each.
        snr: one of the audit's SNRmax.

    Raises:
        KeyError: a parameter that the audit lacks.
        ValueError: an SNRmax that the audit lacks.
    """
    figure, panels = panels_of(len(parameters), f"Histograms of the bias at SNR {snr:g}")
    level = audit.level(snr)
    for axes, parameter in zip(panels, parameters, strict=True):
        column = _checks.index(parameter.name, audit.names)
        values = parameter.display_factor * audit.bias[level, :, column]
        _histogram(axes, values, ideal=0, color=BIAS)
        axes.set_xlabel(f"bias of {parameter.label}")
    panels[0].set_ylabel("fingerprints")
    return figure


def std_histograms(audit: Audit, parameters: Sequence[Parameter], *, snr: float) -> Figure:
    """Distribution of the standard deviation over √CRB; 1 is efficient (Fig. 6).

    Arguments and errors as for `bias_histograms`.
    """
    figure, panels = panels_of(len(parameters), f"Histograms of std/√CRB at SNR {snr:g}")
    level = audit.level(snr)
    for axes, parameter in zip(panels, parameters, strict=True):
        column = _checks.index(parameter.name, audit.names)
        _histogram(axes, audit.std_ratio[level, :, column], ideal=1, color=VARIANCE)
        axes.set_xlabel(rf"std / $\sqrt{{\mathrm{{CRB}}}}$ of {parameter.symbol}")
    panels[0].set_ylabel("fingerprints")
    return figure


def shares_by_bound(audit: Audit, parameters: Sequence[Parameter], *, snr: float) -> Figure:
    """Bias and variance share of the loss against √CRB (Fig. 8).

    Each point is the mean over a bin; the bins hold equally many fingerprints, at least 20 where
    there are so many, and stand at their median √CRB. Arguments and errors as for
    `bias_histograms`.
    """
    figure, panels = panels_of(
        len(parameters), f"Shares of the loss against √CRB at SNR {snr:g}", sharey=True
    )
    for axes, parameter in zip(panels, parameters, strict=True):
        bound, binned = binned_shares(audit, parameter, snr=snr)
        if bound.size:
            _draw_shares(axes, bound, binned)
        else:
            say_empty(axes)
        axes.set(title=parameter.symbol, xlabel=bound_label(parameter))
    panels[0].set_ylabel("share of the loss")
    legend_above(figure, panels[0])
    return figure


def binned_shares(audit: Audit, parameter: Parameter, *, snr: float) -> tuple[Floats, Shares]:
    """√CRB in the displayed unit, and the mean shares, of each bin of `shares_by_bound`.

    Each has the shape (B,). Where no fingerprint has a finite bound, B is 0.
    """
    level, column = audit.level(snr), _checks.index(parameter.name, audit.names)
    bias, variance = (share[level, :, column] for share in audit.shares)
    bound = parameter.display_factor * np.sqrt(audit.crb[:, column]) / audit.snr[level]
    used = np.flatnonzero(~np.isnan(bias))
    if not used.size:
        return np.empty(0), Shares(np.empty(0), np.empty(0))
    order = used[np.argsort(bound[used])]
    bins = np.array_split(order, np.clip(order.size // 20, 1, 12))
    binned = Shares(*(np.array([x[b].mean() for b in bins]) for x in (bias, variance)))
    return np.array([np.median(bound[b]) for b in bins]), binned


def bound_label(parameter: Parameter) -> str:
    """√CRB with the unit in which it is displayed."""
    unit = f" ({parameter.display_unit})" if parameter.display_unit else ""
    return rf"$\sqrt{{\mathrm{{CRB}}}}${unit}"


def compression_cost(
    data: DataSet, parameters: Sequence[Parameter], *, split: str = "test"
) -> Figure:
    """Bound of the coefficients over that of the whole signal, as boxes on a log axis.

    Boxes are quartiles, whiskers the 5th and 95th percentile; the median is printed.

    Args:
        data: bounds of both kinds.
        parameters: one box each.
        split: which samples, of `simulate.SPLITS`.

    Raises:
        KeyError: a parameter or split that the data lack.
    """
    _checks.index(split, tuple(data.samples), what="split")
    samples = data.samples[split]
    ratios = []
    for parameter in parameters:
        column = _checks.index(parameter.name, data.names)
        whole = samples.crb_signal[:, column]
        reduced = samples.crb_coefficients[:, column]
        bounded = np.isfinite(whole) & np.isfinite(reduced)
        ratios.append(reduced[bounded] / whole[bounded])
    figure = Figure((0.75 * PAGE_WIDTH, 1 + 0.5 * len(parameters)), layout="constrained")
    figure.set_label("Boxes of the ratio of the coefficients' bound to the signal's")
    axes = figure.subplots()
    rows = list(range(len(parameters)))
    axes.boxplot(
        ratios,
        positions=rows,
        orientation="horizontal",
        whis=(5, 95),
        showfliers=False,
        widths=0.6,
        patch_artist=True,
        boxprops={"facecolor": "#CCE3F0"},
        medianprops={"color": BIAS, "linewidth": 2},
    )
    for row, ratio in enumerate(ratios):
        text = f"median {np.median(ratio):.2f}" if ratio.size else "no finite bound"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center")
    axes.set_xscale("log")
    axes.axvline(1, color="0.4", linewidth=1, linestyle="--")
    axes.set_yticks(rows, [parameter.symbol for parameter in parameters])
    axes.set_ylim(len(parameters) - 0.5, -0.5)
    axes.set_xlabel(f"CRB of the {data.basis.rank} coefficients / CRB of the signal")
    label_log(axes.xaxis)
    plain(axes)
    return figure


def number(value: float) -> str:
    """At least three significant digits; a dash for what is not finite."""
    if not np.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".split("e")[1])
    text = f"{value:.{max(0, 2 - exponent)}f}" if -4 <= exponent < 6 else f"{value:.2e}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    """A share in per cent with two significant digits, and no more than a hundredfold."""
    if share >= 100:
        return "> 10000 %"
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"


def panels_of(n: int, label: str, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with n panels, four in a row at most; `label` says what they show."""
    n_columns = n if n <= 4 else 3
    n_rows = -(-n // n_columns)
    width = min(4.5, PAGE_WIDTH / n_columns)
    figure = Figure((width * n_columns, 3.0 * n_rows), layout="constrained")
    figure.set_label(label)
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False, sharey=sharey).ravel())
    for axes in panels[n:]:
        axes.remove()
    for axes in panels[:n]:
        plain(axes)
    return figure, panels[:n]


def plain(axes: Axes) -> None:
    """A faint grid, and axes on two sides alone."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def line_at_one(axes: Axes) -> None:
    """Where an efficient unbiased estimator is."""
    axes.axhline(1, color="0.4", linewidth=1, linestyle="--")


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend over the figure, of what is drawn in `axes`."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def say_empty(axes: Axes) -> None:
    """Say that there is nothing to draw."""
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center")


def _draw_shares(axes: Axes, x: Floats, shares: Shares) -> None:
    """Bias share, variance share and their sum against x, both axes logarithmic."""
    style: dict[str, Any] = {"markersize": 4, "linewidth": 1.5}
    axes.plot(x, shares.bias, "o-", color=BIAS, label="bias²/CRB", **style)
    axes.plot(x, shares.variance, "s-", color=VARIANCE, label="variance/CRB", **style)
    axes.plot(x, shares.loss, "^-", color=TOTAL, label="loss (sum)", **style)
    line_at_one(axes)
    axes.set(xscale="log", yscale="log")
    label_log(axes.xaxis)
    label_log(axes.yaxis)


def label_log(axis: Axis) -> None:
    """Plain numbers at the decades of a logarithmic axis, and at more where it is short."""
    low, high = axis.get_view_interval()
    subs = range(1, 10) if high < 4 * low else (1, 2, 5) if high < 50 * low else (1,)
    axis.set_major_locator(LogLocator(subs=tuple(subs)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _histogram(axes: Axes, values: Floats, *, ideal: float, color: str) -> None:
    """Histogram of the middle 98 %, the median, and how many values lie beside it."""
    values = values[np.isfinite(values)]
    if not values.size:
        say_empty(axes)
        return
    low, high = np.percentile(values, (1, 99))
    low, high = min(low, ideal), max(high, ideal)
    if low == high:
        low, high = low - 0.5, high + 0.5
    axes.hist(values, bins=40, range=(low, high), color=color)
    axes.axvline(ideal, color="black", linewidth=1.2, linestyle="--")
    outside = int(((values < low) | (values > high)).sum())
    median = number(float(np.median(values)))
    axes.set_title(f"median {median}\n{outside} of {values.size} beyond the axis", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
