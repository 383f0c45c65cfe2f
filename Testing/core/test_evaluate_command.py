from __future__ import annotations

import csv
import html.parser
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.__main__ import main
from m4oe.dicom import write_dicom_seg
from m4oe.evaluation_files import case_name, pair_files
from m4oe.files import read_volume, write_segmentation
from m4oe.geometry import Grid, Volume
from tiny import a_series

KEYS = {1: "liver", 2: "spleen", 3: "gallbladder"}
GRID = Grid((6, 9, 10), np.diag([-2.0, -2.0, 3.0, 1.0]))
Command = Callable[..., int]


@pytest.fixture
def evaluate(tmp_path: Path) -> Command:
    """Runs `m4oe evaluate` on folders inside of tmp_path, into the folder "out"."""

    def run(predicted: str, truth: str, *options: Any) -> int:
        places = [str(tmp_path / predicted), str(tmp_path / truth)]
        return main(["evaluate", *places, "-o", str(tmp_path / "out"), *map(str, options)])

    return run


def organs(seed: int = 0) -> np.ndarray:
    """A liver, and a spleen whose place depends on the seed."""
    array = np.zeros(GRID.shape, np.uint8)
    array[1:5, 1:6, 1:5] = 1
    array[1:5, 1 + seed % 4 : 5 + seed % 4, 6:9] = 2
    return array


def named(path: Path, array: np.ndarray, grid: Grid = GRID) -> Path:
    """A file that says what its labels are."""
    write_segmentation(path, Volume(array, grid), KEYS, "test")
    return path


def nameless(path: Path, array: np.ndarray, grid: Grid = GRID) -> Path:
    """A file that does not."""
    named(path, np.minimum(array, 3), grid)
    path.with_name(path.name.replace(".nii.gz", ".csv")).unlink()
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "out" / "cases.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "summary.json").read_text(encoding="utf-8"))


def report(folder: Path) -> str:
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("m4oe: error: ") for line in lines if line.startswith("m4oe: error: ")]


# ---- what comes out


def test_two_files_are_compared_whatever_their_names(evaluate: Command, tmp_path: Path) -> None:
    named(tmp_path / "mine.seg.nrrd", organs(1))
    named(tmp_path / "theirs.nii.gz", organs(0))
    assert evaluate("mine.seg.nrrd", "theirs.nii.gz") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases.csv", "report.html", "summary.json"]
    [liver, spleen] = rows(tmp_path)
    assert (liver["case"], liver["structure"], liver["outcome"], liver["counted"]) == ("theirs", "liver", "both", "yes")
    assert [float(liver[name]) for name in ("dice", "nsd", "hd95_mm", "volume_error_ml")] == [1, 1, 0, 0]
    assert float(spleen["dice"]) == pytest.approx(0.75)
    assert summary(tmp_path)["models"][0]["structures"]["spleen"]["dice"]["mean"] == pytest.approx(0.75)


def test_a_folder_is_scored_in_processes_as_in_one(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        named(tmp_path / "pred" / f"case_{number}_0000.seg.nrrd", organs(number))
        named(tmp_path / "truth" / f"case_{number}.nii.gz", organs())
    assert evaluate("pred", "truth", "--jobs", 2) == 0
    table = capsys.readouterr().out
    assert "pred: 3 cases" in table and "Spleen" in table and "report: " in table
    parallel = rows(tmp_path)
    assert [row["case"] for row in parallel] == [f"case_{n}" for n in range(3) for _ in "ab"]
    assert evaluate("pred", "truth", "--jobs", 1) == 0
    assert rows(tmp_path) == parallel


def test_meanings_are_given_for_files_that_lack_them(evaluate: Command, tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_text(json.dumps({"liver": 1, "spleen": 2}))
    (tmp_path / "theirs.json").write_text(json.dumps({"2": "liver", "1": "spleen"}))
    nameless(tmp_path / "truth" / "a.nii.gz", organs())
    nameless(tmp_path / "pred" / "a.nii.gz", np.array([0, 2, 1], np.uint8)[organs()])
    assert evaluate("pred", "truth", "--labels", tmp_path / "ours.json") == 0
    assert {row["dice"] for row in rows(tmp_path)} == {"0"}
    options = ("--labels", tmp_path / "ours.json", "--predicted-labels", tmp_path / "theirs.json")
    assert evaluate("pred", "truth", *options) == 0
    assert {row["dice"] for row in rows(tmp_path)} == {"1"}


def test_structures_presets_and_tolerances_are_chosen(evaluate: Command, tmp_path: Path) -> None:
    named(tmp_path / "pred.seg.nrrd", organs(1))
    named(tmp_path / "truth.seg.nrrd", organs())
    options = ("--structures", "gallbladder,spleen", "--preset", "flare", "--tolerance", "4, spleen=0.5")
    assert evaluate("pred.seg.nrrd", "truth.seg.nrrd", *options) == 0
    spleen, gallbladder = rows(tmp_path)
    assert (spleen["structure"], spleen["nsd_tolerance_mm"]) == ("spleen", "0.5")
    assert (gallbladder["outcome"], gallbladder["counted"], gallbladder["dice"]) == ("absent", "yes", "1")
    assert gallbladder["nsd_tolerance_mm"] == "4" and gallbladder["hd95_mm"] == ""
    assert summary(tmp_path)["preset"] == "flare" and "FLARE22 rules" in report(tmp_path)


def test_where_no_truth_lists_tumours_they_count_as_the_organ(evaluate: Command, tmp_path: Path) -> None:
    found, keys = organs(), {1: "liver", 2: "spleen", 4: "liver_tumor"}
    found[2:4, 2:4, 2:4] = 4
    for name, array in (("pred", found), ("truth", organs()), ("other", found)):
        write_segmentation(tmp_path / f"{name}.seg.nrrd", Volume(array, GRID), keys, "test")
    assert evaluate("pred.seg.nrrd", "truth.seg.nrrd") == 0
    assert [(row["structure"], row["dice"]) for row in rows(tmp_path)] == [("liver", "1"), ("spleen", "1")]
    assert evaluate("pred.seg.nrrd", "other.seg.nrrd", "--structures", "liver") == 0  # which lists them
    assert [row["dice"] for row in rows(tmp_path)] == ["1"]


def test_a_structure_that_one_truth_lists_is_scored_in_all(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallstone, colon = organs(), organs()
    gallstone[0, 0, 0], colon[0, 0, 0] = 3, 3
    named(tmp_path / "truth" / "a.seg.nrrd", organs())
    named(tmp_path / "pred" / "a.seg.nrrd", gallstone)
    assert evaluate("pred", "truth", "--jobs", 1) == 0
    assert "predicted, but not scored by itself as no truth lists it: gallbladder" in capsys.readouterr().err
    assert [row["structure"] for row in rows(tmp_path)] == ["liver", "spleen"]
    named(tmp_path / "truth" / "b.seg.nrrd", gallstone)
    named(tmp_path / "pred" / "b.seg.nrrd", organs())
    assert evaluate("pred", "truth", "--jobs", 1) == 0
    outcomes = {(row["case"], row["structure"]): row["outcome"] for row in rows(tmp_path)}
    assert outcomes["a", "gallbladder"] == "false positive" and outcomes["b", "gallbladder"] == "missed"


def test_a_result_in_which_nothing_was_found_counts_as_missed(evaluate: Command, tmp_path: Path) -> None:
    named(tmp_path / "pred.seg.nrrd", np.zeros(GRID.shape, np.uint8))
    named(tmp_path / "truth.seg.nrrd", organs())
    assert evaluate("pred.seg.nrrd", "truth.seg.nrrd") == 0
    assert {(row["outcome"], row["dice"], row["hd95_mm"]) for row in rows(tmp_path)} == {("missed", "0", "")}


def test_a_segmentation_that_slicer_cropped_is_scored_whole(evaluate: Command, tmp_path: Path) -> None:
    affine = np.array(GRID.affine)
    affine[:3, 3] = (GRID.affine @ (1, 1, 1, 1))[:3]
    part = organs()[1:5, 1:6, 1:9]
    named(tmp_path / "truth.seg.nrrd", part, Grid(part.shape, affine))
    named(tmp_path / "pred.nii.gz", organs())
    assert evaluate("pred.nii.gz", "truth.seg.nrrd") == 0
    assert {row["dice"] for row in rows(tmp_path)} == {"1"}
    assert evaluate("truth.seg.nrrd", "pred.nii.gz") == 0


def test_two_models_are_compared(evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(7):
        named(tmp_path / "truth" / f"{number}.nii.gz", organs())
        named(tmp_path / "a" / f"{number}.seg.nrrd", organs())
        named(tmp_path / "b" / f"{number}.seg.nrrd", organs(1 + number % 3))
    assert evaluate("a", "truth", "--compare", tmp_path / "b", "--jobs", 1) == 0
    spleen = summary(tmp_path)["comparison"]["dice"]["structures"]["spleen"]
    assert spleen["n"] == 7 and spleen["p"] == pytest.approx(2 / 2**7) and spleen["mean_difference"] > 0.2
    assert {row["model"] for row in rows(tmp_path)} == {"a", "b"}
    assert "Filled: a. Dashed: b." in report(tmp_path)
    out = capsys.readouterr().out
    assert "a: 7 cases" in out and "b: 7 cases" in out


class Page(html.parser.HTMLParser):
    """Collects what a browser would have to fetch, and checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_is_one_sound_page_with_box_plots(evaluate: Command, tmp_path: Path) -> None:
    for number in range(6):
        named(tmp_path / "truth" / f"{number} <b> & co.nii.gz", organs())
        named(tmp_path / "pred" / f"{number} <b> & co.seg.nrrd", organs(number))
    assert evaluate("pred", "truth", "--jobs", 1) == 0
    text = report(tmp_path)
    page = Page(text)
    assert page.open == [] and page.outside == [] and "<b>" not in text and "url(" not in text
    plots = [f"<svg{part.split('</svg>')[0]}</svg>" for part in text.split("<svg")[1:]]
    assert len(plots) == 4
    for plot in plots:
        root = ET.fromstring(plot)
        assert len(root.findall("rect")) == 2  # liver and spleen
        places = [float(dot.get("cx", "nan")) for dot in root.findall("circle")]
        assert len(places) == 12 and all(150 <= place <= 604 for place in places)
    dice = ET.fromstring(plots[0])
    spleens = {circle.findtext("title"): float(circle.get("cx", "nan")) for circle in dice.findall("circle")[6:]}
    assert spleens["0 <b> & co: 1"] == pytest.approx(604) and spleens["1 <b> & co: 0.75"] < 604


@pytest.mark.parametrize("tilt", [0.0, 0.3])
def test_dicom_seg_is_scored_as_what_it_was_made_of(evaluate: Command, tmp_path: Path, tilt: float) -> None:
    import pydicom

    across, down = np.cos(tilt), np.sin(tilt)
    turn = [f"{value:.8f}" for value in (across, down, 0, -down, across, 0)]
    for file in a_series(tmp_path / "scan").parent.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.ImageOrientationPatient, dataset.SpacingBetweenSlices = turn, 2
        dataset.save_as(file)
    grid = read_volume(tmp_path / "scan").grid
    array = np.zeros(grid.shape, np.uint8)
    array[2:6, 3:9, 2:7], array[3:5, 3:9, 9:15] = 1, 3
    truth = named(tmp_path / "truth" / "scan.nii.gz", np.roll(array, 1, 2), grid)
    for form in ("seg", "dcm"):
        (tmp_path / form).mkdir()
    named(tmp_path / "seg" / "scan.seg.nrrd", array, grid)
    write_dicom_seg(tmp_path / "dcm" / "scan.dcm", Volume(array, grid), KEYS, "test", "1", tmp_path / "scan")
    assert evaluate("seg", truth.parent.name) == 0
    expected = [row | {"model": ""} for row in rows(tmp_path)]
    assert evaluate("dcm", truth.parent.name) == 0
    assert [row | {"model": ""} for row in rows(tmp_path)] == expected
    assert {row["structure"] for row in expected} == {"liver", "gallbladder"}
    assert all(0 < float(row["dice"]) < 1 for row in expected)


def test_a_dicom_image_is_no_segmentation(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = a_series(tmp_path / "scan")
    named(tmp_path / "truth.nii.gz", organs())
    assert evaluate(f"scan/{image.name}", "truth.nii.gz") == 1
    assert f"Cannot read {image} as DICOM SEG" in errors(capsys)[0]


# ---- what goes wrong


def test_a_bad_case_is_named_and_stops_no_other(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bad", "good", "shifted", "nameless"):
        named(tmp_path / "truth" / f"{name}.nii.gz", organs())
        named(tmp_path / "pred" / f"{name}.nii.gz", organs())
    (tmp_path / "pred" / "bad.nii.gz").write_bytes(b"not a volume")
    named(tmp_path / "pred" / "shifted.nii.gz", organs(), GRID.to_axes("RAS"))
    (tmp_path / "pred" / "nameless.csv").unlink()
    named(tmp_path / "truth" / "alone.nii.gz", organs())
    named(tmp_path / "pred" / "unasked.nii.gz", organs())
    assert evaluate("pred", "truth", "--jobs", 1) == 1
    output = capsys.readouterr()
    lines = [line.removeprefix("m4oe: error: pred: ") for line in output.err.splitlines() if "error" in line]
    assert [line.split(":")[0] for line in lines] == ["alone", "bad", "nameless"]
    assert "has no prediction in" in lines[0] and "Cannot read" in lines[1] and "--labels 1=liver,2=spleen" in lines[2]
    assert "m4oe: warning: pred: no truth in" in output.err and "unasked.nii.gz" in output.err
    assert {row["case"] for row in rows(tmp_path)} == {"good", "shifted"}
    assert list(summary(tmp_path)["models"][0]["problems"]) == ["alone", "bad", "nameless"]
    assert "Cases without scores, which enter nothing below: 3." in report(tmp_path)


def test_maps_on_different_grids_are_named_with_both_grids(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named(tmp_path / "pred.nii.gz", organs(), Grid(GRID.shape, np.diag([-2.0, -2.0, 2.5, 1.0])))
    named(tmp_path / "truth.nii.gz", organs())
    assert evaluate("pred.nii.gz", "truth.nii.gz") == 1
    first, second = errors(capsys)
    assert "pred.nii.gz" in first and "2 x 2 x 2.5 mm" in first and "2 x 2 x 3 mm" in first
    assert "nothing in" in second and not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--structures", "livre"], "There is no structure 'livre', expected a key such as liver"),
        (["--tolerance", "much"], "--tolerance much is not understood, expected a number of mm such as 3 or liver=5"),
        (["--tolerance", "liver=-1"], "--tolerance liver=-1 is not understood"),
        (["--tolerance", "livre=1"], "There is no structure 'livre'"),
        (["--labels", "none.json"], "none.json cannot be read"),
        (["--compare", "nowhere"], "There is no file or folder nowhere."),
    ],
)
def test_what_cannot_be_carried_out_writes_nothing(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    named(tmp_path / "pred.nii.gz", organs())
    named(tmp_path / "truth" / "pred.nii.gz", organs())
    assert evaluate("pred.nii.gz", "truth", *options) == 2
    [error] = errors(capsys)
    assert message in error and not (tmp_path / "out").exists()


def test_a_file_that_finds_no_partner_is_told_how_to_name_it_and_leaves_no_folder(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named(tmp_path / "pred" / "scan.nii.gz", organs())
    truth = named(tmp_path / "scan_by_me.nii.gz", organs())
    assert evaluate("pred", truth.name) == 1
    assert "expected scan_by_me.seg.nrrd, scan_by_me_label.nii.gz or the like; rename it, or give" in errors(capsys)[0]
    assert not (tmp_path / "out").exists()
    assert evaluate("pred/scan.nii.gz", truth.name) == 0
    truth.rename(tmp_path / "scan_label.nii.gz")
    truth.with_name("scan_by_me.csv").rename(tmp_path / "scan_label.csv")
    assert evaluate("pred", "scan_label.nii.gz") == 0


def test_an_empty_folder_for_the_results_stays(evaluate: Command, tmp_path: Path) -> None:
    named(tmp_path / "pred" / "a.nii.gz", organs())
    named(tmp_path / "b.nii.gz", organs())
    (tmp_path / "out").mkdir()
    assert evaluate("pred", "b.nii.gz") == 1 and (tmp_path / "out").is_dir()


def test_a_folder_without_label_maps_is_refused(
    evaluate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named(tmp_path / "truth" / "a.nii.gz", organs())
    (tmp_path / "pred").mkdir()
    assert evaluate("pred", "truth") == 2
    assert "No label map in" in errors(capsys)[0]


# ---- which file belongs to which


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("CASE.seg.nrrd", "CASE"),
        ("CASE.nii.gz", "CASE"),
        ("CASE_label.nii.gz", "CASE"),
        ("CASE-Segmentation.nrrd", "CASE"),
        ("FLARE22_Tr_0001_0000.seg.nrrd", "FLARE22_Tr_0001"),
        ("FLARE22_Tr_0001.nii.gz", "FLARE22_Tr_0001"),
        ("im7.seg.nrrd", "7"),
        ("lb7.nii.gz", "7"),
        ("img0001.seg.nrrd", "0001"),
        ("label0001.nii.gz", "0001"),
        ("phantom_ct_truth.seg.nrrd", "phantom_ct"),
        ("liver_0.nii.gz", "liver_0"),
        ("imaging.nii.gz", "imaging"),
        ("labels.nii.gz", "labels"),
        ("amos_0000.nii.gz", "amos"),
    ],
)
def test_a_case_has_the_name_of_its_file_without_marks(name: str, case: str) -> None:
    assert case_name(Path(name)) == case


def touched(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_files_are_paired_by_case_and_the_others_are_named(tmp_path: Path) -> None:
    predicted = touched(tmp_path / "p", "a.seg.nrrd", "b.nii.gz", "b.csv", "d.mha", ".e.mha", "volumes.json")
    truth = touched(tmp_path / "t", "a_label.nii.gz", "a.nii.gz", "b.nii.gz", "b.nii", "c.nii.gz", "e.mha")
    pairs = pair_files(predicted, truth)
    assert pairs.cases == {"a": (predicted / "a.seg.nrrd", truth / "a_label.nii.gz")}
    assert set(pairs.problems) == {"b", "c", "e"}
    assert all(name in pairs.problems["b"] for name in ("b.nii.gz", "b.nii,", "keep one")), pairs.problems["b"]
    assert "c.nii.gz has no prediction in" in pairs.problems["c"]
    assert pairs.notes == [
        f"taken for images of the label maps beside them in {truth}: a.nii.gz",
        f"no truth in {truth} for {predicted / 'd.mha'}",
    ]


def test_a_single_prediction_does_not_miss_the_other_truths(tmp_path: Path) -> None:
    predicted = touched(tmp_path / "p", "a.seg.nrrd") / "a.seg.nrrd"
    truth = touched(tmp_path / "t", "a.nii.gz", "b.nii.gz")
    pairs = pair_files(predicted, truth)
    assert (set(pairs.cases), pairs.problems, pairs.notes) == ({"a"}, {}, [])


def test_the_labels_of_real_mr_volumes_are_found_among_their_images(
    evaluate: Command, shared_data: Path, tmp_path: Path
) -> None:
    truth = shared_data / "mr_nc"
    for name in ("chaos_t2_01", "chaos_t2_39"):
        image = sitk.Cast(sitk.ReadImage(str(truth / f"{name}_label.nii.gz")), sitk.sitkUInt8)
        (tmp_path / "pred").mkdir(exist_ok=True)
        sitk.WriteImage(sitk.DICOMOrient(image, "RIP"), str(tmp_path / "pred" / f"{name}.nrrd"))
    pairs = pair_files(tmp_path / "pred", truth)
    assert set(pairs.cases) == {"chaos_t2_01", "chaos_t2_39"} and len(pairs.problems) == 16
    (tmp_path / "chaos.json").write_text('{"liver": 1, "kidney_right": 2, "kidney_left": 3, "spleen": 4}')
    single = (str(tmp_path / "pred" / "chaos_t2_39.nrrd"), str(truth / "chaos_t2_39_label.nii.gz"))
    assert evaluate(*single, "--labels", tmp_path / "chaos.json") == 0
    assert [(row["structure"], row["dice"]) for row in rows(tmp_path)] == [
        ("liver", "1"), ("kidney_right", "1"), ("spleen", "1"), ("kidney_left", "1")
    ]  # fmt: skip
