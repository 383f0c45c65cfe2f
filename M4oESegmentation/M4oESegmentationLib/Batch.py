"""Many cases from a folder or a table: `m4oe segment` in the worker's Python, and what it says in a table."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import qt
import slicer
import slicer.util
from slicer.i18n import tr as _

from . import Worker
from .Errors import errorsShown, showError
from .Process import Process
from .Run import Choices

FORMATS = {
    "seg.nrrd": _("Segmentation (.seg.nrrd)"),
    "nii.gz": _("NIfTI (.nii.gz)"),
    "dcm": _("DICOM SEG (.dcm)"),
}


class Batch:
    """A batch under way. Ask `poll` from a timer until it says that all is done.

    Attributes:
        fraction: Done of all cases.
        sentence: How far it is, or how it ended.
        error: Why it could not do what was asked; None while all is well.
        stopped: Whether the user ended it.
    """

    def __init__(self, table: Any, source: str, folder: str, fileFormat: str, pictures: bool, choices: Choices) -> None:
        """Starts it.

        Args:
            table: Widget that shows the cases.
            source: Folder of volumes, or table of them.
            folder: For the results.
            fileFormat: One of `FORMATS`.
            pictures: Whether each case gets a picture.
            choices: Model, expert, structures, quality and device.

        Raises:
            ValueError: Something that was given cannot be used.
        """
        if not source or not Path(source).exists():
            raise ValueError(_("Choose a folder of volumes or a table (.csv) as the input of the batch."))
        if not folder:
            raise ValueError(_("Choose a folder for the results of the batch."))
        words = ["segment", source, "-o", folder, "--format", fileFormat, "--json", "--resume"]
        words += ["--model", choices.model, "--expert", choices.expert, "--device", choices.device]
        words += ["--quality", choices.quality, "--structures", ",".join(choices.structures)]
        words += ["--preview"] if pictures else []
        self._process = Process(Worker.localCommand(*words), Worker.environment())
        self._table = table
        table.setRowCount(0)
        table.setColumnCount(2)
        table.setHorizontalHeaderLabels([_("Case"), _("Result")])
        table.horizontalHeader().setStretchLastSection(True)
        table.setTextElideMode(qt.Qt.ElideMiddle)  # series of one study differ at the end of their UID alone
        self._rows: dict[str, int] = {}
        self._tableName = Path(source).stem if Path(source).suffix.lower() == ".csv" else ""
        self._number, self._of, self._case, self._complete = 0, 1, "", False
        self.fraction, self.sentence = 0.0, _("Starting")
        self.error: str | None = None
        self.stopped = False

    def poll(self) -> bool:
        """Shows what happened; whether all is done."""
        ended = self._process.done()
        for line in self._process.lines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                self._show(event)
        if ended and not self._complete and self.error is None:
            self.error = self._process.lastWords()
        if ended and self._case:
            self._tell(self._case, _("stopped") if self.stopped else _("not finished"))
        return ended

    def stop(self) -> None:
        """Ends it; the cases that are done stay, and the next start goes on after them."""
        self.stopped = True
        self._process.stop()

    def _show(self, event: dict[str, Any]) -> None:
        case = event.get("case", "")
        if case and event["event"] in ("done", "skipped", "failed"):
            self._case = ""
        match event.get("event"):
            case "case":
                self._number, self._of, self._case = event["number"], event["of"], case
                self._tell(case, _("working"))
                self.sentence = _("Case {number} of {count}: {case}").format(
                    number=self._number, count=self._of, case=case
                )
                self.fraction = (self._number - 1) / self._of
            case "progress":
                if event["phase"] == "segment":
                    self.fraction = (self._number - 1 + event["fraction"]) / self._of
            case "done":
                found = sum(volume > 0 for volume in event["report"]["volumes_ml"].values())
                warnings = len(event["report"]["warnings"])
                self._tell(case, _("{found} structures, {warnings} warnings").format(found=found, warnings=warnings))
            case "skipped":
                reasons = {"done": _("done before"), "label map": _("it is a label map")}
                reason = reasons.get(event["reason"], event["reason"])
                self._tell(case, _("skipped: {reason}").format(reason=reason))
            case "failed" if case == self._tableName and self._number == 0:  # the table itself, which is no case
                self.error = event["error"]
            case "failed":
                self._tell(case, _("failed: {error}").format(error=event["error"]))
            case "end":
                self.fraction, self._complete = 1.0, True
                self.sentence = _("{done} done, {skipped} skipped, {failed} failed").format(**event)

    def _tell(self, case: str, text: str) -> None:
        if case not in self._rows:
            self._rows[case] = self._table.rowCount
            self._table.setRowCount(self._table.rowCount + 1)
        for column, words in enumerate((case, text)):
            item = qt.QTableWidgetItem(words)
            item.setToolTip(words)
            self._table.setItem(self._rows[case], column, item)


class BatchSection:
    """The panel's part for batches."""

    def __init__(self, ui: Any, choices: Callable[[], Choices], changed: Callable[[], None]) -> None:
        """Connects the widgets.

        Args:
            ui: The panel's widgets.
            choices: Gives what is chosen in the panel.
            changed: Called when a batch has begun or ended.
        """
        self._ui, self._choices, self._changed = ui, choices, changed
        self.batch: Batch | None = None
        for key, label in FORMATS.items():
            ui.batchFormatSelector.addItem(label, key)
        ui.batchDicomButton.connect("clicked()", self._takeSelection)
        ui.batchStartButton.connect("clicked()", self._start)
        ui.batchStopButton.connect("clicked()", self.stop)

    def showState(self, reason: str) -> None:
        """Enables the buttons; `reason` says why no batch can be started, or is ""."""
        self._ui.batchStartButton.enabled = self.batch is None and not reason
        self._ui.batchStartButton.toolTip = reason or _("Segment all cases of the input")
        self._ui.batchStopButton.enabled = self.batch is not None

    def poll(self) -> bool:
        """Shows how far it is; whether a batch is under way."""
        if self.batch is None:
            return False
        ended = self.batch.poll()
        self._ui.batchProgressBar.value = round(100 * self.batch.fraction)
        self._ui.batchStatusLabel.text = self.batch.sentence
        if ended:
            self._end()
        return not ended

    def stop(self) -> None:
        if self.batch is not None:
            self.batch.stop()

    def _start(self) -> None:
        ui = self._ui
        with errorsShown(_("The batch could not be started.")):
            source, folder, choices = ui.batchInputEdit.currentPath, ui.batchOutputEdit.currentPath, self._choices()
            if (
                folder
                and holdsOtherResults(folder, choices)
                and not slicer.util.confirmOkCancelDisplay(
                    _("{folder} holds results of another choice of model, expert, structures or quality. ").format(
                        folder=folder
                    )
                    + _("Those of the same cases will be replaced. Choose another output folder to keep them. Go on?")
                )
            ):
                return
            fileFormat, pictures = ui.batchFormatSelector.currentData, ui.batchPicturesCheckBox.checked
            self.batch = Batch(ui.batchTable, source, folder, fileFormat, pictures, choices)
            for edit in (ui.batchInputEdit, ui.batchOutputEdit):
                edit.addCurrentPathToHistory()
            self._changed()

    def _end(self) -> None:
        batch, self.batch = self.batch, None
        if batch.error and batch.stopped:
            self._ui.batchStatusLabel.text = _("Stopped; start it again to go on.")
        elif batch.error:
            self._ui.batchStatusLabel.text = _("The batch failed: {reason}").format(reason=batch.error.splitlines()[-1])
            showError(_("The batch failed."), batch.error)
        self._changed()

    def _takeSelection(self) -> None:
        with errorsShown(_("The selection cannot be taken.")):
            self._ui.batchInputEdit.currentPath = tableOfSelectedSeries()


def holdsOtherResults(folder: str, choices: Choices) -> bool:
    """Whether there are results of other choices, which a batch replaces; an expert named in a table is another one."""
    from m4oe.spec import find_model, read_spec

    spec = read_spec(find_model(choices.model))
    wanted = (f"{spec.name} {spec.version}", choices.expert, set(choices.structures), choices.quality)
    try:
        entries = json.loads(Path(folder, "volumes.json").read_text(encoding="utf-8"))
        results = [(entry["model"], entry["asked"]) for entry in entries.values() if "files" in entry]
        there = [(model, asked["expert"], set(asked["structures"] or ()), asked["quality"]) for model, asked in results]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or not ours, which the batch says
        return False
    return any(result != wanted for result in there)


def tableOfSelectedSeries() -> str:
    """A table of the series that are selected in Slicer's DICOM browser, for a batch.

    Raises:
        ValueError: None is selected.
    """
    browser = slicer.modules.dicom.widgetRepresentation().self().browserWidget.dicomBrowser
    series = list(browser.dicomTableManager().currentSeriesSelection())
    files = {uid: slicer.dicomDatabase.filesForSeries(uid) for uid in series}
    rows = [(paths[0], uid) for uid, paths in files.items() if paths]
    if not rows:
        raise ValueError(_("No series is selected. Select series in the module DICOM, then press this button again."))
    return writeTable(rows)


def writeTable(rows: Sequence[tuple[str, str]]) -> str:
    """Writes a table with an input and a case in each row, and returns its path."""
    path = Path(tempfile.mkdtemp(prefix="m4oe-"), "batch.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("input", "case"), *rows])
    return str(path)
