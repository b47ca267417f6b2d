"""Compiled kernels: one cycle of a pulse train through one or two pools, with exact derivatives.

The trailing axis of each array holds LANES parameter sets, which the processor handles together.
A pulse acts on magnetization, never as a matrix: exp(Hτ) m is summed as a series of H applied to
m, and the derivative with respect to p obeys the same series with ∂H/∂p applied to m as a source.

Two passes. The first plays the cycle for the basis vectors of the initial state and for the
constant, without derivatives; from it comes the periodic state. The second plays the cycle for
that state with its derivatives, as if the initial state did not depend on the parameters; the
basis vectors of the first pass then add what it does depend.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from fisherprint.models.lineshape import (
    ANGLE_STEP,
    LOG_X_STEP,
    cell,
    graham,
    in_cell,
    splines,
)

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

LANES = 32

# Fused multiply-add and reassociation; NaN and Inf keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}

# Magnetization: x, y, z of the free pool, z and x of the semi-solid pool; its y is neglected.
# Between pulses its x is zero: the first CARRIED numbers carry over, for a single pool three.
X, Y, Z, ZS, XS = range(5)
CARRIED = 4
CARRIED_SINGLE = 3

# What the kernel takes of a voxel, in this order.
M0S, R1F, R2F, RX, R1S, T2S, B0, B1 = range(8)
PHYSICAL = ("m0s", "R1f", "R2f", "Rx", "R1s", "T2s", "B0", "B1")

# Rows of the derivatives. A single pool has the first four, with R1f its R1. Two pools have all
# eight, or without the last: the derivative by R1s is then added to that by R1f.
BY = ("R2f", "B0", "B1", "R1f", "m0s", "Rx", "T2s", "R1s")
BY_R2F, BY_B0, BY_B1, BY_R1F, BY_M0S, BY_RX, BY_T2S, BY_R1S = range(8)

# How the semi-solid pool is saturated; a single pool has none.
SINGLE, LINEARIZED, GRAHAM = range(3)

# Entries of Hτ by row and column, diagonal ones by their row (x and y have the same); then the
# derivatives by T2s and B1 of what the saturation sets.
H_TRANSVERSE, H_B0, H_B1, H_Z, H_Z_ZS, H_Z_ONE = range(6)
H_ZS_Z, H_ZS, H_ZS_ONE, H_XS, H_SATURATE = range(6, 11)
H_XS_BY_T2S, H_XS_BY_B1, H_ZS_BY_T2S, H_ZS_BY_B1 = range(11, 15)
_ENTRIES = 15

# What is left out of the series of one step, relative to the magnetization. The golden signals of
# the paper's train are met to 1e-10; at 1e-9 it would be 1e-7.
TRUNCATION = 1e-12
# Longest step of the series in units of 1/‖H‖: longer ones lose digits to cancellation.
MAX_STEP = 8.0

# Free precession: turn and decay, exchange and relaxation of (z, zs), recovery; then the
# derivatives of the last six with respect to these four, in this order.
_TRANSVERSE, _EXCHANGE, _RECOVERY, _SLOPES = 0, 2, 6, 8
_SLOPES_BY = (M0S, RX, R1F, R1S)
_FREE = _SLOPES + 6 * len(_SLOPES_BY)
# Pulses that are written out together: blocks in memory are whole and not touched one by one.
_BLOCK = 8


@numba.njit(cache=True, fastmath=_FAST, nogil=True)
def train_signal(
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
    out: NDArray[np.complex128],
    first: int,
    column: int,
) -> None:
    """Periodic signal of one train for LANES voxels, and its derivatives.

    All functions below are compiled into this one. Left by themselves they would exist twice, and
    whether this one calls its own copies, rounded a little otherwise, would depend on whether it
    has just been compiled or read from numba's cache.

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
        scale: what multiplies the derivatives by `BY`, shape (D, LANES): ∂(physical)/∂(model's).
        place: their places in `out`, shape (D,); none for the signal alone.
        out: receives x + i·y at the echo of each pulse, shape (S, D + 1, T); contiguous, so
            that there is one compiled kernel and one rounding.
        first: row of `out` for the first of the voxels; those past the last row are left out.
        column: column of `out` for the first pulse.
    """
    free, rates = prepared(
        tissue, saturation, flip_angle, pulse_duration, free_time, table, place.size > 0
    )
    samples, last = first_pass(
        tissue, saturation, crushed, flip_angle, pulse_duration, free, which_time, phase, rates
    )
    left, start = periodic(last)
    if place.size == 0:
        write_signal(samples, start, out, first, column)
        return
    unknown = np.zeros((place.size, start.shape[0], LANES))
    not_kept = np.empty((0, 1 + place.size, CARRIED, LANES))
    tangents, end = second_pass(
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
        unknown,
        not_kept,
    )
    slopes = periodic_slopes(left, end)
    write(samples, tangents, slopes, scale, place, out, first, column)


@numba.njit(cache=True, fastmath=_FAST, nogil=True)
def train_states(
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
    out: Array,
    first: int,
    column: int,
) -> None:
    """Periodic magnetization of one train for LANES voxels: x, y, z and zs at the echoes.

    Arguments as for `train_signal`, of which `scale` and `place` are empty and `out` has the shape
    (S, 4, T).
    """
    n_pulses = flip_angle.size
    free, rates = prepared(tissue, saturation, flip_angle, pulse_duration, free_time, table, False)
    _, last = first_pass(
        tissue, saturation, crushed, flip_angle, pulse_duration, free, which_time, phase, rates
    )
    _, start = periodic(last)
    states = np.zeros((n_pulses, 1, CARRIED, LANES))
    second_pass(
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
        np.empty((0, start.shape[0], LANES)),
        states,
    )
    for lane in range(min(LANES, out.shape[0] - first)):
        for c in range(CARRIED):
            for i in range(n_pulses):
                out[first + lane, c, column + i] = states[i, 0, c, lane]


@numba.njit(fastmath=_FAST, forceinline=True)
def prepared(
    tissue: Array,
    saturation: int,
    flip_angle: Array,
    pulse_duration: Array,
    free_time: Array,
    table: Array,
    slopes: bool,
) -> tuple[Array, Array]:
    """Free precession for each time, and the saturation rates of each pulse, (N, 3, LANES)."""
    free = np.empty((free_time.size, _FREE, LANES))
    for u in range(free_time.size):
        precession(tissue, free_time[u], free[u])
    rates = np.zeros((flip_angle.size, 3, LANES))
    if saturation != SINGLE:
        log_t2s = np.log(tissue[T2S])
        for i in range(flip_angle.size):
            saturate(
                tissue,
                log_t2s,
                saturation,
                flip_angle[i],
                pulse_duration[i],
                table,
                slopes,
                rates[i],
            )
    return free, rates


@numba.njit(fastmath=_FAST, forceinline=True)
def first_pass(
    tissue: Array,
    saturation: int,
    crushed: bool,
    flip_angle: Array,
    pulse_duration: Array,
    free: Array,
    which_time: Integers,
    phase: tuple[float, float],
    rates: Array,
) -> tuple[Array, Array]:
    """The cycle for each basis vector of the initial state, and for the constant.

    Returns:
        x and y at the echoes, shape (N, 2, 5, LANES), and the state at the end, (5, 5, LANES);
        the last of the five is the constant's. A single pool has four.
    """
    two = saturation != SINGLE
    carried = CARRIED if two else CARRIED_SINGLE
    n_pulses = flip_angle.size
    h = np.zeros((_ENTRIES, LANES))
    m = np.zeros((carried + 1, 5, LANES))
    r = np.zeros((carried + 1, 5, LANES))
    samples = np.empty((n_pulses, 2, carried + 1, LANES))
    for j in range(carried):
        for lane in range(LANES):
            m[j, j, lane] = 1.0
    for i in range(n_pulses):
        f = free[which_time[i]]
        for j in range(carried + 1):
            precess(f, phase, 1.0 if j == carried else 0.0, two, m, j)
        steps, order, shift = series(tissue, rates[i], pulse_duration[i], flip_angle[i])
        tau, angle = pulse_duration[i] / steps, flip_angle[i] / steps
        generator(tissue, saturation, rates[i], tau, angle, shift, i == 0, h)
        drop_xs(m)
        for _ in range(steps):
            scaled(m, 1.0, r)
            one = 1.0
            for k in range(order, 0, -1):
                for j in range(carried + 1):
                    term(h, 1.0 / k, one if j == carried else 0.0, two, m, r, j)
                one = 1.0 + shift / k * one
            scaled(r, np.exp(-shift), m)
        if i == 0:
            for j in range(carried + 1):
                invert(tissue, flip_angle[0], crushed, m, j)
        for j in range(carried + 1):
            precess(f, (1.0, 0.0), 1.0 if j == carried else 0.0, two, m, j)
            for lane in range(LANES):
                samples[i, 0, j, lane] = m[j, X, lane]
                samples[i, 1, j, lane] = m[j, Y, lane]
    return samples, m


@numba.njit(fastmath=_FAST, forceinline=True)
def second_pass(
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
    start: Array,
    slopes: Array,
    states: Array,
) -> tuple[Array, Array]:
    """The cycle for the periodic state, with given derivatives at its start.

    Of the arguments that `train_signal` has not, `start` is the periodic state, shape (C, LANES),
    `slopes` its derivatives, (D, C, LANES), and `states` receives magnetization and derivatives
    at each echo, (N, 1 + D, 4, LANES); with N = 0 they are not kept.

    Returns:
        x and y at the echoes, of the signal and of its derivatives, shape (N, 1 + D, 2, LANES);
        and the derivatives at the end, shape (D, 5, LANES).
    """
    two = saturation != SINGLE
    n_pulses, n_directions = flip_angle.size, slopes.shape[0]
    h = np.zeros((_ENTRIES, LANES))
    m = np.zeros((1, 5, LANES))
    r = np.zeros((1, 5, LANES))
    dm = np.zeros((n_directions, 5, LANES))
    dr = np.zeros((n_directions, 5, LANES))
    samples = np.empty((n_pulses, 1 + n_directions, 2, LANES))
    terms = np.empty((0, 1 + n_directions, 5, LANES))
    put(start, m[0])
    for p in range(n_directions):
        put(slopes[p], dm[p])
    for i in range(n_pulses):
        f, time = free[which_time[i]], free_time[which_time[i]]
        precess_all(f, time, phase, two, m, dm)
        steps, order, shift = series(tissue, rates[i], pulse_duration[i], flip_angle[i])
        tau, angle = pulse_duration[i] / steps, flip_angle[i] / steps
        generator(tissue, saturation, rates[i], tau, angle, shift, i == 0, h)
        drop_xs(m)
        drop_xs(dm)
        for _ in range(steps):
            step(tissue, saturation, h, tau, angle, shift, order, i == 0, m, dm, r, dr, terms)
        if i == 0:
            for p in range(n_directions):
                invert(tissue, flip_angle[0], crushed, dm, p)
            if n_directions > 0:
                invert_source(tissue, flip_angle[0], crushed, m, dm)
            invert(tissue, flip_angle[0], crushed, m, 0)
        precess_all(f, time, (1.0, 0.0), two, m, dm)
        for lane in range(LANES):
            samples[i, 0, 0, lane] = m[0, X, lane]
            samples[i, 0, 1, lane] = m[0, Y, lane]
        for p in range(n_directions):
            for lane in range(LANES):
                samples[i, 1 + p, 0, lane] = dm[p, X, lane]
                samples[i, 1 + p, 1, lane] = dm[p, Y, lane]
        if states.shape[0] > 0:
            put(m[0], states[i, 0])
            for p in range(n_directions):
                put(dm[p], states[i, 1 + p])
    return samples, dm


@numba.njit(fastmath=_FAST, forceinline=True)
def step(
    tissue: Array,
    saturation: int,
    h: Array,
    tau: float,
    angle: float,
    shift: float,
    order: int,
    inversion: bool,
    m: Array,
    dm: Array,
    r: Array,
    dr: Array,
    terms: Array,
) -> None:
    """One step of a pulse, exp(Hτ) of the magnetization and its derivatives, in place.

    The generator h has the angle of one step of length τ; shift and order are of `series`; of an
    inversion only the semi-solid pool is played. With r and dr there is room for the terms, and
    `terms`, shape (order + 1, 1 + D, 5, LANES), receives the k-th by k, to which H is applied; if
    empty they are not kept.
    """
    scaled(m, 1.0, r)
    scaled(dm, 1.0, dr)
    one = 1.0
    for k in range(order, 0, -1):
        if terms.shape[0] > 0:
            put(r[0], terms[k, 0])
            for p in range(dm.shape[0]):
                put(dr[p], terms[k, 1 + p])
        # The derivatives first: their source is the value from before.
        for p in range(dm.shape[0]):
            term(h, 1.0 / k, 0.0, saturation != SINGLE, dm, dr, p)
        if dm.shape[0] > 0:
            if not inversion:
                free_source(tissue, tau / k, angle / k, one, r, dr)
            if saturation != SINGLE:
                semisolid_source(h, 1.0 / k, 0.0 if saturation == GRAHAM else angle, r, dr)
                if not inversion:
                    exchange_source(tissue, tau / k, one, r, dr)
        term(h, 1.0 / k, one, saturation != SINGLE, m, r, 0)
        one = 1.0 + shift / k * one
    scaled(r, np.exp(-shift), m)
    scaled(dr, np.exp(-shift), dm)


@numba.njit(fastmath=_FAST, forceinline=True)
def saturate(
    tissue: Array,
    log_t2s: Array,
    saturation: int,
    angle: float,
    duration: float,
    table: Array,
    slopes: bool,
    rates: Array,
) -> None:
    """Rate of the semi-solid pool's saturation by a pulse; its slopes by T2s and B1 if asked."""
    if saturation == GRAHAM:
        for lane in range(LANES):
            t2s = tissue[T2S, lane]
            x = duration / t2s
            f, f_x, f_a = graham(table, x, abs(tissue[B1, lane] * angle))
            rates[0, lane] = f / t2s
            rates[1, lane] = -(f + f_x * x) / t2s**2
            rates[2, lane] = f_a * abs(angle) / t2s
        return
    # First where to look for all lanes, which the processor does together; then the table.
    where = np.empty((2, LANES), dtype=np.int64)
    x_weights = np.empty((2, 6, LANES))
    a_weights = np.empty((2, 6, LANES))
    log_duration = np.log(duration)
    for lane in range(LANES):
        a = abs(tissue[B1, lane] * angle)
        i, j, u, v = cell(log_duration - log_t2s[lane], a)
        where[0, lane], where[1, lane] = i, j
        x_weights[0, 0, lane], a_weights[0, 0, lane] = u, v
    weigh(x_weights)
    weigh(a_weights)
    for lane in range(LANES):
        t2s = tissue[T2S, lane]
        f, f_u, f_v = in_cell(
            table,
            where[0, lane],
            where[1, lane],
            (six(x_weights[0], lane), six(x_weights[1], lane)),
            (six(a_weights[0], lane), six(a_weights[1], lane)),
        )
        rates[0, lane] = f / t2s
        if slopes:
            # ∂f/∂x = f_u / (x step) and x = TRF/T2s.
            rates[1, lane] = -(f + f_u / LOG_X_STEP) / t2s**2
            rates[2, lane] = f_v / ANGLE_STEP * abs(angle) / t2s


@numba.njit(fastmath=_FAST, forceinline=True)
def weigh(w: Array) -> None:
    """The splines at the places in w[0, 0], and their slopes, into `w`."""
    for lane in range(LANES):
        (b0, b1, b2, b3, b4, b5), (d0, d1, d2, d3, d4, d5) = splines(w[0, 0, lane])
        w[0, 0, lane], w[0, 1, lane], w[0, 2, lane] = b0, b1, b2
        w[0, 3, lane], w[0, 4, lane], w[0, 5, lane] = b3, b4, b5
        w[1, 0, lane], w[1, 1, lane], w[1, 2, lane] = d0, d1, d2
        w[1, 3, lane], w[1, 4, lane], w[1, 5, lane] = d3, d4, d5


@numba.njit(forceinline=True)
def six(w: Array, lane: int) -> tuple[float, float, float, float, float, float]:
    """The six weights of a lane."""
    return w[0, lane], w[1, lane], w[2, lane], w[3, lane], w[4, lane], w[5, lane]


@numba.njit(fastmath=_FAST, forceinline=True)
def series(tissue: Array, rates: Array, duration: float, angle: float) -> tuple[int, int, float]:
    """Equal steps of a pulse, terms of the series of each step, and the shift of H.

    The eigenvalues of Hτ lie between 0 and -R2sl·τ, some with the imaginary part of the rotation.
    Shifting them up by half of that width, and scaling by e^(-shift) in the end, makes the series
    of the fast decay as short as that of half of it. The slowest lane decides.
    """
    width, rotation, relaxation = 0.0, 0.0, 0.0
    for lane in range(LANES):
        turn = (tissue[B1, lane] * angle) ** 2 + (tissue[B0, lane] * duration) ** 2
        rate_sum = tissue[R1F, lane] + tissue[R2F, lane] + tissue[R1S, lane] + tissue[RX, lane]
        width = max(width, rates[0, lane] * duration)
        rotation = max(rotation, turn)
        relaxation = max(relaxation, rate_sum * duration)
    shift = width / 2
    size = np.sqrt(shift**2 + rotation) + relaxation
    steps = int(size / MAX_STEP) + 1
    shift, size = shift / steps, size / steps
    order, left_out = 1, size**2 / 2 * np.exp(-shift)
    while left_out > TRUNCATION:
        order += 1
        left_out *= size / (order + 1)
    return steps, order, shift


@numba.njit(fastmath=_FAST, forceinline=True)
def generator(
    tissue: Array,
    saturation: int,
    rates: Array,
    tau: float,
    angle: float,
    shift: float,
    inversion: bool,
    h: Array,
) -> None:
    """Entries of Hτ + shift for one step of a pulse, into `h`.

    Of the inversion only the saturation of the semi-solid pool is kept.
    """
    free_tau, free_angle = (0.0, 0.0) if inversion else (tau, angle)
    graham_tau, linear_tau = (tau, 0.0) if saturation == GRAHAM else (0.0, tau)
    linear_angle = 0.0 if saturation == GRAHAM else angle
    for lane in range(LANES):
        m0s, Rx = tissue[M0S, lane], tissue[RX, lane]
        R1f, R1s = tissue[R1F, lane], tissue[R1S, lane]
        m0f = 1 - m0s
        h[H_TRANSVERSE, lane] = shift - tissue[R2F, lane] * free_tau
        h[H_B0, lane] = tissue[B0, lane] * free_tau
        h[H_B1, lane] = tissue[B1, lane] * free_angle
        h[H_Z, lane] = shift - (R1f + Rx * m0s) * free_tau
        h[H_Z_ZS, lane] = Rx * m0f * free_tau
        h[H_Z_ONE, lane] = R1f * m0f * free_tau
        h[H_ZS_Z, lane] = Rx * m0s * free_tau
        h[H_ZS, lane] = shift - (R1s + Rx * m0f) * free_tau - rates[0, lane] * graham_tau
        h[H_ZS_ONE, lane] = R1s * m0s * free_tau
        h[H_XS, lane] = shift - rates[0, lane] * linear_tau
        h[H_SATURATE, lane] = tissue[B1, lane] * linear_angle
        h[H_XS_BY_T2S, lane] = -rates[1, lane] * linear_tau
        h[H_XS_BY_B1, lane] = -rates[2, lane] * linear_tau
        h[H_ZS_BY_T2S, lane] = -rates[1, lane] * graham_tau
        h[H_ZS_BY_B1, lane] = -rates[2, lane] * graham_tau


@numba.njit(fastmath=_FAST, forceinline=True)
def term(h: Array, c: float, one: float, two: bool, m: Array, r: Array, j: int) -> None:
    """One term of Horner's form of exp(Hτ) m, r ← m + c Hτ r, for vector j."""
    if two:
        for lane in range(LANES):
            x, y, z = r[j, X, lane], r[j, Y, lane], r[j, Z, lane]
            zs, xs = r[j, ZS, lane], r[j, XS, lane]
            Hx = h[H_TRANSVERSE, lane] * x - h[H_B0, lane] * y + h[H_B1, lane] * z
            Hy = h[H_TRANSVERSE, lane] * y + h[H_B0, lane] * x
            Hz = h[H_Z, lane] * z - h[H_B1, lane] * x + h[H_Z_ZS, lane] * zs
            Hzs = h[H_ZS, lane] * zs + h[H_ZS_Z, lane] * z - h[H_SATURATE, lane] * xs
            Hxs = h[H_XS, lane] * xs + h[H_SATURATE, lane] * zs
            r[j, X, lane] = m[j, X, lane] + c * Hx
            r[j, Y, lane] = m[j, Y, lane] + c * Hy
            r[j, Z, lane] = m[j, Z, lane] + c * (Hz + h[H_Z_ONE, lane] * one)
            r[j, ZS, lane] = m[j, ZS, lane] + c * (Hzs + h[H_ZS_ONE, lane] * one)
            r[j, XS, lane] = m[j, XS, lane] + c * Hxs
    else:
        for lane in range(LANES):
            x, y, z = r[j, X, lane], r[j, Y, lane], r[j, Z, lane]
            Hx = h[H_TRANSVERSE, lane] * x - h[H_B0, lane] * y + h[H_B1, lane] * z
            Hy = h[H_TRANSVERSE, lane] * y + h[H_B0, lane] * x
            Hz = h[H_Z, lane] * z - h[H_B1, lane] * x
            r[j, X, lane] = m[j, X, lane] + c * Hx
            r[j, Y, lane] = m[j, Y, lane] + c * Hy
            r[j, Z, lane] = m[j, Z, lane] + c * (Hz + h[H_Z_ONE, lane] * one)


@numba.njit(fastmath=_FAST, forceinline=True)
def free_source(tissue: Array, tau: float, angle: float, one: float, r: Array, dr: Array) -> None:
    """Add ∂(Hτ)/∂(R2f, B0, B1, R1f) r of the free pool to the derivatives."""
    for lane in range(LANES):
        x, y, z = r[0, X, lane], r[0, Y, lane], r[0, Z, lane]
        dr[BY_R2F, X, lane] -= tau * x
        dr[BY_R2F, Y, lane] -= tau * y
        dr[BY_B0, X, lane] -= tau * y
        dr[BY_B0, Y, lane] += tau * x
        dr[BY_B1, X, lane] += angle * z
        dr[BY_B1, Z, lane] -= angle * x
        dr[BY_R1F, Z, lane] += tau * ((1 - tissue[M0S, lane]) * one - z)


@numba.njit(fastmath=_FAST, forceinline=True)
def semisolid_source(h: Array, c: float, angle: float, r: Array, dr: Array) -> None:
    """Add ∂(Hτ)/∂(B1, T2s) r of the semi-solid pool, with ∂/∂B1 of the rotation by `angle`."""
    for lane in range(LANES):
        zs, xs = r[0, ZS, lane], r[0, XS, lane]
        dr[BY_B1, ZS, lane] += c * (h[H_ZS_BY_B1, lane] * zs - angle * xs)
        dr[BY_B1, XS, lane] += c * (h[H_XS_BY_B1, lane] * xs + angle * zs)
        dr[BY_T2S, ZS, lane] += c * h[H_ZS_BY_T2S, lane] * zs
        dr[BY_T2S, XS, lane] += c * h[H_XS_BY_T2S, lane] * xs


@numba.njit(fastmath=_FAST, forceinline=True)
def exchange_source(tissue: Array, tau: float, one: float, r: Array, dr: Array) -> None:
    """Add ∂(Hτ)/∂(m0s, Rx, R1s) r to the derivatives."""
    for lane in range(LANES):
        m0s, z, zs = tissue[M0S, lane], r[0, Z, lane], r[0, ZS, lane]
        moved = tissue[RX, lane] * (z + zs)
        dr[BY_M0S, Z, lane] -= tau * (moved + tissue[R1F, lane] * one)
        dr[BY_M0S, ZS, lane] += tau * (moved + tissue[R1S, lane] * one)
        exchanged = tau * ((1 - m0s) * zs - m0s * z)
        dr[BY_RX, Z, lane] += exchanged
        dr[BY_RX, ZS, lane] -= exchanged
    # The row of R1s, or that of both relaxation rates together.
    row = BY_R1S if dr.shape[0] > BY_R1S else BY_R1F
    for lane in range(LANES):
        dr[row, ZS, lane] += tau * (tissue[M0S, lane] * one - r[0, ZS, lane])


@numba.njit(fastmath=_FAST, forceinline=True)
def scaled(r: Array, factor: float, m: Array) -> None:
    """Write m = factor·r."""
    for j in range(m.shape[0]):
        for i in range(5):
            for lane in range(LANES):
                m[j, i, lane] = factor * r[j, i, lane]


@numba.njit(forceinline=True)
def put(values: Array, out: Array) -> None:
    """Write one vector over another: the rows that both have, shapes (rows, LANES).

    numba takes half a minute to compile assignments of slices, with all that they say of shapes.
    """
    for i in range(min(values.shape[0], out.shape[0])):
        for lane in range(LANES):
            out[i, lane] = values[i, lane]


@numba.njit(forceinline=True)
def drop_xs(m: Array) -> None:
    """Before a pulse x of the semi-solid pool is zero."""
    for j in range(m.shape[0]):
        for lane in range(LANES):
            m[j, XS, lane] = 0.0


@numba.njit(fastmath=_FAST, forceinline=True)
def invert(tissue: Array, angle: float, crushed: bool, m: Array, j: int) -> None:
    """Free pool of the inversion: diag(sin²(B1α/2), -sin²(B1α/2), cos(B1α)) if crushed.

    If spoiled, no transverse magnetization enters or leaves: diag(0, 0, cos(B1α)).
    """
    for lane in range(LANES):
        a = tissue[B1, lane] * angle
        refocused = np.sin(a / 2) ** 2 if crushed else 0.0
        m[j, X, lane] *= refocused
        m[j, Y, lane] *= -refocused
        m[j, Z, lane] *= np.cos(a)


@numba.njit(fastmath=_FAST, forceinline=True)
def invert_source(tissue: Array, angle: float, crushed: bool, m: Array, dm: Array) -> None:
    """Add ∂/∂B1 of the inversion, applied to the magnetization before it."""
    for lane in range(LANES):
        a = tissue[B1, lane] * angle
        slope = np.sin(a) / 2 * angle if crushed else 0.0
        dm[BY_B1, X, lane] += slope * m[0, X, lane]
        dm[BY_B1, Y, lane] -= slope * m[0, Y, lane]
        dm[BY_B1, Z, lane] -= np.sin(a) * angle * m[0, Z, lane]


@numba.njit(fastmath=_FAST, forceinline=True)
def precession(tissue: Array, time: float, free: Array) -> None:
    """Free precession for `time`, in closed form, with derivatives, into `free`.

    Transverse: the two parts of exp(-R2f t + i ω0 t); their derivatives need no table.
    Longitudinal: recovery of (m0f, m0s) through exp(L t), L the relaxation and exchange. With
    N = L - μ, μ half the trace, N² = δ²: exp(L t) = e^(μt) (C + S N), C = cosh(δt),
    S = sinh(δt)/δ.
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
        free[_TRANSVERSE, lane] = decay * np.cos(w0 * time)
        free[_TRANSVERSE + 1, lane] = decay * np.sin(w0 * time)

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
        for i in range(4):
            free[_EXCHANGE + i, lane] = E[i]
        free[_RECOVERY, lane] = m0f - E[0] * m0f - E[1] * m0s
        free[_RECOVERY + 1, lane] = m0s - E[2] * m0f - E[3] * m0s

        for d in range(4):
            dm0s, dRx = 1.0 if d == 0 else 0.0, 1.0 if d == 1 else 0.0
            dR1f, dR1s = 1.0 if d == 2 else 0.0, 1.0 if d == 3 else 0.0
            da, db = -dR1f - dRx * m0s - Rx * dm0s, dRx * m0f - Rx * dm0s
            dp, dq = dRx * m0s + Rx * dm0s, -dR1s - dRx * m0f + Rx * dm0s
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
            slope = _SLOPES + 6 * d
            for i in range(4):
                free[slope + i, lane] = dE[i]
            free[slope + 4, lane] = -dm0s - dE[0] * m0f - dE[1] * m0s + (E[0] - E[1]) * dm0s
            free[slope + 5, lane] = dm0s - dE[2] * m0f - dE[3] * m0s + (E[2] - E[3]) * dm0s


@numba.njit(fastmath=_FAST, forceinline=True)
def precess(
    free: Array, phase: tuple[float, float], one: float, two: bool, m: Array, j: int
) -> None:
    """Free precession and a turn by the phase, of vector j in place."""
    for lane in range(LANES):
        c = free[_TRANSVERSE, lane] * phase[0] - free[_TRANSVERSE + 1, lane] * phase[1]
        s = free[_TRANSVERSE, lane] * phase[1] + free[_TRANSVERSE + 1, lane] * phase[0]
        x, y, z, zs = m[j, X, lane], m[j, Y, lane], m[j, Z, lane], m[j, ZS, lane]
        m[j, X, lane] = c * x - s * y
        m[j, Y, lane] = s * x + c * y
        m[j, Z, lane] = (
            free[_EXCHANGE, lane] * z
            + free[_EXCHANGE + 1, lane] * zs
            + free[_RECOVERY, lane] * one
        )
        if two:
            m[j, ZS, lane] = (
                free[_EXCHANGE + 2, lane] * z
                + free[_EXCHANGE + 3, lane] * zs
                + free[_RECOVERY + 1, lane] * one
            )


@numba.njit(fastmath=_FAST, forceinline=True)
def precess_all(
    free: Array, time: float, phase: tuple[float, float], two: bool, m: Array, dm: Array
) -> None:
    """Free precession and a turn by the phase, of the magnetization and its derivatives."""
    if dm.shape[0] == 0:
        precess(free, phase, 1.0, two, m, 0)
        return
    for p in range(dm.shape[0]):
        precess(free, phase, 0.0, two, dm, p)
    if two:
        recover(free, _SLOPES, m, dm, BY_M0S)
        recover(free, _SLOPES + 6, m, dm, BY_RX)
        recover(free, _SLOPES + 18, m, dm, BY_R1S if dm.shape[0] > BY_R1S else BY_R1F)
    recover(free, _SLOPES + 12, m, dm, BY_R1F)
    precess(free, phase, 1.0, two, m, 0)
    # ∂/∂R2f and ∂/∂ω0 of exp(-R2f t + i ω0 t) are -t and i t times itself.
    for lane in range(LANES):
        x, y = time * m[0, X, lane], time * m[0, Y, lane]
        dm[BY_R2F, X, lane] -= x
        dm[BY_R2F, Y, lane] -= y
        dm[BY_B0, X, lane] -= y
        dm[BY_B0, Y, lane] += x


@numba.njit(fastmath=_FAST, forceinline=True)
def recover(free: Array, slope: int, m: Array, dm: Array, row: int) -> None:
    """Add the derivative of the longitudinal recovery, applied to the magnetization before it."""
    for lane in range(LANES):
        z, zs = m[0, Z, lane], m[0, ZS, lane]
        dm[row, Z, lane] += (
            free[slope, lane] * z + free[slope + 1, lane] * zs + free[slope + 4, lane]
        )
        dm[row, ZS, lane] += (
            free[slope + 2, lane] * z + free[slope + 3, lane] * zs + free[slope + 5, lane]
        )


@numba.njit(fastmath=_FAST, forceinline=True)
def periodic(last: Array) -> tuple[Array, Array]:
    """The state m that a whole cycle m ← A m + b reproduces: (1 - A) m = b.

    Args:
        last: ends of the cycle from each basis vector (columns of A) and from the constant (b).

    Returns:
        1 - A, shape (C, C, LANES) for C carried numbers, and m, shape (C, LANES).
    """
    carried = last.shape[0] - 1
    left = np.empty((carried, carried, LANES))
    start = np.empty((1, carried, LANES))
    for i in range(carried):
        for lane in range(LANES):
            start[0, i, lane] = last[carried, i, lane]
        for j in range(carried):
            for lane in range(LANES):
                left[i, j, lane] = (1.0 if i == j else 0.0) - last[j, i, lane]
    solve(left, False, start)
    return left, start[0]


@numba.njit(fastmath=_FAST, forceinline=True)
def periodic_slopes(left: Array, end: Array) -> Array:
    """Derivatives of the periodic state, dm = (1 - A)⁻¹ (dA m + db).

    Args:
        left: 1 - A, of `periodic`.
        end: derivatives at the end of a cycle that began without any, shape (D, 5, LANES).

    Returns:
        Shape (D, C, LANES).
    """
    slopes = np.empty((end.shape[0], left.shape[0], LANES))
    for p in range(slopes.shape[0]):
        for j in range(slopes.shape[1]):
            for lane in range(LANES):
                slopes[p, j, lane] = end[p, j, lane]
    solve(left, False, slopes)
    return slopes


@numba.njit(fastmath=_FAST, forceinline=True)
def solve(left: Array, transposed: bool, x: Array) -> None:
    """Write left⁻¹ x, or left⁻ᵀ x, over the vectors x: elimination, the largest pivot first.

    The library's solver would double the time of compilation.

    Args:
        left: shape (C, C, LANES).
        transposed: whether its transpose is meant.
        x: shape (D, C, LANES).
    """
    size, vectors = x.shape[1], x.shape[0]
    u = np.empty((size, size))
    for lane in range(LANES):
        for i in range(size):
            for j in range(size):
                u[i, j] = left[j, i, lane] if transposed else left[i, j, lane]
        for k in range(size):
            pivot = k
            for i in range(k + 1, size):
                if abs(u[i, k]) > abs(u[pivot, k]):
                    pivot = i
            for j in range(size):
                u[k, j], u[pivot, j] = u[pivot, j], u[k, j]
            for p in range(vectors):
                x[p, k, lane], x[p, pivot, lane] = x[p, pivot, lane], x[p, k, lane]
            for i in range(k + 1, size):
                factor = u[i, k] / u[k, k]
                for j in range(k, size):
                    u[i, j] -= factor * u[k, j]
                for p in range(vectors):
                    x[p, i, lane] -= factor * x[p, k, lane]
        for p in range(vectors):
            for k in range(size - 1, -1, -1):
                for j in range(k + 1, size):
                    x[p, k, lane] -= u[k, j] * x[p, j, lane]
                x[p, k, lane] /= u[k, k]


@numba.njit(fastmath=_FAST, forceinline=True)
def write_signal(
    samples: Array, start: Array, out: NDArray[np.complex128], first: int, column: int
) -> None:
    """Signals of the periodic state from those of the basis vectors: s = Φ m + b."""
    n_pulses, carried = samples.shape[0], start.shape[0]
    echo = np.empty((2, LANES))
    for i in range(n_pulses):
        for part in range(2):
            for lane in range(LANES):
                echo[part, lane] = samples[i, part, carried, lane]
            for j in range(carried):
                for lane in range(LANES):
                    echo[part, lane] += samples[i, part, j, lane] * start[j, lane]
        for lane in range(min(LANES, out.shape[0] - first)):
            out[first + lane, 0, column + i] = complex(echo[0, lane], echo[1, lane])


@numba.njit(fastmath=_FAST, forceinline=True)
def write(
    samples: Array,
    tangents: Array,
    slopes: Array,
    scale: Array,
    place: Integers,
    out: NDArray[np.complex128],
    first: int,
    column: int,
) -> None:
    """Signal, and derivatives with what the initial state adds to them: ds + Φ dm."""
    n_pulses, n_directions, carried = tangents.shape[0], slopes.shape[0], slopes.shape[1]
    n_voxels = min(LANES, out.shape[0] - first)
    echo = np.empty((_BLOCK, 2, LANES))
    for begin in range(0, n_pulses, _BLOCK):
        size = min(_BLOCK, n_pulses - begin)
        for p in range(1 + n_directions):
            for k in range(size):
                for part in range(2):
                    for lane in range(LANES):
                        echo[k, part, lane] = tangents[begin + k, p, part, lane]
                    if p > 0:
                        for j in range(carried):
                            for lane in range(LANES):
                                echo[k, part, lane] += (
                                    samples[begin + k, part, j, lane] * slopes[p - 1, j, lane]
                                )
                        for lane in range(LANES):
                            echo[k, part, lane] *= scale[p - 1, lane]
            row = 0 if p == 0 else place[p - 1]
            for lane in range(n_voxels):
                for k in range(size):
                    out[first + lane, row, column + begin + k] = complex(
                        echo[k, 0, lane], echo[k, 1, lane]
                    )
