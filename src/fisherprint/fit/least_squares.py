"""Voxel-wise non-linear least squares in the subspace: the gold standard (§2.8)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisherprint import _checks, fisher
from fisherprint.fit.matching import Dictionary
from fisherprint.fit.minimize import Floats, Integers, Local, Reason, few_steps, minimize
from fisherprint.models import SignalModel
from fisherprint.subspace import Basis

Complex = NDArray[np.complexfloating]
Start = Callable[[Complex], NDArray[np.floating]]
"""From what is given of V voxels to a start for each, (V, P), or to several, (V, R, P)."""

# Voxels at once: enough that the last ones to end still fill batches of the compiled model.
_VOXELS = 1024
# Largest Jacobian held at once, in bytes, and whole groups of the kernel's lanes: as `simulate`.
_BATCH_BYTES, _BATCH_MULTIPLE = 24e6, 64
_ITERATIONS = 150
# Coefficients have unit norm in the search; nobody measures with a signal-to-noise ratio of 10⁶.
_FLOOR = 1e-6
# Variance of a uniform distribution: its width squared over this.
_UNIFORM = 12.0


@dataclass(frozen=True, eq=False)
class Fit:
    """What non-linear least squares found in V voxels; NaN where there is no estimate.

    Attributes:
        names: the P parameters of the model.
        theta: estimates, shape (V, P), SI units; known parameters as they were given.
        m0: complex M0, shape (V,), in units of the coefficients.
        residual: ‖x - M0 c(θ)‖, shape (V,), those units.
        covariance: of the estimates, shape (V, P, P), with complex M0 among the unknowns, as if
            no bound were near; 0 for known parameters. What neither signal nor prior determines
            has an infinite variance, and NaN as covariance.
        std: standard deviations of the estimates, shape (V, P). An estimate stays within the
            limits of the search, so they are knowledge: each pair counts as a uniform
            distribution, with the information 12/(high - low)², unless the parameter has a prior.
            Where the data tell much more than limits do, this is the root of the covariance's
            diagonal.
        noise_std: σ of real and imaginary part each that this holds for, shape (V,).
        iterations: steps that the best search tried, shape (V,).
        reason: why it ended, one `Reason` a voxel, shape (V,).
    """

    names: tuple[str, ...]
    theta: Floats
    m0: Complex
    residual: Floats
    covariance: Floats
    std: Floats
    noise_std: Floats
    iterations: Integers
    reason: NDArray[np.int8]

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Where the estimate is a minimum, or that of the steps asked for, shape (V,)."""
        return np.isin(self.reason, [reason for reason in Reason if reason.is_converged])

    def __getitem__(self, name: str) -> Floats:
        """Estimates of one parameter; an unknown name raises a KeyError that lists the known."""
        return self.theta[:, _checks.index(name, self.names)]


@dataclass(frozen=True, eq=False)
class LeastSquares:
    r"""Bounded non-linear least squares, an estimator like a network (§2.8).

        θ̂ = argmin_θ min_M0 ‖x - M0 c(θ)‖²,   c(θ) = Uᴴ s(θ)

    The best M0 for each θ is cᴴx / cᴴc (variable projection), so that θ alone is searched for,
    by the model's exact derivatives. Of several starts the smallest residual counts.

    Attributes:
        model: any signal model.
        basis: U, of the coefficients x.
        start: θ to start from, shape (P,), or R of them, (R, P), for all voxels; or a function of
            what is given of V voxels, with the result (V, P) or (V, R, P): a network of all
            parameters, a `Dictionary`. Known parameters in it do not count, and what is out of
            bounds is moved to them.
        estimated: names that a call returns, in this order; if None, all that are not known.
        known: parameters that are no unknowns, with their value everywhere.
        inputs: others that are known in each voxel: their values stand behind the K
            coefficients, as for a network with inputs.
        bounds: (low, high) by name, within those of the model, which hold for the others.
        prior: (mean, standard deviation) by name of normal distributions that unknown parameters
            have beforehand. Then the sum of squares has σ²((θ - mean)/std)² for each of them: the
            estimate is the most probable one (MAP), at the M0 that fits best.
        noise_std: σ where a call gives none. A prior and a damped step need it.
        steps: no search, but so many steps of Levenberg and Marquardt from the start, and the
            result of each moved within the bounds. Each has standard deviations by name, within
            which it keeps near its beginning: (JᵀJ + σ²/std²) p = -Jᵀr; those without one are not
            damped. From a network of all parameters, two of them are efficient at a noise where
            the search, which ends in the smallest residual however far that lies, is not. From a
            start farther away than noise explains they are no estimate.

    Raises:
        KeyError: an unknown name.
        ValueError: a basis of other time points, bounds or values outside the model's, a start of
            another shape, names that come twice, no unknowns, a standard deviation that is not
            positive, or a prior or a damped step without σ.

    Examples:
        >>> import torch
        >>> from fisherprint import Parameter, subspace
        >>> from fisherprint.models import TorchModel
        >>> times = torch.arange(1, 9) * 0.02
        >>> T2 = Parameter("T2", "$T_2$", "s", (1e-3, 5.0))
        >>> model = TorchModel(lambda θ: torch.exp(-times / θ[0]), [T2])
        >>> basis = subspace.fit(model.signal([[0.04], [0.06], [0.09]]), rank=3)
        >>> x = 2j * basis.compress(model.signal([[0.05]]))
        >>> found = LeastSquares(model, basis, start=[0.2]).fit(x)
        >>> found["T2"].round(6), found.m0.round(6)
        (array([0.05]), array([0.+2.j]))
    """

    model: SignalModel
    basis: Basis
    start: ArrayLike | Start
    estimated: Sequence[str] | None = None
    known: Mapping[str, float] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prior: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    noise_std: float | None = None
    steps: Sequence[Mapping[str, float]] = ()

    def __post_init__(self) -> None:
        names, limits = self.model.names, self._limits
        if len(self.basis.vectors) != self.model.n_samples:
            raise ValueError(
                f"expected a basis of the model's {self.model.n_samples} time points; got "
                f"{len(self.basis.vectors)}. Do the basis and the train belong together?"
            )
        given = (*self.known, *self.inputs)
        for name in given:
            _checks.index(name, names)
        unknown = tuple(name for name in names if name not in given)
        if len(set(given)) < len(given) or not unknown:
            raise ValueError(
                f"expected each known parameter once, and not all of {_checks.listing(names)}; "
                f"got {_checks.listing(given)}. Leave some out."
            )
        for name, value in self.known.items():
            low, high = limits[:, names.index(name)]
            if not low <= value <= high:
                raise ValueError(
                    f"expected {name} in [{low:g}, {high:g}]; got {value:g}. Check its unit (SI)."
                )
        estimated = unknown if self.estimated is None else tuple(self.estimated)
        for name in estimated:
            _checks.index(name, unknown, what="unknown parameter")
        if len(set(estimated)) < len(estimated):
            raise ValueError(
                f"expected each estimated parameter once; got {_checks.listing(estimated)}. "
                "Leave some out."
            )
        object.__setattr__(self, "estimated", estimated)
        for name, (mean, std) in self.prior.items():
            _checks.index(name, unknown, what="unknown parameter")
            _checks.finite(f"the mean of {name}'s prior", mean)
            _checks.positive(f"the standard deviation of {name}'s prior", std)
        for step in self.steps:
            for name, std in step.items():
                _checks.index(name, unknown, what="unknown parameter")
                _checks.positive(f"the standard deviation of {name} in a step", std)
        if self.noise_std is not None:
            _checks.positive("noise_std", self.noise_std)
        elif self.prior or any(self.steps):
            what = "prior weighs" if self.prior else "damping of steps weighs"
            raise ValueError(
                f"expected a noise_std, against which the {what}; got none. Measure it in a "
                "region without signal, or leave the prior or the damped steps out."
            )
        if not callable(self.start):
            start = np.asarray(self.start, dtype=np.float64)
            axes: list[tuple[str, int | None]] = [("P", len(names))]
            _checks.shape("the start", start, axes if start.ndim < 2 else [("R", None), *axes])

    def __call__(self, given: NDArray[np.complexfloating]) -> Floats:
        """The estimated parameters: coefficients (..., K), or (..., K + n), to (..., E).

        NaN where there is no estimate; also an estimate that has not converged is returned.
        """
        given = np.asarray(given)
        found = self.fit(given.reshape(-1, given.shape[-1]))
        columns = [self.model.index(name) for name in self.estimated or ()]
        return found.theta[:, columns].reshape(*given.shape[:-1], len(columns))

    def fit(
        self,
        given: NDArray[np.complexfloating],
        *,
        start: NDArray[np.floating] | None = None,
        noise_std: ArrayLike | None = None,
        iterations: int = _ITERATIONS,
    ) -> Fit:
        """Everything about V voxels; none of them, whatever it holds, stops the others.

        Args:
            given: coefficients and, behind them, the `inputs`, shape (V, K + n), complex.
            start: of these voxels, shape (V, P) or (V, R, P), in place of the estimator's own.
            noise_std: σ of the coefficients' real and imaginary part each, one number or (V,).
                If None, the estimator's own; if that is None, from the residual: ‖r‖² /
                (2K - F - 2) with F unknown parameters; NaN where that is no positive number.
            iterations: steps tried at most, by a search.

        Raises:
            ValueError: other shapes, or a σ that is not positive.
        """
        given = np.asarray(given, dtype=np.complex128)
        n_given = self.basis.rank + len(self.inputs)
        _checks.shape("the coefficients", given, [("V", None), ("K + n", n_given)])
        size, names = len(given), self.model.names
        if start is not None:
            start = self._as_starts(start, size)
        noise_std = self.noise_std if noise_std is None else noise_std
        sigma = np.full(size, np.nan)
        if noise_std is not None:
            sigma[:] = noise_std
            if not (sigma > 0).all():
                raise ValueError(
                    f"expected a positive noise_std; got {sigma[~(sigma > 0)][0]:g}. Measure it "
                    "in a region without signal, or leave it out."
                )
        result = Fit(
            names=names,
            theta=np.full((size, len(names)), np.nan),
            m0=np.full(size, np.nan, dtype=np.complex128),
            residual=np.full(size, np.nan),
            covariance=np.full((size, len(names), len(names)), np.nan),
            std=np.full((size, len(names)), np.nan),
            noise_std=np.full(size, np.nan),
            iterations=np.zeros(size, dtype=np.intp),
            reason=np.full(size, Reason.NO_SIGNAL, dtype=np.int8),
        )
        x = given[:, : self.basis.rank]
        usable = np.flatnonzero(np.isfinite(given).all(axis=1) & x.any(axis=1))
        for first in range(0, len(usable), _VOXELS):
            voxels = usable[first : first + _VOXELS]
            starts = self._starts(given[voxels]) if start is None else start[voxels]
            self._fit_into(result, voxels, given[voxels], starts, sigma[voxels], iterations)
        return result

    def _fit_into(
        self,
        result: Fit,
        voxels: Integers,
        given: Complex,
        starts: Floats,
        sigma: Floats,
        iterations: int,
    ) -> None:
        """Fit voxels with signal from starts (V, R, P); σ is NaN where it is to be estimated."""
        size, n_starts, _ = starts.shape
        free, K = self._free, self.basis.rank
        norm = np.linalg.norm(given[:, :K], axis=1)
        x = given[:, :K] / norm[:, None]
        theta = np.array(starts).reshape(size * n_starts, -1)
        for name, value in self.known.items():
            theta[:, self.model.index(name)] = value
        for name, values in zip(self.inputs, given[:, K:].real.T, strict=True):
            theta[:, self.model.index(name)] = np.repeat(values, n_starts)

        # σ in coefficients of unit norm; it is NaN only where nothing is weighed against it.
        noise = np.nan_to_num(sigma / norm)[:, None]
        mean, std = self._prior
        weight = np.square(noise / std)

        def local(point: Floats, which: Integers) -> Local:
            there = theta[which]
            there[:, free] = point
            c, jacobian = simulated(self.model, self.basis, there)
            voxel = which // n_starts
            found = projected(x[voxel], c, jacobian[..., free])
            return weighed(found, point - mean, weight[voxel])

        low, high = (
            np.broadcast_to(limit[free], (len(theta), len(free))) for limit in self._limits
        )
        degrees = 2 * K - len(free) - len(fisher.SCALE)
        begun = np.clip(theta[:, free], low, high)
        if self.steps:
            names = [self.model.names[column] for column in free]
            widths = [np.array([step.get(name, np.inf) for name in names]) for step in self.steps]
            damped = [np.square(noise / width).repeat(n_starts, axis=0) for width in widths]
            found = few_steps(local, begun, low, high, damped)
        else:
            found = minimize(
                local,
                begun,
                low,
                high,
                degrees=max(1, degrees),
                floor=_FLOOR,
                iterations=iterations,
            )
        theta[:, free] = found.point
        cost = np.where(found.reason == Reason.REFUSED, np.inf, found.local.cost)
        best = np.arange(size) * n_starts + cost.reshape(size, n_starts).argmin(axis=1)
        result.reason[voxels] = found.reason[best]
        result.iterations[voxels] = found.iterations[best]

        seen = found.reason[best] != Reason.REFUSED
        if not seen.any():
            return
        voxels, best, x, norm, sigma = (part[seen] for part in (voxels, best, x, norm, sigma))
        result.theta[voxels] = theta[best]
        c = np.concatenate(
            [
                self.basis.compress(self.model.signal(theta[best[part]]))
                for part in _batches(self.model, len(best))
            ]
        )
        result.m0[voxels] = norm * scale(x, c)
        residual = norm * np.linalg.norm(x - scale(x, c)[:, None] * c, axis=1)
        result.residual[voxels] = residual
        if degrees > 0:
            sigma = np.where(np.isnan(sigma), residual / np.sqrt(degrees), sigma)
        result.noise_std[voxels] = sigma
        # JᵀJ of a voxel scaled to ‖x‖ = 1 is the information for σ = 1, M0 unknown, and has the
        # prior's in it, which says more than limits do.
        information, variance = found.local.curvature[best], np.square(sigma / norm)[:, None]
        covariance = np.zeros((len(best), *result.covariance.shape[1:]))
        covariance[:, free[:, None], free] = variance[..., None] * fisher.covariance(information)
        result.covariance[voxels] = covariance
        limits = np.diag(np.where(np.isinf(std), _UNIFORM / np.square(high[0] - low[0]), 0.0))
        information = information + np.nan_to_num(variance)[..., None] * limits
        deviations = np.zeros((len(best), result.std.shape[1]))
        deviations[:, free] = np.sqrt(variance * fisher.bounds(information))
        result.std[voxels] = deviations

    def _starts(self, given: Complex) -> Floats:
        """Starts of V voxels, shape (V, R, P)."""
        if callable(self.start):
            seen = given[:, : self.basis.rank] if isinstance(self.start, Dictionary) else given
            return self._as_starts(self.start(seen), len(given))
        common = np.atleast_2d(np.asarray(self.start, dtype=np.float64))
        return np.broadcast_to(common, (len(given), *common.shape))

    def _as_starts(self, start: NDArray[np.floating], size: int) -> Floats:
        starts: Floats = np.asarray(start, dtype=np.float64)
        starts = starts[:, None] if starts.ndim == 2 else starts
        axes = [("V", size), ("R", None), ("P", len(self.model.names))]
        _checks.shape("the start", starts, axes)
        return starts

    @property
    def _free(self) -> Integers:
        """Columns of the unknown parameters."""
        given = (*self.known, *self.inputs)
        return np.flatnonzero([name not in given for name in self.model.names])

    @property
    def _prior(self) -> Floats:
        """Mean and standard deviation of the unknown parameters; 0 and inf without a prior."""
        names = [self.model.names[column] for column in self._free]
        return np.array([self.prior.get(name, (0.0, np.inf)) for name in names]).T

    @property
    def _limits(self) -> Floats:
        """Lower and upper bounds of all parameters, shape (2, P)."""
        pairs = {parameter.name: parameter.bounds for parameter in self.model.parameters}
        for name, (low, high) in self.bounds.items():
            _checks.index(name, self.model.names)
            lowest, highest = pairs[name]
            if not lowest <= low < high <= highest:
                raise ValueError(
                    f"expected bounds of {name} within the model's [{lowest:g}, {highest:g}]; "
                    f"got [{low:g}, {high:g}]. Check their order and unit (SI)."
                )
            pairs[name] = low, high
        return np.array(list(pairs.values())).T


def simulated(model: SignalModel, basis: Basis, theta: Floats) -> tuple[Complex, Complex]:
    """Simulated c (S, K) and ∂c/∂θ (S, K, P) of parameters (S, P); NaN where the model refuses."""
    c = np.full((len(theta), basis.rank), np.nan, dtype=np.complex128)
    jacobian = np.full((*c.shape, theta.shape[1]), np.nan, dtype=np.complex128)
    parts = list(_batches(model, len(theta)))
    while parts:
        part = parts.pop()
        try:
            out = model.simulate(theta[part])
        except (ValueError, ArithmeticError):
            # One bad voxel must not take the others with it: halve until it is alone.
            middle = (part.start + part.stop) // 2
            if middle > part.start:
                parts += [slice(part.start, middle), slice(middle, part.stop)]
            continue
        c[part] = basis.compress(out.signal)
        jacobian[part] = basis.compress(out.jacobian)
    return c, jacobian


def _batches(model: SignalModel, size: int) -> Iterator[slice]:
    each = 16.0 * model.n_samples * len(model.parameters)
    length = max(1, int(_BATCH_BYTES / each / _BATCH_MULTIPLE)) * _BATCH_MULTIPLE
    for first in range(0, size, length):
        yield slice(first, min(first + length, size))


def projected(x: Complex, c: Complex, jacobian: Complex) -> Local:
    r"""½‖r‖² of the residual with the best M0 for each θ, and its slopes (variable projection).

        r = x - M0 c,  M0 = cᴴx / cᴴc,  J = -M0 (1 - c cᴴ / cᴴc) ∂c/∂θ

    This is Kaufman's J (BIT 1975): it leaves out what changes M0, which lies along c, so that Jᵀr
    is exact, and Re(JᴴJ) the Fisher information of θ for σ = 1 with complex M0 unknown.

    Args:
        x: shape (n, K).
        c: shape (n, K).
        jacobian: ∂c/∂θ, shape (n, K, F).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        energy = np.square(np.abs(c)).sum(axis=1)
        m0 = scale(x, c)
        along = (c[:, None].conj() @ jacobian) / energy[:, None, None]
        J = -m0[:, None, None] * (jacobian - c[..., None] * along)
    r = x - m0[:, None] * c
    # Real and imaginary parts, one after the other.
    real_J, real_r = np.concatenate([J.real, J.imag], 1), np.concatenate([r.real, r.imag], 1)
    gradient = (real_J.mT @ real_r[..., None])[..., 0]
    curvature = real_J.mT @ real_J
    fine = np.isfinite(gradient).all(axis=1) & np.isfinite(curvature).all(axis=(1, 2))
    return Local(np.where(fine, np.square(real_r).sum(axis=1) / 2, np.inf), gradient, curvature)


def weighed(local: Local, away: Floats, weight: Floats) -> Local:
    """A sum of squares, with that of a prior: ½ Σ weight · away².

    Args:
        local: of n points.
        away: from the prior's mean, shape (n, F).
        weight: inverse of the prior's variance over that of the residual, shape (n, F).
    """
    square = weight[:, None] * np.eye(weight.shape[1])
    return Local(
        local.cost + (weight * np.square(away)).sum(axis=1) / 2,
        local.gradient + weight * away,
        local.curvature + square,
    )


def scale(x: Complex, c: Complex) -> Complex:
    """M0 = cᴴx / cᴴc, the scale that brings c (n, K) closest to x (n, K)."""
    return (c.conj() * x).sum(axis=1) / np.square(np.abs(c)).sum(axis=1)
