"""The segmentation panel, used as a user would, with a real worker in another process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import qt
import slicer
import slicer.util
from harness.application import Dialogs, settle

ROOT = Path(__file__).resolve().parents[2]
CT = ROOT.parent / "shared" / "data" / "ct" / "ts_ct_3mm_small.nii.gz"
STRUCTURES = ("liver", "spleen", "kidney_left")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that finds all of its structures in noise."""
    import torch
    from m4oe.network.unet import MoESwinUNet
    from m4oe.package import save_model
    from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec

    spec = ModelSpec(
        name="tiny",
        version="1",
        network=NetworkSpec(experts=2, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0, top_k=1),
        structures=STRUCTURES,
        experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
        intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 1, 99)},
        pixel_mm=2.0,
        slice_mm=3.0,
        licence="Apache-2.0",
        scores={"ct": {"liver": 0.9, "spleen": 0.7}},
    )
    torch.manual_seed(0)
    network = MoESwinUNet(spec.network, len(STRUCTURES) + 1)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_model(path, network, spec)
    return path


@pytest.fixture(scope="session")
def warm_client() -> Iterator[Any]:
    from m4oe.client import Client

    with Client() as client:
        yield client


@pytest.fixture
def panel(open_panel: Callable[[str], Any], tiny_model: Path, warm_client: Any, tmp_path: Path) -> Any:
    """The open panel with the tiny model chosen and a worker that is warm."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.safetensors").symlink_to(tiny_model)
    widget = open_panel("M4oESegmentation")
    widget.logic._client = warm_client
    widget.logic.close = lambda: None
    assert widget.ui.modelSelector.currentText == "tiny 1"
    return widget


def add_volume(shape: tuple[int, ...] = (12, 40, 40), name: str = "CT") -> Any:
    array = np.random.default_rng(0).normal(40, 300, shape).astype(np.int16)
    return slicer.util.addVolumeFromArray(array, ijkToRAS=np.diag([-2.0, -2.0, 3.0, 1.0]), name=name)


def add_frames(count: int) -> Any:
    """A sequence of volumes, each brighter by 1; gives back the node that shows its frames."""
    proxy = add_volume()
    frames = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "frames")
    for number in range(count):
        frames.SetDataNodeAtValue(proxy, str(number))
        slicer.util.arrayFromVolume(proxy)[...] += 1
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    browser.SetAndObserveMasterSequenceNodeID(frames.GetID())
    browser.AddProxyNode(proxy, frames, False)
    return proxy


def apply(panel: Any, volume_node: Any) -> Any:
    """Chooses the volume, presses Apply, waits; returns the new segmentation, or None."""
    panel.ui.inputSelector.setCurrentNode(volume_node)
    panel.ui.applyButton.click()
    finish(panel)
    return panel.parameters.result


def finish(panel: Any) -> None:
    settle(lambda: panel.runs.run is None)


def segmentations() -> list[Any]:
    return slicer.util.getNodesByClass("vtkMRMLSegmentationNode")


def ids(node: Any) -> set[str]:
    return set(node.GetSegmentation().GetSegmentIDs())


# ---- from a volume to a segmentation


def test_apply_makes_a_segmentation_and_shows_what_was_found(panel: Any, dialogs: Dialogs) -> None:
    node = apply(panel, add_volume())
    assert dialogs.said == []
    assert node.GetName() == "CT M4oE segmentation"
    assert ids(node) == set(STRUCTURES)
    ui = panel.ui
    assert ui.resultsTable.rowCount == 3
    assert ui.statusLabel.text.startswith("Done in") and ui.progressBar.value == 100
    assert not ui.resultsCollapsibleButton.collapsed
    assert "tiny 1" in ui.resultLabel.text


def test_the_table_says_what_numpy_says(panel: Any) -> None:
    volume_node = add_volume()
    node = apply(panel, volume_node)
    values = slicer.util.arrayFromVolume(volume_node)
    for row in range(3):
        name, volume, mean, deviation = (panel.ui.resultsTable.item(row, column).text() for column in range(4))
        key = {"Liver": "liver", "Spleen": "spleen", "Left kidney": "kidney_left"}[name]
        inside = slicer.util.arrayFromSegmentBinaryLabelmap(node, key, volume_node) > 0
        assert float(volume) == pytest.approx(inside.sum() * 12 / 1000, abs=0.006)
        assert float(mean) == pytest.approx(values[inside].mean(), abs=0.06)
        assert float(deviation) == pytest.approx(values[inside].std(), abs=0.06)


def test_a_second_apply_leaves_the_first_result(panel: Any) -> None:
    volume_node = add_volume()
    first = apply(panel, volume_node)
    second = apply(panel, volume_node)
    assert len(segmentations()) == 2
    assert second is not first


def test_an_existing_segmentation_keeps_its_other_segments(panel: Any) -> None:
    volume_node = add_volume()
    mine = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    mine.GetSegmentation().AddEmptySegment("lesion", "my lesion")
    panel.ui.outputSelector.setCurrentNode(mine)
    assert apply(panel, volume_node) is mine
    assert ids(mine) == {"lesion", *STRUCTURES}


def test_only_checked_structures_are_made(panel: Any) -> None:
    panel.models.structures.check(["spleen"])
    assert panel.parameters.excludedStructures == ["kidney_left", "liver"]
    assert ids(apply(panel, add_volume())) == {"spleen"}


def test_the_search_hides_and_a_group_checks(panel: Any) -> None:
    ui = panel.ui
    ui.structureSearchBox.text = "kid"
    hidden = [ui.structureList.item(row).isHidden() for row in range(ui.structureList.count)]
    assert hidden.count(False) == 1
    none = ui.presetSelector.count - 1
    ui.presetSelector.activated.emit(none)
    assert panel.models.structures.checked() == ()
    assert not ui.applyButton.enabled
    ui.presetSelector.activated.emit(1)
    assert set(panel.models.structures.checked()) == set(STRUCTURES)


def test_groups_are_offered_that_have_members_with_their_number(panel: Any) -> None:
    structures, selector = panel.models.structures, panel.ui.presetSelector
    structures.show(("liver", "aorta", "liver_tumor", "spleen", "brain"), ())
    offered = [selector.itemText(index) for index in range(selector.count)]
    assert offered == [
        "Check...", "All (5)", "Abdominal organs (AMOS) (3)", "Organs (3)", "Vessels (1)", "Lesions (1)", "None (0)"
    ]  # fmt: skip
    checked = []
    for index in range(1, selector.count):
        selector.activated.emit(index)
        checked.append(set(structures.checked()))
        assert selector.currentIndex == 0
    organs = {"liver", "spleen", "brain"}
    everything = {*organs, "aorta", "liver_tumor"}
    assert checked == [everything, {"liver", "aorta", "spleen"}, organs, {"aorta"}, {"liver_tumor"}, set()]


def color_of(item: Any) -> tuple[int, ...]:
    image = item.icon().pixmap(qt.QSize(12, 12)).toImage()
    return image.pixelColor(6, 6).getRgb()


def test_structures_and_results_have_the_colours_of_the_catalogue_and_of_the_segments(panel: Any) -> None:
    from m4oe.labels import structure

    by_name = {structure(key).name: structure(key).color for key in STRUCTURES}
    names = panel.ui.structureList
    assert {names.item(row).text(): color_of(names.item(row))[:3] for row in range(names.count)} == by_name
    node = apply(panel, add_volume())
    node.GetSegmentation().GetSegment("liver").SetColor(0, 1, 0)
    panel.results.show()
    table = panel.ui.resultsTable
    shown = {table.item(row, 0).text(): color_of(table.item(row, 0))[:3] for row in range(table.rowCount)}
    assert shown == by_name | {"Liver": (0, 255, 0)}


@pytest.mark.parametrize(
    ("spent", "fraction", "sentence"),
    [
        (0.5, 0.5, "Segmenting"),
        (10, 0.0, "Segmenting"),
        (10, 0.25, "Segmenting, 30 s left"),
        (40, 1 / 3, "Segmenting, 1 min 20 s left"),
    ],
)
def test_the_time_left_is_told_once_it_can_be_known(
    spent: float, fraction: float, sentence: str, monkeypatch: pytest.MonkeyPatch, panel: Any
) -> None:
    from M4oESegmentationLib import Run

    run = object.__new__(Run.Run)
    run._events, run._cancelled, run._volumes, run._started = ("segment", fraction), False, [None], 100.0
    monkeypatch.setattr(Run.time, "monotonic", lambda: 100.0 + spent)
    assert run.progress() == (fraction, sentence)


def test_naming_an_expert_overrules_the_gate(panel: Any) -> None:
    panel.ui.expertSelector.currentIndex = panel.ui.expertSelector.findData("mr")
    panel.ui.expertSelector.activated.emit(2)
    apply(panel, add_volume())
    assert "Expert mr, named by you." in panel.ui.resultLabel.text


def test_the_uncertainty_is_a_volume_beside_the_input(panel: Any) -> None:
    volume_node = add_volume()
    panel.ui.uncertaintyCheckBox.checked = True
    apply(panel, volume_node)
    node = slicer.util.getNode("CT M4oE uncertainty")
    array = slicer.util.arrayFromVolume(node)
    assert array.shape == (12, 40, 40)
    assert 0 < array.max() <= 100


def test_the_result_follows_the_transform_of_its_volume(panel: Any) -> None:
    volume_node = add_volume()
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    matrix = np.eye(4)
    matrix[:3, 3] = (50, 0, 10)
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    volume_node.SetAndObserveTransformNodeID(transform.GetID())
    node = apply(panel, volume_node)
    assert node.GetParentTransformNode() is transform


def test_the_result_lies_in_the_study_of_its_volume(panel: Any) -> None:
    volume_node = add_volume()
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    study = tree.CreateStudyItem(tree.GetSceneItemID(), "study")
    tree.SetItemParent(tree.GetItemByDataNode(volume_node), study)
    node = apply(panel, volume_node)
    assert tree.GetItemParent(tree.GetItemByDataNode(node)) == study


def test_all_frames_become_a_sequence_with_a_report_each(panel: Any) -> None:
    from M4oESegmentationLib.Reports import reportOf

    proxy = add_frames(3)
    panel.ui.inputSelector.setCurrentNode(proxy)
    assert panel.ui.allFramesCheckBox.visible or not panel.parent.visible
    panel.ui.allFramesCheckBox.checked = True
    apply(panel, proxy)
    result = [node for node in slicer.util.getNodesByClass("vtkMRMLSequenceNode") if node.GetName() != "frames"]
    assert [node.GetNumberOfDataNodes() for node in result] == [3]
    assert ids(result[0].GetNthDataNode(2)) == set(STRUCTURES)
    reports = [reportOf(result[0].GetNthDataNode(number)) for number in range(3)]
    assert len({report.intensities["liver"] for report in reports}) == 3


def test_frames_wanted_of_another_volume_do_not_count(panel: Any) -> None:
    panel.ui.allFramesCheckBox.checked = panel.ui.uncertaintyCheckBox.checked = True
    apply(panel, add_volume())
    assert panel.ui.uncertaintyCheckBox.enabled
    assert slicer.util.getNode("CT M4oE uncertainty") is not None


def test_results_that_the_user_has_closed_stay_closed(panel: Any) -> None:
    apply(panel, add_volume())
    panel.ui.resultsCollapsibleButton.collapsed = True
    panel.ui.qualitySelector.currentIndex = 1
    assert panel.ui.resultsCollapsibleButton.collapsed


def test_a_volume_is_proposed_that_was_loaded_meanwhile_and_no_label_map(panel: Any) -> None:
    label_map = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
    panel.enter()
    assert panel.parameters.inputVolume is None
    assert panel.ui.statusLabel.text == "Choose a CT or MR volume."
    volume_node = add_volume()
    panel.enter()
    assert panel.parameters.inputVolume is volume_node is not label_map
    assert panel.ui.statusLabel.text == ""


def test_a_reason_goes_when_it_applies_no_more(panel: Any) -> None:
    assert panel.ui.statusLabel.text == "Choose a CT or MR volume."
    panel.ui.inputSelector.setCurrentNode(add_volume())
    assert panel.ui.statusLabel.text == ""
    panel.models.structures.check([])
    assert panel.ui.statusLabel.text == "Check at least one structure."
    panel.models.structures.check(["liver"])
    assert panel.ui.statusLabel.text == ""


# ---- what a model and a report say


def make_report(**changes: Any) -> Any:
    from m4oe.jobs import Report

    values = {name: {} for name in ("gate", "seconds", "peak_memory_mib", "intensities", "confidence", "flags")}
    values |= {"model": "tiny 1", "device": "cpu", "precision": "float32", "chosen_by": "gate", "warnings": ()}
    values |= {"expert_weights": {"ct": 1.0, "mr": 0.0}, "volumes_ml": {"liver": 2.0}}
    return Report(**{**values, **changes})


def test_a_model_says_what_it_was_scored_on(panel: Any) -> None:
    from dataclasses import replace

    from M4oESegmentationLib.Models import describe

    (spec,) = (spec for spec in panel.models.specs.values() if spec.name == "tiny")
    assert "Dice on cases that training did not see" in describe(spec)
    told = {"data": "1 CT & labels", "real volumes": "never seen: liver 0.8"}
    told_of = describe(replace(spec, limits="no tumour is found", training=told))
    assert all(words in told_of for words in ("no tumour is found", "1 CT &amp; labels", "never seen: liver 0.8"))
    assert "ct 0.80 (0.70 to 0.90)" in describe(spec)
    assert "Dice on computer-made phantoms" in describe(replace(spec, training={"data": "1 CT, phantoms"}))
    assert "Dice on validation cases" in describe(replace(spec, training={"scored_on_validation": ["ct"]}))


def test_what_was_checked_and_not_found_has_a_row(panel: Any) -> None:
    from M4oESegmentationLib.Results import rows, warningsText

    report = make_report(volumes_ml={"liver": 2.0, "spleen": 0.0})
    assert [(row[0], row[1], row[-1]) for row in rows(report)] == [("Liver", "2.00", ""), ("Spleen", "0", "not found")]
    assert warningsText(report) == ""
    assert "limits stand above" in warningsText(make_report(volumes_ml={"liver": 0.0}))


def test_the_gate_is_named_where_it_chose_and_else_alone(panel: Any) -> None:
    from M4oESegmentationLib.Results import expertText, gateText

    gate = {"ct": 0.3, "mr": 0.68, "other": 0.02}
    report = make_report(gate=gate, chosen_by="modality")
    assert expertText(report) == "Expert ct, chosen by the header or HU."
    text = gateText(report)
    assert text.startswith("The gate alone would say:")
    bar, _, below = text.partition("</table>")
    assert [f'width="{share}"' in bar for share in ("30%", "68%", "2%")] == [True, True, True]
    assert ("mr&nbsp;68%" in bar, "mr" in below) == (True, False)
    assert ("other" in bar, "other&nbsp;2%" in below) == (False, True)
    bar, _, below = gateText(make_report(gate={"ct": 0.998, "mr": 0.002})).partition("</table>")
    assert (bar.count("<td"), "mr&nbsp;0%" in below) == (1, True)
    chosen = make_report(gate=gate, expert_weights={"mr": 1.0})
    assert expertText(chosen) == "Expert mr, chosen by the gate (68%)."
    assert gateText(chosen).startswith("The gate says:")
    assert gateText(make_report()) == ""


def test_the_table_has_units_and_cannot_be_edited(panel: Any) -> None:
    apply(panel, add_volume())
    table = panel.ui.resultsTable
    assert table.horizontalHeaderItem(2).text() == "Mean\n(HU)"
    assert table.editTriggers == panel.ui.batchTable.editTriggers == 0


# ---- what goes wrong


def finish_unseen(panel: Any, volume_node: Any) -> None:
    """Applies, and lets the worker end before the panel looks at it."""
    panel.ui.inputSelector.setCurrentNode(volume_node)
    panel.ui.applyButton.click()
    panel._timer.stop()
    panel.runs.run._job.result()


def test_a_result_of_a_closed_scene_is_not_put_on_a_volume_of_the_next(panel: Any, dialogs: Dialogs) -> None:
    first = add_volume()
    finish_unseen(panel, first)
    slicer.mrmlScene.Clear(False)
    assert add_volume(name="another").GetID() == "vtkMRMLScalarVolumeNode1"
    panel.onTimer()
    assert panel.runs.run is None
    assert segmentations() == []
    assert dialogs.errors == []


def test_cancel_between_two_frames_stops_all(panel: Any) -> None:
    panel.ui.allFramesCheckBox.checked = True
    finish_unseen(panel, add_frames(2))
    panel.ui.cancelButton.click()
    panel.onTimer()
    assert panel.runs.run is None
    assert panel.ui.statusLabel.text == "Cancelled; nothing was changed."


def test_a_result_that_cannot_be_shown_leaves_nothing(
    panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from m4oe import nodes

    def fail(*arguments: Any) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(nodes, "segmentation_to_node", fail)
    apply(panel, add_volume())
    assert segmentations() == []
    assert "a fault" in dialogs.errors[0]
    assert panel.ui.applyButton.enabled


@pytest.mark.parametrize("text", ["damaged", "eyJmdXR1cmUiOiAxfQ=="])
def test_a_report_that_cannot_be_read_is_none(panel: Any, text: str) -> None:
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetAttribute("M4oE.report", text)
    panel.parameters.result = node
    assert panel.ui.resultsCollapsibleButton.collapsed
    assert panel.ui.resultsTable.rowCount == 0


def test_a_deleted_result_is_no_longer_shown(panel: Any) -> None:
    slicer.mrmlScene.RemoveNode(apply(panel, add_volume()))
    assert panel.ui.resultsTable.rowCount == 0
    assert not panel.ui.csvButton.enabled


def test_the_worker_is_not_asked_while_it_segments(panel: Any) -> None:
    panel.ui.inputSelector.setCurrentNode(add_volume())
    panel.ui.applyButton.click()
    assert not panel.ui.refreshDevicesButton.enabled
    finish(panel)
    assert panel.ui.refreshDevicesButton.enabled


def test_cancel_changes_nothing_and_apply_works_again(panel: Any) -> None:
    volume_node = add_volume((60, 200, 200))
    panel.ui.inputSelector.setCurrentNode(volume_node)
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.startswith("Segmenting"))
    assert panel.ui.cancelButton.enabled
    assert not panel.ui.applyButton.enabled
    panel.ui.cancelButton.click()
    finish(panel)
    assert segmentations() == []
    assert panel.ui.statusLabel.text == "Cancelled; nothing was changed."
    assert apply(panel, add_volume()) is not None


def test_closing_the_scene_stops_the_run(panel: Any, dialogs: Dialogs) -> None:
    panel.ui.inputSelector.setCurrentNode(add_volume((60, 200, 200)))
    panel.ui.applyButton.click()
    slicer.mrmlScene.Clear(False)
    finish(panel)
    assert segmentations() == []
    assert dialogs.errors == []
    assert apply(panel, add_volume()) is not None


def test_a_volume_deleted_meanwhile_is_told(panel: Any, dialogs: Dialogs) -> None:
    volume_node = add_volume((30, 80, 80))
    panel.ui.inputSelector.setCurrentNode(volume_node)
    panel.ui.applyButton.click()
    slicer.mrmlScene.RemoveNode(volume_node)
    finish(panel)
    assert segmentations() == []
    assert ["was removed while" in text for text in dialogs.errors] == [True]


def test_a_dead_worker_is_told_and_replaced(panel: Any, dialogs: Dialogs) -> None:
    panel.ui.inputSelector.setCurrentNode(add_volume((60, 200, 200)))
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.startswith("Segmenting"))
    os.kill(panel.logic.client()._connection._process.pid, signal.SIGKILL)
    finish(panel)
    assert segmentations() == []
    assert "memory" in dialogs.errors[0]
    assert apply(panel, add_volume()) is not None


def whole_scene() -> list[Any]:
    """All nodes, all items of the subject hierarchy with their parents, and what the segmentations hold."""
    scene = slicer.mrmlScene
    nodes = [scene.GetNthNode(number) for number in range(scene.GetNumberOfNodes())]
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    items: list[int] = []
    tree.GetItemChildren(tree.GetSceneItemID(), items, True)
    return [
        [(node.GetID(), node.GetName()) for node in nodes],
        [(item, tree.GetItemName(item), tree.GetItemParent(item)) for item in items],
        [(node.GetSegmentation().GetMTime(), node.GetAttribute("M4oE.report")) for node in segmentations()],
    ]


_GREETED = """
import json, time
from m4oe.jobs import GREETING, PROTOCOL
print(json.dumps({GREETING: "1", "protocol": PROTOCOL, "bytes": 0}), flush=True)
"""
_FLOOD = """
import sys
sys.stdin.readline()
sys.stderr.write("noise\\n" * 200_000 + "the last word\\n")
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("worker", "cancelled", "said"),
    [
        ("import time; time.sleep(600)", False, "The worker did not answer within 1 s"),
        (_GREETED + _FLOOD, False, "the last word"),
        (_GREETED + "time.sleep(600)", True, ""),
    ],
    ids=["never answers", "floods stderr and dies", "ignores cancel"],
)
@pytest.mark.parametrize("given", [False, True], ids=["a new segmentation", "a given one"])
def test_a_worker_that_fails_leaves_the_whole_scene_as_it_was(
    given: bool, worker: str, cancelled: bool, said: str, panel: Any, dialogs: Dialogs
) -> None:
    from m4oe.client import Client

    panel.ui.inputSelector.setCurrentNode(add_volume())
    if given:
        mine = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
        mine.GetSegmentation().AddEmptySegment("lesion", "my lesion")
        panel.ui.outputSelector.setCurrentNode(mine)
    panel.ui.uncertaintyCheckBox.checked = True
    before = whole_scene()
    with Client([sys.executable, "-c", worker], timeout=60 if _GREETED in worker else 1) as client:
        panel.logic._client = client
        panel.ui.applyButton.click()
        if cancelled:
            panel.ui.cancelButton.click()
        finish(panel)
    assert whole_scene() == before
    assert panel.ui.statusLabel.text == (
        "Cancelled; nothing was changed." if cancelled else "Failed; nothing was changed."
    )
    assert len(dialogs.said) == (not cancelled) and all(said in text for text in dialogs.errors)
    assert panel.ui.applyButton.enabled


def test_missing_torch_is_told_with_the_cure(panel: Any, dialogs: Dialogs, tmp_path: Path) -> None:
    from m4oe.client import Client, worker_command

    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')", encoding="utf-8")
    with Client(worker_command(), {**os.environ, "PYTHONPATH": str(tmp_path)}) as client:
        panel.logic._client = client
        apply(panel, add_volume())
    assert segmentations() == []
    assert "package is missing" in dialogs.errors[0]
    assert sys.executable in dialogs.errors[0]


def test_without_a_model_apply_says_so(
    open_panel: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from m4oe import spec

    monkeypatch.setattr(spec, "model_folders", lambda: [tmp_path / "models"])
    panel = open_panel("M4oESegmentation")
    add_volume()
    assert not panel.ui.applyButton.enabled
    assert panel.ui.statusLabel.text == "No model is installed. Import a model file."
    assert not panel.ui.batchStartButton.enabled


def test_a_damaged_model_is_left_out(panel: Any, tmp_path: Path) -> None:
    (tmp_path / "models" / "broken.safetensors").write_bytes(b"nothing")
    panel.enter()
    names = [panel.ui.modelSelector.itemText(index) for index in range(panel.ui.modelSelector.count)]
    assert names[0] == "tiny 1"
    assert not any("broken" in name for name in names)


def test_a_python_that_is_not_there_is_told(open_panel: Callable[[str], Any], dialogs: Dialogs) -> None:
    panel = open_panel("M4oESegmentation")
    panel.ui.workerSelector.currentIndex = panel.ui.workerSelector.findData("python")
    panel.ui.pythonPathEdit.currentPath = "/nowhere/python"
    panel.worker.save()
    apply(panel, add_volume())
    assert "'/nowhere/python' cannot be started" in dialogs.errors[0]
    assert panel.ui.applyButton.enabled


def test_a_table_that_cannot_be_written_is_told(
    panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    apply(panel, add_volume())
    target = tmp_path / "table.csv"
    monkeypatch.setattr(qt.QFileDialog, "getSaveFileName", lambda *arguments: str(target))
    panel.ui.csvButton.click()
    rows = target.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("segmentation,model,Structure,mL,Mean (")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *rest, **more: open("/dev/full", "w"))  # noqa: PTH123, SIM115
        panel.ui.csvButton.click()
    assert "No space left" in dialogs.errors[0]
    assert target.read_text(encoding="utf-8").splitlines() == rows


# ---- the scene


def test_choices_and_result_come_back_with_the_scene(
    panel: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "models" / "other.safetensors").symlink_to(tiny_model)
    panel.enter()
    choose(panel.ui.modelSelector, str(tmp_path / "models" / "tiny.safetensors"))
    choose(panel.ui.expertSelector, "mr")
    panel.models.structures.check(["liver", "spleen"])
    panel.ui.qualitySelector.currentIndex = 1
    panel.ui.uncertaintyCheckBox.checked = panel.ui.allFramesCheckBox.checked = True
    apply(panel, add_volume())
    rows = panel.ui.resultsTable.rowCount
    scene = tmp_path / "scene.mrb"
    assert slicer.mrmlScene.WriteToMRB(str(scene))
    slicer.mrmlScene.Clear(False)
    assert panel.ui.resultsTable.rowCount == 0
    (tmp_path / "models").rename(tmp_path / "moved")  # models of another machine lie in another folder
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "moved"))
    load_bundle(scene, tmp_path)
    assert panel.parameters.inputVolume.GetName() == "CT"
    assert panel.models.model == str(tmp_path / "moved" / "tiny.safetensors")
    assert panel.models.expert == "mr"
    assert panel.parameters.excludedStructures == ["kidney_left"]
    assert panel.parameters.quality.value == "fast"
    assert panel.parameters.uncertainty and panel.parameters.allFrames
    assert panel.ui.resultsTable.rowCount == rows > 0
    assert panel.ui.applyButton.enabled


def choose(selector: Any, data: str) -> None:
    """Chooses an entry as a user does."""
    selector.currentIndex = selector.findData(data)
    selector.activated.emit(selector.currentIndex)


def test_a_scene_whose_model_is_not_installed_says_so_and_runs_no_other(
    panel: Any, tiny_model: Path, dialogs: Dialogs, tmp_path: Path
) -> None:
    apply(panel, add_volume())
    panel.parameters.model, panel.parameters.expert = "special", "mr"
    panel.enter()
    reason = "The model special is not installed here. Import its file, or choose another model."
    assert panel.ui.modelSelector.currentText == "special (missing)"
    assert panel.ui.statusLabel.text == panel.ui.modelInfoLabel.text == reason
    assert not panel.ui.applyButton.enabled and not panel.ui.batchStartButton.enabled
    (tmp_path / "models" / "special.safetensors").symlink_to(tiny_model)
    panel.enter()
    assert panel.models.model == str(tmp_path / "models" / "special.safetensors")
    assert panel.models.expert == "mr"
    assert panel.ui.statusLabel.text == "" and panel.ui.applyButton.enabled


def test_an_expert_that_the_model_lacks_is_not_replaced_by_the_gate(panel: Any) -> None:
    panel.parameters.inputVolume = add_volume()
    panel.parameters.expert = "pet"
    panel.enter()
    assert panel.ui.expertSelector.currentText == "pet (missing)"
    assert panel.ui.statusLabel.text == "The model tiny has no expert pet. Choose another expert or model."
    assert not panel.ui.applyButton.enabled
    choose(panel.ui.expertSelector, "ct")
    assert panel.ui.statusLabel.text == "" and panel.ui.applyButton.enabled


@pytest.mark.parametrize("path", ["/home/me/.m4oe/models/tiny.safetensors", r"C:\Users\me\tiny.safetensors"])
def test_a_scene_that_holds_the_path_of_a_model_finds_the_one_of_its_name(path: str, panel: Any) -> None:
    panel.parameters.model = path
    panel.enter()
    assert panel.ui.modelSelector.currentText == "tiny 1"


def load_bundle(path: Path, folder: Path) -> None:
    import zipfile

    zipfile.ZipFile(path).extractall(folder / "bundle")
    (scene_file,) = (folder / "bundle").rglob("*.mrml")
    slicer.mrmlScene.SetURL(str(scene_file))
    slicer.mrmlScene.Connect()


# ---- further use of a result


def test_the_segment_editor_opens_with_result_and_volume(panel: Any) -> None:
    editor = SimpleNamespace()
    editor.setSegmentationNode = lambda node: setattr(editor, "segmentation", node)
    editor.setSourceVolumeNode = lambda node: setattr(editor, "volume", node)
    representation = SimpleNamespace(self=lambda: SimpleNamespace(editor=editor))
    slicer.modules.segmenteditor = SimpleNamespace(widgetRepresentation=lambda: representation)
    volume_node = add_volume()
    node = apply(panel, volume_node)
    panel.ui.editButton.click()
    assert slicer.app.selected == "SegmentEditor"
    assert (editor.segmentation, editor.volume) == (node, volume_node)


def test_show_3d_makes_surfaces(panel: Any) -> None:
    node = apply(panel, add_volume())
    panel.ui.show3DButton.click()
    assert node.GetClosedSurfaceInternalRepresentation("liver").GetNumberOfPoints() > 0


def test_dicom_needs_a_volume_of_the_database(panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicer, "dicomDatabase", SimpleNamespace(isOpen=True, instanceValue=lambda *tags: ""))
    apply(panel, add_volume())
    panel.ui.dicomButton.click()
    assert "was not loaded from Slicer's DICOM database" in dialogs.errors[0]


def test_a_slicer_without_dicom_seg_says_what_to_install(
    panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slicer, "dicomDatabase", SimpleNamespace(isOpen=True, instanceValue=lambda *tags: "CT"))
    library = ModuleType("DICOMLib")
    library.DICOMUtils = None
    monkeypatch.setitem(sys.modules, "DICOMLib", library)
    volume_node = add_volume()
    volume_node.SetAttribute("DICOM.instanceUIDs", "1.2.3")
    apply(panel, volume_node)
    panel.ui.dicomButton.click()
    assert "QuantitativeReporting" in dialogs.errors[0]


def test_dicom_seg_goes_into_the_database(panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicer, "dicomDatabase", SimpleNamespace(isOpen=True, instanceValue=lambda *tags: "CT"))
    exported, imported = SimpleNamespace(), []

    class Plugin:
        def examineForExport(self, item: int) -> list[Any]:
            exported.item = item
            return [exported]

        def export(self, exportables: list[Any]) -> str:
            assert Path(exportables[0].directory).is_dir()
            return ""

    plugin, library = ModuleType("DICOMSegmentationPlugin"), ModuleType("DICOMLib")
    plugin.DICOMSegmentationPluginClass = Plugin
    library.DICOMUtils = SimpleNamespace(importDicom=lambda *arguments: imported.append(arguments))
    monkeypatch.setitem(sys.modules, "DICOMSegmentationPlugin", plugin)
    monkeypatch.setitem(sys.modules, "DICOMLib", library)
    volume_node = add_volume()
    volume_node.SetAttribute("DICOM.instanceUIDs", "1.2.3")
    node = apply(panel, volume_node)
    panel.ui.dicomButton.click()
    assert dialogs.errors == []
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    assert exported.item == tree.GetItemByDataNode(node)
    assert imported[0][1:] == (slicer.dicomDatabase, True)


# ---- machine


def test_devices_are_listed_with_their_free_memory(panel: Any) -> None:
    from m4oe.predictor import why_cpu

    panel.ui.refreshDevicesButton.click()
    settle(lambda: panel.worker.job is None)
    texts = [panel.ui.deviceSelector.itemText(index) for index in range(panel.ui.deviceSelector.count)]
    assert any(re.fullmatch(r"CPU, \d+ cores, [\d.]+ GB free", text) for text in texts)
    cpu = panel.ui.deviceSelector.findData("cpu")
    tip = panel.ui.deviceSelector.itemData(cpu, qt.Qt.ToolTipRole)
    assert tip.startswith("CPU, ") and tip.endswith(why_cpu() or "GB free")
    panel.ui.deviceSelector.currentIndex = cpu
    panel.ui.deviceSelector.activated.emit(cpu)
    apply(panel, add_volume())
    assert panel.ui.statusLabel.text.endswith("on cpu.")


def test_the_first_run_of_a_worker_lists_its_devices(
    panel: Any, warm_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    begin_info = warm_client.begin_info
    monkeypatch.setattr(warm_client, "begin_info", lambda: (asked.append("info"), begin_info())[1])
    assert panel.ui.deviceSelector.count == 1
    for _run in range(2):
        apply(panel, add_volume())
        assert panel.ui.deviceSelector.itemText(1).endswith("GB free")
        assert panel.ui.statusLabel.text.startswith("Done in")
    assert asked == ["info"]


def test_a_scene_closed_while_the_devices_are_asked_for_takes_the_result_along(
    panel: Any, warm_client: Any, monkeypatch: pytest.MonkeyPatch, dialogs: Dialogs
) -> None:
    begin_info, ids_before = warm_client.begin_info, []

    def close_and_ask() -> Any:
        ids_before.append(segmentations()[0].GetID())
        slicer.mrmlScene.Clear(False)
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "another")
        return begin_info()

    monkeypatch.setattr(warm_client, "begin_info", close_and_ask)
    assert apply(panel, add_volume()) is None
    assert [node.GetID() for node in segmentations()] == ids_before and dialogs.errors == []


@pytest.mark.parametrize("end", ["cancel", "close the scene"])
def test_cancel_ends_the_wait_for_devices_that_a_worker_does_not_tell(
    end: str, panel: Any, warm_client: Any, monkeypatch: pytest.MonkeyPatch, dialogs: Dialogs
) -> None:
    from m4oe.jobs import Cancelled, Job

    job: Job[Any] = Job(lambda header, payload: None)
    job.start(lambda: job.fail(Cancelled("cancelled")))
    monkeypatch.setattr(warm_client, "begin_info", lambda: job)
    panel.ui.inputSelector.setCurrentNode(add_volume())
    panel.ui.applyButton.click()
    settle(lambda: panel.worker.job is job)
    assert panel.ui.cancelButton.enabled
    if end == "cancel":
        panel.ui.cancelButton.click()
    else:
        slicer.mrmlScene.Clear(False)
    finish(panel)
    assert dialogs.said == []
    assert (panel.parameters.result is None) == (end != "cancel")
    add_volume()
    panel.enter()
    assert panel.ui.applyButton.enabled


def test_a_worker_that_the_settings_no_longer_name_is_not_asked(panel: Any, warm_client: Any) -> None:
    panel.worker._asked = None
    panel.logic._client = None
    panel.ui.workerSelector.currentIndex = panel.ui.workerSelector.findData("ssh")
    panel.ui.hostEdit.text = "gpu1"
    panel.worker.save()
    assert panel.worker.askOnce(warm_client)
    assert panel.worker.job is None


def test_opening_the_panel_starts_no_worker(open_panel: Callable[[str], Any]) -> None:
    assert open_panel("M4oESegmentation").logic._client is None


def test_settings_of_the_machine_are_found_again(open_panel: Callable[[str], Any]) -> None:
    panel = open_panel("M4oESegmentation")
    panel.ui.workerSelector.currentIndex = panel.ui.workerSelector.findData("ssh")
    panel.ui.hostEdit.text = "gpu1"
    panel.worker.save()
    again = open_panel("M4oESegmentation")
    assert (again.ui.workerSelector.currentData, again.ui.hostEdit.text) == ("ssh", "gpu1")
    assert again.ui.hostEdit.enabled
    assert not again.ui.pythonPathEdit.enabled


@pytest.mark.parametrize("place", ["slicer", "python"])
def test_each_python_does_all_of_its_work_in_its_own_environment(
    place: str, panel: Any, five_cases: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dialogs: Dialogs
) -> None:
    """What Slicer's launcher sets would mislead another Python; Slicer's own needs it."""
    interpreter, log = tmp_path / "bin" / "PythonSlicer", tmp_path / "log.txt"
    interpreter.parent.mkdir()
    interpreter.write_text(
        f'#!/bin/sh\necho "$5 ${{SLICER_HOME-none}}" >>"{log}"\nexec "{sys.executable}" "$@"\n', encoding="utf-8"
    )
    interpreter.chmod(0o755)
    monkeypatch.setenv("SLICER_HOME", "Slicer's")
    if place == "slicer":
        monkeypatch.setenv("PATH", str(interpreter.parent), prepend=os.pathsep)
    else:
        choose(panel.ui.workerSelector, "python")
        panel.ui.pythonPathEdit.currentPath = str(interpreter)
    del panel.logic.close
    panel.logic._client = None
    assert ids(apply(panel, add_volume())) == set(STRUCTURES)
    panel.logic.close()
    panel.ui.doctorButton.click()
    settle(lambda: panel.setupSection.process is None)
    for case in ("bad", "case1", "case2", "case3"):
        (five_cases / f"{case}.nii.gz").unlink()
    start_batch(panel, five_cases, tmp_path / "results")
    settle(lambda: panel.batches.batch is None)
    assert dialogs.said == []
    assert panel.ui.batchStatusLabel.text == "1 done, 0 skipped, 0 failed"
    found = "Slicer's" if place == "slicer" else "none"
    assert log.read_text(encoding="utf-8").splitlines() == [f"worker {found}", f"doctor {found}", f"segment {found}"]


@pytest.mark.parametrize("version", ["1", "2"])
def test_another_machine_segments_with_its_own_model_of_the_same_name_and_version(
    version: str, panel: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dialogs: Dialogs
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    save_again(tiny_model, there / "tiny.safetensors", version)
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        f'#!/bin/sh\nshift 4\nM4OE_MODELS="{there}" exec "{sys.executable}" -m m4oe "$@"\n', encoding="utf-8"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=os.pathsep)
    panel.ui.workerSelector.currentIndex = panel.ui.workerSelector.findData("ssh")
    panel.ui.hostEdit.text = "gpu1"
    panel.worker.save()
    del panel.logic.close
    panel.logic._client = None
    node = apply(panel, add_volume())
    panel.logic.close()
    if version == "1":
        assert dialogs.said == [] and ids(node) == set(STRUCTURES)
    else:
        assert "used the model tiny 2, here it is tiny 1: install the same one there" in dialogs.said[0][1]
        assert segmentations() == []


def save_again(model: Path, path: Path, version: str) -> None:
    """A model under another version."""
    from dataclasses import replace

    from m4oe.package import load_model, save_model

    network, spec = load_model(model)
    save_model(path, network, replace(spec, version=version))


def test_a_later_frame_that_cannot_be_shown_leaves_the_chosen_segmentation_as_it_was(
    panel: Any, monkeypatch: pytest.MonkeyPatch, dialogs: Dialogs
) -> None:
    from m4oe import nodes

    node = apply(panel, volume_node := add_frames(2))
    edited = np.zeros(slicer.util.arrayFromVolume(volume_node).shape, np.uint8)
    edited[3:5, 3:5, 3:5] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(edited, node, "liver", volume_node)
    geometry = node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole())
    report, name, display = node.GetAttribute("M4oE.report"), node.GetName(), node.GetDisplayNodeID()
    volume_node = add_frames(2)
    panel.ui.inputSelector.setCurrentNode(volume_node)
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    volume_node.SetAndObserveTransformNodeID(transform.GetID())
    shown = iter((nodes.segmentation_to_node,))
    monkeypatch.setattr(nodes, "segmentation_to_node", lambda *given: next(shown)(*given))
    panel.ui.outputSelector.setCurrentNode(node)
    panel.ui.allFramesCheckBox.checked = True
    panel.ui.applyButton.click()
    finish(panel)
    assert "The segmentation failed" in dialogs.said[0][1]
    assert np.array_equal(slicer.util.arrayFromSegmentBinaryLabelmap(node, "liver"), edited)
    assert node.GetTransformNodeID() is None
    assert node.GetNodeReferenceID(node.GetReferenceImageGeometryReferenceRole()) == geometry
    assert (node.GetAttribute("M4oE.report"), node.GetName(), node.GetDisplayNodeID()) == (report, name, display)


def test_a_model_is_imported_and_chosen(
    panel: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dialogs: Dialogs
) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(tiny_model.read_bytes())
    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", lambda *arguments: str(mine))
    panel.ui.importModelButton.click()
    assert panel.ui.modelSelector.currentData == str(tmp_path / "models" / "mine.safetensors")
    panel.ui.importModelButton.click()
    assert "is there already" in dialogs.errors[0]


def test_the_folder_of_models_is_shown_and_made_before(
    panel: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(qt.QDesktopServices, "openUrl", opened.append)
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path / "new"))
    panel.ui.showModelsButton.click()
    assert [url.toLocalFile() for url in opened] == [str(tmp_path / "new")]
    assert (tmp_path / "new").is_dir()


# ---- headless, and real


def test_the_logic_segments_without_a_panel(tiny_model: Path, warm_client: Any, panel: Any) -> None:
    from M4oESegmentation import M4oESegmentationLogic

    logic = M4oESegmentationLogic(client=warm_client)
    node, report = logic.process(add_volume(), model=tiny_model, structures=["spleen"])
    assert ids(node) == {"spleen"}
    assert report.model == "tiny 1"


def test_a_real_ct_is_segmented(open_panel: Callable[[str], Any], dialogs: Dialogs) -> None:
    if not CT.exists():
        pytest.skip("the real CT is not there")
    from m4oe.files import read_volume

    volume = read_volume(CT)
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name="CT")
    panel = open_panel("M4oESegmentation")
    result = apply(panel, node)
    assert dialogs.errors == []
    assert {"liver", "spleen"} <= ids(result)


@pytest.mark.parametrize("module", ["M4oESegmentation", "M4oETraining"])
def test_opening_the_panel_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    """In a fresh process; numpy comes with Slicer's own modules, torch and SimpleITK with nothing here."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
from harness.application import open_module
open_module(conftest.ROOT / "{module}" / "{module}.py")
heavy = {{"torch", "SimpleITK", "scipy", "nrrd", "safetensors", "cc3d", "psutil"}}
heavy |= {{"m4oe." + name for name in ("client", "files", "geometry", "network", "nodes", "predictor")}}
print(sorted(heavy & set(sys.modules)))
"""
    environment = {**os.environ, "M4OE_MODELS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert done.stdout.split(b"\n")[0] == b"[]"


# ---- batch, installation


def start_batch(panel: Any, source: Path, target: Path, pictures: bool = False) -> None:
    panel.ui.batchInputEdit.currentPath = str(source)
    panel.ui.batchOutputEdit.currentPath = str(target)
    panel.ui.batchPicturesCheckBox.checked = pictures
    panel.ui.batchStartButton.click()


def batch_table(panel: Any) -> dict[str, str]:
    table = panel.ui.batchTable
    return {table.item(row, 0).text(): table.item(row, 1).text() for row in range(table.rowCount)}


@pytest.fixture
def five_cases(tmp_path: Path) -> Path:
    """Four volumes and a file that is none."""
    from m4oe.files import write_volume
    from m4oe.geometry import Grid, Volume

    folder = tmp_path / "cases"
    folder.mkdir()
    grid = Grid((8, 30, 30), np.diag([-2.0, -2.0, 3.0, 1.0]))
    for number in range(4):
        noise = np.random.default_rng(number).normal(40, 300, grid.shape).astype(np.int16)
        write_volume(folder / f"case{number}.nii.gz", Volume(noise, grid))
    (folder / "bad.nii.gz").write_bytes(b"no volume")
    return folder


def test_a_batch_of_five_with_one_bad_case(panel: Any, dialogs: Dialogs, five_cases: Path, tmp_path: Path) -> None:
    start_batch(panel, five_cases, tmp_path / "results")
    assert not panel.ui.batchStartButton.enabled
    settle(lambda: panel.batches.batch is None)
    found = batch_table(panel)
    assert sorted(found) == ["bad", "case0", "case1", "case2", "case3"]
    assert found["bad"].startswith("failed: ")
    assert found["case0"].startswith("3 structures")
    assert panel.ui.batchStatusLabel.text == "4 done, 0 skipped, 1 failed"
    assert dialogs.errors == []
    assert len(list((tmp_path / "results").glob("*.seg.nrrd"))) == 4
    assert (tmp_path / "results" / "volumes.csv").is_file()
    assert "bad.nii.gz" in (tmp_path / "results" / "log.txt").read_text(encoding="utf-8")
    start_batch(panel, five_cases, tmp_path / "results")
    settle(lambda: panel.batches.batch is None)
    assert panel.ui.batchStatusLabel.text == "0 done, 4 skipped, 1 failed"
    assert batch_table(panel)["case3"] == "skipped: done before"
    assert panel.ui.batchTable.item(4, 0).toolTip() == "case3"
    assert [kind for kind, _ in dialogs.said] == []


def test_a_batch_writes_the_chosen_format_and_pictures(
    panel: Any, dialogs: Dialogs, five_cases: Path, tmp_path: Path
) -> None:
    for number in range(1, 4):
        (five_cases / f"case{number}.nii.gz").unlink()
    (five_cases / "bad.nii.gz").unlink()
    choose(panel.ui.batchFormatSelector, "nii.gz")
    start_batch(panel, five_cases, tmp_path / "results", pictures=True)
    settle(lambda: panel.batches.batch is None)
    assert dialogs.said == []
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"case0.nii.gz", "case0.png"} <= written
    assert not any(name.endswith(".seg.nrrd") for name in written)


_STALLS = """
import sys, time
from m4oe import __main__, segment_command
segment = segment_command._segment_case
def stall(predictor, case, options, voice):
    if case.name == "case3":
        time.sleep(600)
    return segment(predictor, case, options, voice)
segment_command._segment_case = stall
sys.exit(__main__.main())
"""


def test_a_stopped_batch_goes_on_when_it_is_started_again(
    panel: Any, dialogs: Dialogs, five_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from M4oESegmentationLib import Worker

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "localCommand", lambda *words: [sys.executable, "-c", _STALLS, *words])
        start_batch(panel, five_cases, tmp_path / "results")
    settle(lambda: batch_table(panel).get("case3") == "working")
    panel.ui.batchStopButton.click()
    settle(lambda: panel.batches.batch is None)
    assert dialogs.errors == []
    assert panel.ui.batchStatusLabel.text == "Stopped; start it again to go on."
    assert batch_table(panel)["case3"] == "stopped"
    start_batch(panel, five_cases, tmp_path / "results")
    settle(lambda: panel.batches.batch is None)
    assert panel.ui.batchStatusLabel.text == "1 done, 3 skipped, 1 failed"
    assert len(list((tmp_path / "results").glob("*.seg.nrrd"))) == 4


def test_results_of_another_choice_are_replaced_after_a_question_alone(
    panel: Any, dialogs: Dialogs, tiny_model: Path, tmp_path: Path
) -> None:
    asked = {"expert": "auto", "structures": ["liver"], "quality": "standard"}
    entries = {"case": {"files": ["case.seg.nrrd"], "model": "tiny 1", "asked": asked}}
    (tmp_path / "volumes.json").write_text(json.dumps(entries), encoding="utf-8")
    dialogs.answer = False
    start_batch(panel, tmp_path, tmp_path)
    ((kind, question),) = dialogs.said
    assert (kind, panel.batches.batch) == ("question", None)
    assert "will be replaced" in question
    dialogs.said.clear()
    panel.models.structures.check(["liver"])
    start_batch(panel, tmp_path / "nothing", tmp_path)
    assert [kind for kind, _ in dialogs.said] == ["error"]  # it has no input, and needs no question


def test_no_batch_starts_without_a_structure(panel: Any) -> None:
    panel.models.structures.check([])
    assert not panel.ui.batchStartButton.enabled
    assert panel.ui.batchStartButton.toolTip == "Check at least one structure."


def test_a_table_that_is_misread_is_no_failed_case(panel: Any, dialogs: Dialogs, tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    start_batch(panel, tmp_path / "cases.csv", tmp_path / "results")
    settle(lambda: panel.batches.batch is None)
    assert batch_table(panel) == {}
    assert "has the columns a, b" in dialogs.errors[0]
    assert panel.ui.batchStatusLabel.text.startswith("The batch failed: ")


def test_a_batch_says_what_it_lacks(panel: Any, dialogs: Dialogs, five_cases: Path) -> None:
    panel.ui.batchStartButton.click()
    assert "Choose a folder of volumes" in dialogs.errors[-1]
    start_batch(panel, five_cases, Path("/proc/nowhere"))
    settle(lambda: panel.batches.batch is None)
    assert "/proc/nowhere" in dialogs.errors[-1]


def test_what_needs_files_of_this_machine_is_not_sent_to_another(
    panel: Any, dialogs: Dialogs, five_cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.ui.workerSelector.currentIndex = panel.ui.workerSelector.findData("ssh")
    panel.ui.hostEdit.text = "gpu1"
    panel.worker.save()
    start_batch(panel, five_cases, tmp_path / "results")
    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", lambda *arguments: "bundle.zip")
    panel.ui.bundleButton.click()
    assert ["This runs on this machine" in text for text in dialogs.errors] == [True, True]


def test_selected_dicom_series_become_a_table(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SimpleNamespace(currentSeriesSelection=lambda: ("1.2", "1.3"))
    browser = SimpleNamespace(dicomBrowser=SimpleNamespace(dicomTableManager=lambda: manager))
    representation = SimpleNamespace(self=lambda: SimpleNamespace(browserWidget=browser))
    slicer.modules.dicom = SimpleNamespace(widgetRepresentation=lambda: representation)
    files = {"1.2": ("/d/a.dcm", "/d/b.dcm"), "1.3": ("/d/c.dcm",)}
    monkeypatch.setattr(slicer, "dicomDatabase", SimpleNamespace(filesForSeries=files.__getitem__))
    panel.ui.batchDicomButton.click()
    table = Path(panel.ui.batchInputEdit.currentPath).read_text(encoding="utf-8").splitlines()
    assert table == ["input,case", "/d/a.dcm,1.2", "/d/c.dcm,1.3"]


def test_the_doctor_examines_the_python_of_the_worker(panel: Any) -> None:
    panel.ui.doctorButton.click()
    assert not panel.ui.installButton.enabled
    settle(lambda: panel.setupSection.process is None)
    assert "torch" in panel.ui.doctorText.plainText
    panel.ui.copyButton.click()
    assert slicer.app.clipboard().text() == panel.ui.doctorText.plainText


@pytest.fixture
def bundle(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A bundle of one model, brought, and no packages."""
    from m4oe import bundle

    monkeypatch.setattr(bundle, "_download", lambda *given: None)
    with monkeypatch.context() as patch:
        (tmp_path / "there").mkdir()
        shutil.copyfile(tiny_model, tmp_path / "there" / "brought.safetensors")
        patch.setenv("M4OE_MODELS", str(tmp_path / "there"))
        bundle.make_bundle(tmp_path / "bundle.zip")
    monkeypatch.setattr(qt.QFileDialog, "getOpenFileName", lambda *arguments: str(tmp_path / "bundle.zip"))
    return tmp_path / "bundle.zip"


def test_a_bundle_is_imported_and_its_model_offered(panel: Any, bundle: Path, tmp_path: Path) -> None:
    panel.ui.bundleButton.click()
    settle(lambda: panel.setupSection.process is None)
    assert "models copied: brought" in panel.ui.doctorText.plainText
    assert panel.ui.modelSelector.findData(str(tmp_path / "models" / "brought.safetensors")) >= 0


def test_a_damaged_bundle_is_told_and_leaves_nothing(panel: Any, bundle: Path, tmp_path: Path) -> None:
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 255
    bundle.write_bytes(data)
    panel.ui.bundleButton.click()
    settle(lambda: panel.setupSection.process is None)
    assert "is damaged" in panel.ui.doctorText.plainText and "copy it again" in panel.ui.doctorText.plainText
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny.safetensors"]
    assert panel.ui.bundleButton.enabled


def test_nothing_is_installed_without_consent(panel: Any, dialogs: Dialogs) -> None:
    dialogs.answer = False
    panel.ui.installButton.click()
    assert [kind for kind, _ in dialogs.said] == ["question"]
    assert slicer.app.extensionsManagerModel().installed == []


def test_install_begins_with_the_extension_pytorch(panel: Any) -> None:
    panel.ui.installButton.click()
    assert slicer.app.extensionsManagerModel().installed == ["PyTorch"]
    assert "Restart Slicer" in panel.ui.doctorText.plainText


Pip = Callable[[list[str], Path], None]


@pytest.fixture
def stand_in_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[Pip], str]:
    """Slicer with PyTorch, one package missing, and this in the place of its pip; says what is missing."""
    from m4oe import doctor, install

    def stand_in(pip_install: Pip) -> str:
        pytorch, packaging = ModuleType("PyTorchUtils"), ModuleType("slicer.packaging")
        pytorch.__spec__ = SimpleNamespace(name="PyTorchUtils")
        pytorch.PyTorchUtilsLogic = lambda: SimpleNamespace(torchInstalled=lambda: True)
        packaging.pip_install = lambda packages, constraints, requester: pip_install(packages, constraints)
        monkeypatch.setitem(sys.modules, "PyTorchUtils", pytorch)
        monkeypatch.setitem(sys.modules, "slicer.packaging", packaging)
        monkeypatch.setattr(slicer, "packaging", packaging, raising=False)
        wanted = next(entry for entry in install.REQUIREMENTS if entry.name == "tqdm")
        for module in (doctor, install):
            monkeypatch.setattr(module, "missing", lambda: (wanted,))
        return str(wanted)

    return stand_in


def test_install_lets_pip_replace_nothing(panel: Any, stand_in_pip: Callable[[Pip], str]) -> None:
    calls: list[Any] = []
    wanted = stand_in_pip(lambda packages, constraints: calls.append((packages, constraints.read_text("utf-8"))))
    panel.ui.installButton.click()
    ((packages, constraints),) = calls
    assert packages == [wanted]
    assert f"numpy=={np.__version__}" in constraints
    assert "Installed" in panel.ui.doctorText.plainText


def test_a_failing_pip_is_told_with_its_last_words_and_the_cure(
    panel: Any, dialogs: Dialogs, stand_in_pip: Callable[[Pip], str], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(packages: list[str], constraints: Path) -> None:
        print("Looking in indexes", "line\n" * 20, "ERROR: No matching distribution found", sep="\n")  # noqa: T201
        raise subprocess.CalledProcessError(1, ["PythonSlicer", "-m", "pip", "install", *packages])

    wanted = stand_in_pip(fail)
    panel.ui.installButton.click()
    (error,) = dialogs.errors
    assert f"Pip could not install {wanted}. Press Examine" in error
    assert "import a bundle" in error
    assert error.endswith("ERROR: No matching distribution found")
    assert "Looking in indexes" not in error and "PythonSlicer" not in error
    assert "Looking in indexes" in capsys.readouterr().out
    assert panel.ui.installButton.enabled


def test_a_full_disk_is_told_before_anything_is_asked(
    panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    panel.ui.installButton.click()
    ((kind, text),) = dialogs.said
    assert kind == "error"
    assert "0.5 GB free for packages" in text and "free 1 GB for packages" in text


def test_a_folder_of_packages_that_cannot_be_written_is_told_before_anything_is_asked(
    panel: Any, dialogs: Dialogs, stand_in_pip: Callable[[Pip], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    stand_in_pip(lambda *given: calls.append(given))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/proc/nowhere")
    panel.ui.installButton.click()
    ((kind, text),) = dialogs.said
    assert kind == "error"
    assert "/proc/nowhere cannot be written, so nothing can be installed" in text
    assert calls == []


@pytest.mark.parametrize("before", [None, "mine.txt"])
def test_the_extension_pytorch_installs_torch_under_constraints_too(
    before: str | None, panel: Any, dialogs: Dialogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.request import urlopen

    seen: list[str] = []

    def install_torch(askConfirmation: bool, torchVersionRequirement: str) -> Any:
        *others, uri = os.environ["PIP_CONSTRAINT"].split()
        with urlopen(uri) as file:
            seen.extend([*others, file.read().decode("utf-8")])

    pytorch = ModuleType("PyTorchUtils")
    pytorch.__spec__ = SimpleNamespace(name="PyTorchUtils")
    pytorch.PyTorchUtilsLogic = lambda: SimpleNamespace(torchInstalled=lambda: False, installTorch=install_torch)
    monkeypatch.setitem(sys.modules, "PyTorchUtils", pytorch)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    if before:
        monkeypatch.setenv("PIP_CONSTRAINT", before)
    panel.ui.installButton.click()
    *others, constraints = seen
    assert others == [before] * bool(before)
    assert f"numpy=={np.__version__}" in constraints and "simpleitk==" in constraints
    assert os.environ.get("PIP_CONSTRAINT") == before
    assert "PyTorch was not installed" in dialogs.errors[0]


def test_a_reloaded_panel_works_with_the_package_anew(
    panel: Any, open_panel: Callable[[str], Any], dialogs: Dialogs
) -> None:
    with patch.dict(sys.modules):  # the other tests go on with what they have
        panel.cleanup()
        panel.onReload()
        assert not any(name.partition(".")[0] in ("m4oe", "M4oESegmentationLib") for name in sys.modules)
        again = open_panel("M4oESegmentation")
        assert type(again.models) is not type(panel.models)
        assert ids(apply(again, add_volume())) == set(STRUCTURES)
        assert dialogs.said == []
        again.logic.close()


def test_sample_data_are_offered_once_slicer_has_started(panel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[dict[str, str]] = []
    module = ModuleType("SampleData")
    logic = SimpleNamespace(registerCustomSampleDataSource=lambda **source: offered.append(source))
    module.SampleDataLogic = logic
    monkeypatch.setitem(sys.modules, "SampleData", module)
    slicer.app.startupCompleted.emit()
    assert offered[0]["category"] == "M4oE"
    assert "trained on it" in offered[0]["sampleName"]
    if CT.exists():
        import hashlib

        data = CT.with_name("ts_ct_3mm.nii.gz").read_bytes()
        assert offered[0]["checksums"] == f"SHA256:{hashlib.sha256(data).hexdigest()}"
