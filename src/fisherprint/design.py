"""Pulse trains designed by their bound: flip angles and durations that minimize it (§2.1, §2.8).

The cost is a weighted sum of relative bounds over tissues and parameters,

    J = Σ_s v_s Σ_p w_p √CRB_p(θ_s) / θ_sp,

of the whole signal, of the K coefficients of the train's own SVD basis, or of both. Its slope by
every flip angle and duration is exact: through the inverse of the Fisher information, through the
basis as far as it depends on the train, and through the periodic signal and its derivatives by one
adjoint pass (`models.adjoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType

import numpy as np
import scipy.linalg
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.optimize import minimize

from fisherprint import _checks, fisher
from fisherprint.models.protocol import PulsedModel
from fisherprint.sequence import Inversion, PulseTrain

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

# Limits other than ranges are aimed at with this margin, so that the last train keeps them.
_MARGIN = 2e-3
# Eigenvalues of the equilibrated information, from 1 down, below which nothing is seen.
_SINGULAR = 1e-13
# How much the penalties of violated limits grow from round to round, and where they begin.
_GROWTH, _FIRST_PENALTY, _LAST_PENALTY = 4.0, 30.0, 1e4
# Longest first step of a round, of any control, which go from 0 to 1.
_FIRST_STEP = 0.02
# A round that changes the cost by less, relatively, was the last.
_NO_PROGRESS = 1e-7
# Corrections that L-BFGS remembers.
_MEMORY = 30


class LimitsError(ValueError):
    """Limits that contradict each other, or a train that breaks them.

    Attributes:
        broken: the limits, by name, with what breaks them.
    """

    def __init__(self, message: str, broken: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.broken = dict(broken or {})


@dataclass(frozen=True, eq=False)
class Goal:
    """What a train shall see, and in whom.

    Attributes:
        theta: the tissues, shape (S, P), SI units.
        weights: w_p by parameter name, positive; the others are unknown but do not count.
        importance: of each tissue, shape (S,), v_s up to a factor; all the same if None.
        known: parameters that need not be estimated: they do not enter the Fisher information.
        phase_known: whether M0 is real, with its size alone unknown.
        rank: K, for the bound of as many coefficients; None for that of the whole signal.
        basis_theta: whose fingerprints make the basis, shape (B, P); needed with a rank.
        mirrored: whether their complex conjugates make it, too: for π between the pulses these
            are the fingerprints at -B0, and a prior that is even in B0 has a real basis.
        signal_share: with a rank, the share of the whole signal's bound in the cost.

    Raises:
        KeyError: an unknown parameter (when a cost is computed).
        ValueError: weights or shares out of range, or a rank without `basis_theta`.
    """

    theta: Floats
    weights: Mapping[str, float]
    importance: Floats | None = None
    known: tuple[str, ...] = ()
    phase_known: bool = False
    rank: int | None = None
    basis_theta: Floats | None = None
    mirrored: bool = False
    signal_share: float = 0.0

    def __post_init__(self) -> None:
        theta = np.array(self.theta, dtype=np.float64)
        _checks.shape("theta", theta, [("S", None), ("P", None)])
        if not self.weights:
            raise ValueError("expected a weight for at least one parameter; got none. Give some.")
        for name, weight in self.weights.items():
            _checks.positive(f"the weight of {name}", weight)
            if name in self.known:
                raise ValueError(
                    f"expected weights of unknown parameters; got one for {name}, which is known. "
                    "Drop the weight, or do not declare it known."
                )
        if self.importance is not None:
            importance = np.array(_checks.finite("importance", self.importance), dtype=np.float64)
            _checks.shape("importance", importance, [("S", len(theta))])
            if importance.min() < 0 or importance.sum() == 0:
                raise ValueError(
                    f"importance must be ≥ 0 with a positive sum; got {importance}. Correct it."
                )
            object.__setattr__(self, "importance", importance)
        if not 0 <= self.signal_share < 1 or (self.signal_share > 0 and self.rank is None):
            raise ValueError(
                "the share of the whole signal must lie in [0, 1), with a rank for the rest; got "
                f"{self.signal_share} and the rank {self.rank}. Without a rank it is all."
            )
        if (self.rank is None) != (self.basis_theta is None):
            raise ValueError(
                "expected a rank together with basis_theta, whose fingerprints make the basis; "
                "got one of them. Give both or none."
            )
        object.__setattr__(self, "theta", theta)
        object.__setattr__(self, "weights", MappingProxyType(dict(self.weights)))

    @property
    def shares(self) -> Floats:
        """v_s, of sum 1."""
        importance = np.ones(len(self.theta)) if self.importance is None else self.importance
        return importance / importance.sum()


@dataclass(frozen=True)
class Limits:
    """What a train may be. Inversions are left as they are and do not count, except for power.

    Attributes:
        flip_angle: range in rad; kept at every step of the search.
        pulse_duration: range in s; likewise. The other limits are kept by every train that is
            delivered, and by penalties on the way.
        rf_power: largest mean of ω1², in (rad/s)².
        peak_b1: largest ω1 = α/TRF, in rad/s.
        flip_angle_change: largest change of α from pulse to pulse, in rad.
        flip_angle_roughness: largest root mean square of the second difference of α, in rad; slow
            changes keep the spins in a hybrid state (doi:10.1038/s42005-019-0174-0).
        pulse_duration_change: largest change of TRF from pulse to pulse, in s.
        raster: of the durations of a delivered train, in s.

    Raises:
        LimitsError: limits that no train can keep.
    """

    flip_angle: tuple[float, float] = (0.0, np.pi)
    pulse_duration: tuple[float, float] = (100e-6, 500e-6)
    rf_power: float | None = None
    peak_b1: float | None = None
    flip_angle_change: float | None = None
    flip_angle_roughness: float | None = None
    pulse_duration_change: float | None = None
    raster: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("flip_angle", "pulse_duration"):
            low, high = getattr(self, name)
            if not 0 <= low < high < np.inf:
                raise LimitsError(
                    f"expected {name} as [low, high] with 0 ≤ low < high; got [{low}, {high}]. "
                    "Swap or correct them."
                )
        for item in fields(self)[2:]:
            value = getattr(self, item.name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise LimitsError(
                    f"expected {item.name} as a positive number; got {value}. Correct it."
                )
        low, high = self.pulse_duration
        if not 0 < self.raster <= low or np.ceil(low / self.raster) > high / self.raster + 1e-9:
            raise LimitsError(
                f"expected a range of durations above zero with a multiple of the raster "
                f"{self.raster} s in it; got [{low}, {high}] s. Widen it, or refine the raster."
            )
        least = self.flip_angle[0] / high
        if self.peak_b1 is not None and least > self.peak_b1:
            raise LimitsError(
                f"the smallest flip angle {self.flip_angle[0]} rad within the longest duration "
                f"{high} s already needs ω1 = {least:.4g} rad/s; got peak_b1 {self.peak_b1:.4g}. "
                "Raise peak_b1, or allow smaller angles or longer pulses."
            )

    def require_room(self, train: PulseTrain) -> None:
        """Require that a train of this size and inversion can keep the limit of RF power.

        Raises:
            LimitsError: the smallest angles in the longest pulses already exceed it.
        """
        if self.rf_power is None:
            return
        angle, duration = train.flip_angle.copy(), train.pulse_duration.copy()
        angle[:, 1:], duration[:, 1:] = self.flip_angle[0], self.pulse_duration[1]
        least = float((angle**2 / duration).sum() / train.duration)
        if least > self.rf_power:
            raise LimitsError(
                f"the inversions and the smallest flip angles in the longest pulses already take "
                f"an RF power of {least:.4g} (rad/s)²; got the limit {self.rf_power:.4g}. Raise "
                "it, prolong the inversion, or allow smaller angles."
            )

    def broken(self, train: PulseTrain) -> dict[str, str]:
        """The limits that a train does not keep, each with what it has; empty if it keeps all."""
        angle, duration = train.flip_angle[:, 1:], train.pulse_duration[:, 1:]
        result = {}
        for name, values, unit in (
            ("flip_angle", angle, "rad"),
            ("pulse_duration", duration, "s"),
        ):
            low, high = getattr(self, name)
            slack = 1e-9 * high
            if values.min() < low - slack or values.max() > high + slack:
                result[name] = (
                    f"{values.min():.6g} to {values.max():.6g} {unit}, not within {low:.6g} to "
                    f"{high:.6g}"
                )
        for name, value, _ in self._quantities(train):
            limit, worst = getattr(self, name), float(np.max(value))
            if worst > limit * (1 + 1e-9):
                result[name] = f"{worst:.6g}, above {limit:.6g}"
        return result

    def require_kept(self, train: PulseTrain, what: str) -> None:
        """Require that a train keeps all limits.

        Raises:
            LimitsError: it does not; the message and `broken` name each.
        """
        broken = self.broken(train)
        if broken:
            listed = "; ".join(f"{name}: {text}" for name, text in broken.items())
            raise LimitsError(
                f"expected {what} within the limits; got {listed}. Widen these limits, or begin "
                "with another train.",
                broken,
            )

    def on_raster(self, train: PulseTrain) -> PulseTrain:
        """The train with durations on the raster: rounded up, which lowers power and peak."""
        duration = train.pulse_duration.copy()
        # 1e-6 of a step is rounding, not a duration that needs one more.
        steps = np.ceil(duration[:, 1:] / self.raster - 1e-6)
        highest = np.floor(self.pulse_duration[1] / self.raster + 1e-6)
        duration[:, 1:] = self.raster * np.minimum(steps, highest)
        return replace(train, pulse_duration=duration)

    def excess(self, train: PulseTrain) -> tuple[Floats, list[_Pull]]:
        """Limited quantities over their limits, less one; and the transposes of their slopes.

        Ranges are left out. The limits are taken with the margin that a delivered train needs.
        """
        values, pulls = [], []
        for name, value, pull in self._quantities(train):
            limit = getattr(self, name) * (1 - _MARGIN)
            if name == "pulse_duration_change":
                # Rounding to the raster may add one step.
                limit = max(limit - self.raster, 0.1 * limit)
            flat = np.ravel(value) / limit
            values.append(flat - 1)
            pulls.append((flat.size, _scaled(pull, np.shape(value), 1 / limit)))
        return (np.concatenate(values) if values else np.empty(0)), pulls

    def _quantities(self, train: PulseTrain) -> Iterator[tuple[str, Floats, _Transpose]]:
        """What has a limit: name, value, and the map from slopes by it to those by (α, TRF)."""
        angle, duration = train.flip_angle, train.pulse_duration
        a, d = angle[:, 1:], duration[:, 1:]
        zero = np.zeros_like(a)
        if self.rf_power is not None:
            total = np.array(train.rf_power)
            yield (
                "rf_power",
                total,
                lambda g: (g * 2 * a / d / train.duration, -g * (a / d) ** 2 / train.duration),
            )
        if self.peak_b1 is not None:
            yield "peak_b1", a / d, lambda g: (g / d, -g * a / d**2)
        if self.flip_angle_change is not None:
            step = np.diff(a, axis=1)
            yield (
                "flip_angle_change",
                np.abs(step),
                lambda g: (_diff_back(g * np.sign(step)), zero),
            )
        if self.flip_angle_roughness is not None:
            bend = np.diff(a, 2, axis=1)
            rough = np.array(np.sqrt((bend**2).mean()))
            yield (
                "flip_angle_roughness",
                rough,
                lambda g: (_diff_back(_diff_back(g * bend / (bend.size * (rough or 1.0)))), zero),
            )
        if self.pulse_duration_change is not None:
            longer = np.diff(d, axis=1)
            yield (
                "pulse_duration_change",
                np.abs(longer),
                lambda g: (zero, _diff_back(g * np.sign(longer))),
            )


_Transpose = Callable[..., tuple[Floats, Floats]]
_Pull = tuple[int, Callable[[Floats], tuple[Floats, Floats]]]


def _scaled(
    pull: _Transpose, shape: tuple[int, ...], factor: float
) -> Callable[[Floats], tuple[Floats, Floats]]:
    return lambda slopes: pull(factor * slopes.reshape(shape))


def _diff_back(slopes: Floats) -> Floats:
    """Transpose of the difference along the last axis."""
    return -np.diff(slopes, axis=1, prepend=0, append=0)


@dataclass(frozen=True, eq=False)
class Cost:
    """The cost of a train.

    Attributes:
        value: J.
        relative: √CRB/θ for σ = |M0| = 1 by weighted parameter, mean over the tissues by their
            importance: of the coefficients if there is a rank, else of the signal.
        flip_angle: ∂J/∂α in 1/rad, shape (trains, pulses).
        pulse_duration: ∂J/∂TRF in 1/s, the same shape.
    """

    value: float
    relative: Mapping[str, float]
    flip_angle: Floats
    pulse_duration: Floats


def cost(model: PulsedModel, goal: Goal) -> Cost:
    """Cost of a model's train and its exact slopes by all flip angles and durations.

    Raises:
        KeyError: a parameter that the model lacks.
        SingularInformationError: a weighted parameter that no tissue determines.
        ValueError: as for the model.
    """
    out = model.simulate(goal.theta)
    kept = [i for i, name in enumerate(model.names) if name not in goal.known]
    for name in (*goal.weights, *goal.known):
        model.index(name)
    rows = [out.jacobian.mT[:, kept], out.signal[:, None]]
    if not goal.phase_known:
        rows.append(1j * out.signal[:, None])
    g = np.concatenate(rows, axis=1).mT  # (S, T, Q)
    names = [model.names[i] for i in kept]
    weights = np.zeros((len(goal.theta), g.shape[-1]))
    for name, weight in goal.weights.items():
        relative_to = goal.theta[:, model.index(name)]
        weights[:, names.index(name)] = weight * goal.shares / relative_to
    by_g = np.zeros_like(g)
    angle = np.zeros(model.train.flip_angle.shape)
    duration = np.zeros_like(angle)
    value, roots = 0.0, np.empty(0)
    if goal.rank is None or goal.signal_share > 0:
        share = 1.0 if goal.rank is None else goal.signal_share
        part, roots, inner = _weighted_bounds(g, share * weights, names)
        value += part
        by_g -= 2 * g @ inner
    if goal.rank is not None and goal.basis_theta is not None:
        signals = model.signal(goal.basis_theta).T  # (T, B)
        if goal.mirrored:
            # Real and imaginary parts span what signals and conjugates do, with the same weights.
            signals = np.concatenate([signals.real, signals.imag], axis=1)
        vectors, pull_basis = _svd_basis(signals, goal.rank)
        reduced = vectors.conj().T @ g  # (S, K, Q)
        part, roots, inner = _weighted_bounds(reduced, (1 - goal.signal_share) * weights, names)
        value += part
        by_g -= 2 * vectors @ (reduced @ inner)
        # F = Re(Gᴴ P G) with P = U Uᴴ: the slope by P is -Σ G W Gᴴ, applied to U.
        by_projector = -np.einsum("stq,sqk->tk", g @ inner, reduced.conj().mT)
        if goal.mirrored:
            real, imaginary = np.split(pull_basis(by_projector.real), 2, axis=1)
            by_basis = real + 1j * imaginary
        else:
            by_basis = pull_basis(by_projector)
        slopes = model.control_slopes(goal.basis_theta, by_basis.T)
        angle += slopes.flip_angle
        duration += slopes.pulse_duration
    n = len(kept)
    by_signal = by_g[..., n] - (0 if goal.phase_known else 1j * by_g[..., n + 1])
    by_jacobian = np.zeros_like(out.jacobian)
    by_jacobian[..., kept] = by_g[..., :n]
    slopes = model.control_slopes(goal.theta, by_signal, by_jacobian)
    relative = {}
    for name in goal.weights:
        ratios = roots[:, names.index(name)] / goal.theta[:, model.index(name)]
        relative[name] = float(goal.shares @ ratios)
    return Cost(value, relative, angle + slopes.flip_angle, duration + slopes.pulse_duration)


def _weighted_bounds(
    g: Complexes, weights: Floats, names: Sequence[str]
) -> tuple[float, Floats, Floats]:
    """Σ w √CRB, the √CRB (S, Q), and W with d(Σ w √CRB) = -Σ W dF, shape (S, Q, Q).

    With C = F⁻¹ and dC = -C dF C: W = Σ_p w_p/(2 √C_pp) c_p c_pᵀ, c_p the column p of C.
    """
    rows = np.ascontiguousarray(g.mT).view(np.float64)
    information = rows @ rows.mT
    size = np.sqrt(np.einsum("sqq->sq", information))
    size = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(information / (size[:, :, None] * size[:, None]))
    if (values[:, 0] < _SINGULAR).any():
        bounds = fisher.bounds(information)[:, : len(names)]
        fisher.require_determined(bounds, information, names)
        values = np.maximum(values, _SINGULAR)
    inverse = (vectors / values[:, None]) @ vectors.mT / (size[:, :, None] * size[:, None])
    roots = np.sqrt(np.einsum("sqq->sq", inverse))
    inner = (inverse * (weights / (2 * roots))[:, None]) @ inverse
    return float((weights * roots).sum()), roots, inner


def _svd_basis(
    signals: Complexes, rank: int
) -> tuple[Complexes, Callable[[Complexes], Complexes]]:
    """The SVD basis U of signals X (T, B), and the pull of slopes through its projector.

    The pull takes A U, where A is the slope by the projector P = U Uᴴ (Hermitian, as dJ = Re tr(A
    dP)), and gives the slope by X. To first order P turns as

        dP = Σ_{i ≤ K < j} u_j (u_jᴴ dM u_i) u_iᴴ / (σ_i² - σ_j²) + h.c.,    M = X Xᴴ,

    so that X̄ = 2 Σ_i y_i (Xᴴ u_i)ᴴ + u_i (Xᴴ y_i)ᴴ with

        y_i = Σ_{j > K} u_j (u_jᴴ A u_i) / (σ_i² - σ_j²).
    """
    if signals.shape[1] < len(signals):
        vectors, singular, _ = scipy.linalg.svd(signals, full_matrices=False)
        squares = singular**2
    else:
        # Cheaper by the squares, which cost half of the digits: the kept ones have enough.
        squares, vectors = scipy.linalg.eigh(signals @ signals.conj().T)
        squares, vectors = squares[::-1], vectors[:, ::-1]
    kept, rest = vectors[:, :rank], vectors[:, rank:]

    def pull(by_projector: Complexes) -> Complexes:
        outside = by_projector - kept @ (kept.conj().T @ by_projector)
        along = rest.conj().T @ outside
        beyond = outside - rest @ along  # where σ_j = 0
        gaps = squares[None, :rank] - squares[rank:, None]
        y = rest @ (along / gaps) + beyond / squares[:rank]
        return 2 * (y @ (kept.conj().T @ signals) + kept @ (y.conj().T @ signals))

    return kept, pull


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
    grow = largest > max(_MARGIN / 2, state.excess / 2)
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
            and largest < _MARGIN
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
