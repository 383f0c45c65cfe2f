"""Curves of a run in Slicer's own plot views: tables that grow by a row, never built anew."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import slicer
import slicer.util
import vtk
from slicer.i18n import tr as _

_STEP = "step"
_PLOT_LAYOUTS = range(36, 40)


class Curves:
    """One chart. Values are kept here and go to the scene when it is shown.

    Attributes:
        chart: Its node; None while it is not shown or when the scene was closed.
    """

    def __init__(self, title: str, yTitle: str, marked: bool = False) -> None:
        """Starts without values.

        Args:
            title: Of the chart.
            yTitle: Of its values.
            marked: Whether each value gets a dot; of many values the dots would hide the curve.
        """
        self._title, self._yTitle, self._marked = title, yTitle, marked
        self._rows: list[tuple[float, dict[str, float]]] = []
        self._written = 0
        self._table: Any = None
        self._series: dict[str, Any] = {}
        self.chart: Any = None

    def take(self, step: float, values: dict[str, float]) -> None:
        self._rows.append((step, values))

    def show(self) -> None:
        """Puts the chart into the layout; makes its nodes where they are missing."""
        if not self._alive():
            self.remove()
            add = slicer.mrmlScene.AddNewNodeByClass
            self._table, self._written = add("vtkMRMLTableNode", self._title), 0
            self.chart = add("vtkMRMLPlotChartNode", self._title)
            self.chart.SetTitle(self._title)
            self.chart.SetXAxisTitle(_("Step"))
            self.chart.SetYAxisTitle(self._yTitle)
            self._addColumn(_STEP)
        self.update()
        slicer.modules.plots.logic().ShowChartInLayout(self.chart)

    def update(self) -> None:
        """Appends what is new, if the chart is in the scene."""
        if not self._alive() or self._written == len(self._rows):
            return
        with slicer.util.NodeModify(self._table):
            for step, values in self._rows[self._written :]:
                self._append(step, values)
        self._written = len(self._rows)

    def remove(self) -> None:
        """Takes the nodes out of the scene."""
        removeNodes([self.chart, *self._series.values(), self._table])
        self.chart = self._table = None
        self._series = {}

    def _alive(self) -> bool:
        return all(node is not None and node.GetScene() is slicer.mrmlScene for node in (self.chart, self._table))

    def _append(self, step: float, values: dict[str, float]) -> None:
        for name in values:
            if name not in self._series:
                self._addSeries(name)
        table = self._table.GetTable()
        row = table.InsertNextBlankRow()
        table.GetColumnByName(_STEP).SetValue(row, step)
        for name in self._series:
            table.GetColumnByName(name).SetValue(row, values.get(name, math.nan))
        table.Modified()

    def _addColumn(self, name: str) -> None:
        column = vtk.vtkDoubleArray()
        column.SetName(name)
        for _row in range(self._table.GetTable().GetNumberOfRows()):
            column.InsertNextValue(math.nan)
        self._table.AddColumn(column)

    def _addSeries(self, name: str) -> None:
        self._addColumn(name)
        series = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLPlotSeriesNode", name)
        series.SetAndObserveTableNodeID(self._table.GetID())
        series.SetXColumnName(_STEP)
        series.SetYColumnName(name)
        series.SetPlotType(series.PlotTypeScatter)
        series.SetMarkerStyle(series.MarkerStyleCircle if self._marked else series.MarkerStyleNone)
        series.SetUniqueColor()
        self._series[name] = series
        self.chart.AddAndObservePlotSeriesNodeID(series.GetID())


def removeNodes(nodes: Iterable[Any]) -> None:
    """Takes those out of the scene that are in it."""
    for node in nodes:
        if node is not None and node.GetScene() is slicer.mrmlScene:
            slicer.mrmlScene.RemoveNode(node)


class Layout:
    """The user's layout, remembered while a plot is shown."""

    def __init__(self) -> None:
        self._own: int | None = None

    def remember(self) -> None:
        layout = slicer.app.layoutManager().layout
        if self._own is None and layout not in _PLOT_LAYOUTS:
            self._own = layout

    def restore(self) -> None:
        if self._own is not None:
            slicer.app.layoutManager().setLayout(self._own)
        self._own = None
