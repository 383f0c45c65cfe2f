"""Slice and 3D views drawn off screen by Slicer's own displayable managers, for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slicer
import vtk

_IN_SLICES = ("vtkMRMLSegmentationsDisplayableManager2D",)
_IN_3D = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
)


class _View:
    def __init__(self, size: tuple[int, int], factory: Any, managers: tuple[str, ...]) -> None:
        logic = slicer.app.applicationLogic()
        self.renderer = vtk.vtkRenderer()
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(*size)
        self.window.AddRenderer(self.renderer)
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self.window)
        self._interactor.Initialize()
        factory.SetMRMLApplicationLogic(logic)
        for manager in managers:
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self._group = slicer.vtkMRMLDisplayableManagerGroup()
        self._group.SetRenderer(self.renderer)
        self._group.Initialize(factory, self.renderer)

    def show(self, node: Any) -> None:
        node.SetMappedInLayout(1)
        self._group.SetMRMLDisplayableNode(node)

    def save(self, path: Path) -> None:
        """Writes what the view shows as PNG."""
        self._interactor.Render()
        picture = vtk.vtkWindowToImageFilter()
        picture.SetInput(self.window)
        picture.ReadFrontBufferOff()
        picture.Update()
        writer = vtk.vtkPNGWriter()
        writer.SetFileName(str(path))
        writer.SetInputConnection(picture.GetOutputPort())
        writer.Write()


class SliceView(_View):
    """A slice of a volume with the segmentations over it."""

    def __init__(self, volumeNode: Any, name: str, orientation: str, size: tuple[int, int] = (500, 500)) -> None:
        super().__init__(size, slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance(), _IN_SLICES)
        logic = slicer.app.applicationLogic()
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(logic)
        logic.GetSliceLogics().AddItem(self.logic)
        self.logic.SetMRMLScene(slicer.mrmlScene)
        node = self.logic.AddSliceNode(name)
        node.SetOrientation(orientation)
        self.show(node)
        self.logic.GetSliceCompositeNode().SetBackgroundVolumeID(volumeNode.GetID())
        self.logic.ResizeSliceNode(*size)
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
    """The surfaces of the segmentations, from the front."""

    def __init__(self, name: str, size: tuple[int, int] = (500, 500)) -> None:
        super().__init__(size, slicer.vtkMRMLThreeDViewDisplayableManagerFactory.GetInstance(), _IN_3D)
        logic = slicer.app.applicationLogic()
        self.logic = slicer.vtkMRMLViewLogic()
        self.logic.SetMRMLApplicationLogic(logic)
        logic.GetViewLogics().AddItem(self.logic)
        self.logic.SetMRMLScene(slicer.mrmlScene)
        node = self.logic.AddViewNode(name)
        node.SetBoxVisible(False)
        node.SetAxisLabelsVisible(False)
        self.show(node)

    def look_from_the_front(self) -> None:
        self.renderer.ResetCamera()
        camera = self.renderer.GetActiveCamera()
        focus, distance = camera.GetFocalPoint(), camera.GetDistance()
        camera.SetPosition(focus[0], focus[1] + distance, focus[2])
        camera.SetViewUp(0, 0, 1)
        self.renderer.ResetCamera()
        camera.Zoom(1.2)
        self.renderer.ResetCameraClippingRange()
