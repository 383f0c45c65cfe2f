"""The panel M4oETraining, driven as a user would, with trainings of a few voxels in a process of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qt
import slicer
import slicer.util
from harness.application import settle
from m4oe.files import read_volume, write_volume
from m4oe.geometry import Grid, Volume
from m4oe.network.unet import MoESwinUNet
from m4oe.package import save_model
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec, read_spec
from m4oe.training_run import Run

CORE = str(Path(__file__).resolve().parents[2] / "Core")
SHAPE = (4, 20, 20)
AFFINE = np.diag([-2.0, -2.0, 2.0, 1.0])


def a_case(seed: int, modality: str = "CT") -> tuple[Volume, Volume]:
    """A volume of noise with two boxes: 1 liver, 2 spleen."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:3, 4:12, 4:10], labels[1:3, 4:12, 13:18] = 1, 2
    image = np.random.default_rng(seed).normal(-40, 10, SHAPE) + 100.0 * labels
    if modality == "MR":
        image += 300
    else:
        image[0, 0] = -1000
    return Volume(image.astype(np.int16), Grid(SHAPE, AFFINE)), Volume(labels, Grid(SHAPE, AFFINE))


def a_data_set(folder: Path, modality: str = "CT") -> Path:
    """Three cases: train, val, test."""
    rows = ["case,modality,split"]
    for seed, split in enumerate(("train", "val", "test")):
        image, labels = a_case(seed, modality)
        write_volume(folder / f"a{seed}.nii.gz", image)
        write_volume(folder / f"a{seed}_label.nii.gz", labels)
        rows.append(f"a{seed},{modality},{split}")
    (folder / "cases.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return a_data_set(tmp_path / "data")


@pytest.fixture
def installed_model(tmp_path: Path) -> Path:
    """A model of a few weights that has learned nothing, among the installed ones."""
    network = NetworkSpec(experts=1, top_k=1, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0)
    experts, intensity = (ExpertSpec("ct", "CT"),), {"CT": IntensityRule("window", -160, 240)}
    spec = ModelSpec("tiny", "1", network, ("liver", "spleen"), experts, intensity, pixel_mm=2.0, slice_mm=2.0)
    path = tmp_path / "models" / "tiny.safetensors"
    path.parent.mkdir()
    save_model(path, MoESwinUNet(network, len(spec.structures) + 1), spec)
    return path


@pytest.fixture
def panel(open_panel: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("PYTHONPATH", CORE)
    monkeypatch.setattr("shutil.which", lambda name: sys.executable)
    widget = open_panel("M4oETraining")
    yield widget
    if widget._view is not None and widget._view.run.state() in ("running", "pausing"):
        widget._view.run.stop()
        widget._view.run.enforce(0)


def choose(panel: Any, data: Path, run: Path, length: float = 0.01, labels: str = "1=liver,2=spleen") -> None:
    """Adds the data and chooses a miniature training."""
    ui = panel.ui
    ui.labelsEdit.text = labels
    ui.dataFolderEdit.currentPath = str(data)
    ui.addFolderButton.click()
    ui.runFolderEdit.currentPath = str(run)
    ui.presetSelector.currentIndex = 0
    ui.lengthSpinBox.value = length
    ui.nameEdit.text = "mine"


def pick(selector: Any, text: str) -> None:
    """Chooses an item as a user does."""
    number = selector.findText(text)
    assert number >= 0, f"no {text} among {[selector.itemText(n) for n in range(selector.count)]}"
    selector.currentIndex = number
    selector.activated.emit(number)


def segmented(segmentation: Any, volume: Volume, name: str = "CT") -> str:
    """Segments a volume in the other panel with the model of the training; the name of the result."""
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name=name)
    pick(segmentation.ui.modelSelector, "mine 1")
    segmentation.ui.inputSelector.setCurrentNode(node)
    segmentation.ui.applyButton.click()
    settle(lambda: segmentation.runs.run is None)
    assert segmentation.ui.resultLabel.text.partition(": ")[2].startswith("mine ")
    return str(segmentation.parameters.result.GetName())


def state(panel: Any, *wanted: str) -> Callable[[], bool]:
    return lambda: panel._view is not None and panel._view.state in wanted


def test_a_training_is_started_paused_resumed_finished_and_used(
    panel: Any, data: Path, tmp_path: Path, dialogs: Any, open_panel: Callable[[str], Any]
) -> None:
    ui, run = panel.ui, tmp_path / "a run"
    choose(panel, data, run, 0.15)
    assert "dense 48" in ui.stagesLabel.text
    ui.startButton.click()
    assert dialogs.errors == []
    settle(lambda: (run / "events.jsonl").exists(), 600)
    ui.pauseButton.click()
    settle(state(panel, "paused", "failed"), 600)
    assert panel._view.state == "paused" and ui.resumeButton.enabled and not ui.pauseButton.enabled
    before = slicer.app.layoutManager().layout
    ui.plotButton.click()
    pick(ui.plotSelector, "Dice per structure")
    curves = panel._view.curves
    lengths = {name: {curves[name]._table.GetNumberOfRows()} for name in ("loss", "dice")}

    def watched() -> bool:
        if panel._view.state == "running":
            for name, seen in lengths.items():
                seen.add(curves[name]._table.GetNumberOfRows())
        return state(panel, "finished", "failed")()

    ui.resumeButton.click()
    settle(watched, 600)
    assert ui.statusLabel.text.startswith("Finished") and ui.progressBar.value == 100
    assert all(len(seen) > 1 for seen in lengths.values()), lengths  # drawn while it ran
    assert all(curves[name]._table.GetNumberOfRows() == len(curves[name]._rows) for name in lengths)
    assert ui.diceTable.rowCount == 2 and not ui.previewLabel.pixmap.isNull()
    ui.plotSelector.currentIndex = 1
    panel.onPlot()
    assert slicer.modules.plots.logic().shown is panel._view.curves["dice"].chart
    ui.plotButton.click()
    assert slicer.app.layoutManager().layout == before
    path = tmp_path / "models" / "mine.safetensors"
    assert f"M4oE Segmentation offers the model: {path}" in ui.statusLabel.text
    ui.useModelButton.click()  # once more harms nothing
    assert dialogs.errors == [] and path.read_bytes() == (run / "model.safetensors").read_bytes()
    assert segmented(open_panel("M4oESegmentation"), a_case(2)[0]).startswith("CT") and dialogs.errors == []


def real_data(volume: Path, folder: Path, modality: str = "") -> Path:
    """One real volume as the cases for training, validation and test."""
    folder.mkdir()
    for case in ("a0", "a1", "a2"):
        shutil.copyfile(f"{volume}.nii.gz", folder / f"{case}.nii.gz")
        shutil.copyfile(f"{volume}_label_flare13.nii.gz", folder / f"{case}_label.nii.gz")
    rows = ("case,modality,split", f"a0,{modality},train", f"a1,{modality},val", f"a2,{modality},test")
    (folder / "cases.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_a_model_of_a_real_ct_segments_it(
    panel: Any, tmp_path: Path, dialogs: Any, open_panel: Callable[[str], Any], shared_data: Path
) -> None:
    data, run = real_data(shared_data / "ct" / "ts_ct_3mm_small", tmp_path / "data"), tmp_path / "run"
    choose(panel, data, run, 0.001, "1=liver,3=spleen,2=-,4-13=-")
    panel.ui.startButton.click()
    settle(state(panel, "finished", "failed"), 600)
    assert panel.ui.statusLabel.text.startswith("Finished"), panel.ui.statusLabel.text
    spec = read_spec(run / "model.safetensors")
    assert spec.structures == ("liver", "spleen") and spec.expert_names == ("ct",)
    volume = read_volume(data / "a2.nii.gz")
    assert segmented(open_panel("M4oESegmentation"), volume).startswith("CT") and dialogs.errors == []


def test_a_model_that_got_an_expert_for_a_real_mr_segments_it(
    installed_model: Path,
    panel: Any,
    tmp_path: Path,
    dialogs: Any,
    open_panel: Callable[[str], Any],
    shared_data: Path,
) -> None:
    data, run = real_data(shared_data / "mr" / "ts_mr_t1_3mm", tmp_path / "data", "MR"), tmp_path / "run"
    choose(panel, data, run, 0.001, "1=liver,3=spleen,2=-,4-13=-")
    pick(panel.ui.baseModelSelector, "tiny")
    panel.ui.expertEdit.text = "mr_t1"
    panel.ui.startButton.click()
    settle(state(panel, "finished", "failed"), 600)
    assert panel.ui.statusLabel.text.startswith("Finished"), panel.ui.statusLabel.text
    assert read_spec(run / "model.safetensors").expert_names == ("ct", "mr_t1")
    volume = read_volume(data / "a2.nii.gz")
    assert segmented(open_panel("M4oESegmentation"), volume, "MR").startswith("MR") and dialogs.errors == []


def test_data_are_checked_in_the_background(panel: Any, data: Path) -> None:
    (data / "a0_label.nii.gz").unlink()
    choose(panel, data, data.parent / "run")
    settle(lambda: not panel._data.busy, 600)
    panel.onTimer()
    texts = [panel.ui.dataTable.item(0, column).text() for column in range(4)]
    assert texts[1] == "3" and "Liver (2)" in texts[2]
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()
    assert panel.ui.dataTable.rowCount == 0 and panel.parameters.folders == []


def test_what_is_missing_is_told(panel: Any, data: Path, tmp_path: Path, dialogs: Any) -> None:
    panel.ui.startButton.click()
    assert "Choose a folder for the training" in dialogs.errors[-1]
    panel.ui.runFolderEdit.currentPath = str(tmp_path / "run")
    panel.ui.startButton.click()
    assert "Add a data set first" in dialogs.errors[-1]
    panel.ui.addFolderButton.click()
    assert "Choose a folder with a data set" in dialogs.errors[-1]
    panel.ui.addSceneButton.click()
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path / "scene")
    panel.ui.addSceneButton.click()
    assert "no segmentation that belongs to a volume" in dialogs.errors[-1]


def test_a_folder_that_cannot_be_written_is_told(panel: Any, data: Path, tmp_path: Path, dialogs: Any) -> None:
    (tmp_path / "file").touch()
    choose(panel, data, tmp_path / "file" / "run")
    panel.ui.startButton.click()
    assert "can be written" in dialogs.errors[-1] and panel._view is None


def test_a_run_goes_on_when_the_scene_is_closed_and_is_found_again(
    panel: Any, data: Path, tmp_path: Path, open_panel: Callable[[str], Any], scene: Any
) -> None:
    run = tmp_path / "run"
    choose(panel, data, run, 5)
    panel.ui.startButton.click()
    settle(lambda: (run / "events.jsonl").exists(), 600)
    panel.ui.plotButton.click()
    scene.Clear(False)
    assert not panel.ui.plotButton.checked and panel._view.run.state() == "running"
    second = open_panel("M4oETraining")
    assert second.ui.runSelector.currentData == str(run)
    assert second._view.state == "running"
    second.ui.stopButton.click()
    settle(state(second, "stopped"), 600)
    assert second.ui.statusLabel.text == "Stopped; Resume goes on" and second.ui.resumeButton.enabled
    settle(state(panel, "stopped"))
    second.ui.forgetButton.click()
    assert second.ui.runSelector.count == 0 and (run / "checkpoint.safetensors").exists()


# Another Slicer, in which a user starts a training.
SLICER = """
import shutil, sys
from pathlib import Path
tests, settings, data, run = sys.argv[1:]
sys.path.insert(0, tests)
import conftest, qt, test_training
from harness.application import open_module, settle
qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, settings)
shutil.which = lambda name: sys.executable
panel = open_module(conftest.ROOT / "M4oETraining" / "M4oETraining.py")
test_training.choose(panel, Path(data), Path(run), 0.05)
panel.ui.startButton.click()
settle(lambda: False, 600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_a_training_outlives_the_slicer_that_started_it(
    data: Path, tmp_path: Path, open_panel: Callable[[str], Any]
) -> None:
    run, words = tmp_path / "run", [str(Path(__file__).parent), str(tmp_path / "settings")]
    with subprocess.Popen(
        [sys.executable, "-c", SLICER, *words, str(data), str(run)],
        env={**os.environ, "PYTHONPATH": CORE},
        start_new_session=True,
    ) as started:
        settle(lambda: (run / "events.jsonl").exists() or started.poll() is not None, 600)
        os.killpg(started.pid, signal.SIGKILL)  # with all that would end with it, as when a terminal is closed
    assert Run(run).state() == "running"
    panel = open_panel("M4oETraining")
    assert panel.ui.runSelector.currentData == str(run) and panel._view.state == "running"
    settle(state(panel, "finished", "failed"), 600)
    assert Run(run).state() == "finished" and (run / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(panel: Any, data: Path, tmp_path: Path) -> None:
    ui, run = panel.ui, tmp_path / "run"
    choose(panel, data, run, 0.05)
    ui.startButton.click()
    settle((run / "checkpoint.safetensors").exists, 600)
    os.kill(json.loads((run / "run.json").read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
    settle(state(panel, "failed", "finished"), 600)
    assert ui.statusLabel.text.startswith("Failed: it was ended from outside, or crashed\nIt said last: ")
    assert ui.statusLabel.text.endswith("Resume goes on from its last checkpoint.")
    ui.resumeButton.click()
    settle(state(panel, "running"))
    settle(state(panel, "finished", "failed"), 600)
    assert ui.statusLabel.text.startswith("Finished") and (run / "model.safetensors").exists()
    resumed = [event for event in panel._view.run.events_since()[0] if event["event"] == "resumed"]
    assert len(resumed) == 1 and resumed[0]["stage"] + resumed[0]["step"] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs sh and a limit on the size of files")
def test_a_training_without_room_for_its_files_goes_on_when_there_is(
    panel: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui, run, python = panel.ui, tmp_path / "run", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -f 200\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o700)
    monkeypatch.setattr("shutil.which", lambda name: str(python))
    choose(panel, data, run)
    ui.startButton.click()
    settle(state(panel, "failed", "finished"), 600)
    assert ui.statusLabel.text.startswith(f"Failed: cannot write {run}")
    assert "; make room and start again" in ui.statusLabel.text and list(run.glob("*.safetensors")) == []
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    ui.resumeButton.click()
    settle(state(panel, "running"))
    settle(state(panel, "finished", "failed"), 600)
    assert ui.statusLabel.text.startswith("Finished")


def test_an_expert_is_added_to_an_installed_model(
    installed_model: Path, panel: Any, tmp_path: Path, dialogs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui, run = panel.ui, tmp_path / "run"
    choose(panel, a_data_set(tmp_path / "mr", "MR"), run)
    pick(ui.baseModelSelector, "tiny")
    assert ui.stagesLabel.text == "Stages and steps: add 1, add 1" and not ui.synthesiseCheckBox.enabled
    ui.startButton.click()
    assert "Name the expert that the model gets" in dialogs.errors[-1]
    ui.expertEdit.text = "mr_t2"
    ui.startButton.click()
    settle(state(panel, "finished", "failed"), 600)
    assert ui.statusLabel.text.startswith("Finished")
    old, new = read_spec(installed_model), read_spec(run / "model.safetensors")
    assert new.name == "mine" and new.expert_names == (*old.expert_names, "mr_t2")
    opened = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", opened.append)
    ui.reportButton.click()
    assert "Training of mine" in Path(opened[0].toLocalFile()).read_text(encoding="utf-8")
    ui.useModelButton.click()
    assert len(dialogs.errors) == 1 and ui.baseModelSelector.findText("mine") > 0


def show_finished(panel: Any, run: Path, model: Path) -> None:
    """Shows a run that finished while nobody looked, with this model."""
    run.mkdir()
    shutil.move(model, run / "model.safetensors")
    (run / "run.json").write_text('{"command": ["m4oe"], "pid": 0, "birth": ""}', encoding="utf-8")
    (run / "events.jsonl").write_text('{"event": "finished"}\n', encoding="utf-8")
    qt.QSettings().setValue("M4oE/runs", json.dumps([str(run)]))
    panel.enter()


def test_a_model_that_was_finished_before_is_offered_when_the_user_wants(
    installed_model: Path, panel: Any, tmp_path: Path, dialogs: Any
) -> None:
    show_finished(panel, tmp_path / "run", installed_model)
    assert panel.ui.statusLabel.text == "Finished" and not installed_model.exists()
    panel.ui.useModelButton.click()
    assert panel.ui.statusLabel.text == f"M4oE Segmentation offers the model: {installed_model}"
    assert dialogs.errors == [] and read_spec(installed_model).name == "tiny"


def test_a_finished_model_does_not_take_the_place_of_another_of_its_name(
    installed_model: Path, panel: Any, tmp_path: Path, dialogs: Any
) -> None:
    show_finished(panel, tmp_path / "run", installed_model)
    installed_model.write_bytes(b"another model")
    panel._view.state = "running"
    panel.onTimer()
    told = f"{installed_model} is there already. Rename the file, or remove the old one first."
    assert panel.ui.statusLabel.text == f"Finished\nM4oE Segmentation did not get the model: {told}"
    panel.ui.useModelButton.click()
    assert told in dialogs.errors[0] and installed_model.read_bytes() == b"another model"
    installed_model.unlink()
    panel.ui.useModelButton.click()
    assert len(dialogs.errors) == 1 and read_spec(installed_model).name == "tiny"


def test_synthetic_images_are_shown_before_validation_is(panel: Any, data: Path, tmp_path: Path, dialogs: Any) -> None:
    run = tmp_path / "run"
    choose(panel, data, run, 1)
    panel.ui.synthesiseCheckBox.click()
    panel.ui.startButton.click()
    settle(lambda: not panel.ui.previewLabel.pixmap.isNull() or state(panel, "failed")(), 600)
    assert panel._view.state == "running", panel.ui.statusLabel.text
    assert (run / "synthesis.png").exists() and not (run / "previews").exists()
    events, _ = panel._view.run.events_since()
    assert next(event for event in events if event["event"] == "training")["experts"] != ["ct"]


def test_a_run_without_usable_labels_says_which_file_is_broken(panel: Any, data: Path, tmp_path: Path) -> None:
    (data / "a0_label.nii.gz").write_bytes(b"no image")
    choose(panel, data, tmp_path / "run")
    panel.ui.startButton.click()
    settle(state(panel, "failed", "finished"), 600)
    assert panel.ui.statusLabel.text.startswith("Failed: no labelled case is left for training")
    assert "a0_label.nii.gz: it is not a NIfTI-1 file" in panel.ui.statusLabel.text
    assert panel.ui.resumeButton.enabled and not panel.ui.reportButton.enabled


def test_a_run_whose_data_are_gone_says_what_it_did_not_score(panel: Any, data: Path, tmp_path: Path) -> None:
    choose(panel, data, tmp_path / "run", length=0.1)
    panel.ui.startButton.click()
    settle(lambda: panel._view.curves["loss"]._rows or state(panel, "failed")(), 600)
    shutil.rmtree(data)
    settle(state(panel, "failed", "finished"), 600)
    lines = panel.ui.statusLabel.text.splitlines()
    assert lines[0] == "Finished"
    left = [line for line in lines if line.startswith("Left out")]
    assert [line.partition(": There is no file")[0] for line in left] == ["Left out: data/a1", "Left out: data/a2"]


def test_the_open_scene_becomes_a_data_set(panel: Any, tmp_path: Path, dialogs: Any) -> None:
    image, labels = a_case(1)
    volume = slicer.util.addVolumeFromArray(image.array, ijkToRAS=AFFINE, name="Patient 1")
    segmentation = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "drawn")
    segmentation.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    for value, name in ((1, "liver"), (2, "Milz?")):
        segment = segmentation.GetSegmentation().AddEmptySegment(name, name)
        mask = (labels.array == value).astype(np.uint8)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask, segmentation, segment, volume)
    panel.ui.sceneFolderEdit.currentPath = str(tmp_path / "scene")
    panel.ui.addSceneButton.click()
    assert dialogs.errors == []
    assert panel.ui.findingsLabel.text == "Cases written: 1. Left out, as no structure has such a name: Milz?"
    settle(lambda: not panel._data.busy, 600)
    assert "Liver (1)" in panel.ui.dataTable.item(0, 2).text()
    assert (tmp_path / "scene" / "cases.csv").read_text(encoding="utf-8").split()[1] == "Patient_1,CT,ct"


def test_an_estimate_is_shown(panel: Any, data: Path, tmp_path: Path, dialogs: Any) -> None:
    choose(panel, data, tmp_path / "run")
    panel.ui.estimateButton.click()
    settle(lambda: not panel._estimate.busy, 600)
    assert dialogs.errors == [] and panel.ui.estimateLabel.text.startswith("It takes ")


def test_a_chosen_model_is_evaluated_on_chosen_cases(
    installed_model: Path, panel: Any, data: Path, tmp_path: Path, dialogs: Any
) -> None:
    ui, truth = panel.ui, tmp_path / "truth"
    ui.evaluateButton.click()
    assert "Choose the folder of the volumes" in dialogs.errors[-1]
    truth.mkdir()
    (data / "a2_label.nii.gz").rename(truth / "a2.nii.gz")
    (truth / "labels.csv").write_text("label,name\n1,liver\n2,spleen", encoding="utf-8")
    ui.evaluationImagesEdit.currentPath = str(data / "a2.nii.gz")
    ui.evaluationTruthEdit.currentPath = str(truth)
    ui.evaluationFolderEdit.currentPath = str(tmp_path / "scores")
    pick(ui.evaluationModelSelector, "tiny")
    ui.evaluateButton.click()
    settle(lambda: not panel._evaluation.busy, 600)
    assert ui.evaluationLabel.text.startswith("Scores of tiny, "), ui.evaluationLabel.text
    texts = [[ui.evaluationTable.item(row, column).text() for column in (0, 1)] for row in range(2)]
    assert texts == [["Liver", "1"], ["Spleen", "1"]]
    ui.evaluationPlotButton.click()
    chart = slicer.modules.plots.logic().shown
    assert [chart.GetNthPlotSeriesNode(number).GetName() for number in range(2)] == ["Liver", "Spleen"]
    ui.evaluationPlotButton.click()
    assert len(slicer.util.getNodesByClass("vtkMRMLPlotChartNode")) == 1
    ui.evaluationFolderEdit.currentPath = str(tmp_path / "others")
    ui.evaluateButton.click()
    settle(lambda: ui.evaluationStopButton.enabled)
    ui.evaluationStopButton.click()
    settle(lambda: not panel._evaluation.busy, 600)
    assert ui.evaluationLabel.text == "Stopped" and len(dialogs.errors) == 1
    assert ui.evaluationTable.rowCount == 0 and not ui.evaluationPlotButton.enabled


def test_the_choices_stay_with_the_scene(panel: Any, data: Path, tmp_path: Path, scene: Any) -> None:
    choose(panel, data, tmp_path / "run", 2.5)
    panel.ui.synthesiseCheckBox.click()
    settle(lambda: not panel._data.busy)
    folders = list(panel.parameters.folders)
    path = tmp_path / "scene.mrml"
    scene.SetURL(str(path))
    scene.Commit()
    scene.Clear(False)
    assert panel.parameters.folders == [] and not panel.ui.synthesiseCheckBox.checked
    scene.SetURL(str(path))
    scene.Connect()
    assert panel.parameters.folders == folders and panel.ui.lengthSpinBox.value == 2.5
    assert panel.ui.synthesiseCheckBox.checked
    settle(lambda: not panel._data.busy)


def test_the_device_stays_with_the_machine(panel: Any, open_panel: Callable[[str], Any]) -> None:
    pick(panel.ui.deviceSelector, "cpu")
    slicer.mrmlScene.Clear(False)
    assert open_panel("M4oETraining").ui.deviceSelector.currentData == "cpu"


def test_devices_have_names_and_free_memory_when_they_were_asked_for(panel: Any, dialogs: Any) -> None:
    box = panel.ui.deviceSelector
    assert [box.itemText(n) for n in range(box.count)] == ["Automatic", "cuda", "mps", "cpu"]
    pick(box, "cpu")
    panel.ui.refreshDevicesButton.click()
    panel.onTimer()
    assert not panel.ui.refreshDevicesButton.enabled
    settle(lambda: not panel._devices.busy)
    assert dialogs.errors == [] and box.currentData == "cpu"
    assert box.currentText.startswith("CPU, ") and box.currentText.endswith("GB free")
    panel.onTimer()
    assert panel.ui.refreshDevicesButton.enabled


def test_a_settings_list_of_runs_that_is_damaged_is_none(panel: Any) -> None:
    from M4oETrainingLib import Runs

    for text in ("no json", json.dumps([1, "/nowhere"])):
        qt.QSettings().setValue("M4oE/runs", text)
        assert Runs.known() == []
