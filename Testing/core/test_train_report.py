"""Parts of the page that a training run ends in."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from m4oe import train_report
from m4oe.evaluation import Score
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training.score import CaseResult, mean_dice

SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(experts=2, embed_dim=8, depths=(1, 1), heads=(1, 2)),
    structures=("liver", "spleen"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=3.0,
    training={"data": "2 <dreams>", "stages": [["dense", 40, 0.001]]},
)


def a_score(structure: str, dice: float, outcome: str = "both") -> Score:
    return Score("a", structure, outcome, outcome != "false positive", dice, dice / 2, 3.0, 2.0, 1.0, 1.0, 0.0, 0.0)


def a_result(expert: str, ct: float, *scores: Score) -> CaseResult:
    return CaseResult("a", expert, {"ct": ct, "mr": 1 - ct}, scores)


RESULTS = [
    a_result("ct", 0.9, a_score("liver", 0.8), a_score("spleen", 0.0, "missed")),
    a_result("ct", 0.4, a_score("liver", 0.6), a_score("spleen", 0.0, "false positive")),
    a_result("mr", 0.2, a_score("liver", 0.5)),
]


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html.replace("<br>", " "), re.DOTALL)
    return [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", row)] for row in rows]


def step(overall: int, loss: float, number: int = 0) -> str:
    event = {"event": "step", "stage": "dense", "number": number, "step": overall, "overall": overall}
    return json.dumps({**event, "loss": {"segmentation": loss}, "seconds": 60.0})


def test_of_a_step_taken_again_the_last_counts(tmp_path: Path) -> None:
    lines = [step(20, 3.0), step(40, 2.0), '{"event": "resumed"}', step(40, 1.5), step(60, 1.0)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines), encoding="utf-8")
    events = train_report.read_events(tmp_path / "events.jsonl")
    assert [event["loss"]["segmentation"] for event in events if event["event"] == "step"] == [3.0, 1.5, 1.0]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert train_report.read_events(tmp_path / "events.jsonl") == []


def test_scores_are_means_by_structure_and_expert() -> None:
    head, liver, spleen, foot = cells(train_report._score_table(RESULTS, "dice", 3))
    assert head == ["Structure", "ct", "mr"]
    assert liver == ["Liver", "0.700", "0.500"]
    assert spleen == ["Spleen", "0.000 1 missed, 1 false", "–"]
    assert foot == ["Mean of structures", "0.350", "0.500"]
    assert cells(train_report._score_table(RESULTS, "nsd", 3))[1] == ["Liver", "0.350", "0.250"]
    assert mean_dice(RESULTS) == {"ct": {"liver": 0.7, "spleen": 0.0}, "mr": {"liver": 0.5}}


def test_the_gates_choices_are_counted_by_expert() -> None:
    head, ct, mr = cells(train_report._gate_table(SPEC, RESULTS))
    assert (head, ct, mr) == (["Cases of", "ct", "mr"], ["ct", "1", "1"], ["mr", "0", "1"])


def test_a_model_without_a_gate_has_no_table_of_it() -> None:
    assert train_report._gate_table(SPEC, [CaseResult("a", "ct", {}, ())]) == ""


def test_a_curve_runs_over_all_steps_and_stages_are_marked() -> None:
    events = [json.loads(text) for text in (step(20, 3.0), step(40, 1.0), step(60, 0.5, 1))]
    (plot,) = train_report._plots(events)
    (points,) = re.findall(r'points="([^"]*)"', plot)
    x, y = zip(*((float(a), float(b)) for a, b in (point.split(",") for point in points.split())), strict=True)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and x[0] < x[1] and y[0] < y[1] < y[2]
    assert plot.count('class="zero"') == 1


def test_what_the_run_was_is_told_and_escaped() -> None:
    facts = train_report._facts(SPEC, [json.loads(step(20, 3.0))])
    assert "<dd>2 &lt;dreams&gt;</dd>" in facts and "dense 40 steps, learning rate 0.001" in facts
    assert "<dd>dense 1.0</dd>" in facts


def test_scores_of_the_cases_that_chose_the_weights_are_called_so() -> None:
    assert train_report._where_from(RESULTS) == "Training did not see these patients."
    chosen = [replace(result, chose_weights=result.expert == "mr") for result in RESULTS]
    assert train_report._where_from(chosen).startswith("There was no test patient of mr: scored are the validation")
    assert train_report._where_from(chosen[2:]).startswith("There was no test patient: scored are the validation")


def test_a_report_without_scores_says_so() -> None:
    assert "no case was kept from training" in train_report._scores(SPEC, [], 0)
    assert "of 2 cases that were kept from training none could be read" in train_report._scores(SPEC, [], 2)
    assert cells(train_report._scores(SPEC, [], 2)) == []
    assert train_report._scores(SPEC, RESULTS[:1], 1).startswith("<h2>Scores on 1 case</h2>")
