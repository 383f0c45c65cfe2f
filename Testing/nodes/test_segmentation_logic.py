from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import slicer.util
from m4oe.geometry import Volume

ROOT = Path(__file__).resolve().parents[2]


class FakePredictor:
    """Calls voxels above 100 a spleen, and remembers how it was made and called."""

    made: list[Any]

    def __init__(self, model: Path | str) -> None:
        self.made.append(model)
        self.spec = SimpleNamespace(label_keys={1: "liver", 2: "spleen"})
        self.calls: list[tuple[Any, ...]] = []

    def __call__(
        self, volume: Volume, expert: str, structures: Any, progress: Any, cancelled: Any
    ) -> tuple[Volume, Any]:
        self.calls.append((expert, structures, progress, cancelled))
        if cancelled is not None and cancelled():
            raise RuntimeError("cancelled")
        labels = np.where(volume.array > 100, 2, 0).astype(np.uint8)
        return Volume(labels, volume.grid), SimpleNamespace(model="fake 1.0")


@pytest.fixture
def predictors(monkeypatch: pytest.MonkeyPatch) -> type[FakePredictor]:
    monkeypatch.setattr(FakePredictor, "made", [], raising=False)
    return FakePredictor


@pytest.fixture
def logic(segmentation_module: ModuleType, predictors: type[FakePredictor]) -> Any:
    return segmentation_module.M4oESegmentationLogic(predictorFactory=predictors)


@pytest.fixture
def volume_node(volume_node_of: Callable[..., Any]) -> Any:
    return volume_node_of(np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8))


def test_volume_node_becomes_segments(logic: Any, volume_node: Any, segmentation_node: Any) -> None:
    report = logic.process(volume_node, segmentation_node)
    assert report.model == "fake 1.0"
    assert tuple(segmentation_node.GetSegmentation().GetSegmentIDs()) == ("spleen",)
    spleen = slicer.util.arrayFromSegmentBinaryLabelmap(segmentation_node, "spleen", volume_node)
    np.testing.assert_array_equal(spleen, slicer.util.arrayFromVolume(volume_node) > 100)


def test_structures_that_were_not_asked_for_stay(logic: Any, volume_node: Any, segmentation_node: Any) -> None:
    segmentation_node.GetSegmentation().AddEmptySegment("liver", "Liver")
    logic.process(volume_node, segmentation_node, structures=["spleen"])
    assert set(segmentation_node.GetSegmentation().GetSegmentIDs()) == {"liver", "spleen"}


def test_model_stays_warm_until_another_is_asked_for(
    logic: Any, volume_node: Any, segmentation_node: Any, predictors: type[FakePredictor]
) -> None:
    for model in (None, None, "other", "other", None):
        logic.process(volume_node, segmentation_node, model=model)
    assert predictors.made == ["m4oe-demo", "other", "m4oe-demo"]


def test_choices_reach_the_predictor(logic: Any, volume_node: Any, segmentation_node: Any) -> None:
    def progress(phase: str, fraction: float) -> None: ...

    logic.process(volume_node, segmentation_node, expert="mr", structures=["spleen"], progress=progress)
    assert logic._predictor.calls == [("mr", ["spleen"], progress, None)]


def test_cancelling_leaves_the_segmentation_as_it_was(logic: Any, volume_node: Any, segmentation_node: Any) -> None:
    segmentation_node.GetSegmentation().AddEmptySegment("liver", "Liver")
    before = segmentation_node.GetMTime()
    with pytest.raises(RuntimeError, match="cancelled"):
        logic.process(volume_node, segmentation_node, cancelled=lambda: True)
    assert segmentation_node.GetMTime() == before


def test_unusable_output_is_refused_before_the_model_runs(logic: Any, volume_node: Any) -> None:
    with pytest.raises(ValueError, match="Expected a segmentation node"):
        logic.process(volume_node, None)
    assert logic._predictor.calls == []


def test_failed_load_is_tried_again(segmentation_module: ModuleType, volume_node: Any, segmentation_node: Any) -> None:
    attempts: list[Any] = []

    def broken(model: Path | str) -> Any:
        attempts.append(model)
        raise ValueError("model 'm4oe-demo' is not installed")

    logic = segmentation_module.M4oESegmentationLogic(predictorFactory=broken)
    for _attempt in range(2):
        with pytest.raises(ValueError, match="not installed"):
            logic.process(volume_node, segmentation_node)
    assert len(attempts) == 2


def test_module_without_a_panel_is_hidden(segmentation_module: ModuleType) -> None:
    parent = SimpleNamespace()
    segmentation_module.M4oESegmentation(parent)
    assert parent.hidden is True
    assert parent.title == "M4oE Segmentation"
    assert not hasattr(segmentation_module, "M4oESegmentationWidget")


def test_module_file_loads_nothing_heavy_and_finds_the_package_in_the_source_tree() -> None:
    """In a fresh process: Slicer loads the file at startup, with PyTorch installed or not."""
    program = """
import sys, types
for name in ("slicer", "slicer.util", "slicer.i18n", "slicer.ScriptedLoadableModule"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["slicer.i18n"].tr = sys.modules["slicer.i18n"].translate = None
for name in ("ScriptedLoadableModule", "ScriptedLoadableModuleLogic", "ScriptedLoadableModuleTest"):
    setattr(sys.modules["slicer.ScriptedLoadableModule"], name, object)
import M4oESegmentation, m4oe
print(m4oe.__file__)
print(sorted({"torch", "numpy", "SimpleITK", "m4oe.nodes", "m4oe.predictor"} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "M4oESegmentation")}
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert Path(printed[0]) == ROOT / "Core" / "m4oe" / "__init__.py"
    assert printed[1] == "[]"
