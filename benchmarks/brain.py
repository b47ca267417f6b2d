"""Errors of the maps of two runs on the digital brain, tissue by tissue, and a picture of both.

    python benchmarks/brain.py RUN_OF_THE_PAPERS_TRAIN RUN_OF_THE_BUNDLED_TRAIN -o errors.png

The runs are those of experiments/papers-train.toml and experiments/bundled.toml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel
import numpy as np
from numpy.typing import NDArray

TISSUES = ("white_matter", "grey_matter", "thalamus", "putamen", "caudate", "pallidum")
# Displayed unit, factor to it, largest error shown.
SHOWN = {"m0s": ("", 1.0, 0.1), "T1": ("s", 1.0, 0.4), "T2f": ("ms", 1e3, 30.0)}


def volume(path: Path) -> NDArray[np.float64]:
    """Values of an image."""
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float64)  # type: ignore[attr-defined]


def errors(run: Path, name: str) -> NDArray[np.float64]:
    """Map minus truth, in displayed units."""
    difference = volume(run / f"maps/{name}.nii.gz") - volume(run / f"brain/truth/{name}.nii.gz")
    return SHOWN[name][1] * difference


def masks(run: Path) -> dict[str, NDArray[np.bool_]]:
    """Pure tissues, and their union."""
    own = {name: volume(run / f"brain/tissues/{name}.nii.gz") > 0 for name in TISSUES}
    return {**own, "all six": np.any(list(own.values()), axis=0)}


def main() -> None:
    """Print the table: root mean square errors, mean errors in brackets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    print("| tissue | voxels | parameter | " + " | ".join(run.name for run in arguments.runs), "|")
    print("|---|---|---|---|---|")
    tissues = masks(arguments.runs[0])
    for name, (unit, _, _) in SHOWN.items():
        found = [errors(run, name) for run in arguments.runs]
        for tissue, mask in tissues.items():
            values = [
                f"{np.sqrt((error[mask] ** 2).mean()):.3g} ({error[mask].mean():+.2g})"
                for error in found
            ]
            label = f"{name} ({unit})" if unit else name
            print(f"| {tissue} | {mask.sum()} | {label} | {' | '.join(values)} |")
    if arguments.output is not None:
        draw(arguments.runs, tissues["all six"], arguments.output)


def draw(runs: list[Path], brain: NDArray[np.bool_], output: Path) -> None:
    """Errors of both runs, one parameter a row, in the axial slice with most of these tissues."""
    axial = int(brain.sum(axis=(0, 1)).argmax())
    rows, columns = (
        slice(where.min() - 2, where.max() + 3) for where in np.nonzero(brain[..., axial])
    )
    figure, axes = plt.subplots(len(SHOWN), 2, figsize=(6.4, 9.6), layout="constrained")
    for row, (name, (unit, _, limit)) in zip(axes, SHOWN.items(), strict=True):
        for axis, run in zip(row, runs, strict=True):
            error = np.where(brain, errors(run, name), np.nan)
            rms = np.sqrt(np.nanmean(error**2))
            image = axis.imshow(
                error[rows, columns, axial].T, origin="lower", cmap="PuOr", vmin=-limit, vmax=limit
            )
            axis.set(xticks=[], yticks=[], title=f"{run.name}\n{name}: RMS {rms:.3g} {unit}")
        label = f"error of {name}" + (f" ({unit})" if unit else "")
        figure.colorbar(image, ax=row, label=label, shrink=0.8)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
