"""Bias, variance and shares of the loss of any estimator (§2.7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.special import stdtrit

from fisherprint import _checks
from fisherprint.fisher import PriorBounds
from fisherprint.parameters import Parameter

Floats = NDArray[np.float64]
Estimator = Callable[[NDArray[np.complex128]], NDArray[Any]]
"""From coefficients (..., K), complex, to parameters (..., E): a network, a fit, anything."""

Beside = Callable[[NDArray[np.complex128], slice, float], Floats]
"""From noisy coefficients (S', N, K) of a part of the fingerprints, that part, and σ, to what the
estimator is given beside them, (S', N, n): known parameters, the signal-to-noise ratio."""

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
        prior: what can be told with the prior, of the same parameters and SNRmax
            (`fisher.prior_bounds`); None where nobody asked.
    """

    names: tuple[str, ...]
    snr: Floats
    truth: Floats
    crb: Floats
    bias: Floats
    variance: Floats
    n_noise: int
    prior: PriorBounds | None = None

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

    def level(self, snr: float) -> int:
        """Row of an SNRmax.

        Raises:
            ValueError: the audit lacks it.
        """
        fits = np.flatnonzero(np.isclose(self.snr, snr))
        if not fits.size:
            known = _checks.listing(f"{level:g}" for level in self.snr)
            raise ValueError(
                f"expected an SNRmax of the audit: {known}; got {snr:g}. Audit with this one, too."
            )
        return int(fits[0])

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

    @property
    def determined(self) -> NDArray[np.bool_]:
        """Where the data tell much more than the prior does: √CRB < spread/3, shape (Q, S, E).

        The spread of the prior is the standard deviation of the true values. Elsewhere an
        estimator does well to shrink towards the prior, and bias is no fault.
        """
        spread = self.truth.std(axis=0)
        return np.asarray(np.sqrt(self.crb) / self.snr[:, None, None] < spread / 3)

    def mean_determined_shares(self) -> Shares:
        """As `mean_shares_by_parameter`, over what is `determined` alone; NaN where nothing is."""
        inside = self.determined
        return Shares(*(_mean(np.where(inside, s, np.nan), axis=(1,)) for s in self.shares))

    @property
    def root_mean_square(self) -> Floats:
        """Root of the mean squared error over fingerprints and noise, shape (Q, E), units of θ.

        Fingerprints without a bound are among them.
        """
        return np.sqrt(_mean(self.bias**2 + self.variance, axis=(1,)))

    def median_root_crb(self) -> Floats:
        """Median of √CRB over the fingerprints, infinite ones among them, shape (Q, E)."""
        return np.asarray(np.sqrt(np.median(self.crb, axis=0)) / self.snr[:, None])

    def require_prior(self) -> PriorBounds:
        """The bounds with the prior.

        Raises:
            ValueError: there are none.
        """
        if self.prior is None:
            raise ValueError(
                "expected an audit with the bounds of the prior; got one without. Evaluate again, "
                "on a data set with Fisher information."
            )
        return self.prior

    def over_prior_bound(self) -> tuple[Floats, Floats]:
        """Root mean squared error over the root of van Trees' global bound, each (Q, E).

        The first is at least 1 for any estimator, biased or not, up to the second, its standard
        error from the scatter over fingerprints, and to a few per cent where the prior is not
        normal (docs/decisions/021-van-trees-bound.md).

        Raises:
            ValueError: the audit has no bounds with the prior.
        """
        prior = self.require_prior()
        squares = self.bias**2 + self.variance
        mean, n = _mean(squares, axis=(1,)), (~np.isnan(squares)).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):  # one fingerprint has no scatter
            scatter = np.sqrt(_mean((squares - mean[:, None]) ** 2, axis=(1,)) / (n - 1))
        ratio = np.sqrt(mean / prior.overall)
        return ratio, ratio * scatter / (2 * mean)

    def mean_squares(self) -> Shares:
        """Shares of the plain mean squared error, each (Q,): the same without the bound (§2.7).

        They add up the parameters in their units, as the loss `mse` does, and hold fingerprints
        without a bound as well.
        """
        return Shares(*(_mean(part, axis=(1, 2)) for part in (self.bias**2, self.variance)))


@dataclass(frozen=True, eq=False)
class AuditMap:
    """An audit over a regular grid of two parameters at one SNRmax, the others fixed (§2.4).

    Attributes:
        x: the parameter along the columns.
        y: that along the rows.
        x_values: X of them, SI units.
        y_values: Y of them, SI units.
        audit: of Y·X fingerprints, x varying fastest, at a single SNRmax.

    Raises:
        ValueError: an audit of another number of fingerprints or of several SNRmax.
    """

    x: Parameter
    y: Parameter
    x_values: Floats
    y_values: Floats
    audit: Audit

    def __post_init__(self) -> None:
        size = len(self.x_values) * len(self.y_values)
        axes = [("Q", 1), ("Y·X", size), ("E", len(self.audit.names))]
        _checks.shape("the bias over the grid", self.audit.bias, axes)

    def bias(self, name: str) -> Floats:
        """Bias of a parameter, shape (Y, X), SI units; KeyError if the audit lacks it."""
        return self._over_grid(self.audit.bias[0], name)

    def std(self, name: str) -> Floats:
        """Its standard deviation, likewise."""
        return self._over_grid(np.sqrt(self.audit.variance[0]), name)

    def root(self, name: str) -> Floats:
        """√CRB for this SNRmax, likewise; infinite if not seen."""
        return self._over_grid(np.sqrt(self.audit.crb) / self.audit.snr[0], name)

    def _over_grid(self, values: Floats, name: str) -> Floats:
        column = _checks.index(name, self.audit.names)
        return values[:, column].reshape(len(self.y_values), len(self.x_values))


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
    beside: Beside | None = None,
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
        beside: for an estimator of (S', N, K + n): what stands behind the coefficients.
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
            estimator,
            test,
            M0=np.broadcast_to(M0, (n_samples, n_noise)),
            std=1 / level,
            beside=beside,
            rng=rng,
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
    beside: Beside | None = None,
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
        beside: for an estimator of (S', N, K + n): what stands behind the coefficients.
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
    for part, estimates in _estimates(estimator, test, M0=M0, std=std, beside=beside, rng=rng):
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


def crossings(snr: Floats, shares: Shares) -> tuple[float, ...]:
    """SNRmax at which bias and variance share are equal, ascending (Fig. 7).

    Between two levels the logarithm of their ratio is taken as linear in that of SNRmax; levels
    where it is not finite are left out.

    Args:
        snr: Q values of SNRmax in any order.
        shares: each (Q,).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(shares.bias / shares.variance)
    order = [level for level in np.argsort(snr) if np.isfinite(ratio[level])]
    x, ratio = np.log(snr[order]), ratio[order]
    # A level where both are equal counts as above.
    left = np.flatnonzero((ratio[:-1] < 0) != (ratio[1:] < 0))
    step = ratio[left] / (ratio[left] - ratio[left + 1])
    return tuple(float(at) for at in np.exp(x[left] + step * (x[left + 1] - x[left])))


class Interval(NamedTuple):
    """A mean over repetitions, with its confidence interval.

    Attributes:
        mean: of the repetitions.
        low: lower end.
        high: upper end.
        n: how many.
    """

    mean: float
    low: float
    high: float
    n: int


def confidence_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Student's interval for the mean of a few independent repetitions, such as seeds.

    mean ± t s/√n, with s² the unbiased variance and t of n - 1 degrees of freedom.

    Raises:
        ValueError: fewer than two values, one that is not finite, or a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    _checks.finite("the repetitions", array)
    if array.ndim != 1 or len(array) < 2 or not 0 < level < 1:
        raise ValueError(
            f"expected at least 2 values and a level between 0 and 1; got {array.size} and "
            f"{level}. One repetition tells nothing of their spread."
        )
    half = stdtrit(len(array) - 1, (1 + level) / 2) * _standard_error(array)
    mean = float(array.mean())
    return Interval(mean, float(mean - half), float(mean + half), len(array))


def _estimates(
    estimator: Estimator,
    test: Labelled,
    *,
    M0: NDArray[np.complex128],
    std: float,
    beside: Beside | None,
    rng: Generator,
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
        given = clean + std * noise
        if beside is not None:
            given = np.concatenate([given, beside(given, part, std)], axis=-1)
        estimates = np.asarray(estimator(given), dtype=np.float64)
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
