"""What every public entry point asks of its arguments: expected, got, what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def finite(name: str, values: ArrayLike) -> NDArray[np.generic]:
    """Return `values` as an array; a ValueError counts and locates NaN and Inf."""
    array = np.asarray(values)
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite; got {int(bad.sum())} NaN or Inf of {array.size} values, "
            f"the first at index {where}. Remove or mask them first."
        )
    return array


def shape(
    name: str, array: NDArray[np.generic], expected: Sequence[tuple[str, int | None]]
) -> None:
    """Require the axes `(letter, length)`, a length of None standing for any; else ValueError."""
    fits = array.ndim == len(expected) and all(
        want is None or have == want for have, (_, want) in zip(array.shape, expected, strict=True)
    )
    if not fits:
        axes = ", ".join(axis if n is None else f"{axis}={n}" for axis, n in expected)
        raise ValueError(
            f"{name} must have the axes ({axes}); got the shape {array.shape}. "
            "Check the order of the axes and that both inputs belong to the same data."
        )


def index(name: str, known: Sequence[str], *, what: str = "parameter") -> int:
    """Position of `name` among `known`; an unknown name raises a KeyError that lists them."""
    try:
        return list(known).index(name)
    except ValueError:
        raise KeyError(f"unknown {what} {name!r}; known are {listing(known)}") from None


def positive(name: str, value: float) -> float:
    """Return `value` if it is finite and above zero; else ValueError."""
    if not (np.isfinite(value) and value > 0):
        raise ValueError(
            f"{name} must be a positive finite number; got {value}. "
            "Correct its sign or its source."
        )
    return float(value)


def listing(names: Iterable[str]) -> str:
    """Comma-separated names for a message."""
    return ", ".join(names) or "(none)"
