"""The training loop on cases of a few voxels: stages, checkpoints, validation, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from m4oe import package
from m4oe.geometry import Grid, Volume
from m4oe.jobs import Cancelled
from m4oe.network.unet import MoESwinUNet
from m4oe.package import load_model
from m4oe.predictor import Predictor
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec, read_spec
from m4oe.train_report import read_events
from m4oe.training import loop as module
from m4oe.training import score, stages
from m4oe.training.augment import Augmenter
from m4oe.training.cache import CaseSource
from m4oe.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from m4oe.training.config import Stage, TrainConfig
from m4oe.training.data import Batch, Sampler, make_case
from m4oe.training.loop import TrainingData, train
from m4oe.training.ranks import Ranks, joined_ranks, local_device
from m4oe.training.stages import learning_rate, trained_groups
from m4oe.training_run import PAUSE
from safetensors.torch import load_file
from torch import Tensor

NETWORK = NetworkSpec(
    experts=2, top_k=1, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0, drop_path=0.1
)
CONFIG = TrainConfig(
    name="tiny",
    network=NETWORK,
    pixel_mm=2.0,
    slice_mm=2.0,
    crop=16,
    images=2,
    stages=(Stage("dense", 6, 1e-3), Stage("experts", 6, 1e-3), Stage("gate", 4, 1e-2), Stage("joint", 4, 1e-3)),
    checkpoint_every=2,
)
SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=replace(NETWORK, drop_path=0.0),
    structures=("liver", "spleen"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr_t1", "MR")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=2.0,
)


def of(network: NetworkSpec) -> ModelSpec:
    return replace(SPEC, network=replace(network, drop_path=0.0))


def a_pair(expert: int, seed: int) -> tuple[Volume, Volume]:
    """Noise with two bright boxes: liver and spleen."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((4, 20, 20), np.uint8)
    labels[1:3, 4:12, 4:10], labels[1:3, 4:12, 13:18] = 1, 2
    image = rng.normal(-40 if expert == 0 else 200, 10, labels.shape) + 100 * labels
    grid = Grid(labels.shape, np.diag([-2.0, -2.0, 2.0, 1.0]))
    modality = ("CT", "MR")[expert]
    return Volume(image.astype(np.int16), grid, f"{modality}{seed}", modality), Volume(labels, grid)


def some_data(validation: bool = False) -> TrainingData:
    pairs = [(expert, seed) for expert in (0, 1) for seed in (1, 2)]
    cases = [make_case(*a_pair(*pair), SPEC.structures, SPEC, pair[0]) for pair in pairs]
    sources = [
        CaseSource(f"unseen{expert}", expert, SPEC.structures, (), lambda expert=expert: a_pair(expert, 9))
        for expert in (0, 1)
    ]
    return TrainingData(SPEC, cases, sources if validation else ())


def run(folder: Path, config: TrainConfig = CONFIG, data: TrainingData | None = None, **more: Any) -> list[Any]:
    torch.set_num_threads(1)
    events: list[Any] = []
    train(config, data or some_data(), folder, events.append, device="cpu", **more)
    return events


def losses(folder: Path) -> dict[tuple[str, int], Any]:
    """The last word of each step."""
    lines = map(json.loads, (folder / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["stage"], line["step"]): line["loss"] for line in lines if line["event"] == "step"}


def assert_same_model(*folders: Path) -> None:
    """To the last bit; the order of a file's metadata is not fixed."""
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


class Stopped(Exception):
    """In the place of a power cut."""


def stop_at(stage: str, step: int) -> Callable[[Any], None]:
    def watch(event: Any) -> None:
        if event["event"] == "step" and (event["stage"], event["step"]) == (stage, step):
            raise Stopped

    return watch


# ---- checkpoints


@pytest.mark.parametrize(("stage", "step"), [("dense", 2), ("dense", 6), ("experts", 4), ("gate", 4), ("joint", 2)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, stage: str, step: int) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(CONFIG, some_data(), tmp_path / "stopped", stop_at(stage, step), device="cpu")
    events = run(tmp_path / "stopped")
    assert (step == 2 and stage == "dense") or events[0]["event"] == "resumed"
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_same_model(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_by_adamw_alone_goes_on_as_well(tmp_path: Path) -> None:
    config = replace(CONFIG, optimiser="adamw", stages=(Stage("dense", 8, 1e-2),))
    run(tmp_path / "whole", config)
    with pytest.raises(Stopped):
        train(config, some_data(), tmp_path / "stopped", stop_at("dense", 6), device="cpu")
    run(tmp_path / "stopped", config)
    assert_same_model(tmp_path / "stopped", tmp_path / "whole")
    run(tmp_path / "muon", replace(config, optimiser="muon"))
    assert losses(tmp_path / "muon")["dense", 8] != losses(tmp_path / "whole")["dense", 8]


def test_the_time_of_a_stage_goes_on_where_it_was(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(CONFIG, some_data(), tmp_path, stop_at("dense", 4), device="cpu")
    path = tmp_path / "checkpoint.safetensors"
    progress, tensors = load_checkpoint(path)
    save_checkpoint(path, replace(progress, seconds=1000.0), tensors)
    seconds = {(event["stage"], event["step"]): event["seconds"] for event in run(tmp_path) if event["event"] == "step"}
    assert seconds["dense", 6] > 1000 > seconds["experts", 2]


KILLED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import test_loop
def slowly(event):
    print(event, flush=True)
test_loop.torch.set_num_threads(1)
test_loop.train(test_loop.CONFIG, test_loop.some_data(), pathlib.Path({folder!r}), slowly, device="cpu")
"""


def test_a_run_that_was_paused_ends_as_one_that_was_not(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    folder = tmp_path / "paused"

    def ask(event: Any) -> None:
        if (event["event"], event.get("stage"), event.get("step")) == ("step", "experts", 4):
            (folder / PAUSE).touch()

    with pytest.raises(Cancelled, match="paused at step 4 of stage experts"):
        train(CONFIG, some_data(), folder, ask, device="cpu")
    assert json.loads((folder / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1])["event"] == "paused"
    assert not (folder / PAUSE).exists()
    assert run(folder)[0] == {"event": "resumed", "stage": 1, "stages": 4, "step": 4}
    assert_same_model(tmp_path / "whole", folder)


def test_a_killed_process_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "'experts'" in line and "'step': 4" in line:
                process.kill()
    assert process.returncode == -signal.SIGKILL
    events = run(tmp_path / "killed")
    assert events[0] == {"event": "resumed", "stage": 1, "stages": 4, "step": 2}
    run(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_run_whose_last_event_was_cut_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    run(tmp_path)
    whole = read_events(log)
    log.write_bytes(log.read_bytes()[:-40])
    run(tmp_path)
    assert read_events(log) == [{"event": "resumed", "stage": 4, "stages": 4, "step": 0}, *whole[:-1]]


def test_a_start_that_was_stopped_leaves_no_half_of_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[:9].encode(encoding))
        raise Stopped

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(Stopped):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    assert [event["event"] for event in run(tmp_path)] == ["resumed"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"another configuration \(stages; seed 0, now 1\); choose another folder"):
        run(tmp_path, replace(CONFIG, seed=1, stages=CONFIG.stages[:1]))


def test_a_run_on_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path, data=replace(some_data(), spec=replace(SPEC, training={"date": "2026-01-01"})))
    assert [event["event"] for event in run(tmp_path)] == ["resumed"]  # on another day
    swapped = replace(SPEC, structures=("spleen", "liver"))
    for other in (replace(some_data(), spec=swapped), replace(some_data(), cases=some_data().cases[:3])):
        with pytest.raises(ValueError, match="a run on other data; choose another folder or give it the same data"):
            run(tmp_path, data=other)
    with pytest.raises(ValueError, match="on other data"):
        run(tmp_path, start=MoESwinUNet(replace(NETWORK, experts=1, top_k=0), 3))


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path)


def test_a_checkpoint_reaches_the_disk_on_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There only a file that is open for writing can be flushed; writing nothing asks for the same."""
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", lambda number: flushed.append(os.write(number, b"")))
    save_checkpoint(tmp_path / "checkpoint.safetensors", Progress(), {"a": torch.ones(2)})
    assert flushed == [0]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = package.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if '"stage": 1' in metadata.get("progress", ""):
            Path(path).write_bytes(b"half")
            raise OSError("No space left on device")
        saved(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(package, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "full")
    assert load_checkpoint(tmp_path / "full" / "checkpoint.safetensors")[0].step == 4
    run(tmp_path / "full")
    run(tmp_path / "whole")
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


# ---- stages


def test_the_loss_falls(tmp_path: Path) -> None:
    config = replace(CONFIG, stages=(Stage("dense", 80, 1e-2),))
    run(tmp_path, config)
    by_step = losses(tmp_path)
    assert by_step["dense", 80]["segmentation"] < 0.7 * by_step["dense", 2]["segmentation"]


def test_pretraining_needs_no_labels_and_its_loss_falls(tmp_path: Path) -> None:
    cases = [replace(case, labels_ZHW=None, slices_of={}) for case in some_data().cases]
    config = replace(CONFIG, stages=(Stage("pretrain", 80, 1e-2),))
    run(tmp_path, config, TrainingData(SPEC, cases))
    by_step = losses(tmp_path)
    assert by_step["pretrain", 80]["reconstruction"] < 0.7 * by_step["pretrain", 2]["reconstruction"]


def test_pretrained_weights_are_where_training_starts(tmp_path: Path) -> None:
    config = replace(CONFIG, stages=(Stage("pretrain", 4, 1e-2), Stage("dense", 1, 1e-9)))
    run(tmp_path, config)
    learned, _ = load_model(tmp_path / "model.safetensors")
    torch.manual_seed(config.seed)
    fresh = MoESwinUNet(replace(NETWORK, experts=1, top_k=0), 3).state_dict()
    state = learned.state_dict()
    torch.testing.assert_close(state["head.weight"], fresh["head.weight"], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(state["patch_embed.weight"], fresh["patch_embed.weight"], atol=1e-3)


def test_the_gate_stage_trains_the_gate_alone() -> None:
    network = MoESwinUNet(NETWORK, 3)
    assert network.router is not None
    (group,) = trained_groups(network, Stage("gate", 1, 1e-3), SPEC, True)
    trained = group["params"]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in network.router.parameters()}


def test_experts_start_as_copies_and_part_by_modality(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, stages=(Stage("dense", 2, 1e-3), Stage("experts", 1, 1e-2))))
    network, _ = load_model(tmp_path / "model.safetensors")
    first, second = (torch.cat([p.flatten() for p in network.expert_parameters(index)]) for index in (0, 1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=0.1, rtol=0)


def test_in_joint_training_the_gate_weighs_the_experts_ever_more_sparsely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    whole = MoESwinUNet.forward_gated

    def watched(network: MoESwinUNet, images: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        asked.append(temperature)
        return whole(network, images, temperature)

    monkeypatch.setattr(MoESwinUNet, "forward_gated", watched)
    run(tmp_path / "sparse", replace(CONFIG, stages=(Stage("joint", 4, 1e-3),)))
    assert asked == pytest.approx([1, 0.1**0.25, 0.1**0.5, 0.1**0.75])
    asked.clear()
    run(tmp_path / "soft", replace(CONFIG, network=replace(NETWORK, top_k=0), stages=(Stage("joint", 2, 1e-3),)))
    assert asked == [1, 1]


def test_in_joint_training_the_segmentation_teaches_the_gate_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "gate_loss", lambda logits, *rest: 0 * logits.sum())
    run(tmp_path, replace(CONFIG, stages=(Stage("joint", 2, 1e-2),)))
    learned, _ = load_model(tmp_path / "model.safetensors")
    torch.manual_seed(CONFIG.seed)
    fresh = MoESwinUNet(NETWORK, 3)
    assert learned.router and fresh.router
    assert not torch.allclose(learned.router.score.weight, fresh.router.score.weight, atol=1e-3)


def test_half_of_the_images_tell_the_gate_their_modality() -> None:
    sampler = Sampler(some_data().cases, 64, 16, 3, 0)
    batch = Augmenter(SPEC, 16)(sampler.crops_at(0))
    assert 0.3 < float(batch.told_B.float().mean()) < 0.7


@pytest.mark.parametrize("gate", ["image", "token", "channel"])
def test_a_mixture_can_be_trained_from_the_start(tmp_path: Path, gate: str) -> None:
    network = replace(NETWORK, gate=gate)
    config = replace(CONFIG, network=network, stages=(Stage("experts", 2, 1e-3), Stage("joint", 2, 1e-3)))
    with pytest.raises(Stopped):
        train(config, replace(some_data(), spec=of(network)), tmp_path / "stopped", stop_at("joint", 2), device="cpu")
    for folder in ("stopped", "whole"):
        run(tmp_path / folder, config, replace(some_data(), spec=of(network)))
    assert_same_model(tmp_path / "stopped", tmp_path / "whole")
    image, _ = a_pair(0, 5)
    labels, report = Predictor(tmp_path / "whole" / "model.safetensors", "cpu")(image)
    assert labels.array.shape == image.array.shape
    assert report.chosen_by == ("modality" if gate == "image" else "model")


def test_a_token_gate_starts_from_a_dense_network(tmp_path: Path) -> None:
    network = replace(NETWORK, gate="token")
    config = replace(CONFIG, network=network, stages=(Stage("dense", 2, 1e-3), Stage("joint", 2, 1e-3)))
    run(tmp_path, config, replace(some_data(), spec=of(network)))
    assert load_model(tmp_path / "model.safetensors")[0].spec.gate == "token"


@pytest.mark.parametrize(
    ("gate", "stages", "message"),
    [
        ("token", ("experts", "gate"), "a token gate is trained with the experts; leave out the stage gate"),
        ("channel", ("dense", "joint"), "a channel gate cannot start from a dense network; begin with"),
    ],
)
def test_stages_that_do_not_fit_the_gate_are_refused(gate: str, stages: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, network=replace(NETWORK, gate=gate), stages=tuple(Stage(name, 1, 1e-3) for name in stages))


def test_the_rate_rises_to_one_and_falls_to_zero() -> None:
    rates = [learning_rate(Stage("dense", 100, 1.0), step) for step in range(100)]
    assert rates.index(max(rates)) == 4
    assert max(rates) == 1
    assert rates[-1] < 0.01


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of pretrain, dense, experts, gate, joint"):
        Stage("warm", 1, 1e-3)


@pytest.mark.parametrize("names", [("dense", "pretrain"), ("experts", "dense"), ()])
def test_stages_out_of_order_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="out of order"):
        replace(CONFIG, stages=tuple(Stage(name, 1, 1e-3) for name in names))


# ---- validation


def test_the_best_weights_of_a_stage_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, states = iter([0.5, 0.9, 0.2]), []

    def scored(predictor: Any, sources: Any, gated: bool, drawn: Any) -> list[Any]:
        states.append({key: value.clone() for key, value in predictor.network.state_dict().items()})
        return [("a", {"liver": next(scores)})]

    monkeypatch.setattr(module, "_validation_scores", scored)
    monkeypatch.setattr("m4oe.predictor.bfloat16_is_faster", lambda device: False)
    config = replace(CONFIG, stages=(Stage("dense", 6, 1e-2),), validate_every=2)
    events = run(tmp_path, config, some_data(validation=True))
    assert [event["best"] for event in events if event["event"] == "validated"] == [True, True, False]
    kept, best = load_model(tmp_path / "model.safetensors")[0], load_model(tmp_path / "best.safetensors")[0]
    expected = states[1]["head.weight"]
    assert torch.equal(best.state_dict()["head.weight"], expected)
    assert torch.equal(kept.state_dict()["head.weight"], expected.half().float())
    assert not torch.equal(states[2]["head.weight"], expected)


def test_a_stage_ends_when_nothing_is_gained_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_validation_scores", lambda *given: [("a", {"liver": 0.5})])
    config = replace(CONFIG, stages=(Stage("dense", 40, 1e-3),), validate_every=2, patience=3)
    events = run(tmp_path, config, some_data(validation=True))
    assert events[-1] == {"event": "early stop", "stage": "dense", "step": 8}


def test_a_run_that_was_stopped_as_a_stage_ended_early_takes_no_step_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(event: Any) -> None:
        if event["event"] == "early stop":
            raise Stopped

    monkeypatch.setattr(module, "_validation_scores", lambda *given: [("a", {"liver": 0.5})])
    config = replace(CONFIG, stages=(Stage("dense", 40, 1e-3),), validate_every=2, patience=3)
    with pytest.raises(Stopped):
        train(config, some_data(validation=True), tmp_path, watch, device="cpu")
    events = run(tmp_path, config, some_data(validation=True))
    assert events == [
        {"event": "resumed", "stage": 0, "stages": 1, "step": 8},
        {"event": "early stop", "stage": "dense", "step": 8},
    ]


def test_validation_segments_whole_volumes_on_their_own_grid(tmp_path: Path) -> None:
    config = replace(CONFIG, stages=(Stage("dense", 60, 1e-2),), validate_every=60)
    events = run(tmp_path, config, some_data(validation=True))
    validated = next(event for event in events if event["event"] == "validated")
    assert set(validated["cases"]) == {"unseen0", "unseen1"} and set(validated["dice"]) == {"liver", "spleen"}
    assert validated["score"] == pytest.approx(np.mean(list(validated["dice"].values())), abs=1e-3)


class Tumours:
    """In the place of a predictor: finds all of the liver, and in it a tumour that the truth calls liver."""

    def __init__(self, *given: Any) -> None:
        self.spec = replace(SPEC, structures=("liver", "liver_tumor"))

    def __call__(self, image: Volume, expert: str = "auto") -> tuple[Volume, Any]:
        labels = a_pair(0, 9)[1].array
        labels[labels == 2], labels[1:3, 6:8, 6:8] = 0, 2
        return Volume(labels, image.grid), SimpleNamespace(gate={})


def the_whole_liver() -> tuple[Volume, Volume]:
    image, labels = a_pair(0, 9)
    return image, Volume(labels.array * (labels.array == 1), labels.grid)


def test_a_tumour_is_liver_where_the_case_annotates_no_tumours() -> None:
    source = CaseSource("a", 0, ("liver",), (), the_whole_liver)
    assert list(module._validation_scores(Tumours(), [source], True, [])) == [("a", {"liver": 1})]
    (result,) = score._results(Tumours(), [source], print)
    assert result.dice == {"liver": 1}


@pytest.mark.parametrize(("gate", "asked"), [("image", [False, True]), ("token", [True] * 2), ("channel", [True] * 2)])
def test_validation_lets_gates_inside_the_network_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: str, asked: list[bool]
) -> None:
    found: list[bool] = []
    whole = module._validation_scores
    monkeypatch.setattr(module, "_validation_scores", lambda *given: found.append(given[2]) or whole(*given))
    network, stages = replace(NETWORK, gate=gate), (Stage("experts", 2, 1e-3), Stage("joint", 2, 1e-3))
    config = replace(CONFIG, network=network, stages=stages, validate_every=2)
    run(tmp_path, config, replace(some_data(validation=True), spec=of(network)))
    assert found == asked


def unreadable() -> Any:
    raise ValueError("Cannot read it")


def test_a_case_that_cannot_be_read_is_told_and_stops_neither_training_nor_scoring(tmp_path: Path) -> None:
    config, data = replace(CONFIG, stages=(Stage("dense", 2, 1e-2),), validate_every=2), some_data(validation=True)
    sources = [CaseSource("bad", 0, SPEC.structures, (), unreadable), *data.validation]
    left_out = {"event": "left out", "case": "bad", "reason": "Cannot read it"}
    events = run(tmp_path, config, replace(data, validation=sources))
    assert left_out in events
    assert set(next(event for event in events if event["event"] == "validated")["cases"]) == {"unseen0", "unseen1"}
    scored: list[Any] = []
    path = tmp_path / "model.safetensors"
    results = score.score_model(path, sources, scored.append, "cpu", data.validation)
    assert all(result.chose_weights for result in results)
    assert read_spec(path).training["scored_on_validation"] == sorted({result.expert for result in results})
    assert scored[0] == left_out and [result.case for result in results] == ["unseen0", "unseen1"]


def test_a_run_with_validation_resumes_to_the_same_end(tmp_path: Path) -> None:
    config = replace(CONFIG, stages=(Stage("dense", 6, 1e-2), Stage("experts", 4, 1e-2)), validate_every=2)
    run(tmp_path / "whole", config, some_data(validation=True))
    with pytest.raises(Stopped):
        train(config, some_data(validation=True), tmp_path / "stopped", stop_at("experts", 4), device="cpu")
    run(tmp_path / "stopped", config, some_data(validation=True))
    assert_same_model(tmp_path / "stopped", tmp_path / "whole")


def test_validation_changes_nothing_in_the_training(tmp_path: Path) -> None:
    config = replace(CONFIG, stages=(Stage("dense", 6, 1e-2),))
    run(tmp_path / "without", config, some_data(validation=True))
    run(tmp_path / "with", replace(config, validate_every=2), some_data(validation=True))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


# ---- the device


@pytest.mark.parametrize("name", ["pretrain", "dense", "experts", "gate", "add"])
def test_no_loss_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """On the device `meta`, which computes nothing and has no autocast, every look at a value fails."""
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: nullcontext())
    device, stage = torch.device("meta"), Stage(name, 1, 1e-3)
    with device:
        experts = 1 if name in ("pretrain", "dense") else 2
        network = MoESwinUNet(replace(NETWORK, experts=experts, top_k=1, drop_path=0.0), 3)
    objective = stages.Objective(stage, SPEC, device, True, lambda tensor: tensor)
    batch = Augmenter(SPEC, 16, device=device)(Sampler(some_data().cases, 2, 16, 3, 0).crops_at(0))
    if name == "pretrain":
        network.head = torch.nn.Linear(NETWORK.embed_dim, 3, bias=False, device=device)
    loss = torch.stack(list(objective(network, batch, 0.5).values())).sum()
    loss.backward()
    assert loss.is_meta


# ---- trouble


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(scores: Tensor, *rest: Any) -> Tensor:
        return scores.sum() * torch.nan

    monkeypatch.setattr(stages, "segmentation_loss", poisoned)
    with pytest.raises(RuntimeError, match="not finite at step 1 of stage dense; look at the cases .*CT[12].*MR[12]"):
        run(tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_short_memory_cuts_the_batch_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stages.segmentation_loss

    def greedy(scores: Tensor, *rest: Any) -> Tensor:
        if len(scores) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(scores, *rest)

    monkeypatch.setattr(stages, "segmentation_loss", greedy)
    events = run(tmp_path)
    assert [event for event in events if event["event"] == "memory"] == [{"event": "memory", "parts": 2}]
    assert (tmp_path / "model.safetensors").exists()


class Short(torch.autograd.Function):
    """Has no memory for the first backward pass, and keeps something large for each."""

    kept: ClassVar[list[weakref.ref[Tensor]]] = []

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.large = torch.zeros(9)
        Short.kept.append(weakref.ref(context.large))
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        if len(Short.kept) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient


def gradients_of(loss_of: Callable[[Batch], Tensor], weight: Tensor, images_B: Tensor, parts: int) -> list[Any]:
    """Has the gradient of a batch computed, and gives the events."""
    count, events = len(images_B), []
    batch = Batch(images_B, *[torch.zeros(count)] * 4, tuple(map(str, range(count))))
    a_run = module._Run(
        CONFIG, some_data(), Path(), events.append, Ranks(), torch.device("cpu"), MoESwinUNet(NETWORK, 3)
    )
    a_run.progress.parts = parts
    module._gradients(a_run, lambda part: {"a": loss_of(part)}, batch, torch.optim.SGD([weight], 1.0))
    return events


def test_a_second_attempt_has_the_memory_of_the_first() -> None:
    weight, alive = torch.ones(1, requires_grad=True), []

    def loss_of(part: Batch) -> Tensor:
        alive.append(sum(large() is not None for large in Short.kept))
        return Short.apply(weight).sum()

    assert gradients_of(loss_of, weight, torch.zeros(4), 1) == [{"event": "memory", "parts": 2}]
    assert alive[:2] == [0, 0]


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_every_image_weighs_as_much_in_however_many_parts(parts: int) -> None:
    images_B = torch.randn(12)
    weight = torch.zeros((), requires_grad=True)
    gradients_of(lambda part: (weight * part.images_BSHW).mean(), weight, images_B, parts)
    torch.testing.assert_close(weight.grad, images_B.mean())


def test_memory_for_no_image_at_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*given: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stages, "segmentation_loss", greedy)
    with pytest.raises(RuntimeError, match="does not hold one image per modality; take a smaller crop"):
        run(tmp_path)


# ---- several processes


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = MagicMock()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", calls.set_device)
    for name in ("init_process_group", "get_rank", "destroy_process_group"):
        monkeypatch.setattr(f"torch.distributed.{name}", getattr(calls, name))
    with joined_ranks():
        assert local_device() == "cuda:1"
    assert [call[0] for call in calls.mock_calls[:2]] == ["set_device", "init_process_group"]
    calls.set_device.assert_called_once_with(1)


SHARED = """
import sys, pathlib
sys.path.insert(0, {tests!r})
import test_loop
from m4oe.training.ranks import joined_ranks
test_loop.torch.set_num_threads(1)
test_loop.module.bfloat16_is_faster = lambda device: False
with joined_ranks() as ranks:
    def watch(event):
        if {kill} and ranks.rank == 0 and event.get("stage") == "experts":
            (pathlib.Path({folder!r}) / "alive").touch()
    if {kill} and ranks.rank == 1:
        import os, threading, time
        def die():
            while not (pathlib.Path({folder!r}) / "alive").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), 9)
        threading.Thread(target=die, daemon=True).start()
    test_loop.train(test_loop.EVEN, test_loop.some_data(), pathlib.Path({folder!r}), watch, ranks, "cpu")
"""
EVEN = replace(CONFIG, network=replace(NETWORK, drop_path=0.0), stages=CONFIG.stages[:2])


def on_two_processes(folder: Path, kill: bool = False) -> subprocess.CompletedProcess[str]:
    script = folder.parent / "shared.py"
    folder.mkdir(exist_ok=True)
    script.write_text(SHARED.format(tests=str(Path(__file__).parent), folder=str(folder), kill=kill), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",  # torchrun says so whatever the locale
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda device: False)  # its rounding is larger than 1e-5
    done = on_two_processes(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", EVEN)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, abs=1e-5), step


def test_when_a_process_is_killed_the_job_fails_and_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda device: False)
    failed = on_two_processes(tmp_path / "two", kill=True)
    assert failed.returncode != 0
    assert "Signal 9 (SIGKILL) received" in failed.stderr  # torchrun ends the others, which may have no time to tell
    assert on_two_processes(tmp_path / "two").returncode == 0
    run(tmp_path / "one", EVEN)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, abs=1e-5), step
