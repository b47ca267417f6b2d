"""Many small sums of squares at once, between bounds: Levenberg-Marquardt and a secant term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.intp]


class Reason(IntEnum):
    """Why the fit of a voxel ended; `is_converged` says which are good ends."""

    GRADIENT = 0
    """No parameter that is free to move can take away more of the residual."""
    STEP = 1
    """The next step is no more than rounding."""
    COST = 2
    """The next decrease of the sum of squares is no more than rounding."""
    ITERATIONS = 3
    """The last iteration that is allowed."""
    NO_SIGNAL = 4
    """What is given of the voxel is not finite, or zero."""
    REFUSED = 5
    """The model refuses a known parameter, the start or where a step of a few ends, or gives no
    finite signal there.
    """
    FEW_STEPS = 6
    """The last of the few steps that were asked for."""

    @property
    def is_converged(self) -> bool:
        """Whether the estimate is what was asked for: a minimum, or the end of a few steps."""
        return self <= Reason.COST or self == Reason.FEW_STEPS

    @property
    def is_failed(self) -> bool:
        """Whether there is no estimate."""
        return self in (Reason.NO_SIGNAL, Reason.REFUSED)


class Local(NamedTuple):
    """Sums of squares ½‖r‖² of n residuals at a point each, J their Jacobians.

    Attributes:
        cost: ½‖r‖², shape (n,); not finite where there is none.
        gradient: Jᵀr, shape (n, F).
        curvature: JᵀJ, shape (n, F, F).
    """

    cost: Floats
    gradient: Floats
    curvature: Floats


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where n searches ended.

    Attributes:
        point: shape (n, F).
        local: the sum of squares there.
        iterations: steps tried, shape (n,).
        reason: `Reason` of the end, shape (n,).
    """

    point: Floats
    local: Local
    iterations: Integers
    reason: NDArray[np.int8]


# The share of the residual within reach, over the noise: no parameter is further from the minimum
# of the quadratic model than this share of its standard deviation.
_OFFSET = 2e-6
# Relative sizes of steps and of decreases at which rounding takes over.
_STEP, _COST = 1e-12, 1e-13
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-15, 1e15
# Columns of J have unit length here: this keeps a singular matrix solvable, and changes no other.
_RIDGE = 1e-14


def minimize(
    evaluate: Callable[[Floats, Integers], Local],
    start: Floats,
    low: Floats,
    high: Floats,
    *,
    degrees: int,
    floor: float,
    iterations: int,
) -> Minimum:
    r"""Local minima of n sums of squares ½‖r‖² between bounds, each search with its own damping.

        (JᵀJ + S + λ D²) p = -Jᵀr

    S is the secant approximation of Σ r ∇²r (`_secant`), used while it foretells the decrease
    better than JᵀJ alone. D holds the greatest length so far of each column of J (Moré), and λ
    follows Nielsen's rule. Parameters at a bound that the gradient pushes outwards do not move;
    those that would leave stop at their bound, and the others are solved for again. The search
    ends by the relative offset of Bates and Watts (Technometrics 1981), and at the latest where
    rounding takes over. Why S: docs/decisions/031-least-squares.md.

    Args:
        evaluate: points (m, F), and which of the n problems they are of -> their `Local`.
        start: shape (n, F), within the bounds.
        low: lower bounds, shape (n, F), -inf for none.
        high: upper bounds, likewise.
        degrees: of freedom of the residual, which make its norm the noise.
        floor: the least noise that is believed.
        iterations: steps tried at most.
    """
    point, local = start.copy(), evaluate(start, np.arange(len(start)))
    n, n_free = point.shape
    longest, second = np.zeros((n, n_free)), np.zeros((n, n_free, n_free))
    second_helps = np.zeros(n, dtype=bool)
    damping, growth = np.full(n, _FIRST_DAMPING), np.full(n, 2.0)
    tried: Integers = np.zeros(n, dtype=np.intp)
    reason = np.where(np.isfinite(local.cost), Reason.ITERATIONS, Reason.REFUSED).astype(np.int8)
    active: Integers = np.flatnonzero(reason == Reason.ITERATIONS)
    while active.size:
        here = Local(*(part[active] for part in local))
        length = np.sqrt(np.diagonal(here.curvature, axis1=1, axis2=2))
        longest[active] = np.maximum(longest[active], length)
        # A parameter that had no effect so far stays where it is, whatever its unit.
        D = np.where(longest[active] > 0, longest[active], 1.0)
        units = D[:, :, None] * D[:, None, :]
        g, H, S = here.gradient / D, here.curvature / units, second[active] / units
        below, above = D * (low[active] - point[active]), D * (high[active] - point[active])
        held = ((below >= 0) & (g > 0)) | ((above <= 0) & (g < 0))
        model = np.where(_is_positive(H + S, held, second_helps[active]), H + S, H)

        # By both, for a wrong S may foretell too little.
        offset = np.maximum(_offset(model, g, held), _offset(H, g, held))
        noise = np.maximum(np.sqrt(2 * here.cost / degrees), floor)
        settled = offset <= _OFFSET * noise
        reason[active[settled]] = Reason.GRADIENT
        going = ~settled & (tried[active] < iterations)
        if not going.all():
            active = active[going]
            continue

        step = _bounded_step(model, g, damping[active], held, below, above)
        # Clipped once more, for the sum is rounded.
        trial = np.clip(point[active] + step / D, low[active], high[active])
        there = evaluate(trial, active)
        tried[active] += 1
        downhill, half_H, half_S = (
            -(g * step).sum(axis=1),
            _quadratic(H, step) / 2,
            _quadratic(S, step) / 2,
        )
        foretold = downhill - _quadratic(model, step) / 2
        fallen = here.cost - there.cost
        better = (foretold > 0) & (fallen > 0)
        by_both, by_first = downhill - half_H - half_S, downhill - half_H
        second_helps[active] = np.abs(fallen - by_both) < np.abs(fallen - by_first)

        ratio = np.divide(fallen, foretold, out=np.zeros_like(fallen), where=better)
        shrunk = damping[active] * np.maximum(1 / 3, 1 - (2 * ratio - 1) ** 3)
        damping[active] = np.where(better, shrunk, damping[active] * growth[active])
        growth[active] = np.where(better, 2.0, 2 * growth[active])
        rounding = np.abs(foretold) + np.abs(fallen) <= _COST * here.cost
        size = np.linalg.norm(D * point[active], axis=1)
        short = np.linalg.norm(step, axis=1) <= _STEP * size
        short |= damping[active] > _MOST_DAMPING
        damping[active] = np.maximum(damping[active], _LEAST_DAMPING)

        moved = active[better]
        second[moved] = _secant(
            second[moved],
            trial[better] - point[moved],
            there.gradient[better] - here.gradient[better],
            there.curvature[better],
        )
        point[moved] = trial[better]
        for kept, new in zip(local, there, strict=True):
            kept[moved] = new[better]
        reason[active[short]] = Reason.STEP
        reason[active[rounding]] = Reason.COST
        active = active[~(short | rounding)]
    return Minimum(point, local, tried, reason)


def few_steps(
    evaluate: Callable[[Floats, Integers], Local],
    start: Floats,
    low: Floats,
    high: Floats,
    weights: Sequence[Floats],
) -> Minimum:
    r"""A few steps of Levenberg and Marquardt from n starts, each damped by W as told; no search.

        (JᵀJ + W) p = -Jᵀr

    The bounds do not bend a step: what ends beyond one is moved to it, and the others are not
    told. One step that is not damped is Le Cam's estimator: where a start has errors of the size
    of the noise in all parameters, it has the variance of the bound and no memory of the start,
    up to terms of second order (van der Vaart, Asymptotic Statistics, 1998, section 5.7). A
    damped one before it makes these terms small (docs/decisions/046-two-steps.md).

    Args:
        evaluate: as for `minimize`.
        start: shape (n, F), within the bounds.
        low: lower bounds, shape (n, F), -inf for none.
        high: upper bounds, likewise.
        weights: the diagonal of W for each step, shape (n, F): σ²/std² of each parameter for
            residuals of variance σ²; 0 for those that are not damped.
    """
    every: Integers = np.arange(len(start))
    point, here = start, evaluate(start, every)
    fine = np.isfinite(here.cost)
    tried = np.zeros(len(start), dtype=np.intp)
    for weight in weights:
        gradient = np.where(fine[:, None], here.gradient, 0.0)
        damped = weight[:, None] * np.eye(start.shape[1]) + here.curvature
        damped = np.where(fine[:, None, None], damped, 0.0)
        length = np.sqrt(np.diagonal(damped, axis1=1, axis2=2))
        D = np.where(length > 0, length, 1.0)
        step = _solved(
            damped / (D[:, :, None] * D[:, None, :]),
            gradient / D,
            np.zeros(len(D)),
            np.zeros(start.shape, dtype=bool),
            start,
        )
        point = np.clip(point + step / D, low, high)
        here = evaluate(point, every)
        tried += fine
        fine &= np.isfinite(here.cost)
    reason = np.where(fine, Reason.FEW_STEPS, Reason.REFUSED)
    return Minimum(point, here, tried, reason.astype(np.int8))


def _secant(S: Floats, s: Floats, y: Floats, curvature: Floats) -> Floats:
    """The update of NL2SOL (Dennis, Gay and Welsch, ACM Trans. Math. Softw. 1981) of S ≈ Σ r ∇²r.

    It is the smallest change after which (JᵀJ + S) s = y, in a norm that no choice of units
    alters. First S is made smaller where it was too large along s, as it is when r shrinks.

    Args:
        S: shape (n, F, F).
        s: steps, shape (n, F).
        y: changes of the gradient along them, shape (n, F).
        curvature: JᵀJ at their ends, shape (n, F, F).
    """
    wanted = y - (curvature @ s[..., None])[..., 0]
    along, sized = np.abs((s * wanted).sum(axis=1)), np.abs(_quadratic(S, s))
    size = np.divide(along, sized, out=np.ones_like(along), where=sized > along)
    S = S * size[:, None, None]
    rise = (s * y).sum(axis=1)
    upward = rise > 0
    lack = np.where(upward[:, None], wanted - (S @ s[..., None])[..., 0], 0.0)
    share = y / np.where(upward, rise, 1.0)[:, None]
    outer = lack[:, :, None] * share[:, None, :]
    across = share[:, :, None] * share[:, None, :]
    return S + outer + outer.mT - (s * lack).sum(axis=1)[:, None, None] * across


def _is_positive(matrix: Floats, held: Bools, asked: Bools) -> Bools:
    """Where it is asked: is the part of the parameters that move positive definite? (n, 1, 1)."""
    fixed = held[:, :, None] | held[:, None, :]
    part = np.where(fixed, 0.0, matrix) + held[:, :, None] * np.eye(held.shape[1])
    positive = np.zeros(len(matrix), dtype=bool)
    positive[asked] = np.linalg.eigvalsh(part[asked])[:, 0] > _RIDGE
    return positive[:, None, None]


def _offset(H: Floats, g: Floats, held: Bools) -> Floats:
    """√(gᵀ H⁻¹ g) over the parameters that move: length of the residual that they can remove."""
    newton = _solved(H, g, np.zeros(len(g)), held, np.zeros_like(g))
    square = np.maximum(-(g * newton).sum(axis=1), 0.0)
    return np.asarray(np.sqrt(square), dtype=np.float64)


def _bounded_step(
    H: Floats, g: Floats, damping: Floats, held: Bools, below: Floats, above: Floats
) -> Floats:
    """The damped step in the room that there is: who would leave stops at the bound."""
    step, held = np.zeros_like(g), held.copy()
    left: Integers = np.arange(len(g))
    while left.size:
        wanted = _solved(H[left], g[left], damping[left], held[left], step[left])
        step[left] = np.clip(wanted, below[left], above[left])
        leaving = ~held[left] & (step[left] != wanted)
        held[left] |= leaving
        left = left[leaving.any(axis=1)]
    return step


def _solved(H: Floats, g: Floats, damping: Floats, held: Bools, step: Floats) -> Floats:
    """(H + λ) p = -g for the parameters that move; those that are held keep their step."""
    given = np.where(held, step, 0.0)
    right = np.where(held, step, -g - (H @ given[..., None])[..., 0])
    fixed = held[:, :, None] | held[:, None, :]
    diagonal = np.where(held, 1.0, damping[:, None] + _RIDGE)
    left = np.where(fixed, 0.0, H) + diagonal[:, :, None] * np.eye(g.shape[1])
    return np.asarray(np.linalg.solve(left, right[..., None])[..., 0], dtype=np.float64)


def _quadratic(matrix: Floats, vector: Floats) -> Floats:
    """vᵀ A v, shape (n,)."""
    return (vector * (matrix @ vector[..., None])[..., 0]).sum(axis=1)
