"""Super-Lorentzian Green's function and the linearized relaxation of the semi-solid pool (§2.3).

During a rectangular pulse the semi-solid pool follows the generalized Bloch equation; the signal
model replaces it by a linear one whose rate R2sl ends the pulse with the same zs. The rate in
units of 1/T2s depends on two numbers alone, R2sl T2s = f(TRF/T2s, B1·α). `exact_rates` solves for
f, `rate_table` tabulates it, `rate` reads the table inside compiled kernels, `linearized_rate`
everywhere else. Graham's saturation rate, of older work, has the same form and the same functions:
`graham_table`, `graham`, `graham_rate`.

Source: Assländer et al., Magn Reson Med 2022, doi:10.1002/mrm.29071.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import BSpline, make_interp_spline
from scipy.special import bernoulli

from fisherprint import _checks, _storage

Array = NDArray[np.float64]
_Splines = tuple[tuple[float, ...], tuple[float, ...]]

X_RANGE = (2.0, 250.0)
"""Range of TRF/T2s in the table: from 40 µs / 20 µs to 1.5 ms / 6 µs."""

MAX_ANGLE = 4.5
"""Largest B1·α of the table in rad.

The limit of existence depends on TRF/T2s: 4.66 rad at 14.5, lowest near 20 with 4.56 rad, again
4.65 rad at 31, and beyond 5 rad above 52. Below 14 the rate exists, but rises steeply from 4.3 rad
on. Close to the limit f goes like the square root of the distance, which no spline follows.
"""

_CELLS = (96, 320)
_DEGREE = 5
# `rate` is compiled with these constants, and numba does not notice their change in the cached
# callers of other modules: after editing them, delete the __pycache__ of this folder.
_LOG_X_MIN = math.log(X_RANGE[0])
LOG_X_STEP = math.log(X_RANGE[1] / X_RANGE[0]) / _CELLS[0]
ANGLE_STEP = MAX_ANGLE / _CELLS[1]
# Part of the cache key: raise it with any change of the numbers in the table.
_REVISION = 1

# The Volterra equation: time step in T2s, terms of the series in a², points of a central
# difference. Half the step moves no zs by more than 2e-13 up to `MAX_ANGLE`.
_STEP = 1 / 32
_TERMS = 20
_REACH = 5


class NoLinearizedRateError(ValueError):
    """No linear relaxation rate ends the pulse with the zs of the generalized Bloch model.

    Attributes:
        angle: the largest B1·α asked for, in rad.
    """

    # The default serves unpickling alone, which restores the attribute afterwards.
    def __init__(self, message: str, *, angle: float = math.nan):
        super().__init__(message)
        self.angle = angle


def greens_function(kappa: ArrayLike) -> Array:
    r"""Green's function of the super-Lorentzian lineshape (§2.3).

        G(κ) = ∫₀¹ exp(−κ² (3ζ² − 1)²/8) dζ

    Even in κ, G(0) = 1, and G → √(2π/3)/κ for large κ. The relative error is below 3e-14.

    Args:
        kappa: time in units of T2s, any shape.

    Examples:
        >>> round(float(greens_function(10)), 14)
        0.14712468680944
    """
    k = np.abs(np.asarray(kappa, dtype=np.float64))
    result = np.empty(k.shape)
    near = k < 20
    ζ, weight = _gauss_legendre(100)
    result[near] = np.exp(-((k[near, None] * (3 * ζ**2 - 1)) ** 2) / 8) @ weight
    # Far out the integrand is a narrow peak at the magic angle. With v = κ(3ζ² − 1)/2 it is a
    # Gaussian times a smooth factor, for which the trapezoidal rule converges exponentially.
    v = np.arange(-8.5, 9.0, 0.5)
    far = k[~near, None]
    peak = np.exp(-(v**2) / 2) / (far * np.sqrt(3 + 6 * v / far))
    result[~near] = 0.5 * peak.sum(axis=-1)
    return result


def saturation(x: ArrayLike, angle: ArrayLike) -> Array:
    r"""The zs that a rectangular pulse leaves of zs = 1, by the generalized Bloch model (§2.3).

        dz/ds = −a² ∫₀ˢ G(x (s − σ)) z(σ) dσ,    z(0) = 1,    result z(1)

    without relaxation or exchange during the pulse, to 1e-12 up to 4.5 rad and 1e-10 up to 7 rad.

    Args:
        x: TRF/T2s, 1 to 250.
        angle: a = B1·α in rad; both broadcast.
    """
    a = np.asarray(angle, dtype=np.float64)
    return 1 - a**2 * _loss(_series(np.asarray(x, dtype=np.float64)), a)


def _series(x: Array) -> Array:
    """The c_n of z(1) = Σ_n c_n (−a²)ⁿ, n = 1..20, shape (..., 20).

    The Volterra equation is linear in a², hence the series, and it converges like that of cos a:
    its kernel is at most one.
    """
    return np.asarray(_series_spline()(x))


def _loss(series: Array, angle: Array) -> Array:
    """(1 − zs)/a² = Σ_n c_n (−a²)ⁿ⁻¹; unlike zs it loses no digits as a → 0."""
    return np.asarray((series * (-(angle[..., None] ** 2)) ** np.arange(_TERMS)).sum(axis=-1))


@functools.cache
def _series_spline() -> BSpline:
    """C_n(t)/t²ⁿ as a function of t; time counts in T2s, so one set of C_n serves every pulse.

    C_n(t) = ∫₀ᵗ K(t − τ) C_{n−1}(τ) dτ with C_0 = 1 and K(t) = ∫₀ᵗ G(τ) dτ.
    """
    ends = _end_corrections()
    # Each integral consumes `_REACH` points beyond the end.
    n_points = int(X_RANGE[1] / _STEP) + 2 + _REACH * (_TERMS + 1)
    t = _STEP * np.arange(n_points)

    # G and C_n are even in t and K is odd, so central differences reach across t = 0 as well.
    G = greens_function(t)
    K = np.cumsum(G) - (G[0] + G) / 2
    K = K[:-_REACH]
    for i, end in enumerate(ends, 1):
        K -= end * (_shifted(G, i, +1) - _shifted(G, -i, +1))
    K *= _STEP

    C = np.ones(K.size)
    terms = []
    for _ in range(_TERMS):
        k = K[: C.size - _REACH]
        integral = np.convolve(k, C[: k.size])[: k.size] - k * C[0] / 2
        kernel = K[: C.size]
        for i, end in enumerate(ends, 1):
            integral += end * C[i] * (_shifted(kernel, -i, -1) - _shifted(kernel, i, -1))
            integral += end * K[i] * (_shifted(C, i, +1) + _shifted(C, -i, +1))
        C = _STEP * integral
        terms.append(C)

    n = np.arange(1, _TERMS + 1)
    used = slice(int(1 / _STEP), C.size)
    scaled = np.stack([term[used] for term in terms], axis=-1) / t[used, None] ** (2 * n)
    return make_interp_spline(t[used], scaled, k=9)


def _end_corrections() -> Array:
    """Weights e_i that lift the trapezoidal rule to order 12, from Euler-Maclaurin's formula.

    At the lower end the sum gains Σ_i e_i (F(i h) − F(−i h)), at the upper end it loses the same;
    central differences of the integrand stand for its derivatives, exact for odd powers < 10.
    """
    i = np.arange(1, _REACH + 1)
    k = i[:, None]
    return np.asarray(
        np.linalg.solve(2.0 * i ** (2 * k - 1), bernoulli(2 * _REACH)[2::2] / (2 * i))
    )


def _shifted(values: Array, shift: int, parity: int) -> Array:
    """`values[k + shift]` for all k that have `_REACH` successors, mirrored at k = 0."""
    mirrored = np.concatenate([parity * values[_REACH:0:-1], values])
    start = _REACH + shift
    return mirrored[start : start + values.size - _REACH]


def exact_rates(x: ArrayLike, angles: ArrayLike) -> Array:
    r"""Solve for f = R2sl T2s without a table (§2.3): both models end the pulse with the same zs.

        [exp([[−ρ, a], [−a, 0]])]_zz = z(1; x, a),    f = ρ/x,    ρ = R2sl TRF

    solved for (1 − zs)/a² = ∫₀¹ E(s) ds, E(s) = e^(−ρs/2) sinh(qs)/q, q² = ρ²/4 − a², which has
    a finite limit as a → 0. The branch is the one that starts there.

    Args:
        x: TRF/T2s, shape (X,).
        angles: a = B1·α in rad, shape (A,), rising from near 0 in steps of 0.1 at most: each
            solution starts the next.

    Returns:
        f, shape (X, A).

    Raises:
        NoLinearizedRateError: an angle beyond the limit of existence.
    """
    x = np.asarray(x, dtype=np.float64)
    angles = np.asarray(angles, dtype=np.float64)
    losses = _loss(_series(x)[:, None, :], angles)
    rates = np.empty(losses.shape)
    ρ = 0.15 * x
    for i, angle in enumerate(angles):
        if i > 1:  # linear extrapolation
            ahead = (angle - angles[i - 1]) / (angles[i - 1] - angles[i - 2])
            ρ = ρ + ahead * (rates[:, i - 1] - rates[:, i - 2]) * x
        ρ = _solve_linear(ρ, angle, losses[:, i])
        rates[:, i] = ρ / x
    return rates


def _solve_linear(ρ: Array, angle: float, loss: Array) -> Array:
    """Newton's method for ρ at one angle, started at ρ; all shapes (X,)."""
    s, weight = _gauss_legendre(48)
    for _ in range(60):
        q = np.sqrt(ρ[:, None] ** 2 / 4 - angle**2 + 0j)
        q = np.where(np.abs(q) < 1e-8, 1e-8, q)  # sinh(qs)/q → s
        E = np.exp(-ρ[:, None] * s / 2) * (np.sinh(q * s) / q).real
        # ∂(1 − zs)/∂ρ = −a² ∫ E(s) E(1 − s) ds, the response to a change of rate at each time.
        slope = (E * E[:, ::-1]) @ weight
        if (slope <= 0).any():  # the two solutions have met
            break
        step = np.clip((E @ weight - loss) / slope, -0.2 * ρ, 0.2 * ρ)
        ρ = ρ + step
        if (np.abs(step) <= 1e-13 * ρ).all():
            return ρ
    raise NoLinearizedRateError(
        f"B1·α must stay below the limit of existence of the linearized rate; got {angle:.4g} "
        "rad. Bound B1 or lower the flip angle.",
        angle=float(angle),
    )


@functools.cache
def _gauss_legendre(n: int) -> tuple[Array, Array]:
    """Nodes and weights of ∫₀¹."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return np.asarray((nodes + 1) / 2), np.asarray(weights / 2)


@functools.cache
def rate_table() -> Array:
    """The table of f for all pulses, from memory, from the disk, or built (below a second).

    f(x, a) = R2sl T2s is a quintic B-spline on uniform cells in log x over `X_RANGE`, and in a
    from 0 to `MAX_ANGLE`.

    It lies in the folder FISHERPRINT_CACHE or else in the user's cache folder, under a name that
    depends on the grid. A damaged file is replaced; an unwritable folder costs the time alone.

    Returns:
        Coefficients of the spline, shape (cells in log x + 5, cells in a + 5), read-only; cell
        (i, j) uses the 6 x 6 of them from (i, j) on.
    """
    path = _cache_path(np.array([*X_RANGE, MAX_ANGLE, *_CELLS, _DEGREE, _REVISION]))
    coefficients = None if path is None else _load(path)
    if coefficients is None:
        coefficients = _build()
        if path is not None:
            with contextlib.suppress(OSError), _storage.replacing(path) as temporary:
                np.savez(temporary, coefficients=coefficients)
    coefficients.setflags(write=False)
    return coefficients


def _build() -> Array:
    log_x, x_knots = _uniform_spline(_LOG_X_MIN, _LOG_X_MIN + _CELLS[0] * LOG_X_STEP, _CELLS[0])
    # On both sides of a = 0, so that the spline is as even as f.
    angle, angle_knots = _uniform_spline(-MAX_ANGLE, MAX_ANGLE, 2 * _CELLS[1])
    half = angle.size // 2
    f = exact_rates(np.exp(log_x), np.abs(angle[half:]))
    f = np.concatenate([f[:, :0:-1], f], axis=1)
    for sites, knots in ((log_x, x_knots), (angle, angle_knots)):  # each turn transposes
        basis = BSpline.design_matrix(sites, knots, _DEGREE).toarray()
        f = np.linalg.solve(basis, f).T
    return np.ascontiguousarray(f[:, _CELLS[1] :])


def _uniform_spline(low: float, high: float, cells: int) -> tuple[Array, Array]:
    """Interpolation sites and knots of a quintic spline with `cells` uniform cells."""
    step = (high - low) / cells
    knots = low + step * np.arange(-_DEGREE, cells + _DEGREE + 1)
    inside = knots[_DEGREE:-_DEGREE]
    # Four degrees of freedom remain; they go to the ends, where a spline is least certain.
    extra = np.array([low + step / 2, low + 1.5 * step, high - 1.5 * step, high - step / 2])
    sites = np.sort(np.concatenate([inside, extra]))
    return sites, np.asarray(knots, dtype=np.float64)


def _cache_path(key: Array) -> Path | None:
    folder = os.environ.get("FISHERPRINT_CACHE")
    try:
        base = Path(folder) if folder else _user_cache() / "fisherprint"
    except RuntimeError:  # there is no home
        return None
    return base / f"linearized-rate-{_storage.digest(key)[:16]}.npz"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _load(path: Path) -> Array | None:
    """The coefficients, or None unless the file holds them whole (its format has checksums)."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            coefficients = file["coefficients"]
    except Exception:  # numpy raises many kinds for a damaged file, and each means: build anew
        return None
    expected = tuple(cells + _DEGREE for cells in _CELLS)
    whole = coefficients.shape == expected and coefficients.dtype == np.float64
    return np.ascontiguousarray(coefficients) if whole else None


@numba.njit(forceinline=True)
def rate(coefficients: Array, x: float, angle: float) -> tuple[float, float, float]:
    """f(x, a) = R2sl T2s of a `rate_table`, with ∂f/∂x and ∂f/∂a; compiled.

    Trusts its arguments: kernels call `check_range` before their loops.

    Args:
        coefficients: those of the table.
        x: TRF/T2s.
        angle: a = |B1·α| in rad.
    """
    i, j, u, v = cell(np.log(x), angle)
    f, df_du, df_dv = in_cell(coefficients, i, j, splines(u), splines(v))
    return f, df_du / (LOG_X_STEP * x), df_dv / ANGLE_STEP


@numba.njit(forceinline=True)
def cell(log_x: float, angle: float) -> tuple[int, int, float, float]:
    """The cell of a `rate_table` and the place in it, from 0 to 1; `rate` in two parts.

    Many of these, then many `in_cell`, are faster than many `rate`: the first have no table.
    """
    u = (log_x - _LOG_X_MIN) / LOG_X_STEP
    v = angle / ANGLE_STEP
    i = min(int(u), _CELLS[0] - 1)
    j = min(int(v), _CELLS[1] - 1)
    return i, j, u - i, v - j


@numba.njit(forceinline=True)
def in_cell(
    coefficients: Array, i: int, j: int, along_x: _Splines, along_angle: _Splines
) -> tuple[float, float, float]:
    """Value f in cell (i, j), with ∂f/∂u and ∂f/∂v, from `splines` at the place in it."""
    w, dw = along_x
    (b0, b1, b2, b3, b4, b5), (d0, d1, d2, d3, d4, d5) = along_angle
    f = df_du = df_dv = 0.0
    for m in range(6):
        c = coefficients[i + m]
        c0, c1, c2, c3, c4, c5 = c[j], c[j + 1], c[j + 2], c[j + 3], c[j + 4], c[j + 5]
        value = b0 * c0 + b1 * c1 + b2 * c2 + b3 * c3 + b4 * c4 + b5 * c5
        slope = d0 * c0 + d1 * c1 + d2 * c2 + d3 * c3 + d4 * c4 + d5 * c5
        f += w[m] * value
        df_du += dw[m] * value
        df_dv += w[m] * slope
    return f, df_du, df_dv


@functools.cache
def graham_table() -> Array:
    """The table of g(x) for `graham`, a quintic B-spline on the cells of `rate_table` in log x.

    Returns:
        Coefficients, shape (1, cells + 5), read-only.
    """
    log_x, knots = _uniform_spline(_LOG_X_MIN, _LOG_X_MIN + _CELLS[0] * LOG_X_STEP, _CELLS[0])
    x = np.exp(log_x)
    basis = BSpline.design_matrix(log_x, knots, _DEGREE).toarray()
    coefficients = np.linalg.solve(basis, _series(x)[:, 0] / x)[None]
    coefficients.setflags(write=False)
    return coefficients


@numba.njit(forceinline=True)
def graham(coefficients: Array, x: float, angle: float) -> tuple[float, float, float]:
    r"""f(x, a) = R_RF T2s of Graham's saturation rate, with ∂f/∂x and ∂f/∂a; compiled.

        f = a² g(x),    g(x) = 1/x ∫₀¹ (1 − s) G(x s) ds

    Trusts its arguments: kernels call `check_range` before their loops.

    Args:
        coefficients: of `graham_table`.
        x: TRF/T2s.
        angle: a = |B1·α| in rad.
    """
    u = (np.log(x) - _LOG_X_MIN) / LOG_X_STEP
    i = min(int(u), _CELLS[0] - 1)
    weights, slopes = splines(u - i)
    g = dg_du = 0.0
    for m in range(6):
        g += weights[m] * coefficients[0, i + m]
        dg_du += slopes[m] * coefficients[0, i + m]
    return angle**2 * g, angle**2 * dg_du / (LOG_X_STEP * x), 2 * angle * g


@numba.njit(forceinline=True)
def splines(u: float) -> _Splines:
    """The six quintic B-splines of a cell at u in [0, 1], and their derivatives.

    From the quartic ones q_j: 5 B_j = (u + 5 − j) q_{j−1} + (j + 1 − u) q_j, B_j' = q_{j−1} − q_j.
    """
    t = 1 - u
    q0 = t**4 / 24
    q1 = (1 + t * (4 + t * (6 + t * (4 - 4 * t)))) / 24
    q3 = (1 + u * (4 + u * (6 + u * (4 - 4 * u)))) / 24
    q4 = u**4 / 24
    q2 = 1 - q0 - q1 - q3 - q4
    values = (
        t * q0 / 5,
        ((u + 4) * q0 + (2 - u) * q1) / 5,
        ((u + 3) * q1 + (3 - u) * q2) / 5,
        ((u + 2) * q2 + (4 - u) * q3) / 5,
        ((u + 1) * q3 + (5 - u) * q4) / 5,
        u * q4 / 5,
    )
    return values, (-q0, q0 - q1, q1 - q2, q2 - q3, q3 - q4, q4)


@numba.njit(forceinline=True)
def bends(u: float) -> tuple[float, float, float, float, float, float]:
    """Second derivatives of the six splines by cubic ones, B_j'' = c_{j−2} − 2 c_{j−1} + c_j."""
    t = 1 - u
    c0, c3 = t**3 / 6, u**3 / 6
    c1 = (1 + 3 * t * (1 + t * u)) / 6
    c2 = 1 - c0 - c1 - c3
    return c0, c1 - 2 * c0, c2 - 2 * c1 + c0, c3 - 2 * c2 + c1, c2 - 2 * c3, c3


@numba.njit(forceinline=True)
def rate_bends(coefficients: Array, x: float, angle: float) -> tuple[float, float, float]:
    """x² ∂²f/∂x², x ∂²f/∂x∂a and ∂²f/∂a² of what `rate` gives; compiled, trusts its arguments."""
    i, j, u, v = cell(np.log(x), angle)
    w, dw = splines(u)
    b, db = splines(v)
    ddw, ddb = bends(u), bends(v)
    f_u = f_uu = f_uv = f_vv = 0.0
    for m in range(6):
        value = slope = bend = 0.0
        for n in range(6):
            c = coefficients[i + m, j + n]
            value += b[n] * c
            slope += db[n] * c
            bend += ddb[n] * c
        f_u += dw[m] * value
        f_uu += ddw[m] * value
        f_uv += dw[m] * slope
        f_vv += w[m] * bend
    f_xx = (f_uu / LOG_X_STEP - f_u) / LOG_X_STEP
    return f_xx, f_uv / (LOG_X_STEP * ANGLE_STEP), f_vv / ANGLE_STEP**2


@numba.njit(forceinline=True)
def graham_bends(coefficients: Array, x: float, angle: float) -> tuple[float, float, float]:
    """The same three of what `graham` gives."""
    u = (np.log(x) - _LOG_X_MIN) / LOG_X_STEP
    i = min(int(u), _CELLS[0] - 1)
    weights, slopes = splines(u - i)
    seconds = bends(u - i)
    g = g_u = g_uu = 0.0
    for m in range(6):
        g += weights[m] * coefficients[0, i + m]
        g_u += slopes[m] * coefficients[0, i + m]
        g_uu += seconds[m] * coefficients[0, i + m]
    g_xx = (g_uu / LOG_X_STEP - g_u) / LOG_X_STEP
    return angle**2 * g_xx, 2 * angle * g_u / LOG_X_STEP, 2 * g


class SaturationRate(NamedTuple):
    """R, which is R2sl or R_RF, in 1/s with its derivatives.

    Attributes:
        value: R in 1/s.
        by_t2s: ∂R/∂T2s in 1/s².
        by_angle: ∂R/∂(B1·α) in 1/s/rad.
    """

    value: Array
    by_t2s: Array
    by_angle: Array


def linearized_rate(pulse_duration: ArrayLike, angle: ArrayLike, t2s: ArrayLike) -> SaturationRate:
    """R2sl of rectangular pulses (§2.3): R2sl = f(TRF/T2s, B1·α)/T2s, and its derivatives.

    The value is good to 1e-7. The errors of the derivatives, T2s ∂R2sl/∂T2s and ∂R2sl/∂(B1·α),
    stay below 3e-6 of R2sl everywhere, and below 1e-7 where |B1·α| ≤ 4.3 rad and TRF/T2s ≥ 5.

    Args:
        pulse_duration: TRF in s.
        angle: B1·α in rad, of either sign; R2sl is even in it.
        t2s: T2s in s; all three broadcast.

    Raises:
        NoLinearizedRateError: B1·α above `MAX_ANGLE`.
        ValueError: TRF/T2s outside of `X_RANGE`, or values that are not finite.
    """
    x, a, t2 = _arguments(pulse_duration, angle, t2s)
    if x.size:
        check_range(x.min(), x.max(), np.abs(a).max())
    return _in_seconds(_rates(rate_table(), x.ravel(), np.abs(a).ravel()), x, a, t2)


def graham_rate(pulse_duration: ArrayLike, angle: ArrayLike, t2s: ArrayLike) -> SaturationRate:
    r"""R_RF of rectangular pulses on resonance by Graham's spectral model, and its derivatives.

        R_RF = ω1²/TRF ∫₀^TRF (TRF − u) G(u/T2s) du

    The lineshape, averaged with the power spectrum of the pulse and written in time; during the
    pulse dzs/dt = −R_RF zs. It is the generalized Bloch equation to first order in α² and good
    for pulses that are long and weak; for TRF ≪ T2s it gives zs = exp(−α²/2) instead of cos α.
    Sources: Graham & Henkelman, J Magn Reson Imaging 1997, doi:10.1002/jmri.1880070520;
    Assländer et al., doi:10.1002/mrm.29071. Good to 1e-9.

    Args:
        pulse_duration: TRF in s.
        angle: B1·α in rad.
        t2s: T2s in s; all three broadcast.

    Raises:
        ValueError: TRF/T2s outside of `X_RANGE`, or values that are not finite.
    """
    x, a, t2 = _arguments(pulse_duration, angle, t2s)
    if x.size:
        check_range(x.min(), x.max(), 0.0)
    return _in_seconds(_graham(graham_table(), x.ravel(), np.abs(a).ravel()), x, a, t2)


def _arguments(
    pulse_duration: ArrayLike, angle: ArrayLike, t2s: ArrayLike
) -> tuple[Array, Array, Array]:
    """TRF/T2s, angles and T2s of one shape, checked."""
    duration, a, t2 = np.broadcast_arrays(
        *(
            np.asarray(_checks.finite(name, values), dtype=np.float64)
            for name, values in (
                ("pulse durations", pulse_duration),
                ("angles", angle),
                ("T2s", t2s),
            )
        )
    )
    if not (t2 > 0).all():
        raise ValueError(
            f"T2s must be positive, in s; got {t2.min():g}. Check the arguments' order."
        )
    return duration / t2, a, t2


def _in_seconds(rates: Array, x: Array, angle: Array, t2s: Array) -> SaturationRate:
    """R = f/T2s and its derivatives from f, ∂f/∂x and ∂f/∂a."""
    f, df_dx, df_da = rates.reshape(3, *x.shape)
    return SaturationRate(f / t2s, -(f + x * df_dx) / t2s**2, np.sign(angle) * df_da / t2s)


def check_range(x_min: float, x_max: float, max_angle: float) -> None:
    """Require that the table covers TRF/T2s from `x_min` to `x_max` and |B1·α| to `max_angle` rad.

    Raises:
        NoLinearizedRateError: the angle is above `MAX_ANGLE`.
        ValueError: a TRF/T2s is outside of `X_RANGE`.
    """
    if x_min < X_RANGE[0] or x_max > X_RANGE[1]:
        raise ValueError(
            f"TRF/T2s must lie between {X_RANGE[0]:g} and {X_RANGE[1]:g}, both times in s; got "
            f"{x_min:.4g} to {x_max:.4g}. Are the durations in ms, or T2s in µs?"
        )
    if max_angle > MAX_ANGLE:
        raise NoLinearizedRateError(
            f"|B1·α| must not exceed {MAX_ANGLE} rad, since from 4.56 rad on the semi-solid pool "
            f"has no linearized rate; got {max_angle:.4g} rad. Bound B1 or lower the flip angle.",
            angle=float(max_angle),
        )


@numba.njit(cache=True)
def _rates(coefficients: Array, x: Array, angle: Array) -> Array:
    """`rate` for many pulses, shape (3, pulses)."""
    result = np.empty((3, x.size))
    for i in range(x.size):
        result[0, i], result[1, i], result[2, i] = rate(coefficients, x[i], angle[i])
    return result


@numba.njit(cache=True)
def _graham(coefficients: Array, x: Array, angle: Array) -> Array:
    """`graham` for many pulses, shape (3, pulses)."""
    result = np.empty((3, x.size))
    for i in range(x.size):
        result[0, i], result[1, i], result[2, i] = graham(coefficients, x[i], angle[i])
    return result
