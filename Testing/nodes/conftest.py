"""Real MRML nodes without the application: the slicer-core wheel, one scene, and an eye on VTK's warnings.

slicer-core lacks what a scripted module imports from the application; small stand-ins take that place.
"""

from __future__ import annotations

import importlib
import sys
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicer
import slicer.util
import vtk
from numpy.typing import ArrayLike, NDArray

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture
def segmentation_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """M4oESegmentation.py, imported as Slicer does, on top of the stand-ins."""
    for name, content in _stand_ins().items():
        module = ModuleType(f"slicer.{name}")
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(ROOT / "M4oESegmentation"))
    yield importlib.import_module("M4oESegmentation")
    del sys.modules["M4oESegmentation"]


def _add_module(application: Any, name: str, logic: Any) -> None:
    logic.SetMRMLApplicationLogic(application)
    logic.SetMRMLScene(application.GetMRMLScene())
    application.SetModuleLogic(name, logic)
    setattr(slicer.modules, name.lower(), SimpleNamespace(logic=lambda: logic))


def _stand_ins() -> dict[str, dict[str, Any]]:
    class ScriptedLoadableModule:
        def __init__(self, parent: Any) -> None:
            self.parent = parent

    class ScriptedLoadableModuleLogic:
        def __init__(self, parent: Any = None) -> None:
            self.parent = parent

    class ScriptedLoadableModuleTest(unittest.TestCase):
        pass

    bases = (ScriptedLoadableModule, ScriptedLoadableModuleLogic, ScriptedLoadableModuleTest)
    return {
        "ScriptedLoadableModule": {base.__name__: base for base in bases},
        "i18n": {"tr": lambda text: text, "translate": lambda context, text: text},
    }
