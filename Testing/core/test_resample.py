from __future__ import annotations

import tracemalloc
from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe import modality, resample
from m4oe.geometry import Grid, Volume
from m4oe.modality import modality_evidence
from m4oe.resample import CanonicalVolume, LabelPainter
from m4oe.spec import IntensityRule
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

ALL_AXES = ["".join(letters) for pairs in permutations(("RL", "AP", "SI")) for letters in product(*pairs)]
WINDOW = IntensityRule("window", -100, 300)
PERCENTILE = IntensityRule("percentile", 1, 99)
SIZES = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def a_volume(array: ArrayLike, spacing: tuple[float, float, float] = (1, 1, 1), modality: str | None = None) -> Volume:
    """A volume in LPS order with voxels of `spacing` (i, j, k) mm."""
    array = np.asarray(array)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (31, -17, 205)
    return Volume(array, Grid(array.shape, affine), modality=modality)


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def a_range(low: float, high: float) -> IntensityRule:
    return IntensityRule("window", low, high)


def all_slices(canonical: CanonicalVolume) -> NDArray[np.float32]:
    return canonical.slices(0, canonical.shape[0]).numpy()


def painted(scores: torch.Tensor, shape: tuple[int, int, int], slabs: list[int]) -> NDArray[np.integer]:
    labels = np.full(shape, 99, np.uint16)
    painter = LabelPainter(shape, scores.shape[:3], labels)
    for slab in scores.split(slabs):
        painter.add(slab)
    return labels


def interpolated(scores: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Scores [z, j, i, K] on the fine grid, by torch's own trilinear interpolation in double precision."""
    fine = F.interpolate(scores.double().permute(3, 0, 1, 2)[None], shape, mode="trilinear", align_corners=False)
    return fine[0].permute(1, 2, 3, 0)


def partition(total: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    parts: list[int] = []
    while sum(parts) < total:
        parts.append(min(int(rng.integers(1, 5)), total - sum(parts)))
    return parts


@settings(max_examples=80, deadline=None)
@given(SIZES, SIZES, st.integers(2, 5), st.integers(0, 10_000))
def test_labels_are_the_argmax_of_interpolated_scores_whatever_the_slabs(
    coarse: tuple[int, int, int], fine: tuple[int, int, int], classes: int, seed: int
) -> None:
    scores = torch.from_numpy(noise(*coarse, classes, seed=seed))
    labels = painted(scores, fine, partition(coarse[0], seed))
    expected = interpolated(scores, fine)
    lead = expected.topk(2, dim=-1).values.diff(dim=-1)[..., 0].abs().numpy()
    wrong = labels != expected.argmax(-1).numpy()
    assert not (wrong & (lead > 1e-5)).any()  # below, single precision may decide either way


def test_256_classes_are_told_apart() -> None:
    scores = torch.from_numpy(noise(2, 6, 6, 256))
    labels = painted(scores, (5, 13, 7), [1, 1])
    assert labels.max() > 127
    assert np.array_equal(labels, interpolated(scores, (5, 13, 7)).argmax(-1))


def test_a_painter_fills_views_of_any_strides() -> None:
    scores, base = torch.from_numpy(noise(3, 4, 4, 3)), np.zeros((9, 8, 5), np.uint8)
    view = base.transpose(2, 1, 0)[::-1, :, ::-1]
    painter = LabelPainter((5, 8, 9), (3, 4, 4), view)
    painter.add(scores)
    assert np.array_equal(view, painted(scores, (5, 8, 9), [3]))


def test_slices_are_painted_as_soon_as_they_are_known() -> None:
    scores, labels = torch.from_numpy(noise(4, 2, 2, 2)), np.full((16, 2, 2), 9, np.uint8)
    painter = LabelPainter((16, 2, 2), (4, 2, 2), labels)
    painter.add(scores[:2])
    assert [bool((plane != 9).all()) for plane in labels] == [True] * 6 + [False] * 10


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_size_of_chunks_changes_no_label(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.from_numpy(noise(3, 5, 5, 4))
    expected = painted(scores, (4, 11, 12), [3])
    monkeypatch.setattr(resample, "_SCORES_AT_ONCE", chunk)
    assert np.array_equal(painted(scores, (4, 11, 12), [3]), expected)


@settings(max_examples=15, deadline=None)
@given(SIZES, st.tuples(*[st.floats(0.6, 3)] * 3), st.sampled_from(ALL_AXES))
def test_a_ramp_in_world_space_stays_a_ramp(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], axes: str
) -> None:
    """Each canonical voxel, put at its own place between the shared borders, holds its own world position."""
    shape = (shape[0] + 3, shape[1] + 3, shape[2] + 3)
    grid = a_volume(np.zeros(shape), spacing).to_axes(axes).grid
    k, j, i = np.indices(grid.shape).reshape(3, -1)
    ras = (grid.affine @ np.stack([i, j, k, np.ones_like(i)]))[:3].reshape(3, *grid.shape)
    for axis, ramp in enumerate(ras):
        canonical = CanonicalVolume(Volume(ramp, grid), 2, 2, a_range(-400, 400))
        found = all_slices(canonical) * 800 - 400
        source = canonical.source.grid
        steps = [fine / coarse for fine, coarse in zip(source.shape, canonical.shape, strict=True)]
        centres = [(np.arange(n) + 0.5) * s - 0.5 for n, s in zip(canonical.shape, steps, strict=True)]
        k, j, i = np.meshgrid(*centres, indexing="ij")
        expected = np.tensordot(source.affine[axis, :3], np.stack([i, j, k]), 1) + source.affine[axis, 3]
        inside = tuple(slice(1, -1) for _ in range(3))  # at the border the mean runs over one side alone
        coarse_mm = steps[2 - axis] * spacing[axis]
        assert np.abs(found - expected)[inside].max(initial=0) < 0.08 * coarse_mm  # a triangle is not quite exact


def test_finer_sampling_agrees_with_itk() -> None:
    volume = a_volume(noise(6, 7, 8), (3, 4, 2))
    canonical = CanonicalVolume(volume, 1, 2, a_range(-5, 5))
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing((3, 4, 2))
    first = (0.5 - 1.5, 0.5 - 2, 0)  # the borders are shared, not the first voxels' centres
    wanted = sitk.Resample(
        image, (24, 28, 6), sitk.Transform(), sitk.sitkLinear, first, (1, 1, 2), (1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    assert canonical.shape == (6, 28, 24)
    inside = (slice(None), slice(2, -2), slice(2, -2))
    found = all_slices(canonical) * 10 - 5
    np.testing.assert_allclose(found[inside], sitk.GetArrayViewFromImage(wanted)[inside], atol=1e-4)


def test_coarser_sampling_of_a_smooth_image_agrees_with_itk() -> None:
    k, j, i = np.indices((24, 30, 32)) / 8
    volume = a_volume(np.sin(i + 1) * np.cos(j) * np.sin(k + 2))
    canonical = CanonicalVolume(volume, 2, 3, a_range(-1, 1))
    image = sitk.GetImageFromArray(volume.array)
    wanted = sitk.Resample(
        image, (16, 15, 8), sitk.Transform(), sitk.sitkBSpline, (0.5, 0.5, 1), (2, 2, 3), (1, 0, 0, 0, 1, 0, 0, 0, 1)
    )
    inside = (slice(1, -1),) * 3
    found = all_slices(canonical) * 2 - 1
    np.testing.assert_allclose(found[inside], sitk.GetArrayViewFromImage(wanted)[inside], atol=0.03)


def test_a_bright_voxel_ends_where_it_lies_in_the_patient() -> None:
    array = np.zeros((6, 20, 20))
    array[1, 14, 4] = 1
    for axes in ALL_AXES:
        canonical = CanonicalVolume(a_volume(array).to_axes(axes), 2, 2, a_range(0, 1))
        assert np.argwhere(all_slices(canonical) == all_slices(canonical).max()).tolist() == [[0, 7, 2]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.sampled_from([0.4, 1.0, 3.0, 5.0]), st.integers(0, 99))
def test_slabs_change_no_slice(count: int, slice_mm: float, seed: int) -> None:
    canonical = CanonicalVolume(a_volume(noise(count, 5, 6), (2, 2, slice_mm)), 3, 3, a_range(-3, 3))
    ends = np.cumsum(partition(canonical.shape[0], seed)).tolist()
    slabs = [canonical.slices(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    np.testing.assert_allclose(np.concatenate(slabs), all_slices(canonical), atol=3e-7)


def test_fine_pixels_are_averaged_and_not_skipped() -> None:
    stripes = np.zeros((1, 36, 36))
    stripes[:, :, ::3] = 1
    found = all_slices(CanonicalVolume(a_volume(stripes), 3, 3, a_range(0, 1)))
    np.testing.assert_allclose(found[:, :, 1:-1], 1 / 3, atol=1e-5)


def test_thick_slices_stay_as_they_are() -> None:
    array = noise(4, 5, 5)
    canonical = CanonicalVolume(a_volume(array, (2, 2, 8)), 2, 3, a_range(-5, 5))
    np.testing.assert_allclose(all_slices(canonical) * 10 - 5, array, atol=1e-5)


def test_thin_slices_are_averaged_and_a_constant_stays_constant() -> None:
    ends = np.zeros((9, 1, 1))
    ends[4] = 1
    canonical = CanonicalVolume(a_volume(ends), 1, 3, a_range(0, 1))
    assert canonical.shape == (3, 1, 1)
    np.testing.assert_allclose(all_slices(canonical).ravel(), [0, 1 / 3, 0], atol=1e-6)
    flat = CanonicalVolume(a_volume(np.full((9, 4, 4), 0.25)), 2, 3, a_range(0, 1))
    np.testing.assert_allclose(all_slices(flat), 0.25, atol=1e-6)


@given(st.floats(0.3, 6), st.floats(0.3, 6), st.tuples(*[st.integers(1, 400)] * 3))
def test_the_canonical_grid_has_the_models_spacing_to_half_a_voxel(
    pixel_mm: float, slice_mm: float, shape: tuple[int, int, int]
) -> None:
    array = np.broadcast_to(np.float32(1), shape)
    canonical = CanonicalVolume(a_volume(array, (0.7, 0.9, 2.5)), pixel_mm, slice_mm, WINDOW)
    wanted = (max(slice_mm, 2.5), pixel_mm, pixel_mm)
    for count, fine, step, mm in zip(canonical.shape, shape, (2.5, 0.9, 0.7), wanted, strict=True):
        assert count == 1 or abs(count * mm - fine * step) <= 0.501 * mm


@pytest.mark.parametrize("seed", range(20))
def test_turning_the_header_leaves_the_canonical_grid_alone(seed: int) -> None:
    straight = np.diag([-0.5, -0.5, 0.5, 1])  # 11 voxels are 5.5 voxels of 1 mm: a tie
    tilted = straight.copy()
    angles = np.random.default_rng(seed).uniform(-20, 20, 3)
    tilted[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ straight[:3, :3]
    shapes = [
        CanonicalVolume(Volume(np.zeros((11, 11, 11)), Grid((11, 11, 11), affine)), 1, 1, WINDOW).shape
        for affine in (straight, tilted)
    ]
    assert shapes == [(6, 6, 6), (6, 6, 6)]


def test_stacks_hold_each_slice_with_its_neighbours() -> None:
    canonical = CanonicalVolume(a_volume(noise(5, 3, 4)), 1, 1, a_range(-4, 4))
    one, stacks = canonical.slices(0, 5), canonical.stacks(0, 5, 3)
    assert torch.equal(stacks, torch.stack([one[[0, 0, 1, 2, 3]], one, one[[1, 2, 3, 4, 4]]], dim=1))
    assert torch.equal(canonical.stacks(2, 4, 3), stacks[2:4])
    assert torch.equal(canonical.stacks(1, 3, 1), one[1:3, None])


def test_one_slice_is_its_own_neighbour() -> None:
    stack = CanonicalVolume(a_volume(noise(1, 3, 4)), 1, 1, a_range(-4, 4)).stacks(0, 1, 5)
    assert torch.equal(stack[:, :1].expand(-1, 5, -1, -1), stack)


def test_a_window_is_clipped_and_nan_is_black() -> None:
    values = np.array([[[-2000.0, -100, 100, 300, 2000, np.nan, np.inf, -np.inf]]])
    canonical = CanonicalVolume(a_volume(values), 1, 1, WINDOW)
    np.testing.assert_allclose(all_slices(canonical).ravel(), [0, 0, 0.5, 1, 1, 0, 1, 0])


def test_an_offset_is_added_before_the_window() -> None:
    canonical = CanonicalVolume(a_volume(np.array([[[924, 1124, 1324]]], np.uint16)), 1, 1, WINDOW, offset=-1024)
    np.testing.assert_allclose(all_slices(canonical).ravel(), [0, 0.5, 1])


def test_percentiles_are_those_of_the_non_zero_finite_voxels() -> None:
    array = np.abs(noise(5, 20, 20)) + 1
    array[0], array[1, 0] = 0, np.nan
    canonical = CanonicalVolume(a_volume(array), 1, 1, PERCENTILE)
    low, high = np.percentile(array[np.isfinite(array) & (array != 0)], [1, 99])
    expected = np.nan_to_num(np.clip((array - low) / (high - low), 0, 1))
    np.testing.assert_allclose(all_slices(canonical), expected, atol=1e-5)


@pytest.mark.parametrize("value", [0, 7, -3.5, 1e30, np.nan])
@pytest.mark.parametrize("rule", [WINDOW, PERCENTILE])
def test_constant_volumes_give_one_finite_value(value: float, rule: IntensityRule) -> None:
    found = all_slices(CanonicalVolume(a_volume(np.full((2, 3, 3), value)), 1, 1, rule))
    assert np.ptp(found) == 0 and 0 <= found[0, 0, 0] <= 1


@pytest.mark.parametrize("kind", ["<i2", ">i2", ">u2", "u4", "i8", "<f4", ">f8", "f2"])
@pytest.mark.parametrize("rule", [WINDOW, PERCENTILE])
def test_the_stored_type_makes_no_difference(kind: str, rule: IntensityRule) -> None:
    values = np.arange(4 * 5 * 6).reshape(4, 5, 6)
    expected = all_slices(CanonicalVolume(a_volume(values.astype(np.float64)), 1, 2, rule))
    stored = values.astype(kind)
    assert np.array_equal(all_slices(CanonicalVolume(a_volume(stored), 1, 2, rule)), expected)
    assert np.array_equal(stored, values)  # the user's array is not touched


@pytest.mark.parametrize("axes", ALL_AXES)
def test_storage_order_makes_no_difference_even_where_percentiles_are_sampled(
    axes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modality, "_SAMPLE_VOXELS", 50)
    volume = a_volume(noise(6, 7, 8) * 100)
    expected, found = (CanonicalVolume(v, 2, 2, PERCENTILE) for v in (volume, volume.to_axes(axes)))
    assert (found.low, found.high) == (expected.low, expected.high)
    assert np.array_equal(all_slices(found), all_slices(expected))
    assert modality_evidence(volume.to_axes(axes)) == modality_evidence(volume)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.tuples(*[st.floats(0.5, 4)] * 3))
def test_labels_come_from_the_nearest_voxel(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    volume = a_volume(np.arange(np.prod(shape)).reshape(shape), spacing)
    canonical = CanonicalVolume(volume, 1.5, 1.5, WINDOW)
    k, j, i = np.unravel_index(canonical.labels(volume), shape)
    for axis, index in enumerate((k, j, i)):
        fine, coarse = shape[axis], canonical.shape[axis]
        centres = (np.arange(coarse) + 0.5) * fine / coarse - 0.5
        apart = np.abs(np.moveaxis(index, axis, -1) - centres)
        assert apart.max() <= 0.5 + 1e-9


@pytest.mark.parametrize("axes", ALL_AXES)
def test_labels_follow_the_axis_order(axes: str) -> None:
    volume = a_volume(np.arange(60).reshape(3, 4, 5))
    canonical = CanonicalVolume(volume.to_axes(axes), 1, 1, WINDOW)
    assert np.array_equal(canonical.labels(volume.to_axes(axes)), volume.array)
    assert np.array_equal(canonical.labels(volume), volume.array)


@pytest.mark.parametrize("fine", [(4, 8, 8), (8, 16, 12)])
def test_painting_the_canonical_labels_gives_them_back(fine: tuple[int, int, int]) -> None:
    """Where the canonical grid is a whole number of times coarser, labels that it can hold survive both ways."""
    coarse = noise(4, 8, 4) > 0
    truth = coarse.astype(np.uint8)
    for axis, size in enumerate(fine):
        truth = truth.repeat(size // coarse.shape[axis], axis)
    volume = a_volume(truth, (8 / fine[2], 16 / fine[1], 8 / fine[0]))
    canonical = CanonicalVolume(volume, 2, 2, WINDOW)
    assert np.array_equal(canonical.labels(volume), coarse)


def test_labels_on_another_grid_are_refused() -> None:
    canonical = CanonicalVolume(a_volume(np.zeros((3, 4, 5))), 1, 1, WINDOW)
    with pytest.raises(ValueError, match="another grid"):
        canonical.labels(a_volume(np.zeros((3, 4, 6))))
    with pytest.raises(ValueError, match="another grid"):
        canonical.labels(a_volume(np.zeros((3, 4, 5)), (1, 1, 2)))


def test_the_volume_is_never_copied_whole() -> None:
    volume = a_volume(np.zeros((200, 128, 128), np.int16), (1, 1, 3))
    tracemalloc.start()
    canonical = CanonicalVolume(volume.to_axes("RAI"), 2, 3, WINDOW)
    for start in range(0, 200, 4):
        canonical.slices(start, start + 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.shares_memory(canonical.source.array, volume.array)
    assert peak < volume.array.nbytes / 4


def a_head(air: float, tissue: float) -> NDArray[np.float32]:
    array = np.full((8, 16, 16), air, np.float32)
    array[:, 4:12, 4:12] = tissue + 10 * noise(8, 8, 8)
    array[:, 7:9, 7:9] += 300  # bone
    return array


def test_the_dicom_tag_is_believed_first() -> None:
    hu = a_head(-1000, 40)
    assert modality_evidence(a_volume(hu, modality="MR")).modality == "MR"
    assert modality_evidence(a_volume(hu, modality="MR")).certain
    ct = modality_evidence(a_volume(a_head(0, 200), modality="CT"))
    assert (ct.modality, ct.certain, ct.offset, ct.doubt) == ("CT", True, 0, "")


def test_hounsfield_units_prove_ct() -> None:
    evidence = modality_evidence(a_volume(a_head(-1000, 40).astype(np.int16)))
    assert (evidence.modality, evidence.certain, evidence.offset) == ("CT", True, 0)


@pytest.mark.parametrize("modality", [None, "CT"])
def test_hounsfield_units_with_an_offset_are_recognised(modality: str | None) -> None:
    evidence = modality_evidence(a_volume(a_head(24, 1064).astype(np.uint16), modality=modality))
    assert (evidence.modality, evidence.certain, evidence.offset) == ("CT", True, -1024)
    assert "1024" in evidence.doubt


def test_the_offset_is_not_taken_off_an_mr() -> None:
    assert modality_evidence(a_volume(a_head(24, 1064), modality="MR")).offset == 0


@pytest.mark.parametrize("array", [a_head(0, 200).clip(0, 255).astype(np.uint8), np.abs(a_head(3, 500))])
def test_a_windowed_or_positive_volume_proves_nothing(array: NDArray[np.float32]) -> None:
    evidence = modality_evidence(a_volume(array))
    assert (evidence.modality, evidence.certain) == ("MR", False)


@pytest.mark.parametrize(("tag", "modality"), [(None, "MR"), ("MR", "MR"), ("CT", "CT")])
def test_without_finite_voxels_only_the_tag_counts(tag: str | None, modality: str) -> None:
    evidence = modality_evidence(a_volume(np.full((2, 2, 2), np.nan), modality=tag))
    assert (evidence.modality, evidence.certain) == (modality, tag is not None)
