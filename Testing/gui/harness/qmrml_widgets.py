"""Stand-ins for Slicer's widgets that show MRML nodes, on a real scene; their names are Slicer's (widgets.json)."""

from __future__ import annotations

from typing import Any

import slicer
import slicer.util
from PySide6 import QtWidgets
from PySide6.QtCore import Property, Signal

from .ctk_widgets import ctkMenuButton
from .pythonqt import UiLoader


class qMRMLWidget(QtWidgets.QWidget):
    stand_in = True
    signatures = {"mrmlSceneChanged(vtkMRMLScene*)": "mrmlSceneChanged"}
    mrmlSceneChanged = Signal(object)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._scene: Any = None

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        self._scene = scene
        self.mrmlSceneChanged.emit(scene)


class qMRMLNodeComboBox(QtWidgets.QWidget):
    stand_in = True
    signatures = {
        "currentNodeChanged(vtkMRMLNode*)": "currentNodeChanged",
        "currentNodeIDChanged(QString)": "currentNodeIDChanged",
        "nodeAddedByUser(vtkMRMLNode*)": "nodeAddedByUser",
    }
    currentNodeChanged = Signal(object)
    currentNodeIDChanged = Signal(str)
    nodeAddedByUser = Signal(object)
    _DEFAULTS = {
        "nodeTypes": [],
        "noneEnabled": False,
        "addEnabled": True,
        "removeEnabled": True,
        "renameEnabled": False,
        "editEnabled": False,
        "showHidden": False,
        "showChildNodeTypes": True,
        "noneDisplay": "None",
        "baseName": "",
        "selectNodeUponCreation": True,
    }

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = QtWidgets.QComboBox(self)
        layout.addWidget(self._box)
        self._values = dict(self._DEFAULTS)
        self._scene: Any = None
        self._tags: list[int] = []
        self._id = ""
        self._attributes: list[tuple[str, str, Any]] = []
        self._box.activated.connect(lambda index: self.setCurrentNodeID(self._box.itemData(index)))

    def mrmlScene(self) -> Any:
        return self._scene

    def setMRMLScene(self, scene: Any) -> None:
        for tag in self._tags:
            self._scene.RemoveObserver(tag)
        self._scene, self._tags = scene, []
        if scene is not None:
            kinds = slicer.vtkMRMLScene
            for event in (
                kinds.NodeAddedEvent,
                kinds.NodeRemovedEvent,
                kinds.EndBatchProcessEvent,
                kinds.EndCloseEvent,
                kinds.EndImportEvent,
            ):
                self._tags.append(scene.AddObserver(event, lambda *arguments: self._refresh()))
        self._refresh()

    def _nodes(self) -> list[Any]:
        found: list[Any] = []
        for kind in self._values["nodeTypes"] if self._scene is not None else ():
            for node in slicer.util.getNodesByClass(kind):
                exact = node.GetClassName() == kind or self._values["showChildNodeTypes"]
                if exact and node not in found and self._shows(node):
                    found.append(node)
        return found

    def _shows(self, node: Any) -> bool:
        if node.GetHideFromEditors() and not self._values["showHidden"]:
            return False
        return all(
            node.GetAttribute(name) is not None and (value is None or node.GetAttribute(name) == str(value))
            for kind, name, value in self._attributes
            if node.IsA(kind)
        )

    def _refresh(self) -> None:
        nodes, box, none = self._nodes(), self._box, self._values["noneEnabled"]
        box.blockSignals(True)
        box.clear()
        if none or not nodes:
            box.addItem(self._values["noneDisplay"] if none else "Select a node", "")
        for node in nodes:
            box.addItem(node.GetName(), node.GetID())
        ids = [node.GetID() for node in nodes]
        fallback = "" if none or not ids else ids[0]
        current = self._id if self._id in ids else fallback
        box.setCurrentIndex(max(0, box.findData(current)))
        box.blockSignals(False)
        self._take(current)

    def _take(self, node_id: str) -> None:
        if node_id != self._id:
            self._id = node_id
            self.currentNodeChanged.emit(self.currentNode())
            self.currentNodeIDChanged.emit(node_id)

    def currentNode(self) -> Any:
        return self._scene.GetNodeByID(self._id) if self._scene is not None and self._id else None

    def setCurrentNode(self, node: Any) -> None:
        self.setCurrentNodeID(node.GetID() if node is not None else "")

    def setCurrentNodeID(self, node_id: str | None) -> None:
        index = self._box.findData(node_id or "")
        self._box.blockSignals(True)
        self._box.setCurrentIndex(max(0, index))
        self._box.blockSignals(False)
        self._take(self._box.itemData(self._box.property("currentIndex")) or "")

    currentNodeID = Property(str, lambda self: self._id, setCurrentNodeID)

    def nodeCount(self) -> int:
        return len(self._nodes())

    def nodeFromIndex(self, index: int) -> Any:
        return self._nodes()[index]

    def addAttribute(self, kind: str, name: str, value: Any = None) -> None:
        self._attributes.append((kind, name, value))
        self._refresh()

    def addNode(self, kind: str | None = None) -> Any:
        name = self._scene.GenerateUniqueName(self._values["baseName"] or "Node")
        node = self._scene.AddNewNodeByClass(kind or self._values["nodeTypes"][0], name)
        self.setCurrentNode(node)
        self.nodeAddedByUser.emit(node)
        return node

    def _value(name: str, kind: Any) -> Any:
        def write(self: Any, value: Any) -> None:
            self._values[name] = list(value) if kind == "QStringList" else value
            self._refresh()

        return Property(kind, lambda self: self._values[name], write)

    nodeTypes = _value("nodeTypes", "QStringList")
    noneEnabled = _value("noneEnabled", bool)
    addEnabled = _value("addEnabled", bool)
    removeEnabled = _value("removeEnabled", bool)
    renameEnabled = _value("renameEnabled", bool)
    editEnabled = _value("editEnabled", bool)
    showHidden = _value("showHidden", bool)
    showChildNodeTypes = _value("showChildNodeTypes", bool)
    noneDisplay = _value("noneDisplay", str)
    baseName = _value("baseName", str)
    selectNodeUponCreation = _value("selectNodeUponCreation", bool)
    del _value


class qMRMLSegmentationShow3DButton(ctkMenuButton):
    signatures: dict[str, str] = {}

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._node: Any = None
        self.setText("Show 3D")
        self.setCheckable(True)
        self.clicked.connect(self._show)

    def segmentationNode(self) -> Any:
        return self._node

    def setSegmentationNode(self, node: Any) -> None:
        self._node = node

    def _show(self, on: bool) -> None:
        if self._node is not None and on:
            self._node.CreateClosedSurfaceRepresentation()
        elif self._node is not None:
            self._node.RemoveClosedSurfaceRepresentation()


CLASSES = (qMRMLWidget, qMRMLNodeComboBox, qMRMLSegmentationShow3DButton)


def install() -> None:
    """Puts the widgets into the module `slicer`."""
    for cls in CLASSES:
        setattr(slicer, cls.__name__, cls)
        UiLoader.classes[cls.__name__] = cls
