"""Bias, variance and shares of the loss of any estimator (§2.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fisherprint import _checks

Floats = NDArray[np.float64]
Estimator = Callable[[NDArray[np.complex128]], NDArray[Any]]
"""From coefficients (..., K), complex, to parameters (..., E): a network, a fit, anything."""

# Complex numbers in one call of the estimator: 32 MB, of which a few copies exist at a time.
_CHUNK = 2_000_000


class Labelled(Protocol):
    """Fingerprints with their truth and bounds; `train.Samples` is one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The E parameters, in the order in which the estimator returns them."""

    @property
    def coefficients(self) -> NDArray[Any]:
        """Noiseless, for M0 = 1, shape (S, K), complex."""

    @property
    def theta(self) -> Floats:
        """True parameters, shape (S, E), SI units."""

    @property
    def crb(self) -> Floats:
        """Bound for σ = |M0| = 1, shape (S, E), those units squared; infinite if there is none."""


class Shares(NamedTuple):
    """The loss in units of the bound, split in two.

    Attributes:
        bias: bias²/CRB.
        variance: variance/CRB.
    """

    bias: Floats
    variance: Floats

    @property
    def loss(self) -> Floats:
        """Their sum: the loss itself."""
        return self.bias + self.variance


@dataclass(frozen=True, eq=False)
class Audit:
    """Bias and variance of an estimator for each fingerprint, at Q signal-to-noise ratios.

    An unbiased estimator of variance v has, over N realizations, a mean squared bias of v/N: the
    bias share has an offset of variance share/N, which is not subtracted, as in the paper.

    Where an estimate was NaN or infinite, that fingerprint's moments of that parameter are NaN.
    They are left out of all means, and so are those whose bound is infinite.

    Attributes:
        names: the E parameters.
        snr: SNRmax = |M0|/σ, shape (Q,).
        truth: θ, shape (S, E), SI units.
        crb: bound for σ = |M0| = 1, shape (S, E).
        bias: shape (Q, S, E), units of θ.
        variance: shape (Q, S, E), units of θ squared.
        n_noise: N, realizations per fingerprint and SNRmax.
    """

    names: tuple[str, ...]
    snr: Floats
    truth: Floats
    crb: Floats
    bias: Floats
    variance: Floats
    n_noise: int

    @property
    def shares(self) -> Shares:
        """Bias and variance share of each fingerprint, each (Q, S, E); NaN where left out."""
        bounded = np.where(np.isfinite(self.crb), self.crb, np.nan)
        return loss_shares(self.bias, self.variance, bounded / self.snr[:, None, None] ** 2)

    @property
    def std_ratio(self) -> Floats:
        """Standard deviation over √CRB, shape (Q, S, E); 1 for an efficient unbiased estimator."""
        return np.sqrt(self.shares.variance)

    def median_std_ratio(self) -> Floats:
        """Median of `std_ratio` over all parameters and fingerprints, shape (Q,)."""
        return _median(self.std_ratio.reshape(len(self.snr), -1))

    def median_std_ratio_by_parameter(self) -> Floats:
        """The same over fingerprints alone, shape (Q, E)."""
        return _median(np.moveaxis(self.std_ratio, 1, -1))

    @property
    def n_unbounded(self) -> int:
        """Fingerprints for which a parameter's bound is infinite."""
        return int((~np.isfinite(self.crb)).any(axis=1).sum())

    @property
    def n_failed(self) -> NDArray[np.int64]:
        """Fingerprints for which an estimate was NaN or infinite, shape (Q,)."""
        return np.isnan(self.bias).any(axis=2).sum(axis=1)

    def mean_shares(self) -> Shares:
        r"""Shares of the loss over all parameters and fingerprints, each (Q,) (Eq. 5).

        L = Σ_{e,s} bias²/CRB / (E S) + Σ_{e,s} variance/CRB / (E S)
        """
        return Shares(*(_mean(share, axis=(1, 2)) for share in self.shares))

    def mean_shares_by_parameter(self) -> Shares:
        """The same over fingerprints alone, each (Q, E)."""
        return Shares(*(_mean(share, axis=(1,)) for share in self.shares))


@dataclass(frozen=True, eq=False)
class Score:
    """Loss in units of the bound over a range of |M0|.

    Attributes:
        names: the E parameters.
        loss: mean over fingerprints and parameters.
        standard_error: of `loss`, from its scatter over fingerprints.
        loss_by_parameter: shape (E,).
        standard_error_by_parameter: shape (E,).
        n_used: fingerprints in the means.
        n_unbounded: fingerprints left out since a parameter's bound is infinite.
        n_failed: others left out since an estimate was NaN or infinite.
    """

    names: tuple[str, ...]
    loss: float
    standard_error: float
    loss_by_parameter: Floats
    standard_error_by_parameter: Floats
    n_used: int
    n_unbounded: int
    n_failed: int


def bias(estimates: Floats, truth: Floats) -> Floats:
    r"""Mean estimate less the truth (Eq. 2).

        bias(θ) = 1/N Σ_n θ̂_n − θ

    Args:
        estimates: θ̂, shape (S, N, E).
        truth: θ, shape (S, E).

    Returns:
        shape (S, E).
    """
    return estimates.mean(axis=1) - truth


def variance(estimates: Floats) -> Floats:
    r"""Variance of the estimates over noise realizations (Eq. 3).

        σ²(θ) = 1/N Σ_n (θ̂_n − mean θ̂)²

    Args:
        estimates: θ̂, shape (S, N, E).

    Returns:
        shape (S, E).
    """
    return estimates.var(axis=1)


def loss_shares(bias: Floats, variance: Floats, crb: Floats) -> Shares:
    r"""Loss of each fingerprint and parameter as bias share plus variance share (Eq. 4).

        1/N Σ_n (θ̂_n − θ)²/CRB = bias²/CRB + σ²/CRB

    Args:
        bias: shape (..., S, E), units of θ.
        variance: the same shape, units of θ squared.
        crb: bound for this noise and this M0, the same shape and units as `variance`.
    """
    return Shares(bias**2 / crb, variance / crb)


def audit(
    estimator: Estimator,
    test: Labelled,
    *,
    snr: Sequence[float],
    n_noise: int = 300,
    progress: Callable[[int, int], None] = lambda done, total: None,
    rng: Generator,
) -> Audit:
    """Bias and variance of an estimator from many noise realizations of each fingerprint (§2.7).

    |M0| = 1 with a random phase for each fingerprint and SNRmax; the real and the imaginary part
    of the noise each have the standard deviation 1/SNRmax.

    Args:
        estimator: called with (S', N, K), a part of the fingerprints at a time.
        test: S fingerprints.
        snr: Q values of SNRmax.
        n_noise: N.
        progress: called with the fingerprints done and in all, each counted once per SNRmax.
        rng: draws phases and noise.

    Raises:
        ValueError: an SNRmax that is not positive, fewer than 2 realizations, or an estimator
            that returns another shape than (S', N, E).
    """
    levels = np.array([_checks.positive("SNRmax", value) for value in snr])
    if len(levels) == 0 or n_noise < 2:
        raise ValueError(
            "an audit needs at least one SNRmax and 2 noise realizations; got "
            f"{len(levels)} and {n_noise}. Name levels or raise n_noise."
        )
    shape = (len(levels), *test.theta.shape)
    biases, variances = np.empty(shape), np.empty(shape)
    n_samples = len(test.theta)
    for q, level in enumerate(levels):
        M0 = np.exp(2j * np.pi * rng.random((n_samples, 1)))
        for part, estimates in _estimates(
            estimator, test, M0=np.broadcast_to(M0, (n_samples, n_noise)), std=1 / level, rng=rng
        ):
            biases[q, part] = bias(estimates, test.theta[part])
            variances[q, part] = variance(estimates)
            progress(q * n_samples + part.stop, len(levels) * n_samples)
    return Audit(test.names, levels, test.theta, test.crb, biases, variances, n_noise)


def loss_over_scales(
    estimator: Estimator,
    test: Labelled,
    *,
    scale_range: tuple[float, float] = (0.1, 1.0),
    noise_std: float = 0.01,
    n_noise: int = 10,
    rng: Generator,
) -> Score:
    """Loss in units of the bound over the range of |M0| of the training (§2.4).

    Each of the N realizations of a fingerprint has its own M0, |M0| uniform in `scale_range`, and
    its own noise.

    Args:
        estimator: called with (S', N, K), a part of the fingerprints at a time.
        test: S fingerprints.
        scale_range: limits of |M0|.
        noise_std: σ of the real and of the imaginary part each.
        n_noise: N.
        rng: draws M0 and noise.

    Raises:
        ValueError: arguments out of range, or an estimator that returns another shape.
    """
    if not 0 < scale_range[0] <= scale_range[1] or n_noise < 1:
        raise ValueError(
            "expected 0 < low ≤ high for |M0| and at least 1 noise realization; got "
            f"{scale_range} and {n_noise}. Give the range as (low, high)."
        )
    std = _checks.positive("noise_std", noise_std)
    shape = (len(test.theta), n_noise)
    scale = rng.uniform(*scale_range, shape)
    M0 = scale * np.exp(2j * np.pi * rng.random(shape))
    losses = np.empty(test.theta.shape)
    for part, estimates in _estimates(estimator, test, M0=M0, std=std, rng=rng):
        crb = test.crb[part, None] * (std / scale[part, :, None]) ** 2
        losses[part] = ((estimates - test.theta[part, None]) ** 2 / crb).mean(axis=1)

    bounded = np.isfinite(test.crb).all(axis=1)
    failed = bounded & np.isnan(losses).any(axis=1)
    used = losses[bounded & ~failed]
    by_fingerprint = used.mean(axis=1)
    return Score(
        names=test.names,
        loss=float(_mean(by_fingerprint, axis=(0,))),
        standard_error=float(_standard_error(by_fingerprint)),
        loss_by_parameter=_mean(used, axis=(0,)),
        standard_error_by_parameter=_standard_error(used),
        n_used=len(used),
        n_unbounded=int((~bounded).sum()),
        n_failed=int(failed.sum()),
    )


def _estimates(
    estimator: Estimator, test: Labelled, *, M0: NDArray[np.complex128], std: float, rng: Generator
) -> Iterator[tuple[slice, Floats]]:
    """Estimates (S', N, E) from fingerprints with the M0 given, (S, N), and noise, in parts.

    An estimate that is not finite becomes NaN. The numbers drawn do not depend on the parts.
    """
    n_samples, n_noise = M0.shape
    rank = test.coefficients.shape[1]
    length = max(1, _CHUNK // (n_noise * rank))
    for start in range(0, n_samples, length):
        part = slice(start, min(start + length, n_samples))
        clean = M0[part, :, None] * test.coefficients[part, None, :]
        noise = rng.standard_normal((*clean.shape, 2)).view(np.complex128)[..., 0]
        estimates = np.asarray(estimator(clean + std * noise), dtype=np.float64)
        _checks.shape(
            "the estimator's result",
            estimates,
            [("S", len(clean)), ("N", n_noise), ("E", len(test.names))],
        )
        yield part, np.where(np.isfinite(estimates), estimates, np.nan)


def _mean(values: Floats, *, axis: tuple[int, ...]) -> Floats:
    """Mean of what is not NaN; NaN if nothing is left."""
    valid = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(valid, values, 0).sum(axis) / valid.sum(axis)


def _median(values: Floats) -> Floats:
    """Median over the last axis of what is not NaN; NaN if nothing is left."""
    # NumPy warns of a median of nothing.
    left = ~np.isnan(values).all(axis=-1)
    median = np.full(left.shape, np.nan)
    median[left] = np.nanmedian(values[left], axis=-1)
    return median


def _standard_error(values: Floats) -> Floats:
    """Of the mean over the first axis; NaN for fewer than two values."""
    n = len(values)
    return values.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else np.full(values.shape[1:], np.nan)
