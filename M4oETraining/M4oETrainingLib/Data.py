"""The data sets of a training: what `m4oe data scan` says of each folder, in a table."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import qt
from m4oe.labels import structure
from M4oESegmentationLib import Worker
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _


def options(parameters: Any) -> list[str]:
    """What the user said of data of their own, as options of the command line."""
    pairs = (("--labels", parameters.labels), ("--modality", parameters.modality), ("--expert", parameters.expert))
    return [word for name, value in pairs if value.strip() for word in (name, value.strip())]


class DataTable:
    """The folders, one by one scanned in the worker's Python. Ask `poll` from a timer.

    Attributes:
        details: Findings of all folders, as text.
    """

    def __init__(self, table: Any) -> None:
        self._table = table
        table.setColumnCount(4)
        table.setHorizontalHeaderLabels([_("Data set"), _("Cases"), _("Structures"), _("Warnings")])
        for column, width in enumerate((110, 50)):
            table.setColumnWidth(column, width)
        table.horizontalHeader().setSectionResizeMode(2, qt.QHeaderView.Stretch)
        table.verticalHeader().setVisible(False)
        self._waiting: list[tuple[str, list[str]]] = []
        self._process: Process | None = None
        self._result = Path()
        self._folder = ""
        self._found: dict[str, list[str]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._process or self._waiting)

    @property
    def details(self) -> str:
        return "\n".join(line for lines in self._found.values() for line in lines)

    def show(self, folders: list[str], words: list[str]) -> None:
        """Shows these folders and scans those that are new.

        Args:
            folders: Of data sets.
            words: Options of the scan.
        """
        self._found = {folder: lines for folder, lines in self._found.items() if folder in folders}
        self._table.setRowCount(len(folders))
        for row, folder in enumerate(folders):
            item = self._table.item(row, 0)
            if item is not None and item.text() == folder:
                continue
            self._tell(row, [folder, "", _("waiting"), ""])
            self._waiting = [task for task in self._waiting if task[0] != folder] + [(folder, words)]

    def again(self, folders: list[str], words: list[str]) -> None:
        """Scans all, as what the user says of them has changed."""
        self._table.setRowCount(0)
        self._found = {}
        self.show(folders, words)

    def poll(self) -> bool:
        """Goes on; whether something new is shown.

        Raises:
            ValueError: The worker's Python cannot be started.
        """
        if self._process is None and self._waiting:
            self._folder, words = self._waiting.pop(0)
            self._result = Path(tempfile.mkdtemp(prefix="m4oe-"), "scan.json")
            command = Worker.command("data", "scan", self._folder, "--json", str(self._result), *words)
            self._process = Process(command, Worker.environment())
            self._show(["...", _("is being checked"), ""])
        if self._process is None or not self._process.done():
            return False
        process, self._process = self._process, None
        try:
            self._take(json.loads(self._result.read_text(encoding="utf-8"))["datasets"])
        except OSError:
            words_ = [line for line in process.tail if line.strip()]
            self._found[self._folder] = [f"{self._folder}: {line}" for line in words_[-3:]]
            self._show(["0", "", _("cannot be used")])
        return True

    def stop(self) -> None:
        """Scans no more."""
        self._waiting = []
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _take(self, datasets: list[dict[str, Any]]) -> None:
        cases = [case for dataset in datasets for case in dataset["cases"]]
        findings = [finding for dataset in datasets for finding in dataset["findings"]]
        counts: dict[str, int] = {}
        for case in cases:
            for key in case["volumes_ml"]:
                counts[key] = counts.get(key, 0) + 1
        text = ", ".join(f"{structure(key).name} ({count})" for key, count in counts.items())
        kinds = [finding["severity"] for finding in findings]
        names = {"error": _("errors"), "warning": _("warnings"), "note": _("notes")}
        told = ", ".join(f"{kinds.count(kind)} {name}" for kind, name in names.items() if kind in kinds)
        self._found[self._folder] = [
            f"{finding['case'] or self._folder}: {finding['sentence']}" for finding in findings
        ]
        self._show([str(len(cases)), text or _("none"), told or _("none")])

    def _show(self, texts: list[str]) -> None:
        """Fills the row of the folder at work, if it is still there."""
        for row in range(self._table.rowCount):
            item = self._table.item(row, 0)
            if item is not None and item.text() == self._folder:
                self._tell(row, [self._folder, *texts])

    def _tell(self, row: int, texts: list[str]) -> None:
        for column, text in enumerate(texts):
            item = qt.QTableWidgetItem(text)
            item.setToolTip(text)
            self._table.setItem(row, column, item)
