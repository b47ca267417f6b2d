"""Ours and BART 0.8.00 on the same data in the same run: images, time, memory.

    python benchmarks/reconstruct.py                      # the table: 48³, T 64, K 6, 8 coils
    python benchmarks/reconstruct.py --matrix 16 --repeat 1 --iterations 10     # a trial
    python benchmarks/reconstruct.py --out-of-core        # 64³, K 13, 4 coils: kernel on the disk

Each measurement is a process of its own (this script with --child), so that the peak of its memory
is its own; ours and BART's alternate. Needs `bart` (apt-get install bart).

On a busy machine seconds on the clock tell little: BART's threads wait for one another in loops.
There compare one thread of each, by the processor time that both use:
`OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/reconstruct.py ...`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint.reconstruct import encoding, lowrank, scanning, solve, toeplitz, trajectory

Images = NDArray[np.complex64]
L2, LLR, BLOCK = 0.01, 0.002, 8
# Of k-space with noise, σ of the complex number relative to the root mean square of the samples.
NOISE = 0.1


def relative(a: Images, b: Images) -> float:
    """‖a - b‖/‖b‖."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def problem(folder: Path, n: int, T: int, K: int, coils: int, cycles: int, noise: float) -> Images:
    """Write the files of a sphere-limited object; its truth."""
    from fisherprint import files

    rng = np.random.default_rng(0)
    spokes = trajectory.radial_scan(T, cycles, trajectory.readout(n, 2))
    basis = np.linalg.qr(rng.standard_normal((T, K)))[0] * np.exp(2j * np.pi * rng.uniform(size=K))
    lines = [(np.arange(n) - n // 2) / (n / 2)] * 3
    x = np.stack(np.meshgrid(*lines, indexing="ij"))
    radius = np.sqrt((x**2).sum(0))
    # A few ellipsoids with coefficients of their own: locally of low rank.
    truth = np.zeros((K, n, n, n), np.complex128)
    for number in range(6):
        centre = 0.4 * rng.uniform(-1, 1, 3)
        axes = rng.uniform(0.2, 0.5, 3) if number else np.full(3, 0.8)
        inside = (
            (x - centre[:, None, None, None] * bool(number)) / axes[:, None, None, None]
        ) ** 2
        truth += (
            rng.standard_normal(K)[:, None, None, None]
            / 2 ** np.arange(K)[:, None, None, None]
            * (inside.sum(0) < 1)
        )
    truth *= np.exp(1j * x[0])
    # Spokes see a ball of k-space: a truth beyond that could not be found by either.
    spectrum = np.fft.fftshift(np.fft.fftn(truth, axes=(1, 2, 3)), axes=(1, 2, 3))
    spectrum *= radius < 0.95
    truth = np.fft.ifftn(np.fft.ifftshift(spectrum, axes=(1, 2, 3)), axes=(1, 2, 3))
    truth = truth.astype(np.complex64)
    sampling = encoding.Sampling(spokes, basis, (n, n, n))
    maps = scanning.coil_sensitivities((n, n, n), coils)
    kspace = encoding.forward(sampling, maps, truth)
    parts = rng.standard_normal((*kspace.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    kspace += noise * np.sqrt((np.abs(kspace) ** 2).mean() / 2) * parts
    files.write_cfl(folder / "traj", spokes.transpose(3, 2, 1, 0)[:, :, :, None, None])
    files.write_cfl(folder / "data", kspace.transpose(3, 2, 0, 1)[None, :, :, :, None])
    files.write_cfl(folder / "basis", sampling.basis[None, None, None, None, None])
    files.write_cfl(folder / "maps", maps.transpose(1, 2, 3, 0))
    # Ours reads plain arrays: other formats would load libraries that count as its memory.
    for name, array in (("spokes", spokes), ("basis", basis), ("maps", maps), ("kspace", kspace)):
        np.save(folder / f"{name}.npy", array)
    return truth


def read(folder: Path) -> tuple[encoding.Sampling, Images, Images]:
    """Sampling, sensitivities and k-space."""
    spokes, basis, maps = (np.load(folder / f"{name}.npy") for name in ("spokes", "basis", "maps"))
    kspace = np.load(folder / "kspace.npy", mmap_mode="r")
    return encoding.Sampling(spokes, basis, maps.shape[1:]), maps, kspace


def noise_level(folder: Path) -> float:
    """λ that just takes the noise away, from σ alone: nothing is tuned to the truth.

    Of data that are not scaled, as BART with -w 1 leaves them.
    """
    sampling, _, kspace = read(folder)
    # Of signal and noise together.
    energy = np.mean([np.mean(np.abs(coil) ** 2) for coil in kspace])
    return float(sampling.noise_gain * NOISE * np.sqrt(energy / (1 + NOISE**2)))


def child(folder: Path, method: str, iterations: int, kernel_file: str | None) -> None:
    """One reconstruction of ours from files to a file, and what it took."""
    began = time.perf_counter()
    sampling, maps, kspace = read(folder)
    kernel = toeplitz.kernel(sampling, path=kernel_file)
    right = encoding.adjoint(sampling, maps, kspace)

    def normal(images: Images) -> Images:
        return toeplitz.normal(kernel, maps, images)

    kind, weight = method.split(":")
    if kind == "l2":
        states = solve.conjugate_gradients(normal, right, l2=float(weight))
    else:
        step = solve.STEP / solve.largest_eigenvalue(normal, right)
        prior = lowrank.LocallyLowRank(float(weight), BLOCK, None if kind == "matched" else 0)
        states = solve.fista(normal, right, prior, step=step)
    state = next(state for state in states if state.iteration == iterations)
    np.save(folder / "ours.npy", state.images)
    if kind != "l2":
        # BART leaves its loop after the gradient step, before the threshold.
        ahead = state.direction + np.float32(step) * (right - normal(state.direction))
        np.save(folder / "ahead.npy", ahead)
    took = {
        "seconds": time.perf_counter() - began,
        "processor": processor_time(resource.RUSAGE_SELF),
        "peak": resident_peak("self"),
    }
    print(json.dumps(took))


def ours(
    folder: Path, method: str, iterations: int, kernel_file: Path | None = None
) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--child", str(folder), method, str(iterations)]
    command += [str(kernel_file)] if kernel_file else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def bart(folder: Path, method: str, iterations: int) -> dict[str, float]:
    """BART's time and peak of memory; its images are in `out`."""
    kind, weight = method.split(":")
    options = ["-l2", "-r", weight]
    if kind != "l2":
        options = ["-e", "-b", str(BLOCK), "-R", f"L:7:7:{weight}"]
        options += ["-n"] if kind == "matched" else []
    command = ["bart", "pics", "-S", "-w", "1", *options, "-i", str(iterations), "-t", "traj"]
    command += ["-B", "basis", "data", "maps", "out"]
    began, before = time.perf_counter(), processor_time(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_peak(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {
        "seconds": time.perf_counter() - began,
        "processor": processor_time(resource.RUSAGE_CHILDREN) - before,
        "peak": peak,
    }


def processor_time(who: int) -> float:
    """Seconds of all cores together, of this process or of those that it waited for."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def resident_peak(process: int | str) -> int:
    """Largest resident size so far, bytes; 0 of a process that has ended.

    Not ru_maxrss: the size of the process that starts another counts for it.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return 1024 * int(found[0]) if found else 0


def images_of_bart(folder: Path, shape: tuple[int, ...]) -> Images:
    """(K, N0, N1, N2)."""
    from fisherprint import files

    images = np.array(files.open_cfl(folder / "out"))
    return np.moveaxis(images.reshape(*shape[1:], shape[0], order="F"), -1, 0)


def compare(folder: Path, truth: Images, method: str, iterations: int, repeat: int) -> str:
    """A row of the table."""
    pairs = [
        (ours(folder, method, iterations), bart(folder, method, iterations)) for _ in range(repeat)
    ]
    seconds, processor, memory = (
        float(np.median([a[what] / b[what] for a, b in pairs]))
        for what in ("seconds", "processor", "peak")
    )
    theirs = images_of_bart(folder, truth.shape)
    found = np.load(folder / "ours.npy")
    same = found if method.startswith("l2") else np.load(folder / "ahead.npy")
    return (
        f"| {method}, {iterations} iterations | {relative(same, theirs):.1e} "
        f"| {relative(found, truth):.4f}, {relative(same, truth):.4f} / "
        f"{relative(theirs, truth):.4f} | {seconds:.2f} ({pairs[0][0]['seconds']:.0f} s / "
        f"{pairs[0][1]['seconds']:.0f} s) | {processor:.2f} | {memory:.2f} "
        f"({pairs[0][0]['peak'] / 2**20:.0f} / {pairs[0][1]['peak'] / 2**20:.0f} MiB) |"
    )


def exactness(folder: Path) -> str:
    """Adjointness, and the Toeplitz operator against the pair."""
    sampling, maps, kspace = read(folder)
    maps = maps[:1]
    rng = np.random.default_rng(1)
    images = (
        rng.standard_normal((*sampling.shape, 2)).astype(np.float32).view(np.complex64)[..., 0]
    )
    y, back = np.array(kspace[:1]), encoding.adjoint(sampling, maps, kspace[:1])
    there = encoding.forward(sampling, maps, images)
    gap = abs(np.vdot(y, there) - np.vdot(back, images))
    gap /= np.linalg.norm(back) * np.linalg.norm(images)
    pair = encoding.adjoint(sampling, maps, there)
    return (
        f"adjointness {gap:.1e}; Toeplitz against the pair "
        f"{relative(toeplitz.normal(toeplitz.kernel(sampling), maps, images), pair):.1e}"
    )


def early_stopped(folder: Path, truth: Images, iterations: int) -> str:
    """The smallest error of conjugate gradients without regularization."""
    sampling, maps, kspace = read(folder)
    kernel = toeplitz.kernel(sampling)
    right = encoding.adjoint(sampling, maps, kspace)
    best = (np.inf, 0)
    for state in solve.conjugate_gradients(lambda x: toeplitz.normal(kernel, maps, x), right):
        best = min(best, (relative(state.images, truth), state.iteration))
        if state.iteration == iterations or state.iteration > best[1] + 4:
            break
    return f"best early-stopped CG: error {best[0]:.4f} after {best[1]} iterations"


def out_of_core(n: int, K: int, coils: int, iterations: int) -> None:
    """Kernel on the disk against kernel in memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem(folder, n, 64, K, coils, 10, 0.0)
        method = f"l2:{L2}"
        inside = ours(folder, method, iterations)
        expected = np.load(folder / "ours.npy")
        kernel = folder / "kernel.h5"
        first = ours(folder, method, iterations, kernel)
        again = ours(folder, method, iterations, kernel)
        print(f"{n}³, K = {K}, {coils} coils, {iterations} iterations")
        for label, took in (("in memory", inside), ("on the disk", first), ("again", again)):
            print(f"  {label}: {took['seconds']:.1f} s, peak {took['peak'] / 2**20:.0f} MiB")
        print(f"  ratio of times {first['seconds'] / inside['seconds']:.2f}")
        print(f"  difference {relative(np.load(folder / 'ours.npy'), expected):.1e}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--matrix", type=int, default=48)
    parser.add_argument("--pulses", type=int, default=64)
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out-of-core", action="store_true")
    a = parser.parse_args()
    warnings.simplefilter("ignore", encoding.UndersampledWarning)
    if a.child:
        folder, method, iterations, *kernel = a.child
        child(Path(folder), method, int(iterations), kernel[0] if kernel else None)
        return
    if a.out_of_core:
        out_of_core(64 if a.matrix == 48 else a.matrix, 13, 4, a.iterations)
        return
    print(
        "| what | ours - BART's | error to the truth, ours, at BART's point / BART's | time | "
        "processor | memory |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = problem(folder, a.matrix, a.pulses, a.rank, a.coils, a.cycles, 0.0)
        for method in (f"l2:{L2}", f"matched:{LLR}"):
            print(compare(folder, truth, method, a.iterations, a.repeat), flush=True)
        print(exactness(folder), flush=True)
        truth = problem(folder, a.matrix, a.pulses, a.rank, a.coils, 10, NOISE)
        print(f"10 cycles, {NOISE:.0%} noise:")
        # With so few samples images are far from their limit after as many iterations as above.
        method, iterations = f"llr:{noise_level(folder):.2g}", 2 * a.iterations
        print(compare(folder, truth, method, iterations, 1), flush=True)
        print(early_stopped(folder, truth, iterations))


if __name__ == "__main__":
    main()
