"""Losses: squared errors in units of the bound, and others (§2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherprint.train.config import LossName

# |θ| below this fraction of the prior spread counts as that fraction in the relative loss.
RELATIVE_FLOOR = 0.01


def terms(loss: LossName, crb: Tensor) -> Tensor | int:
    """What a loss divides its sum by: S E, or where it uses bounds the finite ones, at least 1.

    Args:
        loss: its name.
        crb: bounds, shape (S, E).
    """
    if loss in ("crb", "bias-reduced"):
        return crb.isfinite().sum().clamp(min=1)
    return crb.numel()


def crb_loss(estimate: Tensor, truth: Tensor, crb: Tensor) -> Tensor:
    r"""Mean squared error in units of the Cramér-Rao bound (Eq. 1).

        L = 1/(S E) Σ_s Σ_e (θ̂ − θ)² / CRB

    A maximally efficient unbiased estimator scores 1. Where the bound is infinite there is no
    information: such terms weigh nothing and are not counted in S E.

    Args:
        estimate: θ̂, shape (S, E), in the parameters' units.
        truth: θ, shape (S, E), the same units.
        crb: bound of θ for this noise and this M0, shape (S, E), those units squared.
    """
    return ((estimate - truth).square() / crb).sum() / terms("crb", crb)


def mse_loss(estimate: Tensor, truth: Tensor) -> Tensor:
    r"""Mean squared error in the parameters' units, which it adds up all the same (§2.6).

        L = 1/(S E) Σ_s Σ_e (θ̂ − θ)²

    Args:
        estimate: θ̂, shape (S, E).
        truth: θ, shape (S, E).
    """
    return (estimate - truth).square().mean()


def relative_loss(estimate: Tensor, truth: Tensor, floor: Tensor) -> Tensor:
    r"""Mean relative absolute error (refs. 16, 17 and 27 of the paper).

        L = 1/(S E) Σ_s Σ_e |θ̂ − θ| / max(|θ|, floor)

    Args:
        estimate: θ̂, shape (S, E).
        truth: θ, shape (S, E).
        floor: smallest |θ| that is divided by, shape (E,); θ = 0 (no semi-solid pool) is legal.
    """
    return ((estimate - truth).abs() / truth.abs().maximum(floor)).mean()


def bayesian_loss(estimate: Tensor, truth: Tensor, crb: Tensor, spread: Tensor) -> Tensor:
    r"""Mean squared error in units of what data and prior tell of each parameter together.

        L = 1/(S E) Σ_s Σ_e (θ̂ − θ)² (1/CRB + 1/spread²)

    Where the bound is far below the prior's variance this is the loss of Eq. 1; where it is far
    above, or infinite, it is the squared error in units of the prior, which `crb_loss` all but
    leaves out. 1 is what a linear Gaussian parameter allows who knows the prior (van Trees 1968).

    Args:
        estimate: θ̂, shape (S, E), in the parameters' units.
        truth: θ, shape (S, E), the same units.
        crb: bound of θ for this noise and this M0, shape (S, E), those units squared.
        spread: standard deviation of the prior, shape (E,), those units.
    """
    return ((estimate - truth).square() * (1 / crb + spread.pow(-2))).mean()


def bias_reduced_loss(
    estimates: Tensor,
    truth: Tensor,
    crb: Tensor,
    *,
    variance_weight: float = 1.0,
    variance_limit: float = 1.0,
) -> Tensor:
    r"""Bias, and variance beyond a limit, in units of the bound (Mao et al., MRM 2024).

        L = 1/(S E) Σ_s Σ_e [(μ − θ)² − v/N]/CRB + λ max(v/CRB − δ, 0)
        μ = 1/N Σ_n θ̂_n,   v = 1/(N − 1) Σ_n (θ̂_n − μ)²

    The mean of N noisy estimates misses θ by the bias and by noise of variance v/N, which is
    taken off: the first term estimates bias²/CRB without a bias of its own, and may be negative.
    Where the bound is infinite, terms weigh nothing, as in `crb_loss`.

    Args:
        estimates: θ̂ for N noise realizations of each fingerprint with one M0, shape (S, N, E).
        truth: θ, shape (S, E), the same units.
        crb: bound of θ for this noise and this M0, shape (S, E), those units squared.
        variance_weight: λ.
        variance_limit: δ.
    """
    variance, mean = torch.var_mean(estimates, dim=1)
    bias = ((mean - truth).square() - variance / estimates.shape[1]) / crb
    excess = (variance / crb - variance_limit).clamp(min=0)
    return (bias + variance_weight * excess).sum() / terms("bias-reduced", crb)
