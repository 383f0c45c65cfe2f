"""The data sets of a training: what `m4oe data scan` says of each folder, in a table."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import qt
import slicer.util
from m4oe.labels import structure
from m4oe.training_run import ERROR
from M4oESegmentationLib import Worker
from M4oESegmentationLib.Errors import errorsShown
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _


def options(parameters: Any) -> list[str]:
    """What the user said of data of their own, as options of the command line."""
    pairs = (("--labels", parameters.labels), ("--modality", parameters.modality), ("--expert", parameters.expert))
    return [word for name, value in pairs if value.strip() for word in (name, value.strip())]


class DataSection:
    """The panel's part for the data sets: folders, one by one scanned in the worker's Python."""

    def __init__(self, ui: Any, parameters: Callable[[], Any]) -> None:
        """Connects the widgets; `parameters` gives the panel's, which keep the folders."""
        self._ui, self._parameters = ui, parameters
        self._waiting: list[str] = []
        self._process: Process | None = None
        self._folder = ""  # that is being scanned
        self._result = Path()
        self._found: dict[str, _Scan] = {}
        self._said: list[str] = []  # of data of the user's own, when the folders were scanned
        self._notes: dict[str, str] = {}  # by folder, what was told when the scene was written into it
        table = ui.dataTable
        table.setColumnCount(4)
        table.setHorizontalHeaderLabels([_("Data set"), _("Cases"), _("Structures"), _("Findings")])
        for column, width in enumerate((110, 50)):
            table.setColumnWidth(column, width)
        table.horizontalHeader().setSectionResizeMode(2, qt.QHeaderView.Stretch)
        table.verticalHeader().setVisible(False)
        for text, value in ((_("As the files say"), ""), ("CT", "CT"), ("MR", "MR")):
            ui.modalitySelector.addItem(text, value)
        ui.modalitySelector.connect("activated(int)", self._keepModality)
        ui.labelsEdit.connect("editingFinished()", self.show)
        ui.expertEdit.connect("editingFinished()", self.show)
        table.connect("itemSelectionChanged()", self._showSelection)
        ui.addFolderButton.connect("clicked()", self._addFolder)
        ui.addSceneButton.connect("clicked()", self._addScene)
        ui.checkAgainButton.connect("clicked()", self._checkAgain)
        ui.removeDataButton.connect("clicked()", self._remove)
        self._showSelection()

    @property
    def busy(self) -> bool:
        return bool(self._process or self._waiting)

    @property
    def experts(self) -> set[str]:
        """Those that the cases train; empty where that is not known of all folders yet."""
        scans = [self._found.get(folder) for folder in self._parameters().folders]
        known = all(scan is not None and scan.experts for scan in scans)
        return {expert for scan in scans for expert in scan.experts} if known else set()

    def show(self) -> None:
        """Lists the folders, and has those scanned that are new; all, where what the user says of them has changed."""
        parameters = self._parameters()
        if parameters is None:  # the scene is being closed
            return
        folders, said = list(parameters.folders), options(parameters)
        if self._folder not in folders or said != self._said:
            self.stop()
        self._found = self._found if said == self._said else {}
        self._said = said
        self._found = {folder: scan for folder, scan in self._found.items() if folder in folders}
        self._waiting = [folder for folder in folders if folder not in self._found and folder != self._folder]
        self._fillTable(folders)
        self._showFindings()

    def poll(self) -> bool:
        """Goes on with the scans; whether there is something new."""
        if self._process is None and self._waiting:
            self._start(self._waiting.pop(0))
        elif self._process is not None and self._process.done():
            self._take()
        else:
            return False
        self._fillTable(self._parameters().folders)
        return True

    def stop(self) -> None:
        """Ends the scan that is under way."""
        if self._process is not None:
            self._process.stop()
            shutil.rmtree(self._result.parent, ignore_errors=True)
        self._process, self._folder = None, ""

    # ---- what the user does

    def _keepModality(self, index: int) -> None:
        self._parameters().modality = self._ui.modalitySelector.currentData
        self.show()

    def _addFolder(self) -> None:
        folder = self._ui.dataFolderEdit.currentPath
        with errorsShown(_("The folder cannot be added.")):
            if not folder or not Path(folder).exists():
                raise ValueError(_("Choose a folder with a data set; '{folder}' is none.").format(folder=folder))
            self._add(_whole(folder))

    def _addScene(self) -> None:
        from . import Scene

        folder, parameters = self._ui.sceneFolderEdit.currentPath, self._parameters()
        with errorsShown(_("The scene cannot be added.")), slicer.util.WaitCursor():
            if not folder:
                raise ValueError(_("Choose the folder that the pairs of files are written to."))
            folder = _whole(folder)
            count, unknown, replaced = Scene.export(folder, parameters.modality, parameters.expert.strip())
            text = _("Cases written: {count}.").format(count=count)
            if replaced:
                text += " " + _("They replace earlier ones: {names}").format(names=", ".join(replaced))
            if unknown:
                text += " " + _("Left out, as no structure has such a name: {names}").format(names=", ".join(unknown))
            self._notes[folder] = text
            self._add(folder)

    def _add(self, folder: str) -> None:
        """Lists a folder; one that is listed already is scanned again."""
        self._found.pop(folder, None)
        if folder == self._folder:
            self.stop()
        parameters = self._parameters()
        parameters.folders = [*(other for other in parameters.folders if other != folder), folder]
        self.show()

    def _checkAgain(self) -> None:
        """Scans all, as what the user says of them may have changed."""
        self.stop()
        self._found = {}
        self.show()

    def _remove(self) -> None:
        rows, parameters = {item.row() for item in self._ui.dataTable.selectedItems()}, self._parameters()
        parameters.folders = [folder for number, folder in enumerate(parameters.folders) if number not in rows]
        self._ui.dataTable.clearSelection()
        self.show()

    # ---- the scans

    def _start(self, folder: str) -> None:
        self._folder, self._result = folder, Path(tempfile.mkdtemp(prefix="m4oe-"), "scan.json")
        words = ["data", "scan", folder, "--json", str(self._result), *options(self._parameters())]
        try:
            self._process = Process(Worker.localCommand(*words), Worker.environment())
        except ValueError as error:
            self._fail(str(error))

    def _take(self) -> None:
        try:
            scan = _scanned(self._folder, json.loads(self._result.read_text(encoding="utf-8"))["datasets"])
        except (OSError, ValueError, LookupError):
            self._fail(self._process.lastWords())
            return
        self._end(scan)

    def _fail(self, why: str) -> None:
        lines = tuple(f"{self._folder}: {line.removeprefix(ERROR)}" for line in why.splitlines())
        self._end(_Scan(("0", "", _("cannot be used")), tuple(_("Error: {what}").format(what=line) for line in lines)))

    def _end(self, scan: _Scan) -> None:
        self._found[self._folder] = scan
        shutil.rmtree(self._result.parent, ignore_errors=True)
        self._process, self._folder = None, ""
        self._showFindings()

    # ---- what is shown

    def _fillTable(self, folders: Sequence[str]) -> None:
        table = self._ui.dataTable
        table.setRowCount(len(folders))
        for row, folder in enumerate(folders):
            working = ("...", _("is being checked"), "") if folder == self._folder else ("", _("waiting"), "")
            texts = self._found[folder].texts if folder in self._found else working
            for column, text in enumerate((folder, *texts)):
                item = qt.QTableWidgetItem(text)
                item.setToolTip(text)
                table.setItem(row, column, item)

    def _showFindings(self) -> None:
        notes = [note for folder, note in self._notes.items() if folder in self._parameters().folders]
        lines = [line for scan in self._found.values() for line in scan.findings]
        self._ui.findingsLabel.text = "\n".join([*notes, *lines])

    def _showSelection(self) -> None:
        self._ui.removeDataButton.enabled = bool(self._ui.dataTable.selectedItems())


def _whole(folder: str) -> str:
    """The path from the root, so that one folder has one name."""
    return str(Path(folder).expanduser().resolve())


class _Scan(NamedTuple):
    """What is known of a folder.

    Attributes:
        texts: Cases, structures and numbers of findings, for the table.
        findings: Line by line.
        experts: Those that its cases train; none where that of a case is not known.
    """

    texts: tuple[str, str, str]
    findings: tuple[str, ...]
    experts: frozenset[str] = frozenset()


def _scanned(folder: str, datasets: list[dict[str, Any]]) -> _Scan:
    """What `m4oe data scan` says of a folder."""
    cases = [case for dataset in datasets for case in dataset["cases"]]
    findings = [finding for dataset in datasets for finding in dataset["findings"]]
    counts = Counter(key for case in cases for key in case["volumes_ml"])
    kinds = Counter(finding["severity"] for finding in findings)
    names = {"error": _("errors"), "warning": _("warnings"), "note": _("notes")}
    structures = ", ".join(f"{structure(key).name} ({count})" for key, count in counts.items())
    told = ", ".join(f"{name}: {kinds[kind]}" for kind, name in names.items() if kinds[kind])
    kind = {"error": _("Error: {what}"), "warning": _("Warning: {what}"), "note": _("Note: {what}")}
    lines = tuple(
        kind[finding["severity"]].format(what=f"{finding['case'] or folder}: {finding['sentence']}")
        for finding in sorted(findings, key=lambda finding: list(kind).index(finding["severity"]))
    )
    experts = frozenset(case.get("expert") or (case.get("modality") or "").lower() for case in cases)
    texts = (str(len(cases)), structures or _("none"), told or _("none"))
    return _Scan(texts, lines, frozenset() if "" in experts else experts)
