from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from m4oe.network.unet import MoESwinUNet
from m4oe.package import load_model, save_model
from m4oe.spec import FORMAT_VERSION, ExpertSpec, IntensityRule, ModelSpec, NetworkSpec, read_spec
from safetensors.torch import save_file

NETWORK = NetworkSpec(experts=2, embed_dim=8, depths=(1, 1), heads=(1, 2), window=3, mlp_ratio=1.0, top_k=1)
SPEC = ModelSpec(
    name="tiny",
    version="1.2",
    network=NETWORK,
    structures=("liver", "liver_tumor"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR", "any MR")),
    intensity={"CT": IntensityRule("window", -160, 240), "MR": IntensityRule("percentile", 0.5, 99.5)},
    pixel_mm=1.5,
    slice_mm=3.0,
    scores={"ct": {"liver": 0.9}},
)


@pytest.fixture
def network() -> MoESwinUNet:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return MoESwinUNet(NETWORK, 3)


@pytest.fixture
def model(tmp_path: Path, network: MoESwinUNet) -> Path:
    save_model(tmp_path / "tiny.safetensors", network, SPEC)
    return tmp_path / "tiny.safetensors"


def header(path: Path) -> tuple[dict[str, dict[str, str]], bytes]:
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def with_header(path: Path, changed: dict[str, dict[str, str]], tensors: bytes) -> None:
    text = json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)


def test_a_model_comes_back_as_it_was_saved_in_half_precision(model: Path, network: MoESwinUNet) -> None:
    loaded, spec = load_model(model)
    assert spec == read_spec(model) == SPEC
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float())


def test_a_loaded_model_is_ready_to_predict(model: Path, network: MoESwinUNet) -> None:
    loaded, _ = load_model(str(model))
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    x = torch.rand(2, 3, 9, 10)
    torch.testing.assert_close(loaded(x), network.half().float().eval()(x).detach())


def test_float32_is_kept_exactly(tmp_path: Path, network: MoESwinUNet) -> None:
    path = tmp_path / "exact.safetensors"
    save_model(path, network, SPEC, torch.float32)
    loaded, _ = load_model(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))


def test_saving_again_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    loaded, spec = load_model(model)
    save_model(tmp_path / "again.safetensors", loaded, spec)
    again, first = header(tmp_path / "again.safetensors"), header(model)
    assert again[0]["__metadata__"] == first[0]["__metadata__"]
    assert again[1] == first[1]


def test_any_damaged_byte_is_detected(model: Path) -> None:
    """One flipped bit, in the length, in the header's tensors, description or checksum, or in the numbers."""
    whole = model.read_bytes()
    rng = np.random.default_rng(0)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(8), *rng.integers(8, start, 150).tolist(), *rng.integers(start, len(whole), 50).tolist()]
    for place in places:
        flipped = whole[place] ^ 1 << int(rng.integers(7))
        if flipped == whole[place] or (place < start and chr(whole[place]) == " "):
            continue  # white space may become other white space
        model.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"tiny\.safetensors"):
            load_model(model)


def test_a_full_disk_is_told_and_leaves_the_old_model(
    model: Path, network: MoESwinUNet, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    before = model.read_bytes()
    with full_disk(), pytest.raises(OSError, match=r"cannot write .*tiny\.safetensors .*; make room and start again"):
        save_model(model, network, SPEC)
    assert model.read_bytes() == before and list(model.parent.iterdir()) == [model]


def test_a_changed_description_is_detected(model: Path) -> None:
    found, tensors = header(model)
    found["__metadata__"]["m4oe"] = replace(SPEC, pixel_mm=2.5).to_json()
    with_header(model, found, tensors)
    assert read_spec(model).pixel_mm == 2.5
    with pytest.raises(ValueError, match="checksum"):
        load_model(model)


def test_numbers_that_are_read_as_another_type_are_detected(model: Path) -> None:
    found, tensors = header(model)
    found["head.weight"]["dtype"] = "BF16"  # as long as F16
    with_header(model, found, tensors)
    with pytest.raises(ValueError, match="checksum"):
        load_model(model)


def test_a_model_without_a_checksum_is_refused(model: Path) -> None:
    found, tensors = header(model)
    del found["__metadata__"]["sha256"]
    with_header(model, found, tensors)
    with pytest.raises(ValueError, match="checksum"):
        load_model(model)


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1])
def test_a_truncated_model_is_refused(model: Path, size: int) -> None:
    model.write_bytes(model.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"tiny\.safetensors .*(truncated|not a model)"):
        load_model(model)


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, structures=("liver",)),
        replace(SPEC, network=replace(NETWORK, mlp_ratio=2.0)),
        replace(SPEC, network=replace(NETWORK, depths=(2, 1))),
        replace(SPEC, network=replace(NETWORK, experts=1, top_k=0), experts=(ExpertSpec("ct", "CT"),)),
    ],
)
def test_tensors_that_do_not_fit_the_description_are_named(
    tmp_path: Path, network: MoESwinUNet, spec: ModelSpec
) -> None:
    save_model(tmp_path / "odd.safetensors", network, spec)
    with pytest.raises(ValueError, match=r"odd\.safetensors does not fit .* should be .*, is "):
        load_model(tmp_path / "odd.safetensors")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not an M4oE model"):
        load_model(tmp_path / "other.safetensors")


class Trap:
    """Pickled, it writes a file when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path, trap = tmp_path / f"model{suffix}", tmp_path / "sprung"
    torch.save({"weights": Trap(trap)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a model"):
        load_model(path)
    assert not trap.exists()


def test_a_newer_format_asks_for_an_update(model: Path) -> None:
    found, tensors = header(model)
    values = json.loads(found["__metadata__"]["m4oe"])
    found["__metadata__"]["m4oe"] = json.dumps({**values, "format_version": FORMAT_VERSION + 1, "novelty": 1})
    with_header(model, found, tensors)
    with pytest.raises(ValueError, match=f"format {FORMAT_VERSION + 1} is newer .* update"):
        load_model(model)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.safetensors"):
        load_model(tmp_path / "gone.safetensors")


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path: Path, network: MoESwinUNet) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="Cannot write"):
        save_model(tmp_path / "file" / "tiny.safetensors", network, SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_keeps_the_old_model(model: Path, network: MoESwinUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.read_bytes()

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half a mod")
        raise OSError("no space left on device")

    monkeypatch.setattr("m4oe.package.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_model(model, network, SPEC)
    assert model.read_bytes() == before
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_a_model_as_the_umask_says(tmp_path: Path, network: MoESwinUNet, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_model(tmp_path / "tiny.safetensors", network, SPEC)
    finally:
        os.umask(before)
    assert (tmp_path / "tiny.safetensors").stat().st_mode & 0o777 == mode
