"""A model on chosen cases: `m4oe segment`, then `m4oe evaluate`, in the worker's Python; a table of the scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import qt
import slicer
import slicer.util
import vtk
from m4oe.labels import structure
from M4oESegmentationLib import Worker
from M4oESegmentationLib.Errors import errorsShown
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _

from .Curves import Layout, removeNodes

_METRICS = {"dice": "{:.3f}", "nsd": "{:.3f}", "hd95_mm": "{:.1f}"}


class EvaluationSection:
    """The panel's part for evaluations; at most one is under way, and the scores shown are those of the last."""

    def __init__(self, ui: Any, labels: Callable[[], str], layout: Layout) -> None:
        """Connects the widgets.

        Args:
            ui: The panel's widgets.
            labels: Gives what values of the truth mean, where neither the files nor a labels.csv beside them say it.
            layout: The user's, which the plot replaces.
        """
        self._ui, self._labels, self._layout = ui, labels, layout
        self._running: Evaluation | None = None
        self._scores: dict[str, float] = {}
        self._nodes: list[Any] = []
        ui.evaluateButton.connect("clicked()", self._start)
        ui.evaluationStopButton.connect("clicked()", self.stop)
        ui.evaluationPlotButton.connect("clicked()", self._plot)

    @property
    def busy(self) -> bool:
        return self._running is not None

    def poll(self) -> None:
        """Goes on, and enables what can be used."""
        ui = self._ui
        if self._running is not None:
            ended, ui.evaluationLabel.text = self._running.poll()
            if ended:
                self._show(self._running.structures)
                self._running = None
        ui.evaluateButton.enabled = not self.busy
        ui.evaluationStopButton.enabled = self.busy
        ui.evaluationPlotButton.enabled = bool(self._scores)

    def stop(self) -> None:
        """Ends the one under way."""
        if self._running is not None:
            self._running.stop()

    def _start(self) -> None:
        with errorsShown(_("The evaluation cannot be started.")), slicer.util.WaitCursor():
            self._running = Evaluation(self._ui, self._labels())
            self._show({})  # those of another model would stand below what is said of this one

    def _show(self, structures: dict[str, Any]) -> None:
        """Shows the means by structure."""
        table = self._ui.evaluationTable
        table.setColumnCount(5)
        table.setHorizontalHeaderLabels([_("Structure"), _("Cases"), _("Dice"), _("NSD"), _("HD95 (mm)")])
        table.setRowCount(len(structures))
        self._scores = {}
        removeNodes(self._nodes)
        for row, (key, entry) in enumerate(structures.items()):
            means = {metric: (entry[metric] or {}).get("mean") for metric in _METRICS}
            texts = ["-" if means[metric] is None else form.format(means[metric]) for metric, form in _METRICS.items()]
            for column, text in enumerate([structure(key).name, str(entry["in_truth"]), *texts]):
                table.setItem(row, column, qt.QTableWidgetItem(text))
            if means["dice"] is not None:
                self._scores[structure(key).name] = means["dice"]
        table.verticalHeader().setVisible(False)
        table.resizeColumnsToContents()

    def _plot(self) -> None:
        """Shows the mean Dice of each structure as bars in Slicer's plot view.

        A series per structure, as the plot view names series in its legend but no bar below it.
        """
        self._layout.remember()
        removeNodes(self._nodes)
        add = slicer.mrmlScene.AddNewNodeByClass
        table, chart = add("vtkMRMLTableNode", _("Scores")), add("vtkMRMLPlotChartNode", _("Evaluation"))
        self._nodes = [table, chart]
        for name, dice in self._scores.items():
            column = vtk.vtkDoubleArray()
            column.SetName(name)
            column.InsertNextValue(dice)
            table.AddColumn(column)
            series = add("vtkMRMLPlotSeriesNode", name)
            series.SetAndObserveTableNodeID(table.GetID())
            series.SetPlotType(series.PlotTypeBar)
            series.SetYColumnName(name)
            series.SetUniqueColor()
            chart.AddAndObservePlotSeriesNodeID(series.GetID())
            self._nodes.append(series)
        chart.SetTitle(_("Evaluation"))
        chart.SetYAxisTitle(_("Dice"))
        chart.SetXAxisRangeAuto(False)
        chart.SetXAxisRange(-0.5, 1.0)  # the bars stand around 0, the legend beside them
        slicer.modules.plots.logic().ShowChartInLayout(chart)


class Evaluation:
    """An evaluation under way. Ask `poll` from a timer until it says that all is done.

    Attributes:
        structures: What summary.json says of each, at the end.
    """

    def __init__(self, ui: Any, labels: str) -> None:
        """Starts it with what is chosen in the panel.

        Raises:
            ValueError: Something that was chosen cannot be used.
        """
        images, truth, folder = (
            edit.currentPath for edit in (ui.evaluationImagesEdit, ui.evaluationTruthEdit, ui.evaluationFolderEdit)
        )
        model, device = ui.evaluationModelSelector.currentData, ui.deviceSelector.currentData
        for path, what in ((images, _("the volumes")), (truth, _("the true segmentations"))):
            if not path or not Path(path).exists():
                raise ValueError(_("Choose the folder of {what}.").format(what=what))
        if not folder or not model:
            raise ValueError(_("Choose a model and a folder for the results of the evaluation."))
        found, self._scores = Path(folder, "segmentations"), Path(folder, "scores")
        if found.exists():  # cases of another model would be scored with those of this one
            raise ValueError(_("{folder} holds an evaluation already. Choose another folder.").format(folder=folder))
        meanings = labels or next((str(path) for path in [Path(truth) / "labels.csv"] if path.exists()), "")
        _checkMeanings(Path(truth), meanings)
        segment = ["segment", images, "-o", str(found), "--model", model, "--device", device]
        score = ["evaluate", str(found), truth, "-o", str(self._scores), *(["--labels", meanings] if meanings else [])]
        self._environment, self._waiting = Worker.environment(), [Worker.localCommand(*score)]
        self._process = Process(Worker.localCommand(*segment), self._environment)
        self._stopped, self._text = False, _("Segmenting the cases")
        self._model = ui.evaluationModelSelector.currentText
        self.structures: dict[str, Any] = {}

    def poll(self) -> tuple[bool, str]:
        """Goes on; whether all is done, and how far it is, for people."""
        if not self._process.done():
            return False, self._text
        if self._stopped or self._process.code not in (0, 1):
            return True, _("Stopped") if self._stopped else self._process.lastWords()
        if self._waiting:
            self._process, self._text = Process(self._waiting.pop(), self._environment), _("Scoring the cases")
            return False, self._text
        try:
            summary = json.loads((self._scores / "summary.json").read_text(encoding="utf-8"))
            self.structures = summary["models"][0]["structures"]
        except (OSError, ValueError, LookupError):  # the command said why
            return True, self._process.lastWords()
        return True, _("Scores of {model}, {time}, in {folder}").format(
            model=self._model, time=datetime.now().strftime("%Y-%m-%d %H:%M"), folder=self._scores
        )

    def stop(self) -> None:
        self._stopped = True
        self._process.stop()


def _checkMeanings(truth: Path, meanings: str) -> None:
    """Finds out early whether it is known what the values of the truth mean, as segmenting takes long.

    Raises:
        ValueError: It is not known of any case, or what was said of them is not understood.
    """
    from m4oe.evaluation_files import pair_files
    from m4oe.labelmap import label_keys
    from m4oe.names import read_meanings

    where = _("Say what they mean in the field Label values, in the section Data.")
    if meanings:
        try:
            read_meanings(meanings)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}. {where}") from error
        return
    errors = []
    for _predicted, path in pair_files(truth, truth).cases.values():
        try:
            label_keys(path)
        except (OSError, ValueError) as error:
            errors.append(error)
        except ImportError:  # no pynrrd here; the command itself will say it
            return
        else:
            return
    if errors:
        raise ValueError(f"{errors[0]} {where}")
