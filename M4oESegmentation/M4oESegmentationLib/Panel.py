"""What the panels of both modules share: their life between Slicer's start, its scenes and its end."""

from __future__ import annotations

import sys
from typing import Any

import qt
import slicer
import slicer.util
import vtk
from slicer.ScriptedLoadableModule import ScriptedLoadableModuleWidget
from slicer.util import VTKObservationMixin

_PACKAGES = ("m4oe", "M4oESegmentationLib", "M4oETrainingLib")


class Panel(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """A panel whose choices are kept in the scene.

    A module's panel has methods of its own: `build` makes its parts and its logic, `makeParameters` wraps a parameter
    node, `showParameters` shows another one, `showState` what has changed in it, `onTimer` looks at what is under way,
    `stop` ends it.

    Attributes:
        ui: The widgets, by name.
        parameters: Of the scene; None while it is being closed.
    """

    period = 100  # milliseconds between two calls of onTimer

    def __init__(self, parent: Any = None) -> None:
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.parameters: Any = None
        self._guiTag: int | None = None

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        panel = slicer.util.loadUI(self.resourcePath(f"UI/{self.moduleName}.ui"))
        self.layout.addWidget(panel)
        self.ui = slicer.util.childWidgetVariables(panel)
        panel.setMRMLScene(slicer.mrmlScene)
        self._timer = qt.QTimer()
        self._timer.setInterval(self.period)
        self._timer.connect("timeout()", self.onTimer)
        self.build()
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.EndImportEvent, self.onSceneEndImport)
        self.initializeParameterNode()

    def cleanup(self) -> None:
        """Ends what belongs to the panel, when Slicer ends or reloads the module."""
        self._timer.stop()
        self.stop()
        self._forgetParameterNode()
        self.removeObservers()

    def enter(self) -> None:
        self.initializeParameterNode()

    def onReload(self) -> None:
        """Reloads the package and the parts of the modules as well; Slicer reloads the module's own file alone."""
        for name in list(sys.modules):
            if name.partition(".")[0] in _PACKAGES:
                del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def onSceneStartClose(self, caller: Any, event: str) -> None:
        self._forgetParameterNode()

    def onSceneEndClose(self, caller: Any, event: str) -> None:
        self.initializeParameterNode()

    def onSceneEndImport(self, caller: Any, event: str) -> None:
        """The parameter node of the loaded scene has taken the place of the panel's, or has been copied into it."""
        self._forgetParameterNode()
        self.initializeParameterNode()

    def onParametersModified(self, caller: Any, event: str) -> None:
        self.showState()

    def initializeParameterNode(self) -> None:
        """Takes the scene's parameter node, and shows what it holds."""
        node = self.logic.getParameterNode()
        if self.parameters is None or self.parameters.parameterNode is not node:
            self._forgetParameterNode()
            self.parameters = self.makeParameters(node)
            self._guiTag = self.parameters.connectGui(self.ui)
            self.addObserver(node, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)
        self.showParameters()

    def _forgetParameterNode(self) -> None:
        if self.parameters is not None:
            self.parameters.disconnectGui(self._guiTag)
            self.removeObserver(self.parameters.parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParametersModified)
        self.parameters = None
