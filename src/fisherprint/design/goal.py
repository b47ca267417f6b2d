"""What a train shall see, and what that costs: weighted relative bounds and their slopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from fisherprint import _checks, fisher
from fisherprint.models.protocol import PulsedModel

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

# Eigenvalues of the equilibrated information, from 1 down, below which nothing is seen.
_SINGULAR = 1e-13


@dataclass(frozen=True, eq=False)
class Goal:
    """What a train shall see, and in whom.

    Attributes:
        theta: the tissues, shape (S, P), SI units.
        weights: w_p by parameter name, positive; the others are unknown but do not count.
        importance: of each tissue, shape (S,), v_s up to a factor; all the same if None.
        sizes: what √CRB is divided by, shape (S, P); |θ| if None. Not 0 where there is a weight.
        foreknown: information about θ before the measurement in units of |M0|²/σ², shape (S, P),
            added to the diagonal of the Fisher information: σ²/(|M0| spread)², the bound of van
            Trees with a prior of that spread. None for none, the Cramér-Rao bound.
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
    sizes: Floats | None = None
    foreknown: Floats | None = None
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
        for name in ("sizes", "foreknown"):
            given = getattr(self, name)
            if given is not None:
                values = np.array(_checks.finite(name, given), dtype=np.float64)
                _checks.shape(name, values, [("S", len(theta)), ("P", theta.shape[1])])
                if values.min() < 0:
                    raise ValueError(f"{name} must be ≥ 0; got {values.min()}. Correct it.")
                object.__setattr__(self, name, values)
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


def require_seen(model: PulsedModel, goal: Goal) -> None:
    """Require that a model's train determines each weighted parameter in each tissue that counts.

    Raises:
        KeyError: a parameter that the model lacks.
        SingularInformationError: it does not; it says which unknowns cannot be told apart.
        ValueError: as for the model, or a weighted parameter is 0, so that √CRB/θ has no value.
    """
    g, names = _unknowns(model, goal)
    kinds = [g]
    if goal.rank is not None and goal.basis_theta is not None:
        vectors, _ = svd_basis(
            _basis_signals(model, goal.basis_theta, mirrored=goal.mirrored), goal.rank
        )
        kinds.append(vectors.conj().T @ g)
    for columns in kinds:
        information = _information(columns) + _beforehand(model, goal)
        bounds = fisher.bounds(information)
        for s in np.flatnonzero(goal.shares > 0):
            lost = tuple(name for name in goal.weights if np.isinf(bounds[s, names.index(name)]))
            if lost:
                groups = fisher.confounded(information[s], names)
                named = tuple(group for group in groups if set(group) & set(lost))
                raise fisher.SingularInformationError(information[s : s + 1], lost, named)


def cost(model: PulsedModel, goal: Goal) -> Cost:
    """Cost of a model's train and its exact slopes by all flip angles and durations.

    What the train does not see at all counts as if it saw next to nothing, so that a search can
    come from there; `require_seen` tells.

    Raises:
        KeyError: a parameter that the model lacks.
        ValueError: as for the model, or a weighted parameter is 0, so that √CRB/θ has no value.
    """
    g, names = _unknowns(model, goal)
    weights = np.zeros((len(goal.theta), g.shape[-1]))
    beforehand = _beforehand(model, goal)
    for name, weight in goal.weights.items():
        weights[:, names.index(name)] = weight * goal.shares / _sizes(model, goal, name)
    by_g = np.zeros_like(g)
    angle = np.zeros(model.train.flip_angle.shape)
    duration = np.zeros_like(angle)
    value, roots = 0.0, np.empty(0)
    if goal.rank is None or goal.signal_share > 0:
        share = 1.0 if goal.rank is None else goal.signal_share
        part, roots, inner = _weighted_bounds(g, beforehand, share * weights)
        value += part
        by_g -= 2 * g @ inner
    if goal.rank is not None and goal.basis_theta is not None:
        vectors, pull_basis = svd_basis(
            _basis_signals(model, goal.basis_theta, mirrored=goal.mirrored), goal.rank
        )
        reduced = vectors.conj().T @ g  # (S, K, Q)
        part, roots, inner = _weighted_bounds(
            reduced, beforehand, (1 - goal.signal_share) * weights
        )
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
    kept = _kept(model, goal)
    n = len(kept)
    by_signal = by_g[..., n] - (0 if goal.phase_known else 1j * by_g[..., n + 1])
    by_jacobian = np.zeros((*by_signal.shape, len(model.names)), dtype=np.complex128)
    by_jacobian[..., kept] = by_g[..., :n]
    slopes = model.control_slopes(goal.theta, by_signal, by_jacobian)
    relative = {}
    for name in goal.weights:
        ratios = roots[:, names.index(name)] / _sizes(model, goal, name)
        relative[name] = float(goal.shares @ ratios)
    return Cost(value, relative, angle + slopes.flip_angle, duration + slopes.pulse_duration)


def _kept(model: PulsedModel, goal: Goal) -> list[int]:
    for name in (*goal.weights, *goal.known):
        model.index(name)
    return [column for column, name in enumerate(model.names) if name not in goal.known]


def _unknowns(model: PulsedModel, goal: Goal) -> tuple[Complexes, list[str]]:
    """G = [∂s/∂θ ..., s, i s], shape (S, T, Q), of the unknowns; and their names."""
    kept = _kept(model, goal)
    out = model.simulate(goal.theta)
    rows = [out.jacobian.mT[:, kept], out.signal[:, None]]
    scale = fisher.SCALE[:1] if goal.phase_known else fisher.SCALE
    if not goal.phase_known:
        rows.append(1j * out.signal[:, None])
    return np.concatenate(rows, axis=1).mT, [*(model.names[i] for i in kept), *scale]


def _sizes(model: PulsedModel, goal: Goal, name: str) -> Floats:
    """What the bounds of a weighted parameter are divided by, shape (S,)."""
    sizes = (np.abs(goal.theta) if goal.sizes is None else goal.sizes)[:, model.index(name)]
    if (sizes == 0).any():
        raise ValueError(
            f"expected tissues in which the size of the weighted {name} is not 0; got 0 in tissue "
            f"{int(sizes.argmin())}, where √CRB/θ has no value. Drop its weight, or this tissue."
        )
    return sizes


def _basis_signals(model: PulsedModel, theta: Floats, *, mirrored: bool) -> Complexes:
    """What the basis is made of, shape (T, B), or real with (T, 2 B) if mirrored."""
    signals = model.signal(theta).T
    if not mirrored:
        return signals
    # Real and imaginary parts span what signals and conjugates do, with the same weights.
    return np.concatenate([signals.real, signals.imag], axis=1)


def _information(g: Complexes) -> Floats:
    """F = Re(Gᴴ G), shape (S, Q, Q)."""
    rows = np.ascontiguousarray(g.mT).view(np.float64)
    return rows @ rows.mT


def _beforehand(model: PulsedModel, goal: Goal) -> Floats:
    """What is known of the unknowns before the measurement, as information, shape (S, Q, Q)."""
    kept = _kept(model, goal)
    n = len(kept) + (1 if goal.phase_known else 2)
    out = np.zeros((len(goal.theta), n, n))
    if goal.foreknown is not None:
        for place, column in enumerate(kept):
            out[:, place, place] = goal.foreknown[:, column]
    return out


def _weighted_bounds(
    g: Complexes, beforehand: Floats, weights: Floats
) -> tuple[float, Floats, Floats]:
    """Σ w √CRB, the √CRB (S, Q), and W with d(Σ w √CRB) = -Σ W dF, shape (S, Q, Q).

    With C = F⁻¹ and dC = -C dF C: W = Σ_p w_p/(2 √C_pp) c_p c_pᵀ, c_p the column p of C.
    """
    information = _information(g) + beforehand
    size = np.sqrt(np.einsum("sqq->sq", information))
    size = np.where(size > 0, size, 1.0)
    values, vectors = np.linalg.eigh(information / (size[:, :, None] * size[:, None]))
    values = np.maximum(values, _SINGULAR)
    inverse = (vectors / values[:, None]) @ vectors.mT / (size[:, :, None] * size[:, None])
    roots = np.sqrt(np.einsum("sqq->sq", inverse))
    inner = (inverse * (weights / (2 * roots))[:, None]) @ inverse
    return float((weights * roots).sum()), roots, inner


def svd_basis(signals: Complexes, rank: int) -> tuple[Complexes, Callable[[Complexes], Complexes]]:
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
