"""Time of a fingerprint with derivatives and bounds, beside a peer, an oracle and the hardware.

    python benchmarks/simulate.py [TRAIN.mat]

One process, medians over repeats, all in turns so that a busy neighbour slows all alike. Without a
file, the bundled train (1142 pulses). The peer is `blochsim` (MIT): instantaneous pulses, a single
pool from equilibrium, derivatives by T1, T2, B1 and B0 in forward mode, single-precision signals.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from blochsim.simulators import TrueFISPSimulator

import fisherprint as fp
from fisherprint import models, sequence, simulate
from fisherprint.models import kernels, lineshape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

REPEATS = 7
SIZES = (128, 256, 1024)
PEER_SIZES = (64, 256, 1024, 4096)
MATRIX = 2048


def multiply_adds(model: fp.TwoPool, theta: np.ndarray) -> float:
    """Multiply-adds that signal and 7 derivatives of one parameter set ask for.

    Counted are the series of the pulses, free precession and the combination of both passes:
    what is done to each vector of magnetization.
    """
    tissue, train = model._tissue(theta), model.train
    total = 0.0
    for first in range(0, len(theta), kernels.LANES):
        group = np.ascontiguousarray(tissue[:, first : first + kernels.LANES])
        for angle, duration in zip(train.flip_angle[0], train.pulse_duration[0], strict=True):
            rates = np.zeros((3, kernels.LANES))
            kernels.saturate(
                group,
                np.log(group[kernels.T2S]),
                kernels.LINEARIZED,
                angle,
                duration,
                lineshape.rate_table(),
                False,
                rates,
            )
            steps, order, _ = kernels.series(group, rates, duration, angle)
            # 18 a vector and term, 5 and 8 vectors, 26 of the sources; 12 a vector and half of
            # the free precession, 28 of its sources; 4 x 2 a derivative to combine the passes.
            total += steps * order * (13 * 18 + 26) + 2 * (13 * 12 + 28) + 7 * 8
    return total * kernels.LANES / len(theta)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", nargs="?", help="pulse train with TR 3.5 ms")
    path = parser.parse_args().train
    train = (
        sequence.bundled() if path is None else fp.PulseTrain.read(path, repetition_time=3.5e-3)
    )
    model, single = fp.TwoPool(train), models.SinglePool(train)
    prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
    theta = prior.sample(max(SIZES), rng=np.random.default_rng(0))
    column = {name: theta[:, model.index(name)] for name in model.names}
    free = np.column_stack([column[name] for name in ("T1", "T2f", "B0", "B1")])
    basis = fp.subspace.fit(model.signal(theta), rank=13)
    single.simulate(free[:1])
    # Two shards, and all that a data set takes beside them.
    sizes = {"training": 2 * simulate.SHARD, "validation": 1, "test": 1}

    θ = {name: float(values[0]) for name, values in column.items()}
    angle, duration = train.flip_angle[0], train.pulse_duration[0]
    tissue = {name: θ[name] for name in ("m0s", "Rx", "T2s", "B0", "B1")}
    tissue |= {"R1f": 1 / θ["T1"], "R1s": 1 / θ["T1"], "R2f": 1 / θ["T2f"]}
    r2sl = lineshape.linearized_rate(duration, θ["B1"] * angle, θ["T2s"]).value

    peer = TrueFISPSimulator(
        flip=np.degrees(angle[1:]),
        TR=1e3 * train.repetition_time,
        nshots=angle.size - 1,
        pulse_duration=0,
        half_alpha=False,
        inversion="ideal",
    )

    def peer_tissue(size: int) -> dict[str, torch.Tensor]:
        values = np.resize(free, (size, 4)).T
        # Its units are ms and Hz.
        scaled = (1e3 * values[0], 1e3 * values[1], values[2] / (2 * np.pi), values[3])
        return dict(zip(("T1", "T2", "B0", "B1"), map(torch.from_numpy, scaled), strict=True))

    by = ("T1", "T2", "B1", "B0")
    square = np.random.default_rng(1).standard_normal((MATRIX, MATRIX))
    # What is timed, and the number of parameter sets in it.
    work: dict[str, tuple[Callable[[], object], float]] = {
        "two pools: a data set, with 7 derivatives and bounds of signal and of 13 coefficients": (
            lambda: simulate.dataset(model, prior, sizes, basis=basis, seed=0),
            sum(sizes.values()),
        )
    }
    for size in SIZES:
        some, others = theta[:size], free[:size]
        for label, call in (
            ("two pools: signal and 7 derivatives", lambda some=some: model.simulate(some)),
            ("two pools: signal alone", lambda some=some: model.signal(some)),
            (
                "single pool: signal and 4 derivatives",
                lambda others=others: single.simulate(others),
            ),
            ("single pool: signal alone", lambda others=others: single.signal(others)),
        ):
            work[f"{label}, batch of {size}"] = (call, size)
    for size in PEER_SIZES:
        values = peer_tissue(size)
        work[f"blochsim, single pool: signal and 4 derivatives, batch of {size}"] = (
            lambda values=values: peer.jacobian(by, **values),
            size,
        )
        work[f"blochsim, single pool: signal alone, batch of {size}"] = (
            lambda values=values: peer.simulate(**values),
            size,
        )
    work["oracle, two pools: signal alone (scipy exponentials)"] = (
        lambda: oracles.two_pool_signal(tissue, angle, duration, train.repetition_time, r2sl=r2sl),
        1,
    )
    # A matrix product runs at the rate of the hardware, nearly.
    work["hardware: 10⁹ multiply-adds"] = (lambda: square @ square, MATRIX**3 / 1e9)

    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in range(1 + REPEATS):
        for label, (call, sets) in work.items():
            began = time.perf_counter()
            call()
            if repeat > 0:  # the first is a warm-up
                times[label].append(1e3 * (time.perf_counter() - began) / sets)
        print(f"repeat {repeat} of {REPEATS}", file=sys.stderr)
    ms = {label: float(np.median(values)) for label, values in times.items()}

    def best(start: str) -> float:
        return min(value for label, value in ms.items() if label.startswith(start))

    ours, alone = best("two pools: signal and 7 derivatives"), best("two pools: signal alone")
    peer_best = best("blochsim, single pool: signal and 4 derivatives")
    oracle = best("oracle")
    print(f"{platform.machine()}, {os.cpu_count()} cores, {train.n_samples} pulses")
    print("| per parameter set | ms | ratio |")
    print("|---|---|---|")
    for label, value in ms.items():
        print(f"| {label} | {value:.4g} | {value / ours:.3g} |")
    rate = 1e3 / ms["hardware: 10⁹ multiply-adds"]
    used = multiply_adds(model, theta[: 8 * kernels.LANES]) / (1e6 * ours)
    print()
    print("each at its best batch size:")
    print(f"ours (7 derivatives, two pools) / best blochsim (4, one): {ours / peer_best:.2f}")
    print(f"oracle / ours, both signal alone: {oracle / alone:.0f}")
    print(f"oracle (signal alone) / ours with 7 derivatives: {oracle / ours:.0f}")
    print(f"multiply-adds: hardware {rate:.1f}e9/s (float64), ours {used:.1f}e9/s, ", end="")
    print(f"{100 * used / rate:.0f} %")


if __name__ == "__main__":
    main()
