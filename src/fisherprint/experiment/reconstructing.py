"""From raw data to coefficient images in the basis of a run."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import _storage, files
from fisherprint.experiment.folder import Progress, Run, Say, read_data
from fisherprint.experiment.mapping import Trained
from fisherprint.models.protocol import SignalModel
from fisherprint.reconstruct import (
    coils,
    encoding,
    lowrank,
    planning,
    solve,
    toeplitz,
)
from fisherprint.subspace import Basis

# Seconds between two saved states: what a killed process loses.
_SAVE_EVERY = 600.0


class ReconstructionError(ValueError):
    """A reconstruction that cannot be done as it is asked for."""


class MemoryForecastError(ReconstructionError):
    """A reconstruction that would not fit into memory."""


@dataclass(frozen=True)
class Reconstruction:
    """What to do with the data: one of λ of both priors is given.

    Attributes:
        llr: λ of the locally low-rank prior, solved by FISTA.
        l2: λ of λ‖x‖², solved by conjugate gradients.
        block: edge of the blocks of `llr`, voxels; 8 if None.
        iterations: how many.
        coils: virtual ones, at most.
        sensitivities: a file of them, of the physical coils; ESPIRiT if None.
        memory: GiB that may be used; what the system has left if None.
    """

    llr: float | None = None
    l2: float | None = None
    block: int | None = None
    iterations: int = 30
    coils: int = 20
    sensitivities: Path | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if (self.llr is None) == (self.l2 is None):
            raise ReconstructionError(
                "expected λ of one prior, --llr λ or --l2 λ; got "
                f"{'none' if self.llr is None else 'both'}. Begin with --llr 1e-4."
            )
        for what, number, usual in (("iteration", self.iterations, 30), ("coil", self.coils, 20)):
            if number < 1:
                raise ReconstructionError(
                    f"expected at least one {what}; got {number}. {usual} is usual."
                )
        if self.l2 is not None and self.block is not None:
            raise ReconstructionError(
                f"expected blocks with --llr alone; got --block {self.block} with --l2. "
                "Leave it out."
            )
        # What both check themselves, hours later.
        if self.llr is not None:
            _ = self.low_rank
        elif self.l2 is not None:
            solve.require_weight(self.l2)

    @property
    def low_rank(self) -> lowrank.LocallyLowRank:
        """The prior of `llr`."""
        return lowrank.LocallyLowRank(self.llr or 0.0, 8 if self.block is None else self.block)

    @property
    def name(self) -> str:
        """All that decides the iterations, but not how many they are."""
        if self.llr is not None:
            return f"llr {self.llr!r} {self.low_rank.block}"
        return f"l2 {self.l2!r}"


@dataclass(frozen=True, eq=False)
class _Prepared:
    """What iterations start from.

    Attributes:
        sensitivities: of the virtual coils.
        right: Aᴴ W y / scale.
        scale: what the data were divided by.
    """

    sensitivities: NDArray[np.complex64]
    right: encoding.Images
    scale: float


def basis_and_model(source: Run | Trained) -> tuple[Basis, SignalModel]:
    """Of a run's data set, or of a shipped network."""
    if isinstance(source, Trained):
        return source.basis, source.model
    data, _, model = read_data(source)
    return data.basis, model


def reconstruct_run(
    source: Run | Trained,
    data: Path,
    output: Path,
    wanted: Reconstruction,
    *,
    reading: files.Reading | None = None,
    work: Path | None = None,
    resume: bool = False,
    executor: Executor | None = None,
    say: Say,
    progress: Progress,
) -> None:
    """Raw data to coefficient images in the basis of a run.

    Args:
        source: a run, whose data set has the basis, or a shipped network.
        data: k-space, as `files.read_kspace` takes it.
        output: `.nii.gz`, `.nii` or `.cfl`.
        wanted: prior, iterations, coils.
        reading: what the file of the data does not say.
        work: folder of the kernel, of compressed data and of the state of interrupted iterations;
            kept for the next reconstruction of the same data. None is `OUTPUT.work`, removed in
            the end.
        resume: go on from an interrupted one.
        executor: computes the normal operator; threads of this process if None.
        say: told the forecast, what is assumed, and the residual of each iteration.
        progress: told what else is going on.

    Raises:
        ReconstructionError: nothing to resume, or an output of another kind.
        BlockingIOError: another process prepares a reconstruction in the work folder.
        MemoryForecastError: more memory is needed than there is.
        ValueError: data and basis that do not belong together, or bad data.
        DivergenceError: the iterations run away; the last good images are written.
        KeyboardInterrupt: the last images are written, and `resume` goes on from them.
    """
    if not output.name.endswith((".nii", ".nii.gz", ".cfl")):
        raise ReconstructionError(
            f"expected images as .nii.gz, .nii or .cfl; got {output}. Change the suffix."
        )
    folder = work or output.with_name(output.name + ".work")
    saved = folder / "state.h5"
    if resume and not saved.is_file():
        raise ReconstructionError(
            f"expected an interrupted reconstruction; {folder} has none. Leave out --resume."
        )
    basis, _ = basis_and_model(source)
    reading = reading or files.Reading()
    n_pulses = len(basis.vectors)
    if reading.n_pulses not in (None, n_pulses):
        raise ReconstructionError(
            f"expected data of {n_pulses} pulses, as the basis has; got {reading.n_pulses}. Leave "
            "them out, or take the basis of the train that was played."
        )
    raw = files.read_kspace(data, replace(reading, n_pulses=n_pulses))
    for note in raw.notes:
        say(note)
    sampling = _sampling(raw, basis, say)
    _require_memory(sampling, raw, wanted, say)
    folder.mkdir(parents=True, exist_ok=True)
    with _storage.locked(folder):
        try:
            prepared = _prepared(
                sampling, raw, _identity(data, sampling, wanted), wanted, folder, progress
            )
        except ReconstructionError:
            with contextlib.suppress(OSError):  # it holds something for another call
                folder.rmdir()
            raise
        kernel = toeplitz.kernel(
            sampling, path=folder / f"kernel-{sampling.digest[:12]}.h5", progress=progress
        )

    def normal(images: encoding.Images) -> encoding.Images:
        return toeplitz.normal(kernel, prepared.sensitivities, images, executor=executor)

    if raw.noise is not None and wanted.llr is not None and wanted.sensitivities is None:
        # Whitened noise has variance 1, and Σ_c |S_c|² of ESPIRiT is 1.
        level = sampling.noise_gain / prepared.scale
        say(f"λ that takes away the noise of these data: {level:.2g}; given: {wanted.llr:g}")
    identity = f"{_storage.digest(prepared.right)} {wanted.name}"
    start, step = _read_state(saved, identity) if resume else (None, None)
    if wanted.llr is not None and step is None:
        step = solve.STEP / solve.largest_eigenvalue(normal, prepared.right, progress=progress)
    states = _states(normal, prepared.right, wanted, step, start)
    state, last_saved, began = start, time.monotonic(), time.monotonic()
    try:
        while state is None or state.iteration < wanted.iterations:
            new = next(states, None)
            if new is None:
                break
            state = new
            now = time.monotonic()
            say(
                f"iteration {state.iteration} of {wanted.iterations}: residual "
                f"{state.residual:.3g}, {now - began:.1f} s"
            )
            began = now
            if now - last_saved > _SAVE_EVERY:
                _write_state(saved, state, step, identity)
                last_saved = now
    except (KeyboardInterrupt, solve.DivergenceError):
        if state is not None:
            _write_state(saved, state, step, identity)
            _write(output, state.images * np.float32(prepared.scale), raw, basis)
            say(
                f"images of iteration {state.iteration} are in {output}; the same command with "
                "--resume goes on"
            )
        raise
    if state is None:
        raise ReconstructionError("expected data that are not zero; nothing was iterated.")
    try:
        _write(output, state.images * np.float32(prepared.scale), raw, basis)
    except OSError:
        # A full disk, say: --resume writes again, to another OUTPUT with the same --work.
        _write_state(saved, state, step, identity)
        raise
    saved.unlink(missing_ok=True)
    if work is None:
        shutil.rmtree(folder)


def _sampling(raw: files.RawData, basis: Basis, say: Say) -> encoding.Sampling:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", encoding.UndersampledWarning)
        sampling = encoding.Sampling(
            raw.trajectory,
            basis.vectors.astype(np.complex64),
            raw.matrix,
            raw.weights,
            raw.pulses,
        )
    for warning in caught:
        say(f"warning: {warning.message}")
    return sampling


def _require_memory(
    sampling: encoding.Sampling, raw: files.RawData, wanted: Reconstruction, say: Say
) -> None:
    """Say what it takes; refuse what does not fit, before anything is computed."""
    request = planning.Request(
        sampling.matrix,
        sampling.rank,
        bool(sampling.rows.imag.any()),
        min(wanted.coils, len(raw.kspace)),
        int(np.prod(sampling.samples)),
        wanted.iterations,
        wanted.llr is not None,
        wanted.sensitivities is None,
    )
    ahead = planning.forecast(request, planning.measure(request))
    for line in ahead.lines():
        say(line)
    there = planning.available_memory() if wanted.memory is None else wanted.memory * 2**30
    if there is not None and ahead.peak > there:
        raise MemoryForecastError(
            f"expected {ahead.peak / 2**30:.3g} GiB of memory for this reconstruction; "
            f"{there / 2**30:.3g} GiB may be used. Take a smaller matrix, fewer coils or "
            "coefficients, or another machine."
        )


def _identity(data: Path, sampling: encoding.Sampling, wanted: Reconstruction) -> str:
    """Of what is prepared: the samples themselves may be many, so their file stands for them."""
    parts = [sampling.digest, str(wanted.coils), str(wanted.sensitivities)]
    for path in (data, data.with_suffix(".cfl"), wanted.sensitivities):
        if path is not None and path.is_file():
            status = path.stat()
            parts.append(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _prepared(
    sampling: encoding.Sampling,
    raw: files.RawData,
    identity: str,
    wanted: Reconstruction,
    folder: Path,
    progress: Progress,
) -> _Prepared:
    """Compressed coils, their sensitivities, and Aᴴ W y; from the folder if they are there."""
    path = folder / "prepared.h5"
    if path.is_file():
        with _storage.open_hdf5(path) as file:
            if file.attrs["identity"] == identity:
                return _Prepared(
                    file["sensitivities"][()], file["right"][()], float(file["scale"][()])
                )
    maps = None
    if wanted.sensitivities is not None:
        maps = files.read_sensitivities(wanted.sensitivities, sampling.matrix)
        if len(maps) != len(raw.kspace):
            raise ReconstructionError(
                f"expected sensitivities of the {len(raw.kspace)} coils of the data; "
                f"{wanted.sensitivities} has {len(maps)}. Give those of the physical coils."
            )
    compress = coils.compression(
        raw.kspace, min(wanted.coils, len(raw.kspace)), noise=raw.noise, progress=progress
    )
    virtual = folder / "kspace.npy"
    try:
        kspace = np.lib.format.open_memmap(
            virtual, "w+", np.complex64, (len(compress.matrix), *sampling.samples)
        )
        for pulse in range(kspace.shape[1]):
            kspace[:, pulse] = compress(np.asarray(raw.kspace[:, pulse]))
        if maps is None:
            middle = coils.calibration(sampling, kspace, progress=progress)
            maps = coils.espirit(middle, sampling.matrix, progress=progress)
            if not maps.any():
                raise ReconstructionError(
                    "expected coils that see signal in the middle of k-space; ESPIRiT found noise "
                    "alone. Look at the data, or give sensitivities with --sensitivities."
                )
        else:
            maps = compress(maps)
        right = encoding.adjoint(sampling, maps, kspace)
    finally:
        virtual.unlink(missing_ok=True)
    scale = solve.scaling(right)
    if not (np.isfinite(scale) and scale > 0):
        raise ReconstructionError(
            f"expected data whose images are not zero; got the scale {scale}. Do k-space, "
            "trajectory and sensitivities belong together?"
        )
    right /= np.float32(scale)
    with _storage.large_hdf5(path, maps.nbytes + right.nbytes) as file:
        file.attrs["identity"] = identity
        file["sensitivities"], file["right"], file["scale"] = maps, right, scale
    return _Prepared(maps, right, scale)


def _states(
    normal: solve.Normal,
    right: encoding.Images,
    wanted: Reconstruction,
    step: float | None,
    start: solve.State | None,
) -> Iterator[solve.State]:
    if wanted.llr is None or step is None:
        return solve.conjugate_gradients(normal, right, l2=wanted.l2 or 0.0, start=start)
    return solve.fista(normal, right, wanted.low_rank, step=step, start=start)


def _write_state(path: Path, state: solve.State, step: float | None, identity: str) -> None:
    arrays = {"images": state.images, "direction": state.direction}
    if state.remainder is not None:
        arrays["remainder"] = state.remainder
    with _storage.large_hdf5(path, sum(array.nbytes for array in arrays.values())) as file:
        file.attrs["identity"] = identity
        for name in ("iteration", "residual", "momentum"):
            file[name] = getattr(state, name)
        if step is not None:
            file["step"] = step
        for name, array in arrays.items():
            file[name] = array


def _read_state(path: Path, identity: str) -> tuple[solve.State, float | None]:
    with _storage.open_hdf5(path) as file:
        if file.attrs["identity"] != identity:
            raise ReconstructionError(
                f"expected the interrupted reconstruction of the same data with the same prior; "
                f"{path} is another one. Give the same options, or leave out --resume."
            )
        state = solve.State(
            int(file["iteration"][()]),
            file["images"][()],
            float(file["residual"][()]),
            file["direction"][()],
            file["remainder"][()] if "remainder" in file else None,
            float(file["momentum"][()]),
        )
        return state, float(file["step"][()]) if "step" in file else None


def _write(output: Path, images: encoding.Images, raw: files.RawData, basis: Basis) -> None:
    if output.suffix == ".cfl":
        # [x, y, z, 1, 1, 1, K]
        files.write_cfl(output, np.moveaxis(images, 0, -1)[:, :, :, None, None, None])
        return
    volume = files.Volume(np.ascontiguousarray(np.moveaxis(images, 0, -1)), raw.affine)
    files.write_coefficients(output, volume, basis_sha256=basis.digest)
