"""Compiled kernels of the two-pool model: one cycle of a pulse train with exact derivatives.

Forward mode throughout: the leading axis of each array holds the value at 0 and its
derivatives along D directions at 1...D. The trailing axis holds LANES parameter sets, which
the processor handles together. A matrix is affine, n rows and n + 1 columns; its last column
multiplies the constant 1.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from fisherprint.models.lineshape import rate

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

LANES = 32

# Fused multiply-add and reassociation; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}

# Rows and columns of the magnetization during a pulse; ys is neglected.
XF, YF, ZF, XS, ZS, ONE = 0, 1, 2, 3, 4, 5
# Between pulses xs is zero: four numbers and the constant carry over.
CARRIED = np.array([XF, YF, ZF, ZS])

# What the kernel takes of a voxel, in this order.
M0S, R1F, R2F, RX, R1S, T2S, B0, B1 = 0, 1, 2, 3, 4, 5, 6, 7
PHYSICAL = ("m0s", "R1f", "R2f", "Rx", "R1s", "T2s", "B0", "B1")

TAYLOR_ORDER = 8
# Rotation angle of one step of the series: its truncation error is 0.35^9 / 9! = 2e-10.
MAX_ROTATION = 0.35
# xs decays fast and is zero before and after a pulse, so its decay R2sl·τ in one step may be
# larger: at 1 the signal is within 2e-10 of exact exponentials and ∂/∂T2s within 2e-8, at 2 they
# are within 6e-8 and 3e-6 (paper's train).
MAX_DECAY = 1.0

# Entries of H that each physical parameter moves.
_MOVED = {
    M0S: ((ZF, ZF), (ZF, ZS), (ZF, ONE), (ZS, ZF), (ZS, ZS), (ZS, ONE)),
    R1F: ((ZF, ZF), (ZF, ONE)),
    R2F: ((XF, XF), (YF, YF)),
    RX: ((ZF, ZF), (ZF, ZS), (ZS, ZF), (ZS, ZS)),
    R1S: ((ZS, ZS), (ZS, ONE)),
    T2S: ((XS, XS),),
    B0: ((XF, YF), (YF, XF)),
    B1: ((XF, ZF), (ZF, XF), (XS, XS), (XS, ZS), (ZS, XS)),
}
_MOST = 15


def entries(seed: Array) -> Integers:
    """Entries of the derivative of H along each direction that can differ from zero.

    Args:
        seed: ∂(physical parameter)/∂(direction), shape (D, 8).

    Returns:
        Rows and columns, shape (D, 15, 2), -1 past the end of each list.
    """
    table = np.full((len(seed), _MOST, 2), -1, dtype=np.int64)
    for d, direction in enumerate(seed):
        moved = sorted({e for q in np.flatnonzero(direction) for e in _MOVED[int(q)]})
        table[d, : len(moved)] = moved
    return table


@numba.njit(cache=True, fastmath=_FAST, nogil=True)
def train_signal(
    tissue: Array,
    seed: Array,
    table: Integers,
    flip_angle: Array,
    pulse_duration: Array,
    repetition_time: float,
    crushed: bool,
    coefficients: Array,
    out: NDArray[np.complex128],
    first: int,
    column: int,
) -> None:
    """Periodic signal of one train for LANES voxels, and its derivatives.

    The propagators of all pulses act on the four basis vectors of the initial state and on the
    constant; the periodic initial state is found at the end, and its samples are combined.

    Args:
        tissue: physical parameters, shape (8, LANES).
        seed: ∂(physical parameter)/∂(direction), shape (D, 8).
        table: the result of `entries(seed)`.
        flip_angle: α in rad, shape (N,), the inversion first.
        pulse_duration: TRF in s, shape (N,).
        repetition_time: TR in s.
        crushed: crushed inversion; else spoiled.
        coefficients: table of the linearized rate.
        out: receives xf + i·yf at the echo of each pulse, shape (S, D + 1, T); contiguous, so
            that there is one compiled kernel and one rounding.
        first: row of `out` for the first of the voxels; those past the last row are left out.
        column: column of `out` for the first pulse.
    """
    n_pulses = flip_angle.size
    n = seed.shape[0] + 1
    H = np.zeros((n, 5, 6, LANES))
    U = np.zeros((n, 5, 6, LANES))
    work = np.zeros((n, 5, 6, LANES))
    transverse = np.zeros((n, 2, LANES))
    longitudinal = np.zeros((n, 2, 3, LANES))
    state = np.zeros((n, 4, 5, LANES))
    scratch = np.zeros((n, 4, 5, LANES))
    samples = np.empty((n_pulses, n, 2, 5, LANES))
    r2sl = np.zeros((3, LANES))
    for i in range(4):
        state[0, i, i, :] = 1.0

    for pulse in range(n_pulses):
        duration = pulse_duration[pulse]
        angle = flip_angle[pulse]
        for lane in range(LANES):
            t2s = tissue[T2S, lane]
            x = duration / t2s
            f, f_x, f_a = rate(coefficients, x, abs(tissue[B1, lane] * angle))
            r2sl[0, lane] = f / t2s
            r2sl[1, lane] = -(f + f_x * x) / t2s**2
            r2sl[2, lane] = f_a * abs(angle) / t2s

        inversion = pulse == 0
        generator(tissue, seed, r2sl, angle / duration, inversion, H)
        U, work = exponential(H, duration, table, U, work)
        if inversion:
            invert(tissue, seed, angle, crushed, U)
        # The crushers of the inversion fill what is left of the repetition time.
        free = repetition_time / 2 if inversion else (repetition_time - duration) / 2
        precession(tissue, seed, free, transverse, longitudinal)
        precess(transverse, longitudinal, state)
        play(U, state, scratch)
        state, scratch = scratch, state
        precess(transverse, longitudinal, state)
        samples[pulse] = state[:, :2]

    combine(samples, periodic(state), out, first, column)


@numba.njit(cache=True, fastmath=_FAST)
def generator(
    tissue: Array, seed: Array, r2sl: Array, omega1: float, inversion: bool, H: Array
) -> None:
    """H of a rectangular pulse of amplitude ω1, and its derivatives, into `H`.

    During the inversion only the semi-solid pool's saturation is kept.
    """
    for lane in range(LANES):
        m0s, R1f, R2f, Rx = (
            tissue[M0S, lane],
            tissue[R1F, lane],
            tissue[R2F, lane],
            tissue[RX, lane],
        )
        R1s, w0, w1 = tissue[R1S, lane], tissue[B0, lane], tissue[B1, lane] * omega1
        m0f = 1 - m0s
        H[0, XS, XS, lane] = -r2sl[0, lane]
        H[0, XS, ZS, lane] = w1
        H[0, ZS, XS, lane] = -w1
        keep = 0.0 if inversion else 1.0
        H[0, XF, XF, lane] = -R2f * keep
        H[0, XF, YF, lane] = -w0 * keep
        H[0, XF, ZF, lane] = w1 * keep
        H[0, YF, XF, lane] = w0 * keep
        H[0, YF, YF, lane] = -R2f * keep
        H[0, ZF, XF, lane] = -w1 * keep
        H[0, ZF, ZF, lane] = (-R1f - Rx * m0s) * keep
        H[0, ZF, ZS, lane] = Rx * m0f * keep
        H[0, ZF, ONE, lane] = R1f * m0f * keep
        H[0, ZS, ZF, lane] = Rx * m0s * keep
        H[0, ZS, ZS, lane] = (-R1s - Rx * m0f) * keep
        H[0, ZS, ONE, lane] = R1s * m0s * keep
    for d in range(1, H.shape[0]):
        direction = seed[d - 1]
        dm0s, dR1f, dR2f, dRx = direction[M0S], direction[R1F], direction[R2F], direction[RX]
        dR1s, dw0, dw1 = direction[R1S], direction[B0], direction[B1] * omega1
        keep = 0.0 if inversion else 1.0
        for lane in range(LANES):
            m0s, Rx = tissue[M0S, lane], tissue[RX, lane]
            m0f = 1 - m0s
            H[d, XS, XS, lane] = -(r2sl[1, lane] * direction[T2S] + r2sl[2, lane] * direction[B1])
            H[d, XS, ZS, lane] = dw1
            H[d, ZS, XS, lane] = -dw1
            H[d, XF, XF, lane] = -dR2f * keep
            H[d, XF, YF, lane] = -dw0 * keep
            H[d, XF, ZF, lane] = dw1 * keep
            H[d, YF, XF, lane] = dw0 * keep
            H[d, YF, YF, lane] = -dR2f * keep
            H[d, ZF, XF, lane] = -dw1 * keep
            H[d, ZF, ZF, lane] = (-dR1f - dRx * m0s - Rx * dm0s) * keep
            H[d, ZF, ZS, lane] = (dRx * m0f - Rx * dm0s) * keep
            H[d, ZF, ONE, lane] = (dR1f * m0f - tissue[R1F, lane] * dm0s) * keep
            H[d, ZS, ZF, lane] = (dRx * m0s + Rx * dm0s) * keep
            H[d, ZS, ZS, lane] = (-dR1s - dRx * m0f + Rx * dm0s) * keep
            H[d, ZS, ONE, lane] = (dR1s * m0s + tissue[R1S, lane] * dm0s) * keep


@numba.njit(cache=True, fastmath=_FAST)
def exponential(
    H: Array, duration: float, table: Integers, U: Array, work: Array
) -> tuple[Array, Array]:
    """exp(H·duration) and its derivatives, the first of the returned; H is scaled in place.

    A Taylor series in Horner's form, U ← 1 + (Hτ/k) U, of the pulse cut into 2^s equal steps,
    then s squarings. The slowest lane sets s.
    """
    squarings = 0
    for lane in range(LANES):
        rotation = np.sqrt(H[0, XS, ZS, lane] ** 2 + H[0, XF, YF, lane] ** 2) * duration
        decay = -H[0, XS, XS, lane] * duration
        free = (-H[0, XF, XF, lane] - H[0, ZF, ZF, lane] - H[0, ZS, ZS, lane]) * duration
        need = max(max(rotation, free) / MAX_ROTATION, decay / MAX_DECAY)
        while need > 2.0**squarings:
            squarings += 1
    H *= duration / 2.0**squarings

    U[:] = 0.0
    for i in range(5):
        U[0, i, i, :] = 1.0
    for k in range(TAYLOR_ORDER, 0, -1):
        for d in range(H.shape[0]):
            multiply_generator(H[0], U[d], d == 0, 1.0 / k, work[d])
            if d > 0:
                add_sparse(H[d], table[d - 1], U[0], 1.0 / k, work[d])
        for i in range(5):
            work[0, i, i, :] += 1.0
        U, work = work, U

    for _ in range(squarings):
        square(U, work)
        U, work = work, U
    return U, work


@numba.njit(cache=True, fastmath=_FAST)
def multiply_generator(H: Array, b: Array, affine: bool, factor: float, out: Array) -> None:
    """Out = factor·H·b by H's structure; `affine` if the last row of b is (0...0, 1)."""
    for j in range(6):
        const = factor if affine and j == ONE else 0.0
        for lane in range(LANES):
            x, y, zf = factor * b[XF, j, lane], factor * b[YF, j, lane], factor * b[ZF, j, lane]
            xs, zs = factor * b[XS, j, lane], factor * b[ZS, j, lane]
            out[XF, j, lane] = H[XF, XF, lane] * x + H[XF, YF, lane] * y + H[XF, ZF, lane] * zf
            out[YF, j, lane] = H[YF, XF, lane] * x + H[YF, YF, lane] * y
            out[ZF, j, lane] = (
                H[ZF, XF, lane] * x
                + H[ZF, ZF, lane] * zf
                + H[ZF, ZS, lane] * zs
                + H[ZF, ONE, lane] * const
            )
            out[XS, j, lane] = H[XS, XS, lane] * xs + H[XS, ZS, lane] * zs
            out[ZS, j, lane] = (
                H[ZS, ZF, lane] * zf
                + H[ZS, XS, lane] * xs
                + H[ZS, ZS, lane] * zs
                + H[ZS, ONE, lane] * const
            )


@numba.njit(cache=True, fastmath=_FAST)
def add_sparse(a: Array, where: Integers, b: Array, factor: float, out: Array) -> None:
    """Out += factor·a·b, where a has the listed entries and the last row of b is (0...0, 1)."""
    for entry in range(where.shape[0]):
        i, k = where[entry, 0], where[entry, 1]
        if i < 0:
            break
        if k == ONE:
            for lane in range(LANES):
                out[i, ONE, lane] += factor * a[i, ONE, lane]
        else:
            for j in range(6):
                for lane in range(LANES):
                    out[i, j, lane] += factor * a[i, k, lane] * b[k, j, lane]


@numba.njit(cache=True, fastmath=_FAST)
def square(a: Array, out: Array) -> None:
    """Square into `out`: a·a for affine 5 x 6 matrices with tangents: d(aa) = da a + a da."""
    for d in range(a.shape[0]):
        for i in range(5):
            for j in range(6):
                for lane in range(LANES):
                    out[d, i, j, lane] = (
                        a[d, i, 0, lane] * a[0, 0, j, lane]
                        + a[d, i, 1, lane] * a[0, 1, j, lane]
                        + a[d, i, 2, lane] * a[0, 2, j, lane]
                        + a[d, i, 3, lane] * a[0, 3, j, lane]
                        + a[d, i, 4, lane] * a[0, 4, j, lane]
                    )
                if d > 0:
                    for lane in range(LANES):
                        out[d, i, j, lane] += (
                            a[0, i, 0, lane] * a[d, 0, j, lane]
                            + a[0, i, 1, lane] * a[d, 1, j, lane]
                            + a[0, i, 2, lane] * a[d, 2, j, lane]
                            + a[0, i, 3, lane] * a[d, 3, j, lane]
                            + a[0, i, 4, lane] * a[d, 4, j, lane]
                        )
            for lane in range(LANES):
                out[d, i, ONE, lane] += a[d, i, ONE, lane]


@numba.njit(cache=True, fastmath=_FAST)
def invert(tissue: Array, seed: Array, angle: float, crushed: bool, U: Array) -> None:
    """Free pool of the inversion: diag(sin²(B1α/2), -sin²(B1α/2), cos(B1α)) if crushed.

    If spoiled, no transverse magnetization enters or leaves: diag(0, 0, cos(B1α)).
    """
    for lane in range(LANES):
        a = tissue[B1, lane] * angle
        refocused = np.sin(a / 2) ** 2 if crushed else 0.0
        U[0, XF, XF, lane] = refocused
        U[0, YF, YF, lane] = -refocused
        U[0, ZF, ZF, lane] = np.cos(a)
        for d in range(1, U.shape[0]):
            da = angle * seed[d - 1, B1]
            slope = np.sin(a) / 2 * da if crushed else 0.0
            U[d, XF, XF, lane] = slope
            U[d, YF, YF, lane] = -slope
            U[d, ZF, ZF, lane] = -np.sin(a) * da


@numba.njit(cache=True, fastmath=_FAST)
def precession(
    tissue: Array, seed: Array, time: float, transverse: Array, longitudinal: Array
) -> None:
    """Free precession for `time`, in closed form, with derivatives.

    `transverse` receives the two parts of exp(-R2f t + i ω0 t); `longitudinal` the affine 2 x 3
    matrix of (zf, zs): recovery of (m0f, m0s) through exp(L t), L the relaxation and exchange.
    With N = L - μ, μ half the trace, N² = δ²: exp(L t) = e^(μt) (C + S N),
    C = cosh(δt), S = sinh(δt)/δ.
    """
    for lane in range(LANES):
        m0s, R1f, R2f, Rx = (
            tissue[M0S, lane],
            tissue[R1F, lane],
            tissue[R2F, lane],
            tissue[RX, lane],
        )
        R1s, w0 = tissue[R1S, lane], tissue[B0, lane]
        m0f = 1 - m0s

        decay = np.exp(-R2f * time)
        c, s = decay * np.cos(w0 * time), decay * np.sin(w0 * time)
        transverse[0, 0, lane], transverse[0, 1, lane] = c, s

        a, b = -R1f - Rx * m0s, Rx * m0f
        p, q = Rx * m0s, -R1s - Rx * m0f
        mu, n11 = (a + q) / 2, (a - q) / 2
        delta2 = n11 * n11 + b * p
        x = delta2 * time * time
        if x < 0.01:
            # Series: the closed form loses digits and its derivative divides by zero.
            C = 1 + x / 2 * (1 + x / 12 * (1 + x / 30 * (1 + x / 56)))
            S = time * (1 + x / 6 * (1 + x / 20 * (1 + x / 42 * (1 + x / 72))))
            S_x = time**3 / 6 * (1 + x / 10 * (1 + x / 28 * (1 + x / 54)))
        else:
            delta = np.sqrt(delta2)
            C = np.cosh(delta * time)
            S = np.sinh(delta * time) / delta
            S_x = (time * C - S) / (2 * delta2)
        growth = np.exp(mu * time)
        E = (growth * (C + S * n11), growth * S * b, growth * S * p, growth * (C - S * n11))
        longitudinal[0, 0, 0, lane], longitudinal[0, 0, 1, lane] = E[0], E[1]
        longitudinal[0, 1, 0, lane], longitudinal[0, 1, 1, lane] = E[2], E[3]
        longitudinal[0, 0, 2, lane] = m0f - E[0] * m0f - E[1] * m0s
        longitudinal[0, 1, 2, lane] = m0s - E[2] * m0f - E[3] * m0s

        for d in range(1, transverse.shape[0]):
            direction = seed[d - 1]
            dm0s, dRx = direction[M0S], direction[RX]
            shrink, turn = -direction[R2F] * time, direction[B0] * time
            transverse[d, 0, lane] = shrink * c - turn * s
            transverse[d, 1, lane] = shrink * s + turn * c

            da, db = -direction[R1F] - dRx * m0s - Rx * dm0s, dRx * m0f - Rx * dm0s
            dp, dq = dRx * m0s + Rx * dm0s, -direction[R1S] - dRx * m0f + Rx * dm0s
            dn11 = (da - dq) / 2
            ddelta2 = 2 * n11 * dn11 + db * p + b * dp
            dgrowth = (da + dq) / 2 * time
            dC, dS = time * S / 2 * ddelta2, S_x * ddelta2
            dE = (
                dgrowth * E[0] + growth * (dC + dS * n11 + S * dn11),
                dgrowth * E[1] + growth * (dS * b + S * db),
                dgrowth * E[2] + growth * (dS * p + S * dp),
                dgrowth * E[3] + growth * (dC - dS * n11 - S * dn11),
            )
            longitudinal[d, 0, 0, lane], longitudinal[d, 0, 1, lane] = dE[0], dE[1]
            longitudinal[d, 1, 0, lane], longitudinal[d, 1, 1, lane] = dE[2], dE[3]
            longitudinal[d, 0, 2, lane] = -dm0s - dE[0] * m0f - dE[1] * m0s + (E[0] - E[1]) * dm0s
            longitudinal[d, 1, 2, lane] = dm0s - dE[2] * m0f - dE[3] * m0s + (E[2] - E[3]) * dm0s


@numba.njit(cache=True, fastmath=_FAST)
def precess(transverse: Array, longitudinal: Array, state: Array) -> None:
    """Apply the free precession to the carried state, in place."""
    # Tangents first: they need the value from before.
    for d in range(state.shape[0] - 1, -1, -1):
        for j in range(5):
            const = 1.0 if j == 4 else 0.0
            for lane in range(LANES):
                c, s = transverse[0, 0, lane], transverse[0, 1, lane]
                x, y = state[d, 0, j, lane], state[d, 1, j, lane]
                zf, zs = state[d, 2, j, lane], state[d, 3, j, lane]
                state[d, 0, j, lane] = c * x - s * y
                state[d, 1, j, lane] = s * x + c * y
                state[d, 2, j, lane] = (
                    longitudinal[0, 0, 0, lane] * zf
                    + longitudinal[0, 0, 1, lane] * zs
                    + longitudinal[d, 0, 2, lane] * const
                )
                state[d, 3, j, lane] = (
                    longitudinal[0, 1, 0, lane] * zf
                    + longitudinal[0, 1, 1, lane] * zs
                    + longitudinal[d, 1, 2, lane] * const
                )
            if d > 0:
                for lane in range(LANES):
                    c, s = transverse[d, 0, lane], transverse[d, 1, lane]
                    x, y = state[0, 0, j, lane], state[0, 1, j, lane]
                    zf, zs = state[0, 2, j, lane], state[0, 3, j, lane]
                    state[d, 0, j, lane] += c * x - s * y
                    state[d, 1, j, lane] += s * x + c * y
                    state[d, 2, j, lane] += (
                        longitudinal[d, 0, 0, lane] * zf + longitudinal[d, 0, 1, lane] * zs
                    )
                    state[d, 3, j, lane] += (
                        longitudinal[d, 1, 0, lane] * zf + longitudinal[d, 1, 1, lane] * zs
                    )


@numba.njit(cache=True, fastmath=_FAST)
def play(U: Array, state: Array, out: Array) -> None:
    """Apply the phase increment π, then a pulse, to the carried state: out = U·rot(π)·state."""
    for d in range(state.shape[0]):
        for row in range(4):
            i = CARRIED[row]
            for j in range(5):
                const = 1.0 if j == 4 else 0.0
                for lane in range(LANES):
                    out[d, row, j, lane] = (
                        -U[0, i, XF, lane] * state[d, 0, j, lane]
                        - U[0, i, YF, lane] * state[d, 1, j, lane]
                        + U[0, i, ZF, lane] * state[d, 2, j, lane]
                        + U[0, i, ZS, lane] * state[d, 3, j, lane]
                        + const * U[d, i, ONE, lane]
                    )
                if d > 0:
                    for lane in range(LANES):
                        out[d, row, j, lane] += (
                            -U[d, i, XF, lane] * state[0, 0, j, lane]
                            - U[d, i, YF, lane] * state[0, 1, j, lane]
                            + U[d, i, ZF, lane] * state[0, 2, j, lane]
                            + U[d, i, ZS, lane] * state[0, 3, j, lane]
                        )


@numba.njit(cache=True)
def periodic(state: Array) -> Array:
    """The state that a whole cycle m ← A m + b reproduces, (1 - A) m = b, with derivatives.

    dm solves the same system with dA m + db on the right. Shape (D + 1, 4, LANES).
    """
    n = state.shape[0]
    start = np.empty((n, 4, LANES))
    right = np.empty((4, n - 1))
    for lane in range(LANES):
        left = np.eye(4) - state[0, :, :4, lane]
        m = np.linalg.solve(left, np.ascontiguousarray(state[0, :, 4, lane]))
        start[0, :, lane] = m
        for d in range(1, n):
            for i in range(4):
                right[i, d - 1] = state[d, i, 4, lane]
                for j in range(4):
                    right[i, d - 1] += state[d, i, j, lane] * m[j]
        if n > 1:
            start[1:, :, lane] = np.linalg.solve(left, right).T
    return start


@numba.njit(cache=True, fastmath=_FAST)
def combine(
    samples: Array, start: Array, out: NDArray[np.complex128], first: int, column: int
) -> None:
    """Samples of the basis vectors at the periodic state: s = Φ m + b, ds = dΦ m + Φ dm + db."""
    n_pulses, n = samples.shape[0], samples.shape[1]
    echo = np.empty((2, LANES))
    for pulse in range(n_pulses):
        for d in range(n):
            for part in range(2):
                for lane in range(LANES):
                    echo[part, lane] = samples[pulse, d, part, 4, lane]
                for j in range(4):
                    for lane in range(LANES):
                        echo[part, lane] += samples[pulse, d, part, j, lane] * start[0, j, lane]
                    if d > 0:
                        for lane in range(LANES):
                            echo[part, lane] += (
                                samples[pulse, 0, part, j, lane] * start[d, j, lane]
                            )
            for lane in range(min(LANES, out.shape[0] - first)):
                out[first + lane, d, column + pulse] = complex(echo[0, lane], echo[1, lane])
