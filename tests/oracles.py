"""Slow, plain implementations that share neither code nor method with the package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad, simpson
from scipy.linalg import expm
from scipy.optimize import brentq


def greens_function(kappa: float) -> float:
    """G(κ) by adaptive quadrature, split at the magic angle."""

    def integrand(ζ: float) -> float:
        return float(np.exp(-(kappa**2) * (3 * ζ**2 - 1) ** 2 / 8))

    return quad(integrand, 0, 1, points=[1 / np.sqrt(3)], epsabs=1e-15, epsrel=1e-13, limit=400)[0]


def saturation(x: float, angle: float, steps: int = 600) -> float:
    """Final zs of the generalized Bloch equation: trapezoidal steps, extrapolated twice to h = 0.

    The rule errs by h² and h⁴ terms; what is left is of order h⁶.
    """
    z1, z2, z4 = (_trapezoidal(x, angle, n * steps) for n in (1, 2, 4))
    once, again = (4 * z2 - z1) / 3, (4 * z4 - z2) / 3
    return (16 * again - once) / 15


def _trapezoidal(x: float, angle: float, steps: int) -> float:
    """Implicit trapezoidal rule for dz/ds = −a² ∫₀ˢ G(x (s − σ)) z(σ) dσ on [0, 1]."""
    h = 1 / steps
    ζ = np.linspace(0, 1, 4001)
    G: NDArray[np.float64] = np.array(
        [
            simpson(np.exp(-((κ * (3 * ζ**2 - 1)) ** 2) / 8), x=ζ)
            for κ in x * h * np.arange(steps + 1)
        ]
    )
    z = np.ones(steps + 1)
    memory = 0.0
    for k in range(steps):
        known = h * (G[k + 1 : 0 : -1] @ z[: k + 1] - G[k + 1] * z[0] / 2)
        z[k + 1] = (z[k] - angle**2 * h / 2 * (memory + known)) / (1 + (angle * h) ** 2 / 4)
        memory = known + h * z[k + 1] / 2
    return float(z[-1])


def linearized_rate(pulse_duration: float, angle: float, t2s: float) -> float:
    """R2sl in 1/s by a root search over matrix exponentials; angle = B1·α in rad, above 0."""
    wanted = saturation(pulse_duration / t2s, angle)

    def excess(rate: float) -> float:
        H = np.array([[-rate * pulse_duration, angle], [-angle, 0]])
        return float(expm(H)[1, 1]) - wanted

    return float(brentq(excess, 0.05 / t2s, 0.4 / t2s, xtol=1e-9, rtol=1e-14))


def two_pool_signal(
    tissue: dict[str, float],
    flip_angle: NDArray[np.float64],
    pulse_duration: NDArray[np.float64],
    repetition_time: float,
    inversion: str = "crushed",
    r2sl: NDArray[np.float64] | None = None,
) -> NDArray[np.complex128]:
    """Periodic two-pool signal of one train by matrix exponentials, pulse after pulse.

    The periodic state comes from playing the cycle until it repeats, not from a linear solve.

    Args:
        tissue: m0s, R1f, R2f, Rx, R1s, T2s, B0, B1; SI.
        flip_angle, pulse_duration: (N,), inversion first.
        repetition_time: TR in s.
        inversion: crushed or spoiled.
        r2sl: rate of each pulse; by root search if not given (slow).
    """
    m0s, R1f, R2f, Rx = (tissue[name] for name in ("m0s", "R1f", "R2f", "Rx"))
    R1s, T2s, B0, B1 = (tissue[name] for name in ("R1s", "T2s", "B0", "B1"))
    m0f = 1 - m0s
    if r2sl is None:
        r2sl = np.array(
            [
                linearized_rate(duration, B1 * angle, T2s)
                for duration, angle in zip(pulse_duration, flip_angle, strict=True)
            ]
        )

    def H(w1: float, rate: float) -> NDArray[np.float64]:
        return np.array(
            [
                [-R2f, -B0, w1, 0, 0, 0],
                [B0, -R2f, 0, 0, 0, 0],
                [-w1, 0, -R1f - Rx * m0s, 0, Rx * m0f, R1f * m0f],
                [0, 0, 0, -rate, w1, 0],
                [0, 0, Rx * m0s, -w1, -R1s - Rx * m0f, R1s * m0s],
                [0, 0, 0, 0, 0, 0],
            ]
        )

    def free(time: float) -> NDArray[np.float64]:
        return np.diag([1, 1, 1, 0, 1, 1]) @ expm(H(0, 0) * time)

    turn = np.diag([-1.0, -1, 1, 1, 1, 1])
    cycle = []
    for i, (angle, duration, rate) in enumerate(
        zip(flip_angle, pulse_duration, r2sl, strict=True)
    ):
        w1 = B1 * angle / duration
        if i == 0:
            half = free(repetition_time / 2)
            c, s2 = np.cos(B1 * angle), np.sin(B1 * angle / 2) ** 2
            pulse = np.eye(6)
            pulse[0, 0], pulse[1, 1], pulse[2, 2] = (
                (s2, -s2, c) if inversion == "crushed" else (0, 0, c)
            )
            pulse[3:5, 3:5] = expm(np.array([[-rate, w1], [-w1, 0]]) * duration)
        else:
            half = free((repetition_time - duration) / 2)
            pulse = expm(H(w1, rate) * duration)
        cycle.append(half @ pulse @ turn @ half)

    m = np.array([0, 0, m0f, 0, m0s, 1.0])
    for _ in range(200):
        before, signal = m, []
        for step in cycle:
            m = step @ m
            signal.append(m[0] + 1j * m[1])
        if np.abs(m - before).max() < 1e-13:
            return np.array(signal)
    raise AssertionError("the cycle did not become periodic")


def generalized_bloch_pulse(
    tissue: dict[str, float], angle: float, duration: float, start: NDArray[np.float64], steps: int
) -> NDArray[np.float64]:
    """(xf, yf, zf, zs) after a pulse of the full generalized Bloch model, by time stepping.

    Implicit trapezoidal steps; the memory integral is a trapezoidal sum over all steps before.
    Three runs with halved steps are extrapolated to h = 0, which leaves h⁶ terms.
    """
    m0s, R1f, R2f, Rx = (tissue[name] for name in ("m0s", "R1f", "R2f", "Rx"))
    R1s, T2s, B0, B1 = (tissue[name] for name in ("R1s", "T2s", "B0", "B1"))
    m0f, w1 = 1 - m0s, B1 * angle / duration
    L = np.array(
        [
            [-R2f, -B0, w1, 0],
            [B0, -R2f, 0, 0],
            [-w1, 0, -R1f - Rx * m0s, Rx * m0f],
            [0, 0, Rx * m0s, -R1s - Rx * m0f],
        ]
    )
    c = np.array([0, 0, R1f * m0f, R1s * m0s])

    def run(n: int) -> NDArray[np.float64]:
        h = duration / n
        ζ = np.linspace(0, 1, 4001)
        κ = h / T2s * np.arange(n + 1)
        G = np.array([simpson(np.exp(-((k * (3 * ζ**2 - 1)) ** 2) / 8), x=ζ) for k in κ])
        # The new zs enters its own memory integral with weight h/2.
        left = np.eye(4) - h / 2 * L
        left[3, 3] += h / 2 * w1**2 * h / 2
        m = start.copy()
        history, memory = np.zeros(n + 1), 0.0
        history[0] = m[3]
        for k in range(n):
            known = h * (G[k + 1 : 0 : -1] @ history[: k + 1] - G[k + 1] * history[0] / 2)
            right = m + h / 2 * (L @ m) + h * c
            right[3] -= h / 2 * w1**2 * (memory + known)
            m = np.linalg.solve(left, right)
            history[k + 1] = m[3]
            memory = known + h * m[3] / 2
        return m

    one, two, four = (run(k * steps) for k in (1, 2, 4))
    once, again = (4 * two - one) / 3, (4 * four - two) / 3
    return (16 * again - once) / 15
