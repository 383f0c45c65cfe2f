"""`m4oe segment` with many cases: tables, events, resuming, the log, DICOM series and DICOM SEG."""

from __future__ import annotations

import csv
import errno
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import m4oe.predictor as predictor
import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from m4oe.__main__ import main
from m4oe.files import read_volume
from m4oe.labels import structure
from tiny import a_series, an_image, reports, saved

SPEC = replace(tiny.SPEC, structures=("liver", "kidney_left", "liver_tumor"))  # one with a side
Segment = Callable[..., int]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.a_model(tmp_path_factory.mktemp("models") / "tiny.safetensors", SPEC)


def a_table(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def events(capsys: Captured) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---- tables


def test_a_table_names_cases_experts_and_frames(segment: Segment, tmp_path: Path) -> None:
    saved(tmp_path / "in" / "time.nii.gz", sitk.JoinSeries([an_image(1), an_image()]))
    rows = [
        {"input": "in/time.nii.gz", "case": "Müller", "expert": "mr", "frame": "1"},
        {"input": "in/time.nii.gz", "case": "first", "expert": "", "frame": "0"},
    ]
    assert segment(a_table(tmp_path / "cases.csv", *rows)) == 0
    found = reports(tmp_path / "out")
    assert list(found) == ["Müller", "first"] and found["Müller"]["expert_weights"] == {"ct": 0, "mr": 1}
    assert segment(saved(tmp_path / "alone.nii.gz"), "--expert", "mr") == 0
    chosen, alone = (read_volume(tmp_path / "out" / f"{name}.seg.nrrd").array for name in ("Müller", "alone"))
    assert np.array_equal(chosen, alone)


def test_a_bad_row_of_a_table_stops_no_other(segment: Segment, tmp_path: Path) -> None:
    saved(tmp_path / "CT.mha")
    rows = [
        {"input": "gone.mha", "case": "gone"},
        {"input": "CT.mha", "case": "../CT"},
        {"input": "CT.mha", "case": "late", "frame": "-1"},
        {"input": "", "case": "blank"},
        {"input": "CT.mha", "case": "odd", "expert": "pet"},
        {"input": "CT.mha", "case": "good"},
    ]
    assert segment(a_table(tmp_path / "cases.csv", *rows)) == 1
    found = reports(tmp_path / "out")
    assert [name for name, entry in found.items() if "files" in entry] == ["good"]
    assert "no file or folder" in found["gone"]["error"] and "cannot name a file" in found["CT"]["error"]
    assert "expected a number from 0" in found["late"]["error"] and "input is empty" in found["blank"]["error"]
    assert "expert 'pet' is unknown" in found["odd"]["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"path,case\nCT.mha,a\n", "has the columns path, case; expected input"), (b"input\n\xff\n", "no table in UTF-8")],
)
def test_a_table_that_cannot_be_read_is_named(
    segment: Segment, tmp_path: Path, capsys: Captured, text: bytes, message: str
) -> None:
    (tmp_path / "cases.csv").write_bytes(text)
    assert segment(tmp_path / "cases.csv") == 1
    assert message in capsys.readouterr().err


def test_a_table_may_have_semicolons_and_a_byte_order_mark(segment: Segment, tmp_path: Path) -> None:
    saved(tmp_path / "CT.mha")
    (tmp_path / "cases.csv").write_text("input;case\nCT.mha;one, two\n", encoding="utf-8-sig")
    assert segment(tmp_path / "cases.csv") == 0
    assert list(reports(tmp_path / "out")) == ["one, two"]


def test_a_name_that_a_table_gives_twice_is_refused(segment: Segment, tmp_path: Path, capsys: Captured) -> None:
    rows = [{"input": str(saved(tmp_path / name)), "case": "same"} for name in ("a.mha", "b.mha")]
    assert segment(a_table(tmp_path / "cases.csv", *rows)) == 2
    assert "would be written as same" in capsys.readouterr().err


# ---- the device


def test_the_device_is_told_and_where_nobody_named_it_why_it_is_the_cpu(
    segment: Segment, model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "why_cpu", lambda: "torch finds no GPU")
    monkeypatch.setattr(predictor, "available_devices", lambda: ["cpu"])
    source, out = saved(tmp_path / "a.mha"), tmp_path / "out"
    assert segment(source) == 0
    assert main(["segment", str(source), "-o", str(out), "--model", str(model), "--device", "auto"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("device")]
    assert told == ["device: cpu", "device: cpu, as torch finds no GPU"]
    assert told[1] in (out / "log.txt").read_text(encoding="utf-8")


# ---- events


def test_json_tells_every_step_and_nothing_else(segment: Segment, tmp_path: Path, capsys: Captured) -> None:
    assert segment(saved(tmp_path / "a.mha"), tmp_path / "none.mha", "--json") == 1
    told = events(capsys)
    kinds = [event["event"] for event in told if event["event"] != "progress"]
    assert kinds == ["failed", "case", "done", "end"]
    failed, case, done, end = (event for event in told if event["event"] != "progress")
    assert failed["case"] == "none" and "no file or folder" in failed["error"]
    assert case == {"event": "case", "number": 1, "of": 1, "case": "a"}
    assert done["files"] == ["a.seg.nrrd"] and done["report"]["model"] == "tiny 1"
    assert end == {"event": "end", "done": 1, "failed": 1, "skipped": 0}
    shown = [event for event in told if event["event"] == "progress"]
    assert shown[-1] == {"event": "progress", "case": "a", "phase": "write", "fraction": 1.0}


# ---- resuming


def test_resume_does_only_what_is_missing(segment: Segment, tmp_path: Path, capsys: Captured) -> None:
    inputs = [saved(tmp_path / f"{name}.mha") for name in "abc"]
    segment(*inputs)
    (tmp_path / "out" / "b.seg.nrrd").unlink()
    capsys.readouterr()
    assert segment(*inputs, "--resume", "--json") == 0
    told = [(event["event"], event.get("case")) for event in events(capsys) if event["event"] != "progress"]
    assert told == [("skipped", "a"), ("case", "b"), ("done", "b"), ("skipped", "c"), ("end", None)]
    assert segment(*inputs, "--resume") == 0
    said = capsys.readouterr()
    assert said.out.startswith("0 done, 3 skipped, 0 failed") and "results were there already: 3 of 3\n" in said.err


@pytest.mark.parametrize("option", [("--expert", "mr"), ("--structures", "liver"), ("--format", "mha"), ("--preview",)])
def test_resume_does_again_what_was_asked_otherwise(
    segment: Segment, tmp_path: Path, capsys: Captured, option: tuple[str, ...]
) -> None:
    source = saved(tmp_path / "a.mha")
    segment(source)
    capsys.readouterr()
    assert segment(source, "--resume", *option) == 0
    assert "1 done, 0 skipped, 0 failed;" in capsys.readouterr().out


def test_resume_tries_again_what_failed(segment: Segment, tmp_path: Path) -> None:
    source = saved(tmp_path / "a.mha")
    data = source.read_bytes()
    source.write_bytes(data[:-9])
    assert segment(source, "--resume") == 1
    source.write_bytes(data)
    assert segment(source, "--resume") == 0 and "error" not in reports(tmp_path / "out")["a"]


# ---- faults and the log


def test_a_fault_of_ours_in_one_case_stops_no_other_and_is_in_the_log(
    segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = predictor.remove_islands
    steps = iter([lambda *given: {}["lost"], clean])
    monkeypatch.setattr(predictor, "remove_islands", lambda *given: next(steps)(*given))
    assert segment(*(saved(tmp_path / f"{name}.mha") for name in "ab")) == 1
    found = reports(tmp_path / "out")
    assert "unexpected KeyError: 'lost'" in found["a"]["error"] and "error" not in found["b"]
    lines = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* ", line) for line in lines)
    text = "\n".join(lines)
    assert "Traceback" in text and "1/2 a ..." in text and "1 done, 0 skipped, 1 failed" in text


def test_a_full_disk_is_not_blamed_on_the_input(
    segment: Segment, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nrrd.write", refuse)
    assert segment(saved(tmp_path / "a.nrrd")) == 1
    target = tmp_path / "out" / "a.seg.nrrd"
    assert f"m4oe: error: Cannot write {target}: the disk is full; make room" in capsys.readouterr().err


def test_the_log_of_a_later_run_comes_after_the_earlier(segment: Segment, tmp_path: Path) -> None:
    for name in "ab":
        segment(saved(tmp_path / f"{name}.mha"))
    text = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert text.index("1/1 a ...") < text.index("1/1 b ...")


# ---- DICOM


def test_one_file_stands_for_its_series_among_others(segment: Segment, tmp_path: Path) -> None:
    wanted = a_series(tmp_path / "mixed", "1.2.3", seed=0)
    a_series(tmp_path / "mixed", "1.2.4", seed=1)
    a_series(tmp_path / "alone", "1.2.3", seed=0)
    assert segment(wanted, tmp_path / "alone") == 0
    one, folder = (read_volume(tmp_path / "out" / f"{name}.seg.nrrd") for name in ("1.2.3-4", "alone"))
    assert one.array.shape == (8, 16, 20) and np.array_equal(one.array, folder.array)
    assert one.grid.is_close(folder.grid)


def test_dicom_seg_holds_the_same_voxels_names_and_codes(segment: Segment, tmp_path: Path) -> None:
    import highdicom

    source = a_series(tmp_path / "scan")
    assert segment(source.parent) == 0 and segment(source.parent, "--format", "dcm") == 0
    expected = read_volume(tmp_path / "out" / "scan.seg.nrrd").array
    seg = highdicom.seg.segread(tmp_path / "out" / "scan.dcm")
    images = [str(uid) for uid in (f"1.2.3.{index + 1}" for index in range(8))]
    found = seg.get_pixels_by_source_instance(
        images, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
    )
    present = [value for value in range(1, 4) if (expected == value).any()]
    assert seg.number_of_segments == len(present) > 1
    for number, value in enumerate(present, start=1):
        assert np.array_equal(found[..., number - 1] > 0, expected == value)
        about, entry = seg.get_segment_description(number), structure(SPEC.structures[value - 1])
        assert (about.segment_label, about.algorithm_type.value) == (entry.name, "AUTOMATIC")
        assert entry.type is not None and about.segmented_property_type.value == entry.type.value
        assert about.algorithm_identification.name == "tiny 1"
        modifiers = about.SegmentedPropertyTypeCodeSequence[0].get("SegmentedPropertyTypeModifierCodeSequence", [])
        assert [code.CodeValue for code in modifiers] == ([entry.type_modifier.value] if entry.type_modifier else [])
    assert seg.FrameOfReferenceUID == "1.2.9" and seg.PatientID == "7"


def test_dicom_seg_is_made_of_a_patient_whose_name_is_a_number(segment: Segment, tmp_path: Path) -> None:
    import pydicom

    for path in a_series(tmp_path / "scan").parent.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PatientName = "CRLM-CT-1004"
        dataset.save_as(path)
    assert segment(tmp_path / "scan", "--format", "dcm") == 0
    assert pydicom.dcmread(tmp_path / "out" / "scan.dcm").PatientName == "CRLM-CT-1004"


def test_dicom_seg_needs_dicom(segment: Segment, tmp_path: Path, capsys: Captured) -> None:
    assert segment(saved(tmp_path / "CT.mha"), "--format", "dcm") == 1
    assert "CT.mha is not DICOM" in capsys.readouterr().err


def test_dicom_seg_without_highdicom_says_what_to_install_before_any_case(
    segment: Segment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    assert segment(saved(tmp_path / "CT.mha"), "--format", "dcm") == 2
    said = capsys.readouterr().err
    assert "needs the package highdicom" in said and f"{sys.executable} -m pip install highdicom" in said
    assert not (tmp_path / "out").exists()


# ---- the guide


def test_the_lines_of_the_guide_segment_a_folder_and_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    guide = (Path(__file__).parents[2] / "Docs" / "user-guide.md").read_text(encoding="utf-8")
    (lines,) = (code for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "m4oe.__main__" in code)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m4oe-demo.safetensors").write_bytes(model.read_bytes())
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        saved(tmp_path / "FOLDER" / f"{name}.nii.gz", an_image(seed))
    codes: list[int] = []
    for _run in range(2):
        exec(lines, {"slicer": SimpleNamespace(util=SimpleNamespace(exit=codes.append))})
    made = {path.name for path in (tmp_path / "results").iterdir()}
    assert codes == [0, 0] and {"a.seg.nrrd", "a.png", "b.seg.nrrd", "b.png", "volumes.csv"} <= made
    assert "0 done, 2 skipped, 0 failed" in capsys.readouterr().out
