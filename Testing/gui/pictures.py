"""Makes the pictures of the user guide from a real run: `python Testing/gui/pictures.py CT.nii.gz Docs/pictures`.

CT.nii.gz may also be a folder with a DICOM series. The doctor's picture shows HOME and what proxies are set.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest
import qt
import slicer
import slicer.util
from harness.application import open_module, settle
from harness.views import SliceView, ThreeDView

_WIDTH = 540


def main(source: str, target: str) -> None:
    """Segments the volume in the panel and photographs every state, the slices and the surfaces."""
    from m4oe.files import read_volume

    folder = Path(target)
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, tempfile.mkdtemp(prefix="m4oe-"))
    without_a_model(folder / "panel-no-model.png")
    panel = open_module(conftest.ROOT / "M4oESegmentation" / "M4oESegmentation.py")
    volume = read_volume(source)
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name="CT")
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevel(400, 40)
    panel.ui.inputSelector.setCurrentNode(node)
    structures = panel.ui.structureList
    structures.setMinimumHeight(structures.sizeHintForRow(0) * structures.count + 2 * structures.frameWidth)
    photograph(panel, folder / "panel-start.png", ["inputs", "structures", "outputs", "advanced"])
    with worker_without_torch(panel):
        panel.ui.applyButton.click()
        settle(lambda: panel.runs.run is None, 60)
    photograph(panel, folder / "panel-torch-missing.png", ["inputs"], conftest.DIALOGS.errors[-1])
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.endswith("left") and panel.ui.progressBar.value > 30, 300)
    photograph(panel, folder / "panel-running.png", ["inputs"])
    panel.ui.cancelButton.click()
    settle(lambda: panel.runs.run is None, 60)
    photograph(panel, folder / "panel-cancelled.png", ["inputs"])
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.startswith("Segmenting"), 300)
    os.kill(panel.logic.client()._connection._process.pid, signal.SIGKILL)
    settle(lambda: panel.runs.run is None, 60)
    photograph(panel, folder / "panel-failed.png", ["inputs"], conftest.DIALOGS.errors[-1])
    panel.ui.applyButton.click()
    settle(lambda: panel.runs.run is None, 600)
    photograph(panel, folder / "panel-result.png", ["results"])
    views(panel.parameters.result, node, folder)
    panel.ui.doctorButton.click()
    settle(lambda: panel.setupSection.process is None, 300)
    photograph(panel, folder / "panel-doctor.png", ["setup"])
    text = panel.ui.doctorText  # wrapped to its width by now
    text.setMinimumHeight(round(text.document().size.height() + 1) * text.fontMetrics().lineSpacing())
    photograph(panel, folder / "panel-doctor.png", ["setup"])
    batch(panel, volume, folder / "panel-batch.png")
    panel.cleanup()


def without_a_model(path: Path) -> None:
    """A panel that finds no model, not even the one that ships."""
    from m4oe import spec

    folders = spec.model_folders
    spec.model_folders = lambda: []
    panel = open_module(conftest.ROOT / "M4oESegmentation" / "M4oESegmentation.py")
    photograph(panel, path, ["inputs"])
    panel.cleanup()
    panel.parent.delete()
    spec.model_folders = folders


@contextmanager
def worker_without_torch(panel: Any) -> Iterator[None]:
    """The panel's worker cannot import torch, and is another one afterwards."""
    from m4oe.client import Client, worker_command

    with tempfile.TemporaryDirectory(prefix="m4oe-") as modules:
        Path(modules, "torch.py").write_text("raise ImportError('No module named torch')", encoding="utf-8")
        with Client(worker_command(), {**os.environ, "PYTHONPATH": modules}) as client:
            panel.logic._client = client
            yield
    panel.logic._client = None


def batch(panel: Any, volume: Any, path: Path) -> None:
    """A batch of parts of the volume and a damaged file, photographed in the midst of the third case."""
    from m4oe.files import write_volume
    from m4oe.geometry import Grid, Volume

    cases, ui = Path(tempfile.mkdtemp(prefix="m4oe-")), panel.ui
    count = len(volume.array)
    for number, part in enumerate(([0, count], [count // 3, count], [0, count * 3 // 4], [count // 4, count]), 1):
        array = volume.array[slice(*part)]
        write_volume(cases / f"patient{number}.nii.gz", Volume(array, Grid(array.shape, volume.grid.affine)))
    os.truncate(cases / "patient2.nii.gz", 10_000)
    ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath = str(cases), tempfile.mkdtemp(prefix="m4oe-")
    ui.batchStartButton.click()
    settle(lambda: ui.batchTable.rowCount == 3 and ui.batchProgressBar.value > 55, 600)
    ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath = "/data/abdomen", "/data/results"
    failed = ui.batchTable.item(1, 1)
    failed.setText(failed.text().replace(str(cases), "/data/abdomen"))
    photograph(panel, path, ["batch"])
    ui.batchStopButton.click()
    settle(lambda: panel.batches.batch is None, 60)


def photograph(panel: Any, path: Path, sections: list[str], message: str = "") -> None:
    """The panel with these sections open, and a message in a box below it."""
    for name, button in vars(panel.ui).items():
        if name.endswith("CollapsibleButton"):
            button.collapsed = name.removesuffix("CollapsibleButton") not in sections
    panel.parent.show()
    for _ in range(5):
        panel.parent.resize(_WIDTH, panel.parent.minimumSizeHint().height())
        slicer.app.processEvents()
    picture = panel.parent.grab()
    if message:
        box = qt.QMessageBox(qt.QMessageBox.Critical, "", message.replace(sys.executable, "/usr/bin/python3"))
        box.show()
        slicer.app.processEvents()
        picture = below(picture, box.grab())
        box.hide()
    picture.save(str(path))


def below(upper: Any, lower: Any) -> Any:
    """One picture of two."""
    whole = qt.QPixmap(max(upper.width(), lower.width()), upper.height() + lower.height())
    whole.fill(qt.QColor("white"))
    painter = qt.QPainter(whole)
    painter.drawPixmap(0, 0, upper)
    painter.drawPixmap((whole.width() - lower.width()) // 2, upper.height(), lower)
    painter.end()
    return whole


def views(segmentation: Any, volume: Any, folder: Path) -> None:
    """The result in two planes and in 3D."""
    segmentation.CreateClosedSurfaceRepresentation()
    axial = SliceView("Red")
    axial.show(volume, "Axial")
    axial.logic.SetSliceOffset(segmentation.GetSegmentCenterRAS("liver")[2])
    axial.save(folder / "result-axial.png")
    coronal = SliceView("Green")
    coronal.show(volume, "Coronal")
    coronal.logic.SetSliceOffset(segmentation.GetSegmentCenterRAS("liver")[1])
    coronal.save(folder / "result-coronal.png")
    surfaces = ThreeDView("1")
    surfaces.look_from_the_front()
    surfaces.save(folder / "result-3d.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
