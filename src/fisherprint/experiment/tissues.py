"""Tissues by name, as parameters of a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks
from fisherprint.parameters import TruncatedNormal, paper_prior
from fisherprint.reconstruct import phantom

PRIOR = "prior"
NAMES = (*phantom.TISSUES, PRIOR)
"""The tissues at 3 T, and the centre of the paper's prior, its nominal values."""


def tissue(name: str, names: Sequence[str]) -> NDArray[np.float64]:
    """One of `NAMES` as θ, shape (P,), SI units, at B0 = 0 and B1 = 1.

    Args:
        name: of the tissue.
        names: parameters of the two-pool model, T1 being the apparent one of both pools, or of
            the single pool, whose T2 is T2f.

    Raises:
        KeyError: an unknown tissue or parameter.
    """
    _checks.index(name, NAMES, what="tissue")
    # Any repetition time: B0 is 0 in the middle of its range. The paper's nominal values are the
    # means of its distributions before truncation (§2.4).
    prior = paper_prior(names, repetition_time=1.0).distributions
    centre = {
        parameter: drawn.mean
        if isinstance(drawn, TruncatedNormal)
        else (drawn.low + drawn.high) / 2
        for parameter, drawn in prior.items()
    }
    if name == PRIOR:
        return np.array([centre[parameter] for parameter in names])
    known = phantom.TISSUES[name]
    return np.array(
        [
            centre[parameter]
            if parameter in phantom.FIELD_PARAMETERS
            else getattr(known, "T2f" if parameter == "T2" else parameter)
            for parameter in names
        ]
    )
