"""Voxels per second of a trained network on the CPU, and a whole `fisherprint map --no-errors`.

    python benchmarks/network.py RUN [--voxels 2000000]

RUN holds a data set and a trained network. The images are its test fingerprints at random, with
noise. The peer is what a newcomer writes: the network itself in float32, 16384 voxels at a time,
on all cores. All in turns, medians over repeats, so that a busy neighbour slows all alike; the
limit is what the products of the layers take by themselves.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from fisherprint import experiment as stages
from fisherprint import inference
from fisherprint.experiment import labelled, load_network
from fisherprint.network import as_estimator
from fisherprint.onnx_graph import as_onnx

REPEATS = 7
PEER_CHUNK = 16384
# Voxels of one timing: seconds each.
TIMED = 65536
# Voxels of a slice of the images.
SLICE = (128, 125)
SNR = (10.0, 50.0, 100.0)
IMAGE_SNR = 50.0

Array = NDArray[np.complex64]


def noisy(clean: NDArray[np.complex128], snr: float, rng: np.random.Generator) -> Array:
    """Coefficients for |M0| = 1, with a random phase and noise."""
    M0 = np.exp(2j * np.pi * rng.random((len(clean), 1)))
    noise = rng.standard_normal((*clean.shape, 2)).view(np.complex128)[..., 0]
    return (M0 * clean + noise / snr).astype(np.complex64)


def whole_command(
    run: Path, clean: NDArray[np.complex128], n_slices: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Seconds and peak memory in GiB of `fisherprint map`, written slice by slice before."""
    shape = (n_slices, *SLICE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = np.lib.format.open_memmap(
            folder / "images.npy", "w+", np.complex64, (*shape, clean.shape[1])
        )
        for part in images:
            chosen = clean[rng.integers(len(clean), size=part.shape[0] * part.shape[1])]
            part[...] = noisy(chosen, IMAGE_SNR, rng).reshape(part.shape)
        images.flush()
        del images
        np.save(folder / "mask.npy", np.ones(shape, dtype=np.uint8))
        call = [sys.executable, "-m", "fisherprint.cli", "map", folder / "images.npy"]
        arguments = ["--mask", folder / "mask.npy", "--run", run, "-o", folder / "maps"]
        began = time.perf_counter()
        subprocess.run([*call, *arguments, "--no-errors"], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
    # In KiB on Linux; of this process at most what it has before, which is less.
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--voxels", type=int, default=2_000_000, help="of the whole command")
    given = parser.parse_args()
    run = stages.open_run(given.run)
    network, card = load_network(run)
    test = labelled(stages.read_data(run)[0], "test", tuple(card["estimated"]))
    if network.n_extra:
        sys.exit("expected a network of coefficients alone; this one has inputs beside them.")
    rng = np.random.default_rng(0)
    n_slices = max(1, given.voxels // (SLICE[0] * SLICE[1]))
    seconds, memory = whole_command(given.run, test.coefficients, n_slices, rng)

    n_timed = min(TIMED, given.voxels)
    voxels = noisy(test.coefficients[rng.integers(len(test.theta), size=n_timed)], IMAGE_SNR, rng)
    real = np.hstack([voxels.real, voxels.imag])
    session = onnxruntime.InferenceSession(as_onnx(network, {}))
    layers = inference.layers(network.linear[:-1], network.norm, "float32")

    @torch.inference_mode()
    def plain(c: Array) -> NDArray[np.float32]:
        parts = (c[i : i + PEER_CHUNK] for i in range(0, len(c), PEER_CHUNK))
        return np.concatenate([network(torch.from_numpy(part)).numpy() for part in parts])

    def products(x: NDArray[np.float32]) -> NDArray[np.float32]:
        for layer in layers:
            x = layer.product(x)
        return x[:, :1]

    fast = inference.fastest()
    ours = {p: as_estimator(network, precision=p) for p in ("float32", "bfloat16")}
    work: dict[str, Callable[[], object]] = {"eager float32, the peer": lambda: plain(voxels)}
    work["ours, float32"] = lambda: ours["float32"](voxels)
    if fast == "bfloat16":
        work["ours, bfloat16"] = lambda: ours["bfloat16"](voxels)
    work["onnxruntime"] = lambda: session.run(None, {"coefficients": real})
    column = np.empty((n_timed, 1))
    work["limit: float32 products alone"] = lambda: inference.in_parts(products, real, column)
    times: dict[str, list[float]] = {label: [] for label in work}
    for repeat in range(REPEATS + 1):
        for label, call in work.items():
            began = time.perf_counter()
            call()
            # The first one compiles and allocates.
            if repeat:
                times[label].append(time.perf_counter() - began)
        print(f"repeat {repeat} of {REPEATS}", file=sys.stderr)

    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, onnxruntime")
    print(f"{onnxruntime.__version__}; the faster precision here is {fast}; {n_timed} voxels")
    print("| | voxels/s | µs a voxel | times as fast |")
    print("|---|---|---|---|")
    peer = np.median(times["eager float32, the peer"])
    for label, values in times.items():
        median = float(np.median(values))
        rate, micro = n_timed / median, 1e6 * median / n_timed
        print(f"| {label} | {rate:.0f} | {micro:.1f} | {peer / median:.2f} |")

    print("\nDifference from the peer in % of √CRB: root mean square, 99 % of all below\n")
    print("| | " + " | ".join(f"SNR {snr:g}" for snr in SNR) + " |")
    print("|---" * (1 + len(SNR)) + "|")
    few = test.coefficients, np.sqrt(test.crb)
    for precision, estimate in ours.items():
        cells = []
        for snr in SNR:
            c = noisy(few[0], snr, rng)
            off = np.abs(estimate(c) - plain(c)) / (few[1] / snr)
            cells.append(
                f"{100 * np.sqrt((off**2).mean()):.2g}, {100 * np.quantile(off, 0.99):.2g}"
            )
        print(f"| {precision} | " + " | ".join(cells) + " |")

    n_voxels = n_slices * SLICE[0] * SLICE[1]
    print(f"\n`fisherprint map --no-errors` of {n_voxels} voxels, {network.rank} coefficients, in")
    print(f"{fast}: {seconds:.1f} s, peak memory {memory:.2f} GiB")


if __name__ == "__main__":
    main()
