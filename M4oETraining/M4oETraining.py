"""Slicer module that trains M4oE models: data, runs that outlive Slicer, curves, evaluation."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
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
)

if importlib.util.find_spec("m4oe") is None:  # run from the source tree, not from an installed extension
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "Core"))
if importlib.util.find_spec("M4oESegmentationLib") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "M4oESegmentation"))

from M4oESegmentationLib.Errors import errorsShown
from M4oESegmentationLib.Panel import Panel


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


class M4oETrainingWidget(Panel):
    """The panel. A timer asks the processes what is new; where the user has to wait, the cursor says so."""

    period = 500

    def build(self) -> None:
        from M4oETrainingLib.Curves import Layout
        from M4oETrainingLib.Data import DataSection
        from M4oETrainingLib.Devices import DeviceSection
        from M4oETrainingLib.Estimate import EstimateSection
        from M4oETrainingLib.Evaluation import EvaluationSection

        ui, self.logic, self._view, self._plotLayout = self.ui, M4oETrainingLogic(), None, Layout()
        self._data = DataSection(ui, lambda: self.parameters)
        self._devices = DeviceSection(ui)
        self._estimate = EstimateSection(ui, lambda: self._command("--estimate"), self._choices)
        self._evaluation = EvaluationSection(ui, lambda: self.parameters.labels.strip(), self._plotLayout)
        ui.plotSelector.addItem(_("Loss"), "loss")
        ui.plotSelector.addItem(_("Dice per structure"), "dice")
        ui.baseModelSelector.connect("activated(int)", self.onBaseModel)
        ui.runFolderEdit.connect("currentPathChanged(QString)", self.onRunFolder)
        ui.startButton.connect("clicked()", self.onStart)
        ui.pauseButton.connect("clicked()", self.onPause)
        ui.resumeButton.connect("clicked()", self.onResume)
        ui.stopButton.connect("clicked()", self.onStop)
        ui.runSelector.connect("activated(int)", self.onRunChosen)
        ui.forgetButton.connect("clicked()", self.onForget)
        ui.plotButton.connect("toggled(bool)", self.onPlot)
        ui.plotSelector.connect("activated(int)", self.onPlot)
        ui.reportButton.connect("clicked()", self.onReport)
        ui.useModelButton.connect("clicked()", self.onUseModel)
        self._timer.start()

    def stop(self) -> None:
        """Ends all but the trainings: they go on."""
        for running in (self._data, self._devices, self._estimate, self._evaluation):
            running.stop()
        if self._view is not None:
            self._view.close()
        self._plotLayout.restore()

    def onSceneEndClose(self, caller: Any, event: str) -> None:
        self.ui.plotButton.checked = False  # the curves went with the scene; the training goes on
        Panel.onSceneEndClose(self, caller, event)

    # ---- choices

    def makeParameters(self, node: Any) -> Any:
        from M4oETrainingLib.Parameters import Parameters

        return Parameters(node)

    def showParameters(self) -> None:
        self._showModels()
        self._data.show()
        self._showRuns()
        self.showState()

    def showState(self) -> None:
        """Shows what is chosen."""
        from M4oESegmentationLib import Worker
        from M4oETrainingLib import Runs

        ui, chosen = self.ui, self.parameters
        text = Runs.stages(chosen, len(self._data.experts))
        ui.stagesLabel.text = _("Stages and steps: {stages}").format(stages=text)
        ui.pythonLabel.text = _("Runs in: {place} (M4oE Segmentation, Advanced)").format(
            place=Worker.labels()[Worker.place()]
        )
        if ui.runFolderEdit.currentPath != chosen.runFolder:  # not bound as the others: an empty Path would read "."
            ui.runFolderEdit.currentPath = chosen.runFolder
        if ui.baseModelSelector.currentData != chosen.baseModel:
            self._showModels()
        ui.modalitySelector.currentIndex = max(0, ui.modalitySelector.findData(chosen.modality))
        for widget in (ui.pretrainSpinBox, ui.synthesiseCheckBox):
            widget.enabled = not chosen.baseModel

    def onBaseModel(self, index: int) -> None:
        self.parameters.baseModel = self.ui.baseModelSelector.currentData

    def onRunFolder(self, path: str) -> None:
        if self.parameters is not None:
            self.parameters.runFolder = path

    def _showModels(self) -> None:
        """Fills the boxes with the installed models, and the run's own to score."""
        from M4oESegmentationLib import Models

        ui, base = self.ui, self.parameters.baseModel
        models = [(spec.name, path) for path, spec in Models.installedModels().items()]
        missing = [(Path(base).stem, base)] if base not in ("", *(path for name, path in models)) else []
        _fill(ui.baseModelSelector, [(_("A new model"), ""), *models, *missing], base)
        own = self._view.modelEntries() if self._view is not None else []
        _fill(ui.evaluationModelSelector, [*own, *models], ui.evaluationModelSelector.currentData)

    # ---- the run

    def onStart(self) -> None:
        with errorsShown(_("The training cannot be started.")):
            command = self._command()
            if self._isShown():
                self._closeView()  # its events begin anew
            self._start(str(Path(self.parameters.runFolder)), command)
        self._showRuns()

    def onResume(self) -> None:
        with errorsShown(_("The training cannot be resumed.")):
            self._start(str(self._view.run.folder), self._view.run.command)

    def onPause(self) -> None:
        with errorsShown(_("The training cannot be paused.")):
            self._view.run.pause()

    def onStop(self) -> None:
        with errorsShown(_("The training cannot be stopped.")):
            self._view.run.stop()

    def _command(self, *more: str) -> list[str]:
        """That of a training or an estimate with the panel's choices, whose folder is made ready for it."""
        from M4oETrainingLib import Runs

        command = Runs.command(self.parameters, self.ui.deviceSelector.currentData, *more)
        Runs.makeWay(self.parameters.runFolder)
        return command

    def _choices(self) -> list[str]:
        from M4oETrainingLib import Runs

        return Runs.choices(self.parameters, self.ui.deviceSelector.currentData)

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
        _fill(box, Runs.entries(), chosen or box.currentData)
        self.onRunChosen()

    def onRunChosen(self, index: int = 0) -> None:
        from M4oETrainingLib.RunView import RunView

        folder = self.ui.runSelector.currentData
        if self._view is not None and folder == str(self._view.run.folder):
            return
        self._closeView()
        with errorsShown(_("The run cannot be shown.")):
            self._view = RunView(folder, self.ui) if folder else None
        self._showModels()
        self.onTimer()

    def _isShown(self) -> bool:
        """Whether the run that is shown is that of the chosen folder."""
        return self._view is not None and self._view.run.folder == Path(self.parameters.runFolder)

    def _closeView(self) -> None:
        if self._view is not None:
            self._view.close()
        self._view = None
        self.ui.plotButton.checked = False

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
        from M4oETrainingLib import Runs

        with errorsShown(_("The model cannot be copied.")):
            self.ui.statusLabel.text = Runs.offer(self._view.model)
            self._showModels()

    # ---- what is new

    def onTimer(self) -> None:
        """Asks the processes, twice a second."""
        if self.parameters is None:
            return
        if self._data.poll():
            self.showState()
        self._devices.poll()
        self._estimate.poll()
        self._evaluation.poll()
        if self._view is not None and self._view.poll():
            self._showModels()
        self._showButtons()

    def _showButtons(self) -> None:
        ui, state = self.ui, self._view.state if self._view is not None else ""
        ui.pauseButton.enabled = state == "running"
        ui.stopButton.enabled = state in ("running", "pausing")
        ui.resumeButton.enabled = state in ("paused", "stopped", "failed")
        underWay = self._isShown() and state in ("running", "pausing", "stopping")
        ui.startButton.enabled = not self._estimate.busy and not underWay
        why = _("The training in this folder is under way") if underWay else ""
        why = why or (_("An estimate is under way") if self._estimate.busy else "")
        ui.startButton.toolTip = why or _("Start the training; it goes on when Slicer is closed")
        ui.estimateButton.enabled = not underWay
        ui.useModelButton.enabled = ui.reportButton.enabled = state == "finished"
        ui.forgetButton.enabled = ui.plotButton.enabled = self._view is not None


def _fill(box: Any, entries: Sequence[tuple[str, str]], chosen: str | None) -> None:
    """Fills a combo box with texts and their data, and chooses one, or the first where it is not there."""
    box.clear()
    for text, data in entries:
        box.addItem(text, data)
    box.currentIndex = max(0, box.findData(chosen))


class M4oETrainingTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer."""

    def runTest(self) -> None:
        """Runs as Slicer's Reload and Test does."""
        self.setUp()
        self.test_panelOpens()

    def setUp(self) -> None:
        """Starts each test with an empty scene."""
        slicer.mrmlScene.Clear(False)

    def test_panelOpens(self) -> None:
        """The panel of an empty scene has no data, says the stages, and lets Start say what is missing."""
        ui = slicer.modules.m4oetraining.widgetRepresentation().self().ui
        self.assertEqual((ui.dataTable.rowCount, ui.runFolderEdit.currentPath), (0, ""))
        self.assertIn("dense", ui.stagesLabel.text)
        self.assertTrue(ui.startButton.enabled)
