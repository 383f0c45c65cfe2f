from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from m4oe import predictor as module
from m4oe.cleanup import remove_islands
from m4oe.geometry import Grid, Volume
from m4oe.labels import catalogue, structure
from m4oe.package import save_model
from m4oe.predictor import Cancelled, Predictor, bfloat16_is_faster, find_device
from m4oe.resample import CanonicalVolume
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from tiny import a_network
from torch.overrides import TorchFunctionMode

ALL_AXES = ["".join(letters) for pairs in permutations(("RL", "AP", "SI")) for letters in product(*pairs)]
NETWORK = NetworkSpec(experts=3, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0, top_k=1)
SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NETWORK,
    structures=("liver", "spleen", "kidney_left", "liver_tumor"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr_t1", "MR"), ExpertSpec("mr_t2", "MR")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=3.0,
)
OTHER = "you named is for another"
CT_ONLY = replace(SPEC, network=replace(NETWORK, experts=1, top_k=0), experts=SPEC.experts[:1])


def a_predictor(
    folder: Path, spec: ModelSpec = SPEC, gate: tuple[float, ...] | None = None, **options: Any
) -> Predictor:
    """A predictor with random weights; `gate` makes its router always say these logits."""
    network = a_network(spec)
    if gate is not None and network.router is not None:
        network.router.score.weight.data.zero_()
        network.router.score.bias.data[:] = torch.tensor(gate)
    save_model(folder / "tiny.safetensors", network, spec)
    return Predictor(folder / "tiny.safetensors", "cpu", **{"precision": "float32", **options})


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return a_predictor(tmp_path_factory.mktemp("model"))


@pytest.fixture
def with_gate(tmp_path: Path) -> Callable[..., Predictor]:
    """Predictor whose gate says these logits for ct, mr_t1, mr_t2."""
    return lambda *logits: a_predictor(tmp_path, gate=logits)


def smooth(*shape: int, seed: int = 0) -> NDArray[np.int16]:
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    return (4000 * field).astype(np.int16)


def a_volume(
    array: NDArray[Any], spacing: tuple[float, float, float] = (1.5, 1.5, 2.0), modality: str | None = None
) -> Volume:
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (80, 40, -30)
    return Volume(array, Grid(array.shape, affine), "a", modality)


def an_mr(**options: Any) -> Volume:
    return a_volume(np.abs(smooth(10, 22, 26)), modality="MR", **options)


def a_ct() -> Volume:
    return a_volume(smooth(10, 22, 26))


def segmented(predictor: Predictor, volume: Volume, **options: Any) -> NDArray[Any]:
    return predictor(volume, **options)[0].array


def constant(predictor: Predictor, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the network find `label` in the middle of every slice, or everywhere but nothing for 0."""

    def scores(network: object, stacks: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(len(stacks), *stacks.shape[-2:], 5)
        out[..., 0] = 1
        out[:, 2:-2, 2:-2, label] += 2
        return out

    monkeypatch.setattr(module, "_scores", scores)


# ---- the way of a volume


def test_labels_agree_with_a_plain_run_of_the_network(predictor: Predictor) -> None:
    """All slices at once, scores of every class for every voxel, argmax, islands removed."""
    volume, expert = an_mr(), 2
    canonical = CanonicalVolume(volume, 2.0, 3.0, SPEC.intensity["MR"])
    weights = F.one_hot(torch.tensor([expert]), 3).float().expand(canonical.shape[0], -1)
    with torch.inference_mode():
        scores = predictor.network(canonical.stacks(0, canonical.shape[0], 3), weights)
    fine = F.interpolate(scores.permute(3, 0, 1, 2)[None], volume.array.shape, mode="trilinear")[0]
    expected = fine.argmax(0).numpy().astype(np.uint8)
    remove_islands(expected, SPEC.label_keys, volume.grid.voxel_ml)
    found = segmented(predictor, volume, expert="mr_t2")
    assert len(np.unique(found)) > 2
    assert (found != expected).mean() < 1e-3  # ties


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_storage_order_gives_the_same_labels(predictor: Predictor, axes: str) -> None:
    expected, stored = predictor(an_mr())[0], an_mr().to_axes(axes)
    stored = replace(stored, array=np.ascontiguousarray(stored.array))
    labels, _ = predictor(stored)
    assert labels.array.shape == stored.array.shape and labels.grid is stored.grid
    assert np.array_equal(labels.to_axes("LPS").array, expected.array)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.tuples(*[st.floats(-25, 25)] * 3), st.sampled_from(ALL_AXES))
def test_an_oblique_volume_gives_the_labels_of_the_straight_one(
    predictor: Predictor, angles: tuple[float, float, float], axes: str
) -> None:
    straight = an_mr().to_axes(axes)
    affine = np.array(straight.grid.affine)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ affine[:3, :3]
    grid = Grid(straight.grid.shape, affine)
    labels, _ = predictor(replace(straight, grid=grid))
    if grid.axes == straight.grid.axes:  # turned far enough, another order is nearer
        assert np.array_equal(labels.array, segmented(predictor, straight))
    assert labels.grid is grid


@pytest.mark.parametrize("degrees", [45, 135, 225, 315])
def test_a_volume_between_two_axis_orders_comes_back_on_its_grid(predictor: Predictor, degrees: int) -> None:
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("z", degrees, degrees=True).as_matrix()
    grid = Grid((3, 14, 25), turn @ np.diag([-2.0, -2.0, 3.0, 1.0]))
    labels, _ = predictor(Volume(np.arange(3 * 14 * 25, dtype=np.int16).reshape(grid.shape), grid))
    assert labels.array.shape == grid.shape
    assert labels.grid is grid


@pytest.mark.parametrize("kind", [">i2", "<f8", "u2", "i4"])
def test_the_stored_type_makes_no_difference(predictor: Predictor, kind: str) -> None:
    volume = an_mr()
    stored = replace(volume, array=volume.array.astype(kind))
    assert np.array_equal(segmented(predictor, stored), segmented(predictor, volume))


def test_labels_are_small_integers_with_the_volumes_name(predictor: Predictor) -> None:
    labels, _ = predictor(an_mr())
    assert labels.array.dtype == np.uint8 and labels.name == "a"
    assert labels.array.max() <= len(SPEC.structures)


@pytest.mark.parametrize("shape", [(1, 20, 24), (9, 1, 14), (9, 14, 1), (1, 1, 1), (2, 3, 90)])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 2.0), (0.3, 4.0, 9.0)])
def test_flat_and_anisotropic_volumes_are_segmented(
    predictor: Predictor, shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    labels, report = predictor(a_volume(smooth(*shape), spacing))
    assert labels.array.shape == shape and set(np.unique(labels.array)) <= {0, *SPEC.label_keys}
    assert report.seconds["network"] > 0


@pytest.mark.parametrize("array", [np.zeros((3, 8, 8), np.int16), np.full((3, 8, 8), np.nan), np.full((3, 8, 8), 40)])
def test_empty_volumes_are_segmented(predictor: Predictor, array: NDArray[Any]) -> None:
    labels, _ = predictor(a_volume(array))
    assert labels.array.shape == array.shape


def test_hounsfield_units_with_an_offset_give_the_same_labels(predictor: Predictor) -> None:
    hu = np.full((8, 24, 24), -1000, np.int16)
    hu[:, 4:20, 4:20] = 40 + smooth(8, 16, 16) // 20
    hu[:, 10:13, 10:13] = 900
    stored = (hu + 1024).astype(np.uint16)
    labels, report = predictor(a_volume(stored), expert="ct")
    assert np.array_equal(labels.array, segmented(predictor, a_volume(hu), expert="ct"))
    assert any("1024 was subtracted" in text for text in report.warnings)
    _, plain = predictor(a_volume(hu), expert="ct")
    assert report.intensities == {key: pytest.approx(pair, abs=0.01) for key, pair in plain.intensities.items()} != {}


def test_a_second_call_gives_the_same_result(predictor: Predictor) -> None:
    first, report = predictor(an_mr())
    other, _ = predictor(a_ct())
    again, report_again = predictor(an_mr())
    assert np.array_equal(first.array, again.array) and not np.array_equal(first.array, other.array)
    assert report.expert_weights == report_again.expert_weights
    assert report.volumes_ml == report_again.volumes_ml


def test_the_users_array_is_not_touched(predictor: Predictor) -> None:
    volume = a_ct()
    before = volume.array.copy()
    volume.array.setflags(write=False)
    predictor(volume)
    assert np.array_equal(volume.array, before)


# ---- routing


def test_the_gate_chooses_once_for_the_whole_volume(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = predictor.network.gate_logits

    def noted(stacks: torch.Tensor) -> torch.Tensor:
        calls.append(len(stacks))
        return real(stacks)

    monkeypatch.setattr(predictor.network, "gate_logits", noted)
    _, report = predictor(a_volume(np.abs(smooth(40, 12, 12)), modality="MR"))
    assert sum(calls) == 16
    assert sorted(report.expert_weights.values()) == [0, 0, 1]


def test_the_choice_is_the_gates_mean_over_slices(predictor: Predictor) -> None:
    canonical = CanonicalVolume(an_mr(), 2.0, 3.0, SPEC.intensity["MR"])
    with torch.inference_mode():
        logits = predictor.network.gate_logits(canonical.stacks(0, canonical.shape[0], 3)).mean(0)
    expected = max(("mr_t1", "mr_t2"), key=lambda name: float(logits[SPEC.expert_index(name)]))
    assert predictor(an_mr())[1].expert_weights[expected] == 1


@pytest.mark.parametrize("name", SPEC.expert_names)
def test_naming_an_expert_overrules_gate_and_modality(with_gate: Callable[..., Predictor], name: str) -> None:
    predictor = with_gate(0.0, 9.0, 0.0)
    labels, report = predictor(a_ct(), expert=name)
    assert report.expert_weights == {key: float(key == name) for key in SPEC.expert_names}
    assert (report.chosen_by, report.gate) == ("user", {})
    doubts = [text for text in report.warnings if "doubt" in text]
    assert doubts == (
        [] if name == "ct" else [f"modality in doubt: its header or HU say CT, the expert {name} that {OTHER}"]
    )
    others = [segmented(predictor, a_ct(), expert=other) for other in SPEC.expert_names if other != name]
    assert not any(np.array_equal(labels.array, other) for other in others)


@pytest.mark.parametrize(
    ("modality", "logits", "expected"),
    [("MR", (9.0, 1.0, 2.0), "mr_t2"), ("MR", (9.0, 2.0, 1.0), "mr_t1"), ("CT", (0.0, 9.0, 8.0), "ct")],
)
def test_a_proven_modality_leaves_only_its_experts(
    with_gate: Callable[..., Predictor], modality: str, logits: tuple[float, ...], expected: str
) -> None:
    _, report = with_gate(*logits)(replace(an_mr(), modality=modality))
    assert report.expert_weights[expected] == 1 and report.chosen_by == "modality"
    assert list(report.gate.values()) == pytest.approx(torch.tensor(logits).softmax(0).tolist())
    doubts = [text for text in report.warnings if "modality in doubt" in text]
    assert len(doubts) == 1 and f"say {modality}" in doubts[0] and expected in doubts[0]


def test_without_proof_the_gate_is_free_but_told_on(with_gate: Callable[..., Predictor]) -> None:
    _, report = with_gate(9.0, 0.0, 0.0)(replace(an_mr(), modality=None))
    assert report.expert_weights["ct"] == 1 and report.chosen_by == "gate"
    assert any("intensities suggest MR, the gate says ct" in text for text in report.warnings)


@pytest.mark.parametrize(("logit", "share"), [(0.1, "52%"), (1.0, "73%")])
def test_a_gate_that_wavers_is_told_on(with_gate: Callable[..., Predictor], logit: float, share: str) -> None:
    _, report = with_gate(0.0, logit, 0.0)(an_mr())
    assert any(f"gives mr_t1 only {share}" in text for text in report.warnings)


def test_a_gate_that_wavers_does_not_contradict_a_proof(with_gate: Callable[..., Predictor]) -> None:
    _, report = with_gate(0.0, 0.3, -0.1)(replace(a_ct(), modality="CT"))
    assert report.gate["ct"] == pytest.approx(0.31, abs=0.01)
    assert not any("modality in doubt" in text for text in report.warnings)


def test_a_gate_that_is_sure_raises_no_doubt(with_gate: Callable[..., Predictor]) -> None:
    _, report = with_gate(0.0, 9.0, 0.0)(an_mr())
    assert report.chosen_by == "gate"
    assert not [text for text in report.warnings if "doubt" in text]


def test_an_expert_of_another_modality_sees_its_own_intensities(with_gate: Callable[..., Predictor]) -> None:
    predictor, volume = with_gate(9, 0, 0), a_volume(np.abs(smooth(10, 22, 26)))  # no header; it looks like MR
    labels, report = predictor(volume)
    assert report.expert_weights["ct"] == 1 and report.chosen_by == "gate"
    assert np.array_equal(labels.array, segmented(predictor, volume, expert="ct"))


def test_a_soft_gate_mixes_the_experts_it_weighs(tmp_path: Path) -> None:
    spec = replace(SPEC, network=replace(NETWORK, top_k=0))
    _, report = a_predictor(tmp_path, spec, gate=(5.0, 1.0, 2.0))(an_mr())
    expected = torch.tensor([1.0, 2.0]).softmax(0).tolist()
    assert list(report.expert_weights.values()) == pytest.approx([0, *expected])


def test_a_model_of_the_other_modality_warns(tmp_path: Path) -> None:
    predictor = a_predictor(tmp_path, CT_ONLY)
    _, report = predictor(an_mr())
    assert report.expert_weights == {"ct": 1} and report.chosen_by == "model"
    assert any("say MR, but tiny was trained for CT alone" in text for text in report.warnings)
    assert not [text for text in predictor(a_ct())[1].warnings if "doubt" in text]


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_gates_inside_the_network_use_all_experts(tmp_path: Path, gate: str) -> None:
    spec = replace(SPEC, network=replace(NETWORK, gate=gate))
    _, report = a_predictor(tmp_path, spec)(an_mr())
    assert list(report.expert_weights.values()) == pytest.approx([1 / 3] * 3)


def test_naming_an_expert_overrules_a_token_gate(tmp_path: Path) -> None:
    predictor = a_predictor(tmp_path, replace(SPEC, network=replace(NETWORK, gate="token")))
    found = {name: segmented(predictor, an_mr(), expert=name) for name in ("mr_t1", "mr_t2")}
    assert not np.array_equal(found["mr_t1"], found["mr_t2"])
    assert predictor(an_mr(), expert="mr_t2")[1].expert_weights["mr_t2"] == 1


def test_a_channel_gate_has_no_expert_to_name(tmp_path: Path) -> None:
    predictor = a_predictor(tmp_path, replace(SPEC, network=replace(NETWORK, gate="channel")))
    with pytest.raises(ValueError, match="always uses all experts"):
        predictor(an_mr(), expert="mr_t1")


# ---- what the user asks for


def test_an_unknown_expert_is_refused_with_the_choices(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="'pet' is unknown; tiny has: ct, mr_t1, mr_t2"):
        predictor(a_ct(), expert="pet")


def test_an_unknown_structure_is_refused_with_the_choices(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="pancreas is unknown; tiny has: liver, spleen, kidney_left, liver_tumor"):
        predictor(a_ct(), structures=["liver", "pancreas"])


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ({"device": "tpu"}, "'tpu' is not available; this machine has: .*cpu"),
        ({"precision": "int4"}, "'int4' is unknown; expected one of auto, float32, bfloat16"),
        ({"model": "no-such-model"}, "no-such-model.* is not installed; installed: "),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_choices(option: dict[str, str], choices: str) -> None:
    with pytest.raises(ValueError, match=choices):
        Predictor(**option)


def test_a_model_with_structures_that_the_catalogue_lacks_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'bladder', expected a key such as .*urinary_bladder"):
        a_predictor(tmp_path, replace(CT_ONLY, structures=("liver", "bladder")))


def test_the_automatic_device_is_one_that_is_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto") == find_device(str(find_device("auto")))


def test_only_the_wanted_structures_are_kept(predictor: Predictor) -> None:
    everything, _ = predictor(an_mr())
    labels, report = predictor(an_mr(), structures=["spleen", "liver_tumor"])
    assert set(np.unique(labels.array)) <= {0, 2, 4} and set(report.volumes_ml) == {"spleen", "liver_tumor"}
    assert np.array_equal(labels.array, np.where(np.isin(everything.array, (2, 4)), everything.array, 0))


def test_an_expert_finds_what_it_learned_and_nothing_else(tmp_path: Path) -> None:
    """As if the model had no other structures: they neither appear nor take voxels."""
    knows = ("spleen", "liver_tumor")
    experts = (*SPEC.experts[:2], replace(SPEC.experts[2], structures=knows))
    predictor = a_predictor(tmp_path, replace(SPEC, experts=experts))
    labels, report = predictor(an_mr(), expert="mr_t2")
    predictor.spec = SPEC
    assert set(report.volumes_ml) == set(knows) and any(report.volumes_ml.values())
    assert set(np.unique(labels.array)) <= {0, 2, 4}
    assert not np.array_equal(labels.array, segmented(predictor, an_mr(), expert="mr_t2", structures=list(knows)))


def test_progress_rises_to_one(predictor: Predictor) -> None:
    seen: list[tuple[str, float]] = []
    predictor(a_volume(smooth(40, 12, 12)), progress=lambda *step: seen.append(step))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    assert len(fractions) > 5 and {phase for phase, _ in seen} == {"prepare", "segment"}


def test_a_cancelled_run_stops_after_the_slab(predictor: Predictor) -> None:
    slabs: list[int] = []
    with pytest.raises(Cancelled):
        predictor(
            a_volume(smooth(40, 12, 12)),
            progress=lambda phase, fraction: slabs.append(phase == "segment"),
            cancelled=lambda: sum(slabs) == 2,
        )
    assert sum(slabs) == 2
    assert predictor(a_ct())[1].volumes_ml  # the predictor is as good as new


def test_a_cancelled_run_stops_between_two_layers(predictor: Predictor) -> None:
    asked: list[bool] = []
    with pytest.raises(Cancelled):
        predictor(a_ct(), cancelled=lambda: bool(asked.append(True)) or len(asked) == 3)
    assert len(asked) == 3


@pytest.mark.parametrize("expert", ["auto", "ct"])
def test_each_layer_asks_once_whether_to_stop(predictor: Predictor, expert: str) -> None:
    """Of the three, of which the gate needs the first alone; and before each slab and at the end it is asked too."""
    asked: list[bool] = []
    predictor(a_ct(), expert, cancelled=lambda: bool(asked.append(True)))
    slabs = 2
    assert len(asked) == (expert == "auto") * slabs + slabs * 3 + slabs + 1


def test_a_run_that_nobody_cancels_ends(predictor: Predictor) -> None:
    assert predictor(a_ct(), cancelled=lambda: False)[0].array.any()


# ---- precision


def test_bfloat16_changes_few_labels(predictor: Predictor, tmp_path: Path) -> None:
    labels, report = a_predictor(tmp_path, precision="bfloat16")(an_mr())
    assert report.precision == "bfloat16"
    assert (labels.array == segmented(predictor, an_mr())).mean() > 0.9


@pytest.mark.parametrize(("faster", "precision"), [(True, torch.bfloat16), (False, torch.float32)])
def test_automatic_precision_is_the_faster_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool, precision: torch.dtype
) -> None:
    monkeypatch.setattr(module, "bfloat16_is_faster", lambda device: faster)
    predictor = a_predictor(tmp_path, precision="auto")
    assert predictor.precision == precision
    assert predictor(a_ct())[1].precision == str(precision).removeprefix("torch.")


@pytest.mark.parametrize(("half", "faster"), [(0.5, True), (4.0, False), (1.0, False)])
def test_one_slow_trial_does_not_decide(half: float, faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([half, 1.0, half, 1.0, 90.0, 1.0, half, 90.0] + [half, 1.0] * 5)
    monkeypatch.setattr(module, "_seconds", lambda run, device: next(times))
    assert bfloat16_is_faster.__wrapped__(torch.device("cpu")) is faster


# ---- the report


def test_the_report_says_what_was_done(predictor: Predictor) -> None:
    volume = an_mr()
    labels, report = predictor(replace(volume, warnings=("the reader had to guess",)))
    assert (report.model, report.device, report.precision) == ("tiny 1", "cpu", "float32")
    assert list(report.seconds) == ["prepare", "route", "resample", "network", "upsample", "cleanup"]
    assert report.peak_memory_mib.keys() == report.seconds.keys() and min(report.peak_memory_mib.values()) > 10
    assert report.warnings[0] == "the reader had to guess"
    assert json.loads(report.to_json())["volumes_ml"] == report.volumes_ml
    for key, volume_ml in report.volumes_ml.items():
        voxels = (labels.array == SPEC.structures.index(key) + 1).sum()
        assert volume_ml == pytest.approx(voxels * 1.5 * 1.5 * 2 / 1000)


# ---- quality, probabilities


@pytest.mark.parametrize("slice_mm", [3.0, 5.0, 7.5])
def test_fast_looks_at_half_of_the_slices_and_fills_all(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, slice_mm: float
) -> None:
    seen: list[int] = []
    count = module._scores
    monkeypatch.setattr(module, "_scores", lambda network, stacks: seen.append(len(stacks)) or count(network, stacks))
    for quality in ("standard", "fast"):
        predictor(a_volume(smooth(24, 12, 12), spacing=(1.5, 1.5, slice_mm)), quality=quality)
    assert sum(seen) == 24 + 12  # slices
    constant(predictor, 2, monkeypatch)
    labels = segmented(predictor, a_volume(smooth(23, 24, 24), spacing=(1.5, 1.5, slice_mm)), quality="fast")
    assert (labels == 2).any(axis=(1, 2)).all()


def test_an_unknown_quality_is_refused_with_the_choices(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="'best' is unknown; expected one of standard, fast"):
        predictor(a_ct(), quality="best")


def test_uncertainty_is_the_entropy_where_the_network_looked(predictor: Predictor) -> None:
    volume = a_volume(smooth(6, 12, 12), spacing=(2.0, 2.0, 3.0), modality="CT")  # its grid is the canonical one
    uncertainty = np.full(volume.array.shape, 255, np.uint8)
    _, report = predictor(volume, uncertainty=uncertainty)
    canonical = CanonicalVolume(volume, 2.0, 3.0, SPEC.intensity["CT"])
    network = predictor.network.select_experts((1.0, 0.0, 0.0))
    with torch.inference_mode():
        p_ZHWK = network(canonical.stacks(0, 6, 3)).softmax(-1)
    expected = (100 * torch.special.entr(p_ZHWK).sum(-1) / np.log(5)).numpy()
    found = Volume(uncertainty, volume.grid).to_axes("LPS").array
    np.testing.assert_allclose(found, expected, atol=0.51)
    best = p_ZHWK.max(-1)
    liver = best.values[best.indices == 1].mean()
    assert report.confidence["liver"] == pytest.approx(float(liver), abs=1e-4)
    assert set(report.confidence) == {key for key, volume in report.volumes_ml.items() if volume} != set()


def test_asking_for_uncertainty_changes_no_label(predictor: Predictor) -> None:
    plain, _ = predictor(a_ct())
    labels, _ = predictor(a_ct(), uncertainty=np.zeros(a_ct().array.shape, np.uint8))
    np.testing.assert_array_equal(labels.array, plain.array)


def test_a_structure_between_the_slices_that_the_network_saw_has_no_confidence(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(network: object, stacks: torch.Tensor) -> torch.Tensor:
        """Liver and background by turns; the spleen is second everywhere, so it is the best half way."""
        out = torch.zeros(len(stacks), *stacks.shape[-2:], 5)
        out[0::2, ..., 1], out[1::2, ..., 0], out[..., 2] = 10, 10, 8
        return out

    monkeypatch.setattr(module, "_scores", scores)
    _, report = predictor(a_volume(smooth(16, 20, 20), spacing=(2.0, 2.0, 1.5), modality="CT"))
    assert {key for key, volume in report.volumes_ml.items() if volume} == {"liver", "spleen"}
    assert set(report.confidence) == {"liver"}


def test_the_mean_probability_of_a_large_structure_is_exact() -> None:
    volume = a_volume(smooth(1, 1, 1))
    canonical = CanonicalVolume(volume, 2.0, 3.0, SPEC.intensity["CT"])
    probabilities = module._Probabilities(canonical, volume.grid, 2, None)
    probabilities._sums_2K[:, 1] = 2**24  # voxels; in float32 another one changes nothing
    probabilities.add(torch.zeros(1, 1, 1, 2) + torch.tensor([0.0, 1.0]))
    assert probabilities.by_class() == {1: pytest.approx((2**24 + 1 / (1 + np.exp(-1))) / (2**24 + 1), abs=1e-12)}


def test_a_structure_to_check_is_flagged() -> None:
    volumes = {"liver": 9000.0, "spleen": 200.0, "aorta": 90.0, "pancreas": 0.0}
    flags = module._flags(volumes, ["spleen"], {"liver": 0.9, "spleen": 0.3}, an_mr().grid)
    assert flags == {"liver": ("implausible",), "spleen": ("cut", "low confidence")}


def test_a_structure_of_low_confidence_is_told() -> None:
    assert module._confidence_warnings({"liver": 0.9, "spleen": 0.41}) == ["low confidence: Spleen (41%)"]
    assert module._confidence_warnings({"liver": 0.9}) == []


def test_nothing_found_is_told(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    constant(predictor, 0, monkeypatch)
    labels, report = predictor(an_mr())
    assert not labels.array.any() and set(report.volumes_ml.values()) == {0.0}
    assert any("nothing was found" in text for text in report.warnings) and report.flags == {}


def test_every_structure_that_was_asked_for_and_is_known_has_a_volume(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant(predictor, 2, monkeypatch)
    _, report = predictor(an_mr(), structures=["liver", "spleen"])
    assert report.volumes_ml["liver"] == 0 < report.volumes_ml["spleen"] and len(report.volumes_ml) == 2
    assert set(report.confidence) == set(report.intensities) == {"spleen"}


def test_a_structure_at_the_border_is_told(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    constant(predictor, 2, monkeypatch)
    _, report = predictor(an_mr())
    assert [text for text in report.warnings if "at the edge" in text] == [
        "at the edge of the field of view, so perhaps cut: Spleen"
    ]


def test_a_single_slice_is_not_cut_by_its_own_plane(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    constant(predictor, 2, monkeypatch)
    _, report = predictor(a_volume(np.abs(smooth(1, 24, 24)), modality="MR"), expert="mr_t1")
    assert report.volumes_ml["spleen"]
    expected = "a single slice: volumes are areas times 2 mm, and no patient's were compared with them"
    assert report.warnings[0] == expected and "implausible" not in report.flags.get("spleen", ())


@pytest.mark.parametrize(("millimetres", "word"), [(1.0, "outside"), (18.0, "outside"), (10.0, "")])
def test_a_volume_that_no_patient_has_is_told(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, millimetres: float, word: str
) -> None:
    low, _, high = structure("spleen").volume_ml or (0, 0, 0)
    volumes = {"spleen": 400.0 * (millimetres / 10) ** 3}
    assert (low <= volumes["spleen"] <= high) == (not word)
    warnings = module._volume_warnings(volumes, [], an_mr().grid)
    assert (len(warnings) == 1 and word in warnings[0]) if word else not warnings


def test_a_small_volume_is_no_surprise_where_the_scan_cuts_it() -> None:
    warnings = module._volume_warnings({"spleen": 1.0}, ["spleen", "liver"], an_mr().grid)
    assert warnings == ["at the edge of the field of view, so perhaps cut: Spleen"]


def test_small_volumes_are_told_with_two_digits() -> None:
    warnings = module._volume_warnings({"adrenal_gland_left": 0.0312}, [], an_mr().grid)
    assert warnings[0].startswith("Left adrenal gland has 0.031 mL, outside the 0.")


def test_a_lesion_is_never_too_small() -> None:
    assert module._volume_warnings({"liver_tumor": 0.01}, [], an_mr().grid) == []


# ---- memory


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the network run out of a GPU's memory so many times; gives the numbers of slices that it was given."""

    def short(times: int) -> list[int]:
        asked: list[int] = []
        real = module._scores

        def scores(network: Any, stacks: torch.Tensor) -> torch.Tensor:
            asked.append(len(stacks))
            if len(asked) <= times:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
            return real(network, stacks)

        monkeypatch.setattr(module, "_scores", scores)
        return asked

    return short


def test_where_the_memory_of_the_gpu_runs_out_parts_are_smaller(
    predictor: Predictor, short_of_memory: Callable[[int], list[int]]
) -> None:
    expected, said = predictor(a_ct())
    asked = short_of_memory(1)
    labels, report = predictor(a_ct())
    assert np.array_equal(labels.array, expected.array) and report.warnings == said.warnings
    assert asked[0] > 1 and set(asked[1:]) == {1}
    asked.clear()
    predictor(a_ct())
    assert asked[0] > 1  # as the next volume may be smaller


def test_where_smaller_parts_do_not_help_the_cpu_does_it_and_that_is_told(
    predictor: Predictor, tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    expected, said = predictor(a_ct())
    a_predictor(tmp_path)
    chosen = Predictor(tmp_path / "tiny.safetensors", "auto", "float32")
    short_of_memory(2)
    labels, report = chosen(a_ct())
    assert np.array_equal(labels.array, expected.array) and report.device == "cpu"
    assert report.warnings == (module._NO_GPU_MEMORY, *said.warnings)
    assert chosen(a_ct())[1].warnings == said.warnings


def test_the_cpu_that_stands_in_for_a_gpu_keeps_its_model(
    tmp_path: Path, short_of_memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_predictor(tmp_path)
    chosen, load, loads = Predictor(tmp_path / "tiny.safetensors", "auto", "float32"), module.load_model, []
    monkeypatch.setattr(module, "load_model", lambda *given: loads.append(given) or load(*given))
    for _ in range(2):
        short_of_memory(2)
        assert chosen(a_ct())[1].warnings[0] == module._NO_GPU_MEMORY
    assert len(loads) == 1 and not chosen.left_gpu


def test_a_gpu_that_was_named_is_not_left(predictor: Predictor, short_of_memory: Callable[[int], list[int]]) -> None:
    asked = short_of_memory(9)
    with pytest.raises(torch.OutOfMemoryError):
        predictor(a_ct())
    assert len(asked) == 2


@pytest.mark.parametrize(("device", "stays"), [("auto", False), ("cpu", True)])
def test_a_model_that_the_gpu_cannot_hold_is_loaded_by_the_cpu_unless_that_gpu_was_named(
    device: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_predictor(tmp_path)
    load, loads = module.load_model, iter([torch.OutOfMemoryError("CUDA out of memory.")])

    def load_or_fail(*given: Any) -> Any:
        for error in loads:
            raise error
        return load(*given)

    monkeypatch.setattr(module, "load_model", load_or_fail)
    if stays:
        with pytest.raises(torch.OutOfMemoryError):
            Predictor(tmp_path / "tiny.safetensors", device)
    else:
        chosen = Predictor(tmp_path / "tiny.safetensors", device)
        report = chosen(a_ct())[1]
        assert chosen.left_gpu and report.device == "cpu" and report.warnings[0] == module._NO_GPU_MEMORY


@pytest.mark.parametrize(
    ("gpus", "built", "why"),
    [(0, True, "torch finds no GPU"), (0, False, "this torch is built for CPUs alone"), (1, True, "")],
)
def test_why_the_cpu_was_taken_is_known(gpus: int, built: bool, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: False)
    assert module.why_cpu() == why


class LargestTensor(TorchFunctionMode):
    """Notes the size of the largest tensor that any operation gives."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_scores_of_the_whole_volume_are_never_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 x 256 x 64 voxels, 16 structures: their scores would be 285 MB, the volume is 8 MB."""
    spec = replace(CT_ONLY, structures=tuple(catalogue())[:16], pixel_mm=4.0, slice_mm=4.0)
    predictor = a_predictor(tmp_path, spec)
    prior = F.interpolate(torch.randn(1, 17, 6, 6), (96, 96), mode="bilinear").permute(0, 2, 3, 1)
    real = module._scores
    monkeypatch.setattr(module, "_scores", lambda *given: 0.01 * real(*given) + prior)
    volume = a_volume(smooth(64, 256, 256), (1.5, 1.5, 2.0))
    tracemalloc.start()
    with LargestTensor() as largest:
        labels, _ = predictor(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(labels.array)) > 4
    assert largest.bytes < 20e6 < labels.array.size * 17 * 4 / 10
    assert peak < labels.array.size * 8  # labels, components and slabs
