"""The open scene as training data: volumes with their segmentations, written as pairs of files into a folder."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import slicer
import slicer.util
from slicer.i18n import tr as _

_COLUMNS = ("case", "modality", "expert")
# What a reader of pairs of files would take for the end of a name: CT_seg would be the label map of CT.
_ROLE = re.compile(r"(?i)[_-](?=(?:labels?|labelmap|seg|segmentation|mask|gt|image|img|volume|scan|0000)(?![^\W_]))")


class _Segment(NamedTuple):
    """A segment that is a structure of the catalogue."""

    node: Any
    name: str
    key: str


class _Case(NamedTuple):
    """A volume node, what was drawn on it, and its modality."""

    volumeNode: Any
    segments: list[_Segment]
    modality: str


def pairs() -> list[tuple[Any, list[Any]]]:
    """Volume nodes, each with the segmentation nodes that were drawn on it."""
    found: dict[str, tuple[Any, list[Any]]] = {}
    for segmentation in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
        volume = segmentation.GetNodeReference(segmentation.GetReferenceImageGeometryReferenceRole())
        if volume is not None and volume.GetClassName() == "vtkMRMLScalarVolumeNode":
            found.setdefault(volume.GetID(), (volume, []))[1].append(segmentation)
    return list(found.values())


def export(folder: str, modality: str, expert: str) -> tuple[int, list[str], list[str]]:
    """Writes every volume that has structures into the folder, beside those that are there.

    A table beside each label map says what was drawn in that case; all else is unknown there, not absent. Nothing is
    written where anything is refused.

    Args:
        folder: Is made where it is missing.
        modality: "CT" or "MR" for the volumes of which it is not known; "" to refuse them.
        expert: That the cases train; "" for the modality's.

    Returns:
        Number of cases, the segments that are no structure of the catalogue and were left out, and the cases that
        were in the folder already and are replaced.

    Raises:
        ValueError: No volume has a structure, or has one twice, or its modality is not known.
        OSError: The folder cannot be written.
    """
    from m4oe.labels import catalogue

    found = pairs()
    if not found:
        raise ValueError(
            _("The scene has no segmentation that belongs to a volume. Draw one in the Segment Editor first.")
        )
    cases, left = [], []
    for volumeNode, segmentationNodes in found:
        segments, unknown = _structures(volumeNode, segmentationNodes)
        left += unknown
        if segments:
            cases.append(_Case(volumeNode, segments, _modality(volumeNode, modality)))
    left = list(dict.fromkeys(left))
    if not cases:
        raise ValueError(
            _("No segment is a structure that M4oE knows: {names}. Give them terminology or English names.").format(
                names=", ".join(left)
            )
        )
    target = Path(folder)
    rows = _rows(target)
    names = _names([case.volumeNode for case in cases], target, rows)
    target.mkdir(parents=True, exist_ok=True)
    values = {key: value for value, key in enumerate(catalogue(), start=1)}
    replaced = [name for name in names if name in rows]
    for name, case in zip(names, cases, strict=True):
        _write(target, name, case, values)
        rows[name] = {**rows.get(name, {}), "case": name, "modality": case.modality}
        rows[name]["expert"] = expert or case.modality.lower()
    columns = list(dict.fromkeys(itertools.chain(_COLUMNS, *rows.values())))
    _save(target / "cases.csv", [columns, *[[row.get(column, "") for column in columns] for row in rows.values()]])
    return len(cases), left, replaced


def _structures(volumeNode: Any, segmentationNodes: list[Any]) -> tuple[list[_Segment], list[str]]:
    """The segments of a volume that are structures, and the names of the others.

    Raises:
        ValueError: Two segmentations have the same structure.
    """
    from m4oe.labels import structure

    segments: list[_Segment] = []
    unknown = []
    for node in segmentationNodes:
        segmentation = node.GetSegmentation()
        for name in segmentation.GetSegmentIDs():
            key = structureOf(segmentation.GetSegment(name))
            other = next((known for known in segments if known.key == key and known.node is not node), None)
            if other is not None:
                text = _(
                    "'{volume}' has {structure} in two segmentations, '{first}' and '{second}'. Delete one of both."
                )
                names = {"first": other.node.GetName(), "second": node.GetName(), "volume": volumeNode.GetName()}
                raise ValueError(text.format(structure=structure(other.key).name, **names))
            if key:
                segments.append(_Segment(node, name, key))
            else:
                unknown.append(segmentation.GetSegment(name).GetName())
    return segments, unknown


def _modality(volumeNode: Any, otherwise: str) -> str:
    """What the volume itself says, else the choice of the user.

    Raises:
        ValueError: There is neither.
    """
    from m4oe.modality import modality_evidence
    from m4oe.nodes import volume_from_node

    evidence = modality_evidence(volume_from_node(volumeNode))
    found = evidence.modality if evidence.certain else otherwise
    if not found:
        text = _("Whether '{name}' is CT or MR is not known. Choose it; it is used only where nothing is known.")
        raise ValueError(text.format(name=volumeNode.GetName()))
    return found


def _names(volumeNodes: list[Any], folder: Path, rows: dict[str, Any]) -> list[str]:
    """A name of its own for each volume, of which several may have the same in Slicer.

    Files of the folder that are no cases of its table are not overwritten.
    """
    names: list[str] = []
    for node in volumeNodes:
        name = _ROLE.sub("", re.sub(r"[^\w-]+", "_", node.GetName())).strip("_") or "case"
        others = (f"{name}_{number}" for number in itertools.count(2))
        taken = {other.lower() for other in names}  # as files of Windows and macOS see them
        free = (text for text in itertools.chain([name], others) if text.lower() not in taken)
        names.append(next(text for text in free if text in rows or not (folder / f"{text}.nii.gz").exists()))
    return names


def structureOf(segment: Any) -> str | None:
    """The key of a segment's structure: by its codes, else by its name."""
    from m4oe.labelmap import find_structure

    return find_structure(segment.GetName(), segment.GetTerminology())


def _write(folder: Path, name: str, case: _Case, values: dict[str, int]) -> None:
    """Writes a case's image, its label map, and the table of the structures that were drawn in it."""
    import numpy as np
    from m4oe.files import write_volume
    from m4oe.geometry import Volume
    from m4oe.labels import ancestry
    from m4oe.nodes import volume_from_node

    volume = volume_from_node(case.volumeNode)
    labels = np.zeros(volume.array.shape, np.uint8)
    for segment in sorted(case.segments, key=lambda item: len(list(ancestry(item.key)))):  # a part over its whole
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(segment.node, segment.name, case.volumeNode)
        labels[mask > 0] = values[segment.key]
    write_volume(folder / f"{name}.nii.gz", volume)
    write_volume(folder / f"{name}_label.nii.gz", Volume(labels, volume.grid))
    keys = dict.fromkeys(segment.key for segment in case.segments)
    _save(folder / f"{name}_label.csv", [["LabelValue", "Name"], *[[str(values[key]), key] for key in keys]])


def _rows(folder: Path) -> dict[str, dict[str, str]]:
    """Cases that the folder has already, with all that its table says of them.

    Raises:
        ValueError: The table has no column of cases.
    """
    from m4oe.names import read_rows

    path = folder / "cases.csv"
    if not path.exists():
        return {}
    rows = list(read_rows(path))
    if rows and "case" not in rows[0]:
        raise ValueError(_("{path} has no column case. Choose another folder.").format(path=path))
    return {row["case"]: {key: value or "" for key, value in row.items() if key} for row in rows}


def _save(path: Path, rows: list[list[str]]) -> None:
    from m4oe.files import atomic_write

    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
