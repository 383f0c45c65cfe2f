"""A model is one file: safetensors whose header carries the `ModelSpec`. No pickle is ever loaded."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_write
from .network.unet import MoESwinUNet
from .spec import METADATA_KEY, ModelSpec, read_spec

HASH_KEY = "sha256"


def save_model(path: Path | str, network: MoESwinUNet, spec: ModelSpec, dtype: torch.dtype = torch.float16) -> None:
    """Writes the network's tensors as `dtype` and its spec; nothing is left half-written.

    Raises:
        OSError: The folder cannot be written, or there is no room.
    """
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in network.state_dict().items()}
    text = spec.to_json()
    metadata = {METADATA_KEY: text, HASH_KEY: digest(text, tensors)}
    write_tensors(path, tensors, metadata)


def write_tensors(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str], flushed: bool = False
) -> None:
    """Writes a safetensors file of tensors on the CPU, whole or not at all.

    Args:
        path: Of the file.
        tensors: By name, contiguous.
        metadata: For its header.
        flushed: Whether to wait until the disk itself has it, so that not even a power cut leaves half of one.

    Raises:
        OSError: The folder cannot be written, or there is no room; the old file is as it was.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({error}); make room and start again") from error
        if flushed:
            with temporary.open("rb+") as file:  # Windows flushes only what may be written
                os.fsync(file.fileno())


def load_model(path: Path | str, device: torch.device | str = "cpu") -> tuple[MoESwinUNet, ModelSpec]:
    """Reads a model, checks its hash, and returns its network (float32, in evaluation mode) and spec.

    Raises:
        ValueError: The file is not a model, is damaged, or its tensors do not fit its spec.
    """
    spec = read_spec(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged and cannot be used ({error}); get the file again") from error
    if metadata.get(HASH_KEY) != digest(metadata[METADATA_KEY], tensors):
        raise ValueError(f"{path} is damaged: it does not match its checksum; get the file again")
    with torch.device("meta"):
        network = MoESwinUNet(spec.network, len(spec.structures) + 1)
    _check_fit(path, network.state_dict(), tensors)
    network.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    return network.to(device).eval().requires_grad_(False), spec


def _check_fit(path: Path | str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for key in sorted(expected.keys() | found.keys()):
        shapes = [list(tensors[key].shape) if key in tensors else "nothing" for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path} does not fit its own description: {key} should be {shapes[0]}, is {shapes[1]}")


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """A hash of a text and of tensors on the CPU."""
    found = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        found.update(f"{key} {tensors[key].dtype} {list(tensors[key].shape)}".encode())
        found.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
