"""Finds the data sets in a folder: the public ones by their file names (datasets.json), others by their layout."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..labels import catalogue
from ..names import keys_of, read_label_table, read_rows
from .cases import CaseFiles, DataSet, Finding, mask_files
from .layouts import (
    IMAGE_SUFFIXES,
    Hints,
    annotated,
    entries,
    read_bids,
    read_decathlon,
    read_nnunet,
    read_pairs,
    without_label,
)

_SPLITS = {"Tr": None, "Va": "val", "Val": "val", "Ts": "test"}
_COLUMNS = "any of patient, modality, expert, split"
_NO_HINTS = Hints()


def find_datasets(folder: Path, hints: Hints = _NO_HINTS) -> list[DataSet]:
    """The data sets in a folder, in the order of their names, without reading any volume.

    A table cases.csv in a data set's folder (columns case, and any of patient, modality, expert, split) has the last
    word.

    Args:
        folder: A data set, or a folder that holds some.
        hints: For data that is in no public data set.

    Raises:
        ValueError: There is no such folder, no data set in it, or its cases.csv is damaged.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with a data set")
    files = entries(folder)
    found: list[DataSet] = []
    for reader in (_nnunet, _public, _decathlon, _bids, _pairs):
        rest = [file for file in files if not any(_is_in(file, dataset.folder) for dataset in found)]
        found += reader(folder, rest, hints)
    if not found:
        raise ValueError(f"{folder} holds no data set that M4oE recognises; see the list in README.md")
    used = {str(path) for dataset in found for case in dataset.cases for path in (case.image, case.label)}
    files = [file for file in files if file.endswith((*IMAGE_SUFFIXES, "/")) and str(Path(file)) not in used]
    return [_complete(dataset, files) for dataset in sorted(found, key=lambda dataset: dataset.name)]


def overlaps(names: set[str]) -> list[tuple[str, str, bool, str]]:
    """Known overlaps between these data sets: both names, whether patients are shared for certain, and why."""
    return [
        (*entry["sets"], entry["certain"], entry["why"]) for entry in _facts()["overlaps"] if names >= {*entry["sets"]}
    ]


@cache
def _facts() -> Mapping[str, Any]:
    return json.loads((Path(__file__).parents[1] / "datasets.json").read_text(encoding="utf-8"))


# Public data sets


class _Match(NamedTuple):
    place: str  # what lies before the matching part of the path
    groups: Mapping[str, str | None]
    file: str

    @property
    def case(self) -> str:
        return self.groups["case"] or ""


def _public(folder: Path, files: list[str], hints: Hints) -> Iterator[DataSet]:
    for name, facts in _facts()["sets"].items():
        images = _matches(facts["image"], files)
        others = _matches(facts.get("unlabelled", ()), files)
        if images or others:
            dataset = _public_set(name, facts, images, others, _matches(facts["label"], files))
            if not _is_contradicted(dataset):
                yield dataset


def _public_set(
    name: str, facts: Mapping[str, Any], images: list[_Match], others: list[_Match], labels: list[_Match]
) -> DataSet:
    places = {match.place for match in (*images, *others)}
    partners = {(match.place, match.case): Path(match.file) for match in labels if match.place in places}
    official = {case: split for place in places for case, split in _splits_of_table(Path(place) / "meta.csv").items()}
    cases: dict[str, CaseFiles] = {}
    findings = []
    for match in (*images, *others):
        case = _public_case(facts, match, partners.get((match.place, match.case)))
        if first := cases.get(case.case):
            findings.append(Finding(case.case, "error", f"{match.file} is left out, {first.image} has its name."))
        else:
            cases[case.case] = replace(case, split=official.get(case.case, case.split))
    expected = {Path(match.file) for match in images}
    findings += [without_label(case) for case in cases.values() if case.label is None and case.image in expected]
    if versions := facts.get("versions"):
        findings += _unknown_masks(cases.values())
        name = f"{name}_{_version(versions, cases.values())}".removesuffix("_")
    else:
        alone = set(partners.values()) - {case.label for case in cases.values()}
        findings += [Finding(path.name, "error", f"{path} has no image.") for path in sorted(alone)]
    root = Path(os.path.commonpath([place or "/" for place in places]))
    return DataSet(name, facts["title"], root, tuple(cases.values()), facts["licence"], tuple(findings))


def _public_case(facts: Mapping[str, Any], match: _Match, label: Path | None) -> CaseFiles:
    kind: Mapping[str, Any] = next((kind for kind in facts["kinds"] if re.search(kind.get("case", ""), match.case)), {})
    labels = _mask_labels(label) if "versions" in facts else _values(kind.get("labels") or facts["labels"])
    patient = re.match(facts.get("patient", ".*"), match.case)
    return CaseFiles(
        case="_".join(filter(None, [match.case, match.groups.get("phase")])).replace("/", "_"),
        patient=(patient[0] if patient else match.case).replace("/", "_"),
        image=Path(match.file),
        label=label,
        modality=kind.get("modality"),
        expert=kind.get("expert"),
        labels=labels,
        annotated=tuple(key for key in annotated(labels) if key not in kind.get("absent", ())),
        split=kind.get("split") or _SPLITS.get(match.groups.get("split") or ""),
    )


def _matches(patterns: Iterable[str], files: list[str]) -> list[_Match]:
    found = []
    for pattern in map(re.compile, patterns):
        matches = ((file, match) for file in files if (match := pattern.search(file)))
        found += [_Match(file[: match.start()], match.groupdict(), file) for file, match in matches]
    return found


def _values(ranges: Mapping[str, str]) -> dict[int, str]:
    """Keys by label value, from keys by value or range of values such as "56-70"."""
    ends = ((text.partition("-"), key) for text, key in ranges.items())
    return {value: key for (low, _, high), key in ends for value in range(int(low), int(high or low) + 1)}


def _mask_labels(folder: Path | None) -> dict[int, str]:
    names = mask_files(folder) if folder else {}
    return dict(enumerate((name for name in names if name in catalogue()), start=1))


def _unknown_masks(cases: Iterable[CaseFiles]) -> list[Finding]:
    names = {name for case in cases if case.label for name in mask_files(case.label)} - set(catalogue())
    return [
        Finding("", "warning", f"The masks {name} are left out: M4oE knows no such structure.")
        for name in sorted(names)
    ]


def _version(files: Mapping[str, str], cases: Iterable[CaseFiles]) -> str:
    """Version of a data set by a structure that only it has."""
    named = {key for case in cases for key in case.labels.values()}
    return next((version for key, version in files.items() if key in named), "")


def _splits_of_table(path: Path) -> dict[str, str]:
    """TotalSegmentator's own split by case."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter=";") if row.get("split") in ("train", "val", "test")]
    return {row["image_id"]: row["split"] for row in rows}


def _is_contradicted(dataset: DataSet) -> bool:
    """Whether a dataset.json gives the label values other meanings: then it is someone's own data under such names."""
    try:
        stated, _ = keys_of(read_label_table(dataset.folder / "dataset.json"))
    except ValueError:  # there is none, or none with labels
        return False
    return any(case.labels.get(value, key) != key for case in dataset.cases[:1] for value, key in stated.items())


# Other layouts


def _nnunet(folder: Path, files: list[str], hints: Hints) -> Iterator[DataSet]:
    for file in files:
        if file.endswith("/dataset.json"):
            yield from _read(read_nnunet, Path(file).parent, hints, file)


def _decathlon(folder: Path, files: list[str], hints: Hints) -> Iterator[DataSet]:
    taken: set[Path] = set()
    for file in files:
        if file.endswith(".json") and Path(file).parent not in taken:
            for dataset in _read(read_decathlon, Path(file), hints, file):
                taken.add(dataset.folder)
                yield dataset


def _bids(folder: Path, files: list[str], hints: Hints) -> Iterator[DataSet]:
    dataset = read_bids(folder, files, hints)
    return iter([dataset] if dataset else [])


def _pairs(folder: Path, files: list[str], hints: Hints) -> Iterator[DataSet]:
    dataset = read_pairs(folder, files, hints)
    return iter([dataset] if dataset else [])


def _read(reader: Any, path: Path, hints: Hints, file: str) -> Iterator[DataSet]:
    try:
        dataset = reader(path, hints)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        wrong = Finding("", "error", f"{file} does not describe a data set as its layout wants ({error}); mend it.")
        dataset = DataSet(Path(file).parent.name, "damaged", Path(file).parent, (), findings=(wrong,))
    if dataset:
        yield dataset


# All


def _complete(dataset: DataSet, unused: list[str]) -> DataSet:
    """With what cases.csv says, and a note on images that belong to no case."""
    table = dataset.folder / "cases.csv"
    cases = tuple(replace(case, split=None) if case.split == "train" else case for case in dataset.cases)
    cases = _with_table(cases, table) if table.is_file() else cases
    named = " ".join(finding.sentence for finding in dataset.findings)
    left = [file for file in unused if _is_in(file, dataset.folder) and file not in named]
    note = Finding("", "note", f"{len(left)} images or folders belong to no case, such as {left[0]}.") if left else None
    return replace(dataset, cases=cases, findings=(*dataset.findings, *filter(None, [note])))


def _with_table(cases: tuple[CaseFiles, ...], path: Path) -> tuple[CaseFiles, ...]:
    reader = read_rows(path)
    if "case" not in (columns := reader.fieldnames or []):
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}; expected case and {_COLUMNS}")
    rows = {row["case"]: row for row in reader}
    names = {case.case for case in cases}
    if unknown := [name for name in rows if name not in names]:
        raise ValueError(f"{path} names cases that are not there, such as {unknown[0]!r}; expected {min(names)!r}")
    choices = {"modality": ("CT", "MR"), "split": ("train", "val", "test")}
    for row in rows.values():
        if wrong := [column for column, allowed in choices.items() if row.get(column) and row[column] not in allowed]:
            raise ValueError(f"{path} says {row[wrong[0]]!r}; expected one of {', '.join(choices[wrong[0]])}")
    return tuple(_with_row(case, rows.get(case.case, {})) for case in cases)


def _with_row(case: CaseFiles, row: Mapping[str, str]) -> CaseFiles:
    given: Any = {column: row[column] for column in ("patient", "modality", "expert", "split") if row.get(column)}
    return replace(case, **given)


def _is_in(file: str, folder: Path) -> bool:
    return file.startswith(f"{folder.as_posix()}/")
