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

_METRICS = {"dice": "{:.3f}", "nsd": "{:.3f}", "hd95_mm": "{:.1f}"}


class Evaluation:
    """An evaluation under way. Ask `poll` from a timer until it says that all is done.

    Attributes:
        sentence: What it does, or how it ended.
        error: Why it could not; None while all is well.
        scores: Mean Dice by structure, at the end.
    """

    def __init__(self, model: str, images: str, truth: str, folder: str, device: str, labels: str) -> None:
        """Starts it.

        Args:
            model: File or name.
            images: Folder of volumes, or a file.
            truth: The same with true segmentations.
            folder: For the results.
            device: Of the network.
            labels: What values of the truth mean, where neither the files nor a labels.csv beside them say it.

        Raises:
            ValueError: Something that was given cannot be used.
        """
        for path, what in ((images, _("the volumes")), (truth, _("the true segmentations"))):
            if not path or not Path(path).exists():
                raise ValueError(_("Choose the folder of {what}.").format(what=what))
        if not folder or not model:
            raise ValueError(_("Choose a model and a folder for the results of the evaluation."))
        self._folder = Path(folder)
        found = str(self._folder / "segmentations")
        segment = ["segment", images, "-o", found, "--model", model, "--device", device]
        meanings = labels or next((str(path) for path in [Path(truth) / "labels.csv"] if path.exists()), "")
        score = ["evaluate", found, truth, "-o", str(self._folder / "scores")]
        self._commands = [[*score, *(["--labels", meanings] if meanings else [])]]
        self._process = Process(Worker.command(*segment), Worker.environment())
        self.sentence, self.error = _("Segmenting the cases"), None
        self._stopped = False
        self.scores: dict[str, float] = {}
        self._chart: Any = None

    def poll(self) -> bool:
        """Goes on; whether all is done."""
        if not self._process.done():
            return False
        if self._stopped:
            self.error = _("Stopped")
            return True
        summary = self._folder / "scores" / "summary.json"
        if self._process.code not in (0, 1) or not (self._commands or summary.exists()):
            self.error = "\n".join([line for line in self._process.tail if line.strip()][-6:])
            return True
        if self._commands:
            self._process = Process(Worker.command(*self._commands.pop(0)), Worker.environment())
            self.sentence = _("Scoring the cases")
            return False
        self.sentence = _("The scores are in {folder}").format(folder=self._folder / "scores")
        return True

    def stop(self) -> None:
        self._stopped = True
        self._process.stop()

    def fill(self, table: Any) -> None:
        """Shows the means by structure."""
        model = json.loads((self._folder / "scores" / "summary.json").read_text(encoding="utf-8"))["models"][0]
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
        """Shows the mean Dice of each structure as bars in Slicer's plot view."""
        if self._chart is None or self._chart.GetScene() is not slicer.mrmlScene:
            self._chart = self._newChart()
        slicer.modules.plots.logic().ShowChartInLayout(self._chart)

    def _newChart(self) -> Any:
        """A chart with a series per structure, as the plot view names series in its legend but no bar below it."""
        add = slicer.mrmlScene.AddNewNodeByClass
        table, chart = add("vtkMRMLTableNode", _("Scores")), add("vtkMRMLPlotChartNode", _("Evaluation"))
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
        chart.SetTitle(_("Evaluation"))
        chart.SetYAxisTitle(_("Dice"))
        chart.SetXAxisRangeAuto(False)
        chart.SetXAxisRange(-0.5, 1.0)  # the bars stand around 0, the legend beside them
        return chart
