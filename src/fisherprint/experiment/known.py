"""Maps of parameters that a network is told, such as B1: read, and checked for their unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import files
from fisherprint.parameters import Parameter

BEYOND = 0.05
"""A network is trusted this far beyond the range of its training, relative to that range."""

# Where more of a map than this lies outside, it is not the voxels that are wrong.
_MOST_OUTSIDE = 0.5
# What is usually wrong then, by the unit that is expected.
_SUSPECTS = {
    "": "Is it in percent? 1 is the nominal value.",
    "rad/s": "Is it in another unit? rad/s are 2π times Hz.",
    "s": "Is it in ms or µs?",
    "1/s": "Is it a time? 1/s is a rate.",
}


def read_known(
    paths: Mapping[str, Path],
    parameters: Sequence[Parameter],
    ranges: Mapping[str, Sequence[float]],
    mask: NDArray[np.bool_],
    *,
    whose: str = "of the training",
    say: Callable[[str], None],
) -> NDArray[np.float64]:
    """The known maps behind each other, NaN where a network must not be asked.

    That is where a map has no finite value, or one beyond the range of the training, where the
    network would have to guess.

    Args:
        paths: file of each parameter's map, in SI units; in `.mat` and HDF5 its array has the
            parameter's name.
        parameters: n of them, in the order in which the network is told.
        ranges: least and largest value in the training, or that a fit may take, by name.
        mask: of the images, shape (X, Y, Z).
        whose: range it is, for people.
        say: told the quartiles of each map, with the unit that they are taken to have, and how
            many voxels are lost.

    Returns:
        Shape (X, Y, Z, n).

    Raises:
        UnreadableFileError: a file that is missing, damaged or foreign.
        ValueError: a complex map, one of another shape, without a value inside the mask, or for
            the most part outside of the range: in another unit.
    """
    known = np.empty((*mask.shape, len(parameters)))
    for column, parameter in enumerate(parameters):
        path, unit = paths[parameter.name], f" {parameter.unit}".rstrip()
        values = files.read_map(path, mask.shape, name=parameter.name)
        inside = values[mask & np.isfinite(values)]
        if not inside.size:
            raise ValueError(
                f"expected values of {parameter.name} inside the mask; {path} has none there. Do "
                "the map and the images belong together?"
            )
        low, high = ranges[parameter.name]
        margin = BEYOND * (high - low)
        beyond = (values < low - margin) | (values > high + margin)
        quartiles = np.percentile(inside, (25, 50, 75))
        found = "median {1:.4g} [{0:.4g}, {2:.4g}]".format(*quartiles) + unit
        allowed = f"{low:.4g} to {high:.4g}{unit}"
        if beyond[mask].sum() > _MOST_OUTSIDE * inside.size:
            raise ValueError(
                f"expected {parameter.name} in the range {whose}, {allowed}; {path} has "
                f"{found}. {_SUSPECTS.get(parameter.unit, 'Check its unit.')}"
            )
        say(f"known {parameter.name}: {found}")
        known[..., column] = np.where(beyond | ~np.isfinite(values), np.nan, values)
        lost = int(np.isnan(known[mask, column]).sum())
        if lost:
            say(
                f"no estimate in {lost} voxels whose {parameter.name} is unknown or beyond the "
                f"range {whose}, {allowed}"
            )
    return known
