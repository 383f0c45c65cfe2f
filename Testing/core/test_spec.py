from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m4oe.spec import (
    FORMAT_VERSION,
    GATES,
    METADATA_KEY,
    ExpertSpec,
    IntensityRule,
    ModelSpec,
    NetworkSpec,
    find_model,
    read_spec,
)
from safetensors.numpy import save_file

A_SPEC = ModelSpec(
    name="abdomen",
    version="1.2",
    network=NetworkSpec(experts=2, top_k=1),
    structures=("liver", "spleen"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr_t1", "MR", "T1 without contrast")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)},
    pixel_mm=1.5,
    slice_mm=5,
)


def a_model_file(path: Path, description: str | None = A_SPEC.to_json()) -> Path:
    metadata = {"format": "pt"} if description is None else {METADATA_KEY: description}
    save_file({"weight": np.arange(6, dtype=np.float32)}, path, metadata)
    return path


def described(**changes: Any) -> str:
    return json.dumps({**json.loads(A_SPEC.to_json()), **changes})


def as_safetensors(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    names = draw(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
    finite = st.floats(-1e4, 1e4)
    low, width = draw(finite), draw(st.floats(1, 1e4))
    network = NetworkSpec(
        experts=len(names),
        gate=draw(st.sampled_from(GATES)),
        top_k=draw(st.integers(0, len(names))),
        depths=(2, 2, draw(st.integers(1, 6))),
        heads=(3, 6, 12),
    )
    return ModelSpec(
        name=draw(st.text()),
        version="1",
        network=network,
        structures=tuple(draw(st.lists(st.text(), min_size=1, unique=True))),
        experts=tuple(ExpertSpec(name, "CT", draw(st.text())) for name in names),
        intensity={"CT": IntensityRule("window", low, low + width)},
        pixel_mm=draw(st.floats(0.01, 10)),
        slice_mm=draw(st.floats(0.01, 10)),
        training=draw(st.dictionaries(st.text(), st.none() | finite | st.text() | st.lists(st.integers()))),
        scores=draw(st.dictionaries(st.text(), st.dictionaries(st.text(), finite))),
    )


@given(specs())
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_a_spec_is_read_from_a_model_file_without_its_tensors(tmp_path: Path) -> None:
    assert read_spec(a_model_file(tmp_path / "model.safetensors")) == A_SPEC


def test_a_spec_is_read_with_the_standard_library_alone(tmp_path: Path) -> None:
    path = a_model_file(tmp_path / "model.safetensors")
    code = "import sys, m4oe.spec as s; print(s.read_spec(sys.argv[1]).name, *sys.modules)"
    name, *modules = subprocess.check_output([sys.executable, "-c", code, path], text=True).split()
    assert name == "abdomen"
    assert not {"torch", "numpy", "safetensors", "scipy", "SimpleITK", "vtk"} & set(modules)


def test_labels_follow_the_order_of_the_structures() -> None:
    assert A_SPEC.label_keys == {1: "liver", 2: "spleen"}
    assert A_SPEC.labels_of(["spleen", "liver"]) == [2, 1]


def test_an_unknown_structure_or_expert_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="structure heart is unknown.*liver, spleen"):
        A_SPEC.labels_of(["liver", "heart"])
    with pytest.raises(ValueError, match="expert 'pet' is unknown.*ct, mr_t1"):
        A_SPEC.expert_index("pet")
    assert A_SPEC.expert_index("mr_t1") == A_SPEC.expert_index("MR_T1") == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"gate": "expert"}, "gate is 'expert'; expected one of image, token, channel"),
        ({"top_k": 3, "experts": 2}, "top_k is 3"),
        ({"top_k": -1}, "top_k is -1"),
        ({"depths": (2, 2)}, "same number of stages"),
        ({"heads": (3, 6, 12, 25)}, "must divide"),
        ({"experts": 0}, "sizes above 0"),
        ({"heads": (0, 6, 12, 24)}, "sizes above 0"),
        ({"depths": (), "heads": ()}, "sizes above 0"),
        ({"window": 0}, "sizes above 0"),
        ({"mlp_ratio": 0.0}, "sizes above 0"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        NetworkSpec(**changes)


@pytest.mark.parametrize(
    ("kind", "low", "high", "complaint"),
    [
        ("minmax", 0, 1, "kind is 'minmax'"),
        ("window", 240, -160, "window range is 240 to -160"),
        ("window", 40, 40, "low < high"),
        ("window", float("-inf"), 240, "window range is -inf"),
        ("window", float("nan"), 240, "window range is nan"),
        ("percentile", -1, 99, "percentiles 0 to 100"),
        ("percentile", 1, 101, "percentiles 0 to 100"),
    ],
)
def test_an_intensity_rule_without_a_range_is_refused(kind: str, low: float, high: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        IntensityRule(kind, low, high)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"experts": A_SPEC.experts[:1]}, "1 experts are named but the network has 2"),
        ({"experts": A_SPEC.experts[:1] * 2}, "expert names repeat: ct, ct"),
        ({"structures": ()}, "non-empty"),
        ({"structures": ("liver", "liver")}, "distinct"),
        ({"structures": tuple(map(str, range(256)))}, "256 structures are named; a model has at most 255"),
        ({"intensity": {"CT": IntensityRule("window", 0, 1)}}, "no intensity rule for the modality MR"),
        ({"pixel_mm": 0}, "must be positive"),
        ({"slice_mm": float("nan")}, "must be positive"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(A_SPEC, **changes)


@pytest.mark.parametrize(
    ("description", "complaint"),
    [
        (None, "not an M4oE model"),
        ("", "cannot be used"),
        ("[1, 2]", "no format version"),
        ("{}", "no format version"),
        (described(format_version=FORMAT_VERSION + 1), "newer than .* update M4oE"),
        (described(colour="red"), "unknown fields .*colour"),
        (described(network=None), "incomplete"),
        (described(network={"experts": "two"}), "incomplete"),
        (described(experts=[]), "0 experts are named"),
        (described(intensity=[]), "incomplete"),
        ('{"format_version": 1}', "incomplete .*network"),
    ],
)
def test_a_file_with_an_unusable_description_is_refused_by_name(
    tmp_path: Path, description: str | None, complaint: str
) -> None:
    path = a_model_file(tmp_path / "odd.safetensors", description)
    with pytest.raises(ValueError, match=rf"odd\.safetensors .*{complaint}"):
        read_spec(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        b"a text file that somebody renamed",
        b"\x80\x02}q\x00." + bytes(100),
        b"\xff" * 64,
        bytes(8),
        (5).to_bytes(8, "little") + b"\xff\xfe{}}",
        as_safetensors([1, 2]),
        as_safetensors(None),
        as_safetensors({"weight": 3}),
        as_safetensors({"weight": {"data_offsets": [0]}}),
        as_safetensors({"weight": {"data_offsets": [0, "4"]}}),
        as_safetensors({"__metadata__": None}),
        as_safetensors({"__metadata__": {METADATA_KEY: {"format_version": 1}}}),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"odd\.safetensors .*(not a model file|not an M4oE model)"):
        read_spec(path)


def test_a_truncated_or_extended_model_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = a_model_file(tmp_path / "cut.safetensors")
    whole = path.read_bytes()
    for content in [*(whole[:length] for length in range(len(whole))), whole + b"\0"]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cut\.safetensors .*(truncated|not a model file)"):
            read_spec(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_a_path_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be read: .*expected a model file"):
        read_spec(tmp_path / name)


def test_a_model_is_found_by_name_the_users_own_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m4oe.spec.model_folders", lambda: [tmp_path / "own", tmp_path / "shipped"])
    for folder, name in [("own", "abdomen"), ("shipped", "abdomen"), ("shipped", "demo")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        a_model_file(tmp_path / folder / f"{name}.safetensors")
    assert find_model("abdomen") == tmp_path / "own" / "abdomen.safetensors"
    assert find_model("demo") == tmp_path / "shipped" / "demo.safetensors"
    with pytest.raises(ValueError, match="'heart' is not installed; installed: abdomen, demo"):
        find_model("heart")


def test_a_folder_that_happens_to_have_a_models_name_does_not_hide_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M4OE_MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "abdomen").mkdir()
    path = a_model_file(tmp_path / "abdomen.safetensors")
    assert find_model("abdomen") == path
    assert find_model(path) == path


def test_an_expert_knows_all_structures_unless_it_names_some() -> None:
    spec = replace(A_SPEC, experts=(A_SPEC.experts[0], replace(A_SPEC.experts[1], structures=("spleen",))))
    assert [spec.classes_of([0]), spec.classes_of([1]), spec.classes_of([0, 1])] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert ModelSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ValueError, match="structure pancreas is unknown"):
        replace(A_SPEC, experts=(A_SPEC.experts[0], replace(A_SPEC.experts[1], structures=("pancreas",))))
