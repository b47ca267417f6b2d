r"""The normal operator Aᴴ W A as convolutions, each of them exact on a doubled grid.

    (Aᴴ W A x)_i = Σ_c conj(S_c) Σ_j T_ij * (S_c x_j),
    T_ij(d) = 1/(N0 N1 N2) Σ_tm w conj(U_ti) U_tj exp(2πi k_tm·d/N),   |d| < N

T_ji(d) = conj T_ij(-d), so that the transforms P_ij(f) make a Hermitian matrix at each frequency f
of the doubled grid, and a real one for a real basis: K (K + 1)/2 real numbers, else K².

A frequency of the doubled grid is f = 2 g + p, p = 0 or 1 along each axis. Zero padding needs not
be done: for each p, `exp(-πi p r/N)` before a transform of the image's own size gives the
frequencies of this parity. Each of these (at most eight) pieces takes its part of the kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import finufft
import h5py
import numba
import numpy as np
import scipy.fft
from numpy.typing import NDArray

from fisherprint import _checks, _storage, _threads
from fisherprint.reconstruct.encoding import Images, Matrix, Sampling

Progress = Callable[[str, int, int], None]

# What the smaller of finufft's two grids can reach in single precision; the grid of a doubled
# volume is what most of the memory goes to.
_GRID, _PRECISION = 1.25, 1e-5
# Frequencies whose coefficients stay in the innermost caches through the product.
_AT_ONCE = 256
# Numbers in the images below which threads cost more than they bring.
_WORTH_THREADS = 1 << 15


def _silent(_what: str, _done: int, _total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """The Hermitian kernel P of a sampling, piece by piece.

    Attributes:
        matrix: voxels (N0, N1, N2).
        rank: K.
        hermitian: whether there are imaginary parts: K² fields; else K (K + 1)/2.
        digest: identity of the sampling.
        values: float32, shape (pieces, fields, N0 N1 N2); None if it lies in `path`.
        path: HDF5 file of the values, from which one piece at a time is mapped into memory.
    """

    matrix: Matrix
    rank: int
    hermitian: bool
    digest: str
    values: NDArray[np.float32] | None = None
    path: Path | None = None

    @property
    def parities(self) -> list[tuple[int, int, int]]:
        """The p of each piece."""
        return parities(self.matrix)

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return n_bytes(self.matrix, self.rank, hermitian=self.hermitian)

    def piece(self, number: int) -> NDArray[np.float32]:
        """Its fields, shape (fields, N0 N1 N2)."""
        if self.values is not None:
            return self.values[number]
        if self.path is None:
            raise ValueError("a kernel needs values or the path of a file; got neither.")
        with _storage.open_hdf5(self.path) as file:
            offset, shape = file["values"].id.get_offset(), file["values"].shape[1:]
        # A new map each time: what is mapped no longer does not count as resident.
        at = offset + number * 4 * math.prod(shape)
        return np.memmap(self.path, np.float32, "r", at, shape)


def parities(matrix: Matrix) -> list[tuple[int, int, int]]:
    """The p of each piece: 0 and 1 along each axis of several voxels."""
    p0, p1, p2 = ((0, 1) if n > 1 else (0,) for n in matrix)
    return list(itertools.product(p0, p1, p2))


def n_fields(rank: int, *, hermitian: bool) -> int:
    """Real numbers of the kernel at each frequency."""
    return rank**2 if hermitian else rank * (rank + 1) // 2


def n_bytes(matrix: Matrix, rank: int, *, hermitian: bool) -> int:
    """Size of a kernel."""
    each = n_fields(rank, hermitian=hermitian) * math.prod(matrix)
    return 4 * each * len(parities(matrix))


def kernel(
    sampling: Sampling,
    *,
    path: str | Path | None = None,
    threads: int | None = None,
    progress: Progress = _silent,
) -> Kernel:
    """The kernel of a sampling; from the file if it was computed before.

    Args:
        sampling: the samples.
        path: where it is kept and mapped from; in memory if None. A file of another sampling is
            replaced.
        threads: all cores of this process if None.
        progress: called with what is done, how many fields, and of how many.

    Raises:
        OSError: not enough room on the disk.
        UnreadableFileError: the file is there and no kernel, or damaged.
    """
    hermitian = bool(sampling.rows.imag.any())
    form = (sampling.matrix, sampling.rank, hermitian, sampling.digest)
    n_voxels, n_pieces = math.prod(sampling.matrix), len(parities(sampling.matrix))
    shape = (n_pieces, n_fields(sampling.rank, hermitian=hermitian), n_voxels)
    if path is None:
        values = np.empty(shape, np.float32)
        for piece, number, field in _fields(sampling, hermitian, threads, progress):
            values[piece, number] = field
        return Kernel(*form, values=values)
    path = Path(path)
    if not (path.is_file() and _belongs(path, sampling.digest, shape)):
        with _storage.large_hdf5(path, 4 * math.prod(shape)) as file:
            written = file.create_dataset("values", shape, "f4")
            file.attrs["sampling"] = sampling.digest
            for piece, number, field in _fields(sampling, hermitian, threads, progress):
                written[piece, number] = field
    return Kernel(*form, path=path)


def _belongs(path: Path, digest: str, shape: tuple[int, ...]) -> bool:
    with _storage.open_hdf5(path) as file:
        if "values" not in file or "sampling" not in file.attrs:
            raise _storage.UnreadableFileError(
                f"expected the kernel of a reconstruction at {path}; got an HDF5 file of "
                f"{_checks.listing(file)}. Name another file for the kernel."
            )
        dataset: h5py.Dataset = file["values"]
        return file.attrs["sampling"] == digest and dataset.shape == shape


def _fields(
    sampling: Sampling, hermitian: bool, threads: int | None, progress: Progress
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Piece, number and values of all fields: first Re P_ij for i ≤ j, then Im P_ij for i < j.

    Point-spread functions of real strengths have real transforms, so that two of them are the
    real and the imaginary part of one.
    """
    threads = threads or _threads.usable()
    strengths = _strengths(sampling.rows, hermitian)
    weights = np.ones((1, 1, 1), np.float32) if sampling.weights is None else sampling.weights
    doubled = tuple(2 * sampling.matrix[axis] for axis in sampling.axes)
    plan = finufft.Plan(
        1, doubled, eps=_PRECISION, upsampfac=_GRID, isign=1, dtype="complex64", nthreads=threads,
        showwarn=0,
    )  # fmt: skip
    plan.setpts(*sampling.angles())
    # The transform back over the doubled grid is the mean over the pieces.
    scale = 1 / (math.prod(sampling.matrix) * len(parities(sampling.matrix)))
    for first in range(0, len(strengths), 2):
        pair = strengths[first : first + 2]
        together = (pair[0] + 1j * pair[1] if len(pair) == 2 else pair[0] + 0j) * scale
        samples = np.broadcast_to(
            together.astype(np.complex64)[:, None, None] * weights, sampling.samples
        )
        spread = plan.execute(np.ascontiguousarray(samples).reshape(-1))
        spread = spread.reshape([2 * n if n > 1 else 1 for n in sampling.matrix])
        for piece, parity in enumerate(parities(sampling.matrix)):
            values = scipy.fft.fftn(
                _folded(spread, parity, sampling.matrix), overwrite_x=True, workers=threads
            ).reshape(-1)
            yield piece, first, values.real
            if len(pair) == 2:
                yield piece, first + 1, values.imag
        progress("kernel", min(first + 2, len(strengths)), len(strengths))


def _strengths(basis: NDArray[np.complex64], hermitian: bool) -> NDArray[np.float64]:
    """Re conj(U_i) U_j for i ≤ j, then Im for i < j, shape (fields, T)."""
    U = basis.astype(np.complex128)
    rank = U.shape[1]
    real = [(U[:, i].conj() * U[:, j]).real for i in range(rank) for j in range(i, rank)]
    imaginary = [(U[:, i].conj() * U[:, j]).imag for i in range(rank) for j in range(i + 1, rank)]
    return np.array(real + imaginary if hermitian else real)


def _folded(
    spread: NDArray[np.complex64], parity: tuple[int, int, int], matrix: Matrix
) -> NDArray[np.complex64]:
    """What one transform of the image's size turns into the frequencies 2 g + p.

    Lags are -N to N - 1 along each axis. Lag -N is no distance between two voxels; as zero it
    makes the rest exactly Hermitian.
    """
    for axis, (p, n) in enumerate(zip(parity, matrix, strict=True)):
        if n == 1:
            continue
        below, above = np.split(spread, 2, axis)
        below = np.moveaxis(below, axis, 0).copy()
        below[0] = 0
        spread = above + (-1) ** p * np.moveaxis(below, 0, axis)
        if p:
            spread *= _broadcast(_modulation(p, n), axis)
    return np.ascontiguousarray(spread)


def _modulation(p: int, n: int) -> NDArray[np.complex64]:
    """exp(-πi p r/N), shape (N,)."""
    return np.exp(-1j * np.pi * p * np.arange(n) / n).astype(np.complex64)


def _broadcast(line: NDArray[np.complex64], axis: int) -> NDArray[np.complex64]:
    return line.reshape([-1 if i == axis else 1 for i in range(3)])


def phase(parity: tuple[int, int, int], matrix: Matrix) -> NDArray[np.complex64]:
    """exp(-πi p·r/N) over the image, shape (N0, N1, N2)."""
    lines = [
        _broadcast(_modulation(p, n), axis)
        for axis, (p, n) in enumerate(zip(parity, matrix, strict=True))
    ]
    return reduce(np.multiply, lines)


def normal(
    kernel: Kernel,
    sensitivities: NDArray[np.complex64],
    images: Images,
    *,
    threads: int | None = None,
    executor: Executor | None = None,
) -> Images:
    """Aᴴ W A x.

    The loop over the pieces of the kernel is outside and that over the coils inside, so that a
    kernel on the disk is read once.

    Args:
        kernel: of the sampling.
        sensitivities: shape (C, N0, N1, N2).
        images: x, shape (K, N0, N1, N2).
        threads: all cores of this process if None.
        executor: computes pieces and groups of coils instead, one thread each. Workers of other
            processes need the kernel in a file that they see too.

    Returns:
        Shape (K, N0, N1, N2).

    Raises:
        ValueError: shapes that disagree.
    """
    axes = list(zip(("N0", "N1", "N2"), kernel.matrix, strict=True))
    _checks.shape("the sensitivities", sensitivities, [("C", None), *axes])
    _checks.shape("the images", images, [("K", kernel.rank), *axes])
    pieces = range(len(kernel.parities))
    total = np.zeros(images.shape, np.complex64)
    if executor is None:
        for piece in pieces:
            total += part(kernel, piece, sensitivities, images, threads)
        return total
    tasks = [
        executor.submit(part, kernel, piece, sensitivities[first : first + _COILS], images, 1)
        for piece in pieces
        for first in range(0, len(sensitivities), _COILS)
    ]
    # Added in the order of their making: the sum does not depend on who was first.
    while tasks:
        total += tasks.pop(0).result()
    return total


# Coils of one task; what a task gets and gives is K images whatever their number.
_COILS = 4


def part(
    kernel: Kernel,
    piece: int,
    sensitivities: NDArray[np.complex64],
    images: Images,
    threads: int | None = None,
) -> Images:
    """What one piece of the kernel and some coils add to Aᴴ W A x, shape (K, N0, N1, N2)."""
    values = kernel.piece(piece)
    modulation = phase(kernel.parities[piece], kernel.matrix)
    total = np.zeros(images.shape, np.complex64)
    seen = np.empty(images.shape, np.complex64)
    product = _hermitian_product if kernel.hermitian else _symmetric_product
    flat = seen.reshape(kernel.rank, -1)
    threads = (threads or _threads.usable()) if images.size > _WORTH_THREADS else 1
    step = max(_AT_ONCE, -(-flat.shape[1] // (4 * threads)))

    with _mapping(threads) as run:
        for coil in sensitivities:
            modulated = coil * modulation
            back = modulated.conj()

            def ahead(i: int, modulated: Images = modulated) -> None:
                np.multiply(images[i], modulated, out=seen[i])
                _keep(scipy.fft.fftn(seen[i], overwrite_x=True), seen[i])

            def multiply(first: int) -> None:
                product(values, flat, first, min(first + step, flat.shape[1]))

            def home(i: int, back: Images = back) -> None:
                _keep(scipy.fft.ifftn(seen[i], overwrite_x=True, norm="forward"), seen[i])
                np.multiply(seen[i], back, out=seen[i])
                total[i] += seen[i]

            run(ahead, range(kernel.rank))
            run(multiply, range(0, flat.shape[1], step))
            run(home, range(kernel.rank))
    total *= np.float32(1 / math.prod(kernel.matrix))
    return total


def _keep(result: NDArray[np.complex64], place: NDArray[np.complex64]) -> None:
    # scipy may, but need not, transform in place.
    if result.ctypes.data != place.ctypes.data:
        place[...] = result


@contextmanager
def _mapping(threads: int) -> Iterator[Callable[[Callable[[int], None], range], None]]:
    """A map over threads: transforms and products release the interpreter's lock."""

    def one(function: Callable[[int], None], items: range) -> None:
        for item in items:
            function(item)

    if threads == 1:
        yield one
        return
    with ThreadPoolExecutor(threads) as pool:

        def several(function: Callable[[int], None], items: range) -> None:
            list(pool.map(function, items))

        yield several


@numba.njit(cache=True, nogil=True, fastmath=True)
def _symmetric_product(
    P: NDArray[np.float32], x: NDArray[np.complex64], first: int, last: int
) -> None:
    """x_i := Σ_j P_ij x_j for the frequencies from `first` to `last`, P real and symmetric."""
    rank = len(x)
    total = np.zeros((rank, _AT_ONCE), np.complex64)
    for low in range(first, last, _AT_ONCE):
        n = min(_AT_ONCE, last - low)
        total[:] = 0
        f = 0
        for i in range(rank):
            for j in range(i, rank):
                for v in range(n):
                    total[i, v] += P[f, low + v] * x[j, low + v]
                if j > i:
                    for v in range(n):
                        total[j, v] += P[f, low + v] * x[i, low + v]
                f += 1
        for i in range(rank):
            for v in range(n):
                x[i, low + v] = total[i, v]


@numba.njit(cache=True, nogil=True, fastmath=True)
def _hermitian_product(
    P: NDArray[np.float32], x: NDArray[np.complex64], first: int, last: int
) -> None:
    """The same for Hermitian P, whose imaginary parts stand after all real ones."""
    rank = len(x)
    total = np.zeros((rank, _AT_ONCE), np.complex64)
    for low in range(first, last, _AT_ONCE):
        n = min(_AT_ONCE, last - low)
        total[:] = 0
        f, g = 0, rank * (rank + 1) // 2
        for i in range(rank):
            for v in range(n):
                total[i, v] += P[f, low + v] * x[i, low + v]
            f += 1
            for j in range(i + 1, rank):
                for v in range(n):
                    total[i, v] += (
                        np.complex64(complex(P[f, low + v], P[g, low + v])) * x[j, low + v]
                    )
                for v in range(n):
                    total[j, v] += (
                        np.complex64(complex(P[f, low + v], -P[g, low + v])) * x[i, low + v]
                    )
                f += 1
                g += 1
        for i in range(rank):
            for v in range(n):
                x[i, low + v] = total[i, v]
