from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from m4oe.geometry import Grid, Volume
from m4oe.resample import CanonicalVolume
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training import data
from m4oe.training.data import Batch, Case, batches, make_case
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter

SPEC = ModelSpec(
    name="tiny",
    version="1",
    network=NetworkSpec(experts=2),
    structures=("liver", "spleen"),
    experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
    intensity={"CT": IntensityRule("window", 0, 100), "MR": IntensityRule("percentile", 1, 99)},
    pixel_mm=2.0,
    slice_mm=3.0,
)


class Middle(np.random.Generator):
    """Draws the same as ever, but every range gives its middle: no turn, no shift, a zoom of 1."""

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None) -> Any:  # type: ignore[override]
        middle = 1.0 if (low, high) == data._ZOOM else (low + high) / 2
        return middle if size is None else np.full(size, middle)


class Turned(Middle):
    """But it turns by 0.2."""

    def uniform(self, low: float = 0.0, high: float = 1.0, size: int | None = None) -> Any:  # type: ignore[override]
        return 0.2 if low == -data._ROTATION else super().uniform(low, high, size)


def a_volume(array: NDArray[np.generic], spacing: float = 1.0) -> Volume:
    return Volume(array, Grid(array.shape, np.diag([-spacing, -spacing, 3.0, 1.0])))


def a_case(labels: NDArray[np.uint8], expert: int = 0) -> Case:
    """A case whose image is 1 in every structure and 0 elsewhere."""
    slices_of = {int(n): np.flatnonzero((labels == n).any(axis=(1, 2))) for n in np.unique(labels) if n}
    return Case((labels > 0).astype(np.float16), labels, np.ones(labels.max() + 1, bool), expert, slices_of)


def blocks(slices: int = 4) -> NDArray[np.uint8]:
    labels = np.zeros((slices, 40, 48), np.uint8)
    labels[:, 8:25, 6:22], labels[:, 22:36, 28:44] = 1, 2
    return labels


def stream(cases: list[Case], images: int = 2, crop: int = 32, channels: int = 3, seed: int = 0) -> Iterator[Batch]:
    return batches(cases, images, crop, channels, np.random.default_rng(seed))


def test_a_case_is_what_prediction_sees() -> None:
    rng = np.random.default_rng(0)
    image, labels = (
        a_volume(rng.uniform(0, 100, (5, 12, 14))),
        a_volume(rng.integers(0, 3, (5, 12, 14)).astype(np.uint8)),
    )
    for expert, modality in enumerate(("CT", "MR")):
        case = make_case(image, labels, SPEC.structures, SPEC, expert)
        canonical = CanonicalVolume(image, 2.0, 3.0, SPEC.intensity[modality])
        assert case.expert == expert and case.image_ZHW.dtype == np.float16
        assert np.array_equal(case.image_ZHW, canonical.slices(0, 5).half().numpy())
        assert case.annotated_K.all()
        assert np.array_equal(case.labels_ZHW, canonical.labels(labels))


def test_a_case_knows_which_slices_show_a_structure() -> None:
    labels = np.zeros((5, 4, 4), np.uint8)
    labels[1:3, 1, 1], labels[3, 2:, 2:] = 2, 1
    case = make_case(a_volume(labels.astype(np.int16), 2.0), a_volume(labels, 2.0), SPEC.structures, SPEC, 0)
    assert {key: value.tolist() for key, value in case.slices_of.items()} == {1: [3], 2: [1, 2]}


def test_a_batch_says_which_classes_each_image_knows() -> None:
    labels = np.zeros((5, 4, 4), np.uint8)
    image = a_volume(labels.astype(np.int16), 2.0)
    case = make_case(image, a_volume(labels, 2.0), SPEC.structures[1:], SPEC, 0)
    known = next(stream([case], images=2)).annotated_BK
    assert known.tolist() == 2 * [[True, False, *[True] * (len(SPEC.structures) - 1)]]


def test_an_image_and_labels_of_two_grids_are_no_case() -> None:
    with pytest.raises(ValueError, match="another grid"):
        make_case(a_volume(np.zeros((5, 4, 4))), a_volume(np.zeros((4, 4, 4), np.uint8)), SPEC.structures, SPEC, 0)


def test_batches_hold_as_many_images_of_each_expert_in_their_order() -> None:
    cases = [a_case(blocks(), expert) for expert in (2, 0, 2, 2, 1)]
    for batch in islice(stream(cases, images=3), 3):
        assert batch.experts_B.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert batch.images_BSHW.shape == (9, 3, 32, 32) and batch.images_BSHW.dtype == torch.float32
        assert batch.labels_BHW.shape == (9, 32, 32) and batch.labels_BHW.dtype == torch.int64


def test_a_seed_gives_the_same_batches() -> None:
    cases = [a_case(blocks(), expert) for expert in (0, 1)]
    first, again, other = (next(stream(cases, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(first.images_BSHW, again.images_BSHW) and torch.equal(first.labels_BHW, again.labels_BHW)
    assert not torch.equal(first.images_BSHW, other.images_BSHW)


def test_image_and_labels_move_together() -> None:
    """Pixels well inside and well outside of the structures are bright and dark after every turn and zoom."""
    seen = 0
    for batch in islice(stream([a_case(blocks())], images=4, crop=40), 15):
        for image, labels in zip(batch.images_BSHW[:, 1].numpy(), batch.labels_BHW.numpy(), strict=True):
            inside, outside = (minimum_filter(mask, 5, mode="constant") for mask in (labels > 0, labels == 0))
            assert image[inside].min() > 0.55 and image[outside].max() < 0.3
            seen += 1 in labels and 2 in labels
    assert seen > 30


def test_augmented_images_stay_in_the_networks_range() -> None:
    for batch in islice(stream([a_case(blocks())]), 5):
        assert batch.images_BSHW.min() >= 0
        assert batch.images_BSHW.max() <= 1


def test_augmentation_differs_from_image_to_image() -> None:
    labels = next(stream([a_case(blocks())], images=6)).labels_BHW
    assert len({image.numpy().tobytes() for image in labels}) == 6


def test_without_a_move_the_crop_is_cut_out_of_the_middle() -> None:
    case = a_case(np.random.default_rng(0).integers(0, 3, (3, 40, 48)).astype(np.uint8))
    image, labels = data._augmented(case, 1, 40, 3, Middle(np.random.PCG64(0)))
    assert np.array_equal(labels, case.labels_ZHW[1, :, 4:44])
    assert torch.equal(image[1] > 0.5, labels > 0)


def test_without_a_move_a_square_image_is_sampled_at_its_own_pixels() -> None:
    grid = data._sampling_grid(16, 16, 16, Middle(np.random.PCG64(0)))
    expected = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 16, 16], align_corners=False)
    torch.testing.assert_close(grid, expected)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60)])
def test_a_turn_is_rigid_on_images_that_are_not_square(height: int, width: int) -> None:
    grid = data._sampling_grid(height, width, 16, Turned(np.random.PCG64(0)))[0].numpy()
    pixels = grid * (width / 2, height / 2)
    np.testing.assert_allclose(
        np.diff(pixels, axis=1), np.broadcast_to([np.cos(0.2), np.sin(0.2)], (16, 15, 2)), atol=1e-5
    )
    np.testing.assert_allclose(
        np.diff(pixels, axis=0), np.broadcast_to([-np.sin(0.2), np.cos(0.2)], (15, 16, 2)), atol=1e-5
    )


def test_neighbours_are_the_channels_as_in_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_NOISE", 0.0)
    monkeypatch.setattr(data, "_GAMMA", (1.0, 1.0))
    levels = np.arange(5, dtype=np.float32) / 10 + 0.2
    image = np.broadcast_to(levels[:, None, None], (5, 8, 8)).astype(np.float16)
    case = Case(image, np.zeros((5, 8, 8), np.uint8), np.ones(1, bool), 0, {})
    rng = Middle(np.random.PCG64(0))
    for index, expected in ((0, (0, 0, 1)), (2, (1, 2, 3)), (4, (3, 4, 4))):
        found, _ = data._augmented(case, index, 8, 3, rng)
        np.testing.assert_allclose(found[:, 4, 4], levels[list(expected)], atol=1e-3)


def test_small_structures_come_up_as_often_as_large_ones() -> None:
    labels = np.zeros((100, 40, 40), np.uint8)
    labels[:, 4:36, 4:18] = 1
    labels[50, 18:22, 20:24] = 2  # one slice in a hundred
    found = [2 in image for batch in islice(stream([a_case(labels)], images=10), 20) for image in batch.labels_BHW]
    assert 0.15 < np.mean(found) < 0.4


def test_a_case_without_structures_is_used_as_well() -> None:
    batch = next(stream([a_case(np.zeros((3, 10, 10), np.uint8))]))
    assert not batch.labels_BHW.any()
