"""Error bars, M0, misfit and status beside the maps of a network: in chunks, on any executor."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherprint import _threads, error_bars, fit, maps, simulate
from fisherprint.error_bars import Bars, ErrorBars
from fisherprint.experiment.folder import Progress, Say
from fisherprint.experiment.known import BEYOND
from fisherprint.models.protocol import SignalModel
from fisherprint.parameters import Parameter, paper_prior
from fisherprint.sequence import PulseTrain
from fisherprint.subspace import Basis

BESIDE = (
    Parameter("M0", r"$|M_0|$", "", (0.0, np.inf)),
    Parameter("M0_phase", r"$\arg M_0$", "rad", (-np.pi, np.pi), "rad"),
    Parameter("residual", "relative residual", "", (0.0, 1.0)),
)
"""What is mapped beside the parameters and their standard deviations."""

ENTRIES = 2048
"""Fingerprints among which a search starts: it need not begin near."""

ALLOWANCE = 2.0
"""By how much a network's residual may exceed what noise leaves of a fit's (decision 040)."""

# Voxels of a chunk, and tasks submitted before their turn: a chunk is a fraction of a megabyte.
_CHUNK, _AHEAD = 1024, 64
# A volume of fewer voxels takes no time worth a forecast, which measures this many on each core.
_SMALL, _FEW = 4096, 64


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """What stands beside the estimates of a volume; NaN where there is none.

    Attributes:
        std: standard deviations of the E estimates, spatial axes and then E, SI units.
        beside: |M0|, its phase and the relative residual, spatial axes and then 3.
        misfit: where the residual is too large.
        noise: σ that all this holds for.
    """

    std: NDArray[np.float64]
    beside: NDArray[np.float64]
    misfit: NDArray[np.bool_]
    noise: error_bars.Noise


def drawn(
    model: SignalModel,
    basis: Basis,
    train: PulseTrain,
    ranges: Mapping[str, Sequence[float]],
) -> fit.Dictionary:
    """Fingerprints of the paper's prior within the ranges of a training, without its data set."""
    prior = paper_prior(model.names, repetition_time=train.repetition_time)
    theta = prior.sample(ENTRIES, rng=np.random.default_rng(0))
    for column, name in enumerate(model.names):
        low, high = ranges.get(name, (-np.inf, np.inf))
        theta[:, column] = np.clip(theta[:, column], low, high)
    return fit.dictionary(model, basis, theta)


def beside_estimates(
    bars: ErrorBars,
    images: NDArray[np.complexfloating],
    estimates: maps.Maps,
    known: NDArray[np.float64],
    *,
    noise_std: float | None,
    executor: Executor | None,
    say: Say,
    progress: Progress,
) -> Beside:
    """Error bars and all that comes with them; a forecast of the time is said first.

    Args:
        bars: what computes them.
        images: coefficients, shape (X, Y, Z, K).
        estimates: of each voxel, their parameters in the order of `bars.estimated`.
        known: maps of what the estimator was told, shape (X, Y, Z, n).
        noise_std: σ of the images, if it is known.
        executor: who computes; threads on all cores of this process if None.
        say: told the forecast, and σ.
        progress: told how many voxels are done.
    """
    mask = estimates.mask
    # Views: nothing of a volume is copied but a chunk at a time.
    x, values, told = (part.reshape(mask.size, -1) for part in (images, estimates.values, known))
    usable = np.flatnonzero(np.isfinite(values).all(axis=1))
    found = Bars(
        np.full((len(usable), len(bars.estimated)), np.nan, dtype=np.float32),
        np.full(len(usable), np.nan, dtype=np.complex64),
        np.full(len(usable), np.nan, dtype=np.float32),
    )

    def tasks(voxels: NDArray[np.intp], size: int) -> Iterator[tuple[slice, Any, Any]]:
        for first in range(0, len(voxels), size):
            part = slice(first, min(first + size, len(voxels)))
            chunk = voxels[part]
            yield part, x[chunk], np.column_stack([values[chunk], told[chunk]])

    def computed(voxels: NDArray[np.intp], size: int) -> Iterator[tuple[slice, Bars]]:
        work = tasks(voxels, size)
        for (part, *_), result in simulate.apply(
            pool, bars.of_task, work, ahead=_AHEAD, ordered=False
        ):
            yield part, result

    with simulate.workers(executor) as pool:
        if len(usable) > _SMALL:
            some = usable[:: max(1, len(usable) // (2 * _FEW * _threads.usable()))]
            list(computed(some[:_FEW], _FEW))  # compiles
            began = time.perf_counter()
            list(computed(some, _FEW))
            each = (time.perf_counter() - began) / len(some)
            say(
                f"error bars of {len(usable)} voxels take about {each * len(usable):.0f} s "
                f"({1e3 * each:.2f} ms each); --no-errors leaves them out"
            )
        done = 0
        for part, result in computed(usable, _CHUNK):
            for whole, new in zip(vars(found).values(), vars(result).values(), strict=True):
                whole[part] = new
            done += part.stop - part.start
            progress("error bars", done, len(usable))

    noise = error_bars.noise(images, mask, found.residual, bars.degrees, given=noise_std)
    say(noise.described)
    norm = np.empty(len(usable), dtype=np.float32)
    for part in (slice(first, first + _CHUNK) for first in range(0, len(usable), _CHUNK)):
        norm[part] = np.linalg.norm(x[usable[part]], axis=1)
    std, beside = (np.full((mask.size, n), np.nan) for n in (len(bars.estimated), len(BESIDE)))
    std[usable] = found.std * noise.std
    beside[usable] = np.column_stack([np.abs(found.m0), np.angle(found.m0), found.residual / norm])
    misfit = np.zeros(mask.size, dtype=np.bool_)
    misfit[usable] = found.residual > noise.largest_residual(bars.degrees, allowance=ALLOWANCE)
    return Beside(
        std.reshape(*mask.shape, -1),
        beside.reshape(*mask.shape, -1),
        misfit.reshape(mask.shape),
        noise,
    )


def network_status(
    estimates: maps.Maps,
    beside: Beside | None,
    parameters: Sequence[Parameter],
    ranges: Mapping[str, Sequence[float]],
    *,
    snr_range: Sequence[float] | None = None,
) -> NDArray[np.uint8]:
    """One `maps.Status` a voxel, of a network's estimates.

    Args:
        estimates: of the volume.
        beside: what stands beside them; None where nobody asked, and then no misfit is seen.
        parameters: those estimated, in their order.
        ranges: least and largest value in the training, by name; a network is trusted 5 % beyond.
        snr_range: the same of |M0|/σ, of a network that is told its own; the others know none.
    """
    values, mask = estimates.values, estimates.mask
    at_bound, beyond = (np.zeros(mask.shape, dtype=np.bool_) for _ in range(2))
    for column, parameter in enumerate(parameters):
        low, high = parameter.bounds
        at_bound |= (values[..., column] <= low) | (values[..., column] >= high)
        low, high = ranges.get(parameter.name, (-np.inf, np.inf))
        margin = BEYOND * (high - low)
        beyond |= (values[..., column] < low - margin) | (values[..., column] > high + margin)
    found = {
        maps.Status.OUTSIDE_MASK: ~mask,
        maps.Status.NOT_FINITE: mask & ~np.isfinite(values).all(axis=-1),
        maps.Status.AT_BOUND: at_bound,
        maps.Status.OUTSIDE_RANGE: beyond,
    }
    if beside is not None:
        found[maps.Status.NOT_CONVERGED] = mask & np.isnan(beside.beside[..., -1])
        found[maps.Status.MISFIT] = beside.misfit
        if snr_range is not None:
            low, high = snr_range
            snr = beside.beside[..., 0] / beside.noise.std
            beyond |= (snr < (1 - BEYOND) * low) | (snr > (1 + BEYOND) * high)
    return maps.classified(found)
