"""Slicer module that turns a CT or MR volume into a segmentation with one segment per organ or lesion."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
import slicer
import slicer.util
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)
from slicer.util import VTKObservationMixin

if importlib.util.find_spec("m4oe") is None:  # run from the source tree, not from an installed extension
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "Core"))

from M4oESegmentationLib.Errors import errorsShown

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
    """Offers a public CT (Apache-2.0) in the module Sample Data."""
    import SampleData

    SampleData.SampleDataLogic.registerCustomSampleDataSource(
        category="M4oE",
        sampleName="M4oECT",
        uris=_SAMPLE,
        fileNames="M4oECT.nii.gz",
        checksums=_SAMPLE_CHECKSUM,
        nodeNames="M4oECT",
    )


class M4oESegmentationWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel: what the user chose goes to a run or a batch, and what came of it is shown."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: M4oESegmentationLogic | None = None
        self.parameters: Any = None
        self._guiTag: int | None = None
        self._run: Any = None

    # ---- life

    def setup(self) -> None:
        from M4oESegmentationLib.Batch import BatchSection
        from M4oESegmentationLib.Results import ResultsSection
        from M4oESegmentationLib.Setup import SetupSection
        from M4oESegmentationLib.Structures import StructureList
        from M4oESegmentationLib.Worker import WorkerSection

        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath("UI/M4oESegmentation.ui"))
        self.layout.addWidget(panel)
        self.ui = ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self.logic = M4oESegmentationLogic()
        self._timer = qt.QTimer()
        self._timer.setInterval(100)
        self._timer.connect("timeout()", self.onTimer)
        self._structures = StructureList(
            ui.structureList, ui.structureSearchBox, ui.presetSelector, self.onStructuresChanged
        )
        self.results = ResultsSection(ui, lambda: self.parameters.result)
        self.batches = BatchSection(ui, self._choices, self.onChanged)
        self.setupSection = SetupSection(ui, self.onChanged)
        self.worker = WorkerSection(ui, self.logic.client, self.onChanged)
        ui.applyButton.connect("clicked()", self.onApply)
        ui.cancelButton.connect("clicked()", self.onCancel)
        ui.importModelButton.connect("clicked()", self.onImportModel)
        ui.showModelsButton.connect("clicked()", self.onShowModels)
        ui.modelSelector.connect("activated(int)", self.onModelChanged)
        ui.expertSelector.connect("activated(int)", self.onExpertChanged)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneEndImport)
        self._showModels()
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """Ends what is under way when Slicer or the module ends."""
        self._timer.stop()
        self.batches.stop()
        self.setupSection.stop()
        self._forgetParameterNode()
        self.removeObservers()
        self.logic.close()

    def enter(self) -> None:
        self.initializeParameterNode()
        self._showModels()

    def onReload(self) -> None:
        """Reloads the package and the module's parts as well; Slicer reloads this file alone."""
        self.cleanup()
        for name in list(sys.modules):
            if name.partition(".")[0] in ("m4oe", "M4oESegmentationLib"):
                del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def onSceneStartClose(self, caller: Any, event: str) -> None:
        if self._run is not None:
            self._run.cancel()
        self._forgetParameterNode()

    def onSceneEndClose(self, caller: Any, event: str) -> None:
        self.initializeParameterNode()

    def onSceneEndImport(self, caller: Any, event: str) -> None:
        """The parameter node of the loaded scene has taken the place of the panel's."""
        self._forgetParameterNode()
        self.initializeParameterNode()

    def initializeParameterNode(self) -> None:
        """Takes the scene's parameter node, and proposes a volume where none is chosen."""
        node = self.logic.getParameterNode()
        if self.parameters is not None and self.parameters.parameterNode is node:
            return
        from M4oESegmentationLib.Parameters import Parameters

        self._forgetParameterNode()
        self.parameters = Parameters(node)
        if self.parameters.inputVolume is None:
            self.parameters.inputVolume = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLScalarVolumeNode")
        self._guiTag = self.parameters.connectGui(self.ui)
        self.addObserver(node, "ModifiedEvent", self.onParametersModified)
        self._showModels()

    def _forgetParameterNode(self) -> None:
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.removeObserver(self.parameters.parameterNode, "ModifiedEvent", self.onParametersModified)
        self.parameters = None

    def onParametersModified(self, caller: Any = None, event: str = "") -> None:
        self._showState()

    # ---- models, structures

    def _showModels(self) -> None:
        """Lists the installed models, and chooses the one of the parameter node or the first."""
        self._specs, selector = self.logic.models(), self.ui.modelSelector
        selector.clear()
        for path, spec in self._specs.items():
            selector.addItem(f"{spec.name} {spec.version}", path)
        if self.parameters is not None:
            paths = list(self._specs)
            selector.currentIndex = paths.index(self.parameters.model) if self.parameters.model in paths else 0
        self._showModel()

    def _showModel(self) -> None:
        from M4oESegmentationLib.Models import describe

        spec = self._spec()
        self.ui.modelInfoLabel.text = describe(spec)
        self.ui.expertSelector.clear()
        self.ui.expertSelector.addItem(_("Automatic"), "auto")
        for expert in spec.experts if spec else ():
            self.ui.expertSelector.addItem(expert.name, expert.name)
        if self.parameters is not None:
            self.ui.expertSelector.currentIndex = max(0, self.ui.expertSelector.findData(self.parameters.expert))
        excluded = self.parameters.excludedStructures if self.parameters is not None else ()
        self._structures.show(spec.structures if spec else (), excluded)
        self._showState()

    def _spec(self) -> Any:
        return self._specs.get(self.ui.modelSelector.currentData)

    def onModelChanged(self, index: int) -> None:
        self.parameters.model = self.ui.modelSelector.currentData or ""
        self.parameters.expert = "auto"
        self._showModel()

    def onExpertChanged(self, index: int) -> None:
        self.parameters.expert = self.ui.expertSelector.currentData

    def onStructuresChanged(self) -> None:
        self.parameters.excludedStructures = self._structures.excluded()
        self._showState()

    def onImportModel(self) -> None:
        from M4oESegmentationLib.Models import importModel

        path = qt.QFileDialog.getOpenFileName(None, _("Import a model"), "", _("Models (*.safetensors)"))
        if path:
            with errorsShown(_("The model was not imported.")):
                self.parameters.model = importModel(path)
                self._showModels()

    def onShowModels(self) -> None:
        from M4oESegmentationLib.Models import modelFolder

        with errorsShown(_("The folder of models cannot be shown.")):
            qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(modelFolder()))

    # ---- one volume

    def _choices(self) -> Any:
        from M4oESegmentationLib import Worker
        from M4oESegmentationLib.Run import Choices

        return Choices(
            model=self.ui.modelSelector.currentData or "",
            expert=self.ui.expertSelector.currentData or "auto",
            structures=self._structures.checked(),
            device=Worker.setting("device", "auto"),
            quality=self.parameters.quality.value,
            uncertainty=self.parameters.uncertainty and not self.parameters.allFrames,
            allFrames=self.parameters.allFrames,
        )

    def onApply(self) -> None:
        with errorsShown(_("The segmentation could not be started.")):
            parameters = self.parameters
            self._run = self.logic.start(parameters.inputVolume, parameters.outputSegmentation, self._choices())
            self.onChanged()

    def onCancel(self) -> None:
        if self._run is not None:
            self._run.cancel()
            self.ui.statusLabel.text = _("Cancelling")

    def onTimer(self) -> None:
        """Looks at everything that is under way."""
        if self._run is not None:
            fraction, sentence = self._run.progress()
            self.ui.progressBar.value = round(100 * fraction)
            self.ui.statusLabel.text = sentence
            if self._run.poll():
                self._endRun()
        busy = [self.batches.poll(), self.setupSection.poll(), self.worker.poll(), self._run is not None]
        if not any(busy):
            self._timer.stop()

    def onChanged(self) -> None:
        """Something has begun, ended or been set."""
        self._timer.start()
        self._showState()

    def _endRun(self) -> None:
        from m4oe.jobs import Cancelled

        run, self._run = self._run, None
        self.ui.progressBar.value = 0
        if run.error is None:
            seconds = sum(run.report.seconds.values())
            self.ui.statusLabel.text = _("Done in {seconds:.0f} s on {device}.").format(
                seconds=seconds, device=run.report.device
            )
            self.parameters.result = run.segmentationNode
        elif isinstance(run.error, Cancelled):
            self.ui.statusLabel.text = _("Cancelled; nothing was changed.")
        else:
            logging.error("M4oE: %s", run.error)
            self.ui.statusLabel.text = _("Failed; nothing was changed.")
            slicer.util.errorDisplay(_("The segmentation failed.") + f"\n\n{run.error}")
        self._showState()

    # ---- what is possible now

    def _showState(self) -> None:
        """Enables what can be done, and says why the rest cannot."""
        if self.parameters is None:
            return
        from M4oESegmentationLib.Run import framesOf

        ui, running = self.ui, self._run is not None
        reasons = (
            (running, _("A volume is being segmented.")),
            (not self._specs, _("No model is installed. Import a model file.")),
            (self.parameters.inputVolume is None, _("Choose a CT or MR volume.")),
            (not self._structures.checked(), _("Check at least one structure.")),
            (self.worker.job is not None, _("The worker is asked for its devices.")),
        )
        reason = next((text for applies, text in reasons if applies), "")
        ui.applyButton.enabled = not reason
        ui.applyButton.toolTip = reason or _("Segment the volume")
        ui.cancelButton.enabled = running
        ui.allFramesCheckBox.visible = framesOf(self.parameters.inputVolume) is not None
        ui.uncertaintyCheckBox.enabled = not (self.parameters.allFrames and ui.allFramesCheckBox.visible)
        self.worker.showState()
        self.batches.showState(bool(self._specs))
        self.setupSection.showState()
        if not running and (reason or not ui.statusLabel.text):
            ui.statusLabel.text = reason
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

    def models(self) -> dict[str, Any]:
        """Specs of the installed models that can be used, by path."""
        from M4oESegmentationLib.Models import installedModels

        return installedModels()

    def start(self, volumeNode: Any, segmentationNode: Any, choices: Any) -> Any:
        """Begins a run, which is to be polled (see Run.py).

        Raises:
            ValueError: Something that was given cannot be used.
            RuntimeError: The worker is busy.
        """
        from m4oe.spec import find_model, read_spec
        from M4oESegmentationLib.Run import Run

        keys = read_spec(find_model(choices.model)).structures
        return Run(self.client(), keys, volumeNode, segmentationNode, choices)

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
        self.assertIn("liver", report.volumes_ml)
