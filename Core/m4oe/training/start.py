"""Weights to start training from: a Swin transformer that knows ImageNet, a model, or a model with one expert more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..network.unet import MoESwinUNet, append_expert
from ..package import load_model
from ..spec import ModelSpec, find_model, read_spec
from .config import TrainConfig
from .data import Case
from .loop import TrainingData

_HANDICAP = 10.0  # e to its power is how much less likely the gate finds an expert that it was not trained on
_SLICES = 16
TIMM_MODEL = "swin_tiny_patch4_window7_224"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, as timm trained with


def load_swin(network: MoESwinUNet, source: str) -> None:
    """Gives a dense network the encoder of a Swin transformer, and the decoder's blocks those of equal width.

    The decoder mirrors the encoder, as in Cao et al., "Swin-Unet", 2021.

    Args:
        network: Dense, of three input channels.
        source: "timm" gets the ImageNet weights through timm, which must be installed; else a safetensors file with
            timm's names.

    Raises:
        ValueError: The weights cannot be had, or do not fit the network.
    """
    tensors = (
        _timm().create_model(TIMM_MODEL, pretrained=True).state_dict()
        if source == "timm"
        else _file_weights(Path(source))
    )
    renamed = {_our_key(key): value for key, value in tensors.items()}
    weights = {key: value for key, value in renamed.items() if key in network.state_dict()}
    if not weights or network.spec.channels != len(_MEAN):
        raise ValueError(f"{source} holds no Swin transformer for a network of {network.spec.channels} channels")
    weights |= _for_unit_intensities(weights["patch_embed.weight"], weights["patch_embed.bias"])
    last = len(network.encoder) - 2
    for number in range(len(network.decoder)):
        start = f"encoder.{last - number}."
        mirrored = {key: value for key, value in weights.items() if key.startswith(start)}
        weights |= {f"decoder.{number}.{key.removeprefix(start)}": value for key, value in mirrored.items()}
    _load(network, weights, source, "Swin-T fits a network of embed_dim 96 and window 7")


def _load(network: MoESwinUNet, weights: Mapping[str, Tensor], source: str, cure: str) -> None:
    expected = {key: list(value.shape) for key, value in network.state_dict().items()}
    for key, value in weights.items():
        if list(value.shape) != expected.get(key):
            found = f"first at {key}: {list(value.shape)}, expected {expected.get(key, 'none')}"
            raise ValueError(f"{source} does not fit the network, {found}; {cure}")
    network.load_state_dict(weights, strict=False)


def load_expert(network: MoESwinUNet, structures: Sequence[str], source: str) -> None:
    """Gives a dense network the weights of an expert of a model, and the classes that both have.

    Args:
        network: Dense.
        structures: Keys of its classes from 1 on.
        source: A model's file or name, and after a colon the expert, by default the first.

    Raises:
        ValueError: The model or the expert does not exist, or its sizes are others.
    """
    name, _, expert = source.rpartition(":") if not _is_model(source) else (source, "", "")
    model, spec = load_model(find_model(name))
    index = spec.expert_index(expert) if expert else 0
    chosen = model.select_experts(tuple(float(other == index) for other in range(spec.network.experts)))
    weights = chosen.state_dict()
    labels = [(label, spec.labels_of([key])[0]) for label, key in enumerate(structures, 1) if key in spec.structures]
    head = network.state_dict()["head.weight"].clone()
    if head.shape[1:] == weights["head.weight"].shape[1:]:
        for mine, theirs in [(0, 0), *labels]:
            head[mine] = weights["head.weight"][theirs]
    weights["head.weight"] = head
    cure = "take a preset of the model's sizes"
    _load(network, weights, source, cure)
    if missing := sorted(network.state_dict().keys() - weights.keys()):
        raise ValueError(f"{source} lacks {len(missing)} tensors of the network, first {missing[0]}; {cure}")


def check_start(source: str) -> None:
    """Refuses early what `start_network` would refuse late.

    Raises:
        ValueError: `source` is neither "timm" where that is installed, nor a file, nor an expert of a model.
    """
    name, _, expert = (source, "", "") if _is_model(source) else source.rpartition(":")
    if _is_model(name):
        if expert:
            read_spec(find_model(name)).expert_index(expert)
    elif source == "timm":
        _timm()
    elif not Path(source).is_file():
        read_spec(find_model(name or source))
    else:
        _file_weights(Path(source))


def start_network(source: str, config: TrainConfig, structures: Sequence[str]) -> MoESwinUNet:
    """A dense network of the configuration that starts from `source`, see `load_swin` and `load_expert`."""
    torch.manual_seed(config.seed)
    network = MoESwinUNet(replace(config.network, experts=1, gate="image", top_k=0), len(structures) + 1)
    if _is_model(source) or _is_model(source.rpartition(":")[0]):
        load_expert(network, structures, source)
    else:
        load_swin(network, source)
    return network


def start_addition(model: Path, data: TrainingData) -> MoESwinUNet:
    """The network of a model with the last expert of `data` appended.

    It starts as a copy of the expert that the gate prefers on the new cases, among those of the same modality if
    there are any. Where there are no cases of older experts, the gate will never prefer it by itself.
    """
    network, spec = load_model(model)
    new = data.spec.network.experts - 1
    cases = [case for case in data.labelled if case.expert == new]
    others = len(cases) < len(data.labelled)
    like = _preferred(network, spec, cases, data.spec.experts[new].modality) if network.router else 0
    return append_expert(network, like, len(data.spec.structures) + 1, 0.0 if others else _HANDICAP)


def _preferred(network: MoESwinUNet, spec: ModelSpec, cases: Sequence[Case], modality: str) -> int:
    logits_E = torch.stack([_gate_logits(network, case) for case in cases]).mean(0)
    alike = torch.tensor([expert.modality == modality for expert in spec.experts])
    return int(logits_E.masked_fill(~alike & alike.any(), float("-inf")).argmax())


@torch.inference_mode()
def _gate_logits(network: MoESwinUNet, case: Case) -> Tensor:
    """The gate's mean logits [E] over slices of a case."""
    last = len(case.image_ZHW) - 1
    reach = torch.arange(network.spec.channels) - network.spec.channels // 2
    places = torch.linspace(0, last, min(_SLICES, last + 1)).round().long()[:, None]
    stacks = torch.from_numpy(case.image_ZHW[(places + reach).clamp(0, last).numpy()])
    return network.gate_logits(stacks.float()).mean(0)


def _is_model(source: str) -> bool:
    try:
        read_spec(find_model(source))
    except ValueError:
        return False
    return True


def _our_key(key: str) -> str:
    """The name of a tensor of timm's `SwinTransformer` here."""
    key = key.replace("patch_embed.proj", "patch_embed").replace("patch_embed.norm", "patch_norm")
    key = key.replace("mlp.", "ffn.experts.0.")
    if match := re.match(r"layers\.(\d+)\.downsample\.(.*)", key):  # timm has it at the start of the next stage
        return f"merge.{int(match[1]) - 1}.{match[2]}"
    key = re.sub(r"^layers\.(\d+)\.blocks\.", r"encoder.\1.", key)
    return f"bottleneck_{key}" if key.startswith("norm.") else key


def _for_unit_intensities(weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The patch embedding for intensities in [0, 1], which timm's has normalised by ImageNet's mean and spread."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    return {"patch_embed.weight": weight / std, "patch_embed.bias": bias - (weight * mean / std).sum((1, 2, 3))}


def _timm() -> Any:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(
            f"timm cannot be imported ({error}); install it, or name a safetensors file of {TIMM_MODEL} in its place"
        ) from error
    return timm


def _file_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from error
