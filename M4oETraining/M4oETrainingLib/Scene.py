"""The open scene as training data: volumes with their segmentations, written as pairs of files into a folder."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path
from typing import Any

import slicer
import slicer.util
from slicer.i18n import tr as _

_AIR = -500  # a volume that goes below is a CT


def pairs() -> list[tuple[Any, Any]]:
    """Volume and segmentation nodes that belong together: the segmentation was drawn on the volume."""
    found = []
    for segmentation in slicer.util.getNodesByClass("vtkMRMLSegmentationNode"):
        volume = segmentation.GetNodeReference(segmentation.GetReferenceImageGeometryReferenceRole())
        if volume is not None and volume.GetClassName() == "vtkMRMLScalarVolumeNode":
            found.append((volume, segmentation))
    return found


def export(folder: str, modality: str, expert: str) -> tuple[int, list[str], list[str]]:
    """Writes every pair into the folder, beside those that are there, with tables of the labels and the cases.

    Args:
        folder: Is made where it is missing.
        modality: "CT", "MR", or "" to decide by what is known of the volume.
        expert: That the cases train; "" for the modality's.

    Returns:
        Number of cases, the segments that are no structure of the catalogue and were left out, and the cases that
        were in the folder already and are replaced.

    Raises:
        ValueError: There is no pair, a volume has two segmentations, or its modality is not known.
        OSError: The folder cannot be written.
    """
    from m4oe.labels import catalogue

    found = pairs()
    if not found:
        raise ValueError(
            _("The scene has no segmentation that belongs to a volume. Draw one in the Segment Editor first.")
        )
    names = _caseNames([volume for volume, _segmentation in found])
    values = {key: value for value, key in enumerate(catalogue(), start=1)}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    rows, left = _rows(target), []
    replaced = [case for case in names if case in rows]
    for case, (volume, segmentation) in zip(names, found, strict=True):
        unknown, kind = _write(target, case, volume, segmentation, values, modality)
        left += unknown
        rows[case] = {"case": case, "modality": kind, "expert": expert or kind.lower()}
    _save(target / "cases.csv", [["case", "modality", "expert"], *[list(row.values()) for row in rows.values()]])
    _save(target / "labels.csv", [["label", "name"], *[[str(value), key] for key, value in values.items()]])
    return len(found), list(dict.fromkeys(left)), replaced


def _caseNames(volumeNodes: list[Any]) -> list[str]:
    """A name of its own for each volume, of which several may have the same in Slicer.

    Raises:
        ValueError: A volume comes twice.
    """
    names: list[str] = []
    for node in volumeNodes:
        if volumeNodes.count(node) > 1:
            raise ValueError(
                _("'{name}' has several segmentations. Delete those that are not to be learned.").format(
                    name=node.GetName()
                )
            )
        name = re.sub(r"[^\w-]+", "_", node.GetName()).strip("_") or "case"
        others = (f"{name}_{number}" for number in itertools.count(2))
        names.append(next(text for text in itertools.chain([name], others) if text not in names))
    return names


def structureOf(segment: Any) -> str | None:
    """The key of a segment's structure: by its codes, else by its name."""
    try:
        from m4oe.labelmap import find_structure
    except ImportError:  # no pynrrd here
        from m4oe.names import key_of

        return key_of(segment.GetName())
    return find_structure("", segment.GetTerminology()) or find_structure(segment.GetName())


def _write(
    folder: Path, case: str, volumeNode: Any, segmentationNode: Any, values: dict[str, int], modality: str
) -> tuple[list[str], str]:
    import numpy as np
    from m4oe.files import write_volume
    from m4oe.geometry import Volume
    from m4oe.labels import ancestry
    from m4oe.nodes import volume_from_node

    volume = volume_from_node(volumeNode)
    kind = modality or volume.modality or ("CT" if volume.array.min() < _AIR else "")
    if not kind:
        raise ValueError(_("Whether '{name}' is CT or MR is not known. Choose it.").format(name=volumeNode.GetName()))
    segmentation = segmentationNode.GetSegmentation()
    keys = {name: structureOf(segmentation.GetSegment(name)) for name in segmentation.GetSegmentIDs()}
    known = {name: key for name, key in keys.items() if key}
    unknown = [segmentation.GetSegment(name).GetName() for name, key in keys.items() if not key]
    labels = np.zeros(volume.array.shape, np.uint8)
    for name, key in sorted(known.items(), key=lambda item: len(list(ancestry(item[1])))):  # a part over its whole
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(segmentationNode, name, volumeNode)
        labels[mask > 0] = values[key]
    write_volume(folder / f"{case}.nii.gz", volume)
    write_volume(folder / f"{case}_label.nii.gz", Volume(labels, volume.grid))
    return unknown, kind


def _rows(folder: Path) -> dict[str, dict[str, str]]:
    """Cases that the folder has already."""
    path = folder / "cases.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row["case"]: {key: row.get(key) or "" for key in ("case", "modality", "expert")}
            for row in csv.DictReader(file)
        }


def _save(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
