"""What a training run came to: report.html in the run's folder, which needs no other file."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from .evaluation import Score
from .geometry import Volume
from .labels import catalogue
from .page import BOTTOM, TOP, WIDTH, axis_over, number, small, structure_cell, table, write_page
from .predictor import Predictor
from .preview import write_preview
from .spec import ModelSpec, read_spec
from .terminal import count
from .training.cache import CaseSource
from .training.score import CaseResult

Event = Mapping[str, Any]
_HEIGHT, _MARGIN = 240, 50  # of a plot, in pixels
_TITLES = {
    "segmentation": "Loss of the segmentation",
    "gate": "Loss of the gate",
    "reconstruction": "Loss of pretraining",
}


_TOLD = ("stages", "scored_cases", "scored_on_validation")  # in other words
_METRICS = (("dice", "Dice", 3), ("nsd", "Normalised surface Dice", 3), ("hd95_mm", "HD95 (mm)", 1))


class _Curve(NamedTuple):
    name: str
    color: str
    points: list[tuple[float, float]]


def write_report(
    folder: Path, results: Sequence[CaseResult], sources: Sequence[CaseSource], device: str = "auto"
) -> Path:
    """Writes the page of a run that has ended.

    Args:
        folder: The run's, with its model and events.
        results: Of the cases that were held back.
        sources: These cases, of which the best and the worst are drawn.
        device: Where to segment these.

    Returns:
        The page.
    """
    model, path = folder / "model.safetensors", folder / "report.html"
    spec, events = read_spec(model), read_events(folder / "events.jsonl")
    parts = [
        f"<h1>Training of {escape(spec.name)}</h1>",
        "<p>Research use only, not a medical device.</p>",
        _facts(spec, events),
        "<h2>Course</h2>",
        f'<div class="plots">{"".join(_plots(events))}</div>',
        _scores(spec, results, len(sources)),
        *_pictures(Predictor(model, device), results, sources),
    ]
    write_page(path, f"Training of {spec.name}", parts)
    return path


def read_events(path: Path) -> list[Event]:
    """A run's events; of steps that were taken again after a stop the last counts, and a line that was cut does not."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found: dict[object, Event] = {}
    for place, line in enumerate(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        found[(event["event"], event["overall"]) if "overall" in event else place] = event
    return sorted(found.values(), key=lambda event: event.get("overall", 0))


def _facts(spec: ModelSpec, events: Sequence[Event]) -> str:
    seconds = {(event["stage"], event["number"]): event["seconds"] for event in events if event["event"] == "step"}
    network = spec.network
    rows = {
        "Experts": ", ".join(spec.expert_names),
        "Structures": ", ".join(catalogue()[key].name for key in spec.structures),
        "Grid": f"{spec.pixel_mm:g} mm pixels, {spec.slice_mm:g} mm slices or thicker",
        "Network": f"{network.gate} gate, width {network.embed_dim}, depths {', '.join(map(str, network.depths))}",
        "Stages": "; ".join(_stage(*stage) for stage in spec.training.get("stages", ())),
        "Minutes": ", ".join(f"{stage} {spent / 60:.1f}" for (stage, _), spent in seconds.items()),
        **{key.capitalize(): str(value) for key, value in spec.training.items() if key not in _TOLD},
        "Licence": spec.licence,
        "Limits": spec.limits,
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows.items() if text)
    return f"<dl>{items}</dl>"


def _stage(name: str, steps: int, rate: float) -> str:
    return f"{name} {count(steps, 'step')}, learning rate {rate:g}"


# Curves


def _plots(events: Sequence[Event]) -> Iterator[str]:
    steps = [event for event in events if event["event"] == "step"]
    checks = [event for event in events if event["event"] == "validated"]
    borders = [event["overall"] - event["step"] for event in steps if event["number"] > 0]
    for key, title in _TITLES.items():
        points = [(event["overall"], event["loss"][key]) for event in steps if key in event["loss"]]
        if points:
            yield _plot(title, [_Curve(title, "currentColor", points)], borders)
    keys = dict.fromkeys(key for event in checks for key in event["dice"])
    curves = [_Curve("Mean", "currentColor", [(event["overall"], event["score"]) for event in checks])]
    curves += [
        _Curve(
            catalogue()[key].name,
            f"rgb{catalogue()[key].color}",
            [(event["overall"], event["dice"][key]) for event in checks if key in event["dice"]],
        )
        for key in keys
    ]
    if checks:
        yield _plot("Dice of the validation, by structure", curves, borders, highest=1.0)


def _plot(title: str, curves: Sequence[_Curve], borders: Iterable[float], highest: float = 0.0) -> str:
    """Curves over the steps of the run, with a line where a stage begins."""
    across = axis_over([0.0, *(x for curve in curves for x, _ in curve.points)])
    up = axis_over([0.0, highest, *(y for curve in curves for _, y in curve.points)])
    bottom = _HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = ((v - axis.low) / (axis.high - axis.low) for v, axis in ((x, across), (y, up)))
        return _MARGIN + share_x * (WIDTH - 2 * _MARGIN), bottom - share_y * (bottom - TOP)

    marks = []
    for tick in up.ticks:
        y = place(0, tick)[1]
        marks.append(f'<line class="grid" x1="{_MARGIN}" x2="{WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{_MARGIN - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in across.ticks:
        marks.append(f'<text x="{place(tick, 0)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:.6g}</text>')
    for border in sorted(set(borders)):
        x = place(border, 0)[0]
        marks.append(f'<line class="zero" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke-dasharray="2 3"/>')
    for curve in reversed(curves):
        points = [place(*point) for point in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        width = 2 if curve.color == "currentColor" else 1.3
        drawn = f'<polyline points="{path}" fill="none" stroke="{curve.color}" stroke-width="{width}"/>'
        dots = f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2.5" fill="{curve.color}"/>'
        marks.append(f"<g><title>{escape(curve.name)}</title>{drawn}{dots}</g>")
    drawing = f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
    legend = "".join(
        f'<span><i class="swatch" style="background: {curve.color}"></i>{escape(curve.name)}</span> '
        for curve in (curves if len(curves) > 1 else ())
    )
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}<p>{legend}</p></figure>"


# Scores


def _scores(spec: ModelSpec, results: Sequence[CaseResult], kept: int) -> str:
    if not results:
        reason = (
            f"of {count(kept, 'case')} that were kept from training none could be read"
            if kept
            else "no case was kept from training"
        )
        return f"<h2>Scores</h2><p>There are none: {reason}.</p>"
    head = f"<h2>Scores on {count(len(results), 'case')}</h2><p>{_where_from(results)}</p>"
    return head + _score_tables(results) + _gate_table(spec, results)


def _where_from(results: Sequence[CaseResult]) -> str:
    """Whether the cases are of test patients, or of those that chose the weights."""
    experts = list(dict.fromkeys(result.expert for result in results if result.chose_weights))
    if not experts:
        return "Training did not see these patients."
    of = "" if all(result.chose_weights for result in results) else f" of {', '.join(map(escape, experts))}"
    return f"There was no test patient{of}: scored are the validation cases, which chose the weights, so they flatter."


def _score_tables(results: Sequence[CaseResult]) -> str:
    """For each metric the mean of each structure on each expert's cases."""
    text = (
        "Means over the cases whose truth has the structure; below them how often it was missed, or found where there "
        "is none. The expert of a case is that of its modality; which one served it, the gate and the header decided."
    )
    tables = [
        f"<div><h3>{title}</h3>{_score_table(results, metric, places)}</div>" for metric, title, places in _METRICS
    ]
    return f'<p>{text}</p><div class="plots">{"".join(tables)}</div>'


def _score_table(results: Sequence[CaseResult], metric: str, places: int) -> str:
    experts = list(dict.fromkeys(result.expert for result in results))
    keys = dict.fromkeys(score.structure for result in results for score in result.scores)
    cells = {
        (key, name): [s for r in results if r.expert == name for s in r.scores if s.structure == key]
        for key in keys
        for name in experts
    }
    trouble = _trouble if metric == "dice" else lambda scores: ""
    rows = [
        [
            structure_cell(key),
            *(number(_mean(cells[key, name], metric), places) + trouble(cells[key, name]) for name in experts),
        ]
        for key in keys
    ]
    means = [[m for key in keys if (m := _mean(cells[key, name], metric)) is not None] for name in experts]
    foot = ["Mean of structures", *(number(fmean(values) if values else None, places) for values in means)]
    return table(["Structure", *map(escape, experts)], rows, foot)


def _trouble(scores: Sequence[Score]) -> str:
    missed = sum(score.outcome == "missed" for score in scores)
    false = sum(score.outcome == "false positive" for score in scores)
    words = ", ".join([f"{missed} missed"] * bool(missed) + [f"{false} false"] * bool(false))
    return small(words) if words else ""


def _mean(scores: Iterable[Score], metric: str) -> float | None:
    values = [getattr(score, metric) for score in scores if score.counted and getattr(score, metric) is not None]
    return fmean(values) if values else None


def _gate_table(spec: ModelSpec, results: Sequence[CaseResult]) -> str:
    """Whose cases the gate gave to which expert."""
    names = spec.expert_names
    chosen = [(result.expert, _likeliest(result.gate)) for result in results if result.gate]
    rows = [
        [escape(name), *(_shaded(chosen.count((name, other)), cases, name == other) for other in names)]
        for name in names
        if (cases := sum(own == name for own, _ in chosen))
    ]
    text = (
        "Rows: the expert of the case's modality. Columns: the expert that the gate finds most likely by itself, "
        "before a header or Hounsfield units have their say."
    )
    return f"<h2>The gate</h2><p>{text}</p>{table(['Cases of', *map(escape, names)], rows)}" if rows else ""


def _likeliest(gate: Mapping[str, float]) -> str:
    return max(gate, key=lambda name: gate[name])


def _shaded(chosen: int, cases: int, right: bool) -> str:
    color = "46 125 50" if right else "179 38 30"
    shade = f' style="background: rgb({color} / {0.6 * chosen / cases:.2f})"' if chosen else ""
    return f'<span class="cell"{shade}>{chosen}</span>'


# Pictures


def _pictures(predictor: Predictor, results: Sequence[CaseResult], sources: Sequence[CaseSource]) -> Iterator[str]:
    """The best and the worst case, each as it should be and as it was found."""
    by_dice = sorted((result for result in results if result.dice), key=lambda result: fmean(result.dice.values()))
    if not by_dice:
        return
    chosen = {"Best case": by_dice[-1], "Worst case": by_dice[0]} if len(by_dice) > 1 else {"The case": by_dice[0]}
    by_name = {source.name: source for source in sources}
    for title, result in chosen.items():
        image, truth = by_name[result.case].load()
        assert truth is not None
        labels, _ = predictor(image)
        shown = [_picture(image, *pair, predictor.spec, result.case) for pair in (("Truth", truth), ("Found", labels))]
        yield f"<h2>{title}: {escape(result.case)}, mean Dice {fmean(result.dice.values()):.3f}</h2>"
        yield f'<div class="plots">{"".join(shown)}</div>'


def _picture(image: Volume, name: str, labels: Volume, spec: ModelSpec, case: str) -> str:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        write_preview(path, image, labels, spec.label_keys, f"{name}   {case}")
        data = b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{name}: {escape(case)}" src="data:image/png;base64,{data}">'
