from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.geometry import Grid, Volume, foreground_box, label_intensities, nearest_rotation
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

ALL_AXES = ["".join(letters) for pairs in permutations(("RL", "AP", "SI")) for letters in product(*pairs)]
TO_LPS = np.diag([-1.0, -1.0, 1.0])


def a_volume(rotation: NDArray[np.float64] | None = None, shape: tuple[int, int, int] = (4, 3, 2)) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) * (0.8, 1.5, 5.0)
    affine[:3, 3] = (-101.3, 57.1, 812.9)
    return Volume(np.arange(np.prod(shape)).reshape(shape), Grid(shape, affine), "a")


def positions(volume: Volume) -> NDArray[np.float64]:
    """RAS position [value, 3] of every voxel, indexed by the voxel's (unique) value."""
    k, j, i = np.indices(volume.array.shape).reshape(3, -1)
    ras = (volume.grid.affine @ np.stack([i, j, k, np.ones_like(i)]))[:3].T
    return ras[np.argsort(volume.array.reshape(-1))]


def as_itk(volume: Volume) -> sitk.Image:
    image = sitk.GetImageFromArray(volume.array)
    image.SetSpacing(volume.grid.spacing)
    image.SetDirection((TO_LPS @ volume.grid.direction).ravel().tolist())
    image.SetOrigin((TO_LPS @ volume.grid.affine[:3, 3]).tolist())
    return image


@st.composite
def tilts(draw: st.DrawFn) -> NDArray[np.float64]:
    """Rotations small enough that the nearest axis order does not change."""
    angles = [draw(st.floats(-20, 20)) for _ in range(3)]
    return Rotation.from_euler("xyz", angles, degrees=True).as_matrix()


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_axis_order_keeps_each_voxel_at_its_place(axes: str) -> None:
    volume = a_volume()
    moved = volume.to_axes(axes)
    assert moved.grid.axes == axes
    np.testing.assert_allclose(positions(moved), positions(volume), atol=1e-9)


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_axis_order_agrees_with_itk(axes: str) -> None:
    moved = a_volume().to_axes(axes)
    expected = sitk.DICOMOrient(as_itk(a_volume()), axes)
    assert np.array_equal(moved.array, sitk.GetArrayViewFromImage(expected))
    np.testing.assert_allclose(as_itk(moved).GetOrigin(), expected.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(as_itk(moved).GetDirection(), expected.GetDirection(), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(tilts(), st.sampled_from(ALL_AXES), st.sampled_from(ALL_AXES))
def test_oblique_round_trip_is_exact(tilt: NDArray[np.float64], stored: str, wanted: str) -> None:
    volume = a_volume(tilt).to_axes(stored)
    moved = volume.to_axes(wanted)
    back = moved.to_axes(volume.grid.axes)
    assert (volume.grid.axes, moved.grid.axes) == (stored, wanted)
    assert np.array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.grid.affine, volume.grid.affine, atol=1e-9)
    np.testing.assert_allclose(positions(moved), positions(volume), atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_axes_are_the_nearest_of_all_48(seed: int) -> None:
    grid = a_volume(Rotation.random(random_state=seed).as_matrix()).grid
    unit = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    likeness = {axes: np.sum(np.transpose([unit[a] for a in axes]) * grid.direction) for axes in ALL_AXES}
    assert likeness[grid.axes] == pytest.approx(max(likeness.values()))


def test_to_axes_is_a_view() -> None:
    volume = a_volume()
    assert np.shares_memory(volume.to_axes("SAR").array, volume.array)


def test_to_axes_keeps_name_modality_and_warnings() -> None:
    volume = Volume(np.zeros((1, 1, 1)), Grid((1, 1, 1), np.eye(4)), "case", "CT", ("odd",))
    moved = volume.to_axes("LPS")
    assert (moved.name, moved.modality, moved.warnings) == ("case", "CT", ("odd",))


@pytest.mark.parametrize("axes", ["", "LP", "LLS", "LRS", "XYZ", "lps", "LPSS"])
def test_unknown_axes_are_refused(axes: str) -> None:
    with pytest.raises(ValueError, match="one letter each"):
        a_volume().to_axes(axes)


def test_grid_tells_spacing_direction_and_voxel_volume() -> None:
    tilt = Rotation.from_euler("z", 30, degrees=True).as_matrix()
    grid = a_volume(tilt).grid
    np.testing.assert_allclose(grid.spacing, (0.8, 1.5, 5.0))
    np.testing.assert_allclose(grid.direction, tilt)
    assert grid.voxel_ml == pytest.approx(0.006)


def test_affine_is_a_read_only_copy() -> None:
    affine = np.eye(4)
    grid = Grid((1, 2, 3), affine)
    affine[0, 3] = 7
    assert grid.affine[0, 3] == 0
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 3] = 7


@pytest.mark.parametrize("shape", [(0, 2, 2), (2, 2), (1, 1, -1)])
def test_empty_grids_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Grid(shape, np.eye(4))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1, 0, 1, 1]), "above zero"),
        (np.full((4, 4), np.nan), "finite"),
        (np.eye(3), "4 x 4"),
        (np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "one plane"),
        (np.diag([1, 1, 1, 2]), "last row"),
    ],
)
def test_bad_affines_are_refused(affine: NDArray[np.float64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid((2, 2, 2), affine)


def test_tiny_spacing_is_not_singular() -> None:
    assert Grid((2, 2, 2), np.diag([1e-4, 1e-4, 1e-4, 1])).spacing == pytest.approx((1e-4, 1e-4, 1e-4))


def test_array_must_fit_its_grid() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        Volume(np.zeros((2, 3, 4)), Grid((4, 3, 2), np.eye(4)))


@pytest.mark.parametrize(("shift_mm", "close"), [(1e-4, True), (0.1, False)])
def test_grids_are_close_within_a_hundredth_of_a_voxel(shift_mm: float, close: bool) -> None:
    grid = a_volume().grid
    shifted = np.array(grid.affine)
    shifted[1, 3] += shift_mm
    assert grid.is_close(Grid(grid.shape, shifted)) is close


def test_a_small_turn_moves_the_far_corner() -> None:
    affine = np.array(a_volume().grid.affine)
    affine[1, 0] += 1e-3  # 0.5 mm after 500 voxels, 0.001 mm after one
    assert a_volume().grid.is_close(Grid((4, 3, 2), affine))
    assert not Grid((4, 3, 500), a_volume().grid.affine).is_close(Grid((4, 3, 500), affine))


def test_grids_of_other_shape_are_never_close() -> None:
    assert not a_volume().grid.is_close(Grid((4, 3, 1), a_volume().grid.affine))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_nearest_rotation_undoes_a_small_symmetric_stretch(seed: int, mirror: bool) -> None:
    rotation = Rotation.random(random_state=seed).as_matrix() * ((-1 if mirror else 1), 1, 1)
    stretch = np.random.default_rng(seed).uniform(-0.1, 0.1, (3, 3))
    sheared = rotation @ (np.eye(3) + stretch + stretch.T)  # polar decomposition: rotation x symmetric positive
    np.testing.assert_allclose(nearest_rotation(sheared), rotation, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.permutations(range(3)),
    st.sampled_from([np.uint8, np.uint16, np.float64, bool]),
)
def test_the_foreground_box_is_the_one_scipy_finds(
    seed: int, shape: tuple[int, int, int], order: list[int], kind: type
) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(shape) > rng.uniform(0.5, 1)).astype(kind).transpose(order)[::-1, :, ::-1]
    expected = ndimage.find_objects((labels != 0).astype(int))
    assert foreground_box(labels) == (expected[0] if expected else None)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (1, 9, 1)])
def test_without_foreground_there_is_no_box(shape: tuple[int, int, int]) -> None:
    assert foreground_box(np.zeros(shape, np.uint8)) is None


def test_label_intensities_agree_with_scipy() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (5, 6, 7)).astype(np.uint8)
    image = rng.normal(50, 20, labels.shape).astype(np.float32)
    found = label_intensities(labels, image)
    for label in (1, 2, 3):
        expected = ndimage.mean(image, labels, label), ndimage.standard_deviation(image, labels, label)
        np.testing.assert_allclose(found[label], expected, rtol=1e-5)
    assert set(found) == {1, 2, 3}


def test_label_intensities_leave_out_what_is_no_number() -> None:
    labels = np.array([[[1, 1, 1, 2, 0]]], np.uint8)
    image = np.array([[[3.0, 5.0, np.nan, np.inf, 9.0]]])
    assert label_intensities(labels, image) == {1: (4.0, 1.0)}
