"""`m4oe train` on a data set of a few voxels: plan, train, score, report, and one modality more."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from m4oe import train_command, train_report
from m4oe.__main__ import main
from m4oe.files import write_volume
from m4oe.geometry import Grid, Volume
from m4oe.network.unet import MoESwinUNet
from m4oe.package import load_model, save_model
from m4oe.predictor import Predictor
from m4oe.spec import NetworkSpec, read_spec
from m4oe.training import config as configs
from m4oe.training.config import Stage, TrainConfig
from m4oe.training.plan import read_plan
from m4oe.training.plan_data import addition_config

NETWORK = NetworkSpec(experts=2, top_k=1, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0)
TINY = TrainConfig(
    name="m4oe",
    network=NETWORK,
    pixel_mm=2.0,
    slice_mm=2.0,
    crop=20,
    images=2,
    stages=(Stage("dense", 4, 1e-2), Stage("experts", 4, 1e-2), Stage("gate", 2, 1e-2), Stage("joint", 2, 1e-2)),
    validate_every=4,
)
LONGER = replace(TINY, stages=(Stage("experts", 60, 1e-2), Stage("joint", 20, 1e-2)), validate_every=20)
Captured = pytest.CaptureFixture[str]


def a_volume(expert: str, seed: int) -> tuple[Volume, Volume]:
    """Noise with boxes: 1 liver and 2 spleen, for mr_t1ce also 3 aorta."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((4, 20, 20), np.uint8)
    labels[1:3, 4:12, 4:10], labels[1:3, 4:12, 13:18] = 1, 2
    if expert == "mr_t1ce":
        labels[1:3, 14:18, 8:12] = 3
    mean, step = {"ct": (-40, 100), "mr_t1": (200, 100), "mr_t1ce": (900, -150)}[expert]
    image = rng.normal(mean, 10, labels.shape) + step * labels.astype(int)
    if expert == "ct":
        image[0, 0, :2] = -1000
    grid = Grid(labels.shape, np.diag([-2.0, -2.0, 2.0, 1.0]))
    return Volume(image.astype(np.int16), grid), Volume(labels, grid)


def a_data_set(folder: Path, *experts: str) -> Path:
    """Three cases per expert: train, val, test."""
    rows = ["case,modality,expert,split"]
    for expert in experts:
        for seed, split in enumerate(("train", "val", "test")):
            image, labels = a_volume(expert, seed)
            labels.array[3, 18:, 18:] = 3 if "mr_t1ce" in experts else 0  # all annotate what is new
            write_volume(folder / f"{expert}_{seed}.nii.gz", image)
            write_volume(folder / f"{expert}_{seed}_label.nii.gz", labels)
            rows.append(f"{expert}_{seed},{'CT' if expert == 'ct' else 'MR'},{expert},{split}")
    (folder / "cases.csv").write_text("\n".join(rows), encoding="utf-8")
    third = "\n3,aorta" if "mr_t1ce" in experts else ""
    (folder / "labels.csv").write_text(f"label,name\n1,liver\n2,spleen{third}", encoding="utf-8")
    return folder


def make_tiny(patch: pytest.MonkeyPatch, config: TrainConfig = TINY, pictures: bool = False) -> None:
    """The small preset for a few voxels, in this process alone."""
    patch.setitem(configs.PRESETS, "small", config)
    patch.setattr("m4oe.training.cache.os.cpu_count", lambda: 1)
    if not pictures:
        patch.setattr(train_report, "write_preview", lambda path, *given: path.write_bytes(b""))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on CT and T1."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch, LONGER, pictures=True)
        assert main(["train", str(a_data_set(folder / "set", "ct", "mr_t1")), "-o", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_ends_in_a_model_with_scores_and_a_report(base: Path) -> None:
    spec = read_spec(base / "model.safetensors")
    assert spec.training["scored_cases"].keys() == spec.scores.keys()
    assert set(spec.scores) == {"ct", "mr_t1"} and set(spec.scores["ct"]) == {"liver", "spleen"}
    page = (base / "report.html").read_text(encoding="utf-8")
    for words in ("Training of m4oe", "Loss of the segmentation", "Loss of the gate", "Best case", "Worst case"):
        assert words in page
    assert page.count("data:image/png;base64,") == 4 and "http" not in page.replace("http://www.w3.org", "")


def test_the_preset_of_the_paper_weighs_all_experts_in_every_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = configs.PAPER
    stages = tuple(replace(stage, steps=2) for stage in paper.stages)
    network = replace(NETWORK, gate=paper.network.gate, top_k=paper.network.top_k)
    monkeypatch.setitem(configs.PRESETS, "paper", replace(TINY, network=network, stages=stages))
    data = a_data_set(tmp_path / "set", "ct", "mr_t1")
    assert main(["train", str(data), "-o", str(tmp_path / "run"), "--preset", "paper"]) == 0
    trained = load_model(tmp_path / "run" / "model.safetensors")[0]
    assert (trained.spec.gate, trained.spec.top_k, trained.spec.experts) == ("token", 0, 2)


def test_a_folder_with_data_is_no_place_for_a_run(tmp_path: Path, capsys: Captured) -> None:
    data = a_data_set(tmp_path / "set", "ct")
    before = sorted(data.iterdir())
    assert main(["train", str(data), "-o", str(data)]) == 2
    assert "choose an empty folder" in capsys.readouterr().err and sorted(data.iterdir()) == before


def test_label_maps_of_one_modality_train_experts_for_all(tmp_path: Path, capsys: Captured) -> None:
    data = a_data_set(tmp_path / "set", "ct")
    assert main(["train", str(data), "--synthesise", "-o", str(tmp_path / "run")]) == 0
    spec = read_spec(tmp_path / "run" / "model.safetensors")
    assert spec.expert_names == ("ct", "mr_t1", "mr_t1ce", "mr_t2")
    assert set(spec.scores) == {"ct"} and "drawn as ct, mr_t1, mr_t1ce, mr_t2" in spec.training["data"]
    assert (tmp_path / "run" / "synthesis.png").read_bytes().startswith(b"\x89PNG")
    assert "synthesis.png: pairs of rows (image, labels) for ct, mr_t1, mr_t1ce, mr_t2\n" in capsys.readouterr().out
    assert '{"event": "synthesis"' in (tmp_path / "run" / "events.jsonl").read_text(encoding="utf-8")


def test_the_same_command_again_trains_no_more_and_reports_anew(
    base: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(monkeypatch, LONGER)
    steps = (base / "events.jsonl").read_text(encoding="utf-8").count('"event": "step"')
    (base / "report.html").unlink()
    assert main(["train", str(base.parent / "set"), "-o", str(base)]) == 0
    assert (base / "report.html").exists()
    assert "the run is finished; its model is scored again" in capsys.readouterr().out
    assert (base / "events.jsonl").read_text(encoding="utf-8").count('"event": "step"') == steps


def test_what_is_refused_leaves_the_run_of_the_folder_as_it_was(tmp_path: Path, capsys: Captured) -> None:
    data, run = a_data_set(tmp_path / "set", "ct"), tmp_path / "run"
    command = ["train", str(data), "--synthesise", "-o", str(run)]
    assert main(command) == 0

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    before = files()
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "another configuration (seed 0, now 1)" in capsys.readouterr().err
    assert main([*command, "--seed", "1", "--estimate"]) == 0 and files() == before
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan["splits"]["set/ct_1"] = "train"
    (tmp_path / "other.json").write_text(json.dumps(plan), encoding="utf-8")
    assert main(["train", str(tmp_path / "other.json"), *command[2:]]) == 2
    assert "holds a run on other data" in capsys.readouterr().err
    assert files() == before | {"events.jsonl": files()["events.jsonl"]}
    (run / "plan.json").unlink()
    assert main(command) == 2 and not (run / "plan.json").exists()


def test_a_run_that_keeps_no_case_is_not_scored_and_says_so(tmp_path: Path, capsys: Captured) -> None:
    table = a_data_set(tmp_path / "set", "ct") / "cases.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("val", "train").replace("test", "train"), "utf-8")
    assert main(["train", str(table.parent), "-o", str(tmp_path / "run")]) == 0
    said, spec = capsys.readouterr(), read_spec(tmp_path / "run" / "model.safetensors")
    assert "no case was kept from training" in said.err and "\nNot scored.\n" in said.out
    assert "It was scored on no case" in spec.limits and not any(spec.scores.values())


def test_events_are_lines_of_text_or_of_json(tmp_path: Path, capsys: Captured) -> None:
    data = str(a_data_set(tmp_path / "set", "ct"))
    assert main(["train", data, "-o", str(tmp_path / "text")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("trains expert ct on ") or "\ntrains expert ct on " in text
    assert text.index("trains expert") < text.index("preparing 1/") < text.index("dense 4/4")
    assert "dense 4/4: loss segmentation " in text and "dense 4: validation Dice 0." in text
    assert f"report: {tmp_path / 'text' / 'report.html'}" in text
    assert main(["train", data, "--json", "-o", str(tmp_path / "json")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert {"step", "validated", "scored", "scores"} <= {event["event"] for event in events}


def test_all_that_happens_is_in_the_events_and_validation_is_drawn(base: Path) -> None:
    events = [json.loads(line) for line in (base / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"step", "validated", "scored", "scores", "finished"} <= {event["event"] for event in events}
    pictures = {path.name for path in (base / "previews").iterdir()}
    assert pictures == {f"step_{event['overall']}.png" for event in events if event["event"] == "validated"}


def test_an_estimate_trains_nothing(tmp_path: Path, capsys: Captured) -> None:
    data = str(a_data_set(tmp_path / "set", "ct"))
    assert main(["train", data, "-o", str(tmp_path / "run"), "--estimate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["seconds"] < 600 and 50 < found["memory_mib"] < 100_000 and found["gpu_mib"] >= 0
    assert not (tmp_path / "run" / "events.jsonl").exists()
    assert main(["train", data, "-o", str(tmp_path / "run"), "--estimate"]) == 0
    assert re.match(r"about \d+ min; memory \d+\.\d GiB.*; a rough guess", capsys.readouterr().out.splitlines()[-1])
    found = {"seconds": 7380.0, "memory_mib": 1536, "gpu_mib": 512}
    assert train_command._estimate_line(found).startswith(
        "about 2 h 3 min; memory 1.5 GiB, 0.5 GiB on the GPU; a rough"
    )


def test_an_estimate_shows_what_would_be_drawn(tmp_path: Path) -> None:
    run = tmp_path / "run"
    data = ["train", str(a_data_set(tmp_path / "set", "ct")), "-o", str(run), "--synthesise"]
    assert main([*data, "--estimate"]) == 0
    assert (run / "synthesis.png").exists() and not (run / "events.jsonl").exists()
    assert main(data) == 0


def test_a_plan_is_made_anew_until_training_has_begun(tmp_path: Path, capsys: Captured) -> None:
    data, run = a_data_set(tmp_path / "set", "ct"), tmp_path / "run"
    assert main(["train", str(data), "-o", str(run), "--estimate"]) == 0
    table = (data / "cases.csv").read_text(encoding="utf-8")
    (data / "cases.csv").write_text(table.replace("val", "train"), encoding="utf-8")
    assert main(["train", str(data), "-o", str(run)]) == 0
    assert len(read_plan(run / "plan.json").cases("train")) == 2 and "goes on with" not in capsys.readouterr().err
    (data / "cases.csv").write_text(table, encoding="utf-8")
    assert main(["train", str(data), "-o", str(run)]) == 0
    assert len(read_plan(run / "plan.json").cases("train")) == 2
    assert re.search(rf"goes on with {re.escape(str(run / 'plan.json'))} of \d{{4}}-", capsys.readouterr().err)


def test_experts_whose_images_are_held_back_learn_from_synthetic_ones(tmp_path: Path, capsys: Captured) -> None:
    data = a_data_set(tmp_path / "set", "ct", "mr_t1")
    table = (data / "cases.csv").read_text(encoding="utf-8")
    (data / "cases.csv").write_text(table.replace("mr_t1,train", "mr_t1,test"), encoding="utf-8")
    command = ["train", str(data), "-o", str(tmp_path / "run"), "--synthesise"]
    for _ in range(2):
        assert main(command) == 0
        said = capsys.readouterr()
        assert "All cases of mr_t1 are in validation or test, so its expert learns from synth" in said.out + said.err


def test_a_start_that_cannot_be_had_is_refused_before_anything_is_made(tmp_path: Path, capsys: Captured) -> None:
    data = str(a_data_set(tmp_path / "set", "ct"))
    assert main(["train", data, "-o", str(tmp_path / "run"), "--init", "nosuch:ct"]) == 2
    assert "model 'nosuch' is not installed" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_that_is_asked_to_pause_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    data, run = str(a_data_set(tmp_path / "set", "ct")), tmp_path / "run"
    run.mkdir()
    (run / "pause").touch()
    assert main(["train", data, "-o", str(run)]) == 0
    assert "the same command goes on" in capsys.readouterr().err and not (run / "model.safetensors").exists()
    assert main(["train", data, "-o", str(run)]) == 0
    assert (run / "model.safetensors").exists()


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["train", str(a_data_set(tmp_path / "set", "ct")), "-o", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "joint: 100%" in said.err and "loss segmentation" in said.err and "validation Dice" in said.err
    assert "loss segmentation" not in said.out


def test_losses_go_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *given: object) -> None:
            pass

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    command = ["train", str(a_data_set(tmp_path / "set", "ct")), "--tensorboard", "-o", str(tmp_path / "run")]
    assert main(command) == 0
    assert {(name, step) for name, _, step in written} >= {("step/segmentation", 8), ("validated/liver", 4)}


def test_without_tensorboard_it_is_said_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", "--phantoms", "--tensorboard", "-o", str(tmp_path / "run")]) == 2
    assert "--tensorboard needs a package" in capsys.readouterr().err


def test_a_run_needs_a_plan_or_phantoms(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "-o", str(tmp_path)]) == 2
    assert "expected a plan of m4oe data plan, folders with data sets, or --phantoms" in capsys.readouterr().err


def test_a_plan_that_is_missing_is_told(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", str(tmp_path / "plan.json"), "-o", str(tmp_path / "run")]) == 2
    assert "plan.json cannot be read (No such file or directory); expected a plan" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "--phantoms", "--quick", "-o", str(tmp_path / "file")]) == 2
    assert "it is a file; expected a folder" in capsys.readouterr().err


def test_quick_and_another_preset_are_one_too_many(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", str(tmp_path), "--quick", "--preset", "paper", "-o", str(tmp_path / "run")]) == 2
    assert "--quick is a preset of its own; leave out --preset" in capsys.readouterr().err


def test_training_starts_from_an_expert_of_a_model(base: Path, tmp_path: Path, capsys: Captured) -> None:
    data = ["train", str(a_data_set(tmp_path / "set", "mr_t1ce")), "-o", str(tmp_path / "run")]
    assert main([*data, "--init", f"{base / 'model.safetensors'}:mr_t1"]) == 0
    assert main([*data, "--init", f"{base / 'model.safetensors'}:pet"]) == 2
    assert "expert 'pet' is unknown; m4oe has: ct, mr_t1" in capsys.readouterr().err


# ---- one modality more


@pytest.fixture(scope="module")
def extended(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that adds contrast-enhanced T1 to `base`, with cases of the older experts at hand."""
    folder = tmp_path_factory.mktemp("extended")
    data = a_data_set(folder / "set", "ct", "mr_t1", "mr_t1ce")
    add = ["--add-modality", "mr_t1ce", "--model", str(base / "model.safetensors")]
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch, LONGER)
        assert main(["train", str(data), *add, "-o", str(folder / "run")]) == 0
    return folder / "run"


def test_an_added_modality_leaves_the_tensors_of_the_old_as_they_were(base: Path, extended: Path) -> None:
    old, new = (load_model(run / "model.safetensors")[0].state_dict() for run in (base, extended))
    for key, value in old.items():
        assert torch.equal(value, new[key][: len(value)] if key.startswith(("head", "router.score")) else new[key])
    assert not torch.equal(new["router.score.weight"][2], new["router.score.weight"][1])
    assert new["head.weight"][3].any()


@pytest.mark.parametrize(("crop", "expected"), [(32, 32), (0, TINY.crop)])
def test_an_added_expert_learns_from_images_of_the_size_that_its_model_segments(
    base: Path, crop: int, expected: int
) -> None:
    model = replace(read_spec(base / "model.safetensors"), crop=crop)
    assert addition_config(TINY, model).crop == expected


@pytest.mark.parametrize("expert", ["ct", "mr_t1"])
def test_an_added_modality_leaves_the_results_of_the_old_as_they_were(base: Path, extended: Path, expert: str) -> None:
    before, after = (Predictor(run / "model.safetensors", "cpu", "float32") for run in (base, extended))
    image = replace(a_volume(expert, 7)[0], modality="CT" if expert == "ct" else "MR")
    for chosen in (expert, "auto"):
        (labels, _), (again, report) = before(image, chosen), after(image, chosen)
        assert report.expert_weights[expert] == 1
        assert np.array_equal(labels.array, again.array) and labels.array.any()


def test_an_added_modality_is_learned_with_what_it_alone_shows(extended: Path) -> None:
    spec = read_spec(extended / "model.safetensors")
    assert spec.expert_names == ("ct", "mr_t1", "mr_t1ce") and spec.structures == ("liver", "spleen", "aorta")
    assert [expert.structures for expert in spec.experts[:2]] == [("liver", "spleen")] * 2
    assert set(spec.scores["ct"]) == {"liver", "spleen"} and "aorta" in spec.scores["mr_t1ce"]
    predictor = Predictor(extended / "model.safetensors", "cpu", "float32")
    image = replace(a_volume("mr_t1ce", 7)[0], modality="MR")
    labels, report = predictor(image)
    assert report.expert_weights["mr_t1ce"] == 1
    assert (labels.array == 3).any()
    assert {"data", "of mr_t1ce"} <= set(spec.training)


def test_a_run_that_adds_is_not_trained_again_and_leaves_no_case_out(
    base: Path, extended: Path, capsys: Captured
) -> None:
    steps = (extended / "events.jsonl").read_text(encoding="utf-8").count('"event": "step"')
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch, LONGER)
        add = ["--add-modality", "mr_t1ce", "--model", str(base / "model.safetensors")]
        assert main(["train", str(extended.parent / "set"), *add, "-o", str(extended)]) == 0
    assert (extended / "events.jsonl").read_text(encoding="utf-8").count('"event": "step"') == steps
    assert "left out" not in capsys.readouterr().err


def test_without_cases_of_the_old_the_gate_never_prefers_the_new(base: Path, tmp_path: Path) -> None:
    data = a_data_set(tmp_path / "set", "mr_t1ce")
    add = ["--add-modality", "mr_t1ce", "--model", str(base / "model.safetensors"), "-o", str(tmp_path / "run")]
    assert main(["train", str(data), *add]) == 0
    before, after = (Predictor(run / "model.safetensors", "cpu", "float32") for run in (base, tmp_path / "run"))
    for expert in ("mr_t1", "mr_t1ce"):
        image = replace(a_volume(expert, 7)[0], modality="MR")
        (labels, _), (again, reported) = before(image), after(image)
        assert reported.expert_weights["mr_t1ce"] == 0 and reported.gate["mr_t1ce"] < 1e-4
        assert np.array_equal(labels.array, again.array)


def test_a_model_of_one_expert_gets_a_gate_with_the_second(tmp_path: Path) -> None:
    alone = a_data_set(tmp_path / "ct", "ct")
    assert main(["train", str(alone), "-o", str(tmp_path / "one")]) == 0
    both = a_data_set(tmp_path / "both", "ct", "mr_t1")
    add = ["--add-modality", "mr_t1", "--model", str(tmp_path / "one" / "model.safetensors")]
    assert main(["train", str(both), *add, "-o", str(tmp_path / "two")]) == 0
    before, after = (Predictor(tmp_path / run / "model.safetensors", "cpu", "float32") for run in ("one", "two"))
    image = replace(a_volume("ct", 7)[0], modality="CT")
    (labels, _), (again, report) = before(image), after(image)
    assert np.array_equal(labels.array, again.array) and report.expert_weights == {"ct": 1, "mr_t1": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--synthesise", "--add-modality", "mr_t2"], "--synthesise draws the label maps of a plan or of folders"),
        (["--model", "m4oe-demo"], "--model is what --add-modality extends; to start from a model give --init"),
        (["--add-modality", "pet", "--init", "timm"], "--add-modality trains on a plan or folders, from --model alone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: Captured, options: list[str], message: str
) -> None:
    assert main(["train", str(tmp_path), *options, "-o", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "experts", "message"),
    [
        ("ct", ("ct",), "m4oe has an expert ct; give the new one another name"),
        ("mr_t1ce", ("ct",), "the plan has no training case for the expert mr_t1ce; it has: ct"),
        ("ct", ("ct", "mr_t1ce"), "m4oe has an expert ct"),
    ],
)
def test_what_cannot_be_added_is_refused(
    base: Path, tmp_path: Path, capsys: Captured, name: str, experts: tuple[str, ...], message: str
) -> None:
    data = a_data_set(tmp_path / "set", *experts)
    add = ["--add-modality", name, "--model", str(base / "model.safetensors"), "-o", str(tmp_path / "run")]
    assert main(["train", str(data), *add]) == 2
    assert message in capsys.readouterr().err


def test_a_soft_mixture_takes_no_expert(base: Path, tmp_path: Path, capsys: Captured) -> None:
    spec = read_spec(base / "model.safetensors")
    soft = replace(spec, network=replace(spec.network, top_k=0))
    save_model(tmp_path / "soft.safetensors", MoESwinUNet(soft.network, 3), soft)
    add = ["--add-modality", "mr_t1ce", "--model", str(tmp_path / "soft.safetensors"), "-o", str(tmp_path / "run")]
    assert main(["train", str(a_data_set(tmp_path / "set", "mr_t1ce")), *add]) == 2
    assert "its gate does not choose one expert for an image" in capsys.readouterr().err
