from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from m4oe.network.unet import MoESwinUNet
from m4oe.package import save_model
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training.start import check_start, load_expert, load_swin
from safetensors.torch import save_file
from torch.testing import assert_close

TORCHVISION = (  # what timm imports from it
    "torchvision",
    "torchvision.datasets",
    "torchvision.models.feature_extraction",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


@pytest.fixture
def timm_swin(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for name in TORCHVISION:
        monkeypatch.setitem(sys.modules, name, MagicMock())
    return pytest.importorskip("timm.models.swin_transformer").SwinTransformer


def test_timms_swin_t_gives_the_encoder_for_images_of_unit_intensity(
    timm_swin: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = timm_swin(depths=(2, 2, 6, 2), num_classes=5).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "swin.safetensors")
    ours = MoESwinUNet(NetworkSpec(depths=(2, 2, 6, 2)), 3).eval().requires_grad_(False)
    load_swin(ours, str(tmp_path / "swin.safetensors"))
    found: list[torch.Tensor] = []
    ours.bottleneck_norm.register_forward_hook(lambda _layer, _inputs, output: found.append(output))
    x = torch.rand(1, 3, 224, 224)
    ours(x)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = theirs.forward_features((x - mean[:, None, None]) / std[:, None, None])
    assert_close(found[0], expected, atol=1e-3, rtol=1e-3)


def test_the_decoder_mirrors_the_encoder_and_fewer_blocks_take_the_first(
    timm_swin: Callable[..., Any], tmp_path: Path
) -> None:
    theirs = timm_swin(depths=(2, 2, 6, 2), num_classes=0)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "swin.safetensors")
    ours = MoESwinUNet(NetworkSpec(), 3)
    load_swin(ours, str(tmp_path / "swin.safetensors"))
    for number, mirrored in enumerate((2, 1, 0)):
        for ours_key, value in ours.decoder[number].state_dict().items():
            assert torch.equal(value, ours.encoder[mirrored].state_dict()[ours_key])


def test_weights_of_another_width_are_refused(timm_swin: Callable[..., Any], tmp_path: Path) -> None:
    theirs = timm_swin(embed_dim=48, num_classes=0)
    save_file({key: value.contiguous() for key, value in theirs.state_dict().items()}, tmp_path / "swin.safetensors")
    with pytest.raises(ValueError, match="does not fit the network, first at .* expected"):
        load_swin(MoESwinUNet(NetworkSpec(), 3), str(tmp_path / "swin.safetensors"))


def test_what_is_no_swin_transformer_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no")
    for name, message in (("a", "holds no Swin transformer"), ("b", "no safetensors file"), ("c", "no safetensors")):
        with pytest.raises(ValueError, match=message):
            load_swin(MoESwinUNet(NetworkSpec(), 3), str(tmp_path / f"{name}.safetensors"))


def test_what_training_cannot_start_from_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "b.safetensors").write_bytes(b"no")
    refused = {
        "timm": "timm cannot be imported",
        "nosuch:ct": "model 'nosuch' is not installed",
        "nosuch": "model 'nosuch' is not installed",
        str(tmp_path / "b.safetensors"): "no safetensors file",
        str(tmp_path / "none.safetensors"): "none.safetensors",
    }
    for source, message in refused.items():
        with pytest.raises(ValueError, match=message):
            check_start(source)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    check_start(str(tmp_path / "a.safetensors"))


def test_without_timm_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm cannot be imported .* name a safetensors file"):
        load_swin(MoESwinUNet(NetworkSpec(), 3), "timm")


def test_a_model_of_fewer_blocks_is_refused(tmp_path: Path) -> None:
    network = NetworkSpec(experts=1, top_k=0, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0)
    rules = {"CT": IntensityRule("window", -160, 240)}
    spec = ModelSpec("tiny", "1", network, ("liver",), (ExpertSpec("ct", "CT"),), rules, 2.0, 2.0)
    save_model(tmp_path / "tiny.safetensors", MoESwinUNet(network, 2), spec)
    deeper = MoESwinUNet(replace(network, depths=(1, 2)), 2)
    with pytest.raises(
        ValueError, match=r"lacks 13 tensors of the network, first encoder\.1\.1\.attn.*; take a preset"
    ):
        load_expert(deeper, ("liver",), str(tmp_path / "tiny.safetensors"))
