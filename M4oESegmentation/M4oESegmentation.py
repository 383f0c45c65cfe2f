"""Slicer module that turns a CT or MR volume into a segmentation with one segment per organ or lesion."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
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

from M4oESegmentationLib.Panel import Panel

if TYPE_CHECKING:
    from m4oe.client import Client
    from m4oe.jobs import Report
    from slicer import vtkMRMLScalarVolumeNode, vtkMRMLSegmentationNode

_SAMPLE = (
    "https://raw.githubusercontent.com/wasserth/TotalSegmentator/0e65a448d557382b1e925276212b3bec7f5aff83"
    "/tests/reference_files/example_ct.nii.gz"
)
_SAMPLE_CHECKSUM = "SHA256:dbd3ae6d614d1d7ef3a46925c30c70038ed52da6b37fdd6afdc7b9b71387e3e1"


class M4oESegmentation(ScriptedLoadableModule):
    """Introduces the module to Slicer."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("M4oE Segmentation")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["SubjectHierarchy", "Segmentations"]
        parent.contributors = ["M4oE developers"]
        parent.helpText = _(
            "Segments abdominal organs and lesions in CT and MR volumes with a mixture of modality experts. "
            "For research only, not a medical device."
        )
        parent.helpText += self.getDefaultModuleDocumentationLink(
            "https://github.com/M4oE/SlicerM4oE/blob/main/Docs/user-guide.md"
        )
        parent.acknowledgementText = _("The method is M4oE, a mixture of modality experts in a Swin-UNet.")
        slicer.app.connect("startupCompleted()", registerSampleData)


def registerSampleData() -> None:
    """Offers a public CT (Apache-2.0) in the module Sample Data, whose only text for people is the name."""
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="M4oE",
        sampleName="M4oECT (the model was trained on it)",
        uris=_SAMPLE,
        fileNames="M4oECT.nii.gz",
        checksums=_SAMPLE_CHECKSUM,
        nodeNames="M4oECT",
    )


class M4oESegmentationWidget(Panel):
    """The panel: what the user chose goes to a run or a batch, and what came of it is shown."""

    def build(self) -> None:
        from M4oESegmentationLib.Batch import BatchSection
        from M4oESegmentationLib.Models import ModelSection
        from M4oESegmentationLib.Results import ResultsSection
        from M4oESegmentationLib.Run import RunSection
        from M4oESegmentationLib.Setup import SetupSection
        from M4oESegmentationLib.Worker import WorkerSection

        ui, self.logic = self.ui, M4oESegmentationLogic()
        self.models = ModelSection(ui, lambda: self.parameters, self.showState)
        self.results = ResultsSection(ui, lambda: self.parameters.result)
        self.worker = WorkerSection(ui, self.logic.client, self.onChanged)
        self.runs = RunSection(ui, lambda: self.parameters, self._start, self.onChanged, self.worker)
        self.batches = BatchSection(ui, self._choices, self.onChanged)
        self.setupSection = SetupSection(ui, lambda: (self.models.show(), self.onChanged()))  # a bundle brings models

    def stop(self) -> None:
        self.batches.stop()
        self.setupSection.stop()
        self.logic.close()

    def onSceneStartClose(self, caller: Any, event: str) -> None:
        self.runs.cancel()
        Panel.onSceneStartClose(self, caller, event)

    def makeParameters(self, node: Any) -> Any:
        from M4oESegmentationLib.Parameters import Parameters

        return Parameters(node)

    def showParameters(self) -> None:
        """Proposes a volume where none is chosen, and lists the models, of which there may be new ones."""
        from M4oESegmentationLib.Run import volumeNodes

        if self.parameters.inputVolume is None:
            self.parameters.inputVolume = next(iter(volumeNodes()), None)
        self.models.show()

    def _choices(self) -> Any:
        from M4oESegmentationLib import Worker
        from M4oESegmentationLib.Run import Choices, framesOf

        allFrames = self.parameters.allFrames and framesOf(self.parameters.inputVolume) is not None
        return Choices(
            model=self.models.model,
            expert=self.models.expert,
            structures=self.models.structures.checked(),
            device=Worker.setting("device", "auto"),
            quality=self.parameters.quality.value,
            uncertainty=self.parameters.uncertainty and not allFrames,
            allFrames=allFrames,
        )

    def _start(self) -> Any:
        return self.logic.start(self.parameters.inputVolume, self.parameters.outputSegmentation, self._choices())

    def onTimer(self) -> None:
        """Looks at everything that is under way."""
        underWay = [part.poll() for part in (self.runs, self.batches, self.setupSection, self.worker)]
        if not any(underWay):
            self._timer.stop()

    def onChanged(self) -> None:
        """Something has begun, ended or been set."""
        self._timer.start()
        self.showState()

    def showState(self) -> None:
        """Enables what can be done, and says why the rest cannot."""
        if self.parameters is None:
            return
        from M4oESegmentationLib.Run import framesOf

        ui, running, hasFrames = self.ui, self.runs.run is not None, framesOf(self.parameters.inputVolume) is not None
        reasons = (
            (running, _("A volume is being segmented.")),
            (self.models.problem, self.models.problem),
            (self.parameters.inputVolume is None, _("Choose a CT or MR volume.")),
            (not self.models.structures.checked(), _("Check at least one structure.")),
            (self.worker.job is not None, _("The worker is asked for its devices.")),
        )
        reason = next((text for applies, text in reasons if applies), "")
        if not running and (reason or ui.statusLabel.text == ui.applyButton.toolTip):  # a reason that applies no more
            ui.statusLabel.text = reason
        ui.applyButton.enabled = not reason
        ui.applyButton.toolTip = reason or _("Segment the volume")
        ui.cancelButton.enabled = running
        ui.allFramesCheckBox.visible = hasFrames
        ui.uncertaintyCheckBox.enabled = not (self.parameters.allFrames and hasFrames)
        self.worker.showState(running)
        self.batches.showState(next((text for applies, text in (reasons[1], reasons[3]) if applies), ""))
        self.setupSection.showState()
        self.results.show()


class M4oESegmentationLogic(ScriptedLoadableModuleLogic):
    """Segments volume nodes in a worker, which keeps the model ready for the next volume.

    From Slicer's Python, with windows or without (``Slicer --no-main-window --python-script``)::

        from M4oESegmentation import M4oESegmentationLogic
        volumeNode = slicer.util.loadVolume("case.nii.gz")
        segmentationNode, report = M4oESegmentationLogic().process(volumeNode)
    """

    def __init__(self, parent: Any = None, client: Client | None = None) -> None:
        """Makes a logic.

        Args:
            parent: As Slicer passes it.
            client: Of a worker; None starts the one that the settings name.
        """
        ScriptedLoadableModuleLogic.__init__(self, parent)
        self._client, self._command = client, None

    def client(self) -> Client:
        """The client of the worker; a new one where the settings have changed.

        Raises:
            ValueError: The settings name no Python or host.
        """
        from M4oESegmentationLib import Worker

        if self._client is None or (self._command is not None and self._command != Worker.command("worker")):
            self.close()
            self._client, self._command = Worker.newClient(), Worker.command("worker")
        return self._client

    def close(self) -> None:
        """Ends the worker."""
        if self._client is not None:
            self._client.close()
        self._client = None

    def start(self, volumeNode: Any, segmentationNode: Any, choices: Any) -> Any:
        """Begins a run, which is to be polled (see Run.py).

        Raises:
            ValueError: Something that was given cannot be used.
            RuntimeError: The worker is busy.
        """
        from m4oe.spec import find_model, read_spec
        from M4oESegmentationLib.Run import Run

        spec = read_spec(find_model(choices.model))
        return Run(self.client(), spec, volumeNode, segmentationNode, choices)

    def process(
        self,
        volumeNode: vtkMRMLScalarVolumeNode,
        segmentationNode: vtkMRMLSegmentationNode | None = None,
        *,
        model: Path | str | None = None,
        expert: str = "auto",
        structures: Sequence[str] | None = None,
        device: str = "auto",
        quality: str = "standard",
    ) -> tuple[vtkMRMLSegmentationNode, Report]:
        """Segments a volume and waits for the result; the scene changes only when all went well.

        Args:
            volumeNode: A CT or MR volume.
            segmentationNode: Takes the result; its segments that are none of the structures wanted stay. None makes
                a new one.
            model: Name of an installed model or path of a model file; None takes the one that M4oE brings.
            expert: "auto" lets the gate decide; the name of an expert overrules it.
            structures: Keys of the structures wanted, such as "liver"; None takes all of the model.
            device: "auto", "cpu", "cuda:0", "mps".
            quality: "standard" or "fast".

        Raises:
            ValueError: A node, the model, the expert or a structure cannot be used.
            RuntimeError: The worker failed.
        """
        import time

        from m4oe.spec import DEFAULT_MODEL, find_model, read_spec
        from M4oESegmentationLib.Run import Choices

        path = find_model(model or DEFAULT_MODEL)
        keys = tuple(structures if structures is not None else read_spec(path).structures)
        run = self.start(volumeNode, segmentationNode, Choices(str(path), expert, keys, device, quality))
        try:
            while not run.poll():
                time.sleep(0.02)
        finally:
            run.cancel()
        if run.error is not None:
            raise run.error
        return run.segmentationNode, run.report


class M4oESegmentationTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer; the model's test needs PyTorch in the worker's Python."""

    def setUp(self) -> None:
        """Starts each test with an empty scene."""
        slicer.mrmlScene.Clear(False)

    def runTest(self) -> None:
        """Runs as Slicer's Reload and Test does."""
        self.setUp()
        self.test_phantomBecomesSegments()

    def test_phantomBecomesSegments(self) -> None:
        """The model that comes with M4oE finds a phantom's liver."""
        missing = [name for name in ("torch", "cc3d", "safetensors") if importlib.util.find_spec(name) is None]
        if missing:
            self.skipTest(f"not installed: {', '.join(missing)}")
        import numpy as np
        from m4oe.training.phantom import STRUCTURES, make_phantom

        phantom = make_phantom(2026, "ct")
        volumeNode = slicer.util.addVolumeFromArray(
            phantom.image.array, ijkToRAS=phantom.image.grid.affine, name="phantom"
        )
        logic = M4oESegmentationLogic()
        segmentationNode, report = logic.process(volumeNode)
        logic.close()
        found = slicer.util.arrayFromSegmentBinaryLabelmap(segmentationNode, "liver", volumeNode) > 0
        truth = phantom.labels.array == STRUCTURES.index("liver") + 1
        dice = 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth))
        self.assertGreater(dice, 0.5)
        self.assertGreater(report.volumes_ml["liver"], 0)
