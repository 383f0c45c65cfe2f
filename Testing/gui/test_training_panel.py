"""The panel M4oETraining with commands that only seem to run: what goes wrong, and what must stay."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import qt
import slicer
import slicer.util
from harness.application import Dialogs, settle


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch, panel: Any) -> list[str]:
    """Folders that were scanned, by a command that finds one case with a liver at once."""
    from M4oETrainingLib import Data

    scanned: list[str] = []

    class Scan:
        def __init__(self, command: list[str], environment: Any) -> None:
            scanned.append(command[command.index("scan") + 1])
            found = {"cases": [{"volumes_ml": {"liver": 1}, "modality": "CT", "expert": None}], "findings": []}
            text = json.dumps({"datasets": [found]})
            Path(command[command.index("--json") + 1]).write_text(text, encoding="utf-8")

        def done(self) -> bool:
            return True

        def stop(self) -> None:
            pass

    monkeypatch.setattr(Data, "Process", Scan)
    return scanned


@pytest.fixture
def panel(open_panel: Callable[[str], Any]) -> Any:
    widget = open_panel("M4oETraining")
    widget._timer.stop()
    return widget


def a_run(folder: Path, *events: dict[str, Any]) -> Path:
    """A run that ended long ago, paused where no events are given."""
    folder.mkdir(exist_ok=True)
    facts = {"command": ["m4oe"], "pid": 0, "birth": ""}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    lines = [json.dumps(event) + "\n" for event in events or [{"event": "paused"}]]
    (folder / "events.jsonl").write_text("".join(lines), encoding="utf-8")
    qt.QSettings().setValue("M4oE/runs", json.dumps([str(folder)]))
    return folder


def add(panel: Any, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    panel.ui.dataFolderEdit.currentPath = str(folder)
    panel.ui.addFolderButton.click()
    for _ in range(4):
        panel.onTimer()


def rows(panel: Any) -> list[str]:
    table = panel.ui.dataTable
    return [Path(table.item(row, 0).text()).name + " " + table.item(row, 2).text() for row in range(table.rowCount)]


def count(kind: str) -> int:
    return len(slicer.util.getNodesByClass(kind))


def a_volume(name: str, lowest: int = -1000) -> Any:
    array = np.full((2, 3, 4), lowest, np.int16)
    return slicer.util.addVolumeFromArray(array, ijkToRAS=np.eye(4), name=name)


def segment(volume: Any, *names: str) -> Any:
    """A segmentation of a volume, with a row of voxels for each structure."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"of {', '.join(names)}")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    for row, name in enumerate(names or ["liver"]):
        segment = node.GetSegmentation().AddEmptySegment(name, name)
        mask = np.zeros((2, 3, 4), np.uint8)
        mask[:, row] = 1
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask, node, segment, volume)
    return node


def table(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def test_a_folder_is_scanned_once(panel: Any, scans: list[str], tmp_path: Path) -> None:
    add(panel, tmp_path / "a")
    add(panel, tmp_path / "b")
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()
    panel.onTimer()
    assert [Path(folder).name for folder in scans] == ["a", "b"]
    assert rows(panel) == ["b Liver (1)"]
    add(panel, tmp_path / "b")
    assert len(scans) == 3


def test_a_removed_folder_is_not_scanned(panel: Any, scans: list[str], tmp_path: Path) -> None:
    panel.parameters.folders = [str(tmp_path)]
    panel._data.show()
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()
    panel.onTimer()
    assert scans == [] and rows(panel) == [] and not panel._data.busy


def test_a_folder_has_one_name(panel: Any, scans: list[str], tmp_path: Path) -> None:
    add(panel, tmp_path / "a")
    panel.ui.dataFolderEdit.currentPath = f"{tmp_path}/b/../a/"
    panel.ui.addFolderButton.click()
    assert panel.parameters.folders == [str(tmp_path / "a")]


def test_nothing_is_removed_without_a_choice(panel: Any, scans: list[str], tmp_path: Path) -> None:
    add(panel, tmp_path / "a")
    assert not panel.ui.removeDataButton.enabled
    panel.ui.dataTable.selectRow(0)
    assert panel.ui.removeDataButton.enabled
    panel.ui.removeDataButton.click()
    assert rows(panel) == [] and not panel.ui.removeDataButton.enabled


def test_data_are_checked_anew_when_label_values_are_typed(panel: Any, scans: list[str], tmp_path: Path) -> None:
    add(panel, tmp_path / "a")
    panel.ui.labelsEdit.text = "1=liver"
    panel.onTimer()
    assert len(scans) == 1
    panel.ui.labelsEdit.editingFinished.emit()
    panel.onTimer()
    panel.onTimer()
    panel.ui.labelsEdit.editingFinished.emit()
    panel.onTimer()
    assert len(scans) == 2


def test_findings_begin_with_the_worst(panel: Any) -> None:
    from M4oETrainingLib.Data import _scanned

    findings = [("note", "", "Fine."), ("warning", "b", "Thick."), ("error", "a", "Empty.")]
    found = [dict(zip(("severity", "case", "sentence"), finding, strict=True)) for finding in findings]
    scan = _scanned("/data", [{"cases": [], "findings": found}])
    assert scan.findings == ("Error: a: Empty.", "Warning: b: Thick.", "Note: /data: Fine.")


def test_what_the_scene_left_out_stays_while_its_folder_is_listed(panel: Any, scans: list[str], tmp_path: Path) -> None:
    segment(a_volume("CT"), "liver", "Milz")
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path)
    panel.ui.addSceneButton.click()
    for _ in range(4):
        panel.onTimer()
    text = "Cases written: 1. Left out, as no structure has such a name: Milz"
    assert panel.ui.findingsLabel.text == text and scans == [str(tmp_path)]
    panel.ui.dataTable.selectRow(0)
    panel.ui.removeDataButton.click()
    assert panel.ui.findingsLabel.text == ""


def test_the_data_of_a_loaded_scene_are_listed(panel: Any, scans: list[str], tmp_path: Path, scene: Any) -> None:
    add(panel, tmp_path / "a")
    scene.SetURL(str(tmp_path / "scene.mrml"))
    scene.Commit()
    scene.Clear(False)
    assert rows(panel) == []
    scene.SetURL(str(tmp_path / "scene.mrml"))
    scene.Connect()
    assert rows(panel)[0].startswith("a ")


def test_data_are_not_sought_on_another_machine(panel: Any, tmp_path: Path) -> None:
    qt.QSettings().setValue("M4oE/worker", "ssh")
    qt.QSettings().setValue("M4oE/host", "gpu1")
    add(panel, tmp_path)
    assert "This runs on this machine" in panel.ui.findingsLabel.text
    assert panel.ui.findingsLabel.text.startswith(f"Error: {tmp_path}: ")
    assert panel.ui.dataTable.item(0, 3).text() == "cannot be used"


def test_volumes_of_one_name_are_different_cases(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib import Scene

    for _ in range(2):
        segment(a_volume("CT"))
    assert Scene.export(str(tmp_path), "CT", "") == (2, [], [])
    assert {path.name for path in tmp_path.glob("*.nii.gz")} >= {"CT.nii.gz", "CT_2.nii.gz"}
    assert Scene.export(str(tmp_path), "CT", "")[2] == ["CT", "CT_2"]


def test_volumes_whose_names_differ_in_signs_alone_are_different_cases(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib import Scene

    (tmp_path / "a_seg.nii.gz").touch()
    (tmp_path / "aseg.nii.gz").write_text("mine")
    for name in ("CT 1", "CT/1", "ct_1", "a_seg"):
        segment(a_volume(name))
    Scene.export(str(tmp_path), "", "")
    written = table(tmp_path / "cases.csv")[1:]
    assert written == ["CT_1,CT,ct", "CT_1_2,CT,ct", "ct_1_3,CT,ct", "aseg_2,CT,ct"]
    assert (tmp_path / "aseg.nii.gz").read_text() == "mine"


def test_the_chosen_modality_is_for_volumes_of_which_it_is_not_known(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib import Scene

    segment(a_volume("CT 1"))
    segment(a_volume("MR 1", 0))
    with pytest.raises(ValueError, match="Whether 'MR 1' is CT or MR is not known"):
        Scene.export(str(tmp_path / "none"), "", "")
    assert not (tmp_path / "none").exists()
    Scene.export(str(tmp_path), "MR", "")
    assert table(tmp_path / "cases.csv")[1:] == ["CT_1,CT,ct", "MR_1,MR,mr"]


def test_segmentations_of_a_volume_become_one_case(panel: Any, tmp_path: Path) -> None:
    from m4oe.files import read_volume
    from M4oETrainingLib import Scene

    volume = a_volume("CT")
    segment(volume, "liver")
    segment(volume, "Milz", "spleen")
    assert Scene.export(str(tmp_path), "", "") == (1, ["Milz"], [])
    labels = read_volume(tmp_path / "CT_label.nii.gz").array
    named = dict(row.split(",")[::-1] for row in table(tmp_path / "CT_label.csv")[1:])
    assert set(named) == {"liver", "spleen"}
    assert {name: int((labels == int(value)).sum()) for name, value in named.items()} == {"liver": 8, "spleen": 8}


def test_a_segment_is_known_by_its_terminology_whatever_its_name(panel: Any, tmp_path: Path, dialogs: Dialogs) -> None:
    from m4oe.labels import structure

    node = segment(a_volume("CT"), "Milz", "liver")
    for name in ("Milz", "liver"):  # the codes count before the name
        key = {"Milz": "spleen", "liver": "pancreas"}[name]
        node.GetSegmentation().GetSegment(name).SetTerminology(structure(key).terminology)
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path)
    panel.ui.addSceneButton.click()
    assert dialogs.errors == [] and panel.ui.findingsLabel.text == "Cases written: 1."
    assert {row.split(",")[1] for row in table(tmp_path / "CT_label.csv")[1:]} == {"spleen", "pancreas"}


def test_the_scene_is_written_and_known_without_pynrrd(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m4oe.labels import structure

    monkeypatch.setitem(sys.modules, "nrrd", None)
    node = segment(a_volume("CT"), "Milz")
    node.GetSegmentation().GetSegment("Milz").SetTerminology(structure("spleen").terminology)
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path)
    panel.ui.addSceneButton.click()
    assert dialogs.errors == []
    assert [row.split(",")[1] for row in table(tmp_path / "CT_label.csv")[1:]] == ["spleen"]


def test_an_evaluation_of_seg_nrrd_begins_without_pynrrd_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from M4oETrainingLib.Evaluation import _checkMeanings

    (tmp_path / "a.seg.nrrd").touch()
    with pytest.raises(ValueError, match="damaged"):
        _checkMeanings(tmp_path, "")
    monkeypatch.setitem(sys.modules, "nrrd", None)
    _checkMeanings(tmp_path, "")


def test_a_structure_that_was_drawn_twice_is_refused(panel: Any, tmp_path: Path, dialogs: Dialogs) -> None:
    volume = a_volume("CT")
    segment(volume, "liver")
    segment(volume, "spleen", "Liver")
    segment(a_volume("other"))
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path / "scene")
    panel.ui.addSceneButton.click()
    assert "'CT' has Liver in two segmentations, 'of liver' and 'of spleen, Liver'" in dialogs.errors[0]
    assert not (tmp_path / "scene").exists()


def test_what_the_user_wrote_into_the_table_of_cases_stays(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib import Scene

    (tmp_path / "cases.csv").write_text("case;modality;expert;split\nCT;MR;mr;test\nold;MR;mr;val\n", encoding="utf-8")
    segment(a_volume("CT"))
    segment(a_volume("new"))
    segment(a_volume("empty"), "Milz")
    assert Scene.export(str(tmp_path), "", "") == (2, ["Milz"], ["CT"])
    assert table(tmp_path / "cases.csv")[1:] == ["CT,CT,ct,test", "old,MR,mr,val", "new,CT,ct,"]


def test_a_scene_without_known_structures_is_refused(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib import Scene

    segment(a_volume("CT"), "Milz")
    with pytest.raises(ValueError, match="No segment is a structure that M4oE knows: Milz"):
        Scene.export(str(tmp_path), "", "")


def test_a_damaged_run_does_not_keep_the_panel_from_opening(open_panel: Callable[[str], Any], tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    whole = (run / "run.json").read_text(encoding="utf-8")
    (run / "run.json").write_text("", encoding="utf-8")
    panel = open_panel("M4oETraining")
    assert panel.ui.runSelector.count == 0
    (run / "run.json").write_text(whole, encoding="utf-8")
    panel.enter()
    assert panel.ui.runSelector.currentData == str(run)


def test_a_run_whose_folder_is_away_is_told_and_found_again(
    open_panel: Callable[[str], Any], tmp_path: Path, dialogs: Dialogs
) -> None:
    run = a_run(tmp_path / "run")
    panel = open_panel("M4oETraining")
    assert panel.ui.resumeButton.enabled
    shutil.move(run, tmp_path / "away")
    panel.onTimer()
    assert panel.ui.statusLabel.text.startswith("The run cannot be read")
    assert panel.ui.forgetButton.enabled and not panel.ui.resumeButton.enabled
    shutil.move(tmp_path / "away", run)
    panel.onTimer()
    assert panel.ui.statusLabel.text == "Paused; Resume goes on" and dialogs.errors == []


def test_an_estimate_can_be_cancelled(panel: Any, dialogs: Dialogs) -> None:
    panel._command = lambda *more: [sys.executable, "-c", "import time; time.sleep(600)"]
    panel.ui.estimateButton.click()
    panel.onTimer()
    process = panel._estimate.process
    assert not panel.ui.startButton.enabled and panel.ui.estimateLabel.text.startswith("Prepares the cases")
    panel.ui.estimateButton.click()
    panel.onTimer()
    assert panel.ui.startButton.enabled and panel.ui.estimateLabel.text == "" and dialogs.errors == []
    assert process._process.wait(60) != 0


def test_an_estimate_that_failed_is_told_and_over(panel: Any, dialogs: Dialogs) -> None:
    panel._command = lambda *more: [sys.executable, "-c", "raise SystemExit('no room')"]
    panel.ui.estimateButton.click()
    settle(lambda: panel.onTimer() or not panel._estimate.busy)
    assert "No room" in dialogs.errors[0] and panel.ui.estimateLabel.text == ""


def other_length(panel: Any) -> None:
    panel.ui.lengthSpinBox.value = 3


def other_device(panel: Any) -> None:
    panel.ui.deviceSelector.currentIndex = panel.ui.deviceSelector.findData("mps")


def other_scene(panel: Any) -> None:
    slicer.mrmlScene.Clear(False)


@pytest.mark.parametrize("change", [other_length, other_device, other_scene])
def test_an_estimate_goes_when_a_choice_changes_that_it_depends_on(
    panel: Any, change: Callable[[Any], None], tmp_path: Path
) -> None:
    panel._command = lambda *more: [sys.executable, "-c", 'print(\'{"seconds": 1, "memory_mib": 1, "gpu_mib": 0}\')']
    panel.parameters.synthesise, panel.parameters.runFolder = True, str(tmp_path)
    qt.QPixmap(8, 8).save(str(tmp_path / "synthesis.png"))
    panel.ui.estimateButton.click()
    panel.ui.nameEdit.text = "mine"
    settle(lambda: panel.onTimer() or not panel._estimate.busy)
    assert panel.ui.estimateLabel.text.startswith("It takes") and not panel.ui.synthesisLabel.pixmap.isNull()
    change(panel)
    panel.onTimer()
    assert panel.ui.estimateLabel.text == "" and panel.ui.synthesisLabel.pixmap.isNull()


@pytest.mark.parametrize("change", [other_length, other_device])
def test_an_estimate_that_runs_is_stopped_when_a_choice_changes(panel: Any, change: Callable[[Any], None]) -> None:
    panel._command = lambda *more: [sys.executable, "-c", "import time; time.sleep(600)"]
    panel.ui.estimateButton.click()
    panel.onTimer()
    process = panel._estimate.process
    change(panel)
    panel.onTimer()
    assert process._process.wait(60) != 0 and panel.ui.startButton.enabled
    assert (panel.ui.estimateLabel.text, panel.ui.estimateButton.text) == ("", "Estimate")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Workers that were asked for devices; they fail to tell."""
    workers: list[Any] = []

    class Asked:
        def __init__(self, command: list[str], environment: Any) -> None:
            workers.append(self)

        def begin_info(self) -> Any:
            return self

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            raise RuntimeError("no driver")

        def close(self) -> None:
            pass

    monkeypatch.setattr("m4oe.client.Client", Asked)
    return workers


def test_devices_are_those_of_this_machine(panel: Any, asked: list[Any], dialogs: Dialogs) -> None:
    qt.QSettings().setValue("M4oE/worker", "ssh")
    qt.QSettings().setValue("M4oE/host", "gpu1")
    panel.ui.refreshDevicesButton.click()
    assert "This runs on this machine" in dialogs.errors[0]
    assert asked == [] and panel.ui.refreshDevicesButton.enabled


def test_two_clicks_ask_one_worker_for_its_devices(panel: Any, asked: list[Any]) -> None:
    panel.ui.refreshDevicesButton.click()
    assert not panel.ui.refreshDevicesButton.enabled
    panel.ui.refreshDevicesButton.clicked.emit()
    assert len(asked) == 1


def test_that_devices_are_not_known_is_told_once(
    panel: Any, asked: list[Any], dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def show(text: str) -> None:  # as a box does, during which the timer goes on
        told.append(text)
        if len(told) < 3:
            panel.onTimer()

    monkeypatch.setattr(slicer.util, "errorDisplay", show)
    panel.ui.refreshDevicesButton.click()
    panel.onTimer()
    assert told == ["The devices are not known.\n\nNo driver"]


def test_an_evaluation_is_not_mixed_with_an_earlier_one(panel: Any, tmp_path: Path, dialogs: Dialogs) -> None:
    (tmp_path / "segmentations").mkdir()
    ui = panel.ui
    for edit in (ui.evaluationImagesEdit, ui.evaluationTruthEdit, ui.evaluationFolderEdit):
        edit.currentPath = str(tmp_path)
    ui.evaluateButton.click()
    assert "holds an evaluation already. Choose another folder." in dialogs.errors[0]


def test_label_values_without_meaning_are_told_before_anything_is_segmented(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.nii.gz").touch()
    ui = panel.ui
    ui.evaluationModelSelector.addItem("tiny", "tiny")
    for edit in (ui.evaluationImagesEdit, ui.evaluationTruthEdit):
        edit.currentPath = str(tmp_path)
    ui.evaluationFolderEdit.currentPath = str(tmp_path / "scores")
    for labels in ("", "1=nonsense"):
        ui.labelsEdit.text = labels
        ui.evaluateButton.click()
    assert ["in the field Label values, in the section Data" in error for error in dialogs.errors] == [True, True]
    assert "does not say" in dialogs.errors[0] and "nonsense" in dialogs.errors[1]
    assert not panel._evaluation.busy


def test_a_base_model_that_is_not_installed_is_shown(panel: Any) -> None:
    panel.parameters.baseModel = "/gone/mine.safetensors"
    panel.enter()
    assert panel.ui.baseModelSelector.currentText == "mine"
    panel.parameters.baseModel = "/gone/other.safetensors"
    assert panel.ui.baseModelSelector.currentText == "other"


def test_curves_go_with_the_panel_and_leave_nothing(open_panel: Callable[[str], Any], tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    panel = open_panel("M4oETraining")
    panel.ui.plotButton.click()
    slicer.mrmlScene.RemoveNode(panel._view.curves["loss"].chart)
    panel.onPlot()
    assert (count("vtkMRMLPlotChartNode"), count("vtkMRMLTableNode")) == (1, 1)
    panel.cleanup()
    assert (count("vtkMRMLPlotChartNode"), count("vtkMRMLTableNode")) == (0, 0)


def test_bars_are_drawn_once(panel: Any) -> None:
    entry = {"dice": {"mean": 0.9}, "nsd": None, "hd95_mm": None, "in_truth": 2}
    for _ in range(2):
        panel._evaluation._show({"liver": entry})
        panel._evaluation._plot()
        panel._evaluation._plot()
    assert count("vtkMRMLPlotChartNode") == 1


def validated(stage: int, liver: float, spleen: float) -> dict[str, Any]:
    dice = {"liver": liver, "spleen": spleen}
    return {"event": "validated", "number": stage, "overall": 1, "score": (liver + spleen) / 2, "dice": dice}


@pytest.mark.parametrize(
    ("dices", "best"),
    [
        ([(0, 0.9, 0.1), (0, 0.6, 0.6), (0, 0.5, 0.65)], ["0.600", "0.600"]),
        ([(0, 0.9, 0.9), (1, 0.2, 0.3)], ["0.200", "0.300"]),
    ],
)
def test_the_best_dice_are_those_of_one_model(
    open_panel: Callable[[str], Any], tmp_path: Path, dices: list[tuple[int, float, float]], best: list[str]
) -> None:
    a_run(tmp_path / "run", *(validated(*values) for values in dices))
    table = open_panel("M4oETraining").ui.diceTable
    assert [table.item(row, 2).text() for row in range(2)] == best


@pytest.mark.parametrize("dice", [0.0, 0.1])
def test_a_model_that_finds_nothing_is_told(open_panel: Callable[[str], Any], tmp_path: Path, dice: float) -> None:
    a_run(tmp_path / "run", validated(0, 0.9, 0.9), validated(1, dice, 0.0), {"event": "finished"})
    text = open_panel("M4oETraining").ui.statusLabel.text
    assert text.startswith("Finished") and ("finds nothing in the validation cases" in text) == (dice == 0)


def test_behind_the_last_step_the_model_is_scored(panel: Any, tmp_path: Path) -> None:
    from M4oETrainingLib.RunView import RunView

    step = {"event": "step", "stage": "joint", "step": 9, "overall_steps": 9, "seconds": 9, "loss": {"all": 1}}
    view = RunView(str(a_run(tmp_path / "run")), panel.ui)
    view.state, texts = "running", []
    for overall in (8, 9):
        view._take({**step, "overall": overall})
        view._showProgress()
        texts.append(panel.ui.statusLabel.text)
    assert texts == ["Running; stage joint; less than a minute left", "Running; scores the model"]


def started(panel: Any, monkeypatch: pytest.MonkeyPatch, run: Path) -> list[list[str]]:
    """Commands that Start and Resume give, with a data set and a folder chosen; nothing runs."""
    from m4oe import training_run

    commands: list[list[str]] = []
    monkeypatch.setattr(training_run, "start_run", lambda folder, command, environment: commands.append(command))
    panel.parameters.folders = [str(run.parent)]
    panel.ui.runFolderEdit.currentPath = str(run)
    return commands


def test_a_training_that_failed_at_once_starts_with_mended_choices(
    open_panel: Callable[[str], Any], tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run", {"event": "training"})
    (run / "plan.json").write_text("{}", encoding="utf-8")
    panel = open_panel("M4oETraining")
    commands = started(panel, monkeypatch, run)
    assert "mend them and press Start, with the same folder" in panel.ui.statusLabel.text
    panel.ui.labelsEdit.text = "1=liver"
    panel.ui.startButton.click()
    assert dialogs.errors == [] and "1=liver" in commands[0]
    assert not (run / "plan.json").exists() and not (run / "events.jsonl").exists()
    assert panel.ui.runSelector.currentData == str(run)


def test_a_training_that_has_begun_keeps_its_choices(
    open_panel: Callable[[str], Any], tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run", {"event": "training"})
    (run / "checkpoint.safetensors").touch()
    panel = open_panel("M4oETraining")
    commands = started(panel, monkeypatch, run)
    panel.ui.forgetButton.click()
    panel.ui.startButton.click()
    assert "choose it under Runs and press Resume" in dialogs.errors[0] and (run / "events.jsonl").exists()
    assert "press Start" not in panel.ui.statusLabel.text
    panel.ui.resumeButton.click()
    assert commands == [["m4oe"]]


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh")
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("slicer", "Slicer's Python has no PyTorch. Press Install in M4oE Segmentation"),
        ("python", "bare has no PyTorch. Install it there (python -m pip install torch), or choose another Python"),
    ],
)
def test_without_pytorch_a_start_says_how_to_get_it_and_leaves_no_folder(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch, place: str, told: str
) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n', encoding="utf-8")  # without site-packages
    bare.chmod(0o700)
    for package in ("here/torch/__init__.py", "left/torch/lib/nothing"):  # neither can be imported as torch
        (tmp_path / package).parent.mkdir(parents=True)
    (tmp_path / "here" / "torch" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "left"))
    monkeypatch.setattr("shutil.which", lambda name: str(bare))
    qt.QSettings().setValue("M4oE/worker", place)
    qt.QSettings().setValue("M4oE/python", str(bare))
    commands = started(panel, monkeypatch, tmp_path / "run")
    panel.ui.startButton.click()
    assert told in dialogs.errors[0] and commands == []
    assert not (tmp_path / "run").exists() and panel.ui.runSelector.count == 0


def test_while_pytorch_is_sought_the_cursor_says_so(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []

    def seek(*words: Any, **named: Any) -> Any:
        shapes.append(qt.QApplication.overrideCursor().shape())
        return SimpleNamespace(returncode=3)

    started(panel, monkeypatch, tmp_path / "run")
    monkeypatch.setattr("subprocess.run", seek)
    panel.ui.startButton.click()
    assert shapes == [qt.Qt.WaitCursor] and qt.QApplication.overrideCursor() is None
    assert "has no PyTorch" in dialogs.errors[0]


@pytest.mark.parametrize(("name", "number"), [("run.log", errno.EROFS), (".run.json", errno.ENOSPC)])
def test_a_training_that_cannot_be_written_down_is_told_and_does_not_run(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    def refused(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *given: Any, **named: Any) -> Any:
            if path.name == name:
                raise OSError(number, os.strerror(number))
            return method(path, *given, **named)

        return call

    panel.parameters.folders = [str(tmp_path)]
    panel.ui.runFolderEdit.currentPath = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        for method in ("open", "write_text"):
            patch.setattr(Path, method, refused(getattr(Path, method)))
        panel.ui.startButton.click()
    assert f"({os.strerror(number)}); make room, or choose a folder that can be written" in dialogs.errors[0]
    assert panel.ui.runSelector.count == 0 and {path.name for path in (tmp_path / "run").iterdir()} <= {"run.log"}
    commands = started(panel, monkeypatch, tmp_path / "run")
    panel.ui.startButton.click()
    assert len(commands) == len(dialogs.errors) == 1


def test_files_of_a_data_set_are_not_cleared_away(
    panel: Any, tmp_path: Path, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plan.json", "a.nii.gz"):
        (tmp_path / name).touch()
    commands = started(panel, monkeypatch, tmp_path)
    panel.ui.startButton.click()
    assert "something else than a training" in dialogs.errors[0]
    assert (tmp_path / "plan.json").exists() and commands == []


def test_what_is_under_way_is_not_started_again(
    open_panel: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run")
    panel = open_panel("M4oETraining")
    panel._view.poll = lambda: False
    panel._view.state = "running"
    panel.ui.runFolderEdit.currentPath = f"{run}/"
    panel.onTimer()
    assert not panel.ui.startButton.enabled and "under way" in panel.ui.startButton.toolTip
    panel.ui.runFolderEdit.currentPath = str(tmp_path / "next")
    panel.onTimer()
    assert panel.ui.startButton.enabled and panel.ui.shownRunLabel.text == "Training run, chosen under Runs:"


def test_of_a_forgotten_run_nothing_is_shown(open_panel: Callable[[str], Any], tmp_path: Path) -> None:
    a_run(tmp_path / "run", validated(0, 0.9, 0.9), {"event": "finished"})
    ui = open_panel("M4oETraining").ui
    assert ui.progressBar.value == 100
    ui.forgetButton.click()
    assert (ui.progressBar.value, ui.statusLabel.text, ui.shownRunLabel.text, ui.diceTable.rowCount) == (0, "", "", 0)


def test_the_self_tests_of_both_modules_pass(
    panel: Any, open_panel: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from M4oETraining import M4oETrainingTest

    open_panel("M4oESegmentation")
    from M4oESegmentation import M4oESegmentationTest

    widget = SimpleNamespace(self=lambda: panel)
    monkeypatch.setattr(slicer.modules.m4oetraining, "widgetRepresentation", lambda: widget, raising=False)
    M4oETrainingTest().runTest()
    M4oESegmentationTest().runTest()


def test_the_self_test_passes_while_a_training_runs(
    open_panel: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a_run(tmp_path / "run")
    panel = open_panel("M4oETraining")
    from M4oETraining import M4oETrainingTest

    panel._view.poll, panel._view.state = lambda: False, "running"
    panel.onTimer()
    widget = SimpleNamespace(self=lambda: panel)
    monkeypatch.setattr(slicer.modules.m4oetraining, "widgetRepresentation", lambda: widget, raising=False)
    M4oETrainingTest().runTest()
    assert panel.ui.pauseButton.enabled


def test_no_folder_is_chosen_at_first(panel: Any) -> None:
    assert panel.ui.runFolderEdit.currentPath == ""


@pytest.mark.parametrize("experts", [("ct",), ("ct", "mr_dixon")])
@pytest.mark.parametrize("more", [[], ["--synthesise"], ["--pretrain", "7"], ["--add-modality", "mr_dixon"]])
@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_the_stages_are_those_of_the_training(
    panel: Any, experts: tuple[str, ...], more: list[str], preset: str
) -> None:
    from m4oe import train_command
    from m4oe.training import config, plan_data
    from M4oETrainingLib import Runs

    parser = argparse.ArgumentParser()
    train_command.add_train_command(parser.add_subparsers())
    options = parser.parse_args(["train", "data", "-o", "run", "--quick", "--length", "0.3", *more])
    cases = [SimpleNamespace(case=name, expert=name, modality=name[:2].upper()) for name in experts]
    plan = SimpleNamespace(datasets=[SimpleNamespace(cases=cases)], cases=lambda split: cases, unlabelled=list)
    wanted = train_command._with_options(config.PRESETS[preset], options)
    if options.add_modality:
        stages = config.addition_stages(wanted.stages)
    else:
        stages = plan_data.plan_config(wanted, plan, options.synthesise).stages
    panel.ui.presetSelector.currentIndex = list(config.PRESETS).index(preset)
    panel.parameters.length, panel.parameters.pretrain = 0.3, options.pretrain
    panel.parameters.synthesise, panel.parameters.baseModel = options.synthesise, options.add_modality or ""
    text = Runs.stages(panel.parameters, len(experts))
    assert text == ", ".join(f"{stage.name} {stage.steps:,}" for stage in stages)


def test_the_stages_of_checked_data_are_shown(panel: Any, scans: list[str], tmp_path: Path) -> None:
    assert panel.ui.stagesLabel.text.endswith("(gate: only for several experts)")
    add(panel, tmp_path / "a")
    assert "gate" not in panel.ui.stagesLabel.text and panel._data.experts == {"ct"}
