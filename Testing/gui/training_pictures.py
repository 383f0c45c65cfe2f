"""Makes the pictures of the training guide: `python Testing/gui/training_pictures.py DATA Docs/pictures`.

DATA is a data set with validation cases; the training is a miniature.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import conftest
from harness.application import open_module, settle
from pictures import photograph


def main(source: str, target: str, length: float = 0.15) -> None:
    """Trains in the panel and photographs it before, during and after."""
    folder = Path(target)
    panel = open_module(conftest.ROOT / "M4oETraining" / "M4oETraining.py")
    ui = panel.ui
    ui.dataFolderEdit.currentPath = source
    ui.addFolderButton.click()
    settle(lambda: not panel._data.busy, 300)
    panel.onTimer()
    ui.runFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-") + "/abdomen"
    ui.presetSelector.currentIndex = 0
    ui.lengthSpinBox.value = float(length)
    photograph(panel, folder / "training-data.png", ["data"])
    ui.startButton.click()
    settle(lambda: panel._view is not None and ui.progressBar.value > 20, 300)
    photograph(panel, folder / "training-running.png", ["training"])
    settle(lambda: panel._view.state in ("finished", "failed"), 600)
    photograph(panel, folder / "training-finished.png", ["training", "runs"])
    ui.evaluationImagesEdit.currentPath = ui.evaluationTruthEdit.currentPath = source
    ui.evaluationFolderEdit.currentPath = tempfile.mkdtemp(prefix="m4oe-")
    ui.evaluateButton.click()
    settle(lambda: panel._evaluation is None, 600)
    photograph(panel, folder / "training-evaluation.png", ["evaluation"])
    panel.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
