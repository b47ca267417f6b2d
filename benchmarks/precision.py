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

from fisherprint import Parameter, fisher
from fisherprint.models import TorchModel
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
    """Complex decays exp((-R + i w) t) with their bounds, for σ = 1 and unknown M0."""
    t = torch.linspace(0, 1.5, 8, dtype=torch.float64)
    R = Parameter("R", "$R$", "1/s", (0.0, 5.0))
    w = Parameter("w", "$\\omega$", "rad/s", (-5.0, 5.0))
    model = TorchModel(lambda θ: torch.exp((-θ[0] + 1j * θ[1]) * t), [R, w])
    rng = np.random.default_rng(seed)
    theta = np.hstack([rng.uniform(0.2, 2, (size, 1)), rng.uniform(-0.5, 0.5, (size, 1))])
    out = model.simulate(theta)
    crb = fisher.bounds(fisher.information(out.signal, out.jacobian, noise_std=1.0))
    return Samples(model.names, out.signal, theta, crb[:, : len(model.names)])


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
