"""A plan of data sets as training data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..spec import ExpertSpec, IntensityRule, ModelSpec
from .atlas import Atlas, load_atlas, negative_atlas
from .cache import CaseSource, build_cache
from .cases import CaseFiles, expert_of, load_case
from .config import TrainConfig, addition_stages
from .loop import TrainingData
from .phantom import MODALITIES
from .plan import Plan, check_experts

_INTENSITY = {"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)}
_NEGATIVES, _NEGATIVE_SHARE = 6, 0.06  # bodies without structures, and how often they are drawn
_LIMITS = "Research use, not a medical device. It was scored on {}: check its results."


def plan_config(config: TrainConfig, plan: Plan, synthesise: bool = False) -> TrainConfig:
    """The configuration with one expert for each that the plan's training cases name; a single one needs no gate.

    With `synthesise` there is one for each contrast that can be drawn as well.
    """
    experts = len(planned_experts(plan, synthesise))
    stages = tuple(stage for stage in config.stages if experts > 1 or stage.name != "gate")
    return replace(config, network=replace(config.network, experts=experts), stages=stages)


def addition_config(config: TrainConfig, model: ModelSpec) -> TrainConfig:
    """The configuration that adds an expert to a model: on its grid, images of its size, its network, as many steps."""
    experts, drop_path = model.network.experts + 1, config.network.drop_path
    network = replace(model.network, experts=experts, top_k=1, drop_path=drop_path)
    return replace(
        config,
        network=network,
        stages=addition_stages(config.stages),
        pixel_mm=model.pixel_mm,
        slice_mm=model.slice_mm,
        crop=model.crop or config.crop,
    )


def addition_spec(config: TrainConfig, plan: Plan, model: ModelSpec, name: str) -> ModelSpec:
    """The spec of a model with the expert `name` added, which finds what the plan's cases of it annotate.

    Raises:
        ValueError: The model has the expert, its gate takes none, or the plan has no case of it or some of others.
    """
    planned = planned_experts(plan)
    if name in model.expert_names:
        raise ValueError(f"{model.name} has an expert {name}; give the new one another name in the plan and here")
    if model.network.gate != "image" or (model.network.experts > 1 and model.network.top_k != 1):
        raise ValueError(f"{model.name} cannot take an expert: its gate does not choose one expert for an image")
    if name not in planned:
        raise ValueError(f"the plan has no training case for the expert {name}; it has: {', '.join(planned)}")
    if strange := sorted(set(planned) - {name, *model.expert_names}):
        raise ValueError(f"the plan has cases for {', '.join(strange)}, which {model.name} lacks; leave them out")
    mine = [case for case in plan.cases("train") if _expert(case) == name]
    annotated = [key for key in plan.structures if any(key in case.annotated for case in mine)]
    structures = (*model.structures, *(key for key in annotated if key not in model.structures))
    old = tuple(replace(expert, structures=expert.structures or model.structures) for expert in model.experts)
    sets = ", ".join(sorted({dataset.name for dataset in plan.datasets}))
    return replace(
        model,
        name=config.name,
        network=replace(config.network, drop_path=0.0),
        structures=structures,
        experts=(*old, ExpertSpec(name, planned[name], structures=tuple(annotated))),
        intensity={**{planned[name]: _INTENSITY[planned[name]]}, **model.intensity},
        description=f"{model.description} With the expert {name} added.".strip(),
        licence="; ".join(dict.fromkeys([model.licence, *(d.licence for d in plan.datasets)])).strip("; "),
        training={**model.training, f"of {name}": f"{_count(len(mine))} of {sets}, {date.today().isoformat()}"},
    )


def plan_data(
    config: TrainConfig,
    plan: Plan,
    cache: Path,
    emit: Callable[[dict[str, Any]], None],
    spec: ModelSpec | None = None,
    scheduler: str | None = None,
    synthesise: bool = False,
) -> TrainingData:
    """Training data of a plan, brought to the canonical grid once and mapped from `cache` ever after.

    A case that cannot be read is told as an event and left out. The spec is that of a new model, if none is given.
    With `scheduler` the workers of a Dask cluster prepare the cases. With `synthesise` the label maps are drawn in the
    contrast of every expert as well.

    Raises:
        ValueError: No case is left, or a case has no modality.
    """
    spec = spec or _spec(config, plan, synthesise)
    sources = [*_sources(plan, "train", spec), *_sources(plan, "unlabelled", spec)]
    cases, failures = build_cache(sources, spec, cache, scheduler=scheduler, emit=emit)
    for failure in failures:
        emit({"event": "left out", "case": failure.name, "reason": failure.reason})
    if not cases:
        raise ValueError(f"none of the {len(sources)} training cases can be used: {failures[0].reason}")
    drawn = _atlases(plan, spec, {failure.name for failure in failures}) if synthesise else ()
    return TrainingData(spec, cases, _sources(plan, "val", spec), drawn)


def held_back(plan: Plan, spec: ModelSpec) -> Sequence[CaseSource]:
    """The test patients' cases, and of experts that have none those of validation."""
    test = _sources(plan, "test", spec)
    tested = {source.expert for source in test}
    return [*test, *(source for source in _sources(plan, "val", spec) if source.expert not in tested)]


def planned_experts(plan: Plan, synthesise: bool = False) -> dict[str, str]:
    """Modality by expert, CT first; a case that names no expert trains its modality's.

    Raises:
        ValueError: A case has no modality, or see `check_experts`.
    """
    check_experts(case for dataset in plan.datasets for case in dataset.cases)
    named = {_expert(case): case.modality or "" for case in [*plan.cases("train"), *plan.unlabelled()]}
    if synthesise:
        named |= {contrast: "CT" if contrast == "ct" else "MR" for contrast in MODALITIES}
    return dict(sorted(named.items(), key=lambda item: (item[1], item[0])))


def _expert(case: CaseFiles) -> str:
    if case.modality not in _INTENSITY:
        raise ValueError(f"the case {case.case} has no modality; say CT or MR for its data set and plan again")
    return expert_of(case)


def _spec(config: TrainConfig, plan: Plan, synthesise: bool) -> ModelSpec:
    cases, kept = len(plan.cases("train")), [*plan.cases("val"), *plan.cases("test")]
    experts = tuple(ExpertSpec(name, modality) for name, modality in planned_experts(plan, synthesise).items())
    return ModelSpec(
        name=config.name,
        version="1",
        network=replace(config.network, drop_path=0.0),
        structures=plan.structures,
        experts=experts,
        intensity={key: rule for key, rule in _INTENSITY.items() if key in {expert.modality for expert in experts}},
        pixel_mm=config.pixel_mm,
        crop=config.crop,
        slice_mm=config.slice_mm,
        description=f"Trained on {', '.join(dataset.name for dataset in plan.datasets)}.",
        limits=_LIMITS.format("few cases of the same data sets" if kept else "no case"),
        licence="; ".join(dict.fromkeys(d.licence for d in plan.datasets if d.licence)) or "that of its training data",
        training={
            "data": f"{_count(cases)} of {', '.join(d.name for d in plan.datasets)}"
            + synthesise * f", their label maps drawn as {', '.join(expert.name for expert in experts)}",
            "date": date.today().isoformat(),
            "optimiser": config.optimiser,
            "stages": [[stage.name, stage.steps, stage.learning_rate] for stage in config.stages],
            "seed": config.seed,
        },
    )


def _count(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"


def _atlases(plan: Plan, spec: ModelSpec, failed: Set[str]) -> list[Atlas]:
    """The label maps of the training cases that can be read, and a few bodies without any structure."""
    named = [(f"{d.name}/{case.case}", case) for d in plan.datasets for case in d.cases]
    training = {id(case) for case in plan.cases("train")}
    cases = [case for name, case in named if id(case) in training and name not in failed]
    atlases = [load_atlas(case, spec) for case in tqdm(cases, "splitting tissues", unit="case", disable=None)]
    share = _NEGATIVE_SHARE * len(atlases) / _NEGATIVES
    return [*atlases, *(replace(negative_atlas(seed, spec), weight=share) for seed in range(_NEGATIVES))]


def _sources(plan: Plan, split: str, spec: ModelSpec) -> Sequence[CaseSource]:
    """Cases of a split whose expert the model has; names are "data set/case"."""
    wanted = {id(case) for case in (plan.unlabelled() if split == "unlabelled" else plan.cases(split))}
    return [
        _source(f"{dataset.name}/{case.case}", case, spec)
        for dataset in plan.datasets
        for case in dataset.cases
        if id(case) in wanted and _expert(case) in spec.expert_names
    ]


def _source(name: str, case: CaseFiles, spec: ModelSpec) -> CaseSource:
    """A case with the structures that its annotators drew and its expert is to find."""
    expert = spec.expert_index(_expert(case))
    known = spec.experts[expert].structures or spec.structures
    annotated = tuple(key for key in spec.structures if key in case.annotated and key in known) if case.label else ()
    meanings = json.dumps([sorted(case.labels.items()), spec.structures])
    content = (case.image, case.label, meanings) if case.label else (case.image,)
    load = partial(_load, replace(case, annotated=annotated), spec.structures)
    return CaseSource(name, expert, annotated, content, load)


def _load(case: CaseFiles, structures: Sequence[str]) -> Any:
    from ..files import read_volume

    if case.label is None:
        return replace(read_volume(case.image, 0), modality=case.modality), None
    return load_case(case, structures)
