"""Time of a voxel's least squares fit, beside scipy's with the same derivatives and without.

    python benchmarks/fit.py [TRAIN.mat] [--voxels 512] [--scipy 24]

One process, one run. Voxels are drawn from the paper's prior, 13 coefficients of a CRB-SVD basis,
7 unknown parameters and complex M0, |M0|/σ = 50; each fit starts one √CRB from the truth. Scipy
fits some of the voxels one after the other, as one does without batches: a simulation of one
parameter set takes the time of a whole group of lanes. So the table counts simulations as well.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

import fisherprint as fp
from fisherprint import fisher, fit, sequence
from fisherprint.models import kernels

SNR, RANK = 50, 13
BOUNDS = {
    "m0s": (0.0, 0.6),
    "T1": (0.1, 10.0),
    "T2f": (2e-3, 10.0),
    "Rx": (0.0, 200.0),
    "T2s": (6e-6, 20e-6),
    "B0": (-np.pi / 3.5e-3, np.pi / 3.5e-3),
    "B1": (0.3, 1.4),
}
# Scipy's own.
TOLERANCE = 1e-8


class Counted:
    """A model that counts the parameter sets it has simulated."""

    def __init__(self, model: fp.TwoPool, basis: fp.Basis) -> None:
        self.model, self.basis, self.sets = model, basis, 0
        self.parameters, self.names = model.parameters, model.names
        self.n_samples, self.index = model.n_samples, model.index

    def simulate(self, theta: NDArray[np.float64]) -> fp.Fingerprints:
        """The model's, counted."""
        self.sets += len(theta)
        return self.model.simulate(theta)

    def signal(self, theta: NDArray[np.float64]) -> NDArray[np.complex128]:
        """Likewise."""
        self.sets += len(theta)
        return self.model.signal(theta)


def by_scipy(counted: Counted, x: NDArray, start: NDArray, exact: bool) -> float:
    """Fit one voxel with scipy's trust region; half its squared residual."""
    basis, kept = counted.basis, {}

    def at(theta: NDArray) -> tuple[NDArray, NDArray | None]:
        key = theta.tobytes()
        if key not in kept:
            kept.clear()
            if exact:
                out = counted.simulate(theta[None])
                kept[key] = basis.compress(out.signal)[0], basis.compress(out.jacobian)[0]
            else:
                kept[key] = basis.compress(counted.signal(theta[None]))[0], None
        return kept[key]

    def residual(theta: NDArray) -> NDArray:
        c, _ = at(theta)
        r = x - c * np.vdot(c, x) / np.vdot(c, c)
        return np.r_[r.real, r.imag]

    def slopes(theta: NDArray) -> NDArray:
        c, jacobian = at(theta)
        energy, m0 = np.vdot(c, c).real, np.vdot(c, x) / np.vdot(c, c)
        J = -m0 * (jacobian - np.outer(c, c.conj() @ jacobian / energy))
        J -= np.outer(c, jacobian.conj().T @ (x - m0 * c)) / energy
        return np.concatenate([J.real, J.imag])

    low, high = np.array([BOUNDS[name] for name in counted.names]).T
    room = 1e-6 * (high - low)
    return least_squares(
        residual,
        np.clip(start, low + room, high - room),
        jac=slopes if exact else "2-point",
        bounds=(low, high),
        x_scale="jac",
        ftol=TOLERANCE,
        xtol=TOLERANCE,
        gtol=TOLERANCE,
        max_nfev=100,
    ).cost


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", nargs="?", help="pulse train with TR 3.5 ms")
    parser.add_argument("--voxels", type=int, default=512, help="of our fit")
    parser.add_argument("--scipy", type=int, default=24, help="of them, for scipy")
    options = parser.parse_args()
    train = (
        sequence.bundled()
        if options.train is None
        else fp.PulseTrain.read(options.train, repetition_time=3.5e-3)
    )
    model, rng = fp.TwoPool(train), np.random.default_rng(0)
    prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
    basis = fp.subspace.fit(
        (model.simulate(prior.sample(128, rng=rng)) for _ in range(8)),
        rank=RANK,
        method="crb-svd",
    )
    theta = prior.sample(options.voxels, rng=rng)
    out = model.simulate(theta)
    c, jacobian = basis.compress(out.signal), basis.compress(out.jacobian)
    information = fisher.information(c, jacobian, noise_std=1 / SNR)
    spread = prior.sample(4096, rng=rng).std(axis=0)
    root = np.minimum(np.sqrt(fisher.bounds(information)[:, : len(model.names)]), spread)
    start = theta + root * rng.standard_normal(theta.shape)
    noise = rng.standard_normal((*c.shape, 2)).view(np.complex128)[..., 0]
    x = c * np.exp(2j * np.pi * rng.random((len(c), 1))) + noise / SNR
    few = slice(0, options.scipy)

    def timed(what: str, size: int, call: Callable[[Counted], NDArray]) -> tuple[float, NDArray]:
        counted = Counted(model, basis)
        began = time.perf_counter()
        result = call(counted)
        ms = 1e3 * (time.perf_counter() - began) / size
        sets = counted.sets / size
        print(f"| {what} | {ms:.1f} | {sets:.1f} | {ms / sets:.2f} |", flush=True)
        return ms, result

    def ours(counted: Counted) -> NDArray:
        estimator = fit.LeastSquares(counted, basis, start=theta[0], bounds=BOUNDS)
        found = estimator.fit(x, start=start)
        ends.update(
            {reason.name.lower(): int((found.reason == reason).sum()) for reason in fit.Reason}
        )
        return found.residual**2 / 2

    def scipys(exact: bool) -> Callable[[Counted], NDArray]:
        return lambda counted: np.array(
            [
                by_scipy(counted, voxel, first, exact)
                for voxel, first in zip(x[few], start[few], strict=True)
            ]
        )

    ends: dict[str, int] = {}
    print(f"{platform.machine()}, {os.cpu_count()} cores, {train.n_samples} pulses, ", end="")
    print(f"{kernels.LANES} lanes, {RANK} coefficients, {len(model.names)} parameters")
    print("| a voxel | ms | simulations | ms each |")
    print("|---|---|---|---|")
    own, cost = timed("ours", len(x), ours)
    exact, by_exact = timed("scipy, our derivatives", options.scipy, scipys(True))
    plain, by_plain = timed("scipy, finite differences", options.scipy, scipys(False))
    print()
    print(f"scipy / ours: {exact / own:.1f} with our derivatives, {plain / own:.1f} without")
    for label, other in (("our derivatives", by_exact), ("finite differences", by_plain)):
        # Differences in units of σ² that no estimate could tell are none.
        above, below = ((sign * (cost[few] - other) * SNR**2 > 1e-4).sum() for sign in (1, -1))
        print(f"cost, {label}: ours lower in {below}, higher in {above} of {options.scipy}")
    print(f"how ours ended: {ends}")


if __name__ == "__main__":
    main()
