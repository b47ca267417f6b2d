"""Fisher information and the Cramér-Rao bound, of a signal or of its coefficients (§2.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from fisherprint import _checks

# Eigenvalues of the equilibrated information below this are zero but for rounding: the entries
# carry a relative error of about 1e-16 times the number of samples, amplified by the inversion.
_SINGULAR = 1e-13
# A parameter takes part in a singular direction if that direction has this share of it; far
# above the rounding of an eigenvector, far below a true participation.
_INVOLVED = 1e-6

# The two unknowns that every information has after the parameters.
SCALE = ("Re M0", "Im M0")

Group = tuple[str, ...]
"""Unknowns that cannot be told apart; one alone has no effect on the signal."""


class SingularInformationError(ArithmeticError):
    """No unbiased estimator with finite variance exists.

    Attributes:
        information: the singular Fisher information, shape (S, P + 2, P + 2).
        names: parameters whose bound is infinite in every sample.
        groups: of unknowns that cannot be told apart, those with these parameters in them.
    """

    def __init__(
        self,
        information: NDArray[np.float64],
        names: tuple[str, ...],
        groups: tuple[Group, ...] = (),
    ) -> None:
        self.information = information
        self.names = names
        self.groups = groups
        why = f" ({'; '.join(map(explained, groups))})" if groups else ""
        super().__init__(
            "expected a signal that depends on each parameter in its own way; got a singular "
            f"Fisher information{why}, with an infinite bound of {_checks.listing(names)} in "
            "every sample. Leave these parameters out, keep more coefficients, or change the "
            "sequence."
        )

    # Exceptions are rebuilt from their message; worker processes need the rest.
    def __reduce__(
        self,
    ) -> tuple[
        type[SingularInformationError],
        tuple[NDArray[np.float64], tuple[str, ...], tuple[Group, ...]],
    ]:
        return SingularInformationError, (self.information, self.names, self.groups)


def information(
    signal: NDArray[np.complexfloating], jacobian: NDArray[np.complexfloating], *, noise_std: float
) -> NDArray[np.float64]:
    r"""Real Fisher information with complex M0 among the unknowns (§2.1).

        F = Re(Gᴴ G) / σ²,  G = [∂s/∂θ_1 ... ∂s/∂θ_P, s, i·s]

    The last two columns are the derivatives with respect to Re M0 and Im M0, at M0 = 1. Why F is
    real, unlike in the paper: docs/decisions/001-real-fisher-information.md.

    Args:
        signal: s, shape (S, T).
        jacobian: ∂s/∂θ, shape (S, T, P).
        noise_std: σ of the real and of the imaginary part each.

    Returns:
        F, shape (S, P + 2, P + 2).
    """
    rows = np.concatenate([jacobian.mT, signal[:, None], 1j * signal[:, None]], axis=1)
    # Re(Gᴴ G) is the product of real and imaginary parts side by side, one after the other in T.
    # (Where all its arguments are transposed, `concatenate` returns a transposed array.)
    parts = np.ascontiguousarray(rows, dtype=np.complex128).view(np.float64)
    return (parts @ parts.mT) / noise_std**2


def packed(information: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lower triangle of F, row by row: (..., Q, Q) -> (..., Q (Q + 1)/2), for files."""
    return information[..., *np.tril_indices(information.shape[-1])]


def unpacked(triangle: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric F whose `packed` form is given: (..., Q (Q + 1)/2) -> (..., Q, Q)."""
    size = (int(np.sqrt(1 + 8 * triangle.shape[-1])) - 1) // 2
    rows, columns = np.tril_indices(size)
    information = np.empty((*triangle.shape[:-1], size, size))
    information[..., rows, columns] = information[..., columns, rows] = triangle
    return information


def given(information: NDArray[np.float64], known: Sequence[int]) -> NDArray[np.float64]:
    """F of what is left unknown: without the rows and columns of known parameters (§2.1).

    Args:
        information: F, shape (..., Q, Q).
        known: columns of the parameters that are known.
    """
    left = np.delete(np.arange(information.shape[-1]), list(known))
    return information[..., left[:, None], left]


def bounds(information: NDArray[np.float64]) -> NDArray[np.float64]:
    r"""Diagonal of F⁻¹ for each sample; infinite where a parameter cannot be told from others.

    F spans many decades, so it is equilibrated, C = D F D with unit diagonal, before its rank is
    judged. With C = V Λ Vᵀ the bound of a parameter is D² Σ V²/Λ over the nonzero Λ, unless it
    takes part in a direction with Λ = 0.

    Args:
        information: F, shape (S, Q, Q).

    Returns:
        Shape (S, Q).

    Raises:
        ValueError: F is not finite.
    """
    _checks.finite("the Fisher information", information)
    scale, vectors, inverse, lost = _inverted(information)
    variance = scale**2 * (vectors**2 * inverse[..., None, :]).sum(-1)
    return np.where(lost, np.inf, variance)


def covariance(information: NDArray[np.float64]) -> NDArray[np.float64]:
    """F⁻¹ of each sample, equilibrated and judged as by `bounds`, which is its diagonal.

    Args:
        information: F, shape (S, Q, Q).

    Returns:
        Shape (S, Q, Q); of what cannot be told from others the variance is infinite and the
        covariance NaN.

    Raises:
        ValueError: F is not finite.
    """
    _checks.finite("the Fisher information", information)
    scale, vectors, inverse, lost = _inverted(information)
    within = (vectors * inverse[..., None, :]) @ vectors.mT
    result = scale[..., :, None] * within * scale[..., None, :]
    result[lost[..., :, None] | lost[..., None, :]] = np.nan
    return np.where(lost[..., None] & np.eye(lost.shape[-1], dtype=bool), np.inf, result)


def _inverted(
    information: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """D, V and the inverse of the nonzero Λ; and which unknowns have an infinite bound."""
    scale, values, vectors = _equilibrated(information)
    null = values < _SINGULAR
    inverse = np.where(null, 0.0, 1 / np.where(null, 1.0, values))
    lost = (vectors**2 * null[..., None, :]).sum(-1) > _INVOLVED
    return scale, vectors, inverse, lost


def _equilibrated(
    information: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """D, Λ and V of D F D = V Λ Vᵀ, whose diagonal is 1, or 0 where that of F is."""
    diagonal = np.diagonal(information, axis1=-2, axis2=-1)
    scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1.0))
    values, vectors = np.linalg.eigh(scale[..., :, None] * information * scale[..., None, :])
    return scale, values, vectors


def efficient_directions(
    signal: NDArray[np.complexfloating], jacobian: NDArray[np.complexfloating]
) -> NDArray[np.complex128]:
    r"""The part of each derivative that no other unknown can imitate, with unit norm.

        d⊥_p = G F⁻¹ e_p / √(F⁻¹)_pp,  F = Re(Gᴴ G),  G = [∂s/∂θ_1 ... ∂s/∂θ_P, s, i·s]

    Re⟨d⊥_p, g⟩ is zero for every other column g of G, those of complex M0 too, and 1/√CRB_p for
    the parameter's own, at σ = 1: this direction holds all that the signal tells of it.

    Args:
        signal: s, shape (S, T).
        jacobian: ∂s/∂θ, shape (S, T, P).

    Returns:
        Shape (S, P, T); zero where the bound is infinite, for nothing is left of the derivative.
    """
    n_parameters = jacobian.shape[-1]
    scale, vectors, inverse, lost = _inverted(information(signal, jacobian, noise_std=1.0))
    # D V Λ⁻¹ Vᵀ, whose left factor D is applied to G; the right one is gone with the norm.
    own = (scale[..., None] * ((vectors * inverse[..., None, :]) @ vectors.mT)).mT[
        :, :n_parameters
    ]
    norm = np.sqrt((vectors**2 * inverse[..., None, :]).sum(-1))[:, :n_parameters]
    lost = lost[:, :n_parameters]
    own *= np.where(lost, 0.0, 1 / np.where(lost, 1.0, norm))[..., None]
    rows = np.concatenate([jacobian.mT, signal[:, None], 1j * signal[:, None]], axis=1)
    return own @ rows


def van_trees(
    information: NDArray[np.float64],
    covariance: NDArray[np.float64],
    *,
    known: Sequence[int] = (),
) -> NDArray[np.float64]:
    r"""Van Trees' (Bayesian Cramér-Rao) bound: what prior and data together can tell.

        B = [(F + C⁻¹)⁻¹]_pp

    C⁻¹ is the information of a normal prior, the least that a prior of covariance C can carry;
    complex M0 has none. Of the mean of F over the prior this bounds the mean squared error over
    the prior, of biased estimators too (the global bound). Of the F of one sample it is the
    variance that F and a normal prior leave around it (the local form), which bounds nothing by
    itself; its mean over the prior is never below the global bound. Why not the information of
    the prior's own density: docs/decisions/021-van-trees-bound.md. Source: H. L. van Trees,
    Detection, Estimation, and Modulation Theory, part I, Wiley 1968, §2.4.

    Args:
        information: F for the noise and |M0| at hand, shape (S, P + 2, P + 2) of samples, or
            (P + 2, P + 2) of their mean.
        covariance: C of the prior, shape (P, P), in the parameters' units; of draws θ (S, P)
            that is `numpy.cov(theta.T)`.
        known: columns of N parameters that the estimator is told. They leave F + C⁻¹, so that the
            prior of the others is the one given them, should they depend on each other.

    Returns:
        Shape (S, P - N), or (P - N,) of the mean; never above the bound without a prior, nor
        above C_pp.

    Raises:
        ValueError: values that are not finite, shapes that disagree, or a covariance that is not
            symmetric and positive definite.
    """
    information, covariance = np.asarray(information), np.atleast_2d(covariance)
    _checks.finite("the Fisher information", information)
    _checks.finite("the covariance of the prior", covariance)
    n_parameters = len(covariance)
    _checks.shape("the covariance of the prior", covariance, [("P", None), ("P", n_parameters)])
    unknowns = n_parameters + len(SCALE)
    axes: list[tuple[str, int | None]] = [("P + 2", unknowns), ("P + 2", unknowns)]
    whose = axes if information.ndim == 2 else [("S", None), *axes]
    _checks.shape("the Fisher information", information, whose)
    # C spans the squares of all units, so its definiteness is judged by its correlations.
    spread = np.sqrt(np.abs(np.diagonal(covariance)))
    units = np.outer(spread, spread)
    correlation = covariance / np.where(units > 0, units, 1.0)
    values, vectors = np.linalg.eigh(correlation)
    if not (values[0] > _SINGULAR and np.allclose(correlation, correlation.T, atol=_SINGULAR)):
        raise ValueError(
            "the covariance of the prior must be symmetric and positive definite; got "
            f"correlations with the eigenvalues {values[0]:.3g} to {values[-1]:.3g}. Leave out "
            "parameters that are known or depend on others, or draw more samples."
        )
    prior = np.zeros((unknowns, unknowns))
    prior[:n_parameters, :n_parameters] = (vectors / values) @ vectors.T / units
    return bounds(given(information + prior, known))[..., : n_parameters - len(set(known))]


@dataclass(frozen=True, eq=False)
class PriorBounds:
    """What prior and data tell together, for |M0| = 1 at Q signal-to-noise ratios (van Trees).

    The reference where the prior matters, for estimators that know it and are biased.

    Attributes:
        names: the E parameters.
        snr: SNRmax = |M0|/σ, shape (Q,).
        spread: standard deviation of the prior, shape (E,), SI units: the error of who guesses
            its mean.
        overall: the global bound, of the mean squared error averaged over the prior, shape
            (Q, E), those units squared. Far below what can be reached where few fingerprints
            hold most of the information.
        local: mean of the local form over the prior, shape (Q, E); no bound, but nearer to what
            can be reached. Never below `overall`.
    """

    names: tuple[str, ...]
    snr: NDArray[np.float64]
    spread: NDArray[np.float64]
    overall: NDArray[np.float64]
    local: NDArray[np.float64]

    def select(self, names: Sequence[str]) -> PriorBounds:
        """The same of these parameters alone, in this order; KeyError if unknown."""
        columns = [_checks.index(name, self.names) for name in names]
        arrays = (values[..., columns] for values in (self.spread, self.overall, self.local))
        return PriorBounds(tuple(names), self.snr, *arrays)


def prior_bounds(
    information: NDArray[np.float64],
    theta: NDArray[np.float64],
    names: Sequence[str],
    *,
    snr: Sequence[float],
    known: Sequence[str] = (),
) -> PriorBounds:
    """Van Trees' bound in both forms, of a prior of which there are draws.

    Args:
        information: F of each draw for σ = |M0| = 1, shape (S, P + 2, P + 2).
        theta: the draws, shape (S, P), SI units.
        names: of the P parameters.
        snr: Q values of SNRmax = |M0|/σ.
        known: parameters that the estimator is told.

    Returns:
        The bounds of the E parameters that are left.

    Raises:
        KeyError: a known parameter that has no column.
        ValueError: an SNRmax that is not positive, no unknown parameter, or as for `van_trees`:
            such as fewer draws than parameters.
    """
    levels = np.array([_checks.positive("SNRmax", value) for value in snr])
    columns = [_checks.index(name, names) for name in known]
    if len(set(columns)) == len(names):
        raise ValueError(
            f"expected at least one unknown parameter; got all of {_checks.listing(names)} as "
            "known. Leave one out."
        )
    if len(theta) <= len(names):
        raise ValueError(
            f"expected more draws of the prior than its {len(names)} parameters; got "
            f"{len(theta)}, which have no covariance to invert. Draw more."
        )
    covariance = np.cov(theta.T)
    mean = information.mean(axis=0)
    overall, local = [], []
    for level in levels:
        overall.append(van_trees(level**2 * mean, covariance, known=columns))
        each = van_trees(level**2 * information, covariance, known=columns)
        local.append(each.mean(axis=0))
    left = [name for name in names if name not in known]
    spread = np.delete(theta.std(axis=0), columns)
    return PriorBounds(tuple(left), levels, spread, np.stack(overall), np.stack(local))


def confounded(information: NDArray[np.float64], names: Sequence[str]) -> tuple[Group, ...]:
    r"""The groups of unknowns that a singular Fisher information cannot tell apart.

    With N an orthonormal basis of the null space of the equilibrated F, the entry i, j of N Nᵀ is
    zero unless a direction without information moves i and j together; the groups are the
    connected components. A group of one has no effect on the signal.

    Args:
        information: F of one sample, shape (Q, Q).
        names: of the Q unknowns, or of the P = Q − 2 parameters, whom those of M0 follow.

    Returns:
        Groups in the order of the unknowns; none if F is regular.

    Raises:
        ValueError: F is not finite, or of another size than the names say.
    """
    _checks.finite("the Fisher information", information)
    if len(names) == len(information) - len(SCALE):
        names = (*names, *SCALE)
    _checks.shape("the Fisher information", information, [("Q", len(names)), ("Q", len(names))])
    _, values, vectors = _equilibrated(information)
    null = vectors[:, values < _SINGULAR]
    shared = null @ null.T
    share = np.diagonal(shared)
    involved = np.flatnonzero(share > _INVOLVED)
    # For a single direction both sides are equal but for the factor.
    linked = (shared**2 > _INVOLVED * np.outer(share, share))[np.ix_(involved, involved)]
    n_groups, label = connected_components(linked, directed=False)
    return tuple(
        tuple(names[unknown] for unknown in involved[label == group]) for group in range(n_groups)
    )


def explained(group: Group) -> str:
    """What a group of `confounded` means, in words."""
    if len(group) == 1:
        return f"{group[0]} has no effect on the signal"
    return f"{', '.join(group[:-1])} and {group[-1]} cannot be told apart"


def require_determined(
    bounds: NDArray[np.float64], information: NDArray[np.float64], names: Sequence[str]
) -> None:
    """Require that at least one sample determines each parameter.

    Args:
        bounds: of the parameters, shape (S, P).
        information: what the error shall carry and explain, shape (S', P + 2, P + 2).
        names: of the P parameters.

    Raises:
        SingularInformationError: a parameter whose bound is infinite in every sample.
    """
    lost = np.isinf(bounds).all(axis=0) if len(bounds) else np.zeros(len(names), dtype=bool)
    if lost.any():
        hopeless = tuple(names[int(column)] for column in np.flatnonzero(lost))
        # Each hopeless parameter by the group that it is in most often.
        tallies = {name: Counter[Group]() for name in hopeless}
        for matrix in information:
            for group in confounded(matrix, names):
                for name in tallies.keys() & set(group):
                    tallies[name][group] += 1
        usual = (group for tally in tallies.values() for group, _ in tally.most_common(1))
        raise SingularInformationError(information, hopeless, tuple(dict.fromkeys(usual)))


def crb(
    signal: NDArray[np.complexfloating],
    jacobian: NDArray[np.complexfloating],
    *,
    noise_std: float = 1.0,
    names: Sequence[str] | None = None,
) -> NDArray[np.float64]:
    """Cramér-Rao bound of every parameter, M0 = 1 and complex M0 unknown (§2.1).

    For another M0 the bound is this over |M0|². Coefficients in an orthonormal basis and their
    derivatives may stand in for the signal: the result is then the bound of the coefficients.

    Args:
        signal: shape (S, T), for M0 = 1.
        jacobian: shape (S, T, P).
        noise_std: σ of the real and of the imaginary part each, in the units of the signal.
        names: of the P parameters, for the error alone; their column numbers if None.

    Returns:
        Bounds of the variance, shape (S, P), in the parameters' units squared; infinite for a
        parameter that a sample cannot determine (such as Rx at m0s = 0).

    Raises:
        ValueError: shapes that disagree, another number of names than of parameters, values
            that are not finite, or σ ≤ 0.
        SingularInformationError: a parameter that no sample at all determines.
    """
    signal, jacobian = np.asarray(signal), np.asarray(jacobian)
    _checks.positive("noise_std", noise_std)
    _checks.shape("signal", signal, [("S", None), ("T", None)])
    _checks.shape("jacobian", jacobian, [("S", len(signal)), ("T", signal.shape[1]), ("P", None)])
    _checks.finite("signal", signal)
    _checks.finite("jacobian", jacobian)
    n_parameters = jacobian.shape[-1]
    names = [str(column) for column in range(n_parameters)] if names is None else names
    if len(names) != n_parameters:
        raise ValueError(
            f"expected a name for each of the {n_parameters} parameters of the jacobian; got "
            f"{_checks.listing(names)}. Give the names of the model."
        )
    matrices = information(signal, jacobian, noise_std=noise_std)
    result = bounds(matrices)[:, :n_parameters]
    require_determined(result, matrices, names)
    return result
