"""Every real volume goes through the model that ships, and comes back on its own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from m4oe.files import find_inputs, read_volume
from m4oe.geometry import Volume
from m4oe.predictor import Predictor, Report

FOLDERS = ("ct", "mr", "mr_nc", "odd", "negative", "negative_nc")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(precision="float32")


def segment(predictor: Predictor, path: Path) -> tuple[Volume, Volume, Report]:
    volume = read_volume(path, frame=0)
    return volume, *predictor(volume)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_volume_comes_back_on_its_own_grid(predictor: Predictor, shared_data: Path, folder: str) -> None:
    paths = [path for path in find_inputs([shared_data / folder]) if "_label" not in path.name]
    for path in paths if folder != "mr_nc" else paths[:4]:
        volume, labels, report = segment(predictor, path)
        assert labels.array.shape == volume.array.shape, path
        assert np.array_equal(labels.grid.affine, volume.grid.affine), path
        assert report.volumes_ml or "nothing was found" in " ".join(report.warnings), path


@pytest.mark.parametrize("name", ["ct_orient_asl.nrrd", "ct_oblique.nii.gz", "ct_float64.nii.gz"])
def test_the_same_ct_stored_otherwise_gives_the_same_labels(
    predictor: Predictor, shared_data: Path, name: str
) -> None:
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
