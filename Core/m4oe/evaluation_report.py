"""The tables and the page of an evaluation: cases.csv, summary.json and report.html, which needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .evaluation import COMPARED, FEWEST_PAIRS, Rules, Score, compare, summarise
from .evaluation_files import Evaluation, write_json, write_scores
from .labels import catalogue
from .page import (
    BOTTOM,
    LEFT,
    TOP,
    WIDTH,
    Axis,
    axis_over,
    bad,
    grid_lines,
    listing,
    number,
    small,
    structure_cell,
    table,
    write_page,
)

_TITLES = {
    "dice": "Dice",
    "nsd": "Normalised surface Dice",
    "hd95_mm": "HD95 (mm)",
    "volume_error_percent": "Volume error (%)",
}
_PLACES = {"dice": 3, "nsd": 3, "hd95_mm": 1}  # decimals
_FEWEST_IN_BOX = 5  # fewer cases are drawn as points alone
_WORST = 10
_ROW = 18  # of a plot, in pixels


def write_evaluation(folder: Path, evaluations: Sequence[Evaluation], truth: Path, rules: Rules) -> dict[str, Any]:
    """Writes the scores of one model, or of two and their comparison.

    Args:
        folder: Receives cases.csv, summary.json and report.html.
        evaluations: One, or two to compare.
        truth: Where the truth lies, for the reader.
        rules: Those of the evaluations.

    Returns:
        What summary.json holds.
    """
    summary: dict[str, Any] = {
        "m4oe": __version__,
        "date": date.today().isoformat(),
        "truth": str(truth),
        "preset": "flare" if rules.flare else "default",
        "rules": rule_sentences(rules),
        "models": [_model(evaluation) for evaluation in evaluations],
    }
    if len(evaluations) == 2:
        summary["comparison"] = compare(evaluations[0].scores, evaluations[1].scores)
    write_scores(folder / "cases.csv", evaluations)
    write_json(folder / "summary.json", summary)
    names = " against ".join(evaluation.name for evaluation in evaluations)
    write_page(folder / "report.html", f"Evaluation: {names}", _parts(summary, evaluations))
    return summary


def score_table(model: Mapping[str, Any]) -> str:
    """Means and counts by structure of one of the summary's models, as text."""

    def row(name: str, means: Mapping[str, float | None]) -> str:
        return name.ljust(29) + "".join(number(means[metric], places).rjust(9) for metric, places in _PLACES.items())

    cases = f"{model['cases']} case{'' if model['cases'] == 1 else 's'}"
    lines = [f"{model['name']}: {cases}".ljust(29) + "     Dice      NSD  HD95 mm  cases  missed  false"]
    for key, entry in model["structures"].items():
        means = {metric: entry[metric]["mean"] if entry[metric] else None for metric in _PLACES}
        counts = f"{entry['in_truth']:>7}{entry['missed']:>8}{entry['false_positives']:>7}"
        lines.append(row(catalogue()[key].name, means) + counts)
    return "\n".join([*lines, row("Mean of structures", model["mean_of_structures"])])


def rule_sentences(rules: Rules) -> list[str]:
    """How the scores were computed, one sentence or two each."""
    surface = (
        "Surfaces are made of surfels, as in DeepMind's surface-distance: each cube of 2 × 2 × 2 voxels that a "
        "structure fills in part counts with the area of its marching-cubes triangles. Distances are measured between "
        "surfels in mm, with the spacing and the directions of the voxels. Where the scan ends, a structure ends."
    )
    return [
        "Dice (DSC) is 2 |A and B| / (|A| + |B|) over voxels.",
        surface,
        "Normalised surface Dice (NSD) is the share of both surfaces' area that lies within the tolerance of the other "
        "surface. The tolerance of each structure stands in the table.",
        "HD95 is the distance that 95 % of a surface's area does not exceed, taken in both directions; the larger one "
        "counts.",
        "Volume error is predicted minus true volume.",
        *(_FLARE_RULES if rules.flare else _DEFAULT_RULES),
        "A structure that the prediction misses has no HD95, so means of HD95 leave it out: read them beside the "
        "column of missed ones.",
        "A structure is scored where any truth of the set lists it, or where it was asked for; others are left out.",
        "The mean of structures gives every structure the same weight, however many cases have it.",
    ]


_DEFAULT_RULES = (
    "Truth and prediction empty: no score (absent). Truth empty and something predicted: a false positive with Dice "
    "and NSD 0, which enters no mean and is counted with its volume. Nothing predicted of what the truth has: missed, "
    "Dice and NSD 0, which enter the means.",
)
_FLARE_RULES = (
    "FLARE22 rules: truth and prediction empty scores 1, one of them empty scores 0, and all of these enter the means. "
    "NSD is 0 where Dice is below 0.2. Aorta, inferior vena cava and esophagus are compared on the slices from the "
    "truth's first to the one before its last, as the challenge's script does; volumes are of the whole structure.",
)


def _model(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "cases": len({score.case for score in evaluation.scores}),
        **summarise(evaluation.scores),
        "problems": evaluation.problems,
        "notes": evaluation.notes,
    }


# The page


def _parts(summary: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> list[str]:
    parts = [
        "<h1>Evaluation</h1>",
        f"<p>Truth: {escape(summary['truth'])}. M4oE {__version__}, {summary['date']}. "
        "Research use only, not a medical device.</p>",
    ]
    for model in summary["models"]:
        parts += [f"<h2>{escape(model['name'])}</h2>", _trouble(model), _summary_table(model)]
    if "comparison" in summary:
        parts += [
            "<h2>Comparison</h2>",
            _comparison(summary["comparison"], *(model["name"] for model in summary["models"])),
        ]
    parts += ["<h2>Distributions</h2>", _legend(evaluations), '<div class="plots">']
    parts += [_plot(metric, evaluations) for metric in _TITLES]
    parts += ["</div>", "<h2>Cases to look at</h2>", *map(_worst_cases, evaluations)]
    return [*parts, "<h2>How it was computed</h2>", listing(summary["rules"])]


def _trouble(model: Mapping[str, Any]) -> str:
    problems = [f"{case}: {text}" for case, text in model["problems"].items()]
    parts = [f"<p>Cases scored: {model['cases']}.</p>"]
    if problems:
        parts.append(f'<p class="trouble">Cases without scores, which enter nothing below: {len(problems)}.</p>')
        parts.append(listing(problems))
    if model["notes"]:
        parts.append(f"<p>Notes:</p>{listing(model['notes'])}")
    return "\n".join(parts)


def _summary_table(model: Mapping[str, Any]) -> str:
    head = ("Structure", "Cases", "Dice", "NSD", "Tolerance", "HD95 mm", "Volume error %", "Missed", "False positives")
    rows = [_summary_row(key, entry) for key, entry in model["structures"].items()]
    dice, nsd, hd95 = (number(model["mean_of_structures"][metric], places) for metric, places in _PLACES.items())
    text = "Mean ± standard deviation, below it median [quartiles]; cases: those whose truth has the structure."
    return f"<p>{text}</p>" + table(head, rows, ("Mean of structures", "", dice, nsd, "", hd95, "", "", ""))


def _summary_row(key: str, entry: Mapping[str, Any]) -> list[str]:
    false = f"{entry['false_positives']} ({entry['false_positive_ml']:.1f} mL)" if entry["false_positives"] else "0"
    return [
        structure_cell(key),
        f"{entry['in_truth']} of {entry['cases']}",
        _distribution(entry["dice"], 3),
        _distribution(entry["nsd"], 3),
        f"{entry['nsd_tolerance_mm']:g} mm",
        _distribution(entry["hd95_mm"], 1),
        _distribution(entry["volume_error_percent"], 1),
        bad(str(entry["missed"]), entry["missed"]),
        bad(false, entry["false_positives"]),
    ]


_COMPARISON_RULES = (
    "In brackets the 95 % bootstrap interval of the mean (bias-corrected and accelerated, 9999 resamples, fixed seed); "
    "p is that of the two-sided Wilcoxon signed-rank test, paired by case. Higher Dice and NSD are better, lower HD95 "
    "is better. The structures' p values are corrected for their number (Holm); the last row compares the cases' means "
    "of their structures and is one test of its own. Pairs without difference enter the mean and the interval, not the "
    f"test. There is no interval below {FEWEST_PAIRS} pairs and no p value below {FEWEST_PAIRS} pairs that differ. A "
    "pair in which one model has no value is left out and counted."
)


def _comparison(comparison: Mapping[str, Any], first: str, second: str) -> str:
    text = f"Mean difference, {first} minus {second}. {_COMPARISON_RULES}"
    head = ["Structure", *(cell for name in ("Dice", "NSD", "HD95 mm") for cell in (name, "p", "pairs"))]
    structures = comparison[COMPARED[0]]["structures"]
    rows = [
        [
            structure_cell(key),
            *(cell for metric in COMPARED for cell in _difference(metric, comparison[metric]["structures"][key])),
        ]
        for key in structures
    ]
    foot = [
        "All structures",
        *(cell for metric in COMPARED for cell in _difference(metric, comparison[metric]["overall"])),
    ]
    return f"<p>{escape(text)}</p>{table(head, rows, foot)}"


def _difference(metric: str, entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """Difference with its interval, p value, pairs."""
    places = _PLACES[metric]
    p = entry["p"] if entry["p_holm"] is None else entry["p_holm"]
    interval = ", ".join(number(value, places, sign=True) for value in entry["interval"] or ())
    tally = f"{entry['higher']} higher, {entry['equal']} equal, {entry['lower']} lower"
    left_out = f"{entry['left_out']} left out" if entry["left_out"] else ""
    return (
        number(entry["mean_difference"], places, sign=True) + (small(f"[{interval}]") if interval else ""),
        _p_value(p),
        f'<span title="{tally}">{entry["n"]}</span>' + (small(left_out) if left_out else ""),
    )


def _worst_cases(evaluation: Evaluation) -> str:
    """The lowest Dice and the largest false positives."""
    low = sorted((s for s in evaluation.scores if s.counted and s.truth_ml), key=lambda score: score.dice or 0)
    false = sorted((s for s in evaluation.scores if s.outcome == "false positive"), key=lambda s: -s.predicted_ml)
    head = ("Case", "Structure", "Outcome", "Dice", "NSD", "HD95 mm", "True mL", "Predicted mL")
    rows = [_case_row(score) for score in (*low[:_WORST], *false[:_WORST])]
    name = f"<h3>{escape(evaluation.name)}: lowest Dice, largest false positives</h3>"
    return name + table(head, rows) if rows else ""


def _case_row(score: Score) -> list[str]:
    return [
        escape(score.case),
        structure_cell(score.structure),
        bad(score.outcome, score.outcome != "both"),
        number(score.dice, 3),
        number(score.nsd, 3),
        number(score.hd95_mm, 1),
        number(score.truth_ml, 1),
        number(score.predicted_ml, 1),
    ]


def _distribution(entry: Mapping[str, Any] | None, places: int) -> str:
    if entry is None:
        return "–"
    mean, sd, median, q1, q3 = (number(entry[name], places) for name in ("mean", "sd", "median", "q1", "q3"))
    return f"{mean} ± {sd}{small(f'{median} [{q1}, {q3}]')}" if entry["n"] > 1 else mean


def _p_value(p: float | None) -> str:
    return "–" if p is None else "&lt; 0.001" if p < 0.001 else f"{p:.3f}"


# Box plots


def _legend(evaluations: Sequence[Evaluation]) -> str:
    text = (
        f"A dot is a case; point at it for its name. Boxes, from {_FEWEST_IN_BOX} cases on, span the quartiles around "
        "the median; whiskers reach the furthest case within 1.5 times the box."
    )
    if len(evaluations) == 2:
        text += f" Filled: {evaluations[0].name}. Dashed: {evaluations[1].name}."
    return f"<p>{escape(text)}</p>"


def _plot(metric: str, evaluations: Sequence[Evaluation]) -> str:
    """Box plots of a metric, a row per structure and model; nothing where there are no values."""
    groups = [_values(metric, evaluation) for evaluation in evaluations]
    keys = list(dict.fromkeys(key for group in groups for key in group))
    values = [value for group in groups for cases in group.values() for value in cases.values()]
    if not values:
        return ""
    axis = axis_over([*values, 1.0 if metric in ("dice", "nsd") else 0.0])
    height = TOP + len(keys) * (len(groups) * _ROW + 8) + BOTTOM
    marks = [grid_lines(axis, height - BOTTOM)]
    for row, key in enumerate(keys):
        top = TOP + row * (len(groups) * _ROW + 8)
        middle = top + len(groups) * _ROW / 2
        marks.append(
            f'<text x="{LEFT - 8}" y="{middle + 8:g}" text-anchor="end">{escape(catalogue()[key].name)}</text>'
        )
        for place, group in enumerate(groups):
            marks.append(_box(group.get(key, {}), axis, top + 4 + (place + 0.5) * _ROW, key, place))
    title = escape(_TITLES[metric])
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">{"".join(marks)}</svg>'
    return f"<figure><figcaption>{title}</figcaption>{drawing}</figure>"


def _values(metric: str, evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Values that enter the means, by structure and case."""
    found: dict[str, dict[str, float]] = {}
    for score in evaluation.scores:
        value = getattr(score, metric)
        if score.counted and value is not None:
            found.setdefault(score.structure, {})[score.case] = value
    return found


def _box(cases: Mapping[str, float], axis: Axis, y: float, key: str, number: int) -> str:
    """Box, whiskers and points of one structure and model around the height `y`."""
    color = f"rgb{catalogue()[key].color}"
    points = [
        f'<circle cx="{axis.x(value):.1f}" cy="{y + ((place * 7 + 2) % 5 - 2) * 1.6:.1f}" r="2.2" fill="{color}" '
        f'stroke="currentColor" stroke-width=".5"><title>{escape(case)}: {value:.4g}</title></circle>'
        for place, (case, value) in enumerate(cases.items())
    ]
    if len(cases) < _FEWEST_IN_BOX:
        return "".join(points)
    ordered = np.sort(list(cases.values()))
    q1, median, q3 = np.percentile(ordered, (25, 50, 75)).tolist()
    reach = 1.5 * (q3 - q1)
    inside = ordered[(ordered >= q1 - reach) & (ordered <= q3 + reach)]
    low, left, middle, right, high = (axis.x(value) for value in (inside[0], q1, median, q3, inside[-1]))
    kind = ' class="second"' if number else ""
    box = (
        f'<path d="M{low:.1f} {y:g}H{left:.1f}M{right:.1f} {y:g}H{high:.1f}" stroke="currentColor"/>'
        f'<rect{kind} x="{left:.1f}" y="{y - 6:g}" width="{right - left:.1f}" height="12" rx="2" fill="{color}" '
        f'fill-opacity=".55" stroke="currentColor"/>'
        f'<path d="M{middle:.1f} {y - 6:g}v12" stroke="currentColor" stroke-width="2"/>'
    )
    return box + "".join(points)
