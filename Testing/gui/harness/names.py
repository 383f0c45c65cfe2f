"""Names that Slicer has: of its widgets and Python modules by widgets.json, others by PySide6 and slicer-core."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import qt
import slicer
import slicer.util
import vtk
from PySide6 import QtCore, QtWidgets

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted(path for folder in ROOT.glob("M4oE*") for path in folder.rglob("*.py"))
UI_FILES = sorted(ROOT.glob("M4oE*/Resources/UI/*.ui"))
WIDGETS = json.loads(Path(__file__).with_name("widgets.json").read_text(encoding="utf-8"))


def names_of(widget: str, kind: str) -> set[str]:
    """Names of a class and of its bases, from the list or from Qt."""
    if widget not in WIDGETS:
        cls = getattr(QtWidgets, widget, None) or getattr(QtCore, widget)
        meta = cls.staticMetaObject
        if kind == "signals":
            return {
                bytes(meta.method(number).methodSignature()).decode()
                for number in range(meta.methodCount())
                if meta.method(number).methodType() == QtCore.QMetaMethod.MethodType.Signal
            }
        return set(dir(cls))
    found = set(WIDGETS[widget][kind])
    return found.union(*(names_of(base, kind) for base in WIDGETS[widget]["bases"] if base != "qSlicerObject"))


def all_names(widget: str) -> set[str]:
    signals = {signature.split("(")[0] for signature in names_of(widget, "signals")}
    return names_of(widget, "methods") | names_of(widget, "properties") | signals


def widget_classes(ui: Path) -> dict[str, str]:
    """Class by name of the widgets in a .ui file."""
    return {str(item.get("name")): str(item.get("class")) for item in ET.parse(ui).iter("widget")}


PANELS = {ui.stem: widget_classes(ui) for ui in UI_FILES}
MODULES = {"qt": qt, "vtk": vtk, "slicer": slicer.slicer_core, "slicer.util": slicer.util, "list": list}
WIDGETS["slicer.modules"]["properties"] += [path.stem.lower() for path in ROOT.glob("M4oE*/")]  # ours


def real(name: str) -> Any:
    """The module of this name, or the class of PySide6, VTK or slicer-core; None if there is none."""
    found = (getattr(module, name, None) for module in MODULES.values())
    return MODULES.get(name) or next((item for item in found if isinstance(item, type)), None)


def has(holder: str, name: str) -> bool:
    """Whether a class, a module, or the `ui` of a module (by the module's name) has a name."""
    if holder in PANELS:
        return name in PANELS[holder]
    return (holder in WIDGETS and name in all_names(holder)) or hasattr(real(holder), name)


def is_property(cls: str, name: str) -> bool:
    """Whether a class of Qt has a property of this name, of its own or of a base."""
    if cls in WIDGETS:
        return name in WIDGETS[cls]["properties"] or any(is_property(base, name) for base in WIDGETS[cls]["bases"])
    meta = getattr(real(cls), "staticMetaObject", None)
    return meta is not None and meta.indexOfProperty(name) >= 0
