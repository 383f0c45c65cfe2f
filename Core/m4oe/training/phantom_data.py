"""Phantoms as training data, and phantoms that training never sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import partial
from multiprocessing import active_children, get_context
from typing import Any

from ..geometry import Volume
from ..spec import ExpertSpec, IntensityRule, ModelSpec
from .cache import CaseSource, start_worker
from .config import TrainConfig
from .data import Case, make_case
from .loop import TrainingData
from .phantom import MODALITIES, STRUCTURES, make_phantom

_UNSEEN_SEEDS = 1_000_000


def phantom_data(config: TrainConfig, count: int, emit: Callable[[dict[str, Any]], None]) -> TrainingData:
    """Training data of `count` phantoms per modality, made on all cores and held in memory."""
    spec = phantom_spec(config, count)
    return TrainingData(spec, list(_cases(count, spec, emit)))


def phantom_spec(config: TrainConfig, count: int) -> ModelSpec:
    """The spec of a model trained on `count` phantoms per modality, before it has scores."""
    return ModelSpec(
        name=config.name,
        version="0.1.0",
        network=replace(config.network, drop_path=0.0),
        structures=STRUCTURES,
        experts=tuple(
            ExpertSpec(name, "CT" if name == "ct" else "MR", description)
            for name, description in zip(MODALITIES, ("CT", "T1 MR", "T2 MR", "contrast-enhanced T1 MR"), strict=True)
        ),
        intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)},
        pixel_mm=config.pixel_mm,
        crop=config.crop,
        slice_mm=config.slice_mm,
        description="Demonstration model: 15 abdominal organs and liver tumours on CT and MR.",
        limits=(
            "A demonstration, trained on computer-made phantoms alone and on no patient. "
            "On real volumes expect gross errors. Not for research results, not a medical device."
        ),
        licence="Apache-2.0",
        training={
            "data": f"{count} computer-made phantoms per modality, no patient data",
            "date": date.today().isoformat(),
            "optimiser": config.optimiser,
            "stages": [[stage.name, stage.steps, stage.learning_rate] for stage in config.stages],
            "seed": config.seed,
        },
    )


def unseen_phantoms(count: int) -> list[CaseSource]:
    """Phantoms that training does not see, `count` per modality."""
    return [
        CaseSource(f"{name} {seed}", expert, STRUCTURES, (), partial(_load, seed, name))
        for expert, name in enumerate(MODALITIES)
        for seed in range(_UNSEEN_SEEDS, _UNSEEN_SEEDS + count)
    ]


def _load(seed: int, modality: str) -> tuple[Volume, Volume]:
    phantom = make_phantom(seed, modality)
    return phantom.image, phantom.labels


def _cases(count: int, spec: ModelSpec, emit: Callable[[dict[str, Any]], None]) -> Iterator[Case]:
    """Training phantoms of every modality, made on all cores."""
    jobs = [(seed, expert, spec) for seed in range(count) for expert in range(len(MODALITIES))]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=start_worker) as pool:
        try:
            for number, case in enumerate(pool.map(_phantom_case, jobs), start=1):
                if number % 20 == 0 or number == len(jobs):
                    emit({"event": "phantoms", "made": number, "of": len(jobs)})
                yield case
        except KeyboardInterrupt:  # a phantom takes seconds, and all that were begun would be waited for
            for process in active_children():
                process.terminate()
            raise


def _phantom_case(job: tuple[int, int, ModelSpec]) -> Case:
    seed, expert, spec = job
    phantom = make_phantom(seed, MODALITIES[expert])
    return make_case(phantom.image, phantom.labels, STRUCTURES, spec, expert)
