"""The commands `m4oe data scan`, `plan` and `export`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import count

if TYPE_CHECKING:
    from .training.cases import DataSet, Finding
    from .training.check import CaseReport
    from .training.plan import Plan

_NAMED = 3  # cases that are named where many have one finding
_SEVERITIES = ("error", "warning", "note")


def add_data_commands(commands: Any) -> None:
    """Adds `data` and what belongs to it to the commands of the parser."""
    data = commands.add_parser("data", help="recognise, check, join and exchange data sets")
    actions = data.add_subparsers(required=True, metavar="ACTION")

    scan = actions.add_parser("scan", help="say what a folder holds and what is wrong with it, case by case")
    add_sources(scan)
    scan.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    scan.set_defaults(run=_scan)

    plan = actions.add_parser("plan", help="check and join data sets, and split them by patient")
    add_sources(plan)
    plan.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="an existing plan keeps its splits"
    )
    plan.add_argument("--seed", type=int, default=0, metavar="N", help="of the splits; default: %(default)s")
    plan.add_argument("--val", type=float, default=0.1, metavar="SHARE", help="for validation; default: %(default)s")
    plan.add_argument("--test", type=float, default=0.2, metavar="SHARE", help="never trained on; default: %(default)s")
    plan.add_argument("--share", action="store_true", help="take data sets that share patients, all for training")
    plan.set_defaults(run=_plan)

    export = actions.add_parser("export", help="write for others: nnU-Net raw or decathlon")
    add_sources(export, "a plan, or folders with data sets")
    export.add_argument(
        "-o", "--output", required=True, type=Path, metavar="OUT", help="folder; must not hold them yet"
    )
    export.add_argument("--format", choices=("nnunet", "decathlon"), required=True)
    export.set_defaults(run=_export)


def add_sources(
    parser: argparse.ArgumentParser, sources: str = "data set, or folder that holds some", nargs: str = "+"
) -> None:
    """Adds the folders of data sets to a command, and what to say of data of your own."""
    parser.add_argument("folders", nargs=nargs, type=Path, metavar="FOLDER", help=sources)
    parser.add_argument(
        "--labels", metavar="FILE|V=KEY,..", help="of your own data: CSV, JSON, or 1=liver,2=spleen,3-9=-"
    )
    parser.add_argument("--modality", choices=("CT", "MR"), help="of your own data")
    parser.add_argument("--expert", metavar="NAME", help="that your own data train, such as mr_dixon")


def _scan(options: argparse.Namespace) -> int:
    datasets = _find(options)
    results = []
    for dataset, reports in map(_checked, datasets):
        print(_describe(dataset, reports), flush=True)
        results.append(_values(dataset, reports))
    if options.json:
        _write_json(options.json, {"datasets": results})
    return int(any(finding["severity"] == "error" for result in results for finding in result["findings"]))


def _plan(options: argparse.Namespace) -> int:
    from .training.plan import read_plan

    choices = {key: getattr(options, key) for key in ("seed", "val", "test", "share")}
    old = read_plan(options.output) if options.output.exists() else None
    return int(bool(plan_folders(options, options.output, old=old, **choices).left_out))


def plan_folders(options: argparse.Namespace, path: Path, **choices: Any) -> Plan:
    """Writes the plan of the folders of `add_sources` and says what it holds; see `make_plan` for the choices."""
    from .training.plan import SPLITS, make_plan, write_plan

    checked = [_checked(dataset) for dataset in _find(options)]
    reports = {dataset.name: reports for dataset, reports in checked}
    plan, findings = make_plan([dataset for dataset, _ in checked], reports, **choices)
    write_plan(path, plan)
    for dataset in plan.datasets:
        found = [plan.split_of(dataset, case) for case in dataset.cases if case.label]
        counts = ", ".join(f"{found.count(split)} {split}" for split in SPLITS)
        print(f"{dataset.name}: {counts}, {len(dataset.cases) - len(found)} unlabelled; licence: {_licence(dataset)}")
    for case, reason in plan.left_out.items():
        print(f"  left out  {case}: {reason}")
    print(
        "\n".join(
            [*_finding_lines(findings), f"{count(len(plan.structures), 'structure')}: {', '.join(plan.structures)}"]
        )
    )
    print(f"plan: {path}", flush=True)
    return plan


def _export(options: argparse.Namespace) -> int:
    from .training.exchange import export
    from .training.plan import read_plan

    if options.folders[0].is_file():
        plan = read_plan(options.folders[0])
        datasets = list(plan.datasets)
        splits = {d.name: {case.case: plan.split_of(d, case) for case in d.cases} for d in datasets}
    else:
        datasets = _find(options)
        splits = {d.name: {case.case: case.split or "train" for case in d.cases} for d in datasets}
    total = sum(len(dataset.cases) for dataset in datasets)
    written = list(_progress("export", total, export(datasets, splits, options.output, options.format)))
    for folder in dict.fromkeys(folder for _, folder in written):
        print(f"{count(sum(place == folder for _, place in written), 'case')}: {folder}")
    return 0


def _find(options: argparse.Namespace) -> list[DataSet]:
    from .names import read_label_table
    from .training.datasets import find_datasets
    from .training.layouts import Hints
    from .training.plan import check_experts

    names = read_label_table(options.labels) if options.labels else {}
    hints = Hints(names, options.modality, options.expert)
    datasets = [dataset for folder in options.folders for dataset in find_datasets(folder, hints)]
    check_experts(case for dataset in datasets for case in dataset.cases)
    return datasets


def _checked(dataset: DataSet) -> tuple[DataSet, list[CaseReport]]:
    """What the check says of each case, and the data set with the modalities that it found."""
    from .training.check import check_cases

    reports = list(_progress(dataset.name, len(dataset.cases), check_cases(dataset.cases)))
    cases = [replace(case, modality=report.modality) for case, report in zip(dataset.cases, reports, strict=True)]
    return replace(dataset, cases=tuple(cases)), reports


def _progress(title: str, total: int, items: Iterable[Any]) -> Iterator[Any]:
    """The items, with a bar where stderr is a terminal."""
    from tqdm import tqdm

    yield from tqdm(items, title, total, leave=False, disable=None)


# What is said


def _describe(dataset: DataSet, reports: Sequence[CaseReport]) -> str:
    from .training.check import histogram

    cases = dataset.cases
    counts = [count(len(cases), "case"), f"{sum(case.label is not None for case in cases)} with label"]
    counts += _counts(case.modality or "of unknown modality" for case in cases)
    lines = [
        f"{dataset.name}  {dataset.layout}  {dataset.folder}",
        f"  {', '.join(counts)}; {count(_patients(dataset), 'patient')}; licence: {_licence(dataset)}",
    ]
    if experts := _counts(case.expert for case in cases if case.expert):
        lines.append(f"  experts: {', '.join(experts)}")
    annotated = dict.fromkeys(key for case in cases if case.label for key in case.annotated)
    found = {key: sum(key in report.volumes_ml for report in reports) for key in annotated}
    lines.append(f"  structures (in cases): {', '.join(f'{key} {number}' for key, number in found.items()) or 'none'}")
    lines += _histograms(reports, histogram)
    findings = [*dataset.findings, *(finding for report in reports for finding in report.findings)]
    return "\n".join([*lines, *_finding_lines(findings)])


def _histograms(reports: Sequence[CaseReport], line: Callable[[list[float]], str]) -> list[str]:
    spacings = [report.spacing for report in reports if report.spacing]
    sizes = [report.size for report in reports if report.size]
    lines = []
    for axis, letter in enumerate("ijk"):
        if spacings:
            lines.append(f"  spacing {letter} (mm)   {line([round(spacing[axis], 3) for spacing in spacings])}")
    for axis, letter in enumerate("ijk"):
        if sizes:
            lines.append(f"  size {letter} (voxels)  {line([size[axis] for size in sizes])}")
    return lines


def _finding_lines(findings: Iterable[Finding]) -> list[str]:
    """One line per sentence; a sentence that several cases share is said once."""
    cases: dict[tuple[int, str], list[str]] = {}
    for finding in findings:
        cases.setdefault((_SEVERITIES.index(finding.severity), finding.sentence), []).append(finding.case)
    lines = []
    for (severity, sentence), names in sorted(cases.items(), key=lambda item: item[0][0]):
        several = f"{len(names)} cases ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        who = several if len(names) > 1 else names[0]
        lines.append(f"  {_SEVERITIES[severity]:<8}  {who}{': ' if who else ''}{sentence}")
    return lines


def _counts(values: Iterable[str | None]) -> list[str]:
    found = list(values)
    return [f"{found.count(value)} {value}" for value in dict.fromkeys(found)]


def _patients(dataset: DataSet) -> int:
    return len({case.patient for case in dataset.cases})


def _licence(dataset: DataSet) -> str:
    return dataset.licence or "not given"


def _values(dataset: DataSet, reports: Sequence[CaseReport]) -> dict[str, Any]:
    findings = [*dataset.findings, *(finding for report in reports for finding in report.findings)]
    return {
        "name": dataset.name,
        "layout": dataset.layout,
        "folder": str(dataset.folder),
        "licence": dataset.licence,
        "findings": [asdict(finding) for finding in findings],
        "cases": [
            {
                **{key: value for key, value in asdict(case).items() if key not in ("image", "label")},
                "image": str(case.image),
                "label": str(case.label) if case.label else None,
                "spacing_mm": report.spacing,
                "size": report.size,
                "volumes_ml": dict(report.volumes_ml),
            }
            for case, report in zip(dataset.cases, reports, strict=True)
        ],
    }


def _write_json(path: Path, values: Any) -> None:
    from .files import atomic_write

    with atomic_write(path) as new:
        new.write_text(json.dumps(values, indent=1), encoding="utf-8")
