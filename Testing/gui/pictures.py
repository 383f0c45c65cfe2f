"""Makes the pictures of the user guide from a real run: `python Testing/gui/pictures.py CT.nii.gz Docs/pictures`.

CT.nii.gz may also be a folder with a DICOM series, of which there is one picture more. The doctor's pictures show what
proxies and certificates are set.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))

import conftest
import qt
import slicer
import slicer.util
from harness.application import open_module, settle
from harness.views import SliceView, ThreeDView

_WIDTH = 570


def main(source: str, target: str) -> None:
    """Segments the volume in the panel and photographs every state, the slices and the surfaces."""
    from m4oe.files import read_volume

    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    qt.QSettings.setDefaultFormat(qt.QSettings.IniFormat)
    qt.QSettings.setPath(qt.QSettings.IniFormat, qt.QSettings.UserScope, tempfile.mkdtemp(prefix="m4oe-"))
    os.environ["M4OE_MODELS"] = tempfile.mkdtemp(prefix="m4oe-") + "/models"
    without_a_model(folder / "panel-no-model.png")
    panel = open_module(conftest.ROOT / "M4oESegmentation" / "M4oESegmentation.py")
    photograph(panel, folder / "panel-no-volume.png", ["inputs"])
    volume = read_volume(source)
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name="CT")
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevel(400, 40)
    panel.ui.inputSelector.setCurrentNode(node)
    structures = panel.ui.structureList
    structures.setMinimumHeight(structures.sizeHintForRow(0) * structures.count + 2 * structures.frameWidth)
    photograph(panel, folder / "panel-start.png", ["inputs", "structures", "outputs", "advanced"])
    elsewhere(panel, folder)
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
    report(panel, panel.ui.doctorButton, folder / "panel-doctor.png")
    with numpy_replaced():
        report(panel, panel.ui.doctorButton, folder / "panel-doctor-problem.png")
    bundles(panel, folder)
    batch(panel, volume, folder)
    if Path(source).is_dir():
        dicom(panel, Path(source), folder / "panel-batch-dicom.png")
    frames(panel, node, folder / "panel-frames.png")
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


def elsewhere(panel: Any, folder: Path) -> None:
    """The other places where a worker can run, and Slicer's Python again."""
    ui = panel.ui
    for place, python, host in (("python", "/opt/m4oe/bin/python", ""), ("ssh", "", "anna@gpu1"), ("slicer", "", "")):
        ui.workerSelector.currentIndex = ui.workerSelector.findData(place)
        ui.pythonPathEdit.currentPath, ui.hostEdit.text = python, host
        panel.worker.save()
        if place != "slicer":
            photograph(panel, folder / f"panel-{place}.png", ["advanced"])
        if place == "ssh":
            ui.applyButton.click()
            settle(lambda: panel.runs.run is None, 60)
            photograph(panel, folder / "panel-ssh-failed.png", ["advanced"], conftest.DIALOGS.errors[-1])


@contextmanager
def worker_without_torch(panel: Any) -> Iterator[None]:
    """The panel's worker cannot import torch, and is another one afterwards."""
    from m4oe.client import Client, worker_command

    with tempfile.TemporaryDirectory(prefix="m4oe-") as modules:
        Path(modules, "torch.py").write_text("raise ImportError('No module named torch')", encoding="utf-8")
        with Client(worker_command(), {**os.environ, "PYTHONPATH": modules}) as client:
            panel.logic._client, panel.logic._command = client, None  # whatever the settings name
            yield
    panel.logic._client = None


def report(panel: Any, button: Any, path: Path, place: Path = Path("/data")) -> None:
    """What is said once the button has been pressed, in its whole length, with /data in the stead of a place."""
    button.click()
    settle(lambda: panel.setupSection.process is None, 300)
    text = panel.ui.doctorText
    text.setPlainText(text.plainText.replace(str(place), "/data"))
    photograph(panel, path, ["setup"])  # only now it is wrapped to its width
    text.setMinimumHeight(round(text.document().size.height() + 1) * text.fontMetrics().lineSpacing())
    photograph(panel, path, ["setup"])


@contextmanager
def numpy_replaced() -> Iterator[None]:
    """The worker takes numpy from a folder outside of what it believes to be Slicer."""
    import numpy

    with tempfile.TemporaryDirectory(prefix="m4oe-") as folder:
        place = Path(folder, "packages")
        place.mkdir()
        for path in Path(numpy.__file__).parents[1].glob("numpy*"):
            (place / path.name).symlink_to(path)
        paths = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
        with patch.dict(os.environ, {"SLICER_HOME": sys.prefix, "PYTHONPATH": paths}):
            yield


def bundles(panel: Any, folder: Path) -> None:
    """A bundle of one model, and no packages, as these are there; then the same one damaged."""
    from m4oe import bundle

    place = Path(tempfile.mkdtemp(prefix="m4oe-"))
    path = place / "M4oE.zip"
    shutil.copyfile(panel.models.model, place / "abdomen_mr.safetensors")
    with patch.object(bundle, "_download"), patch.dict(os.environ, {"M4OE_MODELS": str(place)}):
        bundle.make_bundle(path)
    with patch.object(qt.QFileDialog, "getOpenFileName", lambda *given: str(path)):
        report(panel, panel.ui.bundleButton, folder / "panel-bundle.png")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
        report(panel, panel.ui.bundleButton, folder / "panel-bundle-damaged.png", place)


def batch(panel: Any, volume: Any, folder: Path) -> None:
    """A batch of parts of the volume and a damaged file, in the midst of the third case and stopped there."""
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
    photograph(panel, folder / "panel-batch.png", ["batch"])
    ui.batchStopButton.click()
    settle(lambda: panel.batches.batch is None, 60)
    photograph(panel, folder / "panel-batch-stopped.png", ["batch"])


def dicom(panel: Any, source: Path, path: Path) -> None:
    """A batch of a series that is selected in the DICOM browser, for which a stand-in answers."""
    from pydicom import dcmread

    files = [str(file) for file in sorted(source.glob("*.dcm"))]
    uid, ui = str(dcmread(files[0]).SeriesInstanceUID), panel.ui
    manager = SimpleNamespace(currentSeriesSelection=lambda: (uid,))
    browser = SimpleNamespace(dicomBrowser=SimpleNamespace(dicomTableManager=lambda: manager))
    representation = SimpleNamespace(self=lambda: SimpleNamespace(browserWidget=browser))
    slicer.modules.dicom = SimpleNamespace(widgetRepresentation=lambda: representation)
    slicer.dicomDatabase = SimpleNamespace(filesForSeries=lambda series: files)
    ui.batchDicomButton.click()
    ui.batchOutputEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-")
    ui.batchStartButton.click()
    settle(lambda: panel.batches.batch is None, 300)
    ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath = "/data/m4oe-x1y2z3/batch.csv", "/data/results"
    photograph(panel, path, ["batch"])


def frames(panel: Any, node: Any, path: Path) -> None:
    """The second of three frames of a sequence under way."""
    sequence = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", "frames")
    for number in range(3):
        sequence.SetDataNodeAtValue(node, str(number))
    browser = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", "browser")
    browser.SetAndObserveMasterSequenceNodeID(sequence.GetID())
    browser.AddProxyNode(node, sequence, False)
    panel.ui.allFramesCheckBox.checked = True
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.startswith("Frame 2 of 3: Segmenting, "), 300)
    photograph(panel, path, ["inputs", "outputs"])
    panel.ui.cancelButton.click()
    settle(lambda: panel.runs.run is None, 60)


def photograph(panel: Any, path: Path, sections: list[str], message: str = "") -> None:
    """The panel with these sections open, and a message in a box below it."""
    for name, button in vars(panel.ui).items():
        if name.endswith("CollapsibleButton"):
            button.collapsed = name.removesuffix("CollapsibleButton") not in sections
    panel.showState()  # hides what the stand-in for a section shows with all else in it
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
