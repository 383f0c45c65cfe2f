"""Slicer module that trains M4oE models: data, runs that outlive Slicer, curves, evaluation."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

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

for _name, _place in (("m4oe", "Core"), ("M4oESegmentationLib", "M4oESegmentation")):
    if importlib.util.find_spec(_name) is None:  # run from the source tree, not from an installed extension
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / _place))


_BUTTONS = (
    *("addFolder", "addScene", "checkAgain", "removeData", "estimate", "start", "pause", "resume", "stop"),
    *("forget", "report", "useModel", "evaluate", "evaluationStop", "evaluationPlot"),
)


class M4oETraining(ScriptedLoadableModule):
    """Introduces the module to Slicer."""

    def __init__(self, parent: Any) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("M4oE Training")
        parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        parent.dependencies = ["M4oESegmentation", "Segmentations", "Plots"]
        parent.contributors = ["M4oE developers"]
        parent.helpText = _("Trains models for M4oE Segmentation on your own data. For research only.")
        parent.helpText += self.getDefaultModuleDocumentationLink(
            "https://github.com/M4oE/SlicerM4oE/blob/main/Docs/training.md"
        )
        parent.acknowledgementText = _("The method is M4oE, a mixture of modality experts in a Swin-UNet.")


class M4oETrainingLogic(ScriptedLoadableModuleLogic):
    """Keeps the parameter node; the work is m4oe's, in processes of its own."""


class M4oETrainingWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel. A timer asks the processes what is new; nothing here waits."""

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic: M4oETrainingLogic | None = None
        self.parameters: Any = None
        self._guiTag: int | None = None
        self._view = self._estimate = self._evaluation = self._scored = None

    # ---- life

    def setup(self) -> None:
        from M4oESegmentationLib import Worker
        from M4oETrainingLib.Curves import Layout
        from M4oETrainingLib.Data import DataTable

        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath("UI/M4oETraining.ui"))
        self.layout.addWidget(panel)
        self.ui = ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self.logic = M4oETrainingLogic()
        self._data, self._plotLayout = DataTable(ui.dataTable), Layout()
        for text, value in ((_("As the files say"), ""), ("CT", "CT"), ("MR", "MR")):
            ui.modalitySelector.addItem(text, value)
        for name in ("auto", "cuda", "mps", "cpu"):
            ui.deviceSelector.addItem(_("Automatic") if name == "auto" else name, name)
        ui.deviceSelector.currentIndex = max(0, ui.deviceSelector.findData(Worker.setting("trainingDevice", "auto")))
        ui.plotSelector.addItem(_("Loss"), "loss")
        ui.plotSelector.addItem(_("Dice per structure"), "dice")
        self._timer = qt.QTimer()
        self._timer.setInterval(500)
        self._timer.connect("timeout()", self.onTimer)
        self._connect()
        self.initializeParameterNode()
        self._showRuns()
        self._timer.start()

    def _connect(self) -> None:
        ui = self.ui
        for name in _BUTTONS:
            slot = getattr(self, f"on{name[0].upper()}{name[1:]}")
            getattr(ui, f"{name}Button").connect("clicked()", slot)
        ui.plotButton.connect("toggled(bool)", self.onPlot)
        ui.plotSelector.connect("activated(int)", self.onPlot)
        ui.modalitySelector.connect("activated(int)", self.onChoice)
        ui.baseModelSelector.connect("activated(int)", self.onChoice)
        ui.deviceSelector.connect("activated(int)", self.onDevice)
        ui.runSelector.connect("activated(int)", self.onRunChosen)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        for event in (scene.EndCloseEvent, scene.EndImportEvent):
            self.addObserver(scene, event, self.onSceneEndClose)

    def cleanup(self) -> None:
        """Ends what belongs to the panel; trainings go on."""
        self._timer.stop()
        self._data.stop()
        for running in (self._estimate, self._evaluation):
            if running is not None:
                running.stop()
        self._plotLayout.restore()
        self._forgetParameterNode()
        self.removeObservers()

    def enter(self) -> None:
        self.initializeParameterNode()
        self._showRuns()

    def onReload(self) -> None:
        """Reloads the package and the module's parts as well; Slicer reloads this file alone."""
        self.cleanup()
        for name in list(sys.modules):
            if name.partition(".")[0] in ("m4oe", "M4oESegmentationLib", "M4oETrainingLib"):
                del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def onSceneStartClose(self, caller: Any, event: str) -> None:
        """The curves go with the scene; the training goes on."""
        self._forgetParameterNode()

    def onSceneEndClose(self, caller: Any, event: str) -> None:
        self.ui.plotButton.checked = False
        self.initializeParameterNode()

    def initializeParameterNode(self) -> None:
        """Takes the scene's parameter node."""
        node = self.logic.getParameterNode()
        if self.parameters is not None and self.parameters.parameterNode is node:
            return
        from M4oETrainingLib.Parameters import Parameters

        self._forgetParameterNode()
        self.parameters = Parameters(node)
        self._guiTag = self.parameters.connectGui(self.ui)
        self.addObserver(
            node, node.ModifiedEvent if hasattr(node, "ModifiedEvent") else "ModifiedEvent", self.onParameters
        )
        self._showModels()
        self.onParameters()
        self._showData()

    def _forgetParameterNode(self) -> None:
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.removeObservers(self.onParameters)
        self.parameters = None

    # ---- choices

    def onParameters(self, caller: Any = None, event: str = "") -> None:
        """Shows what is chosen."""
        from M4oESegmentationLib import Worker
        from M4oETrainingLib import Runs

        if self.parameters is None:
            return
        ui, chosen = self.ui, self.parameters
        text = Runs.stages(chosen)
        ui.stagesLabel.text = _("Stages and steps: {stages}").format(stages=text)
        ui.pythonLabel.text = _("Runs in: {place} (M4oE Segmentation, Advanced)").format(
            place=Worker.labels()[Worker.place()]
        )
        ui.modalitySelector.currentIndex = max(0, ui.modalitySelector.findData(chosen.modality))
        for widget in (ui.pretrainSpinBox, ui.synthesiseCheckBox):
            widget.enabled = not chosen.baseModel

    def onChoice(self, index: int = 0) -> None:
        self.parameters.modality = self.ui.modalitySelector.currentData
        self.parameters.baseModel = self.ui.baseModelSelector.currentData

    def onDevice(self, index: int = 0) -> None:
        from M4oESegmentationLib import Worker

        Worker.setSetting("trainingDevice", self.ui.deviceSelector.currentData)

    def _showModels(self) -> None:
        """Fills the boxes with the installed models, and the run's own to score."""
        from M4oESegmentationLib import Models

        ui, own = self.ui, self._ownModel()
        for box, first in ((ui.baseModelSelector, [(_("A new model"), "")]), (ui.evaluationModelSelector, own)):
            current = box.currentData
            box.clear()
            for name, path in [*first, *((spec.name, path) for path, spec in Models.installedModels().items())]:
                box.addItem(name, path)
            box.currentIndex = max(0, box.findData(current))
        if self.parameters is not None:
            ui.baseModelSelector.currentIndex = max(0, ui.baseModelSelector.findData(self.parameters.baseModel))

    def _ownModel(self) -> list[tuple[str, str]]:
        path = self._view.model if self._view is not None else None
        return [(_("Of the run {name}").format(name=path.parent.name), str(path))] if path and path.exists() else []

    # ---- data

    def onAddFolder(self) -> None:
        folder = self.ui.dataFolderEdit.currentPath
        with self._errorsShown(_("The folder cannot be added.")):
            if not folder or not Path(folder).exists():
                raise ValueError(_("Choose a folder with a data set; '{folder}' is none.").format(folder=folder))
            self._addFolder(folder)

    def onAddScene(self) -> None:
        from M4oETrainingLib import Scene

        folder = self.ui.sceneFolderEdit.currentPath
        with self._errorsShown(_("The scene cannot be added.")), slicer.util.WaitCursor():
            if not folder:
                raise ValueError(_("Choose the folder that the pairs of files are written to."))
            count, unknown = Scene.export(folder, self.parameters.modality, self.parameters.expert.strip())
            self._addFolder(folder)
            text = _("{count} cases were written.").format(count=count)
            if unknown:
                text += " " + _("Left out, as no structure has such a name: {names}").format(names=", ".join(unknown))
            self.ui.findingsLabel.text = text

    def onCheckAgain(self) -> None:
        from M4oETrainingLib import Data

        self._data.again(list(self.parameters.folders), Data.options(self.parameters))

    def onRemoveData(self) -> None:
        row = self.ui.dataTable.currentRow()
        self.parameters.folders = [folder for n, folder in enumerate(self.parameters.folders) if n != row]
        self.ui.dataTable.setRowCount(0)
        self._showData()

    def _addFolder(self, folder: str) -> None:
        self.parameters.folders = [*(other for other in self.parameters.folders if other != folder), folder]
        self.ui.dataTable.setRowCount(0)
        self._showData()

    def _showData(self) -> None:
        from M4oETrainingLib import Data

        self._data.show(list(self.parameters.folders), Data.options(self.parameters))

    # ---- the run

    def onEstimate(self) -> None:
        from M4oESegmentationLib import Worker
        from M4oESegmentationLib.Process import Process

        with self._errorsShown(_("There is no estimate.")):
            command = self._command("--estimate")
            self._estimate = Process(command, Worker.environment())
            self.ui.statusLabel.text = _("Prepares the cases and measures a few steps ...")

    def onStart(self) -> None:
        with self._errorsShown(_("The training cannot be started.")):
            self._start(str(self.parameters.runFolder), self._command())

    def onResume(self) -> None:
        with self._errorsShown(_("The training cannot be resumed.")):
            self._start(str(self._view.run.folder), self._view.run.command)

    def onPause(self) -> None:
        with self._errorsShown(_("The training cannot be paused.")):
            self._view.run.pause()

    def onStop(self) -> None:
        with self._errorsShown(_("The training cannot be stopped.")):
            self._view.run.stop()

    def _command(self, *more: str) -> list[str]:
        from M4oETrainingLib import Runs

        return Runs.command(self.parameters, self.ui.deviceSelector.currentData, *more)

    def _start(self, folder: str, command: list[str]) -> None:
        from m4oe.training_run import start_run
        from M4oESegmentationLib import Worker
        from M4oETrainingLib import Runs

        start_run(folder, command, Worker.environment())
        Runs.remember(folder)
        self._showRuns(folder)

    def _showRuns(self, chosen: str = "") -> None:
        """Fills the box of runs; the chosen one, or the one that was shown, or the newest is shown."""
        from M4oETrainingLib import Runs

        box = self.ui.runSelector
        chosen = chosen or box.currentData or ""
        box.clear()
        for folder in Runs.known():
            box.addItem(_("{name} in {folder}").format(name=Path(folder).name, folder=Path(folder).parent), folder)
        box.currentIndex = max(0, box.findData(chosen)) if box.count else -1
        self.onRunChosen()

    def onRunChosen(self, index: int = 0) -> None:
        from M4oETrainingLib.RunView import RunView

        folder = self.ui.runSelector.currentData
        if self._view is not None and folder == str(self._view.run.folder):
            return
        if self._view is not None:
            self._view.close()
        self.ui.plotButton.checked = False
        self._view = RunView(folder, self.ui) if folder else None
        self._showModels()
        self.onTimer()

    def onForget(self) -> None:
        from M4oETrainingLib import Runs

        Runs.forget(self.ui.runSelector.currentData)
        self._showRuns()

    def onPlot(self, *event: Any) -> None:
        if self._view is None or not self.ui.plotButton.checked:
            self._plotLayout.restore()
            return
        self._plotLayout.remember()
        self._view.curves[self.ui.plotSelector.currentData].show()

    def onReport(self) -> None:
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self._view.run.folder / "report.html")))

    def onUseModel(self) -> None:
        from m4oe.spec import read_spec
        from M4oESegmentationLib import Models

        with self._errorsShown(_("The model cannot be copied.")):
            path = Models.importModel(str(self._view.model), read_spec(self._view.model).name)
            self._showModels()
            self.ui.statusLabel.text = _("M4oE Segmentation offers the model: {path}").format(path=path)

    # ---- evaluation

    def onEvaluate(self) -> None:
        from M4oETrainingLib.Evaluation import Evaluation

        ui = self.ui
        with self._errorsShown(_("The evaluation cannot be started.")):
            paths = [
                edit.currentPath for edit in (ui.evaluationImagesEdit, ui.evaluationTruthEdit, ui.evaluationFolderEdit)
            ]
            choices = (ui.deviceSelector.currentData, self.parameters.labels.strip())
            self._evaluation = self._scored = Evaluation(ui.evaluationModelSelector.currentData, *paths, *choices)

    def onEvaluationPlot(self) -> None:
        self._plotLayout.remember()
        self._scored.plot()

    def onEvaluationStop(self) -> None:
        self._evaluation.stop()

    # ---- what is new

    def onTimer(self) -> None:
        """Asks the processes, twice a second."""
        ui = self.ui
        with self._errorsShown(_("The data set cannot be checked.")):
            if self._data.poll():
                ui.findingsLabel.text = self._data.details
        if self._estimate is not None and self._estimate.done():
            process, self._estimate = self._estimate, None
            self._showEstimate(process)
        if self._evaluation is not None and self._evaluation.poll():
            evaluation, self._evaluation = self._evaluation, None
            ui.evaluationLabel.text = evaluation.error or evaluation.sentence
            if evaluation.error is None:
                with self._errorsShown(_("The scores cannot be shown.")):
                    evaluation.fill(ui.evaluationTable)
        elif self._evaluation is not None:
            ui.evaluationLabel.text = self._evaluation.sentence
        if self._view is not None and self._view.poll():
            self._showModels()
        self._showButtons()

    def _showEstimate(self, process: Any) -> None:
        from M4oETrainingLib import Runs

        lines = [line for line in process.lines() if line.startswith('{"seconds"')]
        if process.code or not lines:
            slicer.util.errorDisplay(_("There is no estimate.") + "\n\n" + "\n".join(list(process.tail)[-6:]))
            return
        found = json.loads(lines[-1])
        gpu = _(", {size:.1f} GiB on the GPU").format(size=found["gpu_mib"] / 1024) if found["gpu_mib"] else ""
        self.ui.statusLabel.text = _("About {time}; memory {size:.1f} GiB{gpu}").format(
            time=Runs.duration(found["seconds"]), size=found["memory_mib"] / 1024, gpu=gpu
        )

    def _showButtons(self) -> None:
        ui, state = self.ui, self._view.state if self._view is not None else ""
        ui.pauseButton.enabled = state == "running"
        ui.stopButton.enabled = state in ("running", "pausing")
        ui.resumeButton.enabled = state in ("paused", "stopped", "failed")
        ui.startButton.enabled = ui.estimateButton.enabled = self._estimate is None
        ui.useModelButton.enabled = ui.reportButton.enabled = state == "finished"
        ui.forgetButton.enabled = ui.plotButton.enabled = self._view is not None
        ui.evaluateButton.enabled = self._evaluation is None
        ui.evaluationPlotButton.enabled = self._scored is not None and bool(self._scored.scores)
        ui.evaluationStopButton.enabled = self._evaluation is not None

    def _errorsShown(self, message: str) -> Any:
        from M4oESegmentationLib.Errors import errorsShown

        return errorsShown(message)


class M4oETrainingTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer."""

    def test_panelOpens(self) -> None:
        """The panel opens with nothing to do."""
        widget = slicer.modules.m4oetraining.widgetRepresentation().self()
        self.assertFalse(widget.ui.pauseButton.enabled)
