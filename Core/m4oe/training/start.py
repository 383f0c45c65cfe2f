"""Weights to start training from: a Swin transformer that knows ImageNet, or the dense part of another run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..network.unet import MoESwinUNet
from .config import TrainConfig

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
    tensors = _timm_weights() if source == "timm" else _file_weights(Path(source))
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
    wrong = [key for key, value in weights.items() if value.shape != network.state_dict()[key].shape]
    if wrong:
        raise ValueError(
            f"{source} does not fit the network, first at {wrong[0]}: {list(weights[wrong[0]].shape)}, expected "
            f"{list(network.state_dict()[wrong[0]].shape)}; Swin-T fits a network of embed_dim 96 and window 7"
        )
    network.load_state_dict(weights, strict=False)


def start_network(source: str, config: TrainConfig, classes: int) -> MoESwinUNet:
    """A dense network of the configuration that starts from `source`, see `load_swin`."""
    torch.manual_seed(config.seed)
    network = MoESwinUNet(replace(config.network, experts=1, top_k=0), classes)
    load_swin(network, source)
    return network


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


def _timm_weights() -> Mapping[str, Tensor]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise ValueError(
            f"timm cannot be imported ({error}); install it, or name a safetensors file of {TIMM_MODEL} in its place"
        ) from error
    return timm.create_model(TIMM_MODEL, pretrained=True).state_dict()


def _file_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from error
