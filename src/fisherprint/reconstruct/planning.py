"""What a reconstruction takes, before it starts: memory, disk and time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import finufft
import numpy as np
import scipy.fft

from fisherprint import _threads
from fisherprint.reconstruct import toeplitz
from fisherprint.reconstruct.encoding import Matrix

# Arrays as large as the images that iterations hold at once: b, x, the direction and the remainder
# of the step before, the same of the new one, A p, and two inside the normal operator.
_IMAGES = 9
# What an adjoint and two fields of a kernel take beside the spreading, in transforms of the
# doubled grid: products, copies and sums are most of it. Measured at 48³ and 64³.
_ADJOINT, _KERNEL = 4, 15
# Voxels on which the operator is timed.
_TRIED = 32**3
# ESPIRiT's patches, and matrices of their size that exist at once: 5.2 with 20 coils.
_PATCH, _PATCHES = 6, 5.5
# Applications of the power iteration, from the back projection.
_POWER = 6


@dataclass(frozen=True)
class Request:
    """What is to be reconstructed.

    Attributes:
        matrix: voxels.
        rank: K.
        hermitian: whether the basis is complex.
        coils: virtual ones.
        samples: of one coil, T S R.
        iterations: how many.
        eigenvalue: whether the largest eigenvalue is needed, by FISTA.
        espirit: whether sensitivities are found from the data.
    """

    matrix: Matrix
    rank: int
    hermitian: bool
    coils: int
    samples: int
    iterations: int
    eigenvalue: bool = True
    espirit: bool = True

    @property
    def n_voxels(self) -> int:
        """Of one image."""
        return math.prod(self.matrix)


@dataclass(frozen=True)
class Forecast:
    """What it takes.

    Attributes:
        memory: resident bytes of each stage; the largest counts.
        disk: bytes of the kernel, of the compressed k-space, and of what is kept to go on.
        seconds: of each stage.
    """

    memory: dict[str, float]
    disk: float
    seconds: dict[str, float]

    @property
    def peak(self) -> float:
        """Bytes of the stage that needs most."""
        return max(self.memory.values())

    def lines(self) -> list[str]:
        """For people."""
        stages = ", ".join(f"{name} {_duration(value)}" for name, value in self.seconds.items())
        most = max(self.memory, key=lambda name: self.memory[name])
        return [
            f"expected memory: {self.peak / 2**30:.3g} GiB ({most}); disk: "
            f"{self.disk / 2**30:.3g} GiB",
            f"expected time: {_duration(sum(self.seconds.values()))} ({stages})",
        ]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Speed:
    """Of this machine, with the threads that will be used; N is a number of voxels.

    Attributes:
        transform: seconds of a Fourier transform for each N log2 N.
        spread: seconds of a non-uniform transform for each sample, beside its Fourier transform.
        piece: seconds of the normal operator for each N log2 N, one coil and one piece.
    """

    transform: float
    spread: float
    piece: float


def measure(request: Request, *, threads: int | None = None) -> Speed:
    """The speed of this machine, in a second."""
    threads = threads or _threads.usable()
    n, rng = 64, np.random.default_rng(0)
    volumes = np.zeros((threads, n, n, n), np.complex64)
    transform = _fastest(lambda: scipy.fft.fftn(volumes, axes=(1, 2, 3), workers=threads))

    def non_uniform(m: int) -> float:
        plan = finufft.Plan(
            1, (n, n, n), eps=1e-5, dtype="complex64", nthreads=threads, showwarn=0
        )
        plan.setpts(*rng.uniform(-np.pi, np.pi, (3, m)).astype(np.float32))
        strengths = np.ones(m, np.complex64)
        return _fastest(lambda: plan.execute(strengths))

    # The operator itself, on no more voxels than take a moment; its products depend on K.
    edge = round(_TRIED ** (1 / max(1, sum(n > 1 for n in request.matrix))))
    matrix = (min(edge, request.matrix[0]), *(min(edge, n) for n in request.matrix[1:]))
    voxels = math.prod(matrix)
    fields = toeplitz.n_fields(request.rank, hermitian=request.hermitian)
    values = np.ones((1, fields, voxels), np.float32)
    kernel = toeplitz.Kernel(matrix, request.rank, request.hermitian, "", values)
    images = np.ones((request.rank, *matrix), np.complex64)
    coil = np.ones((1, *matrix), np.complex64)
    piece = _fastest(lambda: toeplitz.part(kernel, 0, coil, images, threads))
    return Speed(
        transform / threads / (n**3 * math.log2(n**3)),
        # Of a busy machine the difference may be noise.
        max(0.0, non_uniform(220_000) - non_uniform(20_000)) / 200_000,
        piece / (voxels * math.log2(max(2, voxels))),
    )


def _fastest(function: Callable[[], object]) -> float:
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


def forecast(request: Request, speed: Speed) -> Forecast:
    """Memory from the arrays that exist at once, time from the number of transforms."""
    voxels, axes = request.n_voxels, sum(n > 1 for n in request.matrix)
    image = 8.0 * voxels
    images, maps = request.rank * image, request.coils * image
    doubled = 2**axes * image
    # Positions, as given and as angles; strengths, their copy, and the order of the points.
    points = (12 + 4 * axes + 8 + 8 + 8) * request.samples
    fields = toeplitz.n_fields(request.rank, hermitian=request.hermitian)
    kernel = toeplitz.n_bytes(request.matrix, request.rank, hermitian=request.hermitian)
    piece = kernel / len(toeplitz.parities(request.matrix))
    memory = {
        "adjoint": points + 16 * request.samples + 2**axes * image + images + maps,
        "kernel": points + 1.25**axes * doubled + 1.8 * doubled,
        "iterations": _IMAGES * images + maps + piece,
    }
    if request.espirit:
        unknowns = request.coils * math.prod(min(_PATCH, n) for n in request.matrix)
        memory["sensitivities"] = _PATCHES * 16 * unknowns**2
    # Maps, b and what an interrupted iteration leaves: images, direction and remainder.
    disk = kernel + maps + 4 * images + 8.0 * request.coils * request.samples

    def transform(n: float) -> float:
        return speed.transform * n * math.log2(n)

    one = 2**axes * request.coils * speed.piece * voxels * math.log2(voxels)
    spread = speed.spread * request.samples
    seconds = {
        "adjoint": request.coils * request.rank * (spread + _ADJOINT * transform(doubled / 8)),
        "kernel": fields / 2 * (spread + _KERNEL * transform(doubled / 8)),
    }
    if request.eigenvalue:
        seconds["eigenvalue"] = _POWER * one
    seconds["iterations"] = request.iterations * one
    return Forecast(memory, disk, seconds)


def available_memory() -> float | None:
    """Bytes that a new process may use; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return 1024.0 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return None
