"""To the scanner: a pulse train as a 3D radial hybrid-state scan in a Pulseq file (§2.8).

One repetition is two blocks: a window of fixed length with the pulse in its middle, and a gap with
a balanced spoke whose middle is the echo, half a repetition time after the middle of the pulse.
Needs the optional package pypulseq.
"""

from fisherprint.pulseq.scan import RF_RASTERS, Plan, Scan, Trapezoid, on_raster, plan
from fisherprint.pulseq.writing import TimingError, build, trajectory_path, write

__all__ = [
    "RF_RASTERS",
    "Plan",
    "Scan",
    "TimingError",
    "Trapezoid",
    "build",
    "on_raster",
    "plan",
    "trajectory_path",
    "write",
]
