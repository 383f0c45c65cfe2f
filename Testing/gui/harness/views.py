"""Slice, 3D and plot views drawn off screen, for pictures: the first two by Slicer's own displayable managers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer
import vtk


class _View:
    """A view with a node and a logic of its own.

    Attributes:
        kind: The word of its logic and node in MRML's names.
        factory: Class that makes its displayable managers.
        managers: Their classes.
    """

    kind: str
    factory: Any
    managers: tuple[str, ...]

    def __init__(self, name: str, size: tuple[int, int] = (500, 500)) -> None:
        application, factory = slicer.app.applicationLogic(), self.factory.GetInstance()
        self._size = size
        self.renderer = vtk.vtkRenderer()
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(*size)
        self.window.AddRenderer(self.renderer)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self.window)
        self._interactor.Initialize()
        factory.SetMRMLApplicationLogic(application)
        for manager in self.managers:
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self._group = slicer.vtkMRMLDisplayableManagerGroup()
        self._group.SetRenderer(self.renderer)
        self._group.Initialize(factory, self.renderer)
        self.logic = getattr(slicer, f"vtkMRML{self.kind}Logic")()
        self.logic.SetMRMLApplicationLogic(application)
        getattr(application, f"Get{self.kind}Logics")().AddItem(self.logic)
        self.logic.SetMRMLScene(slicer.mrmlScene)
        self.node = getattr(self.logic, f"Add{self.kind}Node")(name)
        self.node.SetMappedInLayout(1)
        self._group.SetMRMLDisplayableNode(self.node)

    def save(self, path: Path) -> None:
        """Writes what the view shows as PNG."""
        self._interactor.Render()
        _write(self.window, path)


class SliceView(_View):
    """A slice of a volume with the segmentations over it."""

    kind = "Slice"
    factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory
    managers = ("vtkMRMLSegmentationsDisplayableManager2D",)

    def show(self, volumeNode: Any, orientation: str) -> None:
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        self.node.SetOrientation(orientation)
        self.logic.GetSliceCompositeNode().SetBackgroundVolumeID(volumeNode.GetID())
        self.logic.ResizeSliceNode(*self._size)
        self.logic.FitSliceToBackground()
        mapper = vtk.vtkImageMapper()
        mapper.SetColorWindow(255)
        mapper.SetColorLevel(127.5)
        mapper.SetInputConnection(self.logic.GetImageDataConnection())
        image = vtk.vtkActor2D()
        image.SetMapper(mapper)
        image.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(image)


class ThreeDView(_View):
    """The surfaces of the segmentations."""

    kind = "View"
    factory = slicer.vtkMRMLThreeDViewDisplayableManagerFactory
    managers = (
        "vtkMRMLCameraDisplayableManager",
        "vtkMRMLViewDisplayableManager",
        "vtkMRMLSegmentationsDisplayableManager3D",
    )

    def look_from_the_front(self) -> None:
        self.node.SetBoxVisible(False)
        self.node.SetAxisLabelsVisible(False)
        self.renderer.ResetCamera()
        camera = self.renderer.GetActiveCamera()
        focus, distance = camera.GetFocalPoint(), camera.GetDistance()
        camera.SetPosition(focus[0], focus[1] + distance, focus[2])
        camera.SetViewUp(0, 0, 1)
        self.renderer.ResetCamera()
        camera.Zoom(1.2)
        self.renderer.ResetCameraClippingRange()


def save_chart(chart: Any, path: Path, size: tuple[int, int] = (700, 420)) -> None:
    """Writes a chart node as PNG, drawn as Slicer's plot view would: VTK's chart in the look of the series nodes.

    The plot view itself is a widget of Slicer, which is not here.
    """
    view, drawn = vtk.vtkContextView(), vtk.vtkChartXY()
    window = view.GetRenderWindow()
    window.SetOffScreenRendering(1)
    window.SetMultiSamples(0)
    window.SetSize(*size)
    view.GetRenderer().SetBackground(1, 1, 1)
    view.GetScene().AddItem(drawn)
    drawn.SetTitle(chart.GetTitle())
    drawn.SetShowLegend(chart.GetLegendVisibility())
    drawn.GetBackgroundBrush().SetColor(255, 253, 246)
    for axis, title in ((vtk.vtkAxis.BOTTOM, chart.GetXAxisTitle()), (vtk.vtkAxis.LEFT, chart.GetYAxisTitle())):
        drawn.GetAxis(axis).SetTitle(title or "")
    if not chart.GetXAxisRangeAuto():
        drawn.GetAxis(vtk.vtkAxis.BOTTOM).SetBehavior(vtk.vtkAxis.FIXED)
        drawn.GetAxis(vtk.vtkAxis.BOTTOM).SetRange(*chart.GetXAxisRange())
    for number in range(chart.GetNumberOfPlotSeriesNodes()):
        series = chart.GetNthPlotSeriesNode(number)
        isBar = series.GetPlotType() == series.PlotTypeBar
        plot = drawn.AddPlot(vtk.vtkChart.BAR if isBar else vtk.vtkChart.LINE)
        plot.SetUseIndexForXSeries(isBar)
        x = series.GetYColumnName() if isBar else series.GetXColumnName()
        plot.SetInputData(series.GetTableNode().GetTable(), x, series.GetYColumnName())
        plot.SetLabel(series.GetName())
        plot.SetColorF(*series.GetColor())
        plot.SetWidth(series.GetLineWidth())
        if not isBar:
            plot.SetMarkerStyle(series.GetMarkerStyle())  # the same numbers in VTK and MRML
            plot.SetMarkerSize(series.GetMarkerSize())
    view.Render()
    _write(window, path)


def _write(window: Any, path: Path) -> None:
    picture = vtk.vtkWindowToImageFilter()
    picture.SetInput(window)
    picture.ReadFrontBufferOff()
    picture.Update()
    writer = vtk.vtkPNGWriter()
    writer.SetFileName(str(path))
    writer.SetInputConnection(picture.GetOutputPort())
    writer.Write()
