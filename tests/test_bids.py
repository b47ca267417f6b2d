import fnmatch
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from bidsschematools import rules, schema, validator

from fisherprint import files
from fisherprint.files import Entities, OutputExistsError, UnreadableFileError, write_bids
from fisherprint.maps import Maps
from fisherprint.models.two_pool import PARAMETERS

NAMES = ("m0s", "T1", "T2f", "Rx", "B0", "B1")
CODES = {"0": "fine", "1": "at a bound", "2": "outside of the mask"}
VERSIONS = {"fisherprint": "0.1.0"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Maps as `write_maps` writes them, an error bar and a status beside them."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 4, 2, len(NAMES)))
    mask = np.ones(values.shape[:3], dtype=bool)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    source = Path("coefficients.nii.gz")
    volume = files.Volume(np.zeros((3, 4, 2, 5), np.complex64), affine, source=source)
    files.write_maps(
        Maps(NAMES, values, mask, 0),
        tmp_path / "maps",
        volume=volume,
        parameters=[PARAMETERS[name] for name in NAMES],
        provenance={"loss": "crb"},
    )
    for name, about in (
        ("T1_std", {"Parameter": "T1", "Kind": "standard deviation", "Unit": "s"}),
        ("m0s_std", {"Parameter": "m0s", "Kind": "standard deviation", "Unit": ""}),
        ("B1_std", {"Parameter": "B1", "Kind": "standard deviation", "Unit": ""}),
        ("M0", {"Parameter": "M0", "Kind": "estimate", "Unit": ""}),
        ("M0_phase", {"Parameter": "M0_phase", "Kind": "estimate", "Unit": "rad"}),
        ("residual", {"Parameter": "residual", "Kind": "estimate", "Unit": ""}),
        ("status", {"Parameter": "status", "Kind": "status", "Unit": "", "Codes": CODES}),
    ):
        numbers = rng.random((3, 4, 2)).astype(np.float32)
        if "Codes" in about:
            numbers = rng.integers(0, 3, (3, 4, 2)).astype(np.uint8)
        image = nibabel.Nifti1Image(numbers, affine)
        nibabel.save(image, tmp_path / "maps" / f"{name}.nii.gz")
        (tmp_path / "maps" / f"{name}.json").write_text(json.dumps(about))
    for name in ("white_matter", "csf"):
        files.write_mask(tmp_path / "maps" / f"{name}.nii.gz", values[..., 0] > 0.5, volume=volume)
    # Not a map.
    (tmp_path / "maps" / "summary.json").write_text("{}")
    return tmp_path / "maps"


def not_in_the_schema(paths: set[str]) -> set[str]:
    """Those that no rule of BIDS names, of raw data sets or derivatives."""
    bids = schema.load_schema()
    # `validate_bids` has the rules of raw data sets alone.
    known = rules.regexify_all()[0] + rules.regexify_filename_rules(
        bids.rules.files.deriv, bids, level=2
    )
    result = validator.validate_all([f"/{path}" for path in sorted(paths)], known)
    return {path.removeprefix("/") for path in result["path_tracking"]}


def test_the_data_set_is_valid_but_for_what_it_tells_to_ignore(folder: Path) -> None:
    root = folder.parent / "derivatives"
    entities = Entities("01", session="a", acquisition="hybrid", run="2")
    paths = write_bids(folder, root, entities, versions=VERSIONS)
    assert {str(path.relative_to(root)) for path in paths} == {
        f"sub-01/ses-a/{name}.nii.gz".replace("STEM", "sub-01_ses-a_acq-hybrid_run-2")
        for name in (
            *("anat/STEM_T1map", "anat/STEM_desc-std_T1map", "anat/STEM_T2map"),
            *("anat/STEM_m0smap", "anat/STEM_desc-std_m0smap", "anat/STEM_Rxmap"),
            *("anat/STEM_B0map", "fmap/STEM_TB1map", "fmap/STEM_desc-std_TB1map"),
            *("anat/STEM_M0map", "anat/STEM_M0phasemap", "anat/STEM_residualmap"),
            *("anat/STEM_statusmap", "anat/STEM_label-WM_mask", "anat/STEM_label-CSF_mask"),
        )
    }
    ignored = (root / ".bidsignore").read_text().split()
    everything = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    unmatched = not_in_the_schema(everything)
    told = {p for p in everything if any(fnmatch.fnmatch(p, pattern) for pattern in ignored)}
    # Neither is anything unofficial left to be complained of, nor anything official hidden.
    assert unmatched - {".bidsignore"} == told
    # m0s, its error, Rx, B0, phase of M0, residual, status: image and sidecar each.
    assert len(told) == 2 * 7


def test_images_are_the_same_and_sidecars_say_what_bids_asks_for(folder: Path) -> None:
    root = folder.parent / "derivatives"
    write_bids(folder, root, Entities("01"), versions=VERSIONS, sources=["bids:raw:sub-01/x"])
    anat = root / "sub-01" / "anat"
    for there, here in (("T1map", "T1"), ("desc-std_T1map", "T1_std"), ("m0smap", "m0s")):
        one, other = (
            nibabel.load(path)
            for path in (anat / f"sub-01_{there}.nii.gz", folder / f"{here}.nii.gz")
        )
        assert np.array_equal(one.get_fdata(), other.get_fdata())
        assert np.array_equal(one.affine, other.affine)
    T1 = files.read_json(anat / "sub-01_T1map.json")
    assert (T1["Units"], T1["Sources"]) == ("s", ["bids:raw:sub-01/x"])
    assert T1["Fisherprint"]["Provenance"] == {"loss": "crb"}
    assert files.read_json(anat / "sub-01_m0smap.json")["Units"] == "1"
    assert files.read_json(anat / "sub-01_M0map.json")["Units"] == "arbitrary"
    assert files.read_json(anat / "sub-01_M0phasemap.json")["Units"] == "rad"
    assert T1["EstimationAlgorithm"] == "neural network"
    about = files.read_json(root / "dataset_description.json")
    assert about["DatasetType"] == "derivative" and about["BIDSVersion"]
    assert about["GeneratedBy"] == [{"Name": "fisherprint", "Version": "0.1.0"}]

    # Another subject joins, whose sources are what the sidecars say; nothing is said twice.
    write_bids(folder, root, Entities("02"), versions=VERSIONS)
    T1 = files.read_json(root / "sub-02" / "anat" / "sub-02_T1map.json")
    assert T1["Sources"] == ["coefficients.nii.gz"]
    assert files.read_json(root / "dataset_description.json") == about
    lines = (root / ".bidsignore").read_text().splitlines()
    assert len(lines) == len(set(lines))


def test_codes_stay_whole_numbers_and_masks_are_regions(folder: Path) -> None:
    root = folder.parent / "derivatives"
    write_bids(folder, root, Entities("01"), versions=VERSIONS, sources=["bids:raw:sub-01/x"])
    anat = root / "sub-01" / "anat"
    status = nibabel.load(anat / "sub-01_statusmap.nii.gz")
    assert status.get_data_dtype() == np.uint8
    about = files.read_json(anat / "sub-01_statusmap.json")
    assert about["Levels"] == CODES and "Units" not in about
    assert about["Fisherprint"]["Kind"] == "status"
    for label, name, words in (
        ("WM", "white_matter", "white matter"),
        ("CSF", "csf", "csf"),
    ):
        mask = nibabel.load(anat / f"sub-01_label-{label}_mask.nii.gz")
        assert np.array_equal(mask.dataobj, nibabel.load(folder / f"{name}.nii.gz").dataobj)
        assert files.read_json(anat / f"sub-01_label-{label}_mask.json") == {
            "Description": f"voxels taken for {words}",
            "Type": "ROI",
            "Sources": ["bids:raw:sub-01/x"],
        }


def test_the_ratio_and_other_units_are_carried(folder: Path) -> None:
    files.state_maps(folder, {"m0s": "F", "B0": "Hz"})
    root = folder.parent / "derivatives"
    write_bids(folder, root, Entities("01"), versions=VERSIONS)
    anat = root / "sub-01" / "anat"
    assert files.read_json(anat / "sub-01_B0map.json")["Units"] == "Hz"
    assert files.read_json(anat / "sub-01_Fmap.json")["Description"] == "F, estimate"
    assert (anat / "sub-01_desc-std_Fmap.nii.gz").exists()
    assert not list(anat.glob("*m0smap*"))


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    root = folder.parent / "derivatives"
    write_bids(folder, root, Entities("01"), versions=VERSIONS)
    with pytest.raises(OutputExistsError, match=r"no images of sub-01 .*there is sub-01_"):
        write_bids(folder, root, Entities("01"), versions=VERSIONS)
    assert write_bids(folder, root, Entities("01"), versions=VERSIONS, force=True)
    files.write_json(root / "dataset_description.json", {"Name": "x", "BIDSVersion": "1.0"})
    with pytest.raises(OutputExistsError, match=r"a derivative data set.* is raw"):
        write_bids(folder, root, Entities("02"), versions=VERSIONS)
    assert not (root / "sub-02").exists()


def test_earlier_maps_of_the_same_scan_go_and_no_others(folder: Path) -> None:
    """Without error bars, new maps must not find those of others beside them."""
    root = folder.parent / "derivatives"
    other = write_bids(folder, root, Entities("01", acquisition="a"), versions=VERSIONS)
    write_bids(folder, root, Entities("01"), versions=VERSIONS)
    for stem in ("T1_std", "m0s_std", "residual", "csf"):
        for path in folder.glob(f"{stem}.*"):
            path.unlink()
    foreign = root / "sub-01" / "anat" / "sub-01_T1w.json"
    foreign.write_text("{}")
    new = write_bids(folder, root, Entities("01"), versions=VERSIONS, force=True)
    images = set((root / "sub-01").rglob("*.nii.gz"))
    assert images == {*new, *other}
    assert not any("desc-std_T1map" in path.name for path in new)
    sidecars = {path.name.replace(".nii.gz", ".json") for path in images}
    assert {path.name for path in root.rglob("sub-01_*.json")} == {*sidecars, foreign.name}


def test_other_units_and_folders_without_maps_are_refused(folder: Path) -> None:
    root = folder.parent / "derivatives"
    about = files.read_json(folder / "T1.json")
    files.write_json(folder / "T1.json", about | {"Unit": "ms"})
    with pytest.raises(ValueError, match="expected T1 in s, as a T1map is; got 'ms'"):
        write_bids(folder, root, Entities("01"), versions=VERSIONS)
    assert not root.exists()
    with pytest.raises(UnreadableFileError, match="expected a folder of maps"):
        write_bids(folder.parent, root, Entities("01"), versions=VERSIONS)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"subject": "sub-01"}, "letters and digits as the subject .*got 'sub-01'"),
        ({"subject": ""}, "as the subject"),
        ({"subject": "1", "session": "a_b"}, "as the session"),
        ({"subject": "1", "run": "a"}, "a number as the run"),
    ],
)
def test_labels_are_letters_and_digits(labels: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Entities(**labels)
