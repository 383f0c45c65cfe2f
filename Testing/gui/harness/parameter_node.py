"""Stand-in for slicer.parameterNodeWrapper: typed attributes over a real parameter node, bound to widgets.

It stores as Slicer does: text under the attribute's name, lists as name.len and name.0, nodes as references. Types:
str, int, float, bool, pathlib.Path, list[str], enums, MRML nodes.
"""

from __future__ import annotations

import enum
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import slicer
import slicer.util
import vtk


class Default:
    def __init__(self, value: Any) -> None:
        self.value = value


def parameterNodeWrapper(cls: type) -> type:
    """Makes properties of the class's annotations."""
    for name, kind in typing.get_type_hints(cls, include_extras=True).items():
        plain, extras = (kind.__origin__, kind.__metadata__) if hasattr(kind, "__metadata__") else (kind, ())
        default = next((extra.value for extra in extras if isinstance(extra, Default)), getattr(cls, name, None))
        setattr(cls, name, _property(name, plain, _empty(plain) if default is None else default))
        cls._kinds = {**getattr(cls, "_kinds", {}), name: plain}
    cls.__init__ = _start
    cls.connectGui = _connect_gui
    cls.disconnectGui = _disconnect_gui
    for method in ("AddObserver", "RemoveObserver", "StartModify", "EndModify", "Modified"):
        setattr(cls, method, lambda self, *arguments, _name=method: getattr(self.parameterNode, _name)(*arguments))
    return cls


def _start(self: Any, node: Any) -> None:
    self.parameterNode = node
    self._guis, self._writing = {}, False
    for name in self._kinds:
        if not _stored(node, name):
            setattr(self, name, getattr(self, name))


def _is_node(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, slicer.vtkMRMLNode)


def _empty(kind: Any) -> Any:
    if _is_node(kind):
        return None
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    return [] if typing.get_origin(kind) is list else kind()


def _stored(node: Any, name: str) -> bool:
    return node.HasParameter(name) or node.HasParameter(f"{name}.len")


def _property(name: str, kind: Any, default: Any) -> property:
    def read(self: Any) -> Any:
        node = self.parameterNode
        if not _stored(node, name):
            return list(default) if isinstance(default, list) else default
        if _is_node(kind):
            return node.GetNodeReference(name)
        if typing.get_origin(kind) is list:
            return [node.GetParameter(f"{name}.{number}") for number in range(int(node.GetParameter(f"{name}.len")))]
        text = node.GetParameter(name)
        if kind is bool:
            return text == "true"
        return kind[text] if issubclass(kind, enum.Enum) else kind(text)

    def write(self: Any, value: Any) -> None:
        node = self.parameterNode
        with slicer.util.NodeModify(node):
            if _is_node(kind):
                if value is not None and not isinstance(value, kind):
                    raise TypeError(f"{name} takes a {kind.__name__}, got {value!r}")
                node.SetParameter(name, "")
                node.SetNodeReferenceID(name, None if value is None else value.GetID())
            elif typing.get_origin(kind) is list:
                node.SetParameter(f"{name}.len", str(len(value)))
                for number, item in enumerate(value):
                    node.SetParameter(f"{name}.{number}", item)
            elif not isinstance(value, (int, float) if kind is float else kind):
                raise TypeError(f"{name} takes a {kind.__name__}, got {value!r}")
            else:
                text = value.name if isinstance(value, enum.Enum) else str(value)
                node.SetParameter(name, text.lower() if kind is bool else text)

    return property(read, write)


def _connect_gui(self: Any, gui: Any) -> int:
    tag = len(self._guis) + 1
    connectors = {}
    for widget in vars(gui).values():
        name = widget.property("SlicerParameterName")
        if name:
            if name not in self._kinds:
                raise ValueError(f"{type(self).__name__} has no parameter {name}")
            connectors[name] = _Connector(widget, self._kinds[name])
    for name, connector in connectors.items():
        connector.write(getattr(self, name))
        connector.on_changed(_to_node(self, name, connector))
    observer = self.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *event: _to_gui(self, connectors))
    self._guis[tag] = (connectors, observer)
    return tag


def _to_node(self: Any, name: str, connector: _Connector) -> Callable[..., None]:
    def changed(*arguments: Any) -> None:
        if not self._writing:
            setattr(self, name, connector.read())

    return changed


def _to_gui(self: Any, connectors: dict[str, _Connector]) -> None:
    if self._writing:
        return
    self._writing = True
    try:
        for name, connector in connectors.items():
            connector.write(getattr(self, name))
    finally:
        self._writing = False


def _disconnect_gui(self: Any, tag: int) -> None:
    connectors, observer = self._guis.pop(tag, ({}, None))
    for connector in connectors.values():
        connector.on_changed(None)
    if observer is not None:
        self.RemoveObserver(observer)


class _Connector:
    """One widget and the attribute that it shows; the kinds of pairs that Slicer has."""

    def __init__(self, widget: Any, kind: Any) -> None:
        self._widget, self._kind, self._callback = widget, kind, None
        name = widget.className()
        if name == "qMRMLNodeComboBox" and _is_node(kind):
            widget.nodeTypes = [kind.__name__]
            self._signal, self._property = "currentNodeChanged(vtkMRMLNode*)", None
        else:
            known = {
                ("QCheckBox", bool): ("toggled(bool)", "checked"),
                ("QLineEdit", str): ("textChanged(QString)", "text"),
                ("ctkPathLineEdit", Path): ("currentPathChanged(QString)", "currentPath"),
                ("QSpinBox", int): ("valueChanged(int)", "value"),
                ("QDoubleSpinBox", float): ("valueChanged(double)", "value"),
                ("QComboBox", enum.Enum): ("currentIndexChanged(int)", "currentIndex"),
            }
            base = enum.Enum if isinstance(kind, type) and issubclass(kind, enum.Enum) else kind
            if (name, base) not in known:
                raise RuntimeError(f"Slicer connects no {name} with {kind}")
            self._signal, self._property = known[name, base]
            if base is enum.Enum:
                widget.clear()
                for member in kind:
                    widget.addItem(member.label() if hasattr(member, "label") else member.name)

    def on_changed(self, callback: Callable[..., None] | None) -> None:
        if callback is None:
            self._widget.disconnect(self._signal, self._callback)
        else:
            self._widget.connect(self._signal, callback)
        self._callback = callback

    def read(self) -> Any:
        if self._property is None:
            return self._widget.currentNode()
        value = getattr(self._widget, self._property)
        return list(self._kind)[value] if self._property == "currentIndex" else self._kind(value)

    def write(self, value: Any) -> None:
        if self._property is None:
            self._widget.setCurrentNode(value)
        else:
            shown = list(self._kind).index(value) if self._property == "currentIndex" else value
            setattr(self._widget, self._property, str(shown) if isinstance(shown, Path) else shown)
