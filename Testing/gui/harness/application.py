"""Slicer as a module meets it: the scene with its logics, slicer.app, the base classes of modules, dialogs.

Dialogs are not shown: what they would say is collected, and questions are answered as a test wants.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
import slicer.util
import vtk
from PySide6 import QtWidgets
from PySide6.QtCore import QObject, Signal

_LOGICS = {
    "Volumes": "vtkSlicerVolumesLogic",
    "Segmentations": "vtkSlicerSegmentationsModuleLogic",
    "SubjectHierarchy": "vtkSlicerSubjectHierarchyModuleLogic",
    "Tables": "vtkSlicerTablesLogic",
    "Plots": "vtkSlicerPlotsLogic",
    "Models": "vtkSlicerModelsLogic",
    "Units": "vtkSlicerUnitsLogic",
    "Sequences": "vtkSlicerSequencesLogic",
    "Markups": "vtkSlicerMarkupsLogic",
    "Cameras": "vtkSlicerCamerasModuleLogic",
}
_DATA = (slicer.vtkMRMLDisplayableNode, slicer.vtkMRMLTableNode)  # nodes that get an item in the subject hierarchy
PLOT_LAYOUT = 36


class Dialogs:
    """What the user was told, and how questions are answered."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.answer = True
        self.path = ""

    def tell(self, kind: str) -> Callable[..., Any]:
        def show(text: str, *arguments: Any, **keywords: Any) -> None:
            self.said.append((kind, text))

        return show

    def ask(self, text: str, *arguments: Any, **keywords: Any) -> bool:
        self.said.append(("question", text))
        return self.answer

    @property
    def errors(self) -> list[str]:
        return [text for kind, text in self.said if kind == "error"]


class _Plots:
    """Stands in for the plots module's GUI logic: remembers what is shown."""

    def __init__(self, logic: Any) -> None:
        self._logic, self.shown = logic, None

    def ShowChartInLayout(self, chart: Any) -> None:
        self.shown = chart
        slicer.app.layoutManager().setLayout(PLOT_LAYOUT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._logic, name)


class LayoutManager:
    def __init__(self) -> None:
        self.layout = 3

    def setLayout(self, layout: int) -> None:
        self.layout = layout


class ModuleManager(QObject):
    stand_in = True
    signatures = {"moduleAboutToBeUnloaded(QString)": "moduleAboutToBeUnloaded"}
    moduleAboutToBeUnloaded = Signal(str)


class ExtensionsManagerModel:
    def __init__(self) -> None:
        self.installed: list[str] = []

    def isExtensionInstalled(self, name: str) -> bool:
        return name in self.installed

    def installExtensionFromServer(self, name: str, restart: bool = True, update: bool = False) -> bool:
        if restart:
            raise AssertionError("Slicer would restart here, without asking for the scene")
        self.installed.append(name)
        return True


class IOManager:
    """Loads and saves by the storage classes of slicer-core."""

    def addDefaultStorageNodes(self) -> None:
        pass


class Application(QObject):
    stand_in = True
    signatures = {"startupCompleted()": "startupCompleted"}
    startupCompleted = Signal()
    majorVersion, minorVersion, revision, applicationVersion = 5, 13, "31053", "5.13.0"
    documentationBaseUrl = "https://slicer.readthedocs.io/en/latest/"

    def __init__(self, logic: Any) -> None:
        super().__init__()
        self._logic = logic
        self._layouts, self._modules, self._extensions = LayoutManager(), ModuleManager(), ExtensionsManagerModel()
        self._io = IOManager()
        self.temporaryPath = logic.GetTemporaryPath()

    def applicationLogic(self) -> Any:
        return self._logic

    def mrmlScene(self) -> Any:
        return slicer.mrmlScene

    def processEvents(self, *flags: Any) -> None:
        QtWidgets.QApplication.processEvents()

    def moduleManager(self) -> Any:
        return self._modules

    def layoutManager(self) -> Any:
        return self._layouts

    def extensionsManagerModel(self) -> Any:
        return self._extensions

    def coreIOManager(self) -> Any:
        return self._io

    ioManager = coreIOManager

    def startupEnvironment(self) -> Any:
        """Without a variable of those that Slicer's launcher sets."""
        import qt

        environment = qt.QProcessEnvironment.systemEnvironment()
        environment.remove("SLICER_HOME")
        return environment

    def clipboard(self) -> Any:
        return QtWidgets.QApplication.clipboard()

    def moduleDocumentationUrl(self, name: str) -> str:
        return f"https://example.org/{name}"

    def pauseRender(self) -> None:
        pass

    def resumeRender(self) -> None:
        pass

    def setOverrideCursor(self, cursor: Any) -> None:
        pass

    def restoreOverrideCursor(self) -> None:
        pass


def boot() -> tuple[Any, Any]:
    """Makes the scene, its logics and `slicer.modules`; returns the scene and the application logic."""
    vtk.vtkLogger.SetStderrVerbosity(vtk.vtkLogger.VERBOSITY_OFF)
    vtk.vtkOutputWindow.SetInstance(vtk.vtkStringOutputWindow())  # the wheel brings no colour files and says so
    scene, logic = slicer.vtkMRMLScene(), slicer.vtkSlicerApplicationLogic()
    logic.SetTemporaryPath(tempfile.mkdtemp(prefix="m4oe-gui-"))
    logic.SetMRMLScene(scene)
    logic.GetColorLogic().SetMRMLScene(scene)
    logic.GetColorLogic().AddDefaultColorNodes()
    logic.SetSliceLogics(vtk.vtkCollection())
    logic.SetViewLogics(vtk.vtkCollection())
    slicer.mrmlScene, slicer.modules = scene, types.SimpleNamespace()
    made = {"Colors": logic.GetColorLogic(), **{name: getattr(slicer, cls)() for name, cls in _LOGICS.items()}}
    for name, module_logic in made.items():
        module_logic.SetMRMLApplicationLogic(logic)
        module_logic.SetMRMLScene(scene)
        logic.SetModuleLogic(name, module_logic)
        shown = _Plots(module_logic) if name == "Plots" else module_logic
        setattr(slicer.modules, name.lower(), types.SimpleNamespace(logic=lambda shown=shown: shown, name=name))
    scene.AddObserver(slicer.vtkMRMLScene.NodeAddedEvent, _add_to_hierarchy)
    scene.AddObserver(slicer.vtkMRMLScene.NodeAboutToBeRemovedEvent, _remove_from_hierarchy)
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene, True)
    return scene, logic


@vtk.calldata_type(vtk.VTK_OBJECT)
def _add_to_hierarchy(scene: Any, event: str, node: Any) -> None:
    """Slicer's subject hierarchy plugins give each data node an item; the wheel has none of them."""
    if isinstance(node, _DATA) and not node.GetHideFromEditors():
        tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
        if tree is not None and not tree.GetItemByDataNode(node):
            tree.CreateItem(tree.GetSceneItemID(), node)


@vtk.calldata_type(vtk.VTK_OBJECT)
def _remove_from_hierarchy(scene: Any, event: str, node: Any) -> None:
    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    item = tree.GetItemByDataNode(node) if tree is not None and isinstance(node, _DATA) else 0
    if item:
        tree.RemoveItem(item, False, False)


def install(logic: Any) -> Dialogs:
    """Makes slicer.app and the modules that Slicer's Python has; returns the collected dialogs."""
    from . import parameter_node

    slicer.app = Application(logic)
    slicer.dicomDatabase = None
    dialogs = Dialogs()
    for kind in ("error", "warning", "info"):
        setattr(slicer.util, f"{kind}Display", dialogs.tell(kind))
    for name in ("confirmOkCancelDisplay", "confirmYesNoDisplay"):
        setattr(slicer.util, name, dialogs.ask)
    slicer.util.selectModule = lambda name: setattr(slicer.app, "selected", str(name))
    slicer.util.setSliceViewerLayers = lambda *arguments, **keywords: None
    slicer.util.mainWindow = lambda: None
    slicer.util.modulePath = lambda name: getattr(slicer.modules, name.lower()).path
    _module("slicer.i18n", tr=lambda text: text, translate=lambda context, text: text)
    _module("slicer.parameterNodeWrapper", **{name: getattr(parameter_node, name) for name in _WRAPPER})
    _module("slicer.ScriptedLoadableModule", **{cls.__name__: cls for cls in _bases()})
    return dialogs


_WRAPPER = ("Default", "parameterNodeWrapper")


def _module(name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    setattr(slicer, name.rpartition(".")[2], module)


def _bases() -> tuple[type, ...]:
    class ScriptedLoadableModule:
        def __init__(self, parent: Any) -> None:
            self.parent, self.moduleName = parent, type(self).__name__

        def resourcePath(self, name: str) -> str:
            return str(Path(self.parent.path).parent / "Resources" / name)

        def getDefaultModuleDocumentationLink(self, page: str | None = None) -> str:
            return f'<a href="{slicer.app.moduleDocumentationUrl(self.moduleName)}">documentation</a>'

    class ScriptedLoadableModuleWidget:
        def __init__(self, parent: Any = None) -> None:
            super().__init__()
            self.moduleName = type(self).__name__.removesuffix("Widget")
            self.developerMode = False
            self.parent, self.layout = parent, parent.layout()

        def resourcePath(self, name: str) -> str:
            return str(Path(slicer.util.modulePath(self.moduleName)).parent / "Resources" / name)

        def setup(self) -> None:
            pass

        def cleanup(self) -> None:
            pass

        def onReload(self) -> None:
            sys.modules.pop(self.moduleName, None)

    class ScriptedLoadableModuleLogic:
        def __init__(self, parent: Any = None) -> None:
            super().__init__()
            self.moduleName = type(self).__name__.removesuffix("Logic")

        def getParameterNode(self) -> Any:
            node = slicer.mrmlScene.GetSingletonNode(self.moduleName, "vtkMRMLScriptedModuleNode")
            if node is None:
                node = slicer.vtkMRMLScriptedModuleNode()
                node.SetSingletonTag(self.moduleName)
                node.SetAttribute("ModuleName", self.moduleName)
                node.SetName(self.moduleName)
                node = slicer.mrmlScene.AddNode(node)
            return node

    class ScriptedLoadableModuleTest(unittest.TestCase):
        pass

    return (
        ScriptedLoadableModule,
        ScriptedLoadableModuleWidget,
        ScriptedLoadableModuleLogic,
        ScriptedLoadableModuleTest,
    )


def open_module(path: Path) -> Any:
    """Imports a module and opens its panel as Slicer does; returns the widget object."""
    import qt

    name = path.stem
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.import_module(name)
    facts = types.SimpleNamespace(path=str(path), name=name, hidden=False)
    getattr(module, name)(facts)
    setattr(slicer.modules, name.lower(), facts)
    parent = slicer.qMRMLWidget()
    parent.setLayout(qt.QVBoxLayout())
    parent.setMRMLScene(slicer.mrmlScene)
    widget = getattr(module, f"{name}Widget")(parent)
    widget.setup()
    if hasattr(widget, "enter"):
        widget.enter()
    return widget


def settle(until: Callable[[], bool], seconds: float = 300.0) -> None:
    """Lets Qt work until something is so; fails with the stack of the waiting test where it never is."""
    import time

    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            raise AssertionError(f"nothing came of it within {seconds:g} s")
        QtWidgets.QApplication.processEvents()
        time.sleep(0.01)
