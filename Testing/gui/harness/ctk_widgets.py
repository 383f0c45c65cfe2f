"""Stand-ins for the CTK widgets that the panels use; their names are Slicer's (widgets.json)."""

from __future__ import annotations

import sys
import types
from typing import Any

from PySide6 import QtCore, QtGui, QtWidgets
from PySide6.QtCore import Property, Signal

from .pythonqt import UiLoader

_UNLIMITED = 16777215


class ctkCollapsibleButton(QtWidgets.QAbstractButton):
    stand_in = True
    signatures = {"contentsCollapsed(bool)": "contentsCollapsed"}
    contentsCollapsed = Signal(bool)

    def __init__(self, *arguments: Any) -> None:
        super().__init__(next((item for item in arguments if isinstance(item, QtWidgets.QWidget)), None))
        self._height = self.fontMetrics().height() + 10
        self.setCheckable(True)
        self.setChecked(True)
        self.setContentsMargins(6, self._height, 6, 6)
        self.toggled.connect(self._toggle)

    def _toggle(self, open_: bool) -> None:
        self._show(open_)
        self.contentsCollapsed.emit(not open_)

    def _show(self, open_: bool) -> None:
        for child in self.children():
            if isinstance(child, QtWidgets.QWidget):
                child.setVisible(open_)
        self.setMaximumHeight(_UNLIMITED if open_ else self._height)

    def showEvent(self, event: Any) -> None:
        if not self.isChecked():
            self._show(False)

    collapsed = Property(bool, lambda self: not self.isChecked(), lambda self, value: self.setChecked(not value))

    def paintEvent(self, event: Any) -> None:
        painter = QtGui.QPainter(self)
        width, height = self.property("width"), self._height - 4
        painter.fillRect(0, 0, width, height, self.palette.button().color().darker(108))
        points = [(8, 9), (16, 9), (12, 15)] if self.isChecked() else [(9, 7), (9, 17), (15, 12)]
        painter.setBrush(QtCore.Qt.GlobalColor.black)
        painter.drawPolygon(QtGui.QPolygon([QtCore.QPoint(*point) for point in points]))
        text = self.property("text")
        painter.drawText(QtCore.QRect(24, 0, width, height), QtCore.Qt.AlignmentFlag.AlignVCenter, text)
        painter.end()

    def hitButton(self, position: Any) -> bool:
        return position.y() < self._height


class ctkSearchBox(QtWidgets.QLineEdit):
    stand_in = True
    signatures: dict[str, str] = {}

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._shows_icon = True
        self.setClearButtonEnabled(True)

    showSearchIcon = Property(
        bool, lambda self: self._shows_icon, lambda self, value: vars(self).update(_shows_icon=value)
    )


class ctkMenuButton(QtWidgets.QPushButton):
    stand_in = True
    signatures: dict[str, str] = {}


class ctkDirectoryButton(QtWidgets.QWidget):
    stand_in = True
    signatures = {"directoryChanged(QString)": "directoryChanged", "directorySelected(QString)": "directorySelected"}
    directoryChanged = Signal(str)
    directorySelected = Signal(str)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._directory = ""
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._button = QtWidgets.QPushButton("...", self)
        layout.addWidget(self._button)

    def _set(self, value: str) -> None:
        if value != self._directory:
            self._directory = value
            self._button.setText(value)
            self.directoryChanged.emit(value)

    directory = Property(str, lambda self: self._directory, _set)

    def browse(self) -> None:
        raise RuntimeError("a test must not open a dialog")


class ctkPathLineEdit(QtWidgets.QWidget):
    stand_in = True
    signatures = {"currentPathChanged(QString)": "currentPathChanged", "validInputChanged(bool)": "validInputChanged"}
    currentPathChanged = Signal(str)
    validInputChanged = Signal(bool)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = QtWidgets.QComboBox(self)
        self._box.setEditable(True)
        self._browse = QtWidgets.QToolButton(self)
        self._browse.setText("...")
        layout.addWidget(self._box, 1)
        layout.addWidget(self._browse)
        self._box.editTextChanged.connect(self.currentPathChanged)
        self._values: dict[str, Any] = {"filters": 0, "nameFilters": [], "settingKey": "", "label": "", "options": 0}
        self._values["showHistoryButton"] = True

    def setCurrentPath(self, path: str) -> None:
        self._box.setEditText(path or "")

    currentPath = Property(str, lambda self: self._box.property("currentText"), setCurrentPath)

    def _value(name: str, kind: Any) -> Any:
        return Property(
            kind, lambda self: self._values[name], lambda self, value: self._values.__setitem__(name, value)
        )

    filters = _value("filters", int)
    nameFilters = _value("nameFilters", "QStringList")
    settingKey = _value("settingKey", str)
    label = _value("label", str)
    showHistoryButton = _value("showHistoryButton", bool)
    del _value

    def comboBox(self) -> Any:
        return self._box

    def addCurrentPathToHistory(self) -> None:
        settings, key = QtCore.QSettings(), self._values["settingKey"]
        if key:
            earlier = [path for path in settings.value(key) or [] if path != self.currentPath]
            settings.setValue(key, [self.currentPath, *earlier][:10])

    def retrieveHistory(self) -> None:
        self._box.clear()
        for path in QtCore.QSettings().value(self._values["settingKey"]) or []:
            self._box.addItem(path)

    def browse(self) -> None:
        raise RuntimeError("a test must not open a dialog")


CLASSES = (ctkCollapsibleButton, ctkSearchBox, ctkMenuButton, ctkDirectoryButton, ctkPathLineEdit)


def install() -> types.ModuleType:
    """Makes the module `ctk`."""
    ctk = types.ModuleType("ctk")
    for cls in CLASSES:
        setattr(ctk, cls.__name__, cls)
        UiLoader.classes[cls.__name__] = cls
    sys.modules["ctk"] = ctk
    return ctk
