"""Slices of parameter maps, alone or beside the truth (Fig. 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import matplotlib
import nibabel
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.maps import Status
from fisherprint.parameters import Parameter
from fisherprint.report.figures import PAGE_WIDTH

Floats = NDArray[np.float64]

# Both can be read with all common kinds of colour vision.
SEQUENTIAL, DIVERGING, NO_DATA = "viridis", "PuOr", "0.85"

# Of Okabe and Ito's palette, which all common kinds of colour vision tell apart, on grey.
_STATUS_COLOURS = {
    Status.FINE: NO_DATA,
    Status.OUTSIDE_MASK: "#ffffff",
    Status.NOT_FINITE: "#000000",
    Status.NOT_CONVERGED: "#cc79a7",
    Status.AT_BOUND: "#0072b2",
    Status.OUTSIDE_RANGE: "#56b4e9",
    Status.MISFIT: "#e69f00",
}


class Named(Protocol):
    """Arrays by parameter name: `maps.Maps`, or a dict."""

    def __getitem__(self, name: str, /) -> NDArray[Any]:
        """The array of one parameter, SI units."""


def map_panel(
    estimate: Named,
    parameters: Sequence[Parameter],
    *,
    truth: Named | None = None,
    labels: tuple[str, str] = ("truth", "estimate"),
    slices: Sequence[int] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    affine: Floats | None = None,
) -> Figure:
    """Axial slices of parameter maps, a row each; beside the truth where known (Fig. 10).

    The first axis of the array points to the right, the second up. With an affine the array is
    first brought to right-anterior-superior, so that anterior is up, and the sides are lettered.
    NaN is light grey. One slice without a truth is one panel: parameters stand side by side.

    Args:
        estimate: maps by name, shape (X, Y) or (X, Y, Z), SI units.
        parameters: those that are shown.
        truth: likewise; adds the truth and the difference.
        labels: what to call the truth, which may be another estimate, and the estimate.
        slices: along Z, or from the bottom up with an affine; the fullest one if None.
        ranges: limits of the colours by name, SI units. Others hold the middle 96 % of the values
            within 1.5 interquartile ranges of the quartiles, of the truth if known.
        affine: voxel index -> mm (right, anterior, superior), shape (4, 4).

    Raises:
        KeyError: a parameter that the maps lack.
        ValueError: maps that have not two or three axes, or not all the same ones.
        IndexError: a slice that does not exist.
    """
    sources = [estimate] if truth is None else [truth, estimate]
    volumes = _volumes(sources, parameters)
    grid = None
    if affine is not None:
        grid = _upright(volumes[0][0], affine)[1]
        volumes = [[_upright(volume, affine)[0] for volume in pair] for pair in volumes]
    filled = np.any(np.isfinite(volumes), axis=(0, 1))
    chosen = [int(filled.sum(axis=(0, 1)).argmax())] if slices is None else list(slices)
    for k in chosen:
        if not 0 <= k < filled.shape[2]:
            raise IndexError(
                f"expected slices from 0 to {filled.shape[2] - 1}; got {k}. Choose others."
            )
    kinds = [""] if truth is None else [*labels, f"{labels[1]} − {labels[0]}"]
    titles = [f"{kind}\n{_place(k, filled.shape, grid)}" for kind in kinds for k in chosen]
    xlim, ylim = _bounding_box(np.any(filled[..., chosen], axis=2))
    # Height over width of a voxel.
    aspect = 1.0 if grid is None else float(np.divide(*np.linalg.norm(grid[:3, [1, 0]], axis=0)))
    ratio = aspect * (ylim[1] - ylim[0]) / (xlim[1] - xlim[0])

    figure, rows = _rows(len(parameters), len(titles), len(sources), ratio)
    figure.set_label("Maps of " + _checks.listing(parameter.name for parameter in parameters))
    for parameter, pair, row in zip(parameters, volumes, rows, strict=True):
        images = [volume[..., chosen] for volume in pair]
        limits = _robust_range(images[0])
        if ranges is not None and parameter.name in ranges:
            low, high = ranges[parameter.name]
            limits = low * parameter.display_factor, high * parameter.display_factor
        own, beside = np.split(row, [len(sources) * len(chosen)])
        _draw_images(own, images, limits, SEQUENTIAL, parameter.label)
        if truth is not None:
            difference = images[1] - images[0]
            label = f"difference of {parameter.label}"
            _draw_images(beside, [difference], _robust_reach(difference), DIVERGING, label)
        # Below the first row the columns need no title, panels side by side do.
        titled = row if parameter is parameters[0] or len(titles) == 1 else []
        for axes, title in zip(titled, titles, strict=False):
            axes.set_title(title.strip(), fontsize=10)
        for axes in row:
            axes.set(xlim=xlim, ylim=ylim, aspect=aspect)
            if affine is not None:
                _letter_sides(axes)
    return figure


def status_panel(
    status: NDArray[np.uint8],
    *,
    slices: Sequence[int] | None = None,
    affine: Floats | None = None,
) -> Figure:
    """Axial slices of the status of each voxel, placed as by `map_panel`.

    The legend names what occurs, with its share of the voxels in the mask.

    Args:
        status: one `maps.Status` a voxel, shape (X, Y) or (X, Y, Z).
        slices: as for `map_panel`.
        affine: likewise.

    Raises:
        IndexError: a slice that does not exist.
    """
    volume = status[..., None] if status.ndim == 2 else status
    inside = volume[volume != Status.OUTSIDE_MASK]
    grid = None
    if affine is not None:
        upright, grid = _upright(volume.astype(np.float64), affine)
        volume = upright.astype(np.uint8)
    filled = volume != Status.OUTSIDE_MASK
    chosen = [int(filled.sum(axis=(0, 1)).argmax())] if slices is None else list(slices)
    for k in chosen:
        if not 0 <= k < filled.shape[2]:
            raise IndexError(
                f"expected slices from 0 to {filled.shape[2] - 1}; got {k}. Choose others."
            )
    xlim, ylim = _bounding_box(np.any(filled[..., chosen], axis=2))
    aspect = 1.0 if grid is None else float(np.divide(*np.linalg.norm(grid[:3, [1, 0]], axis=0)))
    ratio = aspect * (ylim[1] - ylim[0]) / (xlim[1] - xlim[0])
    width = min(3.2, (PAGE_WIDTH - 2.5) / len(chosen))
    figure = Figure((len(chosen) * width + 2.5, width * ratio + 0.4), layout="constrained")
    figure.set_label("Status of each voxel")
    colours = ListedColormap([_STATUS_COLOURS[code] for code in Status])
    for axes, k in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        axes.imshow(
            volume[..., k].T,
            origin="lower",
            cmap=colours,
            vmin=-0.5,
            vmax=len(Status) - 0.5,
            interpolation="nearest",
        )
        axes.set(xticks=[], yticks=[], xlim=xlim, ylim=ylim, aspect=aspect)
        axes.spines[:].set_visible(False)
        axes.set_title(_place(k, filled.shape, grid), fontsize=10)
        if affine is not None:
            _letter_sides(axes)
    marks = [
        Patch(
            facecolor=_STATUS_COLOURS[code],
            edgecolor="0.4",
            label=f"{code.name.lower().replace('_', ' ')}, {(inside == code).mean():.1%}",
        )
        for code in Status
        if (inside == code).any()
    ]
    figure.legend(handles=marks, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _letter_sides(axes: Any) -> None:
    """L and R, as seen by who looks from above."""
    for x, side in ((0.05, "L"), (0.95, "R")):
        axes.text(x, 0.95, side, transform=axes.transAxes, ha="center", va="center")


def _volumes(sources: Sequence[Named], parameters: Sequence[Parameter]) -> list[list[Floats]]:
    """Maps in displayed units by parameter and source; a plane becomes a volume of one slice."""
    volumes: list[list[Floats]] = []
    axes: list[tuple[str, int | None]] = [("X", None), ("Y", None), ("Z", None)]
    for parameter in parameters:
        volumes.append([])
        for maps in sources:
            volume = np.asarray(maps[parameter.name], dtype=np.float64)
            volume = volume[..., None] if volume.ndim == 2 else volume
            _checks.shape(f"the map of {parameter.name}", volume, axes)
            axes = list(zip("XYZ", volume.shape, strict=True))
            volumes[-1].append(parameter.display_factor * volume)
    return volumes


def _upright(volume: Floats, affine: Floats) -> tuple[Floats, Floats]:
    """Volume and affine with the axes nearest to right, anterior and superior."""
    image: Any = nibabel.as_closest_canonical(  # type: ignore[no-untyped-call]  # not annotated
        nibabel.Nifti1Image(volume, affine)  # type: ignore[no-untyped-call]
    )
    return image.get_fdata(), image.affine


def _place(k: int, shape: tuple[int, ...], affine: Floats | None) -> str:
    """Where a slice is: z in mm of its middle; without an affine its number, if there are more."""
    if affine is None:
        return f"slice {k}" if shape[2] > 1 else ""
    z = affine[2] @ ((shape[0] - 1) / 2, (shape[1] - 1) / 2, k, 1)
    return f"z = {z:.0f} mm".replace("-", "−")


def _bounding_box(inside: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Limits (x, y) around what is inside with a margin of two pixels; all if nothing is."""
    limits = []
    for axis in (0, 1):
        filled = np.flatnonzero(inside.any(axis=1 - axis))
        low, high = (filled[0], filled[-1]) if filled.size else (0, inside.shape[axis] - 1)
        limits.append((max(low - 2.5, -0.5), min(high + 2.5, inside.shape[axis] - 0.5)))
    return limits


def _robust_range(values: Floats) -> tuple[float, float]:
    """Limits that ignore outliers, rounded outwards to half a digit."""
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    p2, q1, q3, p98 = np.percentile(values, (2, 25, 75, 98))
    low, high = max(p2, q1 - 1.5 * (q3 - q1)), min(p98, q3 + 1.5 * (q3 - q1))
    if low == high:
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    step = 10.0 ** np.floor(np.log10(high - low)) / 2
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def _robust_reach(differences: Floats) -> tuple[float, float]:
    """Symmetric limits that hold 95 % of the differences."""
    finite = np.abs(differences[np.isfinite(differences)])
    reach = float(np.percentile(finite, 95)) if finite.size else 0.0
    reach = float(f"{reach:.2g}") if reach > 0 else 1.0
    return -reach, reach


def _rows(
    n_parameters: int, n_panels: int, n_bars: int, ratio: float
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure and its axes (parameters, panels), each `ratio` as high as wide.

    Parameters with a single panel stand side by side, three in a row at most, four as 2 x 2.
    """
    across = 1 if n_panels > 1 else 2 if n_parameters == 4 else min(3, n_parameters)
    n_rows, n_columns = -(-n_parameters // across), across * n_panels
    beside = 1.1 * across * n_bars
    width = min(3.2, (PAGE_WIDTH - beside) / n_columns)
    size = (n_columns * width + beside, n_rows * (width * ratio + 0.2) + 0.2)
    figure = Figure(size, layout="constrained")
    cells = figure.subplots(n_rows, n_columns, squeeze=False).ravel()
    for axes in cells[n_parameters * n_panels :]:
        axes.remove()
    return figure, cells[: n_parameters * n_panels].reshape(n_parameters, n_panels)


def _draw_images(
    cells: NDArray[np.object_],
    stacks: Sequence[Floats],
    limits: tuple[float, float],
    colours: str,
    label: str,
) -> None:
    """Slices (X, Y, slices) of each stack in turn, with one bar from limit to limit."""
    low, high = limits
    colormap = matplotlib.colormaps[colours].with_extremes(bad=NO_DATA)
    slices = [stack[..., k] for stack in stacks for k in range(stack.shape[2])]
    for axes, values in zip(cells, slices, strict=True):
        image = axes.imshow(
            values.T, origin="lower", cmap=colormap, vmin=low, vmax=high, interpolation="nearest"
        )
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    below = any((values < low).any() for values in slices)
    above = any((values > high).any() for values in slices)
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]
    bar = cells[0].figure.colorbar(image, ax=list(cells), label=label, extend=extend, pad=0.02)
    bar.set_ticks(np.linspace(low, high, 5))
    bar.ax.yaxis.set_major_formatter("{x:.4g}")
