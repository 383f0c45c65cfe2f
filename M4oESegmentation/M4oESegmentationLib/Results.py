"""What a result says and what can be done with it: table, CSV, the gate's bar, DICOM SEG, the Segment Editor."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
import slicer
import slicer.util
from slicer.i18n import tr as _

from .Errors import errorsShown
from .Reports import modalityOf, reportOf

if TYPE_CHECKING:
    from m4oe.jobs import Report

_LETTERS = 45  # that fit into the bar of the gate where the panel is narrow
_COLORS = ("#2e6ea5", "#b3611a", "#4a7f42", "#8a4a86", "#666666")
_MOST_ROWS = 16  # that the table shows without scrolling


def header(modality: str) -> tuple[str, ...]:
    """Names of the columns; the values of a CT are HU, those of MR have no unit."""
    unit = {"CT": _(" (HU)"), "MR": _(" (signal)")}.get(modality, "")
    return (_("Structure"), _("mL"), _("Mean") + unit, _("SD") + unit, _("Confidence"), _("Check"))


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row of text per structure that was looked for, the largest first, as `header` names the columns."""
    from m4oe.labels import structure

    words = {"implausible": _("implausible"), "cut": _("cut")}
    words["low confidence"] = _("low confidence")
    table = []
    for key, volume in sorted(report.volumes_ml.items(), key=lambda item: -item[1]):
        if not volume:
            table.append((structure(key).name, "0", "", "", "", _("not found")))
            continue
        mean, deviation = report.intensities.get(key, (float("nan"), float("nan")))
        sure = f"{report.confidence[key]:.0%}" if key in report.confidence else ""
        check = ", ".join(words.get(flag, flag) for flag in report.flags.get(key, ()))
        table.append((structure(key).name, f"{volume:.2f}", f"{mean:.1f}", f"{deviation:.1f}", sure, check))
    return table


def fillTable(table: Any, segmentationNode: Any, report: Report) -> None:
    """Shows the rows, with the colours of the segments."""
    content, names = rows(report), header(modalityOf(segmentationNode))
    segments = segmentationNode.GetSegmentation()
    table.setRowCount(len(content))
    table.setColumnCount(len(names))
    table.setHorizontalHeaderLabels([name.replace(" (", "\n(") for name in names])
    for number, cells in enumerate(content):
        for column, text in enumerate(cells):
            item = qt.QTableWidgetItem(text.replace(", ", "\n"))  # of what is to be checked a line each
            if 0 < column < 5:
                item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
            table.setItem(number, column, item)
        segment = segments.GetSegment(segments.GetSegmentIdBySegmentName(cells[0]))
        color = [round(255 * channel) for channel in segment.GetColor()] if segment is not None else (0, 0, 0, 0)
        table.item(number, 0).setIcon(colorIcon(color))
    for column in range(len(names)):  # the last takes what is left
        last = column == len(names) - 1
        mode = qt.QHeaderView.Stretch if last else qt.QHeaderView.ResizeToContents
        table.horizontalHeader().setSectionResizeMode(column, mode)
    table.verticalHeader().setVisible(False)
    table.verticalHeader().setSectionResizeMode(qt.QHeaderView.ResizeToContents)
    heights = [table.rowHeight(row) for row in range(min(len(content), _MOST_ROWS))]
    headerHeight = 2 * min(heights, default=18)
    table.setFixedHeight(sum(heights) + headerHeight + 2 * table.frameWidth)


def colorIcon(color: Any) -> Any:
    """A square of a colour (red, green, blue and maybe opacity, 0 to 255)."""
    pixmap = qt.QPixmap(12, 12)
    pixmap.fill(qt.QColor(*color))
    return qt.QIcon(pixmap)


def writeCsv(path: Path, segmentationNode: Any, report: Report) -> None:
    """Writes the table, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("segmentation", "model", *header(modalityOf(segmentationNode))))
            writer.writerows((segmentationNode.GetName(), report.model, *cells) for cells in rows(report))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def expertText(report: Report) -> str:
    """Which experts served the volume, and who chose them."""
    used = {name: weight for name, weight in report.expert_weights.items() if weight >= 0.005}
    names = ", ".join(used if len(used) == 1 else [f"{name} {weight:.0%}" for name, weight in used.items()])
    sure = "".join(f" ({report.gate[name]:.0%})" for name in used) if len(used) == 1 and report.gate else ""
    reasons = {
        "user": _("Expert {names}, named by you."),
        "modality": _("Expert {names}, chosen by the header or HU."),
        "gate": _("Expert {names}, chosen by the gate{sure}."),
    }
    return reasons.get(report.chosen_by, _("Experts {names}.")).format(names=names, sure=sure)


def gateText(report: Report) -> str:
    """A bar with a part for each expert, as long as the gate gave it a probability, as rich text; "" without a gate.

    Names that find no room in their part stand below the bar; what rounds to 0 % has no part.
    """
    parts, below = [], []
    for number, (name, share) in enumerate(report.gate.items()):
        color, text = _COLORS[number % len(_COLORS)], escape(f"{name} {share:.0%}").replace(" ", "&nbsp;")
        if fits := len(f"{name} {share:.0%}") <= share * _LETTERS:
            text = f'<font color="white">{text}</font>'
        else:
            below.append(f'<font color="{color}">■</font>&nbsp;{text}')
        if round(100 * share):
            parts.append(f'<td width="{share:.0%}" bgcolor="{color}">{text if fits else ""}</td>')
    if not parts:
        return ""
    says = _("The gate alone would say:") if report.chosen_by == "modality" else _("The gate says:")
    bar = f'<table width="100%" cellspacing="0" cellpadding="2"><tr>{"".join(parts)}</tr></table>'
    return f"{says}{bar}{' &nbsp; '.join(below)}"


def warningsText(report: Report) -> str:
    """What to look at, a line for each."""
    lines = list(report.warnings)
    if not any(report.volumes_ml.values()):
        lines.append(_("what was checked and not found may be there all the same: the model's limits stand above"))
    return "\n".join(f"• {line}" for line in lines)


def editSegmentation(segmentationNode: Any, volumeNode: Any) -> None:
    """Opens the segmentation in Slicer's Segment Editor."""
    slicer.util.selectModule("SegmentEditor")
    editor = slicer.modules.segmenteditor.widgetRepresentation().self().editor
    editor.setSegmentationNode(segmentationNode)
    editor.setSourceVolumeNode(volumeNode)


def saveAsDicom(segmentationNode: Any, volumeNode: Any) -> None:
    """Puts the segmentation as DICOM SEG into Slicer's database, in the study of its volume.

    Raises:
        ValueError: The volume did not come from the database, or there is nothing to save.
        RuntimeError: The export failed.
    """
    if slicer.dicomDatabase is None or not slicer.dicomDatabase.isOpen:
        raise ValueError(_("Slicer's DICOM database is not open. Open the module DICOM once."))
    if volumeNode is None or not volumeNode.GetAttribute("DICOM.instanceUIDs"):
        raise ValueError(
            _("The volume was not loaded from Slicer's DICOM database, so there is no study to save into. ")
            + _("Load it through the module DICOM, or save the segmentation as .seg.nrrd.")
        )
    if segmentationNode.GetSegmentation().GetNumberOfSegments() == 0:
        raise ValueError(_("The segmentation is empty; there is nothing to save."))
    from DICOMLib import DICOMUtils

    try:
        from DICOMSegmentationPlugin import DICOMSegmentationPluginClass
    except ImportError as error:  # before Slicer 5.12
        raise RuntimeError(
            _("This Slicer writes no DICOM SEG. Install its extension QuantitativeReporting, or a newer Slicer.")
        ) from error

    tree = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    plugin = DICOMSegmentationPluginClass()
    exportables = plugin.examineForExport(tree.GetItemByDataNode(segmentationNode))
    if not exportables:
        raise RuntimeError(_("Slicer's DICOM export does not take this segmentation."))
    with tempfile.TemporaryDirectory() as folder:
        for exportable in exportables:
            exportable.directory = folder
        failure = plugin.export(exportables)
        if failure:
            raise RuntimeError(_("DICOM SEG could not be written: {failure}").format(failure=failure))
        DICOMUtils.importDicom(folder, slicer.dicomDatabase, True)


class ResultsSection:
    """The panel's part that shows a segmentation of ours, and what can be done with it."""

    def __init__(self, ui: Any, result: Callable[[], Any]) -> None:
        """Connects the widgets; `result` gives the segmentation node to show, or None."""
        self._ui, self._result = ui, result
        ui.editButton.connect("clicked()", self._edit)
        ui.csvButton.connect("clicked()", self._saveTable)
        ui.dicomButton.connect("clicked()", self._saveDicom)

    def show(self) -> None:
        ui, node = self._ui, self._result()
        report = reportOf(node)
        if ui.resultsCollapsibleButton.enabled != (report is not None):  # else it stays as the user left it
            ui.resultsCollapsibleButton.enabled = report is not None
            ui.resultsCollapsibleButton.collapsed = report is None
        ui.show3DButton.setSegmentationNode(node)
        if report is None:
            ui.resultsTable.setRowCount(0)
            return
        ui.resultLabel.text = f"{node.GetName()}: {report.model}. {expertText(report)}"
        ui.gateLabel.text = gateText(report)
        ui.gateLabel.visible = bool(report.gate)
        ui.warningsLabel.text = warningsText(report)
        fillTable(ui.resultsTable, node, report)

    def _volume(self) -> Any:
        """The volume that the segmentation was made of."""
        node = self._result()
        return node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole())

    def _edit(self) -> None:
        editSegmentation(self._result(), self._volume())

    def _saveTable(self) -> None:
        node = self._result()
        path = qt.QFileDialog.getSaveFileName(None, _("Save the table"), f"{node.GetName()}.csv", _("Tables (*.csv)"))
        if path:
            with errorsShown(_("The table was not saved.")):
                writeCsv(Path(path), node, reportOf(node))

    def _saveDicom(self) -> None:
        with errorsShown(_("The segmentation was not saved as DICOM.")):
            saveAsDicom(self._result(), self._volume())
            slicer.util.infoDisplay(_("The segmentation is in Slicer's DICOM database, in the study of its volume."))
