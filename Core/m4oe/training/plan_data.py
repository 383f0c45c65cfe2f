"""A plan of data sets as training data, and how a model scores on the patients that the plan holds back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import Score, evaluate_case
from ..package import load_model, save_model
from ..predictor import Predictor
from ..spec import ExpertSpec, IntensityRule, ModelSpec
from .cache import CaseSource, build_cache
from .cases import CaseFiles, load_case
from .config import TrainConfig
from .loop import TrainingData
from .plan import Plan

_INTENSITY = {"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)}
_LIMITS = "Research use, not a medical device. It was scored on few cases of the same data sets: check its results."


def plan_config(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The configuration with one expert for each that the plan's training cases name; a single one needs no gate."""
    experts = len(_experts(plan))
    stages = tuple(stage for stage in config.stages if experts > 1 or stage.name != "gate")
    return replace(config, network=replace(config.network, experts=experts, top_k=1), stages=stages)


def plan_data(config: TrainConfig, plan: Plan, cache: Path, emit: Callable[[dict[str, Any]], None]) -> TrainingData:
    """Training data of a plan, brought to the canonical grid once and mapped from `cache` ever after.

    A case that cannot be read is told as an event and left out.

    Raises:
        ValueError: No case is left, or a case has no modality.
    """
    spec = _spec(config, plan)
    sources = [*_sources(plan, "train", spec), *_sources(plan, "unlabelled", spec)]
    cases, failures = build_cache(sources, spec, cache)
    for failure in failures:
        emit({"event": "left out", "case": failure.name, "reason": failure.reason})
    if not cases:
        raise ValueError(f"none of the {len(sources)} training cases can be used: {failures[0].reason}")
    return TrainingData(spec, cases, _sources(plan, "val", spec))


def score_on_plan(model: Path, plan: Plan, emit: Callable[[dict[str, Any]], None]) -> list[Score]:
    """Writes into a model its mean Dice per expert and structure on the test patients, routed as any volume is.

    Where the plan has no test patients those of validation take their place.

    Returns:
        All scores.
    """
    predictor = Predictor(model)
    spec = predictor.spec
    held_back = _sources(plan, "test", spec) or _sources(plan, "val", spec)
    scores: list[Score] = []
    found: dict[str, dict[str, list[float]]] = {}
    for source in held_back:
        image, truth = source.load()
        assert truth is not None  # both splits have labelled cases alone
        labels, report = predictor(image)
        mine = evaluate_case(labels, truth, spec.label_keys, annotated=source.annotated, case=source.name)
        by_structure = found.setdefault(spec.expert_names[source.expert], {})
        for score in mine:
            if score.counted and score.dice is not None:
                by_structure.setdefault(score.structure, []).append(score.dice)
        emit(
            {
                "event": "scored",
                "case": source.name,
                "expert": spec.expert_names[source.expert],
                "gate": report.gate,
                "dice": {
                    score.structure: round(score.dice, 4) for score in mine if score.counted and score.dice is not None
                },
            }
        )
        scores += mine
    means = {name: {key: round(float(np.mean(dice)), 3) for key, dice in by.items()} for name, by in found.items()}
    emit({"event": "scores", "dice": means})
    network, spec = load_model(model)
    save_model(model, network, replace(spec, scores=means))
    return scores


def _experts(plan: Plan) -> dict[str, str]:
    """Modality by expert, CT first; a case that names no expert trains its modality's."""
    named = {_expert(case): case.modality or "" for case in [*plan.cases("train"), *plan.unlabelled()]}
    return dict(sorted(named.items(), key=lambda item: (item[1], item[0])))


def _expert(case: CaseFiles) -> str:
    if case.modality not in _INTENSITY:
        raise ValueError(f"the case {case.case} has no modality; plan again with --modality CT or MR for its data set")
    return case.expert or case.modality.lower()


def _spec(config: TrainConfig, plan: Plan) -> ModelSpec:
    experts = tuple(ExpertSpec(name, modality) for name, modality in _experts(plan).items())
    return ModelSpec(
        name=config.name,
        version="1",
        network=replace(config.network, drop_path=0.0),
        structures=plan.structures,
        experts=experts,
        intensity={key: rule for key, rule in _INTENSITY.items() if key in {expert.modality for expert in experts}},
        pixel_mm=config.pixel_mm,
        slice_mm=config.slice_mm,
        description=f"Trained on {', '.join(dataset.name for dataset in plan.datasets)}.",
        limits=_LIMITS,
        licence="; ".join(dict.fromkeys(d.licence for d in plan.datasets if d.licence)) or "that of its training data",
        training={
            "data": f"{len(plan.cases('train'))} cases of {', '.join(d.name for d in plan.datasets)}",
            "date": date.today().isoformat(),
            "stages": [[stage.name, stage.steps, stage.learning_rate] for stage in config.stages],
            "seed": config.seed,
        },
    )


def _sources(plan: Plan, split: str, spec: ModelSpec) -> Sequence[CaseSource]:
    """Cases of a split whose expert the model has; names are "data set/case"."""
    wanted = {id(case) for case in (plan.unlabelled() if split == "unlabelled" else plan.cases(split))}
    return [
        CaseSource(
            name=f"{dataset.name}/{case.case}",
            expert=spec.expert_index(_expert(case)),
            annotated=tuple(key for key in spec.structures if key in case.annotated) if case.label else (),
            content=(
                case.image,
                *([case.label] if case.label else []),
                json.dumps([sorted(case.labels.items()), spec.structures]),
            ),
            load=partial(_load, case, spec.structures),
        )
        for dataset in plan.datasets
        for case in dataset.cases
        if id(case) in wanted and _expert(case) in spec.expert_names
    ]


def _load(case: CaseFiles, structures: Sequence[str]) -> Any:
    from ..files import read_volume

    if case.label is None:
        return replace(read_volume(case.image, 0), modality=case.modality), None
    return load_case(case, structures)
