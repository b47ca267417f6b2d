"""The full generalized Bloch equation of the semi-solid pool: a slow reference (§2.3).

During a pulse the memory of the semi-solid pool makes the model an integro-differential equation,

    dm/dt = L m + c − ω1² ∫₀ᵗ G((t − τ)/T2s) zs(τ) dτ · e_zs,    m = (xf, yf, zf, zs),

with L m + c the rotation of the free pool, relaxation and exchange. The memory starts anew with
each pulse, and off resonance the semi-solid pool does not precess (ω0 T2s is small). The equation
is integrated once and solved by collocation: values at Chebyshev nodes stand for polynomials, and
all integrals become matrices. Derivatives are those of the linear system.

Source: Assländer et al., Magn Reson Med 2022, doi:10.1002/mrm.29071.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import BSpline, make_interp_spline
from scipy.linalg import expm

from fisherprint.models.kernels import B0, B1, M0S, R1F, R1S, R2F, RX, T2S
from fisherprint.models.lineshape import X_RANGE, greens_function

Array = NDArray[np.float64]

# Twice as many of both move no zs by more than 1e-9, from TRF/T2s = 2 to 250 and up to 4.5 rad.
_NODES = 40
_QUADRATURE = 48
_XF, _YF, _ZF, _ZS, _ONE = range(5)


def propagators(
    tissue: Array, angle: float, duration: float, directions: Sequence[str], *, free: bool = True
) -> Array:
    """What one pulse does to (xf, yf, zf, zs, 1), with derivatives.

    Args:
        tissue: m0s, R1f, R2f, Rx, R1s, T2s, B0, B1 of each parameter set, shape (8, S); SI units.
        angle: α in rad.
        duration: TRF in s, with TRF/T2s up to 250.
        directions: D names of them to differentiate by.
        free: else only the saturation of the semi-solid pool, without relaxation or exchange.

    Returns:
        Affine maps, shape (1 + D, S, 5, 5), the value first.
    """
    ops = _operators()
    n, size = _NODES, tissue.shape[1]
    x, a = duration / tissue[T2S], tissue[B1] * angle
    L, dL = _generator(tissue, angle, duration, directions)
    if not free:
        L, dL = np.zeros_like(L), np.zeros_like(dL)
    M, dM_dx = _memory(x)

    def system(generator: Array, memory: Array) -> Array:
        """−(generator x integration), with the memory in the block of zs."""
        blocks = -np.einsum("skl,ij->skilj", generator[:, :4, :4], ops.integral)
        blocks[:, _ZS, :, _ZS] += memory
        return blocks.reshape(size, 4 * n, 4 * n)

    def constant(generator: Array) -> Array:
        """The integral of c, shape (S, 4 n)."""
        return (generator[:, :4, _ONE, None] * ops.nodes).reshape(size, 4 * n)

    A = np.eye(4 * n) + system(L, a[:, None, None] ** 2 * M)
    right = np.zeros((size, 4 * n, 5))
    for k in range(4):
        right[:, k * n : (k + 1) * n, k] = 1.0
    right[:, :, _ONE] = constant(L)
    inverse = np.linalg.inv(A)
    Y = inverse @ right

    result = np.zeros((1 + len(directions), size, 5, 5))
    ends = n * np.arange(1, 5) - 1
    result[0, :, :4] = Y[:, ends]
    result[0, :, _ONE, _ONE] = 1.0
    for p, name in enumerate(directions):
        memory = np.zeros_like(M)
        if name == "B1":
            memory = (2 * a * angle)[:, None, None] * M
        elif name == "T2s":
            memory = (a**2 * -x / tissue[T2S])[:, None, None] * dM_dx
        dright = np.zeros_like(right)
        dright[:, :, _ONE] = constant(dL[p])
        dY = inverse @ (dright - system(dL[p], memory) @ Y)
        result[1 + p, :, :4] = dY[:, ends]
    return result


def train_signal(
    tissue: Array,
    directions: Sequence[str],
    flip_angle: Array,
    pulse_duration: Array,
    repetition_time: float,
    crushed: bool,
    phase_increment: float,
) -> NDArray[np.complex128]:
    """Periodic signal of one train and its derivatives.

    Args:
        tissue: as for `propagators`, shape (8, S).
        directions: D names to differentiate by.
        flip_angle: α in rad, shape (N,), the inversion first.
        pulse_duration: TRF in s, shape (N,).
        repetition_time: TR in s.
        crushed: crushed inversion; else spoiled.
        phase_increment: of the pulses, in rad.

    Returns:
        xf + i·yf at the echoes, shape (S, 1 + D, N).
    """
    n_pulses, size = flip_angle.size, tissue.shape[1]
    turn = np.eye(5)
    c, s = np.cos(phase_increment), np.sin(phase_increment)
    turn[:2, :2] = [[c, -s], [s, c]]
    steps = []
    for i in range(n_pulses):
        angle, duration = float(flip_angle[i]), float(pulse_duration[i])
        if i == 0:
            # The crushers of the inversion fill what is left of the repetition time.
            half = _precession(tissue, repetition_time / 2, directions)
            pulse = _inversion(tissue, angle, duration, crushed, directions)
        else:
            half = _precession(tissue, (repetition_time - duration) / 2, directions)
            pulse = propagators(tissue, angle, duration, directions)
        steps.append(_times(_times(half, pulse @ turn), half))
    cycle = functools.reduce(lambda done, step: _times(step, done), steps)

    # (1 - A) m = b, and dm solves the same with dA m + db on the right.
    left = np.eye(4) - cycle[0, :, :4, :4]
    state = np.zeros((1 + len(directions), size, 5))
    state[0, :, _ONE] = 1.0
    state[0, :, :4] = np.linalg.solve(left, cycle[0, :, :4, _ONE, None])[..., 0]
    for p in range(1, len(state)):
        right = cycle[p, :, :4] @ state[0, :, :, None]
        state[p, :, :4] = np.linalg.solve(left, right)[..., 0]

    result = np.empty((size, len(state), n_pulses), dtype=np.complex128)
    for i, step in enumerate(steps):
        state = _times(step, state[..., None])[..., 0]
        result[:, :, i] = (state[..., _XF] + 1j * state[..., _YF]).T
    return result


def _times(a: Array, b: Array) -> Array:
    """a·b with derivatives along the first axis: d(ab) = da b + a db."""
    product = a[0] @ b
    product[1:] += a[1:] @ b[0]
    return product


def _generator(
    tissue: Array, angle: float, duration: float, directions: Sequence[str]
) -> tuple[Array, Array]:
    """[L c] TRF of a pulse, shape (S, 5, 5), and its derivatives, (D, S, 5, 5)."""
    m0s, R1f, R2f, Rx = tissue[M0S], tissue[R1F], tissue[R2F], tissue[RX]
    R1s, w0 = tissue[R1S], tissue[B0]
    m0f, zero, one = 1 - m0s, np.zeros_like(m0s), np.ones_like(m0s)

    def matrix(*rows: tuple[Array, ...]) -> Array:
        return np.moveaxis(np.array([*rows, (zero,) * 5]), -1, 0)

    still = (zero,) * 5
    turn = angle / duration
    w1 = tissue[B1] * turn
    L = matrix(
        (-R2f, -w0, w1, zero, zero),
        (w0, -R2f, zero, zero, zero),
        (-w1, zero, -R1f - Rx * m0s, Rx * m0f, R1f * m0f),
        (zero, zero, Rx * m0s, -R1s - Rx * m0f, R1s * m0s),
    )
    by = {
        "m0s": (still, still, (zero, zero, -Rx, -Rx, -R1f), (zero, zero, Rx, Rx, R1s)),
        "R1f": (still, still, (zero, zero, -one, zero, m0f), still),
        "R2f": ((-one, zero, zero, zero, zero), (zero, -one, zero, zero, zero), still, still),
        "Rx": (still, still, (zero, zero, -m0s, m0f, zero), (zero, zero, m0s, -m0f, zero)),
        "R1s": (still, still, still, (zero, zero, zero, -one, m0s)),
        "T2s": (still, still, still, still),
        "B0": ((zero, -one, zero, zero, zero), (one, zero, zero, zero, zero), still, still),
        "B1": (
            (zero, zero, turn * one, zero, zero),
            still,
            (-turn * one, zero, zero, zero, zero),
            still,
        ),
    }
    derivatives = [matrix(*by[name]) for name in directions]
    return duration * L, duration * np.reshape(derivatives, (-1, *L.shape))


def _precession(tissue: Array, time: float, directions: Sequence[str]) -> Array:
    """Free precession, shape (1 + D, S, 5, 5): exp of [[H, dH], [0, H]] holds the derivative."""
    H, dH = _generator(tissue, 0.0, time, [name for name in directions if name != "B1"])
    result = np.zeros((1 + len(directions), *H.shape))
    result[0] = expm(H)
    double = np.zeros((len(H), 10, 10))
    double[:, :5, :5] = double[:, 5:, 5:] = H
    rows = [1 + p for p, name in enumerate(directions) if name != "B1"]
    for row, derivative in zip(rows, dH, strict=True):
        double[:, :5, 5:] = derivative
        result[row] = expm(double)[:, :5, 5:]
    return result


def _inversion(
    tissue: Array, angle: float, duration: float, crushed: bool, directions: Sequence[str]
) -> Array:
    """The inversion: diag(sin²(B1α/2), -sin²(B1α/2), cos(B1α)) of the free pool if crushed."""
    result = propagators(tissue, angle, duration, directions, free=False)
    a = tissue[B1] * angle
    refocused = np.sin(a / 2) ** 2 if crushed else np.zeros_like(a)
    slope = np.sin(a) / 2 * angle if crushed else np.zeros_like(a)
    diagonal = np.arange(3)
    result[:, :, diagonal, diagonal] = 0.0
    result[0, :, diagonal, diagonal] = [refocused, -refocused, np.cos(a)]
    if "B1" in directions:
        row = 1 + list(directions).index("B1")
        result[row, :, diagonal, diagonal] = [slope, -slope, -np.sin(a) * angle]
    return result


class _Operators(NamedTuple):
    """Time s = t/TRF from 0 to 1 in nodes s_i, and quadrature over [0, s_i] for each of them.

    Attributes:
        nodes: s_i, shape (n,).
        lags: s_i − σ at the quadrature points σ, shape (n, q).
        weights: of the quadrature times values of the interpolating polynomials ℓ_j(σ),
            shape (n, q, n).
        integral: ∫₀^s_i ℓ_j, shape (n, n).
    """

    nodes: Array
    lags: Array
    weights: Array
    integral: Array


@functools.cache
def _operators() -> _Operators:
    nodes = (1 - np.cos(np.pi * np.arange(_NODES) / (_NODES - 1))) / 2
    points, weights = np.polynomial.legendre.leggauss(_QUADRATURE)
    v, dv = (points + 1) / 2, weights / 2
    # Lags s_i v² crowd at 0, where the memory changes fastest.
    lags = nodes[:, None] * v**2
    vandermonde = np.polynomial.chebyshev.chebvander
    values = vandermonde(2 * (nodes[:, None] - lags) - 1, _NODES - 1)
    interpolation = values @ np.linalg.inv(vandermonde(2 * nodes - 1, _NODES - 1))
    weighted = (nodes[:, None] * 2 * v * dv)[..., None] * interpolation
    return _Operators(nodes, lags, weighted, weighted.sum(axis=1))


def _memory(x: Array) -> tuple[Array, Array]:
    """∫₀^s_i K(s_i − σ) ℓ_j(σ) dσ with K(s) = ∫₀ˢ G(x u) du, shape (S, n, n), and ∂/∂x of it."""
    ops = _operators()
    G, integral = _greens_splines()
    t = x[:, None, None] * ops.lags
    K = integral(t) / x[:, None, None]
    dK = (G(t) * ops.lags - K) / x[:, None, None]
    return (
        np.einsum("siq,iqj->sij", K, ops.weights),
        np.einsum("siq,iqj->sij", dK, ops.weights),
    )


@functools.cache
def _greens_splines() -> tuple[BSpline, BSpline]:
    """G(t) and ∫₀ᵗ G as splines: fast, and good to 1e-12."""
    t = np.arange(0, X_RANGE[1] + 1, 1 / 32)
    G = make_interp_spline(t, greens_function(t), k=9)
    return G, G.antiderivative()
