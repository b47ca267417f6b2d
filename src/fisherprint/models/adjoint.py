"""Compiled adjoint of a cycle: from a slope by each sample to a slope by each pulse.

The reverse of `kernels.train_signal`. A number J depends on the signal and on its derivatives by
the parameters; given ∂J/∂(each sample of each of them), one backward pass over the cycle gives
∂J/∂(flip angle) and ∂J/∂(pulse duration) of every pulse at once, exactly, as in optimal control.

State y = (m, ∂m/∂θ_1 ... ∂m/∂θ_D), costate ν = ∂J/∂y. One repetition is y ← Φ(u) y with the
controls u = (α, TRF), so backwards

    ∂J/∂u += νᵀ (∂Φ/∂u) y,    ν ← Φᵀ ν + ∂J/∂(sample),

and the cycle closes: y_N = y_0. A Lagrange multiplier κ of that condition is the costate at the
end, (1 - 𝒜ᵀ) κ = g, where 𝒜 is the cycle and g the costate at its start if it ends with zero.
𝒜 is block-triangular: the blocks of the derivatives are solved first, with the samples of the
basis vectors of the first pass; that of the magnetization after a backward pass for all, whose
missing part a second backward pass adds, of the magnetization alone.

Each function named *_back is the transpose of its namesake in `kernels`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from fisherprint.models.kernels import (
    _ENTRIES,
    _EXCHANGE,
    _FAST,
    _SLOPES,
    _TRANSVERSE,
    B0,
    B1,
    BY_B0,
    BY_B1,
    BY_M0S,
    BY_R1F,
    BY_R1S,
    BY_R2F,
    BY_RX,
    BY_T2S,
    CARRIED,
    GRAHAM,
    H_B0,
    H_B1,
    H_SATURATE,
    H_TRANSVERSE,
    H_XS,
    H_XS_BY_B1,
    H_XS_BY_T2S,
    H_Z,
    H_Z_ZS,
    H_ZS,
    H_ZS_BY_B1,
    H_ZS_BY_T2S,
    H_ZS_Z,
    LANES,
    LINEARIZED,
    M0S,
    R1F,
    R1S,
    R2F,
    RX,
    SINGLE,
    T2S,
    XS,
    ZS,
    X,
    Y,
    Z,
    drop_xs,
    first_pass,
    generator,
    periodic,
    periodic_slopes,
    precess_all,
    prepared,
    put,
    scaled,
    second_pass,
    series,
    solve,
    step,
)
from fisherprint.models.lineshape import graham_bends, rate_bends

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

FLIP_ANGLE, PULSE_DURATION = range(2)
"""Rows of the result."""

# Slopes that a pulse gathers: by the time of precession beside it; by the length and angle of its
# rotation; by its saturation rate R, ∂R/∂T2s and ∂R/∂B1.
_FREE_TIME, _TIME, _ANGLE, _RATE, _RATE_T2S, _RATE_B1 = range(6)


@numba.njit(cache=True, fastmath=_FAST, nogil=True)
def train_gradient(
    tissue: Array,
    saturation: int,
    crushed: bool,
    flip_angle: Array,
    pulse_duration: Array,
    free_time: Array,
    which_time: Integers,
    phase: tuple[float, float],
    table: Array,
    scale: Array,
    place: Integers,
    by_sample: NDArray[np.complex128],
    out: Array,
    first: int,
    column: int,
) -> None:
    """Slope by all flip angles and durations of a train, for LANES voxels.

    Args:
        tissue: physical parameters, shape (8, LANES).
        saturation: SINGLE, LINEARIZED or GRAHAM.
        crushed: crushed inversion; else spoiled.
        flip_angle: α in rad, shape (N,), the inversion first.
        pulse_duration: TRF in s, shape (N,).
        free_time: the different times of free precession beside a pulse, in s.
        which_time: which of them belongs to each pulse, shape (N,).
        phase: cosine and sine of the phase increment.
        table: of the saturation.
        scale: what multiplies the derivatives, shape (D, LANES), as for `train_signal`.
        place: their places in `by_sample`, shape (D,).
        by_sample: ∂J/∂Re + i ∂J/∂Im of the signal and of its derivatives, shape (S, D + 1, T).
        out: receives ∂J/∂α in 1/rad and ∂J/∂TRF in 1/s, shape (S, 2, T).
        first: row of `by_sample` and `out` for the first of the voxels.
        column: their column for the first pulse.
    """
    n_pulses, n_directions = flip_angle.size, place.size
    free, rates = prepared(tissue, saturation, flip_angle, pulse_duration, free_time, table, True)
    samples, last = first_pass(
        tissue, saturation, crushed, flip_angle, pulse_duration, free, which_time, phase, rates
    )
    left, start = periodic(last)
    carried = start.shape[0]
    slopes = np.zeros((n_directions, carried, LANES))
    states = np.zeros((n_pulses, 1 + n_directions, CARRIED, LANES))
    # From derivatives of zero to the periodic ones; then with these. Once if there are none.
    passes = 2 if n_directions > 0 else 1
    for repeat in range(passes):
        _, end = second_pass(
            tissue,
            saturation,
            crushed,
            flip_angle,
            pulse_duration,
            free,
            free_time,
            which_time,
            phase,
            rates,
            start,
            slopes,
            states,
        )
        if repeat < passes - 1:
            slopes = periodic_slopes(left, end)

    n_voxels = min(LANES, out.shape[0] - first)
    seeds = np.zeros((n_pulses, 1 + n_directions, 2, LANES))
    for lane in range(n_voxels):
        for p in range(1 + n_directions):
            row = 0 if p == 0 else place[p - 1]
            factor = 1.0 if p == 0 else scale[p - 1, lane]
            for i in range(n_pulses):
                slope = by_sample[first + lane, row, column + i]
                seeds[i, p, 0, lane] = factor * slope.real
                seeds[i, p, 1, lane] = factor * slope.imag

    # Costates at the end of the cycle: of the derivatives now, of the magnetization once the
    # costate is known that it leaves at the start, or now if there are no derivatives.
    start_costate = np.zeros((1 + n_directions, carried, LANES))
    for i in range(n_pulses):
        for p in range(passes - 1, 1 + n_directions):
            for j in range(carried):
                for lane in range(LANES):
                    start_costate[p, j, lane] += (
                        samples[i, 0, j, lane] * seeds[i, p, 0, lane]
                        + samples[i, 1, j, lane] * seeds[i, p, 1, lane]
                    )
    costate = np.zeros((1 + n_directions, 5, LANES))
    closing(left, start_costate, costate)
    if n_directions > 0:
        for j in range(costate.shape[1]):
            for lane in range(LANES):
                costate[0, j, lane] = 0.0
    gathered = np.zeros((n_pulses, 6, LANES))
    # The second time without derivatives and samples: what the closing adds.
    for repeat in range(passes):
        backward_pass(
            tissue,
            saturation,
            crushed,
            flip_angle,
            pulse_duration,
            free,
            free_time,
            which_time,
            phase,
            rates,
            states,
            seeds,
            costate,
            gathered,
        )
        if repeat < passes - 1:
            left_over = np.zeros((1, carried, LANES))
            put(costate[0], left_over[0])
            costate = np.zeros((1, 5, LANES))
            closing(left, left_over, costate)
            states = np.ascontiguousarray(states[:, :1])
            seeds = np.zeros((n_pulses, 1, 2, LANES))
    for i in range(n_pulses):
        controls(
            tissue,
            saturation,
            flip_angle[i],
            pulse_duration[i],
            table,
            rates[i],
            i == 0,
            gathered[i],
        )
        for row in range(2):
            for lane in range(n_voxels):
                out[first + lane, row, column + i] = gathered[i, row, lane]


@numba.njit(fastmath=_FAST, forceinline=True)
def closing(left: Array, start: Array, end: Array) -> None:
    """The costates (1 - A)⁻ᵀ g that close the cycle, from those at its start.

    Args:
        left: 1 - A, of `kernels.periodic`.
        start: g, shape (vectors, C, LANES); overwritten.
        end: receives them, shape (vectors, 5, LANES).
    """
    solve(left, True, start)
    for p in range(start.shape[0]):
        put(start[p], end[p])


@numba.njit(fastmath=_FAST, forceinline=True)
def backward_pass(
    tissue: Array,
    saturation: int,
    crushed: bool,
    flip_angle: Array,
    pulse_duration: Array,
    free: Array,
    free_time: Array,
    which_time: Integers,
    phase: tuple[float, float],
    rates: Array,
    states: Array,
    seeds: Array,
    costate: Array,
    gathered: Array,
) -> None:
    """From the costate at the end of the cycle to that at its start, gathering slopes.

    Of the arguments that `train_gradient` has not, `states` are magnetization and derivatives at
    the echoes, shape (N, 1 + D, 4, LANES), `seeds` ∂J/∂(x and y at the echoes), (N, 1 + D, 2,
    LANES). The costate at the end, (1 + D, 5, LANES), becomes that at the start, and `gathered`,
    (N, 6, LANES), receives the slopes of each pulse, added to what it has.
    """
    two = saturation != SINGLE
    n_pulses, n_directions = flip_angle.size, states.shape[1] - 1
    # Large enough for all pulses.
    most_steps, most_terms = 1, 1
    for i in range(n_pulses):
        steps, order, _ = series(tissue, rates[i], pulse_duration[i], flip_angle[i])
        most_steps, most_terms = max(most_steps, steps), max(most_terms, order)
    h = np.zeros((_ENTRIES, LANES))
    m = np.zeros((1, 5, LANES))
    r = np.zeros((1, 5, LANES))
    dm = np.zeros((n_directions, 5, LANES))
    dr = np.zeros((n_directions, 5, LANES))
    terms = np.empty((most_steps, most_terms + 1, 1 + n_directions, 5, LANES))
    ones = np.empty(most_terms + 1)
    now = np.zeros((1 + n_directions, 5, LANES))
    then = np.zeros((1 + n_directions, 5, LANES))
    own = np.zeros((6, LANES))
    for i in range(n_pulses - 1, -1, -1):
        for row in range(6):
            for lane in range(LANES):
                own[row, lane] = 0.0
        f, time = free[which_time[i]], free_time[which_time[i]]
        for p in range(1 + n_directions):
            for lane in range(LANES):
                costate[p, X, lane] += seeds[i, p, 0, lane]
                costate[p, Y, lane] += seeds[i, p, 1, lane]
        # At the echo, which is the end of the precession after the pulse.
        put(states[i, 0], m[0])
        for p in range(n_directions):
            put(states[i, 1 + p], dm[p])
        by_time(tissue, two, 1.0, 1.0, m[0], dm, costate, own[_FREE_TIME])
        precess_all_back(f, time, (1.0, 0.0), two, costate)

        # The state before the pulse, from the echo before it; the first follows the last.
        put(states[i - 1, 0], m[0])
        for p in range(n_directions):
            put(states[i - 1, 1 + p], dm[p])
        precess_all(f, time, phase, two, m, dm)
        drop_xs(m)
        drop_xs(dm)
        steps, order, shift = series(tissue, rates[i], pulse_duration[i], flip_angle[i])
        tau, angle = pulse_duration[i] / steps, flip_angle[i] / steps
        generator(tissue, saturation, rates[i], tau, angle, shift, i == 0, h)
        ones[order] = 1.0
        for k in range(order, 1, -1):
            ones[k - 1] = 1.0 + shift / k * ones[k]
        for s in range(steps):
            step(tissue, saturation, h, tau, angle, shift, order, i == 0, m, dm, r, dr, terms[s])
        if i == 0:
            invert_back(tissue, flip_angle[0], crushed, m[0], dm, costate, gathered[0, _ANGLE])
        drop_xs(costate)
        for s in range(steps - 1, -1, -1):
            scaled(costate, np.exp(-shift), now)
            scaled(now, 1.0, costate)
            for k in range(1, order + 1):
                by_pulse(
                    tissue,
                    saturation,
                    tau,
                    i == 0,
                    1.0 / k,
                    ones[k],
                    terms[s, k, 0],
                    terms[s, k, 1:],
                    now,
                    own,
                )
                term_back(h, 1.0 / k, now, then)
                if n_directions > 0:
                    if i > 0:
                        free_source_back(tissue, two, tau / k, angle / k, now, then)
                    if two:
                        turn = 0.0 if saturation == GRAHAM else angle
                        semisolid_source_back(h, 1.0 / k, turn, now, then)
                now, then = then, now
                for p in range(1 + n_directions):
                    for j in range(5):
                        for lane in range(LANES):
                            costate[p, j, lane] += now[p, j, lane]
        # Each step has its part of the length and of the angle.
        for lane in range(LANES):
            own[_TIME, lane] /= steps
            own[_ANGLE, lane] /= steps

        drop_xs(costate)
        # The first of the terms is the state before the pulse.
        put(terms[0, order, 0], m[0])
        for p in range(n_directions):
            put(terms[0, order, 1 + p], dm[p])
        by_time(tissue, two, 1.0, 1.0, m[0], dm, costate, own[_FREE_TIME])
        precess_all_back(f, time, phase, two, costate)
        for row in range(6):
            for lane in range(LANES):
                gathered[i, row, lane] += own[row, lane]


@numba.njit(fastmath=_FAST, forceinline=True)
def by_time(
    tissue: Array,
    two: bool,
    c: float,
    one: float,
    m: Array,
    dm: Array,
    costate: Array,
    out: Array,
) -> None:
    """Add c νᵀ K y, with K the generator of free precession: the slope by its time."""
    for lane in range(LANES):
        a, b = tissue[R2F, lane], tissue[B0, lane]
        x, y = m[X, lane], m[Y, lane]
        out[lane] += c * (
            costate[0, X, lane] * (-a * x - b * y) + costate[0, Y, lane] * (b * x - a * y)
        )
    for lane in range(LANES):
        m0s, R1f, Rx = tissue[M0S, lane], tissue[R1F, lane], tissue[RX, lane]
        R1s, z, zs = tissue[R1S, lane], m[Z, lane], m[ZS, lane]
        moved = Rx * ((1 - m0s) * zs - m0s * z)
        out[lane] += c * (
            costate[0, Z, lane] * (R1f * ((1 - m0s) * one - z) + moved)
            + costate[0, ZS, lane] * (R1s * (m0s * one - zs) - moved)
        )
    if dm.shape[0] == 0:
        return
    for p in range(dm.shape[0]):
        for lane in range(LANES):
            a, b = tissue[R2F, lane], tissue[B0, lane]
            m0s, Rx = tissue[M0S, lane], tissue[RX, lane]
            x, y = dm[p, X, lane], dm[p, Y, lane]
            z, zs = dm[p, Z, lane], dm[p, ZS, lane]
            moved = Rx * ((1 - m0s) * zs - m0s * z)
            out[lane] += c * (
                costate[1 + p, X, lane] * (-a * x - b * y)
                + costate[1 + p, Y, lane] * (b * x - a * y)
                + costate[1 + p, Z, lane] * (moved - tissue[R1F, lane] * z)
                + costate[1 + p, ZS, lane] * (-moved - tissue[R1S, lane] * zs)
            )
    # What K contributes by its own dependence on the parameters.
    for lane in range(LANES):
        x, y, z = m[X, lane], m[Y, lane], m[Z, lane]
        out[lane] += c * (
            costate[1 + BY_B0, Y, lane] * x
            - costate[1 + BY_B0, X, lane] * y
            - costate[1 + BY_R2F, X, lane] * x
            - costate[1 + BY_R2F, Y, lane] * y
            + costate[1 + BY_R1F, Z, lane] * ((1 - tissue[M0S, lane]) * one - z)
        )
    if two:
        row = 1 + (BY_R1S if dm.shape[0] > BY_R1S else BY_R1F)
        for lane in range(LANES):
            m0s, z, zs = tissue[M0S, lane], m[Z, lane], m[ZS, lane]
            moved = tissue[RX, lane] * (z + zs)
            out[lane] += c * (
                costate[1 + BY_M0S, ZS, lane] * (moved + tissue[R1S, lane] * one)
                - costate[1 + BY_M0S, Z, lane] * (moved + tissue[R1F, lane] * one)
                + (costate[1 + BY_RX, Z, lane] - costate[1 + BY_RX, ZS, lane])
                * ((1 - m0s) * zs - m0s * z)
                + costate[row, ZS, lane] * (m0s * one - zs)
            )


@numba.njit(fastmath=_FAST, forceinline=True)
def by_pulse(
    tissue: Array,
    saturation: int,
    tau: float,
    inversion: bool,
    c: float,
    one: float,
    m: Array,
    dm: Array,
    costate: Array,
    gathered: Array,
) -> None:
    """Add c νᵀ (∂(Hτ)/∂u) y for the time τ, the angle of the rotation, and the saturation."""
    if not inversion:
        by_time(tissue, saturation != SINGLE, c, one, m, dm, costate, gathered[_TIME])
        for lane in range(LANES):
            turned = costate[0, X, lane] * m[Z, lane] - costate[0, Z, lane] * m[X, lane]
            gathered[_ANGLE, lane] += c * tissue[B1, lane] * turned
        for p in range(dm.shape[0]):
            for lane in range(LANES):
                turned = (
                    costate[1 + p, X, lane] * dm[p, Z, lane]
                    - costate[1 + p, Z, lane] * dm[p, X, lane]
                )
                gathered[_ANGLE, lane] += c * tissue[B1, lane] * turned
        if dm.shape[0] > 0:
            for lane in range(LANES):
                gathered[_ANGLE, lane] += c * (
                    costate[1 + BY_B1, X, lane] * m[Z, lane]
                    - costate[1 + BY_B1, Z, lane] * m[X, lane]
                )
    if saturation == SINGLE:
        return
    # The component that decays with the rate.
    decays = ZS if saturation == GRAHAM else XS
    for lane in range(LANES):
        gathered[_RATE, lane] -= c * tau * costate[0, decays, lane] * m[decays, lane]
    for p in range(dm.shape[0]):
        for lane in range(LANES):
            gathered[_RATE, lane] -= c * tau * costate[1 + p, decays, lane] * dm[p, decays, lane]
    if dm.shape[0] > 0:
        for lane in range(LANES):
            y = c * tau * m[decays, lane]
            gathered[_RATE_T2S, lane] -= costate[1 + BY_T2S, decays, lane] * y
            gathered[_RATE_B1, lane] -= costate[1 + BY_B1, decays, lane] * y
    if saturation == LINEARIZED:
        for lane in range(LANES):
            turned = costate[0, XS, lane] * m[ZS, lane] - costate[0, ZS, lane] * m[XS, lane]
            gathered[_ANGLE, lane] += c * tissue[B1, lane] * turned
        for p in range(dm.shape[0]):
            for lane in range(LANES):
                turned = (
                    costate[1 + p, XS, lane] * dm[p, ZS, lane]
                    - costate[1 + p, ZS, lane] * dm[p, XS, lane]
                )
                gathered[_ANGLE, lane] += c * tissue[B1, lane] * turned
        if dm.shape[0] > 0:
            for lane in range(LANES):
                gathered[_ANGLE, lane] += c * (
                    costate[1 + BY_B1, XS, lane] * m[ZS, lane]
                    - costate[1 + BY_B1, ZS, lane] * m[XS, lane]
                )


@numba.njit(fastmath=_FAST, forceinline=True)
def term_back(h: Array, c: float, costate: Array, out: Array) -> None:
    """Write out = c (Hτ)ᵀ ν for all vectors."""
    for j in range(costate.shape[0]):
        for lane in range(LANES):
            x, y, z = costate[j, X, lane], costate[j, Y, lane], costate[j, Z, lane]
            zs, xs = costate[j, ZS, lane], costate[j, XS, lane]
            out[j, X, lane] = c * (
                h[H_TRANSVERSE, lane] * x + h[H_B0, lane] * y - h[H_B1, lane] * z
            )
            out[j, Y, lane] = c * (h[H_TRANSVERSE, lane] * y - h[H_B0, lane] * x)
            out[j, Z, lane] = c * (h[H_Z, lane] * z + h[H_B1, lane] * x + h[H_ZS_Z, lane] * zs)
            out[j, ZS, lane] = c * (
                h[H_ZS, lane] * zs + h[H_Z_ZS, lane] * z + h[H_SATURATE, lane] * xs
            )
            out[j, XS, lane] = c * (h[H_XS, lane] * xs - h[H_SATURATE, lane] * zs)


@numba.njit(fastmath=_FAST, forceinline=True)
def free_source_back(
    tissue: Array, two: bool, tau: float, angle: float, costate: Array, out: Array
) -> None:
    """Add to the costate of the magnetization what the derivatives owe to it.

    The transposes of `kernels.free_source` and `kernels.exchange_source`.
    """
    for lane in range(LANES):
        out[0, X, lane] += (
            tau * (costate[1 + BY_B0, Y, lane] - costate[1 + BY_R2F, X, lane])
            - angle * costate[1 + BY_B1, Z, lane]
        )
        out[0, Y, lane] -= tau * (costate[1 + BY_R2F, Y, lane] + costate[1 + BY_B0, X, lane])
        out[0, Z, lane] += angle * costate[1 + BY_B1, X, lane] - tau * costate[1 + BY_R1F, Z, lane]
    if two:
        row = 1 + (BY_R1S if costate.shape[0] > 1 + BY_R1S else BY_R1F)
        for lane in range(LANES):
            m0s = tissue[M0S, lane]
            by_m0s = tissue[RX, lane] * (
                costate[1 + BY_M0S, ZS, lane] - costate[1 + BY_M0S, Z, lane]
            )
            by_rx = costate[1 + BY_RX, Z, lane] - costate[1 + BY_RX, ZS, lane]
            out[0, Z, lane] += tau * (by_m0s - m0s * by_rx)
            out[0, ZS, lane] += tau * (by_m0s + (1 - m0s) * by_rx - costate[row, ZS, lane])


@numba.njit(fastmath=_FAST, forceinline=True)
def semisolid_source_back(h: Array, c: float, angle: float, costate: Array, out: Array) -> None:
    """The transpose of `kernels.semisolid_source`."""
    for lane in range(LANES):
        zs_b1, xs_b1 = costate[1 + BY_B1, ZS, lane], costate[1 + BY_B1, XS, lane]
        zs_t2s, xs_t2s = costate[1 + BY_T2S, ZS, lane], costate[1 + BY_T2S, XS, lane]
        out[0, ZS, lane] += c * (
            h[H_ZS_BY_B1, lane] * zs_b1 + angle * xs_b1 + h[H_ZS_BY_T2S, lane] * zs_t2s
        )
        out[0, XS, lane] += c * (
            h[H_XS_BY_B1, lane] * xs_b1 - angle * zs_b1 + h[H_XS_BY_T2S, lane] * xs_t2s
        )


@numba.njit(fastmath=_FAST, forceinline=True)
def invert_back(
    tissue: Array,
    angle: float,
    crushed: bool,
    m: Array,
    dm: Array,
    costate: Array,
    by_angle: Array,
) -> None:
    """Transposes of `kernels.invert` and `kernels.invert_source`; the slope by the angle is added.

    Magnetization m and derivatives dm are those before the inversion of the free pool; the
    costate after it becomes that before it.
    """
    for lane in range(LANES):
        b1 = tissue[B1, lane]
        a = b1 * angle
        sine, cosine = np.sin(a), np.cos(a)
        refocused = np.sin(a / 2) ** 2 if crushed else 0.0
        slope, bend = (sine / 2, cosine / 2) if crushed else (0.0, 0.0)
        if dm.shape[0] > 0:
            x, y = costate[1 + BY_B1, X, lane], costate[1 + BY_B1, Y, lane]
            z = costate[1 + BY_B1, Z, lane]
            by_angle[lane] += (x * m[X, lane] - y * m[Y, lane]) * (slope + bend * a) - (
                z * m[Z, lane] * (sine + cosine * a)
            )
        for j in range(costate.shape[0]):
            x = m[X, lane] if j == 0 else dm[j - 1, X, lane]
            y = m[Y, lane] if j == 0 else dm[j - 1, Y, lane]
            z = m[Z, lane] if j == 0 else dm[j - 1, Z, lane]
            by_angle[lane] += b1 * (
                slope * (costate[j, X, lane] * x - costate[j, Y, lane] * y)
                - sine * costate[j, Z, lane] * z
            )
        costate[0, X, lane] *= refocused
        costate[0, Y, lane] *= -refocused
        costate[0, Z, lane] *= cosine
        if dm.shape[0] > 0:
            costate[0, X, lane] += slope * angle * costate[1 + BY_B1, X, lane]
            costate[0, Y, lane] -= slope * angle * costate[1 + BY_B1, Y, lane]
            costate[0, Z, lane] -= sine * angle * costate[1 + BY_B1, Z, lane]
        for j in range(1, costate.shape[0]):
            costate[j, X, lane] *= refocused
            costate[j, Y, lane] *= -refocused
            costate[j, Z, lane] *= cosine


@numba.njit(fastmath=_FAST, forceinline=True)
def precess_all_back(
    free: Array, time: float, phase: tuple[float, float], two: bool, costate: Array
) -> None:
    """Transpose of `kernels.precess_all`, in place."""
    n_directions = costate.shape[0] - 1
    if n_directions > 0:
        # The derivatives by R2f and ω0 come from the magnetization after the precession.
        for lane in range(LANES):
            costate[0, X, lane] += time * (
                costate[1 + BY_B0, Y, lane] - costate[1 + BY_R2F, X, lane]
            )
            costate[0, Y, lane] -= time * (
                costate[1 + BY_R2F, Y, lane] + costate[1 + BY_B0, X, lane]
            )
    for j in range(1 + n_directions):
        for lane in range(LANES):
            c = free[_TRANSVERSE, lane] * phase[0] - free[_TRANSVERSE + 1, lane] * phase[1]
            s = free[_TRANSVERSE, lane] * phase[1] + free[_TRANSVERSE + 1, lane] * phase[0]
            x, y = costate[j, X, lane], costate[j, Y, lane]
            costate[j, X, lane] = c * x + s * y
            costate[j, Y, lane] = c * y - s * x
    # The longitudinal ones of the magnetization, from those of the derivatives before they change.
    for lane in range(LANES):
        z, zs = costate[0, Z, lane], costate[0, ZS, lane]
        costate[0, Z, lane] = free[_EXCHANGE, lane] * z + free[_EXCHANGE + 2, lane] * zs
        costate[0, ZS, lane] = free[_EXCHANGE + 1, lane] * z + free[_EXCHANGE + 3, lane] * zs
    if n_directions > 0:
        if two:
            recover_back(free, _SLOPES, costate, BY_M0S)
            recover_back(free, _SLOPES + 6, costate, BY_RX)
            row = BY_R1S if n_directions > BY_R1S else BY_R1F
            recover_back(free, _SLOPES + 18, costate, row)
        recover_back(free, _SLOPES + 12, costate, BY_R1F)
    for j in range(1, 1 + n_directions):
        for lane in range(LANES):
            z, zs = costate[j, Z, lane], costate[j, ZS, lane]
            costate[j, Z, lane] = free[_EXCHANGE, lane] * z + free[_EXCHANGE + 2, lane] * zs
            costate[j, ZS, lane] = free[_EXCHANGE + 1, lane] * z + free[_EXCHANGE + 3, lane] * zs


@numba.njit(fastmath=_FAST, forceinline=True)
def recover_back(free: Array, slope: int, costate: Array, row: int) -> None:
    """Transpose of `kernels.recover`."""
    for lane in range(LANES):
        z, zs = costate[1 + row, Z, lane], costate[1 + row, ZS, lane]
        costate[0, Z, lane] += free[slope, lane] * z + free[slope + 2, lane] * zs
        costate[0, ZS, lane] += free[slope + 1, lane] * z + free[slope + 3, lane] * zs


@numba.njit(fastmath=_FAST, forceinline=True)
def controls(
    tissue: Array,
    saturation: int,
    angle: float,
    duration: float,
    table: Array,
    rates: Array,
    inversion: bool,
    gathered: Array,
) -> None:
    """From the gathered slopes to those by flip angle and duration, into the first two rows.

    A longer pulse leaves less time before and after it, except beside an inversion, whose
    crushers fill the repetition. With R = f(x, a)/T2s, x = TRF/T2s and a = B1 |α|:

        ∂R/∂T2s = -(f + x f_x)/T2s²,    ∂R/∂B1 = f_a |α|/T2s.
    """
    for lane in range(LANES):
        by_duration = gathered[_TIME, lane] - (
            0.0 if inversion else gathered[_FREE_TIME, lane] / 2
        )
        by_angle = gathered[_ANGLE, lane]
        if saturation != SINGLE:
            by_r, by_r_t2s = gathered[_RATE, lane], gathered[_RATE_T2S, lane]
            by_r_b1 = gathered[_RATE_B1, lane]
            # The rates stand in Hτ times τ.
            by_duration += (
                by_r * rates[0, lane] + by_r_t2s * rates[1, lane] + by_r_b1 * rates[2, lane]
            ) / duration
            t2s, b1, size = tissue[T2S, lane], tissue[B1, lane], abs(angle)
            x = duration / t2s
            if saturation == GRAHAM:
                f_xx, f_xa, f_aa = graham_bends(table, x, abs(b1 * size))
            else:
                f_xx, f_xa, f_aa = rate_bends(table, x, abs(b1 * size))
            x_f_x = -rates[1, lane] * t2s**2 - rates[0, lane] * t2s
            sign = 1.0 if angle > 0 else -1.0
            f_a = rates[2, lane] * t2s / size if size > 0 else 0.0
            by_duration += (
                by_r * x_f_x / (t2s * duration)
                - by_r_t2s * (2 * x_f_x + f_xx) / (t2s**2 * duration)
                + by_r_b1 * f_xa * size / (t2s * duration)
            )
            by_angle += (
                sign
                / t2s
                * (
                    by_r * f_a * b1
                    - by_r_t2s * b1 * (f_a + f_xa) / t2s
                    + by_r_b1 * (f_a + f_aa * b1 * size)
                )
            )
        gathered[FLIP_ANGLE, lane] = by_angle
        gathered[PULSE_DURATION, lane] = by_duration
