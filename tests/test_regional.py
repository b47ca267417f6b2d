"""The command `regions`: tables of maps over labels, against numpy and the csv module."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from pathlib import Path
from unittest import mock

import nibabel
import numpy as np
import pytest

from fisherprint import cli, files
from fisherprint.maps import Maps
from fisherprint.models.two_pool import PARAMETERS

NAMES = ("m0s", "T1", "T2f")
SHAPE = (6, 5, 4)
AFFINE = np.array([[0, 2.0, 0, -3], [-2, 0, 0, 4], [0, 0, 3, -5], [0, 0, 0, 1]])
COLUMNS = (
    "label,region,parameter,unit,voxels,failed,median,lower_quartile,upper_quartile,mean,sd,"
    "mean_crb_sd"
)


def call(*arguments: object) -> tuple[int, str]:
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["fisherprint", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        pytest.raises(SystemExit) as leaving,
    ):
        cli.main()
    return leaving.value.code, out.getvalue()


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    """Maps with a part that failed, and error bars of m0s and T1, in single precision."""
    rng = np.random.default_rng(0)
    found = {name: rng.random(SHAPE).astype(np.float32) for name in NAMES}
    for image in found.values():
        image[0, 0] = np.nan
    found |= {f"{name}_std": 0.1 * found[name] for name in ("m0s", "T1")}
    return found


@pytest.fixture
def maps(tmp_path: Path, values: dict[str, np.ndarray]) -> Path:
    """A folder as `map` and `fit` write it: also the phase of M0, codes, a summary."""
    folder = tmp_path / "maps"
    volume = files.Volume(np.zeros((*SHAPE, 5), np.complex64), AFFINE)
    for kind, suffix in (("estimate", ""), ("standard deviation", "_std")):
        names = [name for name in NAMES if name + suffix in values]
        stack = np.stack([values[name + suffix] for name in names], axis=-1)
        files.write_maps(
            Maps(tuple(names), stack, np.ones(SHAPE, bool), 4),
            folder,
            volume=volume,
            parameters=list(PARAMETERS.values()),
            provenance={},
            kind=kind,
        )
    for name in ("M0_phase", "reason", "status"):
        save(folder / f"{name}.nii.gz", np.ones(SHAPE, np.uint8))
        about = {"Parameter": name, "Kind": "estimate", "Unit": ""}
        files.write_json(folder / f"{name}.json", about)
    files.write_json(folder / "summary.json", {})
    return folder


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.int16)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t" if path.suffix == ".tsv" else ","))


def number(text: str) -> float:
    return np.nan if text in ("", "n/a") else float(text)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_the_table_is_what_numpy_finds(
    maps: Path,
    values: dict[str, np.ndarray],
    labels: np.ndarray,
    tmp_path: Path,
    suffix: str,
) -> None:
    table = tmp_path / f"table{suffix}"
    code, said = call(
        *("regions", maps, "--labels", save(tmp_path / "labels.nii.gz", labels), "-o", table)
    )
    assert code == 0 and said == f"3 regions, 3 parameters: {table}\n"
    rows = read(table)
    assert list(rows[0]) == COLUMNS.split(",")
    assert [(row["label"], row["parameter"]) for row in rows] == [
        (label, name) for label in "123" for name in NAMES
    ]
    for row in rows:
        name, inside = row["parameter"], labels == int(row["label"])
        found = values[name][inside].astype(np.float64)
        good = found[np.isfinite(found)]
        expected = {
            "voxels": inside.sum(),
            "failed": 1 - len(good) / len(found),
            "median": np.median(good),
            "lower_quartile": np.quantile(good, 0.25),
            "upper_quartile": np.quantile(good, 0.75),
            "mean": good.mean(),
            "sd": good.std(ddof=1),
            "mean_crb_sd": np.nan
            if name == "T2f"
            else np.nanmean(values[f"{name}_std"][inside].astype(np.float64)),
        }
        assert row["region"] == row["label"]
        assert row["unit"] == PARAMETERS[name].unit
        for column, value in expected.items():
            # Sums of a few tens of numbers in double precision, in another order.
            assert number(row[column]) == pytest.approx(value, rel=1e-12, nan_ok=True), column
    assert rows[2]["mean_crb_sd"] == {".csv": "", ".tsv": "n/a"}[suffix]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.json", '{"1": "grey matter", "2": "white matter", "9": "pons"}'),
        ("dseg.tsv", "index\tname\tcolor\n1\tgrey matter\t#1\n2\twhite matter\t#2\n9\tpons\t#3\n"),
        ("names.csv", "name,index\ngrey matter,1\nwhite matter,2\npons,9\n"),
    ],
)
def test_labels_may_have_names(
    maps: Path, labels: np.ndarray, tmp_path: Path, file: str, text: str
) -> None:
    (tmp_path / file).write_text(text)
    # Many programs write labels as real numbers.
    image = save(tmp_path / "labels.nii.gz", labels.astype(np.float32))
    table = tmp_path / "table.csv"
    code, said = call(
        *("regions", maps, "--labels", image, "--names", tmp_path / file, "-o", table)
    )
    assert code == 0 and said.startswith("1 named labels have no voxel: pons\n")
    assert [row["region"] for row in read(table)][::3] == ["grey matter", "white matter", "3"]


def test_without_labels_the_masks_of_the_maps_are_regions(
    maps: Path, values: dict[str, np.ndarray], tmp_path: Path
) -> None:
    table = tmp_path / "table.csv"
    code, said = call("regions", maps, "-o", table)
    assert code == 2 and "white_matter.nii.gz or csf.nii.gz" in said and "--labels" in said
    fluid = np.zeros(SHAPE, np.uint8)
    fluid[2:4] = 1
    save(maps / "csf.nii.gz", fluid)
    assert call("regions", maps, "-o", table)[0] == 0
    (row, *_) = read(table)
    assert (row["label"], row["region"], row["voxels"]) == ("2", "CSF", "40")
    assert float(row["median"]) == np.median(values["m0s"][2:4].astype(np.float64))
    # A mask may be named, too: it is an image of one label.
    other = tmp_path / "other.csv"
    assert call("regions", maps, "--labels", maps / "csf.nii.gz", "-o", other)[0] == 0
    assert read(other)[0] == row | {"label": "1", "region": "1"}


def test_converted_maps_say_their_unit(maps: Path, labels: np.ndarray, tmp_path: Path) -> None:
    image = save(tmp_path / "labels.nii.gz", labels)
    files.convert_maps(maps, tmp_path / "ms", {"T1": "ms"})
    tables = []
    for folder in (maps, tmp_path / "ms"):
        table = tmp_path / f"{folder.name}.csv"
        assert call("regions", folder, "--labels", image, "-o", table)[0] == 0
        tables.append([row for row in read(table) if row["parameter"] == "T1"])
    for old, new in zip(*tables, strict=True):
        assert (old["unit"], new["unit"]) == ("s", "ms")
        for column in ("median", "sd", "mean_crb_sd"):
            # Maps are in single precision.
            assert float(new[column]) == pytest.approx(1e3 * float(old[column]), rel=1e-6)


def test_what_does_not_fit_is_refused(maps: Path, labels: np.ndarray, tmp_path: Path) -> None:
    image = save(tmp_path / "labels.nii.gz", labels)
    table = tmp_path / "table.csv"

    def refused(*arguments: object, folder: Path = maps) -> str:
        code, said = call("regions", folder, *arguments)
        assert code == 2 and not table.exists()
        return " ".join(said.split())

    moved = AFFINE.copy()
    moved[0, 3] += 2
    said = refused("-o", table, "--labels", save(tmp_path / "moved.nii.gz", labels, moved))
    assert "lie up to 2 mm from theirs" in said
    # The same first voxel, and another size: 5 steps along x, a millimetre each.
    larger = AFFINE.copy()
    larger[0, 0] += 1
    said = refused("-o", table, "--labels", save(tmp_path / "larger.nii.gz", labels, larger))
    assert "lie up to 5 mm from theirs" in said
    said = refused("-o", table, "--labels", save(tmp_path / "small.nii.gz", labels[1:]))
    assert "(X=6, Y=5, Z=4); got the shape (5, 5, 4)" in said
    said = refused("-o", table, "--labels", save(tmp_path / "half.nii.gz", labels * 0.5))
    assert "expected whole numbers" in said and "got 0.5" in said
    said = refused("-o", table, "--labels", save(tmp_path / "no.nii.gz", 0 * labels))
    assert "got zeros alone" in said
    assert "expected a file" in refused("-o", table, "--labels", tmp_path / "absent.nii.gz")
    said = refused("-o", table, "--labels", image, folder=tmp_path)
    assert "expected a folder of maps" in said
    assert ".csv or .tsv" in refused("-o", tmp_path / "table.xlsx", "--labels", image)
    assert "labels that the names" in refused("-o", table, "--names", image)
    for text in ("[1]", "{", '{"a": "b"}'):
        (tmp_path / "names.json").write_text(text)
        said = refused("-o", table, "--labels", image, "--names", tmp_path / "names.json")
        assert "expected" in said and "names.json" in said
    (tmp_path / "names.json").write_text(json.dumps({"77": "pons"}))
    said = refused("-o", table, "--labels", image, "--names", tmp_path / "names.json")
    assert "names of the labels" in said and "has those of 77" in said
    # Numbers that were there stay there.
    assert call("regions", maps, "--labels", image, "-o", table)[0] == 0
    before = table.read_bytes()
    code, said = call("regions", maps, "--labels", image, "-o", table)
    assert code == 2 and "already there" in said and table.read_bytes() == before
    assert call("regions", maps, "--labels", image, "-o", table, "--force")[0] == 0


def test_labels_without_a_place_are_taken_by_their_shape(
    maps: Path, labels: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "labels.npy", labels)
    image = save(tmp_path / "labels.nii.gz", labels)
    for path, table in ((tmp_path / "labels.npy", "a.csv"), (image, "b.csv")):
        assert call("regions", maps, "--labels", path, "-o", tmp_path / table)[0] == 0
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
