"""What a training will take, measured: a few steps of each stage and a validation, in a folder that is thrown away."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from ..network.unet import MoESwinUNet
from .config import TrainConfig
from .loop import TrainingData, train
from .ranks import Ranks

_STEPS = 3  # of each stage


def estimate(
    config: TrainConfig, data: TrainingData, device: str = "auto", start: MoESwinUNet | None = None
) -> dict[str, float]:
    """Seconds of the whole training, and peak memory of this process and of the GPU in MiB.

    The first steps of a process are slow, so a short training is over-estimated.
    """
    stages = tuple(replace(stage, steps=min(stage.steps, _STEPS)) for stage in config.stages)
    few = replace(config, stages=stages, validate_every=_STEPS, patience=0, checkpoint_every=_STEPS)
    one = replace(data, validation=data.validation[:1] if config.validate_every else ())
    seconds = 0.0
    last = time.perf_counter()

    def watch(event: dict[str, Any]) -> None:
        nonlocal seconds, last
        now = time.perf_counter()
        stage = config.stages[event.get("number", 0)]
        if event["event"] == "step":
            seconds += event["seconds"] / event["step"] * stage.steps
        elif event["event"] == "validated":
            seconds += (now - last) * ceil(stage.steps / config.validate_every) * len(data.validation)
        last = now

    with TemporaryDirectory(prefix="m4oe-") as folder:
        train(few, one, Path(folder), watch, Ranks(), device, start)
    gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {"seconds": round(seconds, 1), "memory_mib": round(_peak_mib()), "gpu_mib": round(gpu)}


def _peak_mib() -> float:
    """The most memory that this process ever had."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
