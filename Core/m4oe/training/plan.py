"""A training plan: data sets joined to one union of structures, every patient in one split, saved as JSON.

A patient's split is drawn from a hash of the data set's name and the patient's id, so that it is the same wherever and
whenever it is drawn; what a plan file says stays.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..files import atomic_write
from ..labels import ancestry, catalogue
from .cases import CaseFiles, DataSet, Finding, expert_of
from .check import CaseReport
from .datasets import overlaps

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
_EXPERT = re.compile(r"[A-Za-z0-9_.-]+")
_NAMED = 3  # cases with errors that a refusal names
_SAMPLE = 1 << 18  # bytes compared at the beginning, middle and end of files of one size


@dataclass(frozen=True)
class Plan:
    """What to train on.

    Attributes:
        structures: Union of what the data sets annotate; the label value of `structures[n]` is n + 1. Those of an
            older plan keep their values.
        datasets: With the cases that are of use.
        splits: "train", "val" or "test" by "data set/patient", also of patients that an older plan had.
        left_out: Why, by "data set/case".
        seed: Of the hash.
        val: Share of patients for validation during training.
        test: Share of patients that training never sees.
    """

    structures: tuple[str, ...]
    datasets: tuple[DataSet, ...]
    splits: Mapping[str, str]
    left_out: Mapping[str, str]
    seed: int = 0
    val: float = 0.1
    test: float = 0.2

    def cases(self, split: str) -> list[CaseFiles]:
        """Labelled cases of "train", "val" or "test"."""
        return [case for case, found in self._split_cases() if found == split and case.label]

    def unlabelled(self) -> list[CaseFiles]:
        """Cases without label, for pretraining; none of a patient of another split than "train"."""
        return [case for case, found in self._split_cases() if found == "train" and not case.label]

    def split_of(self, dataset: DataSet, case: CaseFiles) -> str:
        """Split of a case's patient."""
        return self.splits[f"{dataset.name}/{case.patient}"]

    def _split_cases(self) -> Iterator[tuple[CaseFiles, str]]:
        for dataset in self.datasets:
            yield from ((case, self.split_of(dataset, case)) for case in dataset.cases)


def make_plan(
    datasets: Sequence[DataSet],
    reports: Mapping[str, Sequence[CaseReport]],
    old: Plan | None = None,
    *,
    seed: int = 0,
    val: float = 0.1,
    test: float = 0.2,
    share: bool = False,
    drawn: Collection[str] = (),
) -> tuple[Plan, list[Finding]]:
    """Joins data sets.

    Args:
        datasets: Each name once.
        reports: What the check found, by data set; cases with an error are left out.
        old: The plan that this one replaces: its splits, order of structures, seed and shares stay.
        seed: Of the hash that draws the splits.
        val: Share of patients for validation.
        test: Share of patients for the test.
        share: Take data sets that share patients, all of them for training.
        drawn: Experts that learn from synthetic images as well.

    Returns:
        The plan, and what to know about it.

    Raises:
        ValueError: A name repeats, shares make no sense, data sets share patients, nothing is left, or see
            `check_experts`.
    """
    names = [dataset.name for dataset in datasets]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two data sets are called {', '.join(sorted(repeated))}; leave one out or rename its folder")
    if old:
        seed, val, test = old.seed, old.val, old.test
    if val < 0 or test < 0 or val + test >= 1:
        raise ValueError(f"shares are {val:g} and {test:g}; expected below 1 in sum, to leave some for training")
    left_out = {
        f"{dataset.name}/{report.case}": next(f.sentence for f in report.findings if f.severity == "error")
        for dataset in datasets
        for report in reports[dataset.name]
        if not report.is_usable
    }
    usable = tuple(
        replace(d, cases=tuple(c for c in d.cases if f"{d.name}/{c.case}" not in left_out), findings=())
        for d in datasets
    )
    check_experts(case for dataset in usable for case in dataset.cases)
    sharing, findings = _sharing(usable)
    if sharing and not share:
        raise ValueError(f"{'; '.join(sharing.values())}; leave one out, or plan with --share: then all of them train")
    splits = {
        **_splits(usable, {name for pair in sharing for name in pair}, seed, val, test),
        **(old.splits if old else {}),
    }
    for pair, why in sharing.items():
        _check_sharing(usable, pair, why, splits)
    structures = _union(usable, old.structures if old else ())
    plan = Plan(structures, usable, dict(sorted(splits.items())), left_out, seed, val, test)
    if not plan.cases("train"):
        raise ValueError(f"no labelled case is left for training; {_why_none(plan)}")
    return plan, [*findings, *_remarks(plan, drawn)]


def check_experts(cases: Iterable[CaseFiles]) -> None:
    """Refuses experts that cannot be.

    Raises:
        ValueError: A name has spaces or odd characters, or cases of CT and of MR would train one expert.
    """
    modalities: dict[str, set[str]] = {}
    for case in cases:
        if case.modality:
            modalities.setdefault(expert_of(case), set()).add(case.modality)
        if case.expert and (not _EXPERT.fullmatch(case.expert) or case.expert.lower() == "auto"):
            raise ValueError(f"an expert cannot be called {case.expert!r}; take letters, digits and _, as in mr_dixon")
    if shared := [name for name, found in modalities.items() if len(found) > 1]:
        raise ValueError(
            f"cases of CT and of MR would train the one expert {shared[0]}; name none, for one expert per modality, or "
            "give each kind its own in the column expert of cases.csv"
        )


def draw_split(patient: str, seed: int, val: float, test: float) -> str:
    """Split of a patient: the same for ever, and for growing shares only ever from "train" to the others."""
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    drawn = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if drawn < test else "val" if drawn >= 1 - val else "train"


def write_plan(path: Path, plan: Plan) -> None:
    """Writes a plan, with paths below the data sets' folders, so that moved data needs one change.

    Raises:
        OSError: The file cannot be written.
    """
    labellings: list[dict[str, Any]] = []
    values = {
        "m4oe_plan": FORMAT_VERSION,
        **{key: getattr(plan, key) for key in ("seed", "val", "test", "structures", "left_out", "splits")},
        "labellings": labellings,
        "datasets": [_dataset_values(dataset, labellings) for dataset in plan.datasets],
    }
    with atomic_write(path) as new:
        new.write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_plan(path: Path) -> Plan:
    """The plan that `write_plan` wrote.

    Raises:
        ValueError: The file is missing, no plan, or of a newer format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["m4oe_plan"]
        if version > FORMAT_VERSION:
            raise ValueError(f"its format {version} is newer than {FORMAT_VERSION}, the newest this m4oe reads")
        plan = Plan(
            tuple(values["structures"]),
            tuple(_dataset(entry, values["labellings"]) for entry in values["datasets"]),
            *(values[key] for key in ("splits", "left_out", "seed", "val", "test")),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); expected a plan of m4oe data plan") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no training plan ({error}); expected one of m4oe data plan") from error
    for patient in (f"{dataset.name}/{case.patient}" for dataset in plan.datasets for case in dataset.cases):
        if plan.splits.get(patient) not in SPLITS:
            raise ValueError(
                f"{path} gives {patient} the split {plan.splits.get(patient)!r}; expected one of {', '.join(SPLITS)} "
                "in its splits, or make the plan anew in another file"
            )
    return plan


# Splits


def _splits(datasets: Iterable[DataSet], sharing: set[str], seed: int, val: float, test: float) -> dict[str, str]:
    """Split by patient: as the data set says; what it lacks is drawn from the others; unlabelled ones train."""
    splits = {}
    for dataset in datasets:
        given = {case.split for case in dataset.cases if case.label}
        shares = [0.0 if split in given else share for split, share in (("val", val), ("test", test))]
        for patient, group in groupby(sorted(dataset.cases, key=lambda case: case.patient), lambda case: case.patient):
            own = [case.split for case in group if case.label]
            name = f"{dataset.name}/{patient}"
            if dataset.name in sharing or not own:
                splits[name] = "train"
            else:
                drawn = draw_split(name, seed, *shares)
                splits[name] = max(filter(None, own), key=SPLITS.index, default=drawn)
    return splits


def _sharing(datasets: Sequence[DataSet]) -> tuple[dict[tuple[str, str], str], list[Finding]]:
    """Why two data sets share patients, by their names, and warnings of those that may."""
    sharing, findings = {}, []
    for first, second, certain, why in overlaps({dataset.name for dataset in datasets}):
        if certain:
            sharing[first, second] = f"{first} and {second} share patients ({why})"
        else:
            findings.append(Finding("", "warning", f"{first} and {second} may share patients: {why}."))
    for (first, one), (second, other) in _same_images(datasets):
        if first == second:
            findings.append(Finding(other, "warning", f"{first}: {one} and {other} have the same image."))
        else:
            sharing.setdefault(
                (first, second), f"{first} and {second} share images, such as {one} of the one and {other} of the other"
            )
    return sharing, findings


def _same_images(datasets: Iterable[DataSet]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of cases of different patients (as data set and case) with the same image file."""
    by_size: dict[int, list[tuple[DataSet, CaseFiles]]] = {}
    for dataset in datasets:
        for case in dataset.cases:
            if case.image.is_file():
                by_size.setdefault(case.image.stat().st_size, []).append((dataset, case))
    for group in by_size.values():
        seen: dict[bytes, tuple[str, str, str]] = {}
        for dataset, case in group if len(group) > 1 else ():
            first = seen.setdefault(_sample(case.image), (dataset.name, case.patient, case.case))
            if first[:2] != (dataset.name, case.patient):
                yield (first[0], first[2]), (dataset.name, case.case)


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
    return digest.digest()


def _check_sharing(datasets: Iterable[DataSet], pair: tuple[str, str], why: str, splits: Mapping[str, str]) -> None:
    """Refuses shared patients outside of training, as an older plan may have them.

    Raises:
        ValueError: There are some.
    """
    names = [f"{d.name}/{case.patient}" for d in datasets if d.name in pair for case in d.cases]
    if held := [name for name in names if splits[name] != "train"]:
        raise ValueError(
            f"{why}, and the older plan holds {held[0]} for {splits[held[0]]}; leave one of the data sets out"
        )


# Structures


def _why_none(plan: Plan) -> str:
    held = [f"{len(plan.cases(split))} for {split}" for split in SPLITS if plan.cases(split)]
    whys = []
    if held:
        cure = "write train for some in the column split of cases.csv, or add patients"
        whys.append(f"the splits hold back {' and '.join(held)}: {cure}")
    if plan.left_out:
        named = "".join(f"; {case}: {reason.rstrip('.')}" for case, reason in list(plan.left_out.items())[:_NAMED])
        have = "1 has" if len(plan.left_out) == 1 else f"{len(plan.left_out)} have"
        whys.append(f"{have} errors, see the check of the data (m4oe data scan){named}")
    return "; ".join(whys) or "none has a label, see the check of the data (m4oe data scan)"


def _union(datasets: Iterable[DataSet], old: Sequence[str]) -> tuple[str, ...]:
    found = {key for dataset in datasets for case in dataset.cases for key in case.annotated}
    return (*old, *(key for key in catalogue() if key in found - set(old)))


def split_remarks(plan: Plan, drawn: Collection[str] = ()) -> list[Finding]:
    """Experts that would not be trained, or not on real images, or not be scored."""
    experts = {split: {expert_of(case) for case in plan.cases(split)} for split in SPLITS}
    trained = experts["train"] | {expert_of(case) for case in plan.unlabelled()}
    cure = "add patients, or divide them in the column split of cases.csv"
    sentences = [
        f"All cases of {name} are in validation or test, so "
        + ("its expert learns from synthetic images alone" if name in drawn else "no expert learns from them")
        + f": {cure}."
        for name in sorted((experts["val"] | experts["test"]) - trained)
    ]
    for split, share in (("val", plan.val), ("test", plan.test)):
        if missing := sorted(experts["train"] - experts[split]) if share else []:
            of = f" of {', '.join(missing)}" if experts[split] else ""
            sentences.append(f"No case{of} is in {split}: {cure}.")
    return [Finding("", "warning", sentence) for sentence in sentences]


def _remarks(plan: Plan, drawn: Collection[str]) -> list[Finding]:
    findings = split_remarks(plan, drawn)
    wholes = {
        key: next((whole for whole in ancestry(key) if whole != key and whole in plan.structures), None)
        for key in plan.structures
    }
    if parts := [f"{key} as {whole}" for key, whole in wholes.items() if whole]:
        findings.append(Finding("", "note", f"Where a data set only annotates the whole, {', '.join(parts)} counts."))
    return findings


# JSON


def _dataset_values(dataset: DataSet, labellings: list[dict[str, Any]]) -> dict[str, Any]:
    cases = [_case_values(case, dataset.folder, labellings) for case in dataset.cases]
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "licence": dataset.licence,
        "folder": dataset.folder.as_posix(),
        "cases": cases,
    }


def _case_values(case: CaseFiles, folder: Path, labellings: list[dict[str, Any]]) -> dict[str, Any]:
    labelling = {"labels": {str(value): key for value, key in case.labels.items()}, "annotated": list(case.annotated)}
    if labelling not in labellings:
        labellings.append(labelling)
    values = {key: value for key, value in asdict(replace(case, labels={}, annotated=())).items() if value}
    values |= {key: _below(values[key], folder) for key in ("image", "label") if key in values}
    return {**values, "labelling": labellings.index(labelling)}


def _below(path: Path, folder: Path) -> str:
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def _dataset(values: Mapping[str, Any], labellings: Sequence[Mapping[str, Any]]) -> DataSet:
    folder = Path(values["folder"])
    meanings = [
        ({int(value): key for value, key in entry["labels"].items()}, entry["annotated"]) for entry in labellings
    ]
    cases = tuple(_case(entry, folder, *meanings[entry["labelling"]]) for entry in values["cases"])
    return DataSet(values["name"], values["layout"], folder, cases, values["licence"])


def _case(values: Mapping[str, Any], folder: Path, labels: Mapping[int, str], annotated: Sequence[str]) -> CaseFiles:
    given = {key: value for key, value in values.items() if key != "labelling"}
    given |= {key: folder / values[key] for key in ("image", "label") if key in values}
    return CaseFiles(**given, labels=labels, annotated=tuple(annotated))
