"""Time of a training step, in variants, beside a plain eager float32 loop.

    python benchmarks/training.py [--batch 512] [--device cuda]

One process, medians over repeats, all in turns so that a busy neighbour slows all alike. The peer
is what a newcomer writes: the same network, torch's default Adam, no compilation. Steps are those
of `train.train`; noise and M0, which are drawn once an epoch, are timed apart.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fisherprint import train
from fisherprint.network import Network
from fisherprint.train.steps import Mean, Recorded

REPEATS = 15
STEPS = {"cpu": 3, "cuda": 100}
# The fourth one is recorded.
WARM_UP = {"cpu": 1, "cuda": 4}
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
    recorded: bool,
) -> Step:
    """One update of the weights of a network of its own."""
    generator = torch.Generator().manual_seed(0)
    network = Network(RANK, np.zeros(N_ESTIMATED), np.ones(N_ESTIMATED), generator=generator)
    device = batch[0].device
    network.to(device)
    rate = torch.tensor(1e-4, device=device) if recorded else 1e-4
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=fused, capturable=recorded)
    layers, products = network.from_features, getattr(torch, precision)
    if compiled:
        layers = torch.compile(layers, fullgraph=True, dynamic=False)
    mean = Mean(network, 1000) if averaged else None

    def plain(batch: Sequence[torch.Tensor]) -> None:
        coefficients, truth, crb = batch
        x = network.features(coefficients)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            estimate = layers(x, products)
        loss = train.crb_loss(estimate, truth, crb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    update = Recorded(plain) if recorded else plain

    def whole() -> None:
        update(batch)
        if mean is not None:
            mean.move(1000)

    return whole


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512, help="samples in a step")
    parser.add_argument("--device", choices=list(STEPS), default="cpu")
    given = parser.parse_args()
    size, device, n_steps = given.batch, given.device, STEPS[given.device]
    generator = torch.Generator(device).manual_seed(1)
    drawn = {"generator": generator, "device": device}
    coefficients = torch.randn((size, RANK), dtype=torch.complex64, **drawn)
    truth, crb = (torch.rand((size, N_ESTIMATED), **drawn) + 0.1 for _ in range(2))
    batch = (coefficients, truth, crb)
    plain = {"precision": "float32"} | dict.fromkeys(
        ("compiled", "fused", "autocast", "averaged", "recorded"), False
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
    if device == "cuda":
        # What `train.train` does there.
        variants["eager float32, fused Adam, recorded"] = {"fused": True, "recorded": True}
        variants["compiled bfloat16, fused Adam, recorded"] = fastest | {"recorded": True}
        variants["the same with averaged weights, recorded"] = fastest | {
            "averaged": True,
            "recorded": True,
        }
    work = {label: step(batch, **plain | change) for label, change in variants.items()}
    start: dict[str, float] = {}
    for label, update in work.items():
        began = time.perf_counter()
        for _ in range(WARM_UP[device]):
            update()
        wait(device)
        start[label] = time.perf_counter() - began
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in range(REPEATS):
        for label, update in work.items():
            update()  # caches hold the weights of this one
            wait(device)
            began = time.perf_counter()
            for _ in range(n_steps):
                update()
            wait(device)
            times[label].append(1e3 * (time.perf_counter() - began) / n_steps)
        print(f"repeat {repeat + 1} of {REPEATS}", file=sys.stderr)
    config = train.TrainingConfig()
    clean = torch.randn((TRAINING_SET, RANK), dtype=torch.complex64, **drawn)
    bounds = torch.ones((TRAINING_SET, N_ESTIMATED), device=device)
    train.augment(clean, bounds, config, generator)
    wait(device)
    began = time.perf_counter()
    train.augment(clean, bounds, config, generator)
    wait(device)
    augmentation = 1e3 * (time.perf_counter() - began) * size / TRAINING_SET

    ms = {label: float(np.median(values)) for label, values in times.items()}
    peer = ms[PEER]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,")
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()},")
    print(f"torch {torch.__version__}, {size} samples in a step")
    print("| a step | ms | times as fast | first steps, s |")
    print("|---|---|---|---|")
    for label, value in ms.items():
        print(f"| {label} | {value:.3g} | {peer / value:.2f} | {start[label]:.1f} |")
    print(f"| its share of an epoch's noise and M0 | {augmentation:.2f} | | |")
    saved = ms["eager bfloat16, as `precision` has it"] - ms["compiled bfloat16, fused Adam"]
    needed = 1e3 * start["compiled bfloat16, fused Adam"] / saved if saved > 0 else np.inf
    print(f"\ncompilation of bfloat16 steps pays from {needed:.0f} steps on")


if __name__ == "__main__":
    main()
