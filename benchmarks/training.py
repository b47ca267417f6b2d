"""Time of a training step on the CPU, in variants, beside a plain eager float32 loop.

    python benchmarks/training.py [--batch 512]

One process, medians over repeats, all in turns so that a busy neighbour slows all alike. The peer
is what a newcomer writes: the same network, torch's default Adam, no compilation. Steps are those
of `train.train`; noise and M0, which are drawn once an epoch, are timed apart.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fisherprint import train
from fisherprint.network import Network

REPEATS = 15
STEPS = 3
RANK, N_ESTIMATED = 13, 3
TRAINING_SET = 92160
PEER = "eager float32, the peer"

Step = Callable[[], None]


def step(
    batch: tuple[torch.Tensor, ...],
    *,
    precision: str,
    compiled: bool,
    fused: bool,
    autocast: bool,
    averaged: bool,
) -> Step:
    """One update of the weights of a network of its own."""
    generator = torch.Generator().manual_seed(0)
    network = Network(RANK, np.zeros(N_ESTIMATED), np.ones(N_ESTIMATED), generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=fused)
    layers, products = network.from_features, getattr(torch, precision)
    if compiled:
        layers = torch.compile(layers, fullgraph=True, dynamic=False)
    coefficients, truth, crb = batch
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999)) if averaged else None

    def update() -> None:
        x = network.features(coefficients)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            estimate = layers(x, products)
        loss = train.crb_loss(estimate, truth, crb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if mean is not None:
            mean.update_parameters(network)

    return update


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512, help="samples in a step")
    size = parser.parse_args().batch
    generator = torch.Generator().manual_seed(1)
    coefficients = torch.randn((size, RANK), dtype=torch.complex64, generator=generator)
    truth, crb = (torch.rand((size, N_ESTIMATED), generator=generator) + 0.1 for _ in range(2))
    batch = (coefficients, truth, crb)
    plain = {"precision": "float32"} | dict.fromkeys(
        ("compiled", "fused", "autocast", "averaged"), False
    )
    fastest = {"compiled": True, "fused": True, "precision": "bfloat16"}
    variants = {
        PEER: {},
        "eager float32, fused Adam": {"fused": True},
        "eager bfloat16, as `precision` has it": {"precision": "bfloat16"},
        "eager bfloat16, torch's autocast": {"autocast": True},
        "compiled float32, fused Adam": {"compiled": True, "fused": True},
        "compiled bfloat16, fused Adam": fastest,
        "the same with averaged weights": fastest | {"averaged": True},
        "compiled autocast, fused Adam": {"compiled": True, "fused": True, "autocast": True},
    }
    work = {label: step(batch, **plain | change) for label, change in variants.items()}
    start: dict[str, float] = {}
    for label, update in work.items():
        began = time.perf_counter()
        update()
        start[label] = time.perf_counter() - began
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in range(REPEATS):
        for label, update in work.items():
            update()  # caches hold the weights of this one
            began = time.perf_counter()
            for _ in range(STEPS):
                update()
            times[label].append(1e3 * (time.perf_counter() - began) / STEPS)
        print(f"repeat {repeat + 1} of {REPEATS}", file=sys.stderr)
    config = train.TrainingConfig()
    clean = torch.randn((TRAINING_SET, RANK), dtype=torch.complex64, generator=generator)
    bounds = torch.ones((TRAINING_SET, N_ESTIMATED))
    began = time.perf_counter()
    train.augment(clean, bounds, config, generator)
    augmentation = 1e3 * (time.perf_counter() - began) * size / TRAINING_SET

    ms = {label: float(np.median(values)) for label, values in times.items()}
    peer = ms[PEER]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, {size} samples in a step")
    print("| a step | ms | times as fast | first step, s |")
    print("|---|---|---|---|")
    for label, value in ms.items():
        print(f"| {label} | {value:.1f} | {peer / value:.2f} | {start[label]:.1f} |")
    print(f"| its share of an epoch's noise and M0 | {augmentation:.2f} | | |")
    saved = ms["eager bfloat16, as `precision` has it"] - ms["compiled bfloat16, fused Adam"]
    needed = 1e3 * start["compiled bfloat16, fused Adam"] / saved if saved > 0 else np.inf
    print(f"\ncompilation of bfloat16 steps pays from {needed:.0f} steps on")


if __name__ == "__main__":
    main()
