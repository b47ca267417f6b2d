"""Folders of maps: what is in them, and their parameters stated in other units for people."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fisherprint import _checks, _storage
from fisherprint._storage import UnreadableFileError
from fisherprint.files.records import OutputExistsError, read_json, write_json
from fisherprint.files.volumes import read_maps
from fisherprint.parameters import Conversion, Parameter, convert

# What a map shows, as its sidecar says under `Kind`.
ESTIMATE, ERROR = "estimate", "standard deviation"


def described_maps(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Sidecars of the images in a folder of maps, by the name of the file without suffix.

    Raises:
        UnreadableFileError: there is none.
    """
    found = {}
    for sidecar in sorted(Path(folder).glob("*.json"), key=lambda path: path.name.lower()):
        if sidecar.with_suffix(".nii.gz").exists() and "Parameter" in (
            about := read_json(sidecar)
        ):
            # Early versions wrote estimates alone.
            found[sidecar.stem] = {"Kind": ESTIMATE} | about
    if not found:
        raise UnreadableFileError(
            f"expected a folder of maps with their sidecars; {folder} holds none. "
            "Make maps first, with fisherprint map."
        )
    return found


def conversions(
    parameters: Sequence[Parameter], stated: Mapping[str, str]
) -> dict[str, Conversion]:
    """How to state some parameters, by name.

    Args:
        parameters: in SI units.
        stated: the unit of each, or "F" for m0s, by name.

    Raises:
        KeyError: a parameter that is not there.
        ValueError: no such way to state it; the message lists those there are.
    """
    known = [parameter.name for parameter in parameters]
    return {
        name: convert(parameters[_checks.index(name, known)], to) for name, to in stated.items()
    }


def state_maps(folder: str | Path, stated: Mapping[str, str]) -> list[Path]:
    """State the maps of some parameters otherwise, and their standard deviations with them.

    Images and sidecars are replaced; m0s as F becomes `F.nii.gz`. The sidecar says the new unit,
    and under `Conversion` what was done. An error bar is carried over by the derivative at the
    estimate, |dF/dm0s|·std.

    Args:
        folder: of maps in SI units.
        stated: as for `conversions`.

    Returns:
        The new images' paths.

    Raises:
        UnreadableFileError: no maps, or a damaged one.
        KeyError, ValueError: as for `conversions`; nothing is changed then.
    """
    folder = Path(folder)
    found = described_maps(folder)
    parameters = [_parameter(about) for about in found.values() if about["Kind"] == ESTIMATE]
    written = []
    for name, way in conversions(parameters, stated).items():
        stems = [stem for stem in (name, f"{name}_std") if stem in found]
        # All at once: the error bar needs the estimate as it was.
        values = read_maps(folder, stems).maps.values
        # An estimate of m0s may be 1, which has no ratio.
        with np.errstate(divide="ignore", invalid="ignore"):
            estimate = way.forward(values[..., 0])
            estimate[~np.isfinite(estimate)] = np.nan
            converted = [estimate]
            if len(stems) > 1:
                # Infinite where the signal tells nothing.
                error = np.abs(way.slope(values[..., 0])) * values[..., 1]
                converted.append(np.where(np.isnan(estimate), np.nan, error))
        for stem, new in zip(stems, converted, strict=True):
            about = _stated(found[stem], way, new)
            written.append(
                _replace(folder, stem, stem.replace(name, way.parameter.name), new, about)
            )
    return written


def convert_maps(folder: str | Path, out: str | Path, stated: Mapping[str, str]) -> list[Path]:
    """The same into a new folder; all else is copied.

    Raises:
        OutputExistsError: `out` is there.
        ValueError: `out` is inside of the folder.
        UnreadableFileError, KeyError, ValueError: as for `state_maps`; there is no `out` then.
    """
    out = Path(out)
    if out.exists():
        raise OutputExistsError(f"{out} is already there. Choose another folder, or remove it.")
    described_maps(folder)
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"expected a folder outside of {folder}; got {out}. Choose another one.")
    partial = out.with_name(f".part-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(folder, partial)
        written = state_maps(partial, stated)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out / path.name for path in written]


def keep_maps(images: Sequence[Path]) -> None:
    """Remove other maps that this package made from the folder of some, such as earlier ones.

    They may be of other parameters, or have other names.
    """
    for sidecar in images[0].parent.glob("*.json"):
        image = sidecar.with_suffix(".nii.gz")
        if image in images or not image.exists():
            continue
        if {"Parameter", "Provenance"} <= read_json(sidecar).keys():
            image.unlink()
            sidecar.unlink()


def _parameter(about: Mapping[str, Any]) -> Parameter:
    # How numbers are stated does not depend on their bounds.
    return Parameter(about["Parameter"], about["Parameter"], about["Unit"], (0.0, 0.0))


def _stated(
    about: Mapping[str, Any], way: Conversion, values: NDArray[np.floating]
) -> dict[str, Any]:
    """The sidecar of a map that is stated otherwise."""
    finite = values[np.isfinite(values)]
    return {
        **about,
        "Parameter": way.parameter.name,
        "Unit": way.parameter.display_unit,
        "DisplayUnit": way.parameter.display_unit,
        "DisplayFactor": 1.0,
        "Range": [float(finite.min()), float(finite.max())] if finite.size else None,
        "Conversion": {
            "Formula": way.formula,
            "Parameter": about["Parameter"],
            "Unit": about["Unit"],
        },
    }


def _replace(
    folder: Path, old: str, new: str, values: NDArray[np.floating], about: Mapping[str, Any]
) -> Path:
    """Write an image and its sidecar in place of those of `old`."""
    image: Any = nibabel.load(folder / f"{old}.nii.gz")
    # nibabel announces types, but leaves this constructor without.
    converted = nibabel.Nifti1Image(  # type: ignore[no-untyped-call]
        values.astype(np.float32), image.affine, image.header
    )
    path = folder / f"{new}.nii.gz"
    # Never an image beside a sidecar that says another unit.
    (folder / f"{old}.json").unlink()
    with _storage.replacing(path) as temporary:
        nibabel.save(converted, temporary)
    if new != old:
        (folder / f"{old}.nii.gz").unlink()
    write_json(folder / f"{new}.json", about)
    return path
