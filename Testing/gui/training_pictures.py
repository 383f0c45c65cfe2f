"""Makes the pictures of the training guide: `python Testing/gui/training_pictures.py DATA MR Docs/pictures`.

DATA and MR are folders of pairs (a.nii.gz with a_label.nii.gz) with a labels.csv and validation cases; the training on
DATA is a miniature, and MR is what an expert would be added for.
"""

from __future__ import annotations

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
    add_data(panel, source)
    ui.runFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-") + "/abdomen"
    ui.presetSelector.currentIndex = 0
    ui.lengthSpinBox.value = float(length)
    photograph(panel, folder / "training-data.png", ["data"])
    ui.refreshDevicesButton.click()
    ui.estimateButton.click()
    settle(lambda: not panel._estimate.busy and not panel._devices.busy, 600)
    photograph(panel, folder / "training-estimate.png", ["training"])
    ui.startButton.click()
    settle(lambda: panel._view is not None and ui.progressBar.value > 20, 600)
    photograph(panel, folder / "training-running.png", ["training"])
    ui.pauseButton.click()
    settle(lambda: panel._view.state in ("paused", "failed"), 600)
    photograph(panel, folder / "training-paused.png", ["training"])
    ui.resumeButton.click()
    settle(lambda: panel._view.state in ("finished", "failed"), 1800)
    photograph(panel, folder / "training-finished.png", ["training", "runs"])
    for number, name in enumerate(("loss", "dice")):
        ui.plotSelector.currentIndex = number
        ui.plotButton.checked = False
        ui.plotButton.click()
        save_chart(slicer.modules.plots.logic().shown, folder / f"training-{name}.png")
    ui.evaluationModelSelector.currentIndex = 0  # that of the run
    ui.evaluationImagesEdit.currentPath = ui.evaluationTruthEdit.currentPath = source
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
    fail(panel, source)
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


def fail(panel: Any, source: str) -> None:
    """Trains anew on a copy of the data whose labels are damaged."""
    panel.parameters.baseModel = panel.parameters.expert = ""
    damaged = Path(tempfile.mkdtemp(prefix="m4oe-"), "damaged")
    shutil.copytree(source, damaged)
    for path in damaged.glob("*_label.nii.gz"):
        path.write_bytes(b"no image")
    panel.ui.dataTable.setCurrentCell(0, 0)
    panel.ui.removeDataButton.click()
    add_data(panel, str(damaged))
    panel.ui.runFolderEdit.currentPath = str(damaged.with_name("run"))
    panel.ui.startButton.click()
    settle(lambda: panel._view.state == "failed", 300)


if __name__ == "__main__":
    main(*sys.argv[1:])
