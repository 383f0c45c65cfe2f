"""The training loop: one dense network, its copies as experts by modality, then the gate, then all together."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import dice_scores
from ..network.unet import MoESwinUNet, upcycle
from ..package import save_model
from ..predictor import Predictor, bfloat16_is_faster
from ..spec import ExpertSpec, IntensityRule, ModelSpec
from .config import Stage, TrainConfig
from .data import Batch, Case, batches, make_case
from .loss import gate_loss, segmentation_loss
from .phantom import MODALITIES, STRUCTURES, make_phantom

Event = dict[str, Any]
_WARM_UP = 0.05
_CLIP = 1.0
_LOG_EVERY = 20
_UNSEEN_SEEDS = 1_000_000


def train_on_phantoms(config: TrainConfig, folder: Path, on_event: Callable[[Event], None]) -> Path:
    """Trains a model on phantoms and scores it on unseen ones.

    Args:
        config: The run.
        folder: Receives config.json, events.jsonl and model.safetensors; must not hold another run.
        on_event: Called with every event, the same that go to events.jsonl.

    Returns:
        The model file.

    Raises:
        ValueError: `folder` already holds a run.
    """
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} already holds a training run; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    model = folder / "model.safetensors"
    with (folder / "events.jsonl").open("w", buffering=1, encoding="utf-8") as log:

        def emit(event: Event) -> None:
            log.write(json.dumps(event) + "\n")
            on_event(event)

        spec = phantom_spec(config)
        torch.manual_seed(config.seed)
        cases = list(_phantom_cases(config, spec, emit))
        network = MoESwinUNet(replace(config.network, experts=1, top_k=0), len(spec.structures) + 1)
        rng = np.random.default_rng(config.seed)
        stream = batches(cases, config.images, config.crop, config.network.channels, rng)
        for stage in config.stages:
            if stage.name != "dense" and network.spec.experts == 1:
                network = upcycle(network, config.network)
            _run_stage(network, stage, stream, config, emit)
        if network.spec.experts == 1:
            network = upcycle(network, config.network)
        save_model(model, network, spec)
        spec = replace(spec, scores=score_on_phantoms(model, config, emit))
        save_model(model, network, spec)
    return model


def phantom_spec(config: TrainConfig) -> ModelSpec:
    """The spec of a model trained on phantoms, before it has scores."""
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
        slice_mm=config.slice_mm,
        description="Demonstration model: 15 abdominal organs and liver tumours on CT and MR.",
        limits=(
            "A demonstration, trained on computer-made phantoms alone and on no patient. "
            "On real volumes expect gross errors. Not for research results, not a medical device."
        ),
        licence="Apache-2.0",
        training={
            "data": f"{config.phantoms} computer-made phantoms per modality, no patient data",
            "date": date.today().isoformat(),
            "stages": [[stage.name, stage.steps, stage.learning_rate] for stage in config.stages],
            "seed": config.seed,
        },
    )


def score_on_phantoms(model: Path, config: TrainConfig, emit: Callable[[Event], None]) -> dict[str, dict[str, float]]:
    """Mean Dice per expert and structure on phantoms that training never saw, routed as any volume is."""
    predictor = Predictor(model, device="cpu")
    scores: dict[str, dict[str, float]] = {}
    for modality in MODALITIES:
        found: dict[str, list[float]] = {}
        for number in range(config.unseen):
            phantom = make_phantom(_UNSEEN_SEEDS + number, modality)
            labels, report = predictor(phantom.image)
            dice = dice_scores(labels.array, phantom.labels.array, len(STRUCTURES))
            for label, value in dice.items():
                found.setdefault(STRUCTURES[label - 1], []).append(value)
            emit({"event": "scored", "modality": modality, "phantom": number, "experts": report.expert_weights})
        scores[modality] = {key: round(float(np.mean(values)), 3) for key, values in found.items()}
    emit({"event": "scores", "dice": scores})
    return scores


def _run_stage(
    network: MoESwinUNet,
    stage: Stage,
    stream: Iterator[Batch],
    config: TrainConfig,
    emit: Callable[[Event], None],
) -> None:
    parameters = _trained_parameters(network, stage)
    optimiser = torch.optim.AdamW(
        parameters, stage.learning_rate, (0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, stage.steps))
    network.train()
    bfloat16 = bfloat16_is_faster(torch.device("cpu"))
    start, recent = time.perf_counter(), []
    for step in range(1, stage.steps + 1):
        batch = next(stream)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = _losses(network, stage, batch)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        schedule.step()
        recent.append({key: value.detach() for key, value in losses.items()})
        if step % _LOG_EVERY == 0 or step == stage.steps:
            emit(_step_event(stage, step, recent, time.perf_counter() - start))
            recent.clear()
    network.eval()


def _losses(network: MoESwinUNet, stage: Stage, batch: Batch) -> dict[str, Tensor]:
    if stage.name == "gate":
        return {"gate": gate_loss(network.gate_logits(batch.images_BSHW), batch.experts_B)}

    def segmentation(scores_BHWK: Tensor) -> Tensor:
        return segmentation_loss(scores_BHWK, batch.labels_BHW, batch.annotated_BK, stage.balance)

    if stage.name == "dense":
        return {"segmentation": segmentation(network(batch.images_BSHW))}
    # Hard routing, as prediction keeps one expert: soft weights would let the experts lean on each other.
    weights_BE = torch.nn.functional.one_hot(batch.experts_B, network.spec.experts).float()
    losses = {"segmentation": segmentation(network(batch.images_BSHW, weights_BE))}
    if stage.name == "joint":
        losses["gate"] = gate_loss(network.gate_logits(batch.images_BSHW), batch.experts_B)
    return losses


def _trained_parameters(network: MoESwinUNet, stage: Stage) -> list[torch.nn.Parameter]:
    """Marks what the stage trains; the gate stage leaves everything but the gate as it is."""
    for parameter in network.parameters():
        parameter.requires_grad_(stage.name != "gate")
    if network.router is not None:
        network.router.requires_grad_(stage.name != "experts")
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _step_event(stage: Stage, step: int, recent: list[dict[str, Tensor]], seconds: float) -> Event:
    means = {key: float(torch.stack([losses[key] for losses in recent]).mean()) for key in recent[0]}
    if not all(math.isfinite(value) for value in means.values()):
        raise RuntimeError(f"the loss is not finite at step {step} of stage {stage.name}: {means}; lower the rate")
    return {
        "event": "step",
        "stage": stage.name,
        "step": step,
        "steps": stage.steps,
        "loss": {key: round(value, 4) for key, value in means.items()},
        "seconds": round(seconds, 1),
    }


def _phantom_cases(config: TrainConfig, spec: ModelSpec, emit: Callable[[Event], None]) -> Iterator[Case]:
    """Training phantoms of every modality, made on all cores."""
    jobs = [(seed, expert, spec) for seed in range(config.phantoms) for expert in range(len(MODALITIES))]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        for number, case in enumerate(pool.map(_phantom_case, jobs, chunksize=4), start=1):
            if number % 20 == 0 or number == len(jobs):
                emit({"event": "phantoms", "made": number, "of": len(jobs)})
            yield case


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says what an interruption means
    torch.set_num_threads(1)


def _phantom_case(job: tuple[int, int, ModelSpec]) -> Case:
    seed, expert, spec = job
    phantom = make_phantom(seed, MODALITIES[expert])
    return make_case(phantom.image, phantom.labels, STRUCTURES, spec, expert)
