"""Makes the pictures of the user guide from a real run: `python Testing/gui/pictures.py CT.nii.gz Docs/pictures`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import conftest
import slicer
import slicer.util
from harness.application import open_module, settle
from harness.views import SliceView, ThreeDView

_WIDTH = 460


def main(source: str, target: str) -> None:
    """Segments the volume in the panel and photographs every state, the slices and the surfaces."""
    from m4oe.files import read_volume

    folder = Path(target)
    panel = open_module(conftest.ROOT / "M4oESegmentation" / "M4oESegmentation.py")
    volume = read_volume(source)
    node = slicer.util.addVolumeFromArray(volume.array, ijkToRAS=volume.grid.affine, name="CT")
    node.GetDisplayNode().SetAutoWindowLevel(False)
    node.GetDisplayNode().SetWindowLevel(400, 40)
    photograph(panel, folder / "panel-start.png", ["inputs", "structures", "outputs", "advanced"])
    panel.ui.inputSelector.setCurrentNode(node)
    panel.ui.applyButton.click()
    settle(lambda: panel.ui.statusLabel.text.startswith("Segmenting") and panel.ui.progressBar.value > 30, 300)
    photograph(panel, folder / "panel-running.png", ["inputs"])
    settle(lambda: panel.runs.run is None, 600)
    photograph(panel, folder / "panel-result.png", ["results"])
    views(panel.parameters.result, node, folder)
    panel.ui.doctorButton.click()
    settle(lambda: panel.setupSection.process is None, 300)
    photograph(panel, folder / "panel-doctor.png", ["setup"])
    panel.ui.batchInputEdit.currentPath = "/data/abdomen"
    panel.ui.batchOutputEdit.currentPath = "/data/results"
    photograph(panel, folder / "panel-batch.png", ["batch"])
    panel.cleanup()


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
