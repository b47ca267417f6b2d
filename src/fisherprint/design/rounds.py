"""The search: rounds of L-BFGS, splines, and what a round leaves for the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.optimize import minimize

from fisherprint.design.goal import Goal, cost, require_seen
from fisherprint.design.limits import MARGIN, Limits
from fisherprint.models.protocol import PulsedModel
from fisherprint.sequence import Inversion, PulseTrain

Floats = NDArray[np.float64]

# How much the penalties of violated limits grow from round to round, and where they begin.
_GROWTH, _FIRST_PENALTY, _LAST_PENALTY = 4.0, 30.0, 1e4
# Longest first step of a round, of any control, which go from 0 to 1.
_FIRST_STEP = 0.02
# A round that changes the cost by less, relatively, was the last.
_NO_PROGRESS = 1e-7
# Corrections that L-BFGS remembers.
_MEMORY = 30


def random_start(
    limits: Limits,
    *,
    pulses: int,
    repetition_time: float,
    inversion: Inversion = "crushed",
    inversion_duration: float = 500e-6,
    rng: Generator,
) -> PulseTrain:
    """A smooth random train within the limits: where to start when there is no better idea.

    Flip angles and durations are cubic splines with a knot every 25 pulses, drawn towards the
    smallest angles and the longest pulses until all limits are kept.

    Raises:
        LimitsError: not even these keep them.
    """
    basis = _spline_matrix(pulses - 1, max(4, pulses // 25))
    angles, durations = (basis @ rng.uniform(0, 1, (2, basis.shape[1], 1)))[..., 0]
    smallest, largest = limits.flip_angle[0], min(limits.flip_angle[1], np.pi / 2)
    shortest, longest = limits.pulse_duration
    for weight in 0.95 ** np.arange(200):
        angle = smallest + weight * (largest - smallest) * angles
        duration = longest - weight * (longest - shortest) * durations
        train = PulseTrain(
            np.r_[np.pi, angle],
            np.r_[inversion_duration, duration],
            repetition_time,
            inversion,
        )
        limits.require_room(train)
        train = limits.on_raster(train)
        if not limits.broken(train):
            return train
    limits.require_kept(train, "a random start")
    return train


@dataclass(frozen=True, eq=False)
class Round:
    """Where a search stands after a round.

    Attributes:
        number: rounds done, from 1; 0 before the first.
        train: the current train; may still break a limit.
        best: the best train so far that keeps all limits, durations on the raster.
        best_cost: its J.
        cost: J of the current train.
        relative: √CRB/θ of the current train, as in `Cost`.
        excess: the largest violation of a limit by the current train, relative to the limit.
        multipliers: of the limits, in the augmented Lagrangian.
        penalty: its factor.
        evaluations: of the cost so far.
        converged: nothing changes any more.
    """

    number: int
    train: PulseTrain
    best: PulseTrain
    best_cost: float
    cost: float
    relative: Mapping[str, float]
    excess: float
    multipliers: Floats = field(repr=False)
    penalty: float
    evaluations: int
    converged: bool = False


def begin(model: PulsedModel, goal: Goal, limits: Limits) -> Round:
    """The state before the first round: the model's train is the start.

    Raises:
        LimitsError: it breaks a limit.
        SingularInformationError: a weighted parameter that no tissue determines.
    """
    limits.require_room(model.train)
    limits.require_kept(model.train, "a start")
    require_seen(model, goal)
    first = cost(model, goal)
    excess, _ = limits.excess(model.train)
    best = limits.on_raster(model.train)
    if limits.broken(best):
        best = model.train
    return Round(
        0,
        model.train,
        best,
        first.value,
        first.value,
        first.relative,
        float(max(excess.max(initial=-1), 0)),
        np.zeros(excess.size),
        _FIRST_PENALTY,
        1,
    )


def search(
    model: PulsedModel,
    goal: Goal,
    limits: Limits,
    state: Round | None = None,
    *,
    knots: Sequence[int | None] = (None,),
    iterations: int = 40,
    watch: Callable[[float], None] = lambda value: None,
) -> Iterator[Round]:
    """Rounds of L-BFGS within the ranges, with penalties for the other limits.

    Each round minimizes the augmented Lagrangian

        J/J_0 + Σ_i (max(0, μ_i + ρ c_i)² - μ_i²) / 2ρ,    c_i = quantity_i/limit_i - 1,

    over controls scaled to [0, 1], for some iterations, then updates μ and ρ. It depends on the
    state alone: an interrupted search that goes on from its last round ends like another.

    Args:
        model: with the train to start from, or any train of its size when there is a state.
        goal: what to minimize.
        limits: what to keep.
        state: of an earlier search, to go on from; `begin` if None.
        knots: control points of cubic splines along the train, of each round in turn, the last
            one for all further rounds; None for every pulse by itself. Coarse to fine.
        iterations: of L-BFGS in a round.
        watch: called with J after each evaluation.

    Yields:
        The state after each round, without end unless it has converged.

    Raises:
        LimitsError: the start breaks a limit, or the limits allow no train.
        SingularInformationError: a weighted parameter that no tissue determines.
    """
    state = begin(model, goal, limits) if state is None else state
    while not state.converged:
        n_knots = knots[min(state.number, len(knots) - 1)]
        state = _round(model, goal, limits, state, n_knots, iterations, watch)
        yield state


def _round(
    model: PulsedModel,
    goal: Goal,
    limits: Limits,
    state: Round,
    n_knots: int | None,
    iterations: int,
    watch: Callable[[float], None],
) -> Round:
    controls = _Controls(state.train, limits, n_knots)
    start = controls.start
    scale = state.cost
    evaluations = 0

    def lagrangian(x: Floats) -> tuple[float, Floats]:
        nonlocal evaluations
        evaluations += 1
        train = controls.train(x)
        now = cost(model.of(train), goal)
        watch(now.value)
        value, slopes = (
            now.value / scale,
            (
                now.flip_angle[:, 1:] / scale,
                now.pulse_duration[:, 1:] / scale,
            ),
        )
        excess, pulls = limits.excess(train)
        pressed = np.maximum(0, state.multipliers + state.penalty * excess)
        value += float((pressed**2 - state.multipliers**2).sum()) / (2 * state.penalty)
        used = 0
        for size, pull in pulls:
            more = pull(pressed[used : used + size])
            slopes = (slopes[0] + more[0], slopes[1] + more[1])
            used += size
        return value, controls.pull(*slopes)

    # The first step of L-BFGS is the slope itself; it must be short on the scale of the controls.
    _, slopes = lagrangian(start)
    factor = min(1.0, _FIRST_STEP / max(float(np.abs(slopes).max()), 1e-300))

    def shortened(x: Floats) -> tuple[float, Floats]:
        value, slopes = lagrangian(x)
        return factor * value, factor * slopes

    result = minimize(
        shortened,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, 1)] * start.size,
        options={"maxiter": iterations, "maxcor": _MEMORY, "ftol": 1e-10, "gtol": 1e-9},
    )
    train = controls.train(result.x)
    now = cost(model.of(train), goal)
    excess, _ = limits.excess(train)
    best, best_cost = state.best, state.best_cost
    delivered = limits.on_raster(train)
    if not limits.broken(delivered):
        value = cost(model.of(delivered), goal).value
        evaluations += 1
        if value < best_cost:
            best, best_cost = delivered, value
    largest = float(max(excess.max(initial=-1), 0))
    # The multipliers take over what the penalty pressed; it grows while limits stay broken.
    multipliers = np.maximum(0, state.multipliers + state.penalty * excess)
    grow = largest > max(MARGIN / 2, state.excess / 2)
    penalty = min(state.penalty * _GROWTH, _LAST_PENALTY) if grow else state.penalty
    return Round(
        state.number + 1,
        train,
        best,
        best_cost,
        now.value,
        now.relative,
        largest,
        multipliers,
        penalty,
        state.evaluations + evaluations + 1,
        converged=(
            n_knots is None
            and largest < MARGIN
            and abs(now.value - state.cost) <= _NO_PROGRESS * state.cost
        ),
    )


class _Controls:
    """Flip angles and durations as numbers in [0, 1], pulse by pulse or by splines."""

    def __init__(self, train: PulseTrain, limits: Limits, n_knots: int | None) -> None:
        self._train = train
        self._low = np.array([limits.flip_angle[0], limits.pulse_duration[0]])[:, None, None]
        high = np.array([limits.flip_angle[1], limits.pulse_duration[1]])[:, None, None]
        self._width = high - self._low
        n_free = train.flip_angle.shape[1] - 1
        # The splines of a cubic basis sum to one, so that within [0, 1] the curve is, too.
        self._basis = np.eye(n_free) if n_knots is None else _spline_matrix(n_free, n_knots)
        values = np.stack([train.flip_angle[:, 1:], train.pulse_duration[:, 1:]])
        scaled = (values - self._low) / self._width
        if n_knots is not None:
            scaled = np.linalg.lstsq(self._basis, scaled.reshape(-1, n_free).T)[0].T
        self._shape = (*values.shape[:2], self._basis.shape[1])
        self.start = np.clip(scaled, 0, 1).ravel()

    def train(self, x: Floats) -> PulseTrain:
        values = self._low + self._width * (x.reshape(self._shape) @ self._basis.T)
        angle, duration = self._train.flip_angle.copy(), self._train.pulse_duration.copy()
        angle[:, 1:], duration[:, 1:] = values
        return replace(self._train, flip_angle=angle, pulse_duration=duration)

    def pull(self, by_angle: Floats, by_duration: Floats) -> Floats:
        slopes = self._width * np.stack([by_angle, by_duration])
        return (slopes @ self._basis).ravel()


def _spline_matrix(n_points: int, n_knots: int) -> Floats:
    if not 4 <= n_knots <= n_points:
        raise ValueError(
            f"expected between 4 and {n_points} knots of a cubic spline, the number of pulses; "
            f"got {n_knots}. Correct it."
        )
    inner = np.linspace(0, 1, n_knots - 2)
    knots = np.r_[[0.0] * 3, inner, [1.0] * 3]
    return BSpline.design_matrix(np.linspace(0, 1, n_points), knots, 3).toarray()
