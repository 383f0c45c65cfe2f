"""Surface distances against DeepMind's surface-distance and against shapes whose distances are known."""

from __future__ import annotations

import numpy as np
import pytest
import surface_distance as reference
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.surface import SurfaceDistances, surface_distances
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

SPACINGS = st.tuples(*[st.floats(0.3, 6)] * 3)
Mask = NDArray[np.bool_]


def two_masks(seed: int) -> tuple[Mask, Mask]:
    """From lonely voxels to smooth blobs, up to the border, neither of them empty."""
    rng = np.random.default_rng(seed)
    shape, sigma, share = rng.integers(1, 12, 3), rng.choice([0, 0.7, 1.5]), rng.uniform(0.1, 0.9)
    fields = gaussian_filter(rng.standard_normal((2, *shape)), (0, sigma, sigma, sigma))
    first, second = (field >= np.quantile(field, share) for field in fields)
    return first, second


def a_box(*size: int, at: tuple[int, int, int] = (0, 0, 0)) -> Mask:
    mask = np.zeros((20, 24, 28), bool)
    mask[tuple(slice(3 + start, 3 + start + length) for start, length in zip(at, size, strict=True))] = True
    return mask


def measured(first: Mask, second: Mask, *spacing: float) -> SurfaceDistances:
    """With a spacing along (k, j, i)."""
    return surface_distances(first, second, np.diag(spacing[::-1] or (1.0, 1.0, 1.0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the reference calls old names of scipy's functions
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), SPACINGS, st.floats(0, 10), st.sampled_from([50.0, 95.0, 100.0]))
def test_distances_are_those_of_the_reference(
    seed: int, spacing: tuple[float, float, float], tolerance_mm: float, percent: float
) -> None:
    first, second = two_masks(seed)
    found = measured(first, second, *spacing)
    expected = reference.compute_surface_distances(first, second, spacing)
    dice = reference.compute_surface_dice_at_tolerance(expected, tolerance_mm + 1e-4)
    assert found.dice(tolerance_mm) == pytest.approx(dice, abs=1e-12)
    shares = (percent / 100 - 1e-9, percent / 100, min(1, percent / 100 + 1e-9))  # either side of a jump
    hausdorff = reference.compute_robust_hausdorff(expected, percent)
    assert any(found.hausdorff(share) == pytest.approx(hausdorff, abs=1e-9) for share in shares)


def test_a_shifted_box_is_as_far_as_the_shift() -> None:
    first, second = a_box(5, 6, 7), a_box(5, 6, 7, at=(2, 0, 0))
    distances = measured(first, second, 2.5, 1, 1)
    assert distances.hausdorff(1.0) == 5.0
    assert distances.dice(5.0) == 1.0 and distances.dice(4.9) < 1.0


def test_a_box_has_the_area_of_its_sides() -> None:
    box = a_box(6, 8, 10)
    [areas, _] = measured(box, box, 3, 1, 1).areas
    flat = 2 * (8 * 10 + 3 * 6 * 10 + 3 * 6 * 8)  # corners and edges are cut
    assert 0.85 * flat < areas.sum() < flat


def test_equal_masks_are_nowhere_apart() -> None:
    distances = measured(a_box(3, 4, 5), a_box(3, 4, 5))
    assert (distances.dice(0), distances.hausdorff(1.0)) == (1.0, 0.0)


def test_spheres_in_one_another_are_as_far_as_their_radii() -> None:
    spacing = (3.0, 1.0, 1.5)
    k, j, i = np.ogrid[-8:9, -22:23, -15:16]
    radius = np.sqrt((k * spacing[0]) ** 2 + (j * spacing[1]) ** 2 + (i * spacing[2]) ** 2)
    distances = measured(radius < 20, radius < 14, *spacing)
    assert distances.areas[0].sum() == pytest.approx(4 * np.pi * 20**2, rel=0.15)
    assert distances.hausdorff() == pytest.approx(6, abs=2)
    assert distances.dice(3) < 0.05 and distances.dice(9) == 1.0


def test_turned_and_mirrored_axes_change_nothing() -> None:
    first, second = two_masks(7)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    plain, turned = (surface_distances(first, second, steps @ np.diag([1.0, 2.0, 3.0])) for steps in (np.eye(3), turn))
    for name in ("mm", "areas"):
        for one, other in zip(getattr(plain, name), getattr(turned, name), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-9)


def test_sheared_axes_keep_volumes_and_move_distances() -> None:
    steps = np.array([[1.0, 0, 0.75], [0, 1, 0], [0, 0, 1]])  # each slice lies 0.75 mm further along i
    distances = surface_distances(a_box(1, 1, 1), a_box(1, 1, 1, at=(4, 0, 0)), steps)
    assert distances.hausdorff(1.0) == pytest.approx(np.hypot(4, 3))


def test_a_tolerance_forgives_the_rounding_of_a_header() -> None:
    first, second = a_box(4, 4, 4), a_box(4, 4, 4, at=(1, 0, 0))
    assert measured(first, second, 3.00001, 1, 1).dice(3) == 1.0
    assert measured(first, second, 3.001, 1, 1).dice(3) < 1.0
