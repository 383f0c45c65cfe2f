"""The miniature training run, whole: what `m4oe train --phantoms --quick` does."""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from m4oe.__main__ import main
from m4oe.files import write_volume
from m4oe.package import load_model
from m4oe.resample import CanonicalVolume
from m4oe.spec import read_spec
from m4oe.training.phantom import MODALITIES, STRUCTURES, make_phantom

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
    assert right >= 13


def test_the_model_says_what_it_is(run: Path) -> None:
    spec = read_spec(run / "model.safetensors")
    assert "phantoms" in spec.training["data"]
    assert "no patient" in spec.limits
    assert spec.network.experts == len(spec.experts) == 4


def test_a_finished_run_goes_through_at_once(run: Path) -> None:
    steps = len(events(run, "step"))
    assert main(["train", "--phantoms", "--quick", "-o", str(run)]) == 0
    assert len(events(run, "step")) == steps


def test_a_data_set_trains_a_model_that_segments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Phantoms as files of a data set of one's own: scanned, planned, trained, scored and used."""
    for seed in range(6):
        phantom = make_phantom(seed, ("ct", "mr_t2")[seed % 2])
        name = f"{phantom.modality}{seed}"
        write_volume(tmp_path / "set" / f"{name}.nii.gz", phantom.image)
        write_volume(tmp_path / "set" / f"{name}_label.nii.gz", phantom.labels)
    rows = [f"{value},{key}" for value, key in enumerate(STRUCTURES, start=1)]
    (tmp_path / "set" / "labels.csv").write_text("\n".join(["label,name", *rows]), encoding="utf-8")
    splits = ("train", "train", "train", "train", "val", "test")
    cases = [
        f"{('ct', 'mr_t2')[n % 2]}{n},{('CT', 'MR')[n % 2]},{('ct', 'mr_t2')[n % 2]},{split}"
        for n, split in enumerate(splits)
    ]
    (tmp_path / "set" / "cases.csv").write_text("\n".join(["case,modality,expert,split", *cases]), encoding="utf-8")
    plan, run = tmp_path / "plan.json", tmp_path / "run"
    command = ["train", str(tmp_path / "set"), "--quick", "--length", "0.02", "--pretrain", "2", "-o", str(run)]
    assert main(["data", "plan", str(tmp_path / "set"), "-o", str(plan)]) == 0
    assert main(command) == 0
    assert (run / "plan.json").read_text(encoding="utf-8") == plan.read_text(encoding="utf-8")
    spec = read_spec(run / "model.safetensors")
    assert spec.expert_names == ("ct", "mr_t2") and set(spec.scores) == {"ct", "mr_t2"}
    assert spec.training["scored_on_validation"] == ["ct"]
    result = ["segment", str(tmp_path / "set" / "ct4.nii.gz"), "--model", str(run / "model.safetensors")]
    assert main([*result, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "ct4.seg.nrrd").exists()
