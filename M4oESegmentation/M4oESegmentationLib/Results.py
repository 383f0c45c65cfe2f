"""What a result says and what can be done with it: table, CSV, the gate's bar, DICOM SEG, the Segment Editor."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qt
import slicer
import slicer.util
from slicer.i18n import tr as _

from .Errors import errorsShown
from .Reports import reportOf

if TYPE_CHECKING:
    from m4oe.jobs import Report

_BAR_WIDTH, _BAR_HEIGHT, _TEXT_HEIGHT = 380, 14, 18
_SHOWN = 0.15  # share of the gate below which the bar has no room for the expert's name
_COLORS = ((46, 110, 165), (222, 132, 44), (86, 150, 78), (160, 88, 156), (120, 120, 120))


def header() -> tuple[str, ...]:
    return (_("Structure"), _("mL"), _("Mean"), _("SD"), _("Confidence"), _("Check"))


def rows(report: Report) -> list[tuple[str, ...]]:
    """A row of text per structure that was found, the largest first, as `header` names the columns."""
    from m4oe.labels import structure

    words = {"implausible": _("implausible"), "cut": _("cut")}
    words["low confidence"] = _("low confidence")
    table = []
    for key, volume in sorted(report.volumes_ml.items(), key=lambda item: -item[1]):
        mean, deviation = report.intensities.get(key, (float("nan"), float("nan")))
        sure = f"{report.confidence[key]:.0%}" if key in report.confidence else ""
        check = ", ".join(words.get(flag, flag) for flag in report.flags.get(key, ()))
        table.append((structure(key).name, f"{volume:.2f}", f"{mean:.1f}", f"{deviation:.1f}", sure, check))
    return table


def fillTable(table: Any, segmentationNode: Any, report: Report) -> None:
    """Shows the rows, with the colours of the segments."""
    content = rows(report)
    segments = segmentationNode.GetSegmentation()
    table.setRowCount(len(content))
    table.setColumnCount(len(header()))
    table.setHorizontalHeaderLabels(list(header()))
    for number, cells in enumerate(content):
        for column, text in enumerate(cells):
            item = qt.QTableWidgetItem(text)
            if 0 < column < 5:
                item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
            table.setItem(number, column, item)
        segment = segments.GetSegment(segments.GetSegmentIdBySegmentName(cells[0]))
        if segment is not None:
            table.item(number, 0).setIcon(colorIcon([round(255 * channel) for channel in segment.GetColor()]))
    table.verticalHeader().setVisible(False)
    table.resizeColumnsToContents()
    table.horizontalHeader().setStretchLastSection(True)


def colorIcon(color: Any) -> Any:
    """A square of a colour (red, green and blue, 0 to 255)."""
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
            writer.writerow(("segmentation", "model", *header()))
            writer.writerows((segmentationNode.GetName(), report.model, *cells) for cells in rows(report))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def gateText(report: Report) -> str:
    """Which experts served the volume, and who chose them."""
    used = {name: weight for name, weight in report.expert_weights.items() if weight >= 0.005}
    names = ", ".join(used if len(used) == 1 else [f"{name} {weight:.0%}" for name, weight in used.items()])
    reasons = {
        "user": _("Expert {names}, as you chose."),
        "modality": _("Expert {names}: the header or the intensities leave no choice."),
        "gate": _("Expert {names}, chosen by the gate."),
    }
    return reasons.get(report.chosen_by, _("Experts {names}.")).format(names=names)


def gateShares(report: Report) -> str:
    """What the gate gave each expert, as text."""
    return ", ".join(f"{name} {share:.0%}" for name, share in report.gate.items())


def gatePixmap(report: Report, width: int) -> Any:
    """A bar with a part for each expert, as long as the gate gave it a probability; None where it was not asked."""
    if not report.gate:
        return None
    pixmap = qt.QPixmap(width, _BAR_HEIGHT + _TEXT_HEIGHT)
    pixmap.fill(qt.QColor(0, 0, 0, 0))
    painter = qt.QPainter(pixmap)
    left = 0
    for number, (name, share) in enumerate(report.gate.items()):
        part = round(share * width)
        painter.fillRect(left, 0, part, _BAR_HEIGHT, qt.QColor(*_COLORS[number % len(_COLORS)]))
        if share >= _SHOWN:
            area = qt.QRect(left, _BAR_HEIGHT, part, _TEXT_HEIGHT)
            painter.drawText(area, int(qt.Qt.AlignLeft) | int(qt.Qt.AlignVCenter), f"{name} {share:.0%}")
        left += part
    painter.end()
    return pixmap


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
        ui.resultLabel.text = f"{node.GetName()}: {report.model}. {gateText(report)}"
        pixmap = gatePixmap(report, _BAR_WIDTH)
        ui.gateLabel.visible = pixmap is not None
        if pixmap is not None:
            ui.gateLabel.setPixmap(pixmap)
            ui.gateLabel.toolTip = _("The gate: {shares}").format(shares=gateShares(report))
        ui.warningsLabel.text = "\n".join(f"• {warning}" for warning in report.warnings)
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
