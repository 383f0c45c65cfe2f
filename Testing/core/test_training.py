"""The miniature training run, whole: what `m4oe train --phantoms --quick` does."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from m4oe.__main__ import main
from m4oe.network.unet import MoESwinUNet
from m4oe.package import load_model
from m4oe.resample import CanonicalVolume
from m4oe.spec import read_spec
from m4oe.training.config import QUICK, Stage
from m4oe.training.loop import _rate, _trained_parameters, train_on_phantoms
from m4oe.training.phantom import MODALITIES, make_phantom

UNSEEN = 1_000_007
BAR = 0.3  # mean Dice of the liver on unseen phantoms of all modalities


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    assert main(["train", "--phantoms", "--quick", "-o", str(folder)]) == 0
    return folder


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_the_loss_falls(run: Path) -> None:
    losses = [event["loss"]["segmentation"] for event in events(run, "step") if event["stage"] == "dense"]
    assert losses[-1] < 0.75 * losses[0]


def test_the_liver_of_unseen_phantoms_is_found(run: Path) -> None:
    scores = read_spec(run / "model.safetensors").scores
    assert statistics.mean(scores[modality]["liver"] for modality in MODALITIES) > BAR


def test_the_gate_tells_the_modalities_apart(run: Path) -> None:
    """The gate alone, without what header and HU prove; chance would be right six times."""
    network, spec = load_model(run / "model.safetensors")
    right = 0
    for seed, modality in product(range(UNSEEN, UNSEEN + 6), MODALITIES):
        rule = spec.intensity[spec.experts[spec.expert_index(modality)].modality]
        volume = CanonicalVolume(make_phantom(seed, modality).image, spec.pixel_mm, spec.slice_mm, rule)
        logits = network.gate_logits(volume.stacks(0, volume.shape[0], spec.network.channels)).mean(0)
        right += spec.expert_names[int(logits.argmax())] == modality
    assert right >= 15


def test_the_model_says_what_it_is(run: Path) -> None:
    spec = read_spec(run / "model.safetensors")
    assert "phantoms" in spec.training["data"]
    assert "no patient" in spec.limits
    assert spec.network.experts == len(spec.experts) == 4


def test_a_folder_that_holds_a_run_is_refused(run: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds"):
        train_on_phantoms(QUICK, run, print)
    assert (run / "model.safetensors").read_bytes() == before


def test_the_gate_stage_trains_the_gate_alone() -> None:
    network = MoESwinUNet(QUICK.network, 3)
    assert network.router is not None
    trained = _trained_parameters(network, Stage("gate", 1, 1e-3))
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in network.router.parameters()}


def test_the_rate_rises_to_one_and_falls_to_zero() -> None:
    rates = [_rate(step, 100) for step in range(100)]
    assert rates.index(max(rates)) == 4
    assert max(rates) == 1
    assert rates[-1] < 0.01


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of dense, experts, gate, joint"):
        Stage("pretrain", 1, 1e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(QUICK, phantoms=1, stages=(Stage("dense", 20, 1e-3),))
    monkeypatch.setattr("m4oe.training.loop.segmentation_loss", lambda scores, *rest: scores.sum() * torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        train_on_phantoms(config, tmp_path / "run", lambda event: None)
