"""The module `qt` as PythonQt shows it, made of PySide6, whose classes are changed in place.

In place, so that objects that Qt itself makes (children of a .ui file, layouts) behave alike: a Qt property is an
attribute of Python, `connect("clicked(bool)", f)` takes a signature, lists come as tuples, and nothing that PythonQt
refuses passes.
"""

from __future__ import annotations

import enum
import os
import re
import sys
import types
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
from PySide6 import QtCore, QtGui, QtUiTools, QtWidgets

_MODULES = (QtCore, QtGui, QtWidgets)
_STAY_METHODS = {"sizeHint", "minimumSizeHint"}  # virtual getters
_original_getattribute = QtCore.QObject.__getattribute__
_connect_object, _disconnect_object = QtCore.QObject.connect, QtCore.QObject.disconnect


class QtProperty(property):
    """On an instance the Qt property; on the class what was there, as QTimer.singleShot is also a static method."""

    on_class: Any = None

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self.on_class if instance is None else super().__get__(instance, owner)


def install() -> tuple[types.ModuleType, Any]:
    """Changes PySide6's classes and makes the module `qt` of them; returns it and the application."""
    for module in _MODULES:
        for cls in [getattr(module, name) for name in dir(module)]:
            if isinstance(cls, type):
                _make_enums_numbers(cls)
            if isinstance(cls, type) and issubclass(cls, QtCore.QObject):
                _adapt(cls)
    base = QtCore.QObject
    base.name = property(lambda self: self.property("objectName"), lambda self, value: self.setObjectName(value))
    base.className = _class_name
    base.delete = lambda self: self.deleteLater()
    base.__setattr__ = _setattr
    application = QtWidgets.QApplication.instance() or QtWidgets.QApplication(["Slicer"])
    application.setOrganizationName("NA-MIC")
    application.setApplicationName("Slicer")
    qt = types.ModuleType("qt")
    for module in _MODULES:
        vars(qt).update({name: getattr(module, name) for name in dir(module) if re.match(r"Q[A-Z]|Qt$", name)})
    qt.QUiLoader = UiLoader
    sys.modules["qt"] = qt
    return qt, application


class UiLoader(QtUiTools.QUiLoader):
    """Loads a .ui file as Slicer does: makes ctk and qMRML widgets, refuses classes that it does not know."""

    classes: dict[str, type] = {}

    def createWidget(self, className: str, parent: Any = None, name: str = "") -> Any:
        if className in self.classes:
            widget = self.classes[className](parent)
            widget.setObjectName(name)
            return widget
        if className not in self.availableWidgets() and className != "Line":
            raise RuntimeError(f"the harness has no widget class {className}")
        return super().createWidget(className, parent, name)

    def load(self, file: Any, parent: Any = None) -> Any:
        """Loads the file; connections of vtk types, which QUiLoader cannot make, are made here."""
        path = Path(file.fileName() if isinstance(file, QtCore.QFile) else str(file))
        tree = ET.parse(path)
        connections = []
        for group in tree.iter("connections"):
            ours = [item for item in group if "vtk" in str(item.findtext("signal"))]
            connections += ours
            for item in ours:
                group.remove(item)
        buffer = QtCore.QBuffer()
        buffer.setData(ET.tostring(tree.getroot()))
        buffer.open(QtCore.QIODevice.OpenModeFlag.ReadOnly)
        widget = super().load(buffer, parent)
        for item in connections:
            _make_connection(widget, path, item)
        return widget


def _make_connection(top: Any, path: Path, item: ET.Element) -> None:
    def find(name: str | None) -> Any:
        return top if top.objectName == name else top.findChild(QtCore.QObject, name)

    sender, receiver = find(item.findtext("sender")), find(item.findtext("receiver"))
    signal, slot = str(item.findtext("signal")), str(item.findtext("slot")).split("(")[0]
    if sender is None or receiver is None or not hasattr(receiver, slot):
        raise RuntimeError(f"{path}: the connection of {signal} to {slot} cannot be made")
    sender.connect(signal, getattr(receiver, slot))


def _make_enums_numbers(cls: type) -> None:
    """PythonQt's enums are whole numbers."""
    for value in vars(cls).values():
        if isinstance(value, type) and issubclass(value, enum.Enum) and not hasattr(value, "__int__"):
            value.__int__ = lambda member: member.value


def _adapt(cls: type) -> None:
    if "__setattr__" in vars(cls):
        cls.__setattr__ = _setattr
    if "__getattribute__" in vars(cls) or cls is QtCore.QObject:
        cls.__getattribute__ = _getattribute(cls.__getattribute__)
    _refuse_keywords(cls)
    meta = vars(cls).get("staticMetaObject") or getattr(cls, "staticMetaObject", None)
    if meta is None or meta.className() != cls.__name__:
        return
    for number in range(meta.propertyOffset(), meta.propertyCount()):
        found = meta.property(number)
        if found.name() not in _STAY_METHODS:
            made = _qt_property(found)
            made.on_class = getattr(cls, found.name(), None)
            setattr(cls, found.name(), made)


def _refuse_keywords(cls: type) -> None:
    """PythonQt's constructors take no keywords."""
    construct = cls.__init__

    def refuse(self: Any, *arguments: Any, **keywords: Any) -> None:
        if keywords and type(self).__module__.startswith("PySide6"):
            raise TypeError(f"{cls.__name__} takes no keyword arguments in PythonQt, got {', '.join(keywords)}")
        construct(self, *arguments, **keywords)

    if "__init__" in vars(cls):
        cls.__init__ = refuse


def _qt_property(found: Any) -> QtProperty:
    def read(self: Any) -> Any:
        return _plain(found.read(self))

    def write(self: Any, value: Any) -> None:
        if not found.isWritable():
            raise AttributeError(f"property {found.name()} of {_class_name(self)} is read-only")
        if not found.write(self, value):
            kind = type(value).__name__
            raise AttributeError(f"property {found.name()} of {_class_name(self)} does not accept a {kind}: {value!r}")

    return QtProperty(read, write)


def _plain(value: Any) -> Any:
    """Tuples for lists, whole numbers for enums, as PythonQt."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    is_enum = type(value).__module__.startswith("PySide6") and isinstance(getattr(value, "value", None), int)
    return int(value.value) if is_enum else value


def _class_name(self: Any) -> str:
    return type(self).__name__ if hasattr(type(self), "stand_in") else self.metaObject().className()


def _normal(signature: str) -> str:
    return re.sub(r"const\s+|[\s&]", "", signature)


def _own_signal(self: Any, signature: str) -> Any:
    """A stand-in's signal of this signature, if it has one."""
    names = {_normal(text): name for text, name in getattr(type(self), "signatures", {}).items()}
    name = names.get(_normal(signature))
    return getattr(self, name) if name else None


def _connect(self: Any, signature: Any, receiver: Any, *rest: Any) -> Any:
    if not isinstance(signature, str) or signature.startswith("2"):  # PySide6 itself
        return _original_getattribute(self, "connect")(signature, receiver, *rest)
    if (own := _own_signal(self, signature)) is not None:
        own.connect(receiver)
        return True
    normalized = QtCore.QMetaObject.normalizedSignature(signature).data().decode()
    if self.metaObject().indexOfSignal(normalized) < 0:
        raise ValueError(f"{_class_name(self)} has no signal {signature}")
    _connect_object(self, QtCore.SIGNAL(_normal(signature)), receiver)
    return True


def _disconnect(self: Any, signature: Any, receiver: Any = None, *rest: Any) -> Any:
    if not isinstance(signature, str) or signature.startswith("2"):
        return _original_getattribute(self, "disconnect")(signature, receiver, *rest)
    if (own := _own_signal(self, signature)) is not None:
        return own.disconnect(receiver) if receiver else own.disconnect()
    return _disconnect_object(self, QtCore.SIGNAL(_normal(signature)), receiver)


_HARD_WIRED = {"connect": _connect, "disconnect": _disconnect}  # Shiboken looks them up on the instance


def _getattribute(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    def get(self: Any, name: str) -> Any:
        return types.MethodType(_HARD_WIRED[name], self) if name in _HARD_WIRED else original(self, name)

    return get


def _setattr(self: Any, name: str, value: Any) -> None:
    """Sets a property; refuses to make attributes of Qt's own objects, as PythonQt does."""
    cls = type(self)
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    if owner is not None and isinstance(vars(owner)[name], property):
        vars(owner)[name].fset(self, value)
    elif isinstance(value, QtCore.SignalInstance):  # Shiboken keeps a signal when it is first asked for
        vars(self)[name] = value
    elif owner is not None and owner.__module__.startswith("PySide6"):
        raise AttributeError(f"{name} of {cls.__name__} cannot be replaced")
    elif self.metaObject().indexOfProperty(name) >= 0:
        self.setProperty(name, value)
    elif cls.__module__.startswith("PySide6"):
        raise AttributeError(f"{cls.__name__} has no property {name}; PythonQt makes no attributes of C++ objects")
    else:
        vars(self)[name] = value
