"""Runs that this machine knows, and the command of a new one."""

from __future__ import annotations

import filecmp
import json
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import slicer.util
from m4oe.training_run import ACTIVE, ERROR, EVENTS, SYNTHESIS, Run, check_folder
from M4oESegmentationLib import Models, Worker
from M4oESegmentationLib.Process import Process
from slicer.i18n import tr as _

from . import Data

_CHECKPOINT = "checkpoint.safetensors"
_PROBE = "from importlib.util import find_spec as f; s = f('torch'); raise SystemExit(0 if s and s.origin else 3)"
# What an attempt or an estimate leaves, of its choices
_PREPARED = ("plan.json", "config.json", "data.sha256", SYNTHESIS, EVENTS)


def known() -> list[str]:
    """Folders of the runs that were started here and are still there, the newest first."""
    return [folder for folder in _listed() if _isRun(folder)]


def entries() -> list[tuple[str, str]]:
    """What to call the known runs, and their folders."""
    text = _("{name} in {folder}")
    return [(text.format(name=Path(folder).name, folder=Path(folder).parent), folder) for folder in known()]


def remember(folder: str) -> None:
    """Puts a run before the others."""
    _list([folder, *(other for other in _listed() if other != folder)])


def forget(folder: str) -> None:
    """Takes a run out of the list; its folder stays."""
    _list([other for other in _listed() if other != folder])


def _listed() -> list[str]:
    """All runs in the settings, also those on a drive that is away."""
    try:
        folders = json.loads(Worker.setting("runs", "[]"))
    except ValueError:
        return []
    return [folder for folder in folders if isinstance(folder, str)]


def _list(folders: list[str]) -> None:
    Worker.setSetting("runs", json.dumps(folders))


def _isRun(folder: str) -> bool:
    try:
        Run(folder)
    except ValueError:
        return False
    return True


def stateLabel(run: Run, state: str) -> str:
    """The state for people."""
    if state == "failed":
        said, error, why = run.last_words().partition(ERROR)
        text = _("Failed: {why}").format(why=why or _("it was ended from outside, or crashed"))
        text += "\n" + _("It said last: {said}").format(said=said.strip()) if said and not error else ""
        if hasBegun(run.folder):
            return f"{text}\n" + _("Resume goes on from its last checkpoint.")
        return f"{text}\n" + _(
            "If choices in this panel were wrong, mend them and press Start, with the same folder; "
            "Resume repeats the training with its old choices."
        )
    return {
        "running": _("Running"),
        "pausing": _("Pausing: writes a checkpoint"),
        "paused": _("Paused; Resume goes on"),
        "stopping": _("Stopping: writes a checkpoint"),
        "stopped": _("Stopped; Resume goes on"),
        "finished": _("Finished"),
    }[state]


def hasBegun(folder: str | Path) -> bool:
    """Whether a training has learned something in the folder."""
    return Path(folder, _CHECKPOINT).exists()


def makeWay(folder: str) -> None:
    """Takes away what was prepared in a folder with choices that may have changed; prepared cases are used again.

    Raises:
        ValueError: The folder has a training that is under way or has learned something, or holds something else.
    """
    if _isRun(folder):
        if Run(folder).state() in ACTIVE:
            raise ValueError(_("The training in {folder} is under way. Choose another folder.").format(folder=folder))
        if hasBegun(folder):
            remember(folder)
            text = _(
                "{folder} holds a training that has begun with its own choices. To go on with it, choose it under Runs "
                "and press Resume; for another one choose an empty folder."
            )
            raise ValueError(text.format(folder=folder))
    check_folder(Path(folder))  # a data set may have files of these names
    if not hasBegun(folder):
        for path in [Path(folder, name) for name in _PREPARED]:
            if path.exists():
                path.unlink()


def command(parameters: Any, device: str, *more: str) -> list[str]:
    """The command of a training with these choices.

    Raises:
        ValueError: A choice is missing or does not fit, or the Python that trains has no PyTorch.
    """
    folder = parameters.runFolder
    if folder in ("", "."):  # a dot is what older scenes hold
        raise ValueError(_("Choose a folder for the training."))
    if not parameters.folders:
        raise ValueError(_("Add a data set first: a folder, or the open scene."))
    if parameters.baseModel and not parameters.expert.strip():
        raise ValueError(_("Name the expert that the model gets under Data, Expert, such as mr_dixon."))
    name = parameters.name.strip() or "m4oe"
    whole = Worker.localCommand("train", *choices(parameters, device), "--name", name, "--json", *more)
    _checkTorch()
    return whole


def choices(parameters: Any, device: str) -> list[str]:
    """What an estimate depends on, as words of the command."""
    words = [*parameters.folders, *Data.options(parameters), "-o", parameters.runFolder, "--device", device]
    words += ["--quick"] if parameters.preset.value == "quick" else ["--preset", parameters.preset.value]
    words += ["--length", f"{parameters.length:g}"]
    if parameters.baseModel:
        return [*words, "--add-modality", parameters.expert.strip(), "--model", parameters.baseModel]
    words += ["--pretrain", str(parameters.pretrain)] if parameters.pretrain else []
    return [*words, "--synthesise"] if parameters.synthesise else words


def _checkTorch() -> None:
    # A Python that does not even start is told by its start.
    with slicer.util.WaitCursor(), suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(
            [Worker.python(), "-P", "-c", _PROBE],
            env=Worker.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
            check=False,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        if found.returncode == 3:
            raise ValueError(
                _("Slicer's Python has no PyTorch. Press Install in M4oE Segmentation, Installation and doctor.")
                if Worker.place() == Worker.SLICER
                else _(
                    "{python} has no PyTorch. Install it there (python -m pip install torch), or choose another Python "
                    "in M4oE Segmentation, Advanced."
                ).format(python=Worker.python())
            )


def offer(model: Path) -> str:
    """Copies a model to those that M4oE Segmentation offers, where it is not there yet; what to tell the user.

    Raises:
        ValueError: It is no model, or another one of its name is there.
        OSError: It cannot be copied.
    """
    from m4oe.spec import read_spec

    name = read_spec(model).name
    path = Path(Models.modelFolder(), f"{name}.safetensors")
    if not path.exists() or not filecmp.cmp(model, path, shallow=False):
        Models.importModel(str(model), name)
    return _("M4oE Segmentation offers the model: {path}").format(path=path)


def estimate(process: Process) -> str:
    """What a training with --estimate has found, as a sentence.

    Raises:
        RuntimeError: It failed.
    """
    lines = [line for line in process.lines() if line.startswith('{"seconds"')]
    if process.code or not lines:
        raise RuntimeError(process.lastWords())
    found = json.loads(lines[-1])
    gpu = _(", {size:.1f} GiB on the GPU").format(size=found["gpu_mib"] / 1024) if found["gpu_mib"] else ""
    return _("It takes {time}; memory {size:.1f} GiB{gpu}").format(
        time=duration(found["seconds"]), size=found["memory_mib"] / 1024, gpu=gpu
    )


def stages(parameters: Any, experts: int) -> str:
    """The stages of a training with these choices and their steps, for people.

    Args:
        parameters: The choices.
        experts: How many the data have; 0 where that is not known.
    """
    from m4oe.training.config import PRESETS, addition_stages, pretrained_stages

    stages = PRESETS[parameters.preset.value].stages
    alone = experts == 1 and not parameters.synthesise  # which adds experts of its own
    if parameters.baseModel:
        stages = addition_stages(stages)
    elif alone:
        stages = tuple(stage for stage in stages if stage.name != "gate")
    stages = tuple(replace(stage, steps=max(1, round(stage.steps * parameters.length))) for stage in stages)
    if parameters.pretrain and not parameters.baseModel:
        stages = pretrained_stages(stages, parameters.pretrain)
    text = ", ".join(f"{stage.name} {stage.steps:,}" for stage in stages)
    known = experts or parameters.synthesise or parameters.baseModel or "gate" not in text
    return text if known else _("{stages} (gate: only for several experts)").format(stages=text)


def duration(seconds: float) -> str:
    """Such as "about 3 h 20 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return _("less than a minute")
    if minutes < 60:
        return _("about {minutes} min").format(minutes=minutes)
    return _("about {hours} h {minutes} min").format(hours=minutes // 60, minutes=minutes % 60)
