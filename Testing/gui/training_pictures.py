"""Makes the pictures of the training guide: `python Testing/gui/training_pictures.py DATA MR Docs/pictures`.

DATA and MR are folders of pairs (a.nii.gz with a_label.nii.gz) with a labels.csv and a cases.csv that has cases for
training, validation and test; the training on DATA is a miniature, and MR is what an expert would be added for. Those
of the guide hold three copies of one CT and of one MR, which its captions say. TMPDIR, an empty folder, and HOME are
seen in the pictures.
"""

from __future__ import annotations

import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest
import qt
import slicer
from harness.application import open_module, settle
from harness.views import save_chart
from pictures import photograph


def main(source: str, other: str, target: str, length: float = 0.4) -> None:
    """Trains in the panel and photographs it before, during and after."""
    folder = Path(target)
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, tempfile.mkdtemp(prefix="m4oe-"))
    os.environ["M4OE_MODELS"] = new_folder("models")
    panel = open_module(conftest.ROOT / "M4oETraining" / "M4oETraining.py")
    ui = panel.ui
    photograph(panel, folder / "training-empty.png", ["data", "training"])
    draw_on_scene(source)
    ui.sceneFolderEdit.currentPath = new_folder("scene")
    ui.addSceneButton.click()
    settle(lambda: not panel._data.busy, 300)
    photograph(panel, folder / "training-scene.png", ["data"])
    ui.sceneFolderEdit.currentPath = ""
    remove_data(panel)
    swap_sides(panel, source)
    photograph(panel, folder / "training-warnings.png", ["data"])
    remove_data(panel)
    add_data(panel, source)
    ui.runFolderEdit.currentPath = new_folder("abdomen")
    ui.presetSelector.currentIndex = 0
    ui.lengthSpinBox.value = float(length)
    photograph(panel, folder / "training-data.png", ["data"])
    ui.refreshDevicesButton.click()
    settle(lambda: not panel._devices.busy, 60)
    ui.deviceSelector.currentIndex = ui.deviceSelector.findData("cpu")
    ui.deviceSelector.activated.emit(ui.deviceSelector.currentIndex)
    ui.estimateButton.click()
    settle(lambda: not panel._estimate.busy, 600)
    photograph(panel, folder / "training-estimate.png", ["training"])
    ui.startButton.click()
    settle(lambda: panel._view is not None and ui.progressBar.value > 20, 600)
    photograph(panel, folder / "training-running.png", ["training"])
    ui.pauseButton.click()
    settle(lambda: panel._view.state in ("paused", "failed"), 600)
    photograph(panel, folder / "training-paused.png", ["training"])
    ui.resumeButton.click()
    settle(lambda: panel._view.state in ("finished", "failed"), 1800)
    photograph(panel, folder / "training-finished.png", ["runs"])
    for number, name in enumerate(("loss", "dice")):
        ui.plotSelector.currentIndex = number
        ui.plotButton.checked = False
        ui.plotButton.click()
        save_chart(slicer.modules.plots.logic().shown, folder / f"training-{name}.png")
    ui.evaluationModelSelector.currentIndex = 0  # that of the run
    ui.evaluationImagesEdit.currentPath = ui.evaluationTruthEdit.currentPath = test_cases(source)
    ui.evaluationFolderEdit.currentPath = new_folder("results")
    ui.evaluateButton.click()
    panel.onTimer()
    photograph(panel, folder / "training-evaluating.png", ["evaluation"])
    settle(lambda: not panel._evaluation.busy, 600)
    photograph(panel, folder / "training-evaluation.png", ["evaluation"])
    ui.evaluationPlotButton.click()
    save_chart(slicer.modules.plots.logic().shown, folder / "training-scores.png")
    choose_addition(panel, other)
    photograph(panel, folder / "training-addition.png", ["data", "training"])
    fail(panel, source)
    photograph(panel, folder / "training-findings.png", ["data"])
    photograph(panel, folder / "training-failed.png", ["training"])
    draw(panel, source)
    photograph(panel, folder / "training-synthetic.png", ["training", "runs"])
    ui.resumeButton.click()
    settle(lambda: ui.progressBar.value > 0, 300)
    panel.cleanup()
    slicer.mrmlScene.Clear(False)
    panel = open_module(conftest.ROOT / "M4oETraining" / "M4oETraining.py")
    photograph(panel, folder / "training-restarted.png", ["training"])
    panel.ui.stopButton.click()
    settle(lambda: panel._view.state in ("stopped", "failed"), 300)
    panel.cleanup()


def new_folder(name: str) -> str:
    """Where something goes; with this name alone, as it is seen in the pictures."""
    path = Path(tempfile.gettempdir(), name)
    if path.exists():
        sys.exit(f"{path} is there already: move it away, or set TMPDIR to an empty folder")
    return str(path)


def add_data(panel: Any, source: str) -> None:
    """Adds the folder and waits until it is checked."""
    panel.ui.dataFolderEdit.currentPath = source
    panel.ui.addFolderButton.click()
    settle(lambda: not panel._data.busy, 300)
    panel.onTimer()


def remove_data(panel: Any) -> None:
    """Takes the only folder out of the table."""
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()


def swap_sides(panel: Any, source: str) -> None:
    """Adds a copy of the data whose labels.csv takes the left kidney for the right one."""
    copy = Path(shutil.copytree(source, new_folder("swapped")))
    text = (copy / "labels.csv").read_text(encoding="utf-8")
    for old, new in (("left", "..."), ("right", "left"), ("...", "right")):
        text = text.replace(f"kidney_{old}", f"kidney_{new}")
    (copy / "labels.csv").write_text(text, encoding="utf-8")
    add_data(panel, str(copy))


def draw_on_scene(source: str) -> None:
    """Loads the first case into the scene with some of its structures, one of them under a name that none has."""
    from m4oe.files import read_volume

    names = {"liver": "Liver", "spleen": "Spleen", "stomach": "Magen"}
    image, labels = (read_volume(min(Path(source).glob(name))) for name in ("*[!l].nii.gz", "*_label.nii.gz"))
    volume = slicer.util.addVolumeFromArray(image.array, ijkToRAS=image.grid.affine, name="CT")
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "mine")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    with Path(source, "labels.csv").open(encoding="utf-8") as table:
        values = {row["name"]: int(row["label"]) for row in csv.DictReader(table)}
    for key, name in names.items():
        mask = (labels.array == values[key]).astype("uint8")
        segment = node.GetSegmentation().AddEmptySegment(name, name)
        slicer.util.updateSegmentBinaryLabelmapFromArray(mask, node, segment, volume)


def choose_addition(panel: Any, source: str) -> None:
    """Chooses an expert for these data that the finished model gets."""
    ui = panel.ui
    remove_data(panel)
    ui.expertEdit.text = "mr_t1"
    add_data(panel, source)
    ui.baseModelSelector.currentIndex = ui.baseModelSelector.findText("m4oe")
    panel.onBaseModel(0)
    ui.nameEdit.text = "m4oe-ct-mr"
    ui.runFolderEdit.currentPath = new_folder("abdomen-mr")


def test_cases(source: str) -> str:
    """A folder with those cases alone that are for the test."""
    folder = Path(new_folder("test"))
    folder.mkdir()
    with Path(source, "cases.csv").open(encoding="utf-8") as table:
        cases = [row["case"] for row in csv.DictReader(table) if row["split"] == "test"]
    for name in ["labels.csv", *(f"{case}{end}.nii.gz" for case in cases for end in ("", "_label"))]:
        shutil.copyfile(Path(source, name), folder / name)
    return str(folder)


def start_on(panel: Any, data: str, name: str, synthesise: bool = False) -> None:
    """Starts a new model's training on these data alone."""
    panel.parameters.baseModel = panel.parameters.expert = ""
    panel.parameters.name, panel.parameters.synthesise = "m4oe", synthesise
    remove_data(panel)
    add_data(panel, data)
    panel.ui.runFolderEdit.currentPath = new_folder(name)
    panel.ui.startButton.click()


def draw(panel: Any, source: str) -> None:
    """Trains with synthetic images until they are shown, and stops."""
    start_on(panel, source, "contrasts", synthesise=True)
    settle(lambda: panel._view.state == "failed" or not panel.ui.previewLabel.pixmap.isNull(), 900)
    panel.ui.stopButton.click()
    settle(lambda: panel._view.state in ("stopped", "failed"), 300)


def fail(panel: Any, source: str) -> None:
    """Trains anew on a copy of the data where the labels of the first case, which would be trained on, are damaged."""
    damaged = Path(shutil.copytree(source, new_folder("damaged")))
    min(damaged.glob("*_label.nii.gz")).write_bytes(b"no image")
    start_on(panel, str(damaged), "run")
    settle(lambda: panel._view.state == "failed", 300)


if __name__ == "__main__":
    main(*sys.argv[1:])
