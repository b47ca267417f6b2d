"""Time of a fingerprint with all derivatives and bounds, beside the slow oracle, in one run.

    python benchmarks/simulate.py [TRAIN.mat]

Medians over repeats. Without a file, the bundled train (1142 pulses).
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fisherprint as fp
from fisherprint import fisher, sequence
from fisherprint.models import lineshape

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracles

SIZE, REPEATS = 256, 7


def median_ms(work: Callable[[], object], sets: int) -> float:
    """Median wall time of a call in ms for one parameter set."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times)) / sets


def main() -> None:
    """Measure and print the table."""
    train = (
        fp.PulseTrain.read(sys.argv[1], repetition_time=3.5e-3)
        if len(sys.argv) > 1
        else sequence.bundled()
    )
    model = fp.TwoPool(train)
    prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
    theta = prior.sample(SIZE, rng=np.random.default_rng(0))
    out = model.simulate(theta)  # compiles
    basis = fp.subspace.fit(model.signal(theta), rank=13)

    def bounds() -> None:
        for s, ds in (
            (out.signal, out.jacobian),
            (basis.compress(out.signal), basis.compress(out.jacobian)),
        ):
            fisher.bounds(fisher.information(s, ds, noise_std=1.0))

    θ = dict(zip(model.names, theta[0], strict=True))
    angle, duration = train.flip_angle[0], train.pulse_duration[0]
    tissue = {name: θ[name] for name in ("m0s", "Rx", "T2s", "B0", "B1")}
    tissue |= {"R1f": 1 / θ["T1"], "R1s": 1 / θ["T1"], "R2f": 1 / θ["T2f"]}
    r2sl = lineshape.linearized_rate(duration, θ["B1"] * angle, θ["T2s"]).value

    def oracle() -> None:
        oracles.two_pool_signal(tissue, angle, duration, train.repetition_time, r2sl=r2sl)

    ours = median_ms(lambda: model.simulate(theta), SIZE)
    rows = [
        ("signal and 7 derivatives", ours),
        ("signal alone", median_ms(lambda: model.signal(theta), SIZE)),
        ("bounds of signal and of 13 coefficients", median_ms(bounds, SIZE)),
        ("oracle, signal alone (scipy exponentials)", median_ms(oracle, 1)),
    ]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {train.n_samples} pulses, {SIZE} sets")
    print(f"{'per parameter set':45}{'ms':>10}{'ratio':>10}")
    for label, value in rows:
        print(f"{label:45}{value:10.3f}{value / ours:10.2f}")


if __name__ == "__main__":
    main()
