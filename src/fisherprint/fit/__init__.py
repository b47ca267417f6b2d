"""Fits of a signal model to each voxel: non-linear least squares, dictionary matching.

Both are estimators, callables from coefficients (..., K) to parameters (..., E), and know any
signal model.
"""

from fisherprint.fit.least_squares import Fit, LeastSquares, scale, simulated
from fisherprint.fit.matching import Dictionary, dictionary, forecast, grid
from fisherprint.fit.minimize import Reason

__all__ = [
    "Dictionary",
    "Fit",
    "LeastSquares",
    "Reason",
    "dictionary",
    "forecast",
    "grid",
    "scale",
    "simulated",
]
