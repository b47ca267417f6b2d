"""Maps as a BIDS derivative data set.

Source: Brain Imaging Data Structure 1.11, https://bids-specification.readthedocs.io, "Derivatives"
and the appendix on quantitative MRI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fisherprint import _storage
from fisherprint.files.records import OutputExistsError, read_json, write_json, write_text
from fisherprint.files.stating import ERROR, described_maps

BIDS_VERSION = "1.11.0"
_REFERENCE = "https://doi.org/10.1002/mrm.29206"
# Suffix, description and unit of what has an official suffix, by parameter.
_OFFICIAL = {
    "T1": ("T1map", "", "s"),
    "T1f": ("T1map", "free", "s"),
    "T1s": ("T1map", "semisolid", "s"),
    "T2": ("T2map", "", "s"),
    "T2f": ("T2map", "", "s"),
    "M0": ("M0map", "", ""),
    "B1": ("TB1map", "", ""),
}
_FIELD_MAPS = ("TB1map",)
# BIDS' labels of tissues, by the name of the mask beside the maps.
_MASKS = {"white_matter": "WM", "csf": "CSF"}
# Where a sidecar says what the whole numbers of an image stand for.
_CODES = "Codes"


@dataclass(frozen=True)
class Entities:
    """Whom and what the images show, as in the names of BIDS files.

    Attributes:
        subject: label of `sub-`.
        session: of `ses-`; empty if there is none.
        acquisition: of `acq-`, likewise.
        run: of `run-`, likewise.

    Raises:
        ValueError: no subject, a label that is not made of letters and digits, or a run that is
            no number.
    """

    subject: str
    session: str = ""
    acquisition: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        for name, label in vars(self).items():
            least = "+" if name == "subject" else "*"
            allowed = "[0-9]" if name == "run" else "[0-9a-zA-Z]"
            if not re.fullmatch(allowed + least, label):
                raise ValueError(
                    f"expected {'a number' if name == 'run' else 'letters and digits'} as the "
                    f"{name} of a BIDS file; got {label!r}. Leave out keys such as sub-."
                )

    @property
    def folder(self) -> Path:
        """Of the subject and its session, from the root of the data set."""
        subject = Path(f"sub-{self.subject}")
        return subject / f"ses-{self.session}" if self.session else subject

    @property
    def stem(self) -> str:
        """Beginning of the names of all files."""
        labels = {
            "sub": self.subject,
            "ses": self.session,
            "acq": self.acquisition,
            "run": self.run,
        }
        return "_".join(f"{key}-{label}" for key, label in labels.items() if label)


class _Image(NamedTuple):
    """An image to be written: from where, what its sidecar says, its name behind the entities."""

    source: Path
    about: Mapping[str, Any]
    datatype: str
    name: str
    official: bool


def write_bids(
    maps: str | Path,
    root: str | Path,
    entities: Entities,
    *,
    sources: Sequence[str] = (),
    versions: Mapping[str, str],
    force: bool = False,
) -> list[Path]:
    """Put a folder of maps into a BIDS derivative data set, which may hold other subjects.

    T1 (of the pools apart: `desc-free`, `desc-semisolid`), T2, |M0| and B1 have official
    suffixes. All else has suffixes of ours, which `.bidsignore` lists: the parameter's name and
    `map`, such as `m0smap`, `Rxmap` or `T2smap`. A standard deviation has the suffix of its
    parameter and `desc-std`. `_` in a name of ours is left out. Masks of white matter and CSF are
    `label-WM_mask` and `label-CSF_mask`. An image of codes stays one of whole numbers, and its
    sidecar has them under `Levels`, BIDS' name for such a dictionary.

    Args:
        maps: folder that `write_maps` wrote.
        root: of the data set; made if absent.
        entities: of the images.
        sources: what they were made from, as BIDS URIs or paths; else what the sidecars say.
        versions: of the packages, `fisherprint` among them.
        force: replace the maps of these entities, all that this package wrote.

    Returns:
        The images' paths.

    Raises:
        UnreadableFileError: the folder holds no maps.
        OutputExistsError: there are images of these entities, or the data set is no derivative.
        ValueError: an official map in another unit than that of its suffix.
    """
    found = described_maps(maps)
    images = [_planned(Path(maps) / f"{stem}.nii.gz", about) for stem, about in found.items()]
    images += _masks(Path(maps))
    root = Path(root)
    description = _description(root, versions)
    targets = [
        root / entities.folder / image.datatype / f"{entities.stem}_{image.name}.nii.gz"
        for image in images
    ]
    for target in targets:
        if target.exists() and not force:
            raise OutputExistsError(
                f"expected no images of {entities.stem} in {root}; there is {target.name}. "
                "Give another run or acquisition, or replace them with --force."
            )
    write_json(root / "dataset_description.json", description)
    _ignore(root, sorted({f"*_{image.name}.*" for image in images if not image.official}))
    for image, target in zip(images, targets, strict=True):
        with _storage.replacing(target) as temporary:
            temporary.write_bytes(image.source.read_bytes())
        write_json(
            target.with_name(target.name.removesuffix(".nii.gz") + ".json"),
            _sidecar(image, sources),
        )
    if force:
        _keep(targets, root, entities)
    return targets


def _keep(images: Sequence[Path], root: Path, entities: Entities) -> None:
    """Remove other maps of these entities, such as error bars of earlier estimates."""
    # What has more entities than these is another scan's.
    name = re.compile(rf"{entities.stem}_(desc-[0-9a-zA-Z]+_|label-(WM|CSF)_)?[0-9a-zA-Z]+\.json")
    for sidecar in root.joinpath(entities.folder).glob("*/*.json"):
        image = sidecar.with_suffix(".nii.gz")
        if image in images or not name.fullmatch(sidecar.name):
            continue
        if "Fisherprint" in read_json(sidecar) or sidecar.stem.endswith("_mask"):
            sidecar.unlink()
            image.unlink(missing_ok=True)


def _planned(source: Path, about: Mapping[str, Any]) -> _Image:
    """Where an image belongs."""
    name = about["Parameter"]
    error = "std" if about["Kind"] == ERROR else ""
    if name not in _OFFICIAL:
        described = f"desc-{error}_" if error else ""
        plain = name.replace("_", "")
        return _Image(source, about, "anat", f"{described}{plain}map", official=False)
    suffix, description, unit = _OFFICIAL[name]
    if about["Unit"] != unit:
        raise ValueError(
            f"expected {name} in {unit or 'no unit'}, as a {suffix} is; got {about['Unit']!r} in "
            f"{source}. Make the maps without another unit for {name}."
        )
    label = description + error
    datatype = "fmap" if suffix in _FIELD_MAPS else "anat"
    full = f"desc-{label}_{suffix}" if label else suffix
    return _Image(source, about, datatype, full, official=True)


def _masks(folder: Path) -> list[_Image]:
    """Masks beside the maps; they have no sidecars."""
    return [
        _Image(
            folder / f"{stem}.nii.gz",
            {"Description": f"voxels taken for {stem.replace('_', ' ')}", "Type": "ROI"},
            "anat",
            f"label-{label}_mask",
            official=True,
        )
        for stem, label in _MASKS.items()
        if (folder / f"{stem}.nii.gz").exists()
    ]


def _description(root: Path, versions: Mapping[str, str]) -> dict[str, Any]:
    """`dataset_description.json`: that of the data set if there is one, else a new one."""
    path = root / "dataset_description.json"
    ours = {"Name": "fisherprint", "Version": versions["fisherprint"]}
    if not path.exists():
        return {
            "Name": "Maps of quantitative MRI",
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [ours],
        }
    description = read_json(path)
    kind = description.get("DatasetType", "raw")
    if kind != "derivative":
        raise OutputExistsError(
            f"expected a derivative data set, or a new one; {root} is {kind}. "
            "Write to its folder derivatives/fisherprint instead."
        )
    makers = [maker for maker in description.get("GeneratedBy", []) if maker != ours]
    return {**description, "GeneratedBy": [*makers, ours]}


def _ignore(root: Path, patterns: Sequence[str]) -> None:
    """Add to `.bidsignore` what it lacks."""
    path = root / ".bidsignore"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    missing = [pattern for pattern in patterns if pattern not in lines]
    if missing:
        write_text(path, "\n".join([*lines, *missing, ""]))


def _sidecar(image: _Image, sources: Sequence[str]) -> dict[str, Any]:
    """BIDS' own fields first, then all that the map's sidecar says."""
    about, own = image.about, image.about.get("Source")
    source = {"Sources": list(sources) or ([own] if own else [])}
    if "Parameter" not in about:
        return {**about, **source}
    meaning: dict[str, Any] = {"Units": about["Unit"] or ("arbitrary" if image.official else "1")}
    if _CODES in about:
        meaning = {"Levels": about[_CODES]}
    return {
        "Description": f"{about['Parameter']}, {about['Kind']}",
        **meaning,
        "EstimationAlgorithm": about.get("Provenance", {}).get("estimator", "neural network"),
        "EstimationReference": _REFERENCE,
        **source,
        "Fisherprint": dict(about),
    }
