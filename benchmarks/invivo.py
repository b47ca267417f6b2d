"""The real brain by least squares and by a network, side by side, and medians by tissue.

    fisherprint run experiments/invivo.toml --data FOLDER -o RUN
    fisherprint fit FOLDER/coeffs.mat --key x --mask-key mask --run RUN -o NLLS
    python benchmarks/invivo.py NLLS RUN/maps -o docs/images/invivo-nlls.png

Tissues come from the maps of least squares, for both: white matter by `maps.white_matter`, fluid
by `maps.fluid`; grey matter has 0.35 to 0.65 of white matter's m0s, and a T1f between 1.1 times
that of white matter and 3 s. Intervals are quartiles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fisherprint import files, maps, report
from fisherprint.models import two_pool
from fisherprint.parameters import Parameter

NAMES = ("m0s", "T1f", "T1s", "T2f", "Rx", "T2s")
# Published for white matter with this train and model (Mao et al., the data's authors).
PUBLISHED = {"m0s": 0.21, "T1f": 1.84, "T1s": 0.34, "T2f": 0.077, "Rx": 16.0, "T2s": 12e-6}
EXPECTED = {
    "m0s": (0.17, 0.25),
    "T1f": (1.6, 2.1),
    "T1s": (0.25, 0.45),
    "T2f": (0.065, 0.090),
    "Rx": (11.0, 20.0),
    "T2s": (10e-6, 16e-6),
}
# Relative to white matter's medians; the upper limit of T1f in s.
GREY_M0S, GREY_T1 = (0.35, 0.65), (1.1, 3.0)
RANGES = {"m0s": (0.0, 0.3), "T1f": (1.0, 3.5), "T1s": (0.2, 0.6), "T2f": (0.04, 0.14)}


def tissues(reference: maps.Maps) -> dict[str, NDArray[np.bool_]]:
    """White matter, grey matter and fluid, by the reference's maps."""
    m0s, T1f = reference["m0s"], reference["T1f"]
    white = maps.white_matter(m0s, T1f)
    share, slowness = m0s / np.median(m0s[white]), T1f / np.median(T1f[white])
    grey = (share >= GREY_M0S[0]) & (share <= GREY_M0S[1])
    grey &= (slowness >= GREY_T1[0]) & (T1f <= GREY_T1[1])
    return {"white matter": white, "grey matter": grey, "CSF": maps.fluid(T1f)}


def quartiles(values: NDArray[np.floating], parameter: Parameter) -> str:
    """Median and quartiles in the displayed unit."""
    low, median, high = np.nanpercentile(values, (25, 50, 75)) * parameter.display_factor
    return f"{median:.3g} [{low:.3g}, {high:.3g}]"


def row(
    tissue: str,
    inside: NDArray[np.bool_],
    parameter: Parameter,
    reference: maps.Maps,
    estimate: maps.Maps,
) -> str:
    """Both medians of a tissue, and their difference; what is published of white matter."""
    name, factor = parameter.name, parameter.display_factor
    nlls = reference[name][inside]
    cells = [tissue, str(inside.sum()), parameter.label, quartiles(nlls, parameter), "", ""]
    if name in estimate.names:
        network = estimate[name][inside]
        # Of the same voxels: the median of the differences, not a difference of medians.
        difference = np.nanmedian(network - nlls) / np.nanmedian(nlls)
        cells[-2:] = quartiles(network, parameter), f"{100 * difference:+.1f} %"
    if tissue == "white matter":
        low, high = (factor * limit for limit in EXPECTED[name])
        cells += [f"{factor * PUBLISHED[name]:.3g}", f"{low:.3g} to {high:.3g}"]
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table; draw the maps of both and their difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nlls", type=Path, help="maps of `fisherprint fit`")
    parser.add_argument("network", type=Path, help="maps of a network of the same images")
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG")
    parser.add_argument("--turns", type=int, default=1, help="quarter turns of the pictures")
    parser.add_argument("--every", type=int, default=1, help="voxel drawn, if not all are fitted")
    arguments = parser.parse_args()
    described = [two_pool.PARAMETERS[name] for name in NAMES]
    reference = files.read_maps(arguments.nlls, NAMES).maps
    mapped = tuple(n for n in NAMES if (arguments.network / f"{n}.nii.gz").exists())
    estimate = files.read_maps(arguments.network, mapped).maps

    print("| tissue | voxels | | NLLS | network | network - NLLS | published | expected |")
    print("|---|---|---|---|---|---|---|---|")
    for tissue, inside in tissues(reference).items():
        for parameter in described:
            print(row(tissue, inside, parameter, reference, estimate))

    def turned(volume: maps.Maps) -> dict[str, NDArray[np.float64]]:
        return {
            name: np.rot90(volume[name][:: arguments.every, :: arguments.every], arguments.turns)
            for name in volume.names
        }

    shown = [parameter for parameter in described if parameter.name in mapped]
    figure = report.map_panel(
        turned(estimate),
        shown,
        truth=turned(reference),
        labels=("least squares", "network"),
        ranges=RANGES,
    )
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
