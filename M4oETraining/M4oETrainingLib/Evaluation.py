"""A model on chosen cases: `m4oe segment`, then `m4oe evaluate`, in the worker's Python; a table of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qt
import slicer
import vtk
from m4oe.labels import structure
from M4oESegmentationLib import Worker
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _

from .Curves import removeNodes

_METRICS = {"dice": "{:.3f}", "nsd": "{:.3f}", "hd95_mm": "{:.1f}"}


class Evaluation:
    """An evaluation under way. Ask `poll` from a timer until it says that all is done.

    Attributes:
        scores: Mean Dice by structure, at the end.
    """

    def __init__(self, ui: Any, labels: str) -> None:
        """Starts it with what is chosen in the panel.

        Args:
            ui: The panel's widgets.
            labels: What values of the truth mean, where neither the files nor a labels.csv beside them say it.

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
        segment = ["segment", images, "-o", str(found), "--model", model, "--device", device]
        score = ["evaluate", str(found), truth, "-o", str(self._scores), *(["--labels", meanings] if meanings else [])]
        self._environment, self._waiting = Worker.environment(), [Worker.localCommand(*score)]
        self._process = Process(Worker.localCommand(*segment), self._environment)
        self._ui, self._stopped = ui, False
        self.scores: dict[str, float] = {}
        self._nodes: list[Any] = []
        ui.evaluationLabel.text = _("Segmenting the cases")

    def poll(self) -> bool:
        """Goes on, and shows how far it is; whether all is done."""
        if not self._process.done():
            return False
        label = self._ui.evaluationLabel
        if self._stopped or self._process.code not in (0, 1):
            label.text = _("Stopped") if self._stopped else self._process.lastWords()
            return True
        if self._waiting:
            self._process = Process(self._waiting.pop(), self._environment)
            label.text = _("Scoring the cases")
            return False
        try:
            self._fill(self._ui.evaluationTable)
            label.text = _("The scores are in {folder}").format(folder=self._scores)
        except (OSError, ValueError, LookupError):  # the command said why
            label.text = self._process.lastWords()
        return True

    def stop(self) -> None:
        self._stopped = True
        self._process.stop()

    def _fill(self, table: Any) -> None:
        """Shows the means by structure."""
        model = json.loads((self._scores / "summary.json").read_text(encoding="utf-8"))["models"][0]
        table.setColumnCount(5)
        table.setHorizontalHeaderLabels([_("Structure"), _("Cases"), _("Dice"), _("NSD"), _("HD95 (mm)")])
        table.setRowCount(len(model["structures"]))
        for row, (key, entry) in enumerate(model["structures"].items()):
            means = {metric: (entry[metric] or {}).get("mean") for metric in _METRICS}
            texts = ["-" if means[metric] is None else form.format(means[metric]) for metric, form in _METRICS.items()]
            for column, text in enumerate([structure(key).name, str(entry["in_truth"]), *texts]):
                table.setItem(row, column, qt.QTableWidgetItem(text))
            if means["dice"] is not None:
                self.scores[structure(key).name] = means["dice"]
        table.verticalHeader().setVisible(False)
        table.resizeColumnsToContents()

    def plot(self) -> None:
        """Shows the mean Dice of each structure as bars in Slicer's plot view.

        A series per structure, as the plot view names series in its legend but no bar below it.
        """
        removeNodes(self._nodes)
        add = slicer.mrmlScene.AddNewNodeByClass
        table, chart = add("vtkMRMLTableNode", _("Scores")), add("vtkMRMLPlotChartNode", _("Evaluation"))
        self._nodes = [table, chart]
        for name, dice in self.scores.items():
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
