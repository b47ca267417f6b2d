"""A whole volume by non-linear least squares: in chunks, on any executor, kept when killed."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import _threads, error_bars, files, fisher, fit, maps, simulate
from fisherprint.experiment import bars, mapping
from fisherprint.experiment.fit_inputs import (
    Voxels,
    bounds_of,
    normals_of,
    prior_of,
    read_images,
    read_voxels,
    steps_of,
)
from fisherprint.experiment.folder import (
    Progress,
    Run,
    Say,
    read_data,
    region_file,
    versions,
)
from fisherprint.experiment.schema import ExperimentError, MapSection
from fisherprint.models.protocol import SignalModel
from fisherprint.parameters import Parameter
from fisherprint.simulate import DataSet

CHUNK = 1024
"""Voxels of a chunk; the last one has fewer."""

# Fingerprints of the data set among which a start is looked for.
_ENTRIES = 16384
# Starts in each voxel where there is no network.
_STARTS = 4
# Tasks submitted before their turn: a chunk is a fraction of a megabyte.
_AHEAD = 64
# Voxels that each worker fits to forecast the time: a group of the kernel's lanes, some seconds.
_PROBE = 64
# Voxels of a group of the kernel: fewer take as long.
_GROUP = 32
# Unasked, a forecast may take this share of the time that it foretells.
_WORTH = 1 / 16
_ARRAYS = ("theta", "std", "m0", "residual", "iterations", "reason")
# What is mapped beside the parameters and their standard deviations.
_BESIDE = (
    *bars.BESIDE,
    Parameter("iterations", "iterations", "", (0.0, np.inf)),
    Parameter("reason", "reason of the end", "", (0.0, float(max(fit.Reason)))),
)

Arrays = dict[str, NDArray[Any]]
# Number of a chunk, its coefficients with known parameters behind them, and its starts.
_Task = tuple[int, NDArray[np.complex128], NDArray[np.float64]]


def fit_run(
    run: Run,
    section: MapSection,
    out: Path,
    *,
    known: Mapping[str, float | Path] | None = None,
    start: int | Path | None = None,
    prior: float | None = None,
    two_steps: bool = False,
    overwrite: bool = False,
    stated: Mapping[str, str] | None = None,
    executor: Executor | None = None,
    n_workers: int | None = None,
    dry_run: bool = False,
    say: Say,
    progress: Progress,
) -> None:
    """Fit each voxel of coefficient images; chunks that an earlier call has finished are kept.

    Args:
        run: its data set says train, model, basis and prior, which bounds the parameters.
        section: the images, their mask, and σ if it is known; else it comes from the residual, or
            with a prior or two steps from the background.
        out: folder for the maps: of each parameter, of its standard deviation (`<name>_std`), of
            M0, the relative residual, the iterations and the `fit.Reason` of the end; of the
            `maps.Status`; and `summary.json`.
        known: parameters that are not fitted: one value, or the file of a map, in SI units; and
            those of `section`.
        start: a number of starts in each voxel, the fingerprints of the data set that are most
            like it; or a folder of maps, or a run with a network, whose estimates replace those
            of the most similar fingerprint. If None, the network of the run, or 4 starts without.
        prior: weigh in the normal distributions of the run's prior, this many times as wide; 1
            for the most probable estimate. If None, the prior is but the limits.
        two_steps: two damped steps in place of the search, from a network or maps of every
            unknown parameter; no estimate in voxels where these have none.
        overwrite: replace maps that are there.
        stated: units to write parameters in by name, as for `files.state_maps`; else SI.
        executor: who computes; threads on all cores of this process if None.
        n_workers: how many tasks it computes at once; as many as there are cores if None.
        dry_run: only say what it takes, from fits of some voxels, and write nothing.
        say: told what is assumed and found, and of a large volume first how long it will take.
        progress: told how many voxels are done.

    Raises:
        OutputExistsError: `out` already holds maps.
        ExperimentError: there is no data set, no network to start from, or no estimate in the
            folder to start from, of every parameter for two steps.
        BasisMismatchError: the images, or the network to start from, have another basis.
        ValueError: images, mask, known parameters, starts or a prior that do not fit, or a prior
            or two steps where nothing tells σ.
    """
    if (out / "summary.json").exists() and not overwrite:
        raise files.OutputExistsError(
            f"{out} already holds maps. Choose another folder, or replace them with --overwrite."
        )
    known = {**section.known, **(known or {})}
    data, pulses, model = read_data(run)
    volume, mask, basis_of_images = read_images(section, data, pulses, say)
    from_prior = prior_of(run, model, pulses)
    bounds = bounds_of(from_prior, model)
    noise_std = section.noise_std
    if noise_std is None and (prior is not None or two_steps):
        noise_std = error_bars.noise_of_background(volume.data, mask)
    voxels = read_voxels(
        run, volume, mask, model, noise_std, data.basis, known, bounds, start, say
    )
    values = {n: v for n, v in known.items() if not isinstance(v, Path)}
    n_starts = start if isinstance(start, int) else 1 if voxels.start else _STARTS
    if n_starts < 1:
        raise ValueError(
            f"expected at least 1 start in each voxel; got {n_starts}. Leave it out for the usual."
        )
    unknown = set(model.names) - set(known)
    distant = [name for name in model.names if name in unknown - set(voxels.start)]
    if two_steps and distant:
        raise ExperimentError(
            f"expected estimates of {', '.join(distant)}, too, to start two steps from: a similar "
            "fingerprint is too far away. Start from a network or maps of every parameter, or "
            "search, without two steps."
        )
    estimator = fit.LeastSquares(
        model,
        data.basis,
        start=np.zeros(len(model.names)),
        known=values,
        inputs=tuple(voxels.known),
        bounds=bounds,
        prior=normals_of(from_prior, prior, unknown=unknown),
        noise_std=noise_std,
        steps=steps_of(from_prior, unknown) if two_steps else (),
    )
    files.conversions(_described(model, estimator), stated or {})  # refused now, not in the end
    content = (
        *(pulses.digest, type(model).__name__, getattr(model, "saturation", None), model.names),
        *(data.basis.digest, files.file_digest(run.dataset), values, estimator.bounds),
        *(estimator.prior, n_starts, noise_std, voxels.digest, CHUNK, versions()),
        *estimator.steps,  # none of a search, whose earlier chunks keep their name
    )
    identity = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    folder = out / "chunks" / identity
    n_chunks = -(-len(voxels.x) // CHUNK)
    missing = [number for number in range(n_chunks) if not _is_kept(folder, number)]
    kept = n_chunks - len(missing)
    size = len(voxels.x)
    say(f"{size} voxels in {n_chunks} chunks" + f", of which {kept} are done" * (kept > 0))
    done = size - sum(min(CHUNK, size - number * CHUNK) for number in missing)
    task = functools.partial(_fitted, estimator)
    with simulate.workers(executor) as pool:
        entries, number = _dictionary(data), n_workers or _threads.usable()
        if dry_run or _PROBE * number < _WORTH * (size - done):
            seconds = 0.0
            if missing:
                undone = [np.arange(n * CHUNK, min((n + 1) * CHUNK, size)) for n in missing]
                seconds = _forecast(
                    voxels.at(np.concatenate(undone)),
                    lambda part: next(_tasks(part, [0], entries, n_starts, not two_steps)),
                    task,
                    pool,
                    number,
                )
            say(f"expected time: {_duration(seconds)} with {number} workers")
        if dry_run:
            return
        tasks = _tasks(voxels, missing, entries, n_starts, not two_steps)
        for (number, *_), arrays in simulate.apply(pool, task, tasks, ahead=_AHEAD, ordered=False):
            files.write_arrays(_file(folder, number), arrays)
            done += len(arrays["theta"])
            progress("voxels", done, size)
    chunks = [files.read_arrays(_file(folder, n), _ARRAYS) for n in range(n_chunks)]
    found = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in _ARRAYS}
    degrees = 2 * data.basis.rank - len(estimator.estimated or ()) - len(fisher.SCALE)
    of_residuals = error_bars.noise_of_residuals(found["residual"], degrees)
    noise = error_bars.Noise(of_residuals, "residuals", of_residuals)
    if noise_std is not None:
        given = section.noise_std is not None
        noise = error_bars.Noise(noise_std, "given" if given else "background", of_residuals)
    provenance = {
        "fisherprint": versions()["fisherprint"],
        "estimator": "non-linear least squares"
        + ", two steps" * two_steps
        + " with a prior" * bool(estimator.prior),
        "dataset_sha256": files.file_digest(run.dataset),
        "basis_sha256": data.basis.digest,
        "basis_of_images_sha256": basis_of_images,
        "known": {name: values.get(name, "map") for name in (*values, *voxels.known)},
        "prior": {name: list(normal) for name, normal in estimator.prior.items()},
        "steps": [dict(step) for step in estimator.steps],
        "noise": noise.recorded,
        "reasons": {str(reason.value): reason.name.lower() for reason in fit.Reason},
    }
    say(noise.described)
    status = np.full(mask.shape, maps.Status.OUTSIDE_MASK, dtype=np.uint8)
    told = [n for n in run.experiment.training.estimated if n in (estimator.estimated or ())]
    status[mask] = _status(found, estimator, told, noise.largest_residual(degrees))
    _write(out, volume, mask, model, estimator, found, status, provenance, say)
    shutil.rmtree(out / "chunks")
    if stated:
        files.state_maps(out, stated)


def _described(model: SignalModel, estimator: fit.LeastSquares) -> list[Parameter]:
    """The parameters that are fitted."""
    return [model.parameters[model.index(name)] for name in estimator.estimated or ()]


def _dictionary(data: DataSet) -> fit.Dictionary:
    """Fingerprints of the data set, to start from the most similar ones."""
    some = data.samples["training"]
    return fit.Dictionary(data.names, some.theta[:_ENTRIES], some.coefficients[:_ENTRIES])


def _tasks(
    voxels: Voxels, numbers: list[int], entries: fit.Dictionary, n_starts: int, filled: bool
) -> Iterator[_Task]:
    """Some chunks, ready to be fitted; fingerprints stand in for NaN to start from if `filled`."""
    for number in numbers:
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        x = voxels.x[part]
        given = np.column_stack([x, *(values[part] for values in voxels.known.values())])
        with _threads.one_thread():
            starts = entries.nearest(x, n_starts)
        for name, values in voxels.start.items():
            column = starts[..., entries.names.index(name)]
            told = np.isfinite(values[part, None]) if filled else True
            np.copyto(column, values[part, None], where=told)
        yield number, given.astype(np.complex128), starts


def _forecast(
    voxels: Voxels,
    prepare: Callable[[Voxels], _Task],
    task: Callable[[_Task], Arrays],
    pool: Executor,
    n_workers: int,
) -> float:
    """Seconds that voxels will take, from fits of some of them on all workers at once.

    No worker gets less than a chunk. The model simulates whole groups of voxels, so that in the
    few of the trial the last ones to end cost more than in a chunk: groups are counted.
    """

    def measured(each: int) -> tuple[float, NDArray[np.integer]]:
        picked = np.linspace(0, len(voxels.x) - 1, min(len(voxels.x), each * n_workers))
        parts = [part for part in np.array_split(picked.astype(np.intp), n_workers) if len(part)]
        tasks = [prepare(voxels.at(part)) for part in parts]
        began = perf_counter()
        found = list(simulate.apply(pool, task, tasks, ahead=n_workers, ordered=False))
        seconds = (perf_counter() - began) * len(parts) / len(picked)
        return seconds, np.concatenate([arrays["iterations"] for _, arrays in found])

    measured(1)  # loads or compiles the model
    size = len(voxels.x)
    seconds, iterations = measured(_PROBE)
    chunk = min(size, CHUNK)
    seconds *= _groups(iterations, chunk) / chunk / (_groups(iterations, _PROBE) / _PROBE)
    return max(size / n_workers, chunk) * seconds


def _groups(iterations: NDArray[np.integer], searches: int) -> float:
    """Groups that so many searches at once have simulated when all have ended, as some did."""
    still = [(iterations >= step).mean() for step in range(iterations.max() + 1)]
    return float(np.ceil(searches * np.array(still) / _GROUP).sum())


def _duration(seconds: float) -> str:
    """For people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _fitted(estimator: fit.LeastSquares, task: _Task) -> Arrays:
    """The fit of one chunk, by one worker with one thread."""
    _, given, starts = task
    with _threads.one_thread():
        found = estimator.fit(given, start=starts)
    return {name: getattr(found, name) for name in _ARRAYS}


def _status(
    found: Arrays, estimator: fit.LeastSquares, told: list[str], largest_residual: float
) -> NDArray[np.uint8]:
    """One `maps.Status` a voxel; at a bound are those that a network of the run would tell."""
    at_bound = np.zeros(len(found["theta"]), dtype=np.bool_)
    for name in told:
        values, (low, high) = (
            found["theta"][:, estimator.model.index(name)],
            estimator.bounds[name],
        )
        at_bound |= (values <= low) | (values >= high)
    return maps.classified(
        {
            maps.Status.NOT_FINITE: _failed(found),
            maps.Status.NOT_CONVERGED: found["reason"] == fit.Reason.ITERATIONS,
            maps.Status.AT_BOUND: at_bound,
            maps.Status.MISFIT: found["residual"] > largest_residual,
        }
    )


def _failed(found: Arrays) -> NDArray[np.bool_]:
    """Voxels without an estimate."""
    return np.isin(found["reason"], [reason for reason in fit.Reason if reason.is_failed])


def _file(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:06d}.h5"


def _is_kept(folder: Path, number: int) -> bool:
    """Whether a chunk is there and whole."""
    try:
        files.read_arrays(_file(folder, number), _ARRAYS)
    except files.UnreadableFileError:
        return False
    return True


def _write(
    out: Path,
    volume: files.Volume,
    mask: NDArray[np.bool_],
    model: SignalModel,
    estimator: fit.LeastSquares,
    found: Arrays,
    status: NDArray[np.uint8],
    provenance: Mapping[str, Any],
    say: Say,
) -> None:
    """Maps, regions and the summary."""
    described = _described(model, estimator)
    columns = [model.index(parameter.name) for parameter in described]
    failed = int(_failed(found).sum())

    def write(
        parameters: list[Parameter], values: NDArray[np.float64], **options: Any
    ) -> maps.Maps:
        placed = np.full((*mask.shape, len(parameters)), np.nan)
        placed[mask] = values
        result = maps.Maps(tuple(p.name for p in parameters), placed, mask, failed)
        written.extend(
            files.write_maps(
                result,
                out,
                volume=volume,
                parameters=parameters,
                provenance=provenance,
                **options,
            )
        )
        return result

    written: list[Path] = []
    result = write(described, found["theta"][:, columns])
    write(described, found["std"][:, columns], kind="standard deviation")
    norm = np.linalg.norm(volume.data[mask], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = found["residual"] / norm
    beside = (
        *(np.abs(found["m0"]), np.angle(found["m0"]), relative),
        *(found["iterations"], found["reason"]),
    )
    write(list(_BESIDE), np.column_stack(beside))
    (out / "summary.json").unlink(missing_ok=True)  # of earlier maps
    written.append(files.write_status(status, out, volume=volume, provenance=provenance))
    files.keep_maps(written)

    regions = mapping.regions_of(result, say)
    for name in mapping.REGIONS:
        path = out / region_file(name)
        path.unlink(missing_ok=True)  # of earlier maps
        if name in regions:
            files.write_mask(path, regions[name], volume=volume)
    regions = {"all": mask} | regions
    statistics = {
        name: mapping.region_statistics(result, inside) for name, inside in regions.items()
    }
    ends = Counter(fit.Reason(int(code)).name.lower() for code in found["reason"])
    files.write_json(
        out / "summary.json",
        {
            "regions": statistics,
            "failed_voxels": failed,
            "reasons": dict(ends),
            "status": maps.counted(status),
            "provenance": provenance,
        },
    )
    not_converged = ends[fit.Reason.ITERATIONS.name.lower()]
    say(f"{len(norm)} voxels fitted, {failed} failed, {not_converged} did not converge")
    mapping.say_status(status, say)
    for region, numbers in statistics.items():
        for parameter in described:
            quartiles = [numbers[parameter.name][key] for key in mapping.QUARTILES]
            if None not in quartiles:
                low, median, high = (parameter.display_factor * value for value in quartiles)
                say(
                    f"{region}: {parameter.name} {median:.4g} [{low:.4g}, {high:.4g}] "
                    f"{parameter.display_unit}"
                )
