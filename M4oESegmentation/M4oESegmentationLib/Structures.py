"""The list of structures of a model: searched, checked, with colours and groups to check at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import qt
from slicer.i18n import tr as _

from .Results import colorIcon

_ABDOMEN = (
    "liver spleen kidney_right kidney_left pancreas gallbladder stomach duodenum esophagus adrenal_gland_right "
    "adrenal_gland_left urinary_bladder prostate_or_uterus aorta inferior_vena_cava"
)


class StructureList:
    """Fills and reads the widgets; calls back when the user changes what is checked."""

    def __init__(self, listWidget: Any, searchBox: Any, presetSelector: Any, changed: Callable[[], None]) -> None:
        self._list, self._presets, self._changed = listWidget, presetSelector, changed
        self._keys: list[str] = []
        searchBox.connect("textChanged(QString)", self._search)
        listWidget.connect("itemChanged(QListWidgetItem*)", lambda item: self._changed())
        presetSelector.connect("activated(int)", self._apply)

    def show(self, keys: Collection[str], excluded: Collection[str]) -> None:
        """Lists these structures, all checked but for the excluded ones."""
        from m4oe.labels import structure

        self._keys = sorted(keys, key=lambda key: structure(key).name)
        wasBlocked = self._list.blockSignals(True)
        self._list.clear()
        for key in self._keys:
            item = qt.QListWidgetItem(colorIcon(structure(key).color), structure(key).name)
            item.setFlags(qt.Qt.ItemIsEnabled | qt.Qt.ItemIsUserCheckable | qt.Qt.ItemIsSelectable)
            item.setCheckState(qt.Qt.Unchecked if key in excluded else qt.Qt.Checked)
            self._list.addItem(item)
        self._list.blockSignals(wasBlocked)
        self._presets.clear()
        self._presets.addItem(_("Check..."))
        for name, members in self._groups().items():
            self._presets.addItem(_("{name} ({count})").format(name=name, count=len(members)))

    def checked(self) -> tuple[str, ...]:
        """Keys that are wanted."""
        states = [self._list.item(row).checkState() == qt.Qt.Checked for row in range(len(self._keys))]
        return tuple(key for key, wanted in zip(self._keys, states, strict=True) if wanted)

    def excluded(self) -> list[str]:
        checked = self.checked()
        return [key for key in self._keys if key not in checked]

    def check(self, keys: Collection[str]) -> None:
        """Checks these, and no others."""
        wasBlocked = self._list.blockSignals(True)
        for row, key in enumerate(self._keys):
            self._list.item(row).setCheckState(qt.Qt.Checked if key in keys else qt.Qt.Unchecked)
        self._list.blockSignals(wasBlocked)
        self._changed()

    def _groups(self) -> dict[str, list[str]]:
        """Names of the groups that have members here."""
        from m4oe.labels import structure

        groups = {_("All"): list(self._keys)}
        groups[_("Abdominal organs (AMOS)")] = [key for key in self._keys if key in _ABDOMEN.split()]
        kinds = {"organ": _("Organs"), "vessel": _("Vessels"), "bone": _("Bones"), "muscle": _("Muscles")}
        kinds["lesion"] = _("Lesions")
        for kind, name in kinds.items():
            groups[name] = [key for key in self._keys if structure(key).kind == kind]
        return {name: members for name, members in groups.items() if members} | {_("None"): []}

    def _apply(self, index: int) -> None:
        if index > 0:
            self.check(list(self._groups().values())[index - 1])
        self._presets.currentIndex = 0

    def _search(self, text: str) -> None:
        for row in range(len(self._keys)):
            item = self._list.item(row)
            item.setHidden(text.lower() not in item.text().lower())
