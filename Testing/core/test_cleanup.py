from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.cleanup import remove_islands
from numpy.typing import NDArray
from scipy import ndimage

KEYS = {1: "liver", 2: "spleen", 3: "liver_tumor"}
SEEDS = st.integers(0, 100_000)


def a_map(seed: int, kind: type = np.uint8) -> NDArray[np.unsignedinteger]:
    """Blobs of three labels with many islands."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((4, *rng.integers(1, 14, 3))), (0, 1, 1, 1))
    field[0] += rng.uniform(-0.2, 0.3)
    return field.argmax(0).astype(kind)


def cleaned(labels: NDArray[np.unsignedinteger], voxel_ml: float) -> NDArray[np.unsignedinteger]:
    """The same rule by scipy, one structure after the other."""
    out = np.zeros_like(labels)
    for label, key in KEYS.items():
        parts = ndimage.label(labels == label)[0]  # pyright: ignore[reportIndexIssue]
        sizes = np.bincount(parts.ravel())[1:]
        for part, size in enumerate(sizes, start=1):
            if size * voxel_ml >= 0.05 if key == "liver_tumor" else size >= 0.2 * sizes.max():
                out[parts == part] = label
    return out


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([0.001, 0.012, 0.03, 1.0]), st.sampled_from([np.uint8, np.uint16]))
def test_islands_are_removed_as_scipy_would(seed: int, voxel_ml: float, kind: type) -> None:
    labels = a_map(seed, kind)
    expected = cleaned(labels, voxel_ml)
    counts = remove_islands(labels, KEYS, voxel_ml)
    assert np.array_equal(labels, expected)
    assert counts == {label: int((expected == label).sum()) for label in KEYS if (expected == label).any()}


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_cleaning_twice_changes_nothing(seed: int) -> None:
    labels = a_map(seed)
    counts = remove_islands(labels, KEYS, 0.01)
    once = labels.copy()
    assert remove_islands(labels, KEYS, 0.01) == counts
    assert np.array_equal(labels, once)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_views_of_any_strides_are_cleaned_in_place(seed: int) -> None:
    base = a_map(seed)
    expected = cleaned(base, 0.01)
    remove_islands(base.transpose(2, 0, 1)[::-1, :, ::-1], KEYS, 0.01)
    assert np.array_equal(base, expected)


def test_an_organ_keeps_large_parts_and_loses_small_ones() -> None:
    labels = np.zeros((1, 1, 30), np.uint8)
    labels[..., :10], labels[..., 12:14], labels[..., 20] = 1, 1, 1  # 10, 2 (a fifth) and 1 voxels
    assert remove_islands(labels, KEYS, 1.0) == {1: 12}
    assert labels[0, 0, 20] == 0


def test_a_lesion_keeps_every_part_of_a_true_size() -> None:
    labels = np.zeros((1, 1, 400), np.uint8)
    labels[..., :200], labels[..., 210:215], labels[..., 220:224] = 3, 3, 3
    assert remove_islands(labels, KEYS, 0.01) == {3: 205}  # 0.05 mL are 5 voxels
    assert not labels[..., 220:].any()


def test_a_lesion_that_is_too_small_is_not_found() -> None:
    labels = np.full((1, 1, 1), 3, np.uint8)
    assert remove_islands(labels, KEYS, 0.01) == {}
    assert not labels.any()


def test_touching_structures_are_not_one_component() -> None:
    labels = np.array([[[1, 1, 1, 1, 1, 1, 2, 2, 1]]], np.uint8)
    assert remove_islands(labels, KEYS, 1.0) == {1: 6, 2: 2}


def test_diagonal_neighbours_are_not_connected() -> None:
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[0, :7, :7], labels[1, 7, 7] = 1, 1
    assert remove_islands(labels, KEYS, 1.0) == {1: 49}


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4, 5), (1, 9, 1)])
def test_an_empty_map_has_nothing_to_clean(shape: tuple[int, int, int]) -> None:
    labels = np.zeros(shape, np.uint8)
    assert remove_islands(labels, KEYS, 1.0) == {}
