"""The final loss of a training in bfloat16, plain and compiled, over that in float32.

    python benchmarks/precision.py [--seeds 3]

Rate R and frequency w of decays at 8 times, whose bounds are exact: 8192 samples, 60 epochs of 64
steps, all hyper-parameters alike. The validation loss has the same noise in every row of a seed.
"""

import argparse
import os
import platform

import numpy as np
import torch

from fisherprint.train import Samples, TrainingConfig, train

KINDS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, compiled": {"precision": "bfloat16", "compiled": True},
}
CONFIG = TrainingConfig(
    estimated=("R", "w"), epochs=60, batch_size=128, halve_every=8, noise_std=0.01
)


def decays(size: int, *, seed: int) -> Samples:
    """Complex decays exp((-R + i w) t), with CRB = diag((Re GᴴG)⁻¹) for σ = 1 and M0 unknown."""
    rng = np.random.default_rng(seed)
    R, w = rng.uniform(0.2, 2, (size, 1)), rng.uniform(-0.5, 0.5, (size, 1))
    t = np.linspace(0, 1.5, 8)
    s = np.exp((-R + 1j * w) * t)
    # Columns: Re M0, Im M0, R, w.
    G = np.stack([s, 1j * s, -t * s, 1j * t * s], axis=-1)
    F = np.einsum("stp,stq->spq", G.conj(), G).real
    crb = np.diagonal(np.linalg.inv(F), axis1=1, axis2=2)[:, 2:]
    return Samples(("R", "w"), s, np.hstack([R, w]), crb)


def main() -> None:
    """Train each kind with each seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    training, held_out = decays(8192, seed=0), decays(4096, seed=1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| seed | | training loss | over float32 | validation loss | over float32 |")
    print("|---|---|---|---|---|---|")
    for seed in range(given.seeds):
        first: tuple[float, float] | None = None
        for kind, change in KINDS.items():
            config = CONFIG.model_copy(update=change | {"seed": seed})
            *_, (last, _) = train(training, held_out, config)
            losses = last.train_loss, last.validation_loss
            first = first or losses
            cells = [
                f"{loss:.4f} | {100 * (loss / reference - 1):+.1f} %"
                for loss, reference in zip(losses, first, strict=True)
            ]
            print(f"| {seed} | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
