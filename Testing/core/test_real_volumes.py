"""Every real volume goes through the model that ships, and comes back on its own grid."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.files import find_inputs, read_volume, write_segmentation
from m4oe.geometry import Volume
from m4oe.predictor import Predictor, Report
from m4oe.spec import DEFAULT_MODEL, find_model, read_spec
from safetensors import safe_open

FOLDERS = ("ct", "mr", "mr_nc", "odd", "negative", "negative_nc")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(precision="float32")


LABEL = "_label"
LPS = np.diag([-1.0, -1.0, 1.0])  # from RAS


def segment(predictor: Predictor, path: Path) -> tuple[Volume, Volume, Report]:
    volume = read_volume(path, frame=0)
    return volume, *predictor(volume)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_result_on_disk_has_the_geometry_of_its_input(
    predictor: Predictor, shared_data: Path, tmp_path: Path, folder: str
) -> None:
    for path in find_inputs([shared_data / folder]):
        if LABEL in path.name:
            continue
        volume, labels, _ = segment(predictor, path)
        [written, _] = write_segmentation(tmp_path / "labels.nrrd", labels, predictor.spec.label_keys, "test")
        image = sitk.ReadImage(str(written))
        affine = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
        assert image.GetSize() == volume.array.shape[::-1], path
        np.testing.assert_allclose(affine, LPS @ volume.grid.affine[:3, :3], atol=1e-4, err_msg=str(path))
        np.testing.assert_allclose(image.GetOrigin(), LPS @ volume.grid.affine[:3, 3], atol=1e-3, err_msg=str(path))


@pytest.mark.parametrize("name", ["ct_orient_asl.nrrd", "ct_oblique.nii.gz", "ct_float64.nii.gz"])
def test_the_same_ct_stored_otherwise_gives_the_same_labels(predictor: Predictor, shared_data: Path, name: str) -> None:
    _, plain, _ = segment(predictor, shared_data / "ct" / "ts_ct_3mm_small.nii.gz")
    _, other, _ = segment(predictor, shared_data / "odd" / name)
    first, second = plain.to_axes("LPS").array, other.to_axes("LPS").array
    labelled = (first > 0) | (second > 0)
    assert labelled.any()
    assert (first == second)[labelled].mean() >= 0.98


def test_a_ct_with_an_offset_is_recognised(predictor: Predictor, shared_data: Path) -> None:
    _, _, report = segment(predictor, shared_data / "odd" / "ct_uint16_plus1024.mha")
    assert any("1024" in warning for warning in report.warnings)
    assert max(report.expert_weights, key=lambda name: report.expert_weights[name]) == "ct"


@pytest.mark.parametrize(
    ("image", "truth", "values", "least"),
    [
        ("ct/ts_ct_3mm", "_label_flare13", {1: "liver", 2: "kidney_right", 3: "spleen", 13: "kidney_left"}, 0.8),
        ("mr/ts_mr_t1_3mm", "_label_flare13", {1: "liver", 2: "kidney_right", 3: "spleen", 13: "kidney_left"}, 0.8),
        ("mr_nc/chaos_t2_39", "_label", {1: "liver"}, 0.5),
    ],
)
def test_large_organs_of_real_volumes_are_found(
    predictor: Predictor, shared_data: Path, image: str, truth: str, values: dict[int, str], least: float
) -> None:
    """The first two were trained on; the third never."""
    _, labels, _ = segment(predictor, shared_data / f"{image}.nii.gz")
    wanted = read_volume(shared_data / f"{image}{truth}.nii.gz", 0).array
    for value, key in values.items():
        found, true = labels.array == predictor.spec.labels_of([key])[0], wanted == value
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > least, key


def test_a_thigh_has_no_organs(predictor: Predictor, shared_data: Path) -> None:
    _, _, report = segment(predictor, shared_data / "negative" / "thigh_ct_sts024.nii.gz")
    assert sum(report.volumes_ml.values()) < 50


def test_the_model_that_ships_is_small_and_says_what_it_learned_from() -> None:
    path = find_model(DEFAULT_MODEL)
    with safe_open(path, "pt") as tensors:
        assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert path.stat().st_size < 40e6
    spec = read_spec(path)
    assert spec.limits and spec.scores and {"data", "licences"} <= spec.training.keys()


def test_the_model_that_ships_learns_from_nothing_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    recipe = importlib.import_module("demo_model")
    files = [path for source in recipe.SOURCES for path in (source.label, source.image)]
    assert len(files) == 10
    assert not any("_nc/" in path for path in [*files, *(path for path, expert in recipe.FOR_THE_GATE)])
