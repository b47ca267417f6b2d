"""Where k-space is sampled: spokes in all directions, a koosh ball, ordered by golden means.

Positions are in units of 1/(field of view), so that a matrix of N reaches |k| = N/2. The arrays of
the reconstruction have the axes (T, S, R, 3): pulse, cycle, sample along the spoke, direction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# The two-dimensional golden means: φ2 is the real root of x³ + x = 1 and φ1 = φ2² (Chan et al.,
# doi:10.1002/mrm.21837, prints 0.4656 and 0.6823).
GOLDEN_MEANS = (0.465571231876768, 0.682327803828019)


def koosh_ball(n_spokes: int) -> NDArray[np.float64]:
    """Directions of successive spokes by two-dimensional golden means (doi:10.1002/mrm.21837).

        cos θ = {n φ1},   azimuth = 2π {n φ2},   {·} the fractional part

    Any run of successive spokes is spread evenly. The directions fill half a sphere: a spoke goes
    through the centre of k-space and covers the opposite direction too.

    Args:
        n_spokes: how many.

    Returns:
        Unit vectors, shape (n_spokes, 3).

    Raises:
        ValueError: a negative number.
    """
    if n_spokes < 0:
        raise ValueError(
            f"the number of spokes must not be negative; got {n_spokes}. Give 0 or more."
        )
    n = np.arange(n_spokes)
    z, turn = (np.modf(n * mean)[0] for mean in GOLDEN_MEANS)
    across, azimuth = np.sqrt(1 - z**2), 2 * np.pi * turn
    return np.stack([across * np.cos(azimuth), across * np.sin(azimuth), z], axis=-1)


def readout(matrix: int, oversampling: int = 1) -> NDArray[np.float64]:
    """Positions of the samples along a spoke, symmetric about 0: (r - (R - 1)/2) / oversampling.

    Args:
        matrix: N, the number of voxels across the field of view.
        oversampling: samples for each step of 1/(field of view).

    Returns:
        Shape (R,), R = N · oversampling, in 1/(field of view), all within ±N/2.
    """
    n_samples = matrix * oversampling
    return (np.arange(n_samples) - (n_samples - 1) / 2) / oversampling


def spokes(direction: ArrayLike, position: ArrayLike) -> NDArray[np.float32]:
    """Sample positions of straight spokes through the centre: position · direction.

    Args:
        direction: shape (..., 3).
        position: along the spoke, shape (R,), in 1/(field of view).

    Returns:
        Shape (..., R, 3), in 1/(field of view).
    """
    along, where = np.asarray(direction, dtype=np.float64), np.asarray(position, dtype=np.float64)
    return (along[..., None, :] * where[:, None]).astype(np.float32)


def golden_angle(n_spokes: int) -> NDArray[np.float64]:
    """Directions of successive spokes in a plane: azimuth n·111.25° (doi:10.1109/TMI.2006.885337).

    Args:
        n_spokes: how many.

    Returns:
        Unit vectors (x, y, 0), shape (n_spokes, 3).

    Raises:
        ValueError: a negative number.
    """
    if n_spokes < 0:
        raise ValueError(
            f"the number of spokes must not be negative; got {n_spokes}. Give 0 or more."
        )
    azimuth = np.pi * np.modf(np.arange(n_spokes) * (np.sqrt(5) - 1) / 2)[0]
    return np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros(n_spokes)], axis=-1)


def radial_scan(
    n_pulses: int, n_cycles: int, position: ArrayLike, *, planar: bool = False
) -> NDArray[np.float32]:
    """Trajectory of a train of pulses that is played several times, a spoke a pulse.

    Golden means count all spokes in the order of the scan: cycle by cycle, pulse by pulse.

    Args:
        n_pulses: T.
        n_cycles: S.
        position: of the samples along a spoke, shape (R,), in 1/(field of view).
        planar: spokes in a plane, for a slice; else a koosh ball.

    Returns:
        Shape (T, S, R, 3), in 1/(field of view).
    """
    direction = (golden_angle if planar else koosh_ball)(n_pulses * n_cycles)
    return spokes(direction.reshape(n_cycles, n_pulses, 3).swapaxes(0, 1), position)
