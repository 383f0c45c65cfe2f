"""Runs that this machine knows, and the command of a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m4oe.training_run import Run
from M4oESegmentationLib import Worker
from slicer.i18n import tr as _

from . import Data


def known() -> list[str]:
    """Folders of the runs that were started here and are still there, the newest first."""
    try:
        folders = json.loads(Worker.setting("runs", "[]"))
    except ValueError:
        return []
    return [folder for folder in folders if isinstance(folder, str) and Path(folder, "run.json").exists()]


def remember(folder: str) -> None:
    Worker.setSetting("runs", json.dumps([folder, *(other for other in known() if other != folder)]))


def forget(folder: str) -> None:
    """Takes a run out of the list; its folder stays."""
    Worker.setSetting("runs", json.dumps([other for other in known() if other != folder]))


def stateLabel(run: Run, state: str) -> str:
    """The state for people."""
    return {
        "running": _("Running"),
        "pausing": _("Pausing: writes a checkpoint"),
        "paused": _("Paused"),
        "stopping": _("Stopping: writes a checkpoint"),
        "stopped": _("Stopped"),
        "finished": _("Finished"),
        "failed": _("Failed: {words}").format(words=run.last_words() or _("it was ended from outside")),
    }[state]


def command(parameters: Any, device: str, *more: str) -> list[str]:
    """The command of a training with these choices.

    Raises:
        ValueError: A choice is missing or does not fit.
    """
    folder = str(parameters.runFolder)
    if folder in ("", "."):
        raise ValueError(_("Choose a folder for the training."))
    if not parameters.folders:
        raise ValueError(_("Add a data set first: a folder, or the open scene."))
    if Worker.place() == Worker.SSH:
        raise ValueError(_("A training runs on this machine. Choose another place in M4oE Segmentation, Advanced."))
    words = ["train", *parameters.folders, *Data.options(parameters), "-o", folder, "--device", device, "--json"]
    words += ["--quick"] if parameters.preset.value == "quick" else ["--preset", parameters.preset.value]
    words += ["--length", f"{parameters.length:g}", "--name", parameters.name.strip() or "m4oe"]
    if parameters.baseModel:
        if not parameters.expert.strip():
            raise ValueError(_("Name the expert that the model gets, such as mr_t2."))
        words += ["--add-modality", parameters.expert.strip(), "--model", parameters.baseModel]
    else:
        words += ["--pretrain", str(parameters.pretrain)] if parameters.pretrain else []
        words += ["--synthesise"] if parameters.synthesise else []
    return Worker.command(*words, *more)


def stages(parameters: Any) -> str:
    """The stages of a training with these choices and their steps, for people."""
    from m4oe.training import config

    chosen = {"quick": config.QUICK, "small": config.SMALL, "full": config.FULL}[parameters.preset.value]
    stages = config.addition_stages(chosen.stages) if parameters.baseModel else chosen.stages
    steps = [(stage.name, max(1, round(stage.steps * parameters.length))) for stage in stages]
    if parameters.pretrain and not parameters.baseModel:
        steps = [("pretrain", parameters.pretrain), *steps]
    return ", ".join(f"{name} {count:,}" for name, count in steps)


def duration(seconds: float) -> str:
    """Such as "3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return _("less than a minute")
    if minutes < 60:
        return _("{minutes} min").format(minutes=minutes)
    return _("{hours} h {minutes} min").format(hours=minutes // 60, minutes=minutes % 60)
