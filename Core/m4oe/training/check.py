"""What is wrong with a case, found before it costs an hour: one look at its headers, one pass over its label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from ..files import read_header, read_volume
from ..geometry import Grid, Volume
from ..labels import catalogue, structure
from ..modality import modality_evidence
from ..names import BACKGROUND
from ..parallel import ignore_interrupts
from .cases import CaseFiles, Finding, on_grid, read_labels, whole_planes

_SIDE = 5.0  # mm by which a centre must lie on the wrong side
_HIGHEST = 65535
_LISTED = 9  # label values that a finding lists
_ALONE = 8  # cases up to which starting other processes takes longer than it saves


@dataclass(frozen=True)
class CaseReport:
    """What a case is.

    Attributes:
        spacing: Of the image along i, j, k in mm; None where it cannot be read.
        size: Of the image along i, j, k in voxels.
        modality: As its data set says, else as its header or HU prove; None where neither does.
        volumes_ml: Volume by structure, of those that are there.
        findings: What is wrong; with an error it is of no use.
    """

    case: str
    spacing: tuple[float, float, float] | None = None
    size: tuple[int, int, int] | None = None
    modality: str | None = None
    volumes_ml: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether no finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)


@dataclass(frozen=True, eq=False)
class Found:
    """The structures of a label map.

    Attributes:
        voxels: Number by structure.
        right_mm: Centre along the axis from left to right (RAS x), by structure.
        cut: Structures that reach a face of the volume.
        unknown: Label values without meaning.
    """

    voxels: Mapping[str, int]
    right_mm: Mapping[str, float]
    cut: frozenset[str]
    unknown: tuple[int, ...]


def check_cases(cases: Sequence[CaseFiles], processes: int | None = None) -> Iterator[CaseReport]:
    """Checks cases side by side; the reports come in the order of the cases.

    Args:
        cases: Of any data sets.
        processes: How many at once; as many as there are processors where it is None.
    """
    count = min(processes or os.cpu_count() or 1, len(cases))
    if count < 2 or (processes is None and len(cases) <= _ALONE):
        yield from map(check_case, cases)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), ignore_interrupts) as pool:
        yield from pool.map(check_case, cases, chunksize=max(1, min(8, len(cases) // (4 * count))))


def check_case(case: CaseFiles) -> CaseReport:
    """Checks one case; whatever is wrong with it becomes a finding."""
    findings: list[tuple[str, str]] = []
    spacing, size, modality = None, None, case.modality
    volumes: dict[str, float] = {}
    try:
        header = read_header(case.image)
        i, j, k = header.grid.shape[::-1]
        spacing, size = header.grid.spacing, (i, j, k)
        findings += [("warning", warning) for warning in header.warnings]
        if header.frames > 1:
            findings.append(("note", f"Its image has {header.frames} channels or frames, the first is used."))
        if header.dtype.kind == "f" or case.modality != "CT":  # only that an image is CT can be seen in its values
            image = read_volume(case.image, 0)
            findings += _check_values(image)
            modality = _check_modality(case, image, findings)
        if case.label is not None:
            volumes = _check_label(case, header.grid, findings)
    except (OSError, ValueError, RuntimeError, MemoryError, ArithmeticError) as error:
        findings.append(("error", str(error)))
    return CaseReport(
        case.case, spacing, size, modality, volumes, tuple(Finding(case.case, *finding) for finding in findings)
    )


def find_structures(labels: Volume, keys: Mapping[int, str]) -> Found:
    """Counts and places the structures of a label map in one pass.

    Args:
        labels: Its values are integers, in whatever type.
        keys: Structure by label value.

    Raises:
        ValueError: A value is not whole, negative or above 65535.
    """
    _, rows, columns = labels.array.shape
    right_i, right_j, right_k, right_0 = labels.grid.affine[0]
    right = np.add.outer(np.arange(rows) * right_j + right_0, np.arange(columns) * right_i).ravel()
    counts, sums = np.zeros(_HIGHEST + 1, np.int64), np.zeros(_HIGHEST + 1)
    touched = np.zeros(_HIGHEST + 1, bool)
    last = len(labels.array) - 1
    for index, plane in enumerate(whole_planes(labels.array)):
        if plane.min() < 0 or plane.max() > _HIGHEST:
            raise ValueError(f"Its label holds {plane.min() if plane.min() < 0 else plane.max()}, expected {[*keys]}.")
        where = np.flatnonzero(plane)
        values = plane.ravel()[where].astype(np.intp)
        here = np.bincount(values)
        counts[: len(here)] += here
        sums[: len(here)] += np.bincount(values, right[where]) + here * (index * right_k)
        for face in (plane,) if index in (0, last) else (plane[0], plane[-1], plane[:, 0], plane[:, -1]):
            touched[face] = True
    return _by_key(counts, sums, touched, keys)


def histogram(values: Sequence[float], bins: int = 5) -> str:
    """Range, median and counts in equal bins, as a line of text."""
    if min(values) == max(values):
        return f"{min(values):g}, all alike"
    counts = np.histogram(values, bins)[0].tolist()
    return f"{min(values):g} to {max(values):g}, median {np.median(values):g}:  {' | '.join(map(str, counts))}"


def _check_modality(case: CaseFiles, image: Volume, findings: list[tuple[str, str]]) -> str | None:
    """The modality that its data set says or its header or HU prove; adds what is odd about it."""
    evidence = modality_evidence(image)
    if case.modality is None and not evidence.certain:
        cure = "say CT or MR (--modality, or Modality in the panel; or in cases.csv)"
        findings.append(("error", f"Its modality is not known; {cure}."))
    elif case.modality is None:
        findings.append(("note", f"Its header or HU say {evidence.modality}."))
        return evidence.modality
    elif evidence.certain and evidence.modality != case.modality:
        findings.append(("warning", f"It is said to be {case.modality}, but its header or HU say {evidence.modality}."))
    return case.modality


def _check_values(image: Volume) -> list[tuple[str, str]]:
    if image.array.dtype.kind != "f":
        return []
    lost = sum(int((~np.isfinite(plane)).sum()) for plane in image.array)
    return [("warning", f"Its image has {lost} voxels that are no number (NaN or infinite).")] if lost else []


def _check_label(case: CaseFiles, grid: Grid, findings: list[tuple[str, str]]) -> dict[str, float]:
    """Adds what is wrong with the label, and returns the volumes of its structures in mL."""
    labels = read_labels(case)
    if labels.array.dtype.kind == "f":
        findings.append(("note", f"Its label is stored as {labels.array.dtype}, whole numbers are taken from it."))
    labels = on_grid(labels, grid)
    findings += [("warning", warning) for warning in labels.warnings if ("warning", warning) not in findings]
    found = find_structures(labels, case.labels)
    if found.unknown:
        more = len(found.unknown) - _LISTED
        values = ", ".join(map(str, found.unknown[:_LISTED])) + (f", ... and {more} more" if more > 0 else "")
        cure = "name them in the label values, or give - for none of the named structures, as in 3-9=-"
        findings.append(("error", f"Its label holds {values}, which nothing gives a meaning: {cure}."))
    elif not found.voxels:
        findings.append(("warning", "Its label is empty."))
    volumes = {key: voxels * grid.voxel_ml for key, voxels in found.voxels.items()}
    findings += [
        ("warning", sentence) for sentence in (*_check_volumes(volumes, found.cut), *_check_sides(found.right_mm))
    ]
    return {key: round(volume, 3) for key, volume in volumes.items()}


def _check_volumes(volumes: Mapping[str, float], cut: frozenset[str]) -> Iterator[str]:
    for key, volume in volumes.items():
        entry = structure(key)
        if entry.volume_ml is None:
            continue
        low, _, high = entry.volume_ml
        is_small = volume < low and key not in cut and not entry.volume_depends_on_fov
        if is_small or volume > high:
            yield f"{entry.name} has {volume:.4g} mL; patients had {low:g} to {high:g}."


def _check_sides(right_mm: Mapping[str, float]) -> Iterator[str]:
    """Left structures that lie right of their right ones, and a liver left of the spleen."""
    pairs = [(key, f"{key[:-4]}right") for key in right_mm if key.endswith("left")]
    pairs += [(key, key.replace("_left_", "_right_")) for key in right_mm if "_left_" in key]
    wrong = [
        f"{left} lies right of {right}"
        for left, right in (*pairs, ("spleen", "liver"))
        if left in right_mm and right in right_mm and right_mm[left] - right_mm[right] > _SIDE
    ]
    if wrong:
        yield f"Left and right are likely swapped: {'; '.join(wrong)}."


def _by_key(
    counts: NDArray[np.int64], sums: NDArray[np.float64], touched: NDArray[np.bool_], keys: Mapping[int, str]
) -> Found:
    voxels: dict[str, int] = {}
    right: dict[str, float] = {}
    present = [int(value) for value in np.flatnonzero(counts) if keys.get(int(value)) != BACKGROUND]
    for value in present:
        if key := keys.get(value):
            voxels[key] = voxels.get(key, 0) + int(counts[value])
            right[key] = right.get(key, 0.0) + float(sums[value])
    order = [key for key in catalogue() if key in voxels]
    return Found(
        {key: voxels[key] for key in order},
        {key: right[key] / voxels[key] for key in order},
        frozenset(key for value, key in keys.items() if touched[value]),
        tuple(value for value in present if value not in keys),
    )
