"""Makes the pictures of the user guide from a real run: `python Testing/gui/pictures.py CT.nii.gz Docs/pictures`.

CT.nii.gz may also be a folder with a DICOM series. The doctor's picture shows HOME and what proxies are set.
"""

from __future__ import annotations

import sys
import tempfile
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
    panel = open_module(conftest.ROOT / "M4oESegmentation" / "M4oESegmentation.py")
    volume = read_volume(source)
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name="CT")
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevel(400, 40)
    panel.ui.inputSelector.setCurrentNode(node)
    structures = panel.ui.structureList
    structures.setMinimumHeight(structures.sizeHintForRow(0) * structures.count + 2 * structures.frameWidth)
    photograph(panel, folder / "panel-start.png", ["inputs", "structures", "outputs", "advanced"])
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.endswith("left") and panel.ui.progressBar.value > 30, 300)
    photograph(panel, folder / "panel-running.png", ["inputs"])
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


def batch(panel: Any, volume: Any, path: Path) -> None:
    """A batch of parts of the volume, photographed in the midst of the third, with paths that say something."""
    from m4oe.files import write_volume
    from m4oe.geometry import Grid, Volume

    cases, ui = Path(tempfile.mkdtemp(prefix="m4oe-")), panel.ui
    count = len(volume.array)
    for number, part in enumerate(([0, count], [count // 3, count], [0, count * 3 // 4], [count // 4, count]), 1):
        array = volume.array[slice(*part)]
        write_volume(cases / f"patient{number}.nii.gz", Volume(array, Grid(array.shape, volume.grid.affine)))
    ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath = str(cases), tempfile.mkdtemp(prefix="m4oe-")
    ui.batchStartButton.click()
    settle(lambda: ui.batchTable.rowCount == 3 and ui.batchProgressBar.value > 55, 600)
    ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath = "/data/abdomen", "/data/results"
    photograph(panel, path, ["batch"])
    ui.batchStopButton.click()
    settle(lambda: panel.batches.batch is None, 60)


def photograph(panel: Any, path: Path, sections: list[str]) -> None:
    """The panel with these sections open."""
    for name, button in vars(panel.ui).items():
        if name.endswith("CollapsibleButton"):
            button.collapsed = name.removesuffix("CollapsibleButton") not in sections
    panel.parent.show()
    for _ in range(5):
        panel.parent.resize(_WIDTH, panel.parent.minimumSizeHint().height())
        slicer.app.processEvents()
    panel.parent.grab().save(str(path))


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
