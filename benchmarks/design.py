"""Time and memory of a cost with its slope by every pulse, beside what it replaces.

    python benchmarks/design.py [TRAIN.mat]

One process, medians over repeats, all in turns so that a busy neighbour slows all alike. Without a
file, the bundled train (1142 pulses). Nine unknowns: seven parameters and complex M0.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

import fisherprint as fp
from fisherprint import design, sequence
from fisherprint.models import TwoPool

REPEATS = 7
WEIGHTS = {"m0s": 1.0, "T1": 1.0, "T2f": 1.0}
WHITE = [0.212, 0.947, 0.0769, 13.6, 12.5e-6, 0.0, 1.0]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", nargs="?", help="pulse train with TR 3.5 ms")
    path = parser.parse_args().train
    train = (
        sequence.bundled() if path is None else fp.PulseTrain.read(path, repetition_time=3.5e-3)
    )
    model = TwoPool(train)
    prior = fp.parameters.paper_prior(model.names, repetition_time=train.repetition_time)
    drawn = prior.sample(256, rng=np.random.default_rng(0))
    tissues = np.array([[*WHITE[:5], b0, b1] for b0 in (0, 150, 300) for b1 in np.r_[0.8:1.2:9j]])
    one = design.Goal(np.array([WHITE]), WEIGHTS)
    many = design.Goal(tissues, WEIGHTS)
    reduced = design.Goal(tissues, WEIGHTS, rank=13, basis_theta=drawn, mirrored=True)

    def forward() -> float:
        out = model.simulate(one.theta)
        return float(np.sqrt(fp.crb(out.signal, out.jacobian)).sum())

    work: dict[str, Callable[[], object]] = {
        "bound of one tissue, without slopes": forward,
        "cost of one tissue, with slopes": lambda: design.cost(model, one),
        "cost of 27 tissues, with slopes": lambda: design.cost(model, many),
        "the same in 13 coefficients, basis of 256 fingerprints": lambda: design.cost(
            model, reduced
        ),
    }
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in range(1 + REPEATS):
        for label, call in work.items():
            began = time.perf_counter()
            call()
            if repeat > 0:  # the first is a warm-up
                times[label].append(1e3 * (time.perf_counter() - began))
        print(f"repeat {repeat} of {REPEATS}", file=sys.stderr)
    ms = {label: float(np.median(values)) for label, values in times.items()}
    alone = ms["bound of one tissue, without slopes"]
    controls = 2 * train.n_samples
    print(f"{platform.machine()}, {os.cpu_count()} cores, {train.n_samples} pulses")
    print("| | ms | ratio |")
    print("|---|---|---|")
    for label, value in ms.items():
        print(f"| {label} | {value:.4g} | {value / alone:.3g} |")
    print(
        f"| finite differences for {controls} slopes: {controls + 1} bounds | "
        f"{(controls + 1) * alone:.4g} | {controls + 1} |"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory of the process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
