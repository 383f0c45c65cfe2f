"""The training loop: stage by stage, with checkpoints from which a run that was stopped goes on to the last bit.

A run's folder holds config.json, data.sha256 (a hash of what it learns from), events.jsonl (one JSON object per line),
checkpoint.safetensors, best.safetensors (the model that scored best in its stage, where there is validation) and at the
end model.safetensors.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..evaluation import as_annotated, dice_scores
from ..files import atomic_write
from ..geometry import Volume
from ..jobs import Cancelled
from ..network.unet import MoESwinUNet, upcycle
from ..package import digest, save_model
from ..predictor import Predictor, bfloat16_is_faster, find_device
from ..spec import ModelSpec
from ..training_run import PAUSE
from .atlas import Atlas
from .augment import AUGMENT, AUGMENT_GATE, Augmenter
from .cache import CaseSource, Failure, load_or_fail
from .checkpoint import (
    Progress,
    load_checkpoint,
    optimiser_tensors,
    part_of,
    restore_optimiser,
    save_checkpoint,
)
from .config import Stage, TrainConfig
from .data import Batch, Case, Sampler, prefetched
from .optimiser import Muon
from .ranks import Ranks
from .stages import Objective, learning_rate, trained_groups
from .synthesis import Synthesiser

Event = dict[str, Any]
_Seen = tuple[str, Volume, Volume, Volume]  # name, volume, truth, prediction of a case
_CLIP = 1.0
_LOG_EVERY = 20
_AVERAGED = 0.02  # of a stage's steps: the span of the moving average of the weights
_PREVIEWS = 4  # validation cases that are drawn
_HEAD = "head."  # whose weights depend on the classes
_NO_MEMORY = ("can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        spec: Of the model, before it has scores.
        cases: Training cases; those without labels serve pretraining alone.
        validation: Whole volumes that choose the best weights and the end of a stage.
        atlases: Label maps that are drawn in the contrast of every expert, in all stages but pretraining.
    """

    spec: ModelSpec
    cases: Sequence[Case]
    validation: Sequence[CaseSource] = ()
    atlases: Sequence[Atlas] = ()

    @property
    def labelled(self) -> list[Case]:
        """The training cases with labels."""
        return [case for case in self.cases if case.labels_ZHW is not None]

    @property
    def experts(self) -> int:
        """Number of experts that have labelled training cases, real or synthetic."""
        return len(self.spec.experts) if self.atlases else len({case.expert for case in self.labelled})


@dataclass
class _Run:
    """A run between two steps."""

    config: TrainConfig
    data: TrainingData
    folder: Path
    emit: Callable[[Event], None]
    ranks: Ranks
    device: torch.device
    network: MoESwinUNet
    bfloat16: bool = False  # whether to compute in it: all processes do, or none, lest their weights part
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the stage's best validation
    loaded: dict[str, Tensor] = field(default_factory=dict)  # a checkpoint amid a stage, until that begins


def train(
    config: TrainConfig,
    data: TrainingData,
    folder: Path,
    on_event: Callable[[Event], None] = lambda event: None,
    ranks: Ranks = Ranks(),  # noqa: B008
    device: str = "auto",
    start: MoESwinUNet | None = None,
) -> Path:
    """Trains a model, or goes on where `folder`'s run of the same configuration stopped.

    Args:
        config: The run.
        data: What it learns from.
        folder: Receives the run's files.
        on_event: Called with every event, the same that go to events.jsonl.
        ranks: This process among those that share the batches.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        start: Network whose weights training starts from: dense, or for the stage "add" with the new expert.

    Returns:
        The model file.

    Raises:
        ValueError: `folder` holds a run of another configuration or on other data, or the data do not fit the
            configuration.
        Cancelled: The file `pause` in `folder` asked for it; the checkpoint is written.
        RuntimeError: The loss is not finite, or the memory does not hold a single image.
        OSError: A file cannot be written; the last checkpoint is as it was.
    """
    with _events(config, data, folder, on_event, ranks, start) as emit:
        run = _opened(config, data, folder, emit, ranks, find_device(device), start)
        model = folder / "model.safetensors"
        finished = run.progress.stage == len(config.stages) and model.exists()
        for number in range(run.progress.stage, len(config.stages)):
            _run_stage(run, number)
        if ranks.rank == 0 and not finished:
            save_model(model, _as_mixture(run.network, config), data.spec)
        ranks.wait()
    return model


def check_run(
    folder: Path, config: TrainConfig, data: TrainingData | None = None, start: MoESwinUNet | None = None
) -> None:
    """Looks whether training could begin in a folder or go on there; without `data` at the configuration alone.

    Raises:
        ValueError: The folder holds a run of another configuration or on other data.
    """
    differences = _differences(folder / "config.json", config)
    if differences is not None:
        raise ValueError(
            f"{folder} holds a run of another configuration{differences}; choose another folder or repeat its options"
        )
    path = folder / "data.sha256"
    if data is not None and path.exists() and path.read_text(encoding="utf-8") != _fingerprint(data, start):
        raise ValueError(
            f"{folder} holds a run on other data; choose another folder or give it the same data and start again"
        )


@contextmanager
def _events(
    config: TrainConfig,
    data: TrainingData,
    folder: Path,
    on_event: Callable[[Event], None],
    ranks: Ranks,
    start: MoESwinUNet | None,
) -> Iterator[Callable[[Event], None]]:
    """Yields what tells of an event; the first process alone does."""
    if ranks.rank > 0:
        yield lambda event: None
        return
    check_run(folder, config, data, start)
    if not (folder / "data.sha256").exists():
        for name, text in (("config.json", config.to_json()), ("data.sha256", _fingerprint(data, start))):
            with atomic_write(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    path = folder / "events.jsonl"
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", buffering=1, encoding="utf-8") as log:
        log.write("\n" if cut else "")

        def emit(event: Event) -> None:
            log.write(json.dumps(event) + "\n")
            on_event(event)

        yield emit


def _differences(path: Path, config: TrainConfig) -> str | None:
    """Where the configuration in a file is another one, such as " (stages; seed 0, now 1)"; None where it is not."""
    if not path.exists() or (text := path.read_text(encoding="utf-8")) == config.to_json():
        return None
    old, new = json.loads(text), json.loads(config.to_json())
    found = [
        key if isinstance(value, (list, dict)) else f"{key} {old.get(key)}, now {value}"
        for key, value in new.items()
        if old.get(key) != value
    ]
    return f" ({'; '.join(found)})" if found else ""


def _fingerprint(data: TrainingData, start: MoESwinUNet | None) -> str:
    """A hash of the spec, of which case teaches what, and of the weights to start from; the day makes no difference."""
    spec = replace(data.spec, training={}, scores={})
    cases = [[case.name, case.expert, case.annotated_K.tolist()] for case in data.cases]
    cases += [[atlas.name, "atlas", atlas.annotated_K.tolist()] for atlas in data.atlases]
    weights = {key: value.cpu() for key, value in start.state_dict().items()} if start else {}
    return digest(spec.to_json() + json.dumps(cases), weights)


def _opened(
    config: TrainConfig,
    data: TrainingData,
    folder: Path,
    emit: Callable[[Event], None],
    ranks: Ranks,
    device: torch.device,
    start: MoESwinUNet | None,
) -> _Run:
    torch.manual_seed(config.seed)
    classes = len(data.spec.structures) + 1
    upcycled = config.stages[0].name in ("pretrain", "dense")
    first = replace(config.network, experts=1, gate="image", top_k=0) if upcycled else config.network
    network = start or MoESwinUNet(first, classes)
    bfloat16 = all(ranks.gather([bfloat16_is_faster(device)]))
    run = _Run(config, data, folder, emit, ranks, device, network.to(device), bfloat16)
    path = folder / "checkpoint.safetensors"
    if path.exists():
        run.progress, run.loaded = load_checkpoint(path)
        run.best = part_of(run.loaded, "best.")
        if run.progress.experts > 1:
            run.network = MoESwinUNet(config.network, classes).to(device)
        if run.progress.step == 0:
            run.network.load_state_dict(part_of(run.loaded, "learner."))
        stages = len(config.stages)
        emit({"event": "resumed", "stage": run.progress.stage, "stages": stages, "step": run.progress.step})
    return run


def _as_mixture(network: MoESwinUNet, config: TrainConfig) -> MoESwinUNet:
    """The network with its experts, which are copies of the dense layers as long as there was no training of them."""
    return upcycle(network.cpu(), config.network) if network.spec.experts < config.network.experts else network


def _run_stage(run: _Run, number: int) -> None:
    stage, config, progress = run.config.stages[number], run.config, run.progress
    if stage.name not in ("pretrain", "dense"):
        torch.manual_seed(config.seed)
        run.network = _as_mixture(run.network, config).to(run.device)
    progress.experts = run.network.spec.experts
    learner = _learner(run, stage)
    groups = trained_groups(learner, stage, run.data.spec, run.data.experts > 1)
    if config.optimiser == "adamw":
        groups = [{**group, "matrices": False} for group in groups]
    optimiser = Muon(groups, config.weight_decay, torch.bfloat16 if run.bfloat16 else torch.float32)
    average = AveragedModel(
        learner, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(1.0, _AVERAGED * stage.steps)), use_buffers=False
    )
    if progress.step > 0:
        restore_optimiser(optimiser, run.loaded)
        learner.load_state_dict(part_of(run.loaded, "learner."))
        average.load_state_dict(part_of(run.loaded, "average."))
    run.loaded = {}
    _steps(run, number, learner, average, optimiser)
    _finish_stage(run, learner, average)


def _steps(
    run: _Run,
    number: int,
    learner: MoESwinUNet,
    average: AveragedModel,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Takes the steps of a stage that are left, until validation has nothing more to gain."""
    stage, config, progress = run.config.stages[number], run.config, run.progress
    before = config.steps_before(number)
    sampler, augment = _sampler(run, stage), _augmenter(run, stage)
    losses_of = Objective(stage, run.data.spec, run.device, run.data.experts > 1, run.ranks.add_up)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    start, recent = time.perf_counter() - progress.seconds, _Recent(run.config, number)
    learner.train()
    for crops in prefetched(sampler.crops_at, range(before + progress.step, before + stage.steps)):
        if config.patience and progress.worse >= config.patience:
            run.emit({"event": "early stop", "stage": stage.name, "step": progress.step})
            break
        if progress.step > 0 and _asked_to_pause(run):
            _save_amid(run, learner, average, optimiser)
            _pause(run, stage)
        batch = augment(crops)  # not in the thread: on a CPU it would fight the network for the cores
        torch.manual_seed(hash((config.seed, before + progress.step, run.ranks.rank)))
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(stage, progress.step) * group.get("scale", 1.0)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
            losses = _gradients(
                run, partial(losses_of, learner, progress=progress.step / stage.steps), batch, optimiser
            )
        run.ranks.share_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimiser.step()
        average.update_parameters(learner)
        progress.step += 1
        progress.seconds = time.perf_counter() - start
        recent.add(losses, batch.names)
        last = progress.step == stage.steps
        if progress.step % _LOG_EVERY == 0 or progress.step % config.checkpoint_every == 0 or last:
            run.emit(recent.event(progress.step, progress.seconds))
        if config.validate_every and (progress.step % config.validate_every == 0 or last):
            _validate(run, stage, average.module)
            learner.train()
        if progress.step % config.checkpoint_every == 0 and not last:
            _save_amid(run, learner, average, optimiser)


def _asked_to_pause(run: _Run) -> bool:
    """Whether any process of the run saw the file; several processes ask each other now and then only."""
    if run.ranks.world > 1 and run.progress.step % _LOG_EVERY:
        return False
    return any(run.ranks.gather([(run.folder / PAUSE).exists()]))


def _pause(run: _Run, stage: Stage) -> None:
    """Ends the run behind its checkpoint.

    Raises:
        Cancelled: Always.
    """
    run.ranks.wait()
    if run.ranks.rank == 0:
        (run.folder / PAUSE).unlink(missing_ok=True)
    run.emit({"event": "paused", "stage": stage.name, "number": run.progress.stage, "step": run.progress.step})
    raise Cancelled(f"paused at step {run.progress.step} of stage {stage.name}; the same command goes on from there")


def _gradients(
    run: _Run, loss_of: Callable[[Batch], dict[str, Tensor]], batch: Batch, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The losses of a batch, and their gradients; where memory is short the batch is cut into parts."""
    while True:
        optimiser.zero_grad(set_to_none=True)
        parts = run.progress.parts
        sums: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}  # and no longer those of an attempt that failed, which hold its memory
        try:
            for first in range(parts):
                part = batch.every(first, parts)
                share = len(part.images_BSHW) / len(batch.images_BSHW)
                losses = loss_of(part)
                (share * torch.stack(list(losses.values())).sum()).backward()
                sums = {
                    key: sums.get(key, torch.zeros_like(loss)) + share * loss.detach() for key, loss in losses.items()
                }
            return sums
        except RuntimeError as error:
            short = isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _NO_MEMORY)
            if not short or run.ranks.world > 1:
                raise
            if 2 * parts > run.config.images:
                raise RuntimeError("the memory does not hold one image per modality; take a smaller crop") from error
        run.progress.parts = 2 * parts
        run.emit({"event": "memory", "parts": 2 * parts})


class _Recent:
    """Losses since the last event, on the device: asking for them at each step would wait for it."""

    def __init__(self, config: TrainConfig, number: int) -> None:
        self.config, self.number, self.stage = config, number, config.stages[number]
        self.losses: list[dict[str, Tensor]] = []
        self.names: list[tuple[str, ...]] = []

    def add(self, losses: dict[str, Tensor], names: tuple[str, ...]) -> None:
        self.losses.append(losses)
        self.names.append(names)

    def event(self, step: int, seconds: float) -> Event:
        """The means, after which it starts anew.

        Raises:
            RuntimeError: A loss is not finite.
        """
        table = {key: torch.stack([losses[key] for losses in self.losses]).tolist() for key in self.losses[0]}
        for index, names in enumerate(self.names):
            if not all(math.isfinite(values[index]) for values in table.values()):
                raise RuntimeError(
                    f"the loss is not finite at step {step - len(self.names) + index + 1} of stage {self.stage.name}; "
                    f"look at the cases {', '.join(dict.fromkeys(names))}, or lower the learning rate"
                )
        self.losses.clear()
        self.names.clear()
        return {
            "event": "step",
            "stage": self.stage.name,
            "number": self.number,
            "step": step,
            "steps": self.stage.steps,
            "overall": self.config.steps_before(self.number) + step,
            "overall_steps": self.config.steps_before(len(self.config.stages)),
            "loss": {key: round(float(np.mean(values)), 5) for key, values in table.items()},
            "seconds": round(seconds, 1),
        }


def _sampler(run: _Run, stage: Stage) -> Sampler | Synthesiser:
    config, data, ranks = run.config, run.data, run.ranks
    drawn = data.atlases if stage.name != "pretrain" else ()
    cases = data.cases if stage.name in ("pretrain", "gate") and not drawn else data.labelled
    margin = max(chances.margin(config.crop) for chances in AUGMENT.values())
    given = (config.images, config.crop, config.network.channels, config.seed, margin, ranks.rank, ranks.world)
    real = Sampler(cases, *given, pinned=run.device.type == "cuda") if cases or not drawn else None
    if real and not drawn:
        return real
    sizes = (config.images, config.crop, config.seed)
    device = "cpu" if run.device.type == "mps" else run.device  # Metal samples no volumes
    place = (ranks.rank, ranks.world, device)
    return Synthesiser(data.spec, drawn, *sizes, real, *place, gate=stage.name == "gate")


def _augmenter(run: _Run, stage: Stage) -> Augmenter:
    varied = AUGMENT_GATE if stage.name == "gate" else AUGMENT
    return Augmenter(run.data.spec, run.config.crop, varied, run.device)


def _learner(run: _Run, stage: Stage) -> MoESwinUNet:
    """What the stage trains: the network, or for pretraining one like it that gives back the image's channels."""
    if stage.name != "pretrain":
        return run.network
    torch.manual_seed(run.config.seed)
    learner = MoESwinUNet(run.network.spec, run.config.network.channels).to(run.device)
    body = {key: value for key, value in run.network.state_dict().items() if not key.startswith(_HEAD)}
    learner.load_state_dict(body, strict=False)
    return learner


def _validate(run: _Run, stage: Stage, network: torch.nn.Module) -> None:
    """Scores the averaged weights on whole volumes, in their own geometry, and keeps the best of the stage."""
    if stage.name == "pretrain" or not run.data.validation:
        return
    candidate, best = run.folder / "candidate.safetensors", run.folder / "best.safetensors"
    if run.ranks.rank == 0:
        copy = MoESwinUNet(run.network.spec, run.network.classes)
        copy.load_state_dict(network.state_dict())
        save_model(candidate, _as_mixture(copy, run.config), run.data.spec, torch.float32)
    run.ranks.wait()
    inside = run.network.spec.experts > 1 and run.network.router is None  # its blocks choose by themselves
    gated = inside or any(stage.name in ("gate", "joint") for stage in run.config.stages[: run.progress.stage + 1])
    mine = run.data.validation[run.ranks.rank :: run.ranks.world]
    drawn: list[_Seen] = []
    found = run.ranks.gather(list(_validation_scores(Predictor(candidate, str(run.device)), mine, gated, drawn)))
    for failure in (item for item in found if isinstance(item, Failure)):
        run.emit({"event": "left out", "case": failure.name, "reason": failure.reason})
    scores = [item for item in found if not isinstance(item, Failure)]
    means = {
        key: float(np.mean([dice[key] for _, dice in scores if key in dice])) for _, dice in scores for key in dice
    }
    score = float(np.mean(list(means.values()))) if means else 0.0
    better = score > run.progress.best
    run.progress.best, run.progress.worse = (score, 0) if better else (run.progress.best, run.progress.worse + 1)
    if better:
        run.best = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
    if run.ranks.rank == 0:
        if better:
            candidate.replace(best)
        candidate.unlink(missing_ok=True)
    overall = run.config.steps_before(run.progress.stage) + run.progress.step
    if run.ranks.rank == 0 and drawn:
        _draw(run.folder / "previews" / f"step_{overall}.png", drawn, run.data.spec)
    run.emit(
        {
            "event": "validated",
            "stage": stage.name,
            "number": run.progress.stage,
            "step": run.progress.step,
            "overall": overall,
            "score": round(score, 4),
            "best": better,
            "dice": {key: round(value, 4) for key, value in means.items()},
            "cases": {name: {key: round(value, 4) for key, value in dice.items()} for name, dice in scores},
        }
    )


def _validation_scores(
    predictor: Predictor, sources: Sequence[CaseSource], gated: bool, drawn: list[_Seen]
) -> Iterator[tuple[str, dict[str, float]] | Failure]:
    """Name and Dice by structure of each case, the first of which go to `drawn`.

    Until there is a gate, the right expert is named.
    """
    keys = predictor.spec.label_keys
    for source in sources:
        loaded = load_or_fail(source)
        if isinstance(loaded, Failure):
            yield loaded
            continue
        image, truth = loaded
        if truth is None:
            continue
        labels, _ = predictor(image, "auto" if gated else predictor.spec.expert_names[source.expert])
        counted = as_annotated(keys, source.annotated)
        values = np.array([0, *predictor.spec.labels_of(list(counted.values()))], np.uint8)
        if len(drawn) < _PREVIEWS:
            drawn.append((source.name, image, truth, labels))
        dice = dice_scores(values[labels.array], truth.array, len(keys))
        yield source.name, {keys[label]: value for label, value in dice.items() if keys[label] in source.annotated}


def _draw(path: Path, cases: Sequence[_Seen], spec: ModelSpec) -> None:
    """Draws what was found in validation cases, where the packages for that are installed."""
    with suppress(ImportError):
        from ..preview import Comparison, write_comparison

        write_comparison(path, [Comparison(*case) for case in cases], spec.label_keys)


def _save(run: _Run, learner: torch.nn.Module, *memory: Mapping[str, Tensor]) -> None:
    if run.ranks.rank == 0:
        tensors = {f"learner.{key}": value for key, value in learner.state_dict().items()}
        tensors |= {f"best.{key}": value for key, value in run.best.items()}
        save_checkpoint(run.folder / "checkpoint.safetensors", run.progress, tensors | dict(*memory))


def _save_amid(run: _Run, learner: torch.nn.Module, average: AveragedModel, optimiser: torch.optim.Optimizer) -> None:
    """Saves what the next step of the stage needs."""
    averages = {f"average.{key}": value for key, value in average.state_dict().items()}
    _save(run, learner, averages | optimiser_tensors(optimiser))


def _finish_stage(run: _Run, learner: MoESwinUNet, average: AveragedModel) -> None:
    """The next stage starts from the best weights of this one, or from the average where nothing was validated."""
    weights = run.best or average.module.state_dict()
    if learner is not run.network:
        weights = {**run.network.state_dict(), **{k: v for k, v in weights.items() if not k.startswith(_HEAD)}}
    run.network.load_state_dict(weights)
    run.network.eval()
    run.best = {}
    run.progress = Progress(run.progress.stage + 1, experts=run.network.spec.experts, parts=run.progress.parts)
    _save(run, run.network)
    run.ranks.wait()
