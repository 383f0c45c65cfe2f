"""Real MRML nodes without the application: the slicer-core wheel, one scene, and an eye on VTK's warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicer
import slicer.util
import vtk
from numpy.typing import ArrayLike, NDArray


@pytest.fixture(scope="session")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The one application logic with its scene, and the module logics that nodes ask for."""
    vtk.vtkLogger.SetStderrVerbosity(vtk.vtkLogger.VERBOSITY_OFF)
    vtk.vtkOutputWindow.SetInstance(vtk.vtkStringOutputWindow())  # the wheel brings no colour files and says so
    scene, application = slicer.vtkMRMLScene(), slicer.vtkSlicerApplicationLogic()
    application.SetTemporaryPath(str(tmp_path_factory.mktemp("slicer")))
    application.SetMRMLScene(scene)
    application.GetColorLogic().SetMRMLScene(scene)
    application.GetColorLogic().AddDefaultColorNodes()
    slicer.mrmlScene, slicer.modules = scene, SimpleNamespace()
    for name, logic in (
        ("Colors", application.GetColorLogic()),
        ("Volumes", slicer.vtkSlicerVolumesLogic()),
        ("Segmentations", slicer.vtkSlicerSegmentationsModuleLogic()),
    ):
        _add_module(application, name, logic)
    yield application
    scene.Clear(True)


@pytest.fixture(autouse=True)
def scene(application: Any) -> Iterator[Any]:
    """An empty scene; the test fails if VTK or MRML complained."""
    scene = application.GetMRMLScene()
    scene.Clear(False)
    complaints = vtk.vtkStringOutputWindow()
    vtk.vtkOutputWindow.SetInstance(complaints)
    yield scene
    assert complaints.GetOutput() == ""


@pytest.fixture
def volume_node_of(scene: Any) -> Callable[..., Any]:
    """Makes a volume node of an array [k, j, i] and an affine, voxel to RAS mm."""

    def make(array: NDArray[Any], affine: ArrayLike | None = None, name: str = "CT") -> Any:
        return slicer.util.addVolumeFromArray(array, ijkToRAS=np.eye(4) if affine is None else affine, name=name)

    return make


@pytest.fixture
def segmentation_node(scene: Any) -> Any:
    return scene.AddNewNodeByClass("vtkMRMLSegmentationNode", "organs")


def _add_module(application: Any, name: str, logic: Any) -> None:
    logic.SetMRMLApplicationLogic(application)
    logic.SetMRMLScene(application.GetMRMLScene())
    application.SetModuleLogic(name, logic)
    setattr(slicer.modules, name.lower(), SimpleNamespace(logic=lambda: logic))
