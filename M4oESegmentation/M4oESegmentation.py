"""Slicer module that turns a CT or MR volume into a segmentation with one segment per organ or lesion."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slicer
import slicer.util
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
)

if importlib.util.find_spec("m4oe") is None:  # run from the source tree, not from an installed extension
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "Core"))

if TYPE_CHECKING:
    from m4oe.jobs import Report
    from m4oe.predictor import Predictor
    from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode


_MISSING = (
    "The Python package {name} is missing. Install PyTorch with the extension PyTorch, then, in the Python console: "
    "slicer.util.pip_install('connected-components-3d psutil safetensors tqdm pynrrd')"
)


class M4oESegmentation(ScriptedLoadableModule):
    """Introduces the module to Slicer."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("M4oE Segmentation")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.contributors = ["M4oE developers"]
        parent.helpText = _(
            "Segments abdominal organs and lesions in CT and MR volumes with a mixture of modality experts. "
            "For research only, not a medical device."
        )
        parent.acknowledgementText = _("The method is M4oE, a mixture of modality experts in a Swin-UNet.")
        # Slicer loads a module without a widget class as any other but has nothing to show for it.
        parent.hidden = True


class M4oESegmentationLogic(ScriptedLoadableModuleLogic):
    """Segments volume nodes. The model is loaded at the first call and stays ready for the next volume.

    From Slicer's Python, with windows or without (``Slicer --no-main-window --python-script``)::

        from M4oESegmentation import M4oESegmentationLogic
        volumeNode = slicer.util.loadVolume("case.nii.gz")
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
        report = M4oESegmentationLogic().process(volumeNode, segmentationNode)
    """

    def __init__(self, parent: Any = None, predictorFactory: Callable[[Path | str], Predictor] | None = None) -> None:
        """Makes a logic.

        Args:
            parent: As Slicer passes it.
            predictorFactory: Makes a predictor of a model's name or path; None takes M4oE's `Predictor`.
        """
        ScriptedLoadableModuleLogic.__init__(self, parent)
        self._predictorFactory = predictorFactory
        self._predictor: Predictor | None = None
        self._model: Path | str | None = None

    def process(
        self,
        volumeNode: vtkMRMLScalarVolumeNode,
        segmentationNode: vtkMRMLSegmentationNode,
        model: Path | str | None = None,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        progress: Callable[[str, float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Report:
        """Segments a volume; the segmentation node changes only when all went well.

        Args:
            volumeNode: A CT or MR volume.
            segmentationNode: Takes the result; its segments that are none of the structures wanted stay.
            model: Name of an installed model or path of a model file; None takes the one that M4oE brings.
            expert: "auto" lets the gate decide; the name of an expert overrules it.
            structures: Keys of the structures wanted, such as "liver"; None takes all of the model.
            progress: Called with the phase and the fraction done in [0, 1].
            cancelled: Asked now and then; True stops with `m4oe.jobs.Cancelled`.

        Raises:
            ValueError: A node, the model, the expert or a structure cannot be used.
        """
        from m4oe.nodes import check_segmentation_node, segmentation_to_node, volume_from_node

        volume = volume_from_node(volumeNode)
        predictor = self._predictorOf(model)
        keys = predictor.spec.label_keys
        structureOfLabel = {label: key for label, key in keys.items() if structures is None or key in structures}
        check_segmentation_node(segmentationNode, volumeNode, structureOfLabel.values())
        labels, report = predictor(volume, expert, structures, progress, cancelled)
        segmentation_to_node(labels, structureOfLabel, segmentationNode, volumeNode, report.model)
        return report

    def _predictorOf(self, model: Path | str | None) -> Predictor:
        from m4oe.spec import DEFAULT_MODEL

        model = model or DEFAULT_MODEL
        if self._predictor is None or model != self._model:
            self._predictor = None  # two models may not fit into memory
            self._predictor, self._model = self._newPredictor(model), model
        return self._predictor

    def _newPredictor(self, model: Path | str) -> Predictor:
        if self._predictorFactory is not None:
            return self._predictorFactory(model)
        try:
            from m4oe.predictor import Predictor
        except ImportError as error:
            raise RuntimeError(_MISSING.format(name=error.name)) from error
        return Predictor(model)


class M4oESegmentationTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer; the model's test needs PyTorch in Slicer's Python."""

    def setUp(self) -> None:
        """Starts each test with an empty scene."""
        slicer.mrmlScene.Clear(False)

    def test_phantomBecomesSegments(self) -> None:
        """The model that comes with M4oE finds a phantom's liver."""
        missing = [
            name for name in ("torch", "cc3d", "psutil", "safetensors") if importlib.util.find_spec(name) is None
        ]
        if missing:
            self.skipTest(f"not installed: {', '.join(missing)}")
        import numpy as np
        from m4oe.training.phantom import STRUCTURES, make_phantom

        phantom = make_phantom(2026, "ct")
        volumeNode = slicer.util.addVolumeFromArray(
            phantom.image.array, ijkToRAS=phantom.image.grid.affine, name="phantom"
        )
        segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")
        report = M4oESegmentationLogic().process(volumeNode, segmentationNode)
        found = slicer.util.arrayFromSegmentBinaryLabelmap(segmentationNode, "liver", volumeNode) > 0
        truth = phantom.labels.array == STRUCTURES.index("liver") + 1
        dice = 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth))
        self.assertGreater(dice, 0.5)
        self.assertIn("liver", report.volumes_ml)
