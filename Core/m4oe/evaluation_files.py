"""Evaluates files: pairs predictions with truths, scores them in processes, and writes the tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .evaluation import DEFAULT_RULES, Rules, Score, as_annotated, evaluate_case
from .files import atomic_write
from .geometry import Volume
from .labelmap import SUFFIXES, file_stem, label_keys, label_values, read_label_map, uncropped
from .labels import catalogue
from .parallel import WorkerLost, run_jobs

Meanings = Mapping[int, str]  # structure by label value
_MARK = re.compile(
    r"[._-](labels?|labelmap|seg|segmentation|dseg|gt|truth|groundtruth|mask|pred|prediction)$", re.IGNORECASE
)
_CHANNEL = re.compile(r"_0000$")  # nnU-Net's first channel, in the names of images
_KIND = re.compile(r"^(im|img|image|lb|labels?)[_-]?(?=\d)", re.IGNORECASE)
_FAILURES = (ValueError, OSError, RuntimeError, MemoryError, ArithmeticError)


@dataclass
class Pairs:
    """Which prediction belongs to which truth.

    Attributes:
        cases: Prediction and truth by case name.
        problems: What is wrong, by case name: no or several predictions, several truths.
        notes: Files that were left out and are no problem.
    """

    cases: dict[str, tuple[Path, Path]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Evaluation:
    """The scores of one model, and all that went wrong or was assumed.

    Attributes:
        name: Of the predictions, for people.
        scores: By case name, then structure.
        problems: Sentence by case that has no scores.
        notes: Sentences for the user.
    """

    name: str
    scores: list[Score]
    problems: dict[str, str]
    notes: list[str]


class _Task(NamedTuple):
    case: str
    predicted: Path
    truth: Path
    predicted_meanings: Meanings | None
    truth_meanings: Meanings | None
    annotated: tuple[str, ...]
    rules: Rules
    told_apart: frozenset[str]  # structures that any truth lists, or that are to be scored


class _Result(NamedTuple):
    case: str
    scores: list[Score]
    problem: str = ""
    notes: tuple[str, ...] = ()
    extra: frozenset[str] = frozenset()  # structures of the prediction that are not scored


def pair_files(predicted: Path, truth: Path) -> Pairs:
    """Pairs the label maps of two folders, or two files, by the names of their cases.

    A case's name is its file's without suffix, without an end such as _label, _seg or _0000, and without a start such
    as img or lb before a number. What a folder holds beside CASE.seg.nrrd, or else beside CASE_label, under the name of
    the same case is taken for its image.

    Raises:
        FileNotFoundError: One of the two does not exist.
        ValueError: A folder holds no label map.
    """
    if predicted.is_file() and truth.is_file():
        return Pairs({case_name(truth): (predicted, truth)})
    pairs = Pairs()
    predictions, truths = (_by_case(place, pairs.notes) for place in (predicted, truth))
    for case, paths in truths.items():
        candidates = predictions.get(case, [])
        if len(candidates) == len(paths) == 1:
            pairs.cases[case] = (candidates[0], paths[0])
        elif len(paths) > 1 or candidates:
            listed = ", ".join(str(path) for path in (*paths, *candidates))
            pairs.problems[case] = f"several files belong to this case, keep one prediction and one truth: {listed}"
        elif predicted.is_dir():
            cure = (
                f"expected {case}.seg.nrrd, {case}_label.nii.gz or the like; rename it, or give the two files; "
                "if it is no truth, take it out"
            )
            pairs.problems[case] = f"{paths[0]} has no prediction in {predicted}, {cure}"
    alone = [str(path) for case, paths in predictions.items() if case not in truths for path in paths]
    if alone:
        pairs.notes.append(f"no truth in {truth} for {', '.join(alone)}")
    return pairs


def case_name(path: Path) -> str:
    """The name of the case that a label map belongs to."""
    stem = _CHANNEL.sub("", file_stem(path))
    return _KIND.sub("", _CHANNEL.sub("", _MARK.sub("", stem))) or stem


def evaluate_files(
    pairs: Pairs,
    name: str,
    rules: Rules = DEFAULT_RULES,
    structures: Iterable[str] = (),
    truth_meanings: Meanings | None = None,
    predicted_meanings: Meanings | None = None,
    jobs: int = 1,
    scheduler: str | None = None,
    on_case: Callable[[str, float], None] = lambda case, fraction: None,
) -> Evaluation:
    """Scores all pairs; a case that fails is named and stops no other.

    A predicted structure that no truth lists counts as what it is part of, see `as_annotated`.

    Args:
        pairs: From `pair_files`.
        name: Of the predictions, for people.
        rules: How to score.
        structures: Keys of the structures to score; none: all that any of the truths lists.
        truth_meanings: Structure by label value, for truths that do not say it themselves.
        predicted_meanings: The same for predictions.
        jobs: Processes.
        scheduler: Of a Dask cluster that does it instead, see `run_jobs`.
        on_case: Called after every case with its name and the part of the work that is done.
    """
    problems, known = dict(pairs.problems), {}
    for case, (_, truth) in pairs.cases.items():
        try:
            known[case] = set(label_keys(truth, truth_meanings).values())
        except _FAILURES as error:
            problems[case] = str(error)
    listed: set[str] = set().union(*known.values())
    wanted = set(structures) or listed
    annotated = tuple(key for key in catalogue() if key in wanted)
    told_apart = frozenset(listed | wanted)
    tasks = [
        _Task(case, *pairs.cases[case], predicted_meanings, truth_meanings, annotated, rules, told_apart)
        for case in known
    ]
    results = []
    scored = run_jobs(_score_files, {task.case: task for task in tasks}, jobs, scheduler)
    for number, (case, result) in enumerate(scored, start=1):
        results.append(_Result(case, [], str(result)) if isinstance(result, WorkerLost) else result)
        on_case(case, number / len(tasks))
    results.sort(key=lambda result: result.case)
    problems |= {result.case: result.problem for result in results if result.problem}
    notes = pairs.notes + [f"{result.case}: {note}" for result in results for note in result.notes]
    if extra := set().union(*(result.extra for result in results)):
        notes.append(f"predicted, but not scored by itself as no truth lists it: {', '.join(sorted(extra))}")
    scores = [score for result in results for score in result.scores]
    return Evaluation(name, scores, dict(sorted(problems.items())), notes)


def write_scores(path: Path, evaluations: Iterable[Evaluation]) -> None:
    """Writes a CSV with a row per model, case and structure; a value that does not exist is an empty cell."""
    with atomic_write(path) as new, new.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(("model", *(column.name for column in fields(Score))))
        for evaluation in evaluations:
            writer.writerows([evaluation.name, *map(_cell, asdict(score).values())] for score in evaluation.scores)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON for people and programs."""
    with atomic_write(path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _by_case(place: Path, notes: list[str]) -> dict[str, list[Path]]:
    """The label maps of a folder, or one file, by case."""
    if not place.exists():
        raise FileNotFoundError(f"There is no file or folder {place}.")
    found = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    cases: dict[str, list[Path]] = {}
    for path in found:
        if file_stem(path) and not path.name.startswith("."):
            cases.setdefault(case_name(path), []).append(path)
    if not cases:
        raise ValueError(f"No label map in {place}, expected files that end in {' '.join(SUFFIXES)}.")
    labels = {case: [path for path in paths if _rank(path) == max(map(_rank, paths))] for case, paths in cases.items()}
    if images := [path.name for case, paths in cases.items() for path in paths if path not in labels[case]]:
        listed = ", ".join(images[:3]) + (f" and {len(images) - 3} more" if len(images) > 3 else "")
        notes.append(f"taken for images of the label maps beside them in {place}: {listed}")
    return labels


def _rank(path: Path) -> int:
    """How surely a file is a label map, among those of a case."""
    name = path.name.lower()
    is_marked = name.endswith(".dcm") or _MARK.search(_CHANNEL.sub("", file_stem(path)))
    return 2 if name.endswith(".seg.nrrd") else int(bool(is_marked))


def _score_files(task: _Task) -> _Result:
    try:
        truth, truth_keys = read_label_map(task.truth, task.truth_meanings)
        predicted, keys = read_label_map(task.predicted, task.predicted_meanings)
        predicted = predicted.to_axes(truth.grid.axes)
        if predicted.grid.shape != truth.grid.shape:
            truth, predicted = _uncropped(task.truth, truth, predicted), _uncropped(task.predicted, predicted, truth)
        counted = as_annotated(keys, task.told_apart)
        scores = evaluate_case(predicted, truth, truth_keys, counted, task.annotated, task.rules, task.case)
        extra = {keys[value] for value in label_values(predicted.array) if value in keys} - set(task.annotated)
    except _FAILURES as error:
        text = str(error) or type(error).__name__
        named = any(str(path) in text for path in (task.predicted, task.truth))
        return _Result(task.case, [], text if named else f"{task.predicted} against {task.truth}: {text}")
    notes = [
        f"{path}: {text}" for path, map_ in ((task.truth, truth), (task.predicted, predicted)) for text in map_.warnings
    ]
    return _Result(task.case, scores, notes=tuple(notes), extra=frozenset(extra))


def _uncropped(path: Path, volume: Volume, other: Volume) -> Volume:
    return uncropped(volume, other) if path.name.lower().endswith((".seg.nrrd", ".dcm")) else volume


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
