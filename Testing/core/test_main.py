from __future__ import annotations

import csv
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import m4oe
import m4oe.predictor as predictor
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.__main__ import main
from m4oe.files import read_volume
from m4oe.geometry import Grid, Volume
from m4oe.package import save_model
from m4oe.segment_command import Voice
from m4oe.segment_command import _record as record
from m4oe.spec import FORMAT_VERSION, read_spec
from m4oe.terminal import score_table
from m4oe.training import phantom as phantoms
from tiny import SPEC, a_network, a_series, an_image, reports, saved

Command = Callable[..., int]
Captured = pytest.CaptureFixture[str]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "volumes.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def the_error(capsys: Captured) -> str:
    """The one error on stderr."""
    return the_error_in(capsys.readouterr().err)


def check_error(capsys: Captured, *parts: object) -> None:
    error = the_error(capsys)
    assert all(str(part) in error for part in parts), error


def the_error_in(text: str) -> str:
    """The one error among limits, device, progress and warnings, and nothing else."""
    usual = re.compile(r"tiny 1: Knows nothing\.|device: cpu.*|\d+/\d+ .* \.\.\.|skipped .*|m4oe: warning: .*")
    errors = [line for line in text.splitlines() if not usual.fullmatch(line)]
    assert len(errors) == 1 and errors[0].startswith("m4oe: error: "), text
    return errors[0].removeprefix("m4oe: error: ")


# ---- what comes out


def test_a_result_lies_on_the_grid_of_its_input(segment: Command, tmp_path: Path) -> None:
    source = saved(tmp_path / "CT.nii.gz")
    assert segment(source) == 0
    labels, volume = read_volume(tmp_path / "out" / "CT.seg.nrrd"), read_volume(source)
    assert labels.grid.is_close(volume.grid) and labels.array.any()
    assert names(tmp_path / "out") == ["CT.seg.nrrd", "log.txt", "volumes.csv", "volumes.json"]


def test_the_tables_hold_the_volumes_of_the_labels(segment: Command, tmp_path: Path) -> None:
    segment(saved(tmp_path / "CT.nii.gz"))
    labels = read_volume(tmp_path / "out" / "CT.seg.nrrd")
    counts = np.bincount(labels.array.ravel(), minlength=4)[1:] * 1.5 * 1.5 * 2 / 1000
    expected = dict(zip(SPEC.structures, counts, strict=True))
    table = {row["structure"]: float(row["volume_ml"]) for row in rows(tmp_path / "out")}
    assert table == pytest.approx(expected, abs=0.005)
    report = reports(tmp_path / "out")["CT"]
    assert report["volumes_ml"] == pytest.approx(expected) and report["model"] == "tiny 1"


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd", "mha"])
def test_every_format_holds_the_same_labels(segment: Command, tmp_path: Path, suffix: str) -> None:
    source = saved(tmp_path / "CT.nii.gz")
    assert segment(source) == 0
    expected = read_volume(tmp_path / "out" / "CT.seg.nrrd")
    assert segment(source, "--format", suffix) == 0
    labels = read_volume(tmp_path / "out" / f"CT.{suffix}")
    assert np.array_equal(labels.array, expected.array) and labels.grid.is_close(expected.grid)
    assert "CT.csv" in names(tmp_path / "out")


def test_a_preview_is_a_picture(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "CT.nii.gz"), "--preview") == 0
    assert (tmp_path / "out" / "CT.png").read_bytes().startswith(b"\x89PNG")


def test_a_preview_that_fails_loses_neither_result_nor_volumes(
    segment: Command, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "out" / "CT.png").mkdir(parents=True)
    assert segment(saved(tmp_path / "CT.nii.gz"), "--preview") == 0
    warning = "m4oe: warning: CT: the result is written, its picture is not: Cannot write"
    assert warning in capsys.readouterr().err
    assert names(tmp_path / "out") == ["CT.png", "CT.seg.nrrd", "log.txt", "volumes.csv", "volumes.json"]
    report, table = reports(tmp_path / "out")["CT"], rows(tmp_path / "out")
    assert "error" not in report and len(table) == len(report["volumes_ml"]) > 0


def test_files_folders_and_dicom_are_segmented_together(segment: Command, tmp_path: Path) -> None:
    saved(tmp_path / "many" / "b.mha")
    saved(tmp_path / "many" / "a.nrrd")
    series = a_series(tmp_path / "1.2.840.113").parent
    single = saved(tmp_path / "patient.007.nii.gz")
    assert segment(single, tmp_path / "many", series, single) == 0
    found = [name for name in names(tmp_path / "out") if name.endswith(".seg.nrrd")]
    assert found == [f"{name}.seg.nrrd" for name in ("1.2.840.113", "a", "b", "patient.007")]


def test_inputs_of_one_name_are_told_apart_by_their_folders(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "x" / "CT.nii.gz"), saved(tmp_path / "y" / "CT.nii.gz")) == 0
    assert {row["case"] for row in rows(tmp_path / "out")} == {"x_CT", "y_CT"}
    same_folder = [saved(tmp_path / "x" / "CT.mha"), tmp_path / "x" / "CT.nii.gz", saved(tmp_path / "x_CT.nrrd")]
    assert segment(*same_folder) == 0
    added = {f"{tmp_path.name}_x_CT_nrrd", "x_CT_mha", "x_CT_nii_gz"}
    assert {row["case"] for row in rows(tmp_path / "out")} == {"x_CT", "y_CT"} | added


def test_inputs_that_would_share_a_file_are_refused(segment: Command, tmp_path: Path, capsys: Captured) -> None:
    assert segment(saved(tmp_path / "x" / "a" / "CT.mha"), saved(tmp_path / "y" / "a" / "CT.mha")) == 2
    assert "would be written as a_CT_mha" in the_error(capsys)


def test_a_colour_table_does_not_take_the_name_of_the_volumes(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "in" / "volumes.nrrd"), "--format", "mha") == 0
    assert names(tmp_path / "out") == ["in_volumes.csv", "in_volumes.mha", "log.txt", "volumes.csv", "volumes.json"]


def test_paths_may_have_spaces_and_any_letters(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "Bäuche 腹 o" / "Müller, J. 1.nii.gz")) == 0
    assert "Müller, J. 1.seg.nrrd" in names(tmp_path / "out")
    assert {row["case"] for row in rows(tmp_path / "out")} == {"Müller, J. 1"}


def test_only_the_wanted_structures_and_the_named_expert_are_used(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "CT.nii.gz"), "--expert", "mr", "--structures", "Spleen") == 0
    assert {row["structure"] for row in rows(tmp_path / "out")} == {"spleen"}
    report = reports(tmp_path / "out")["CT"]
    assert report["expert_weights"] == {"ct": 0, "mr": 1}


def test_a_chosen_frame_of_a_4d_volume_is_segmented(segment: Command, tmp_path: Path) -> None:
    image = an_image()
    source = saved(tmp_path / "time.nii.gz", sitk.JoinSeries([image * 0, image]))
    assert segment(source, "--frame", "1") == segment(saved(tmp_path / "CT.nii.gz", image)) == 0
    chosen, alone = (read_volume(tmp_path / "out" / f"{name}.seg.nrrd").array for name in ("time", "CT"))
    assert np.array_equal(chosen, alone)


def test_a_frame_is_chosen_in_4d_volumes_and_3d_ones_have_but_one(segment: Command, tmp_path: Path) -> None:
    saved(tmp_path / "in" / "time.nrrd", sitk.JoinSeries([an_image()] * 3))
    saved(tmp_path / "in" / "CT.nrrd")
    a_series(tmp_path / "in" / "scan")
    assert segment(tmp_path / "in", "--frame", "2") == 0
    said = {case: "there is no frame 2" in str(entry["warnings"]) for case, entry in reports(tmp_path / "out").items()}
    assert said == {"CT": True, "scan": True, "time": False}


@pytest.mark.parametrize(("frame", "warned"), [("-1", True), ("0", False)])
def test_a_frame_that_a_volume_has_not_is_told(
    segment: Command, tmp_path: Path, capsys: Captured, frame: str, warned: bool
) -> None:
    assert segment(saved(tmp_path / "CT.nii.gz"), f"--frame={frame}") == 0
    assert (f"It has one frame, which was taken; there is no frame {frame}." in capsys.readouterr().err) is warned


def test_a_later_run_keeps_the_rows_of_the_earlier_one(segment: Command, tmp_path: Path) -> None:
    assert segment(saved(tmp_path / "a.nrrd")) == segment(saved(tmp_path / "b.nrrd")) == 0
    assert {row["case"] for row in rows(tmp_path / "out")} == {"a", "b"}
    assert segment(tmp_path / "a.nrrd", "--structures", "spleen") == 0
    assert {row["structure"] for row in rows(tmp_path / "out") if row["case"] == "a"} == {"spleen"}


def test_runs_at_the_same_time_lose_no_row(segment: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run begins and ends while the first one writes its labels."""
    write = nrrd.write

    def segment_another(*given: Any, **options: Any) -> None:
        monkeypatch.setattr(nrrd, "write", write)
        assert segment(saved(tmp_path / "b.mha")) == 0
        write(*given, **options)

    monkeypatch.setattr(nrrd, "write", segment_another)
    assert segment(saved(tmp_path / "a.mha")) == 0
    assert set(reports(tmp_path / "out")) == {row["case"] for row in rows(tmp_path / "out")} == {"a", "b"}


def test_many_writers_of_the_tables_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: record(tmp_path, str(number), {"error": "failed"}, Voice()), range(40)))
    assert set(reports(tmp_path)) == {row["case"] for row in rows(tmp_path)} == {str(number) for number in range(40)}


def test_what_failed_and_what_was_not_found_are_in_the_tables(
    segment: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(predictor, "remove_islands", lambda labels, *given: {})
    inputs = [truncated(tmp_path / "bad.nrrd"), saved(tmp_path / "dark.mha"), tmp_path / "none.nii.gz"]
    assert segment(*inputs) == 1
    assert "1 done, 0 skipped, 2 failed; results are in" in capsys.readouterr().out
    entries = reports(tmp_path / "out")
    assert entries["dark"]["volumes_ml"] == dict.fromkeys(SPEC.structures, 0) and "error" not in entries["dark"]
    assert entries["bad"].keys() == entries["none"].keys() == {"input", "error"}
    assert [entries[name]["input"] for name in ("bad", "none")] == [str(inputs[0]), str(inputs[2])]
    dark = [row for row in rows(tmp_path / "out") if row["case"] == "dark"]
    assert [row["volume_ml"] for row in dark] == ["0.00"] * 3
    assert all("nothing was found" in row["case_note"] and row["note"] == "not found" for row in dark)
    others = [row for row in rows(tmp_path / "out") if row["case"] != "dark"]
    notes = {row["case"]: row["note"] for row in others}
    assert notes == {"bad": entries["bad"]["error"], "none": f"There is no file or folder {inputs[2]}."}
    assert all(row["structure"] == row["volume_ml"] == "" for row in others)


def test_a_failure_leaves_what_an_earlier_run_found_and_a_success_ends_the_failure(
    segment: Command, tmp_path: Path
) -> None:
    source = saved(tmp_path / "CT.mha")
    data = source.read_bytes()
    segment(source)
    first = reports(tmp_path / "out")["CT"]
    source.write_bytes(data[:-9])
    assert segment(source) == 1
    failed = reports(tmp_path / "out")["CT"]
    assert failed == first | {"error": failed["error"]} and rows(tmp_path / "out")[-1]["note"] == failed["error"]
    source.write_bytes(data)
    assert segment(source) == 0
    assert "error" not in reports(tmp_path / "out")["CT"]
    flags, found = first["flags"], first["volumes_ml"].items()
    expected = ["; ".join(flags.get(key, ())) if volume else "not found" for key, volume in found]
    assert [row["note"] for row in rows(tmp_path / "out")] == expected
    assert first["warnings"] and {row["case_note"] for row in rows(tmp_path / "out")} == {"; ".join(first["warnings"])}


def test_a_new_result_takes_the_place_of_the_earlier_one_and_says_so(
    segment: Command, tmp_path: Path, capsys: Captured
) -> None:
    segment(saved(tmp_path / "a" / "CT.mha"))
    capsys.readouterr()
    segment(saved(tmp_path / "b" / "CT.mha"), "--format", "nii.gz")
    said = capsys.readouterr().err
    assert f"CT: replaces the earlier result of {tmp_path / 'a' / 'CT.mha'}" in said
    assert f"CT: CT.seg.nrrd in {tmp_path / 'out'} may be of an earlier run" in said
    assert {(row["expert"], row["model"]) for row in rows(tmp_path / "out")} == {("ct", "tiny 1")}


def test_a_table_of_somebody_else_is_not_overwritten(segment: Command, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.csv").write_text("patient,age\n")
    assert segment(saved(tmp_path / "CT.mha")) == 2
    assert "volumes.csv is not what m4oe writes" in the_error(capsys)
    assert (tmp_path / "out" / "volumes.csv").read_text() == "patient,age\n"


def test_a_case_is_named_after_a_link_and_not_its_target(segment: Command, tmp_path: Path) -> None:
    saved(tmp_path / "store" / "d41d8cd9.mha")
    (tmp_path / "sub-01.mha").symlink_to(tmp_path / "store" / "d41d8cd9.mha")
    assert segment(tmp_path / "sub-01.mha") == 0
    assert (tmp_path / "out" / "sub-01.seg.nrrd").exists()


def test_where_nothing_was_written_no_results_are_announced(segment: Command, tmp_path: Path, capsys: Captured) -> None:
    assert segment(truncated(tmp_path / "bad.mha")) == 1
    assert capsys.readouterr().out == "0 done, 0 skipped, 1 failed\n"


def a_label_map(path: Path) -> Path:
    array = np.zeros((8, 16, 20), np.uint8)
    array[2:6, 3:12, 4:15] = 1
    array[3:5, 5:9, 10:18] = 2
    return saved(path, sitk.GetImageFromArray(array))


def test_label_maps_in_a_folder_are_skipped_and_named(segment: Command, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "in"
    saved(folder / "CT.mha")
    labels = [a_label_map(folder / name) for name in ("CT_label.nii.gz", "atlas.nrrd")]
    assert segment(folder) == 0
    output, errors = capsys.readouterr()
    assert set(reports(tmp_path / "out")) == {"CT"} and "1 done, 2 skipped, 0 failed; results" in output
    assert all(f"skipped {path}: it is a label map; name the file itself" in errors for path in labels)
    assert segment(folder, *labels) == 0
    errors = capsys.readouterr().err
    assert "skipped" not in errors and set(reports(tmp_path / "out")) == {"CT", "CT_label", "atlas"}
    assert all(f"warning: {name}: It seems to be a label map, not" in errors for name in ("CT_label", "atlas"))


def test_a_label_map_that_is_named_with_its_image_is_skipped(
    segment: Command, tmp_path: Path, capsys: Captured
) -> None:
    files = [saved(tmp_path / "CT.mha"), a_label_map(tmp_path / "CT_label.nii.gz")]
    assert segment(*files) == 0
    assert f"skipped {files[1]}: it is a label map; name it without CT.mha" in capsys.readouterr().err
    assert set(reports(tmp_path / "out")) == {"CT"}


def test_a_folder_of_label_maps_is_nothing_to_segment(segment: Command, tmp_path: Path, capsys: Captured) -> None:
    a_label_map(tmp_path / "in" / "atlas.nrrd")
    assert segment(tmp_path / "in") == 1
    assert capsys.readouterr().out == "0 done, 1 skipped, 0 failed\n"


def test_an_old_table_without_notes_is_taken_over(segment: Command, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.json").write_text('{"old": {"volumes_ml": {"liver": 1500.0}}}')
    segment(saved(tmp_path / "CT.mha"))
    expected = {"case": "old", "structure": "liver", "name": "Liver", "volume_ml": "1500.00"}
    assert rows(tmp_path / "out")[0] == expected | {"expert": "", "model": "", "note": "", "case_note": ""}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": {"weight": 70}}', '{"a": {"volumes_ml": {"heart of gold": 1}}}'])
def test_a_table_of_somebody_else_is_left_alone(segment: Command, tmp_path: Path, text: str, capsys: Captured) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.json").write_text(text)
    assert segment(saved(tmp_path / "CT.nii.gz")) == 2
    assert "volumes.json is not what m4oe writes" in the_error(capsys)
    assert names(tmp_path / "out") == ["volumes.json"] and (tmp_path / "out" / "volumes.json").read_text() == text


# ---- bad inputs


def nothing(path: Path) -> Path:
    return path


def empty(path: Path) -> Path:
    path.touch()
    return path


def truncated(path: Path) -> Path:
    data = saved(path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def text_file(path: Path) -> Path:
    path.write_text("Dear colleague, thank you for the images.\n" * 100)
    return path


def four_frames(path: Path) -> Path:
    return saved(path, sitk.JoinSeries([an_image()] * 4))


def zero_spacing(path: Path) -> Path:
    data = bytearray(saved(path).read_bytes())
    data[80:84] = struct.pack("<f", 0)
    path.write_bytes(data)
    return path


def colours(path: Path) -> Path:
    return saved(path, sitk.Compose([sitk.Cast(an_image(), sitk.sitkUInt8)] * 3))


def huge(path: Path) -> Path:
    data = bytearray(saved(path).read_bytes())
    data[42:48] = struct.pack("<3h", 32767, 32767, 32767)
    path.write_bytes(data)
    return path


def far_offset(path: Path) -> Path:
    data = bytearray(saved(path).read_bytes())
    data[108:112] = struct.pack("<f", float("inf"))
    path.write_bytes(data)
    return path


def no_images(path: Path) -> Path:
    path.mkdir()
    (path / "notes.txt").touch()
    return path


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (nothing, "bad.nii.gz", "no file or folder"),
        (empty, "bad.nii.gz", "empty"),
        (truncated, "bad.nii.gz", "damaged or incomplete"),
        (truncated, "bad.nii", "bytes of voxels, expected"),
        (truncated, "bad.nrrd", "damaged, incomplete"),
        (truncated, "bad.mha", "bytes of voxels, expected"),
        (text_file, "bad.nii.gz", "not a NIfTI"),
        (text_file, "bad.nrrd", "damaged, incomplete or not what its name says"),
        (text_file, "bad.dcm", "damaged, incomplete or not what its name says"),
        (text_file, "bad.txt", "kind is unknown, expected DICOM or .nii.gz"),
        (four_frames, "bad.nii.gz", "4 frames, choose one of 0 to 3, by --frame N"),
        (four_frames, "bad.nrrd", "4 frames, choose one of 0 to 3, by --frame N"),
        (zero_spacing, "bad.nii", "spacing is 0 x 1.5 x 2 mm, expected above zero"),
        (colours, "bad.mha", "3 values per voxel"),
        (huge, "bad.nii", ""),
        (far_offset, "bad.nii", ""),
        (no_images, "bad", "No image found"),
    ],
)
def test_a_bad_input_is_named_and_does_not_stop_the_others(
    segment: Command, tmp_path: Path, capsys: Captured, spoil: Callable[[Path], Path], name: str, message: str
) -> None:
    bad = spoil(tmp_path / name)
    assert segment(saved(tmp_path / "a.mha"), bad, saved(tmp_path / "z.mha")) == 1
    check_error(capsys, bad, message)
    assert names(tmp_path / "out") == ["a.seg.nrrd", "log.txt", "volumes.csv", "volumes.json", "z.seg.nrrd"]


def test_nothing_to_segment_leaves_no_folder(segment: Command, tmp_path: Path) -> None:
    assert segment(tmp_path / "none.nii.gz") == 1
    assert not (tmp_path / "out").exists()


def test_a_result_never_replaces_an_input(model: Path, tmp_path: Path, capsys: Captured) -> None:
    source = saved(tmp_path / "CT.nii.gz")
    before = source.read_bytes()
    options = ["-o", str(tmp_path / "x" / ".."), "--model", str(model)]
    (tmp_path / "x").mkdir()
    assert main(["segment", str(source), "--format", "nii.gz", *options]) == 1
    check_error(capsys, source, "another folder or format")
    assert source.read_bytes() == before and names(tmp_path) == [
        "CT.nii.gz",
        "log.txt",
        "volumes.csv",
        "volumes.json",
        "x",
    ]


# ---- bad models and options


def header_changed(path: Path, **changes: Any) -> None:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"]["m4oe"] = json.dumps(json.loads(header["__metadata__"]["m4oe"]) | changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def newer(path: Path) -> None:
    header_changed(path, format_version=FORMAT_VERSION + 1)


def misfit(path: Path) -> None:
    save_model(path, a_network(), replace(SPEC, structures=("liver",)))


def not_a_model(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(1000))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_short, "truncated"),
        (not_a_model, "not a model file"),
        (newer, f"format {FORMAT_VERSION + 1} is newer than {FORMAT_VERSION}"),
        (misfit, "does not fit its own description"),
        (damaged, "does not match its checksum"),
        (Path.unlink, "cannot be read: No such file"),
    ],
)
def test_a_bad_model_is_named_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: Captured, spoil: Callable[[Path], None], message: str
) -> None:
    bad = Path(shutil.copy(model, tmp_path / "bad.safetensors"))
    spoil(bad)
    source = saved(tmp_path / "CT.nii.gz")
    assert main(["segment", str(source), "-o", str(tmp_path / "out"), "--model", str(bad)]) == 2
    check_error(capsys, bad, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--expert", "pet"), "expert 'pet' is unknown; tiny has: ct, mr"),
        (("--structures", "liver, lung"), "structure lung is unknown; tiny has: liver, spleen, liver_tumor"),
        (("--device", "tpu"), "device 'tpu' is not available; this machine has: "),
        (("--model", "huge"), "model 'huge' is not installed; installed: "),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(
    model: Path, tmp_path: Path, capsys: Captured, option: tuple[str, ...], message: str
) -> None:
    source = saved(tmp_path / "CT.nii.gz")
    assert main(["segment", str(source), "-o", str(tmp_path / "out"), "--model", str(model), *option]) == 2
    assert the_error(capsys).startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["segment"], ["segment", "x", "-o", "y", "--format", "stl"], ["sing"]])
def test_a_wrong_command_line_exits_with_2(arguments: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: m4oe" in capsys.readouterr().err


def test_without_a_command_all_are_named(capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "expected a command: segment, evaluate, models, info, train, demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "usage", "hint"),
    [
        ("segment x -o y --previw", "m4oe segment", "--previw (did you mean --preview?)"),
        ("segment x -o y --fromat dcm", "m4oe segment", "--fromat (did you mean --format?) dcm"),
        ("data scan x --jsn y", "m4oe data scan", "--jsn (did you mean --json?)"),
        ("segment x -o y --format dicm", "m4oe segment", "(did you mean dcm?)"),
        ("segmnt x -o y", "m4oe", "(did you mean segment?)"),
        ("models --tongue", "m4oe models", "unrecognized arguments: --tongue\n"),
    ],
)
def test_a_misspelled_word_gets_the_usage_of_its_command_and_what_it_may_mean(
    line: str, usage: str, hint: str, capsys: Captured
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    said = capsys.readouterr().err
    assert said.startswith(f"usage: {usage} [-h]") and hint in said


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--structures leftkidney", "structure leftkidney (did you mean kidney_left?) is unknown"),
        ("--expert t2", "expert 't2' is unknown (did you mean mr_t2?)"),
        ("--model m4oe_demo", "model 'm4oe_demo' is not installed (did you mean m4oe-demo?)"),
    ],
)
def test_a_misspelled_structure_expert_or_model_is_told_what_it_may_mean(
    options: str, hint: str, tmp_path: Path, capsys: Captured
) -> None:
    source = saved(tmp_path / "CT.nii.gz")
    assert main(["segment", str(source), "-o", str(tmp_path / "out"), *options.split()]) == 2
    assert hint in the_error(capsys)


def test_without_vtk_a_preview_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['vtkmodules'] = None; from m4oe.__main__ import main; sys.exit(main())"
    arguments = ["segment", saved(tmp_path / "CT.nii.gz"), "-o", tmp_path / "out", "--model", model]
    process = python("-c", code, *arguments, "--preview")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "vtkmodules" in errors and "pip install vtk" in errors
    assert len(errors.splitlines()) == 1 and not (tmp_path / "out").exists()
    process = python("-c", code, *arguments)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_missing_package_is_named(
    segment: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert segment(saved(tmp_path / "CT.nii.gz")) == 2
    assert "tqdm" in the_error(capsys)


# ---- places that cannot be written


def test_structures_swallow_no_input_and_a_comma_too_many_is_no_structure(segment: Command, tmp_path: Path) -> None:
    assert segment("--structures", "liver,,spleen", saved(tmp_path / "CT.mha")) == 0
    assert {row["structure"] for row in rows(tmp_path / "out")} <= {"liver", "spleen"}


@pytest.mark.parametrize("place", ["{here}/CT.nii.gz", "{here}/CT.nii.gz/deeper", "/proc/m4oe", "/dev/full"])
@pytest.mark.parametrize("command", ["segment", "demo"])
def test_a_folder_that_cannot_be_written_is_named(
    model: Path, tmp_path: Path, capsys: Captured, place: str, command: str
) -> None:
    source, out = saved(tmp_path / "CT.nii.gz"), place.format(here=tmp_path)
    before = source.read_bytes()
    inputs = [str(source)] if command == "segment" else ["--input", str(source)]
    assert main([command, *inputs, "-o", out, "--model", str(model)]) == 2
    reason = ": it is a file; expected a folder" if out == str(source) else " ("
    assert the_error(capsys).startswith(f"cannot write into {out}{reason}")
    assert source.read_bytes() == before and names(tmp_path) == ["CT.nii.gz"]


def no_file_beyond_200_bytes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))


@pytest.mark.parametrize("suffix", ["seg.nrrd", "nii.gz", "mha", "nrrd"])
def test_a_full_disk_leaves_no_half_written_file(model: Path, tmp_path: Path, suffix: str) -> None:
    source, out = saved(tmp_path / "CT.nii.gz"), tmp_path / "out"
    command = ["segment", source, "--format", suffix, "-o", out, "--model", model, "--device", "cpu"]
    process = python("-B", "-m", "m4oe", *command, preexec_fn=no_file_beyond_200_bytes)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (1, 2) and "Traceback" not in errors, errors
    assert set(names(out)) <= {"log.txt", "volumes.json", "volumes.csv"}
    assert names(out) == ["log.txt"] or reports(out)["CT"]["error"]


# ---- interruption


def half_written(path: str, *given: object, **options: object) -> None:
    Path(path).write_bytes(b"NRRD0005")
    raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_was_done(
    segment: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    steps = iter([nrrd.write, half_written])
    monkeypatch.setattr(nrrd, "write", lambda *given, **options: next(steps)(*given, **options))
    assert segment(*(saved(tmp_path / f"{name}.mha") for name in "abc")) == 130
    assert "interrupted" in the_error(capsys)
    assert names(tmp_path / "out") == ["a.seg.nrrd", "log.txt", "volumes.csv", "volumes.json"]
    assert {row["case"] for row in rows(tmp_path / "out")} == {"a"}


SLOW_WRITER = """
import sys, time, pathlib, nrrd
from m4oe.__main__ import main
def write(path, *given, **options):
    pathlib.Path(path).write_bytes(b"NRRD0005")
    print("writing", flush=True)
    for _ in range(600):  # a signal just before one long sleep would wait for its end
        time.sleep(0.1)
nrrd.write = write
sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_middle_of_writing_leaves_no_file(
    model: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    arguments = ["segment", saved(tmp_path / "CT.nii.gz"), "-o", tmp_path / "out", "--model", model]
    with python("-c", SLOW_WRITER, *arguments) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        assert len(names(tmp_path / "out")) == 2
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code and names(tmp_path / "out") == ["log.txt"]
    assert the_error_in(errors) == "interrupted; files already written are complete"


# ---- as a program


def test_a_killed_run_keeps_what_was_done(model: Path, tmp_path: Path) -> None:
    second_is_slow = SLOW_WRITER.replace("nrrd.write = write", "first = nrrd.write").replace(
        "def write(path, *given, **options):",
        "def write(path, *given, **options):\n    if '-a.seg' in path:\n        return first(path, *given, **options)",
    )
    code = second_is_slow.replace("sys.exit(", "nrrd.write = write\nsys.exit(")
    inputs = [saved(tmp_path / f"{name}.mha") for name in "ab"]
    with python("-c", code, "segment", *inputs, "-o", tmp_path / "out", "--model", model) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in ("writing\n", ""):
            pass
        process.kill()
    assert set(reports(tmp_path / "out")) == {row["case"] for row in rows(tmp_path / "out")} == {"a"}


def python(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A Python of its own that finds m4oe."""
    environment = os.environ | {"PYTHONPATH": str(Path(m4oe.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    given: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment,
        # A job in the background ignores Ctrl-C, and so would what it starts.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    } | options
    return subprocess.Popen([sys.executable, *map(str, arguments)], **given)


def test_exit_codes_tell_scripts_what_happened(model: Path, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out", "--model", model]
    commands = [(0, ["info", model]), (1, ["segment", tmp_path / "none", *out]), (2, ["info", tmp_path / "none"])]
    for code, arguments in commands:
        process = python("-m", "m4oe", *arguments)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code and len(errors.splitlines()) == (code > 0), errors


LIGHT = """
import sys
from m4oe.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.exit(" ".join({"torch", "numpy", "SimpleITK", "vtkmodules", "tqdm"} & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["segment", "--help"], ["models"], ["info"]])
def test_looking_around_loads_no_heavy_package(model: Path, arguments: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(m4oe.__file__).parents[1]), "M4OE_MODELS": str(model.parent)}
    given = ["info", str(model)] if arguments == ["info"] else arguments
    process = python("-c", LIGHT, *given, env=environment)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and ("tiny" in output or "usage: m4oe" in output)


def test_a_terminal_shows_phase_and_percentage(model: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    arguments = ["segment", saved(tmp_path / "CT.nii.gz"), "-o", tmp_path / "out", "--model", model]
    process = python("-m", "m4oe", *arguments, stderr=theirs)
    output, _ = process.communicate(timeout=60)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0 and "CT" in shown and "100%" in shown and ", segment" in shown
    assert output.startswith("CT: ") and "1 done, 0 skipped, 0 failed" in output


def test_without_a_terminal_there_is_a_line_per_case_and_no_bar(
    segment: Command, tmp_path: Path, capsys: Captured
) -> None:
    segment(saved(tmp_path / "CT.nii.gz"))
    lines = capsys.readouterr().err.splitlines()
    told, case, others = lines[:2], lines[2], lines[3:]
    assert told == ["tiny 1: Knows nothing.", "device: cpu"] and case == "1/1 CT ..."
    assert all(line.startswith("m4oe: warning: CT: ") for line in others)


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = python("-m", "m4oe", "info", model, stdout=writer)
    os.close(writer)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, "")


def test_letters_that_the_terminal_lacks_are_no_error(model: Path, tmp_path: Path) -> None:
    path = shutil.copy(model, tmp_path / "腹.safetensors")
    environment = os.environ | {"PYTHONPATH": str(Path(m4oe.__file__).parents[1]), "PYTHONIOENCODING": "ascii"}
    process = python("-m", "m4oe", "info", path, env=environment)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and "\\u8179.safetensors" in output


# ---- models and info


def test_models_are_listed_and_a_bad_one_does_not_hide_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path))
    shutil.copy(model, tmp_path / "tiny.safetensors")
    assert main(["models"]) == 0
    (tmp_path / "a.safetensors").touch()
    assert main(["models"]) == 1
    output, errors = capsys.readouterr()
    assert output.count("tiny  version 1, 2 structures and 1 lesion, experts ct, mr") == 2 and "a.safetensors" in errors


def test_scores_on_phantoms_are_called_so_and_their_cases_counted(model: Path) -> None:
    facts = {"data": "9 computer-made phantoms", "scored_cases": {"ct": 5}}
    lines = score_table(replace(read_spec(model), training=facts)).splitlines()
    assert lines[0].startswith("Scored on computer-made phantoms that training did not see")
    assert lines[2].split() == ["(cases)", "5", "-"]


def test_a_model_that_was_scored_on_nobody_says_so(model: Path) -> None:
    assert score_table(replace(read_spec(model), scores={})) == "Not scored."


def test_info_shows_limits_and_scores(model: Path, capsys: Captured) -> None:
    assert main(["info", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny 1") and "Knows nothing." in lines
    assert f"sha256: {hashlib.sha256(model.read_bytes()).hexdigest()}" in lines
    stages = lines.index("training stages:")
    assert lines[stages + 1 : stages + 3] == [
        "  dense: 2400 steps, learning rate 0.0015",
        "  gate: 1 step, learning rate 0.0001",
    ]
    assert {"training data: 3 dreams", "training seed: 0", "training sites:", "  A", "  1"} <= set(lines)
    assert "Scored on cases that training did not see:" in lines
    assert [line.split() for line in lines if line.startswith("liver ")] == [["liver", "0.900", "-"]]


# ---- demo


@pytest.fixture
def demo(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `m4oe demo` with the tiny model on a tiny phantom into the folder "out"."""

    def make_phantom(seed: int, modality: str) -> phantoms.Phantom:
        assert (seed, modality) == (7, "ct")
        array = sitk.GetArrayFromImage(an_image())
        grid = Grid(array.shape, np.diag([1.5, 1.5, 1.5, 1]))
        truth = np.zeros(array.shape, np.uint8)
        for key, planes in {"liver": slice(2, 5), "aorta": slice(6, 7)}.items():
            truth[planes] = phantoms.STRUCTURES.index(key) + 1
        return phantoms.Phantom(Volume(array, grid, modality="CT"), Volume(truth, grid), modality)

    monkeypatch.setattr(phantoms, "make_phantom", make_phantom)
    common = ["-o", str(tmp_path / "out"), "--model", str(model), "--device", "cpu", "--seed", "7"]
    return lambda *arguments: main(["demo", *map(str, arguments), *common])


def test_the_demo_compares_what_is_there_and_names_what_is_not(demo: Command, tmp_path: Path, capsys: Captured) -> None:
    assert demo() == 0
    labels, truth = (read_volume(tmp_path / "out" / f"phantom_ct{end}.seg.nrrd") for end in ("", "_truth"))
    liver, expected = labels.array == 1, truth.array == phantoms.STRUCTURES.index("liver") + 1
    dice = 2 * (liver & expected).sum() / (liver.sum() + expected.sum())
    spleen_ml = (labels.array == 2).sum() * labels.grid.voxel_ml
    lines = capsys.readouterr().out.splitlines()
    found = {key for key in SPEC.structures if (labels.array == SPEC.structures.index(key) + 1).any()}
    assert spleen_ml > 0 and dice > 0
    assert f"  {'Liver':<24}{dice:6.3f}" in lines
    assert f"  {'Spleen':<25}absent; {spleen_ml:.2f} mL found wrongly" in lines
    begin = lines.index("Dice against the phantom's truth:") + 1
    assert len([line for line in lines[begin:] if line.startswith("  ")]) == len(found | {"liver"})
    assert "seconds: prepare" in lines[1] and "network" in lines[1]


def test_the_demo_lists_nothing_that_is_neither_there_nor_found(demo: Command, capsys: Captured) -> None:
    assert demo("--structures", "liver") == 0
    output = capsys.readouterr().out
    assert "  Liver" in output and "Spleen" not in output and "Aorta" not in output


def test_the_demo_writes_the_phantom_and_says_what_to_open(demo: Command, tmp_path: Path, capsys: Captured) -> None:
    assert demo() == 0
    out = tmp_path / "out"
    image, labels = read_volume(out / "phantom_ct.nii.gz"), read_volume(out / "phantom_ct.seg.nrrd")
    assert np.array_equal(image.array, sitk.GetArrayFromImage(an_image()))
    np.testing.assert_allclose(image.grid.affine, labels.grid.affine, atol=1e-5)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"open in Slicer: {out}/phantom_ct.nii.gz and {out}/phantom_ct.seg.nrrd",
        f"look at: {out}/phantom_ct.png",
    ]
    assert {"phantom_ct.png", "phantom_ct_truth.seg.nrrd", "volumes.csv", "volumes.json"} < set(names(out))


def test_the_demo_takes_an_input(demo: Command, tmp_path: Path, capsys: Captured) -> None:
    assert demo("--input", saved(tmp_path / "CT.nii.gz"), "--modality", "x-ray") == 0
    assert names(tmp_path / "out") == ["CT.png", "CT.seg.nrrd", "log.txt", "volumes.csv", "volumes.json"]
    assert "Dice" not in capsys.readouterr().out


def test_an_unknown_phantom_is_refused_with_the_choices(model: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["demo", "--model", str(model), "-o", str(tmp_path / "out"), "--modality", "x-ray"]) == 2
    assert "'x-ray'; choose one of ct, mr_t1, mr_t2, mr_t1ce" in the_error(capsys)
    assert not (tmp_path / "out").exists()
