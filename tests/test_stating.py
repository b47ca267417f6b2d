"""Maps stated in other units: numbers, error bars, sidecars, and who takes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fisherprint import cli, files
from fisherprint.files import OutputExistsError, UnreadableFileError
from fisherprint.maps import Maps
from fisherprint.models.two_pool import PARAMETERS

NAMES = ("m0s", "T1", "B0")
SHAPE = (4, 3, 2)
AFFINE = np.array([[0, 2.0, 0, -3], [-2, 0, 0, 4], [0, 0, 3, -5], [0, 0, 0, 1]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Estimates with error bars of m0s and T1; one voxel without an estimate."""
    rng = np.random.default_rng(0)
    values = rng.uniform([0.0, 0.5, -100], [0.3, 2.0, 100], (*SHAPE, 3))
    values[0, 0, 0] = np.nan
    volume = files.Volume(np.zeros((*SHAPE, 5), np.complex64), AFFINE)
    for kind, names, numbers in (
        ("estimate", NAMES, values),
        ("standard deviation", NAMES[:2], 0.05 * values[..., :2]),
    ):
        files.write_maps(
            Maps(names, numbers, np.ones(SHAPE, bool), 1),
            tmp_path / "maps",
            volume=volume,
            parameters=list(PARAMETERS.values()),
            provenance={"loss": "crb"},
            kind=kind,
        )
    files.write_json(tmp_path / "maps" / "summary.json", {"failed_voxels": 1})
    return tmp_path / "maps"


def image(folder: Path, name: str) -> np.ndarray:
    return nibabel.load(folder / f"{name}.nii.gz").get_fdata()


def about(folder: Path, name: str) -> dict[str, object]:
    return json.loads((folder / f"{name}.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_numbers_error_bars_and_sidecars_are_converted(folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    out = tmp_path / "new" / "stated"
    written = files.convert_maps(folder, out, {"T1": "ms", "m0s": "F", "B0": "Hz"})
    assert [path.name for path in written] == [
        f"{name}.nii.gz" for name in ("T1", "T1_std", "F", "F_std", "B0")
    ]
    assert contents(folder) == before
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in written),
        *(path.name.replace(".nii.gz", ".json") for path in written),
        "summary.json",
    }
    m0s, bar = image(folder, "m0s"), image(folder, "m0s_std")
    for name, expected in (
        ("T1", 1e3 * image(folder, "T1")),
        ("T1_std", 1e3 * image(folder, "T1_std")),
        ("F", m0s / (1 - m0s)),
        # What a small step of m0s does to F, by a difference; second order in the step.
        ("F_std", (m0s + 1e-4 * bar) / (1 - m0s - 1e-4 * bar) / 1e-4 - m0s / (1 - m0s) / 1e-4),
        ("B0", image(folder, "B0") / (2 * np.pi)),
    ):
        # Single precision; the difference adds 1e-4 · bar / (1 - m0s) < 2e-6.
        np.testing.assert_allclose(image(out, name), expected, rtol=4e-6, err_msg=name)
        np.testing.assert_array_equal(nibabel.load(out / f"{name}.nii.gz").affine, AFFINE)
    T1 = about(out, "T1")
    changed = {"Unit": "ms", "DisplayUnit": "ms", "Conversion": None, "Range": None}
    expected = about(folder, "T1") | changed
    assert expected == T1 | {"Conversion": None, "Range": None}
    assert T1["Range"] == pytest.approx([np.nanmin(image(out, "T1")), np.nanmax(image(out, "T1"))])
    assert T1["Conversion"] == {
        "Formula": "T1 in ms = 1000 T1 in s",
        "Parameter": "T1",
        "Unit": "s",
    }
    F = about(out, "F_std")
    assert (F["Parameter"], F["Unit"], F["Kind"]) == ("F", "", "standard deviation")
    assert F["Conversion"]["Formula"] == "F = m0s/(1 - m0s)"


def test_the_command_converts_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    out = tmp_path / "out"
    for words, code, said in (
        (["T1=ms", "m0s=F"], 0, f"written: {out / 'T1.nii.gz'}\n"),
        (["T1=ms"], 2, "already there"),
        (["T1"], 2, "expected NAME=UNIT"),
    ):
        arguments = ["fisherprint", "convert", str(folder), *words, "-o", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert leaving.value.code == code
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
    assert about(out, "F_std")["Parameter"] == "F"


def test_in_place_and_away_again(folder: Path) -> None:
    files.state_maps(folder, {"m0s": "F"})
    assert (folder / "F.nii.gz").exists() and not (folder / "m0s.nii.gz").exists()
    # Of somebody else.
    for name, about in (("B1", {"Unit": ""}), ("coefficients", {"Parameter": "c"})):
        nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE), AFFINE), folder / f"{name}.nii.gz")
        files.write_json(folder / f"{name}.json", about)
    (folder / "notes.json").write_text("[1, 2]")
    # Where new maps are written, no others must stay beside them.
    (new,) = files.write_maps(
        Maps(("B0",), np.zeros((*SHAPE, 1)), np.ones(SHAPE, bool), 0),
        folder,
        volume=files.Volume(np.zeros((*SHAPE, 5), np.complex64), AFFINE),
        parameters=list(PARAMETERS.values()),
        provenance={},
    )
    files.keep_maps([new])
    assert {path.name for path in folder.iterdir()} == {
        *("B1.nii.gz", "B1.json", "coefficients.nii.gz", "coefficients.json", "summary.json"),
        *("B0.nii.gz", "B0.json", "notes.json"),
    }


def test_an_error_bar_without_end_stays_one(folder: Path, tmp_path: Path) -> None:
    path = folder / "T1_std.nii.gz"
    values = nibabel.load(path).get_fdata()
    values[1, 1, 1] = np.inf
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), AFFINE), path)
    files.convert_maps(folder, tmp_path / "ms", {"T1": "ms"})
    new = image(tmp_path / "ms", "T1_std")
    assert np.isinf(new[1, 1, 1]) and np.isnan(new[0, 0, 0]) and np.isfinite(new[2, 1, 1])
    with pytest.raises(ValueError, match="expected a folder outside of"):
        files.convert_maps(folder, folder / "new" / "ms", {"T1": "ms"})
    assert not (folder / "new").exists()


def test_an_estimate_of_one_has_no_ratio(folder: Path) -> None:
    m0s = nibabel.load(folder / "m0s.nii.gz")
    values = m0s.get_fdata()
    values[1, 1, 1] = 1.0
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), AFFINE), folder / "m0s.nii.gz")
    files.state_maps(folder, {"m0s": "F"})
    assert np.isnan(image(folder, "F")[1, 1, 1])
    assert np.isfinite(about(folder, "F")["Range"]).all()


@pytest.mark.parametrize(
    ("stated", "error", "message"),
    [
        ({"T1": "h"}, ValueError, "way to state T1 .*: ms, µs; got 'h'"),
        ({"T1": "ms", "T9": "ms"}, KeyError, "unknown parameter 'T9'; known are B0, m0s, T1"),
    ],
)
def test_what_cannot_be_stated_changes_nothing(
    folder: Path, stated: dict[str, str], error: type[Exception], message: str
) -> None:
    before = contents(folder)
    with pytest.raises(error, match=message):
        files.state_maps(folder, stated)
    out = folder.parent / "out"
    with pytest.raises(error, match=message):
        files.convert_maps(folder, out, stated)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["maps"]


def test_nothing_is_overwritten_and_nothing_made_of_no_maps(folder: Path) -> None:
    with pytest.raises(OutputExistsError, match="already there"):
        files.convert_maps(folder, folder, {"T1": "ms"})
    with pytest.raises(UnreadableFileError, match="expected a folder of maps"):
        files.convert_maps(folder.parent, folder.parent / "out", {"T1": "ms"})


def test_stages_that_count_in_si_units_refuse_converted_maps(folder: Path) -> None:
    files.state_maps(folder, {"T1": "ms"})
    with pytest.raises(ValueError, match=r"expected T1 in s; .* holds T1 in ms = 1000 T1 in s"):
        files.read_maps(folder, ["m0s", "T1"])
    with pytest.raises(ValueError, match="expected T1 in s"):
        files.read_map(folder / "T1.nii.gz", SHAPE, name="T1")
    with pytest.raises(ValueError, match=r"way to state T1 \(ms\)"):
        files.state_maps(folder, {"T1": "ms"})
    assert files.read_maps(folder, ["m0s"]).maps.names == ("m0s",)
    with pytest.raises(ValueError, match="expected T1 in s, as a T1map is; got 'ms'"):
        files.write_bids(
            folder, folder / "bids", files.Entities("01"), versions={"fisherprint": "0"}
        )
