from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.labels import catalogue
from m4oe.spec import ExpertSpec, IntensityRule, ModelSpec, NetworkSpec
from m4oe.training import augment
from m4oe.training.augment import CT, MR, AugmentConfig, Augmenter, Chance, mirrored_labels
from m4oe.training.data import Batch, Case, Crops, Sampler
from scipy import ndimage
from scipy.interpolate import BSpline

KEYS = ("liver", "kidney_left", "kidney_right", "spleen")
PLAIN = AugmentConfig(**{name: Chance(0) for name in augment._NAMES})
SEEDS = st.integers(0, 2**62)


def always(value: float) -> Chance:
    return Chance(1, value, value)


def a_spec(structures: tuple[str, ...] = KEYS) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        version="1",
        network=NetworkSpec(experts=2),
        structures=structures,
        experts=(ExpertSpec("ct", "CT"), ExpertSpec("mr", "MR")),
        intensity={"CT": IntensityRule("window", 0, 100), "MR": IntensityRule("percentile", 1, 99)},
        pixel_mm=2.0,
        slice_mm=3.0,
    )


def some_crops(size: int = 40, count: int = 6, seed: int = 0, labels: Any = None) -> Crops:
    """Crops of both experts in turn, bright as their labels are, and a little noisy."""
    rng = np.random.default_rng(seed)
    if labels is None:
        labels = np.zeros((count, size, size), np.uint8)
        labels[:, size // 5 : size // 2, size // 8 : size // 2] = 1
        labels[:, size // 2 : -size // 6, size // 2 : -size // 5] = 2
    images = np.repeat(labels[:, None] / 8 + 0.2, 3, axis=1) + rng.uniform(0, 0.1, (count, 3, size, size))
    return Crops(
        torch.from_numpy(images).half(),
        torch.from_numpy(labels),
        torch.ones((count, len(KEYS) + 1), dtype=torch.bool),
        torch.arange(count) % 2,
        tuple(f"case {n}" for n in range(count)),
        tuple(rng.integers(2**62, size=count).tolist()),
    )


def varied(crops: Crops, size: int = 40, structures: tuple[str, ...] = KEYS, **chances: Chance) -> Batch:
    """By these chances alone."""
    config = replace(PLAIN, **chances)
    return Augmenter(a_spec(structures), size, {"CT": config, "MR": config})(crops)


def test_without_a_chance_the_crop_comes_out_as_it_is() -> None:
    crops = some_crops(size=40)
    batch = varied(crops, size=30)
    torch.testing.assert_close(batch.images_BSHW, crops.images_BSHW[:, :, 5:35, 5:35].float())
    assert torch.equal(batch.labels_BHW, crops.labels_BHW[:, 5:35, 5:35].long())
    assert torch.equal(batch.experts_B, crops.experts_B) and batch.names == crops.names


def test_a_crop_smaller_than_wanted_has_nothing_around_it() -> None:
    batch = varied(some_crops(size=20), size=30)
    inside = torch.zeros(30, 30, dtype=torch.bool)
    inside[5:25, 5:25] = True
    assert torch.equal((batch.images_BSHW > 1e-3).all(dim=(0, 1)), inside)
    assert torch.equal((batch.images_BSHW > 1e-3).any(dim=(0, 1)), inside)


def test_a_batch_is_what_the_network_and_the_loss_take() -> None:
    batch = Augmenter(a_spec(), 32)(some_crops())
    assert (batch.images_BSHW.dtype, batch.labels_BHW.dtype) == (torch.float32, torch.int64)
    assert batch.images_BSHW.shape == (6, 3, 32, 32) and batch.labels_BHW.shape == (6, 32, 32)
    assert batch.images_BSHW.is_contiguous() and batch.labels_BHW.is_contiguous()


def test_the_move_is_that_of_scipy() -> None:
    """Turned by 10 degrees, magnified by 1.2 with rows 1.1 times as much as columns, shifted by 2 and -3 pixels."""
    crops = some_crops(size=60, seed=3)
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).random(crops.images_BSHW.shape), (0, 0, 2, 2)) * 3 - 1
    crops = replace(crops, images_BSHW=torch.from_numpy(smooth.clip(0, 1)).half())
    chances = {"rotation": 10.0, "scale": 1.2, "aspect": 1.1, "shift_x": 2 / 40, "shift_y": -3 / 40}
    batch = varied(crops, **{name: always(value) for name, value in chances.items()})
    angle = np.deg2rad(10)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # acts on (row, column)
    matrix = turn @ np.diag([1 / (1.2 * 1.1**0.5), 1.1**0.5 / 1.2])
    offset = 29.5 + np.array([-3, 2]) - matrix @ (19.5, 19.5)
    for image, moved in zip(crops.images_BSHW[:, 0].float(), batch.images_BSHW[:, 0], strict=True):
        expected = ndimage.affine_transform(image, matrix, offset, (40, 40), order=1)
        np.testing.assert_allclose(moved, expected, atol=2e-5)
    expected = ndimage.affine_transform(crops.labels_BHW[0], matrix, offset, (40, 40), order=0)
    assert np.mean(batch.labels_BHW[0].numpy() != expected) < 0.005  # ties


@settings(max_examples=15, deadline=None)
@given(SEEDS)
def test_image_and_labels_move_together(seed: int) -> None:
    """Pixels well inside and well outside of a structure are as bright as it is after every move."""
    moves = {name: getattr(MR, name) for name in ("flip", "rotation", "scale", "aspect", "shift_x", "shift_y")}
    batch = varied(
        some_crops(60, seed=seed),
        structures=("liver", "spleen", "aorta", "pancreas"),
        elastic=Chance(1, 0, 0.2),
        **moves,
    )
    for image, labels in zip(batch.images_BSHW[:, 1].numpy(), batch.labels_BHW.numpy(), strict=True):
        for label in (1, 2):
            inside = ndimage.minimum_filter(labels == label, 7, mode="constant")
            assert np.all(abs(image[inside] - label / 8 - 0.25) < 0.051)


def test_the_margin_holds_all_that_moves_bring_into_view() -> None:
    for config in (CT, MR, replace(PLAIN, rotation=Chance(1, -40, 5), shift_x=Chance(1, -0.3, 0.1)), PLAIN):
        margin, size = config.margin(40), 40 + 2 * config.margin(40)
        crops = replace(some_crops(size, 200), images_BSHW=torch.ones(200, 3, size, size, dtype=torch.half))
        moves = [
            name for name in augment._NAMES if name in ("rotation", "scale", "aspect", "shift_x", "shift_y", "elastic")
        ]
        batch = varied(crops, **{name: getattr(config, name) for name in moves})
        assert batch.images_BSHW.min() > 0.999
        assert (margin == 0) == (config is PLAIN)


# Left and right


def test_a_flip_mirrors_image_and_labels_and_changes_left_and_right_over() -> None:
    labels = np.random.default_rng(0).integers(0, 5, (4, 40, 40)).astype(np.uint8)
    crops = some_crops(labels=labels, count=4)
    batch = varied(crops, flip=Chance(1))
    torch.testing.assert_close(batch.images_BSHW, crops.images_BSHW.flip(-1).float())
    assert np.array_equal(batch.labels_BHW, np.array([0, 1, 3, 2, 4])[labels[:, :, ::-1]])


def test_a_flip_changes_over_which_side_is_known() -> None:
    crops = some_crops()
    crops.annotated_BK[:3, 2] = False
    batch = varied(crops, flip=Chance(1))
    assert batch.annotated_BK.tolist() == 3 * [[True, True, True, False, True]] + 3 * [[True] * 5]


@pytest.mark.parametrize(("key", "annotated"), [("kidney_left", True), ("kidney_left", False), ("liver", True)])
def test_an_image_is_not_mirrored_where_a_side_would_have_no_name(key: str, annotated: bool) -> None:
    """A model that knows only left kidneys must not see a right kidney, mirrored, as background on the left."""
    crops = some_crops()
    crops.annotated_BK[:, 1] = annotated
    batch = varied(crops, structures=(key, "spleen", "aorta", "pancreas"), flip=Chance(1))
    mirrored = torch.allclose(batch.images_BSHW, crops.images_BSHW.flip(-1).float(), atol=1e-3)
    assert mirrored == (key == "liver" or not annotated)


def test_every_structure_of_a_side_has_its_partner_or_none() -> None:
    keys = tuple(catalogue())
    mirrored, unnamed = (tensor.tolist() for tensor in mirrored_labels(keys))
    partners = {key: keys[label - 1] for key, label in zip(keys, mirrored[1:], strict=True)}
    assert partners["rib_left_7"] == "rib_right_7" and partners["liver"] == "liver" and partners["kidney"] == "kidney"
    assert all(partners[other] == key for key, other in partners.items())
    sides = {key: catalogue()[key].laterality for key in keys}
    swapped = {"left": "right", "right": "left"}
    for key, alone in zip(keys, unnamed[1:], strict=True):
        assert sides[partners[key]] == (sides[key] if alone else swapped.get(sides[key], sides[key]))
    alone = {key for key, without in zip(keys, unnamed[1:], strict=True) if without}
    assert {"lung_middle_lobe_right", "heart_atrium_left", "heart_ventricle_right"} <= alone
    assert not alone & {"kidney_left", "adrenal_gland_right", "liver", "lung_left"}


# Elastic


def test_the_deformation_is_a_cubic_spline() -> None:
    points = np.random.default_rng(0).normal(size=7)
    found = augment._splines(40, 4).double() @ torch.from_numpy(points)
    spline = BSpline(np.arange(-3, 8), points, 3)
    np.testing.assert_allclose(found, spline((np.arange(40) + 0.5) / 10), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_strongest_deformation_does_not_fold(seed: int) -> None:
    augmenter = Augmenter(a_spec(), 40, dict.fromkeys(("CT", "MR"), replace(PLAIN, elastic=always(0.48))))
    crops = some_crops(40, seed=seed)
    drawn, bends, _ = augmenter._draw(crops)
    bends = bends.sign() * 0.48 / 4  # as far as they go
    x, y = augmenter._grid(drawn, torch.zeros(6, dtype=torch.bool), bends, 40).numpy().transpose(3, 0, 1, 2) * 20
    along, down = (np.stack([np.diff(p, axis=axis)[:, :39, :39] for p in (x, y)]) for axis in (2, 1))
    assert (along[0] * down[1] - along[1] * down[0]).min() > 0


def test_a_deformation_that_may_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="may fold"):
        replace(MR, elastic=Chance(0.1, 0.1, 0.6))


# Contrast and acquisition


def test_contrast_and_brightness_are_a_line_and_gamma_a_power() -> None:
    crops = some_crops()
    plain = crops.images_BSHW.float()
    batch = varied(crops, gamma=always(1.3), contrast=always(0.8), brightness=always(0.03))
    torch.testing.assert_close(batch.images_BSHW, (plain**1.3 * 0.8 + 0.03).clamp(0, 1))


def test_the_bias_field_is_smooth_positive_and_one_for_all_channels() -> None:
    crops = some_crops(seed=2)
    field = varied(crops, bias=Chance(1, 0.2, 0.2)).images_BSHW / crops.images_BSHW.float()
    torch.testing.assert_close(field[:, 0], field[:, 2])
    assert np.exp(-0.2) < field.min() < 0.97 and 1.03 < field.max() < np.exp(0.2)
    assert field.diff(dim=-1).abs().max() < 0.02


def test_ct_has_no_bias_field() -> None:
    assert CT.bias.probability == 0 < MR.bias.probability


def test_each_image_is_varied_as_fits_its_modality() -> None:
    crops = some_crops()
    configs = {"CT": PLAIN, "MR": replace(PLAIN, contrast=always(0.5))}
    found = Augmenter(a_spec(), 40, configs)(crops).images_BSHW / crops.images_BSHW.float()
    torch.testing.assert_close(found.amax((1, 2, 3)), torch.tensor([1, 0.5, 1, 0.5, 1, 0.5]))


@pytest.mark.parametrize("sigma", [0.4, 0.8, 1.2])
def test_blur_is_that_of_scipy(sigma: float) -> None:
    crops = some_crops()
    found = varied(crops, blur=always(sigma)).images_BSHW
    sigmas, radius = (0, 0, sigma, sigma), (0, 0, 4, 4)
    expected = ndimage.gaussian_filter(crops.images_BSHW.float(), sigmas, mode="nearest", radius=radius)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("pixels", [1.25, 2.0, 2.7])
def test_low_resolution_is_that_of_two_interpolations(pixels: float) -> None:
    crops = some_crops()
    found = varied(crops, coarseness=always(pixels)).images_BSHW
    small = F.interpolate(crops.images_BSHW.float(), (round(40 / pixels),) * 2, mode="bilinear")
    torch.testing.assert_close(found, F.interpolate(small, (40, 40), mode="bilinear"), atol=2e-5, rtol=1e-4)


def test_low_resolution_is_each_images_own() -> None:
    images = some_crops().images_BSHW.float()
    pixels = torch.tensor([1.0, 1.3, 2.0, 2.5, 3.1, 40.0])
    together = augment._coarsen(images, pixels)
    for image, value, found in zip(images, pixels, together, strict=True):
        torch.testing.assert_close(augment._coarsen(image[None], value[None])[0], found, atol=1e-5, rtol=1e-5)


def test_noise_has_its_deviation_and_differs_in_every_pixel() -> None:
    crops = some_crops()
    noise = varied(crops, noise=always(0.02)).images_BSHW - crops.images_BSHW.float()
    np.testing.assert_allclose(noise.std((1, 2, 3)), 0.02, rtol=0.1)
    assert abs(np.corrcoef(noise.flatten(1))[np.triu_indices(6, 1)]).max() < 0.07
    assert abs(np.corrcoef(noise[0].flatten(1))[np.triu_indices(3, 1)]).max() < 0.1


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_images_stay_in_the_networks_range(seed: int) -> None:
    images = Augmenter(a_spec(), 32)(some_crops(seed=seed)).images_BSHW
    assert images.min() >= 0 and images.max() <= 1


def test_a_chance_comes_up_as_often_as_it_says_and_stays_in_its_range() -> None:
    config = replace(PLAIN, gamma=Chance(0.3, 1.2, 1.6))
    augmenter = Augmenter(a_spec(), 8, {"CT": PLAIN, "MR": config})
    values = augmenter._draw(some_crops(8, 2000))[0]["gamma"]
    chosen = values[1::2][values[1::2] != 1]
    assert (values[::2] == 1).all()
    assert 0.25 < len(chosen) / 1000 < 0.35
    assert 1.2 <= chosen.min() < 1.22 and 1.58 < chosen.max() <= 1.6


# Seeds


def test_an_image_is_varied_alike_in_every_batch() -> None:
    crops, augmenter = some_crops(seed=9), Augmenter(a_spec(), 32)
    whole = augmenter(crops)
    for rows in ([0, 2, 4], [1], [5, 3]):
        tensors = [
            tensor[rows] for tensor in (crops.images_BSHW, crops.labels_BHW, crops.annotated_BK, crops.experts_B)
        ]
        part = augmenter(Crops(*tensors, crops.names[:1], tuple(crops.seeds[row] for row in rows)))
        torch.testing.assert_close(part.images_BSHW, whole.images_BSHW[rows], rtol=0, atol=1e-5)
        assert (part.labels_BHW == whole.labels_BHW[rows]).float().mean() > 0.999


def test_the_same_seeds_give_the_same_batch_to_the_last_bit() -> None:
    first, second = (Augmenter(a_spec(), 32)(some_crops(seed=4)) for _ in range(2))
    assert torch.equal(first.images_BSHW, second.images_BSHW) and torch.equal(first.labels_BHW, second.labels_BHW)


def test_images_of_one_slice_are_varied_each_in_its_own_way() -> None:
    case = Case(some_crops().images_BSHW[:1, 0].numpy(), None, np.ones(5, bool), 0, {})
    batch = Augmenter(a_spec(), 32)(Sampler([case], 6, 32, 3, 0).crops_at(0))
    assert len({image.numpy().tobytes() for image in batch.images_BSHW}) == 6


def test_nothing_waits_for_the_device() -> None:
    """On the device `meta`, which computes nothing, every look at a value and every mix of devices fails."""
    every = {name: replace(getattr(MR, name), probability=1) for name in augment._NAMES}
    batch = Augmenter(a_spec(), 32, dict.fromkeys(("CT", "MR"), replace(MR, **every)), device="meta")(some_crops())
    assert batch.images_BSHW.shape == (6, 3, 32, 32) and batch.labels_BHW.shape == (6, 32, 32)
    assert all(t.is_meta for t in (batch.images_BSHW, batch.labels_BHW, batch.annotated_BK))
    assert batch.experts_B.is_cpu and batch.told_B.is_cpu


@pytest.mark.parametrize(("probability", "low", "high"), [(1.5, 0, 1), (-0.1, 0, 1), (0.5, 2, 1)])
def test_what_is_no_chance_is_refused(probability: float, low: float, high: float) -> None:
    with pytest.raises(ValueError, match="expected a probability"):
        Chance(probability, low, high)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        replace(MR, scale=Chance(1, 0, 1))
