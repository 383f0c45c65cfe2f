"""The command `m4oe train`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data_commands import add_sources, plan_folders
from .jobs import Cancelled
from .spec import DEFAULT_MODEL, find_model, read_spec
from .terminal import count, one_line, prepare_folder, say, score_table
from .training_run import EVENTS, SYNTHESIS, check_folder

if TYPE_CHECKING:
    from .network.unet import MoESwinUNet
    from .training.cache import CaseSource
    from .training.config import TrainConfig
    from .training.loop import TrainingData
    from .training.plan import Plan
    from .training.ranks import Ranks

Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class _Job:
    """What to train, on what, from where, and the cases to score it on."""

    config: TrainConfig
    data: TrainingData
    held_back: Sequence[CaseSource]
    start: MoESwinUNet | None = None


def add_train_command(commands: Any) -> None:
    """Adds `train` to the commands of the parser."""
    train = commands.add_parser("train", help="train a model; the same command goes on with a run that stopped")
    add_sources(train, "what to train on: a plan of m4oe data plan, or data sets, planned in OUT/plan.json", "*")
    train.add_argument("--phantoms", action="store_true", help="on computer-made phantoms instead")
    train.add_argument("--quick", action="store_true", help="in miniature, to see that training works")
    train.add_argument("--preset", choices=("small", "paper", "full"), default="small", help="default: %(default)s")
    train.add_argument("--length", type=float, default=1.0, metavar="F", help="times the preset's steps")
    train.add_argument("--pretrain", type=int, default=0, metavar="N", help="steps of pretraining without labels")
    train.add_argument("--synthesise", action="store_true", help="also draw the label maps as CT and as MR contrasts")
    train.add_argument("--init", metavar="WHAT", help="start from: timm, a file of a Swin transformer, or MODEL:EXPERT")
    train.add_argument("--add-modality", metavar="NAME", help="add the expert NAME to --model and train it alone")
    train.add_argument("--model", metavar="NAME", help=f"that gets the expert; file or name, default: {DEFAULT_MODEL}")
    train.add_argument("--name", help="of the model; default: m4oe")
    train.add_argument("--cache", type=Path, metavar="FOLDER", help="for prepared cases; default: OUT/cache")
    train.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that prepares cases; or its file")
    train.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    train.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps")
    train.add_argument("--json", action="store_true", help="print events as JSON, one per line")
    train.add_argument("--estimate", action="store_true", help="train nothing, but measure what it will take")
    train.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    train.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="folder of the run")
    train.set_defaults(run=_train, after_stop="; the same command goes on")


def _train(options: argparse.Namespace) -> int:
    from .train_report import write_report
    from .training.estimate import estimate
    from .training.loop import check_run, train
    from .training.ranks import joined_ranks, local_device
    from .training.score import score_model
    from .training.start import check_start

    _check(options)
    if options.init:
        check_start(options.init)
    check_folder(options.output)
    prepare_folder(options.output)
    device = local_device() if options.device == "auto" else options.device
    with joined_ranks() as ranks, _listener(options) as emit:
        logged = partial(_log, options.output, emit) if ranks.rank == 0 and not options.estimate else emit
        job = _phantom_job(options, logged) if options.phantoms else _plan_job(options, ranks, logged)
        if not options.estimate:
            check_run(options.output, job.config, job.data, job.start)
        if job.data.atlases and ranks.rank == 0 and not (options.estimate and _has_run(options.output)):
            _write_synthesis(options.output / SYNTHESIS, job, logged)
        if options.estimate:
            found = estimate(job.config, job.data, device, job.start)
            print(json.dumps(found) if options.json else _estimate_line(found))
            return 0
        try:
            model = train(job.config, job.data, options.output, emit, ranks, device, job.start)
        except Cancelled as pause:
            say(one_line(pause))
            return 0
        if ranks.rank == 0:
            results = score_model(model, job.held_back, logged, device, job.data.validation)
            report = write_report(options.output, results, job.held_back, device)
            logged({"event": "finished", "model": str(model), "report": str(report)})
            if not job.held_back:
                say("m4oe: warning: no case was kept from training to score the model on: put some into test or val")
            print(f"\n{score_table(read_spec(model))}\n\nmodel: {model}\nreport: {report}")
    return 0


def _has_run(folder: Path) -> bool:
    """Whether a training has begun there."""
    return (folder / "data.sha256").exists()


def _log(folder: Path, emit: Emit, event: Mapping[str, Any]) -> None:
    """Tells of an event that is not of the loop, which writes its own into the same file."""
    with (folder / EVENTS).open("a", encoding="utf-8") as log:
        log.write(json.dumps(event) + "\n")
    emit(event)


def _check(options: argparse.Namespace) -> None:
    """Refuses what does not go together.

    Raises:
        ValueError: Something does not.
    """
    if bool(options.folders) == options.phantoms:
        raise ValueError("expected a plan of m4oe data plan, folders with data sets, or --phantoms")
    if options.synthesise and (options.phantoms or options.add_modality):
        raise ValueError("--synthesise draws the label maps of a plan or of folders; leave out the other option")
    if options.add_modality and (options.phantoms or options.init or options.pretrain):
        raise ValueError("--add-modality trains on a plan or folders, from --model alone; leave out the other option")
    if options.quick and options.preset != "small":
        raise ValueError("--quick is a preset of its own; leave out --preset")
    if options.model and not options.add_modality:
        raise ValueError("--model is what --add-modality extends; to start from a model give --init MODEL:EXPERT")


def _phantom_job(options: argparse.Namespace, emit: Emit) -> _Job:
    from .training.config import DEMO, QUICK
    from .training.phantom import MODALITIES
    from .training.phantom_data import phantom_data, unseen_phantoms

    config = _with_options(QUICK if options.quick else DEMO, options)
    each, unseen = (8, 2) if options.quick else (60, 5)
    each = 1 if options.estimate else each
    _check_configuration(options, config)
    _tell(emit, config, MODALITIES, each * len(MODALITIES))
    data = phantom_data(config, each, emit)
    return _Job(config, data, unseen_phantoms(unseen), _start(options, config, data.spec.structures))


def _plan_job(options: argparse.Namespace, ranks: Ranks, emit: Emit) -> _Job:
    from .training.config import PRESETS
    from .training.plan_data import addition_config, addition_spec, held_back, plan_config, plan_data, planned_experts
    from .training.start import start_addition

    cache = options.cache or options.output / "cache"
    config = _with_options(PRESETS["quick" if options.quick else options.preset], options)
    with ranks.first_alone():
        plan = _plan(options, ranks.rank == 0)
        if not options.add_modality:
            config = plan_config(config, plan, options.synthesise)
            _check_configuration(options, config)
            _tell(emit, config, planned_experts(plan, options.synthesise), len(plan.cases("train")))
            start = _start(options, config, plan.structures)
            data = plan_data(config, plan, cache, emit, None, options.scheduler, options.synthesise)
            return _Job(config, data, held_back(plan, data.spec), start)
        model = find_model(options.model or DEFAULT_MODEL)
        config = addition_config(config, read_spec(model))
        spec = addition_spec(config, plan, read_spec(model), options.add_modality)
        _check_configuration(options, config)
        _tell(emit, config, [options.add_modality], len(plan.cases("train")))
        data = plan_data(config, plan, cache, emit, spec, options.scheduler)
        return _Job(config, data, held_back(plan, data.spec), start_addition(model, data))


def _check_configuration(options: argparse.Namespace, config: TrainConfig) -> None:
    """Refuses a folder whose run has another configuration, but to an estimate, which leaves it alone.

    Raises:
        ValueError: It has.
    """
    from .training.loop import check_run

    if not options.estimate:
        check_run(options.output, config)


def _tell(emit: Emit, config: TrainConfig, experts: Iterable[str], cases: int) -> None:
    """Says what is trained before the cases are prepared, which may take long."""
    steps = config.steps_before(len(config.stages))
    emit({"event": "training", "experts": list(experts), "cases": cases, "steps": steps})


def _start(options: argparse.Namespace, config: TrainConfig, structures: Sequence[str]) -> MoESwinUNet | None:
    from .training.start import start_network

    return start_network(options.init, config, structures) if options.init else None


def _write_synthesis(path: Path, job: _Job, emit: Emit) -> None:
    """Writes what synthetic images look like, before any time is spent on them."""
    from .preview import write_synthesis
    from .training.synthesis import Synthesiser

    config, spec = job.config, job.data.spec
    write_synthesis(path, Synthesiser(spec, job.data.atlases, config.images, config.crop, config.seed))
    emit({"event": "synthesis", "picture": str(path), "experts": spec.expert_names})


def _plan(options: argparse.Namespace, first: bool) -> Plan:
    """The plan that was named, or the one of the folders, which a run that has begun finds beside it."""
    from .training.phantom import MODALITIES
    from .training.plan import read_plan, split_remarks

    named = options.folders[0].is_file() or options.folders[0].suffix == ".json"
    path = options.folders[0] if named else options.output / "plan.json"
    drawn = MODALITIES if options.synthesise else ()
    begun = _has_run(options.output)
    if not named and begun and not path.exists():
        raise ValueError(
            f"{options.output} holds a run without plan.json; give the plan it was trained on or choose another folder"
        )
    if not named and first and not begun:
        plan_folders(options, path, drawn=drawn)
        return read_plan(path)
    plan = read_plan(path)
    if not named and first:
        made = datetime.fromtimestamp(path.stat().st_mtime)
        say(f"goes on with {path} of {made:%Y-%m-%d %H:%M}; for another plan choose another folder")
    for finding in split_remarks(plan, drawn):
        say(f"m4oe: warning: {finding.sentence}")
    return plan


def _with_options(config: TrainConfig, options: argparse.Namespace) -> TrainConfig:
    """The preset with the options' name and seed, and its stages as many times as long."""
    from .training.config import pretrained_stages

    stages = tuple(replace(stage, steps=max(1, round(options.length * stage.steps))) for stage in config.stages)
    if options.pretrain:
        stages = pretrained_stages(stages, options.pretrain)
    return replace(config, name=options.name or config.name, seed=options.seed, stages=stages)


# What is said


@contextmanager
def _listener(options: argparse.Namespace) -> Iterator[Emit]:
    """Yields what tells of events: as JSON, on a bar where stderr is a terminal, or line by line."""
    with _tensorboard(options) as log, _bar(options) as bar:

        def emit(event: Mapping[str, Any]) -> None:
            log(event)
            if options.json:
                print(json.dumps(event), flush=True)
            elif not bar(event) and (line := _line(event)):
                say(line) if event["event"] == "left out" else print(line, flush=True)

        yield emit


@contextmanager
def _bar(options: argparse.Namespace) -> Iterator[Callable[[Mapping[str, Any]], bool]]:
    """Yields what shows an event on a bar, and says whether that was enough."""
    from tqdm import tqdm

    if options.json or not sys.stderr.isatty():
        yield lambda event: False
        return
    with tqdm(unit="step", dynamic_ncols=True, leave=False) as bar:

        def show(event: Mapping[str, Any]) -> bool:
            if event["event"] == "step":
                bar.total, bar.n = event["overall_steps"], event["overall"]
                bar.set_description(event["stage"], refresh=False)
                bar.set_postfix_str(_losses(event))
            elif event["event"] != "prepared" and (line := _line(event)):  # which has a bar of its own
                bar.write(line, file=sys.stderr)
            return True

        yield show


@contextmanager
def _tensorboard(options: argparse.Namespace) -> Iterator[Emit]:
    """Yields what logs an event for TensorBoard, where that was asked for.

    Raises:
        ValueError: The package is not installed.
    """
    if not options.tensorboard:
        yield lambda event: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs a package ({error}): pip install tensorboard") from error
    with SummaryWriter(str(options.output / "tensorboard")) as writer:

        def log(event: Mapping[str, Any]) -> None:
            values = {"step": "loss", "validated": "dice"}.get(event["event"], "")
            for key, value in event.get(values, {}).items():
                writer.add_scalar(f"{event['event']}/{key}", value, event["overall"])

        yield log


def _line(event: Mapping[str, Any]) -> str:
    match event["event"]:
        case "step":
            return f"{event['stage']} {event['step']}/{event['steps']}: {_losses(event)}; {event['seconds']:.0f} s"
        case "validated":
            return f"{event['stage']} {event['step']}: validation Dice {event['score']:.3f}"
        case "left out":
            return f"m4oe: warning: {event['case']} is left out: {event['reason']}"
        case "resumed" if event["stage"] == event["stages"]:
            return "the run is finished; its model is scored again"
        case "resumed":
            return f"goes on at step {event['step']} of stage {event['stage'] + 1}"
        case "training":
            experts = f"{'experts' if len(event['experts']) > 1 else 'expert'} {', '.join(event['experts'])}"
            return f"trains {experts} on {count(event['cases'], 'case')} in {count(event['steps'], 'step')}"
        case "prepared":
            return f"preparing {event['made']}/{event['of']}"
        case "phantoms":
            return f"phantoms {event['made']}/{event['of']}"
        case "synthesis":
            return (
                f"synthetic images: {event['picture']}: pairs of rows (image, labels) for {', '.join(event['experts'])}"
            )
        case "memory":
            return f"memory is short: batches are computed in {event['parts']} parts"
        case "paused":
            return f"paused at {event['stage']} {event['step']}"
        case "early stop":
            return f"{event['stage']} {event['step']}: validation has nothing more to gain, the stage ends"
    return ""


def _estimate_line(found: Mapping[str, float]) -> str:
    hours, minutes = divmod(max(1, round(found["seconds"] / 60)), 60)
    time = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    gpu = f", {found['gpu_mib'] / 1024:.1f} GiB on the GPU" if found["gpu_mib"] else ""
    return (
        f"about {time}; memory {found['memory_mib'] / 1024:.1f} GiB{gpu}; "
        "a rough guess, timed on this machine as busy as it is"
    )


def _losses(event: Mapping[str, Any]) -> str:
    return "loss " + ", ".join(f"{key} {value:.3f}" for key, value in event["loss"].items())
