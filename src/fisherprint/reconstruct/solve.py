"""Iterations that turn Aᴴ W y into images: conjugate gradients, and FISTA with a proximal step.

Both are generators of frozen states: the caller counts, shows and stops, and a state that was
yielded stays whole whatever happens to the next one. Given back, the iterations go on from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fisherprint.reconstruct.encoding import Images

Normal = Callable[[Images], Images]
Proximal = Callable[[Images, float, int], Images]

# A fixed step in units of 1/(largest eigenvalue): the estimate of that comes from below.
STEP = 0.95
# With a proper step the residual of the normal equations never grows beyond that of zero images
# by more than rounding and the overshoot of the extrapolation; two is far from either.
_GROWTH = 2.0


class DivergenceError(ArithmeticError):
    """The iterations run away.

    Attributes:
        state: the last good one.
    """

    def __init__(self, message: str, state: State) -> None:
        super().__init__(message)
        self.state = state


@dataclass(frozen=True, eq=False)
class State:
    """Where an iteration stands, all that is needed to go on.

    Attributes:
        iteration: how many are done.
        images: the iterate x, shape (K, N0, N1, N2).
        residual: ‖b - (Aᴴ W A + λ) x‖/‖b‖ of conjugate gradients; of FISTA without λ, and at the
            extrapolated point where its gradient is.
        direction: the search direction of conjugate gradients; the extrapolated point of FISTA.
        remainder: the residual b - (Aᴴ W A + λ) x itself; None for FISTA.
        momentum: of FISTA.
    """

    iteration: int
    images: Images
    residual: float
    direction: Images
    remainder: Images | None = None
    momentum: float = 1.0


def conjugate_gradients(
    normal: Normal, right: Images, *, l2: float = 0.0, start: State | None = None
) -> Iterator[State]:
    """Solve (Aᴴ W A + λ) x = Aᴴ W y, which minimizes ‖√W (A x - y)‖² + λ‖x‖², from zero.

    Args:
        normal: x -> Aᴴ W A x.
        right: b = Aᴴ W y, shape (K, N0, N1, N2).
        l2: λ ≥ 0.
        start: a state to go on from.

    Yields:
        The state after each iteration, without end unless the residual is zero.

    Raises:
        ValueError: λ below zero; b zero or not finite.
        DivergenceError: the operator is not positive, or the residual grows tenfold.
    """
    require_weight(l2)
    scale = _require_signal(right)
    state = start or State(0, np.zeros_like(right), 1.0, right, right)
    if state.remainder is None:
        raise ValueError("expected a state of conjugate gradients; got one of FISTA.")
    square = _dot(state.remainder, state.remainder)
    while square > 0:
        applied = normal(state.direction)
        if l2:
            applied = applied + np.float32(l2) * state.direction
        curvature = _dot(state.direction, applied)
        if not curvature > 0:
            raise DivergenceError(
                "conjugate gradients need a positive operator; got the curvature "
                f"{curvature:.3g} in iteration {state.iteration + 1}. Stop earlier (the images so "
                "far are good), or regularize with λ.",
                state,
            )
        length = np.float32(square / curvature)
        images = state.images + length * state.direction
        remainder = state.remainder - length * applied
        new = _dot(remainder, remainder)
        residual = math.sqrt(new) / scale
        _require_bounded(residual, 10.0, state, "Stop earlier, or regularize with λ.")
        direction = remainder + np.float32(new / square) * state.direction
        state, square = State(state.iteration + 1, images, residual, direction, remainder), new
        yield state


def fista(
    normal: Normal,
    right: Images,
    proximal: Proximal,
    *,
    step: float,
    start: State | None = None,
) -> Iterator[State]:
    """Minimize ½‖√W (A x - y)‖² + g(x) by FISTA (doi:10.1137/080716542), from zero.

        x_n = prox_τg(z + τ (b - Aᴴ W A z)),   z = x_n + (t_(n-1) - 1)/t_n (x_n - x_(n-1)),
        t_n = (1 + √(1 + 4 t_(n-1)²))/2

    Args:
        normal: x -> Aᴴ W A x.
        right: b = Aᴴ W y, shape (K, N0, N1, N2).
        proximal: (x, τ, iteration) -> prox_τg(x).
        step: τ, below 1/(largest eigenvalue of Aᴴ W A); `STEP` of that is good.
        start: a state to go on from.

    Yields:
        The state after each iteration, without end.

    Raises:
        ValueError: b zero or not finite.
        DivergenceError: the residual grows, as it does with too long a step.
    """
    scale = _require_signal(right)
    state = start or State(0, np.zeros_like(right), 1.0, np.zeros_like(right))
    while True:
        remainder = right - normal(state.direction)
        residual = _norm(remainder) / scale
        _require_bounded(
            residual, _GROWTH, state, f"The step {step:.3g} is too long for this operator."
        )
        remainder *= np.float32(step)
        remainder += state.direction
        images = proximal(remainder, step, state.iteration + 1)
        momentum = (1 + math.sqrt(1 + 4 * state.momentum**2)) / 2
        ahead = images - state.images
        ahead *= np.float32((state.momentum - 1) / momentum)
        ahead += images
        state = replace(
            state, iteration=state.iteration + 1, images=images, residual=residual,
            direction=ahead, momentum=momentum,
        )  # fmt: skip
        yield state


def largest_eigenvalue(
    normal: Normal,
    start: Images,
    *,
    tolerance: float = 1e-3,
    most: int = 30,
    progress: Callable[[str, int, int], None] | None = None,
) -> float:
    """Of a positive operator, by power iteration: ‖A v‖ with v = A v/‖A v‖, from below.

    Args:
        normal: the operator.
        start: any images that are not orthogonal to the eigenvector. Aᴴ W y is good: most samples
            lie in the middle of k-space, and so does the eigenvector.
        tolerance: stop at a relative growth below this, well within what `STEP` leaves.
        most: stop after so many.
        progress: called with what is done, how many, and of how many at most.

    Raises:
        ValueError: start is zero or not finite.
        ArithmeticError: the operator is zero, or not finite.
    """
    vector = start / np.float32(_require_signal(start))
    value = 0.0
    for number in range(most):
        applied = normal(vector)
        before, value = value, _norm(applied)
        if not (math.isfinite(value) and value > 0):
            raise ArithmeticError(
                f"the normal operator must be positive; got the norm {value}. Are all "
                "sensitivities or weights zero?"
            )
        if progress is not None:
            progress("largest eigenvalue", number + 1, most)
        if value - before < tolerance * value:
            break
        vector = applied / np.float32(value)
    return value


def scaling(images: NDArray[np.complex64]) -> float:
    """What data are divided by so that λ means the same for all, as in BART.

    With the median and the 90th percentile p90 of |Aᴴ W y|: p90 if max - p90 < 2 (p90 - median),
    else the maximum.
    """
    magnitude = np.abs(images).reshape(-1)
    half, most = len(magnitude) // 2, min(int(0.9 * len(magnitude)), len(magnitude) - 1)
    magnitude.partition((half, most))
    median, p90, highest = magnitude[half], magnitude[most], magnitude.max()
    return float(p90 if highest - p90 < 2 * (p90 - median) else highest)


def require_weight(l2: float) -> None:
    """ValueError unless λ of λ‖x‖² is zero or above."""
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"λ must be zero or above; got {l2}. Zero regularizes nothing.")


def _require_signal(images: Images) -> float:
    """Its norm, if that is finite and not zero."""
    norm = _norm(images)
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(
            f"the data must give finite images that are not zero; got the norm {norm} of Aᴴ W y. "
            "Check k-space and sensitivities for NaN and for zeros alone."
        )
    return norm


def _require_bounded(residual: float, bound: float, state: State, advice: str) -> None:
    if not residual < bound:
        raise DivergenceError(
            f"iteration {state.iteration + 1} must not leave a residual above {bound:g} of the "
            f"data; got {residual:.3g}: it diverges. {advice}",
            state,
        )


def _dot(a: Images, b: Images) -> float:
    """Re Σ conj(a) b; sums of planes are added in double precision."""
    planes = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    return float(sum(np.vdot(x, y).real.astype(np.float64) for x, y in planes))


def _norm(a: Images) -> float:
    return math.sqrt(_dot(a, a))
