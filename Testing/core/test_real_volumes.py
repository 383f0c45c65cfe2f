"""Every real volume goes through the model that ships, and comes back on its own grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from m4oe.files import find_inputs, read_volume, write_segmentation
from m4oe.geometry import Volume
from m4oe.predictor import Predictor, Report

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
