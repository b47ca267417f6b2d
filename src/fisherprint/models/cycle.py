"""Pulse trains played for many parameter sets at once: groups of lanes over the cores."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fisherprint import _threads
from fisherprint.models import adjoint, generalized_bloch, kernels, lineshape
from fisherprint.sequence import PulseTrain

Saturation = Literal["linearized", "graham", "generalized Bloch"]

Array = NDArray[np.float64]
Signals = NDArray[np.complex128]

_KINDS = {None: kernels.SINGLE, "linearized": kernels.LINEARIZED, "graham": kernels.GRAHAM}

# numba declares the call of a compiled function without arguments.
_signal_kernel: Any = kernels.train_signal
_states_kernel: Any = kernels.train_states
_gradient_kernel: Any = adjoint.train_gradient

_log = logging.getLogger("fisherprint")
# Taken by the first of the threads that find nothing compiled, and kept.
_unsaid = {
    kernel: threading.Lock()
    for kernel in (kernels.train_signal, kernels.train_states, adjoint.train_gradient)
}


def compiled(kernel: Any = kernels.train_signal) -> bool:
    """Whether a kernel is compiled, in this process or on the disk."""
    if kernel.signatures:
        return True
    source = Path(kernel.py_func.__code__.co_filename)
    name = f"{source.stem}.{kernel.py_func.__name__}-*.nbi"
    kept = Path(str(kernel.stats.cache_path)).glob(name)
    return any(index.stat().st_mtime >= source.stat().st_mtime for index in kept)


def signals(
    train: PulseTrain,
    tissue: Array,
    saturation: Saturation | None,
    by: Sequence[str] = (),
    scale: Array | None = None,
) -> Signals:
    """Periodic signals of all trains, M0 = 1, and their derivatives.

    Args:
        train: the pulse trains.
        tissue: `kernels.PHYSICAL` of each parameter set, shape (8, S).
        saturation: of the semi-solid pool; None for a single pool.
        by: the D physical parameters to differentiate by, of `kernels.BY`, in the wanted order;
            R1f without R1s stands for both at once. For a single pool R2f, B0, B1 and R1f.
        scale: what multiplies each derivative, shape (D, S).

    Returns:
        Shape (S, 1 + D, T), the signal first.
    """
    if saturation == "generalized Bloch":
        return _by_integration(train, tissue, by, scale)
    _say_once(kernels.train_signal, "the signal model, once after installation (half a minute)")
    result = np.empty((tissue.shape[1], 1 + len(by), train.n_samples), dtype=np.complex128)

    def play(arguments: tuple[Any, ...], first: int, column: int) -> None:
        _signal_kernel(*arguments, result, first, column)

    _for_groups(train, tissue, saturation, by, scale, play)
    return result


def control_slopes(
    train: PulseTrain,
    tissue: Array,
    saturation: Saturation | None,
    by: Sequence[str],
    scale: Array,
    by_sample: Signals,
) -> Array:
    """From ∂J/∂(signal and derivatives) to ∂J/∂(flip angles and durations), exactly.

    The last argument, shape (S, 1 + D, T), is ∂J/∂Re + i ∂J/∂Im of what `signals` gives with the
    same other arguments.

    Returns:
        ∂J/∂α in 1/rad and ∂J/∂TRF in 1/s of each parameter set, shape (S, 2, T).
    """
    _refuse_integration(saturation)
    _say_once(adjoint.train_gradient, "its adjoint, once after installation (a minute)")
    by_sample = np.ascontiguousarray(by_sample)
    result = np.empty((tissue.shape[1], 2, train.n_samples))

    def play(arguments: tuple[Any, ...], first: int, column: int) -> None:
        _gradient_kernel(*arguments, by_sample, result, first, column)

    _for_groups(train, tissue, saturation, by, scale, play)
    return result


def magnetization(train: PulseTrain, tissue: Array, saturation: Saturation | None) -> Array:
    """x, y and z of the free and z of the semi-solid pool at the echoes, shape (S, T, 4)."""
    _refuse_integration(saturation)
    _say_once(kernels.train_states, "the magnetization, once after installation (half a minute)")
    result = np.empty((tissue.shape[1], kernels.CARRIED, train.n_samples))

    def play(arguments: tuple[Any, ...], first: int, column: int) -> None:
        _states_kernel(*arguments, result, first, column)

    _for_groups(train, tissue, saturation, (), None, play)
    return result.mT


def _refuse_integration(saturation: Saturation | None) -> None:
    if saturation == "generalized Bloch":
        raise ValueError(
            "expected the saturation `linearized` or `graham`; got `generalized Bloch`, the slow "
            "reference, which is for signals and their derivatives alone. Take one of the others."
        )


def _say_once(kernel: Any, what: str) -> None:
    if not compiled(kernel) and _unsaid[kernel].acquire(blocking=False):
        # The default handler writes warnings to the standard error.
        _log.warning("compiling %s", what)


def _for_groups(
    train: PulseTrain,
    tissue: Array,
    saturation: Saturation | None,
    by: Sequence[str],
    scale: Array | None,
    play: Callable[[tuple[Any, ...], int, int], None],
) -> None:
    """Call `play` for each group of lanes and each train, over the cores.

    It gets the arguments that all kernels have in common, the first parameter set of the group and
    the first sample of the train.
    """
    kind = _KINDS[saturation]
    table = lineshape.graham_table() if kind == kernels.GRAHAM else lineshape.rate_table()
    size, n_pulses = tissue.shape[1], train.flip_angle.shape[1]
    # The kernel's rows of derivatives, and where each goes.
    rows = kernels.BY[: len(by)]
    place = np.array([1 + by.index(name) for name in rows], dtype=np.int64)
    factors = np.ones((len(by), size)) if scale is None else scale
    factors = factors[place - 1]
    phase = (float(np.cos(train.phase_increment)), float(np.sin(train.phase_increment)))
    free_time = (train.repetition_time - train.pulse_duration) / 2
    # The crushers of the inversion fill what is left of the repetition time.
    free_time[:, 0] = train.repetition_time / 2
    times = [np.unique(row, return_inverse=True) for row in free_time]

    def group(first: int) -> None:
        # A last group that is not full repeats its last member.
        members = np.minimum(np.arange(first, first + kernels.LANES), size - 1)
        for number, (angle, duration) in enumerate(
            zip(train.flip_angle, train.pulse_duration, strict=True)
        ):
            arguments = (
                np.ascontiguousarray(tissue[:, members]),
                kind,
                train.inversion == "crushed",
                angle,
                duration,
                *times[number],
                phase,
                table,
                np.ascontiguousarray(factors[:, members]),
                place,
            )
            play(arguments, first, number * n_pulses)

    groups = range(0, size, kernels.LANES)
    # The kernel releases the interpreter's lock, so threads run at once.
    if _threads.usable() == 1 or len(groups) == 1:
        for first in groups:
            group(first)
    else:
        with ThreadPoolExecutor(_threads.usable()) as pool:
            list(pool.map(group, groups))


def _by_integration(
    train: PulseTrain, tissue: Array, by: Sequence[str], scale: Array | None
) -> Signals:
    """The same by the full generalized Bloch equation, slowly."""
    both = "R1f" in by and "R1s" not in by
    directions = (*by, "R1s") if both else tuple(by)
    result = np.concatenate(
        [
            generalized_bloch.train_signal(
                tissue,
                directions,
                angle,
                duration,
                train.repetition_time,
                train.inversion == "crushed",
                train.phase_increment,
            )
            for angle, duration in zip(train.flip_angle, train.pulse_duration, strict=True)
        ],
        axis=-1,
    )
    if both:
        result[:, 1 + directions.index("R1f")] += result[:, -1]
        result = result[:, :-1]
    if scale is not None:
        result[:, 1:] *= scale.T[:, :, None]
    return result
