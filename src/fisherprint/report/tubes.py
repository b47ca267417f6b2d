"""Estimates in the tubes of a phantom, by several estimators: boxes and their numbers (Fig. 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from fisherprint import _checks, regions
from fisherprint.parameters import Parameter
from fisherprint.report.figures import BIAS, PAGE_WIDTH, VARIANCE, plain

Floats = NDArray[np.float64]

# Okabe and Ito's palette, in the order of the estimators.
_COLORS = ("0.45", VARIANCE, BIAS, "#009E73", "#CC79A7")
# Each tube is one unit wide; its boxes take this much.
_WIDTH = 0.78
# Opacity of the boxes.
_FILL = 0.35
TUBE_COLUMNS = (
    *("tube", "parameter", "unit", "truth", "estimator", "voxels", "failed", "median"),
    *("lower_quartile", "upper_quartile", "interquartile_range"),
)
"""Of the numbers that `tube_numbers` gives."""


@dataclass(frozen=True, eq=False)
class TubeEstimates:
    """What estimators found in V voxels of tubes whose E parameters are known.

    Attributes:
        parameters: the E parameters.
        tubes: names of the tubes.
        labels: number of each voxel's tube from 1 on, shape (V,).
        truth: shape (tubes, E), SI units.
        estimates: by estimator, shape (V, E), SI units; NaN where there is none.

    Raises:
        ValueError: shapes that do not fit, or a tube without a voxel.
    """

    parameters: tuple[Parameter, ...]
    tubes: tuple[str, ...]
    labels: NDArray[np.integer]
    truth: Floats
    estimates: Mapping[str, Floats]

    def __post_init__(self) -> None:
        axis = ("E", len(self.parameters))
        _checks.shape("the truth", self.truth, [("tubes", len(self.tubes)), axis])
        for name, values in self.estimates.items():
            _checks.shape(f"the estimates of {name}", values, [("V", len(self.labels)), axis])
        if sorted(set(self.labels.tolist())) != list(range(1, len(self.tubes) + 1)):
            raise ValueError(
                f"expected voxels of each tube from 1 to {len(self.tubes)}; got those of "
                f"{sorted(set(self.labels.tolist()))}. Leave out voxels outside of the tubes."
            )


def tube_boxes(found: TubeEstimates) -> Figure:
    """Boxes of each estimator in each tube, a panel a parameter, with lines at the truth (Fig. 9).

    Boxes are quartiles with the median, whiskers the 5th and 95th percentile. Numbers are in the
    parameters' displayed units.
    """
    if len(found.estimates) > len(_COLORS):
        raise ValueError(
            f"expected at most {len(_COLORS)} estimators in a figure; got "
            f"{_checks.listing(found.estimates)}. Draw another figure for the others."
        )
    n_panels = len(found.parameters)
    figure = Figure((PAGE_WIDTH, 0.8 + 2.4 * n_panels), layout="constrained")
    figure.set_label("Boxes of estimates in the tubes of a phantom, by estimator")
    panels = figure.subplots(n_panels, squeeze=False, sharex=True)[:, 0]
    centres = np.arange(len(found.tubes))
    step = _WIDTH / len(found.estimates)
    for e, (axes, parameter) in enumerate(zip(panels, found.parameters, strict=True)):
        factor = parameter.display_factor
        axes.hlines(
            factor * found.truth[:, e],
            centres - _WIDTH / 2 - 0.06,
            centres + _WIDTH / 2 + 0.06,
            color="black",
            linewidth=1.2,
            zorder=3,
        )
        for k, values in enumerate(found.estimates.values()):
            inside = [factor * _finite(values[found.labels == i + 1, e]) for i in centres]
            shift = (k + 0.5) * step - _WIDTH / 2
            axes.boxplot(inside, positions=centres + shift, **_style(_COLORS[k], 0.8 * step))
        axes.set_ylabel(parameter.label)
        plain(axes)
        axes.grid(visible=False, axis="x")
    panels[-1].set_xticks(centres, [tube.replace(" + ", "\n+ ") for tube in found.tubes])
    panels[-1].set_xlim(-0.6, len(found.tubes) - 0.4)
    figure.align_ylabels(panels)
    handles: list[Any] = [
        Patch(facecolor=(color, _FILL), edgecolor=color, label=name)
        for name, color in zip(found.estimates, _COLORS, strict=False)
    ]
    handles.append(Line2D([], [], color="black", linewidth=1.2, label="truth"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def tube_numbers(found: TubeEstimates) -> list[list[str | float]]:
    """Median and quartiles of each tube, parameter and estimator, SI units: `TUBE_COLUMNS`."""
    names = dict(enumerate(found.tubes, start=1))
    rows: list[list[str | float]] = []
    for e, parameter in enumerate(found.parameters):
        by_estimator = {
            name: regions.statistics({parameter.name: values[:, e]}, found.labels, names=names)
            for name, values in found.estimates.items()
        }
        for i, tube in enumerate(found.tubes):
            for name, statistics in by_estimator.items():
                row = statistics[i]
                spread = row.upper_quartile - row.lower_quartile
                rows.append(
                    [
                        *(tube, parameter.name, parameter.unit, float(found.truth[i, e]), name),
                        *(row.voxels, row.failed, row.median),
                        *(row.lower_quartile, row.upper_quartile, spread),
                    ]
                )
    return rows


def agreement(
    found: TubeEstimates, reference: str, *, others: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """How far medians lie from those of a reference, over its interquartile range.

    The mean over the tubes of |median - median of the reference| / IQR of the reference: below
    about a half they agree within the range (§3.3).

    Args:
        found: the estimates.
        reference: one of the estimators, such as a non-linear fit.
        others: the rest of them if None.

    Returns:
        By estimator and parameter.

    Raises:
        KeyError: an unknown estimator.
    """
    names = tuple(found.estimates)
    _checks.index(reference, names, what="estimator")
    result = {}
    for other in others or [name for name in names if name != reference]:
        _checks.index(other, names, what="estimator")
        result[other] = {
            parameter.name: float(
                np.mean(
                    [_distance(found, other, reference, i, e) for i in range(len(found.tubes))]
                )
            )
            for e, parameter in enumerate(found.parameters)
        }
    return result


def _distance(found: TubeEstimates, name: str, reference: str, i: int, e: int) -> float:
    inside = found.labels == i + 1
    one, other = (_finite(found.estimates[n][inside, e]) for n in (name, reference))
    if not (one.size and other.size):
        return np.nan
    low, middle, high = np.percentile(other, (25, 50, 75))
    return float(abs(np.median(one) - middle) / (high - low))


def _finite(values: Floats) -> Floats:
    return values[np.isfinite(values)]


def _style(color: str, width: float) -> dict[str, Any]:
    line = {"color": color, "linewidth": 1.2}
    return {
        "widths": width,
        "whis": (5, 95),
        "showfliers": False,
        "patch_artist": True,
        "manage_ticks": False,
        "boxprops": {"facecolor": (color, _FILL), "edgecolor": color, "linewidth": 1.2},
        # Not black, which is the truth.
        "medianprops": {"color": color, "linewidth": 2.6},
        "whiskerprops": line,
        "capprops": line,
    }
