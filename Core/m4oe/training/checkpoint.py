"""Checkpoints of a run: one safetensors file, replaced as a whole, from which training goes on to the last bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..package import write_tensors

_KEY = "progress"


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        stage: Number of the stage, from 0; as many as there are when all are done.
        step: Steps of it that are done.
        experts: Experts of the network, 1 while it is dense.
        parts: Parts into which a batch is cut to fit into memory.
        best: Best validation score of the stage; -1 before the first.
        worse: Validations since then.
        seconds: That the stage has taken.
    """

    stage: int = 0
    step: int = 0
    experts: int = 1
    parts: int = 1
    best: float = -1.0
    worse: int = 0
    seconds: float = 0.0


def save_checkpoint(path: Path, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Writes a checkpoint to the disk itself, so that not even a power cut leaves half of one.

    Raises:
        OSError: There is no room, or the folder cannot be written; the old checkpoint is as it was.
    """
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_tensors(path, whole, {_KEY: json.dumps(asdict(progress))}, flushed=True)


def load_checkpoint(path: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Reads a checkpoint.

    Raises:
        ValueError: The file is damaged or no checkpoint.
    """
    try:
        with safe_open(path, "pt") as file:
            progress = Progress(**json.loads((file.metadata() or {})[_KEY]))
            return progress, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of a training, or is damaged; begin in another folder") from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter, by number and name."""
    memory = optimiser.state_dict()["state"]
    return {f"optimiser.{number}.{name}": value for number, held in memory.items() for name, value in held.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Gives an optimiser back what `optimiser_tensors` took from it."""
    memory: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimiser."):
            _, number, name = key.split(".")
            memory.setdefault(int(number), {})[name] = tensor
    optimiser.load_state_dict({"state": memory, "param_groups": optimiser.state_dict()["param_groups"]})


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
