"""Error bars of any estimator: √CRB where it says that a voxel is, and how well the model fits.

Why so, and what it costs: docs/decisions/040-error-bars.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import chi2

from fisherprint import _threads, fisher, fit
from fisherprint.models.protocol import SignalModel
from fisherprint.subspace import Basis

Floats = NDArray[np.float64]

# Steps of the search for what an estimator does not tell: later ones move the bars by less than
# the noise does.
_ITERATIONS = 6
# Noise alone exceeds the limit of a misfit in this share of voxels.
_MISFIT = 1e-3
# Without σ: of the median residual.
_MULTIPLE = 3.0
# Background voxels that tell σ to a per cent, with the coefficients that each has.
_LEAST_BACKGROUND = 256
# More do not tell it better than the reconstruction is homogeneous.
_MOST_BACKGROUND = 100_000
# Voxels next to the object hold some of its signal.
_GAP = 2
# Noise has the same σ in each coefficient of an orthonormal basis. Signal has not.
_MOST_UNEQUAL = 1.5


@dataclass(frozen=True, eq=False)
class Bars:
    """What is found beside the estimates of V voxels; NaN where the model refuses them.

    Attributes:
        std: √CRB of the E estimates for σ = 1, shape (V, E), the parameters' units over those of
            the coefficients; infinite where the signal does not tell the parameter.
        m0: complex M0, shape (V,), in units of the coefficients.
        residual: ‖x - M0 c(θ)‖, shape (V,), those units.
    """

    std: NDArray[np.float32]
    m0: NDArray[np.complex64]
    residual: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ErrorBars:
    r"""√CRB, M0 and the residual at estimates of some of a model's parameters.

        σ_e = σ/|M0| √CRB_e(θ),   M0 = cᴴx / cᴴc,   r = x - M0 c(θ)

    θ holds the estimates, what is known, and for all other parameters what a few steps of least
    squares find with these given, from the most similar fingerprint on. All parameters but the
    known ones and complex M0 count as unknown in the bound. Estimates that the model refuses are
    moved to its bounds.

    Attributes:
        model: any signal model.
        basis: of the coefficients x.
        estimated: the E parameters that an estimator tells.
        known: those it is told.
        fingerprints: where the search for the others starts.
        bounds: (low, high) of these by name, within those of the model.

    Raises:
        KeyError: an unknown name.
    """

    model: SignalModel
    basis: Basis
    estimated: tuple[str, ...]
    known: tuple[str, ...]
    fingerprints: fit.Dictionary
    bounds: dict[str, tuple[float, float]]

    @property
    def n_others(self) -> int:
        """Parameters that are neither estimated nor known."""
        return len(self.model.names) - len(self.estimated) - len(self.known)

    @property
    def degrees(self) -> int:
        """Real numbers in a residual: 2K less those of M0 and of the others, which are fitted."""
        return 2 * self.basis.rank - len(fisher.SCALE) - self.n_others

    def of_task(self, task: tuple[Any, NDArray[np.complexfloating], Floats]) -> Bars:
        """Bars of what stands behind a label."""
        return self(*task[1:])

    def __call__(self, x: NDArray[np.complexfloating], told: Floats) -> Bars:
        """Bars of V voxels, by one worker with one thread.

        Args:
            x: coefficients, shape (V, K).
            told: estimates and then known values, shape (V, E + n), all finite.
        """
        names, columns = self.model.names, [self.model.index(name) for name in self.estimated]
        limits = np.array([self.model.parameters[column].bounds for column in columns])
        told = told.copy()
        told[:, : len(columns)] = np.clip(told[:, : len(columns)], *limits.T)
        given = (*self.estimated, *self.known)
        with _threads.one_thread():
            theta = np.empty((len(x), len(names)))
            theta[:, [self.model.index(name) for name in given]] = told
            if self.n_others:
                search = fit.LeastSquares(
                    self.model,
                    self.basis,
                    start=np.zeros(len(names)),
                    inputs=given,
                    bounds=self.bounds,
                )
                found = search.fit(
                    np.column_stack([x, told]),
                    start=self.fingerprints.nearest(x, 1),
                    noise_std=1.0,
                    iterations=_ITERATIONS,
                )
                theta = found.theta
            c, jacobian = fit.simulated(self.model, self.basis, theta)
            fine = np.isfinite(c).all(axis=1) & np.isfinite(jacobian).all(axis=(1, 2))
            c, jacobian, seen = c[fine], jacobian[fine], x[fine]
            unknown = [names.index(name) for name in names if name not in self.known]
            information = fisher.information(c, jacobian[..., unknown], noise_std=1.0)
            bound = fisher.bounds(information)[:, [unknown.index(column) for column in columns]]
        std = np.full((len(x), len(columns)), np.nan)
        m0 = np.full(len(x), np.nan, dtype=np.complex128)
        residual = np.full(len(x), np.nan)
        # A voxel in which nothing is like the model has M0 = 0, and no bound.
        with np.errstate(divide="ignore"):
            m0[fine] = fit.scale(seen, c)
            std[fine] = np.sqrt(bound) / np.abs(m0[fine, None])
        residual[fine] = np.linalg.norm(seen - m0[fine, None] * c, axis=1)
        return Bars(std.astype(np.float32), m0.astype(np.complex64), residual.astype(np.float32))


@dataclass(frozen=True)
class Noise:
    """σ of coefficient images, of real and imaginary part each.

    Attributes:
        std: σ; NaN where nothing tells it.
        source: what told it.
        of_residuals: what the residuals tell, if the model is right; NaN without any.
    """

    std: float
    source: Literal["given", "background", "residuals"]
    of_residuals: float

    @property
    def described(self) -> str:
        """For people."""
        found = {
            "given": "as given",
            "background": "from the background",
            "residuals": "from the residuals",
        }[self.source]
        beside = f"; the residuals tell {self.of_residuals:.4g}"
        return f"noise σ {self.std:.4g} {found}" + beside * (self.source != "residuals")

    @property
    def recorded(self) -> dict[str, Any]:
        """For files: JSON knows no NaN."""
        told = {"std": self.std, "source": self.source, "of_residuals": self.of_residuals}
        return {key: None if value != value else value for key, value in told.items()}

    def largest_residual(self, degrees: int, *, allowance: float = 1.0) -> float:
        """The ‖r‖ that noise exceeds in one voxel of a thousand; larger ones are misfits.

        Where σ comes from the residuals, it is three times the median: σ of all voxels need not
        be that of each.

        Args:
            degrees: of freedom of the residual.
            allowance: factor for estimates that are not those of least squares, which leave more.
        """
        if self.source == "residuals":
            return float(_MULTIPLE * self.std * np.sqrt(chi2.median(degrees)))
        return float(allowance * self.std * np.sqrt(chi2.isf(_MISFIT, degrees)))


def noise(
    images: NDArray[np.complexfloating],
    mask: NDArray[np.bool_],
    residual: NDArray[np.floating],
    degrees: int,
    *,
    given: float | None = None,
) -> Noise:
    """σ as given, else of the background, else of the residuals.

    Args:
        images: coefficients, spatial axes and then K.
        mask: the object, bool, the spatial axes.
        residual: ‖r‖ of its voxels, shape (V,); NaN does not count.
        degrees: of freedom of each residual.
        given: σ, if it is known.
    """
    of_residuals = noise_of_residuals(residual, degrees)
    if given is not None:
        return Noise(given, "given", of_residuals)
    outside = noise_of_background(images, mask)
    if outside is not None:
        return Noise(outside, "background", of_residuals)
    return Noise(of_residuals, "residuals", of_residuals)


def noise_of_residuals(residual: NDArray[np.floating], degrees: int) -> float:
    """σ of which half of the residuals are smaller, if the model is right; NaN without any.

    Args:
        residual: ‖r‖, shape (V,); NaN does not count.
        degrees: of freedom of each.
    """
    finite = residual[np.isfinite(residual)]
    if not finite.size or degrees < 1:
        return float("nan")
    return float(np.median(finite) / np.sqrt(chi2.median(degrees)))


def noise_of_background(
    images: NDArray[np.complexfloating], mask: NDArray[np.bool_]
) -> float | None:
    """σ of real and imaginary part each, of what lies outside of the mask; None if nothing tells.

        σ² = median |x|² / (2 ln 2)

    Zeros are no noise: many reconstructions write them outside of the object. Neither is what
    differs between coefficients, nor what is next to the mask.

    Args:
        images: coefficients in an orthonormal basis, spatial axes and then K.
        mask: the object, bool, the spatial axes.
    """
    near = ndimage.binary_dilation(np.atleast_1d(mask.squeeze()), iterations=_GAP)
    far = np.flatnonzero(~near)
    far = far[:: max(1, len(far) // _MOST_BACKGROUND)]
    outside = images.reshape(-1, images.shape[-1])[far]
    outside = outside[np.isfinite(outside).all(axis=1) & outside.all(axis=1)]
    if len(outside) < _LEAST_BACKGROUND:
        return None
    energy = np.square(outside.real) + np.square(outside.imag)
    variance = np.median(energy, axis=0) / (2 * np.log(2))
    if variance.max() > _MOST_UNEQUAL**2 * variance.min():
        return None
    return float(np.sqrt(np.median(energy) / (2 * np.log(2))))
