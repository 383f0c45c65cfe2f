"""Makes the pictures of the training guide: `python Testing/gui/training_pictures.py DATA MR Docs/pictures`.

DATA and MR are folders of pairs (a.nii.gz with a_label.nii.gz) with a labels.csv and a cases.csv that has cases for
training, validation and test; the training on DATA is a miniature, and MR is what an expert would be added for. Those
of the guide hold three copies of one CT and of one MR, which its captions say.
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
    os.environ["M4OE_MODELS"] = tempfile.mkdtemp(prefix="m4oe-")
    panel = open_module(conftest.ROOT / "M4oETraining" / "M4oETraining.py")
    ui = panel.ui
    photograph(panel, folder / "training-empty.png", ["data", "training"])
    add_data(panel, source)
    ui.runFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-") + "/abdomen"
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
    ui.evaluationFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-")
    ui.evaluateButton.click()
    panel.onTimer()
    photograph(panel, folder / "training-evaluating.png", ["evaluation"])
    settle(lambda: not panel._evaluation.busy, 600)
    photograph(panel, folder / "training-evaluation.png", ["evaluation"])
    ui.evaluationPlotButton.click()
    save_chart(slicer.modules.plots.logic().shown, folder / "training-scores.png")
    choose_addition(panel, other)
    photograph(panel, folder / "training-addition.png", ["data", "training"])
    draw(panel, source)
    photograph(panel, folder / "training-synthetic.png", ["training", "runs"])
    fail(panel, source)
    photograph(panel, folder / "training-findings.png", ["data"])
    photograph(panel, folder / "training-failed.png", ["training"])
    panel.cleanup()


def add_data(panel: Any, source: str) -> None:
    """Adds the folder and waits until it is checked."""
    panel.ui.dataFolderEdit.currentPath = source
    panel.ui.addFolderButton.click()
    settle(lambda: not panel._data.busy, 300)
    panel.onTimer()


def choose_addition(panel: Any, source: str) -> None:
    """Chooses an expert for these data that the finished model gets."""
    ui = panel.ui
    ui.dataTable.setCurrentCell(0, 0)
    ui.removeDataButton.click()
    ui.expertEdit.text = "mr_t1"
    add_data(panel, source)
    ui.baseModelSelector.currentIndex = ui.baseModelSelector.findText("m4oe")
    panel.onBaseModel(0)
    ui.nameEdit.text = "m4oe-ct-mr"
    ui.runFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-") + "/abdomen-mr"


def test_cases(source: str) -> str:
    """A folder with those cases alone that are for the test."""
    folder = Path(tempfile.mkdtemp(prefix="m4oe-"), "test")
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
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()
    add_data(panel, data)
    panel.ui.runFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-") + f"/{name}"
    panel.ui.startButton.click()


def draw(panel: Any, source: str) -> None:
    """Trains with synthetic images until they are shown, and stops."""
    start_on(panel, source, "contrasts", synthesise=True)
    settle(lambda: panel._view.state == "failed" or not panel.ui.previewLabel.pixmap.isNull(), 900)
    panel.ui.stopButton.click()
    settle(lambda: panel._view.state in ("stopped", "failed"), 300)


def fail(panel: Any, source: str) -> None:
    """Trains anew on a copy of the data where the labels of the first case, which would be trained on, are damaged."""
    damaged = Path(tempfile.mkdtemp(prefix="m4oe-"), "damaged")
    shutil.copytree(source, damaged)
    min(damaged.glob("*_label.nii.gz")).write_bytes(b"no image")
    start_on(panel, str(damaged), "run")
    settle(lambda: panel._view.state == "failed", 300)


if __name__ == "__main__":
    main(*sys.argv[1:])
