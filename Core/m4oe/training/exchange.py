"""Writes data sets for others: nnU-Net raw (version 2) and decathlon lists, with our keys as the names of labels.

`m4oe.training.layouts` reads both back. Images are linked or copied as they are, never resampled; label maps are
written anew, with values from 1 on.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import atomic_write, read_header, read_volume, write_volume
from ..labels import structure
from .cases import CaseFiles, DataSet, load_case

FORMATS = ("nnunet", "decathlon")
_FIRST_ID = 500  # of nnU-Net's numbers, below which it has its own


@dataclass(frozen=True)
class _Part:
    """Cases of a data set that have one modality and one set of annotated structures, as the formats want it."""

    name: str
    modality: str
    structures: tuple[str, ...]
    cases: tuple[CaseFiles, ...]
    splits: Mapping[str, str]
    licence: str


def export(
    datasets: Sequence[DataSet], splits: Mapping[str, Mapping[str, str]], folder: Path, layout: str
) -> Iterator[tuple[str, Path]]:
    """Writes data sets, one folder for each modality and set of annotated structures: unannotated is not background.

    Args:
        datasets: Their cases must be sound.
        splits: "train", "val" or "test" by case, by data set; cases that are missing there train.
        folder: Receives one folder per part.
        layout: "nnunet" or "decathlon".

    Yields:
        Each case when it is written, with the folder of its part.

    Raises:
        ValueError: The layout is unknown, a part's folder exists, or a case cannot be read.
        OSError: A file cannot be written; the folder of its part is removed.
    """
    if layout not in FORMATS:
        raise ValueError(f"format {layout!r} is unknown; expected one of {', '.join(FORMATS)}")
    parts = [part for dataset in datasets for part in _parts(dataset, splits.get(dataset.name, {}))]
    names = [f"Dataset{_FIRST_ID + n}_{part.name}" if layout == "nnunet" else part.name for n, part in enumerate(parts)]
    targets = [folder / name for name in names]
    if there := [target for target in targets if target.exists()]:
        raise ValueError(f"{there[0]} exists already; choose another folder")
    for part, target in zip(parts, targets, strict=True):
        try:
            for case in part.cases:
                _write_case(part, case, target, "_0000" if layout == "nnunet" else "")
                yield case.case, target
            values = _nnunet_values(part) if layout == "nnunet" else _decathlon_values(part)
            _write_json(target / "dataset.json", values)
            if layout == "nnunet":
                _write_extras(part, target)
        except BaseException:  # half a data set would be in the way of the next try
            shutil.rmtree(target, ignore_errors=True)
            raise


def _parts(dataset: DataSet, splits: Mapping[str, str]) -> list[_Part]:
    """Unlabelled cases go with the first part of their modality."""
    groups: dict[tuple[str, tuple[str, ...]], list[CaseFiles]] = {}
    for case in sorted(dataset.cases, key=lambda case: case.label is None):
        if case.modality is None:
            raise ValueError(f"{dataset.name}: the modality of {case.case} is not known; give it in cases.csv")
        same = [key for key in groups if key[0] == case.modality]
        structures = _ordered(case.annotated)
        key = (case.modality, structures) if case.label else next(iter(same), (case.modality, structures))
        groups.setdefault(key, []).append(case)
    modalities = [modality for modality, _ in groups]
    parts = []
    for number, ((modality, structures), cases) in enumerate(groups.items()):
        name = dataset.name if len(groups) == 1 else f"{dataset.name}_{modality}"
        name += f"_{number}" if modalities.count(modality) > 1 else ""
        parts.append(_Part(name, modality, structures, tuple(cases), splits, dataset.licence))
    return parts


def _ordered(keys: Sequence[str]) -> tuple[str, ...]:
    """Lesions last, for where regions overlap the later wins."""
    return tuple(sorted(keys, key=lambda key: structure(key).kind == "lesion"))


def _write_case(part: _Part, case: CaseFiles, folder: Path, channel: str) -> None:
    where = "Ts" if _is_test(part, case) else "Tr"
    image = folder / f"images{where}" / f"{case.case}{channel}.nii.gz"
    image.parent.mkdir(parents=True, exist_ok=True)
    if _fits(case.image):
        _link(case.image, image)
    else:
        write_volume(image, read_volume(case.image, 0))
    if case.label:
        _, labels = load_case(case, part.structures)
        write_volume(folder / f"labels{where}" / f"{case.case}.nii.gz", labels)


def _is_test(part: _Part, case: CaseFiles) -> bool:
    return case.label is None or part.splits.get(case.case) == "test"


def _fits(path: Path) -> bool:
    """Whether others can read the file as it is: a packed NIfTI of one frame with an orthonormal header."""
    if not path.name.endswith(".nii.gz"):
        return False
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    header = read_header(path)
    return zipped and header.frames == 1 and not header.warnings


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _nnunet_values(part: _Part) -> dict[str, Any]:
    labels: dict[str, Any] = {"background": 0, **{key: n for n, key in enumerate(part.structures, start=1)}}
    lesions = {key: _lesions(key, part.structures) for key in part.structures}
    wholes = {key: [labels[key], *(labels[lesion] for lesion in found)] for key, found in lesions.items() if found}
    values: dict[str, Any] = {
        "name": part.name,
        "channel_names": {"0": part.modality},
        "labels": labels | wholes,
        "numTraining": sum(not _is_test(part, case) for case in part.cases),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
        "licence": part.licence,
    }
    if wholes:
        values["regions_class_order"] = [labels[key] for key in part.structures]
    return values


def _lesions(organ: str, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if structure(key).kind == "lesion" and structure(key).parent == organ]


def _decathlon_values(part: _Part) -> dict[str, Any]:
    lists: dict[str, list[dict[str, str]]] = {"training": [], "validation": [], "test": []}
    for case in part.cases:
        test = _is_test(part, case)
        where = "Ts" if test else "Tr"
        item = {"image": f"images{where}/{case.case}.nii.gz", "modality": part.modality, "patient": case.patient}
        item |= {"label": f"labels{where}/{case.case}.nii.gz"} if case.label else {}
        item |= {"expert": case.expert} if case.expert else {}
        split = "test" if test else "validation" if part.splits.get(case.case) == "val" else "training"
        lists[split].append(item)
    return {
        "name": part.name,
        "licence": part.licence,
        "modality": {"0": part.modality},
        "labels": {"0": "background", **{str(n): key for n, key in enumerate(part.structures, start=1)}},
        "numTraining": len(lists["training"]),
        "numTest": len(lists["test"]),
        **lists,
    }


def _write_extras(part: _Part, folder: Path) -> None:
    """The split, as nnU-Net's one fold, and what its format has no place for."""
    trained = [case for case in part.cases if not _is_test(part, case)]
    held = [case.case for case in trained if part.splits.get(case.case) == "val"]
    if held:
        _write_json(
            folder / "splits_final.json",
            [{"train": [case.case for case in trained if case.case not in held], "val": held}],
        )
    with atomic_write(folder / "cases.csv") as new, new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "patient", "modality", "expert"])
        writer.writerows([case.case, case.patient, part.modality, case.expert or ""] for case in part.cases)


def _write_json(path: Path, values: Any) -> None:
    with atomic_write(path) as new:
        new.write_text(json.dumps(values, indent=1), encoding="utf-8")
