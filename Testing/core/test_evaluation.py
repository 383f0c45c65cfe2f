from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from m4oe.evaluation import dice_scores

LABELS = st.integers(0, 4)


def voxels(array: np.ndarray, label: int) -> set[tuple[int, ...]]:
    return {index for index, value in np.ndenumerate(array) if value == label}


@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=40), st.sampled_from([np.uint8, np.uint16, np.int64]))
def test_dice_is_that_of_the_sets_of_voxels(pairs: list[tuple[int, int]], kind: type[np.integer]) -> None:
    predicted, truth = (np.array(column, kind)[None] for column in zip(*pairs, strict=True))
    scores = dice_scores(predicted, truth, 4)
    for label in range(1, 5):
        a, b = voxels(predicted, label), voxels(truth, label)
        assert (label in scores) == bool(b)
        if b:
            assert scores[label] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))


def test_equal_maps_have_dice_one_and_disjoint_ones_zero_where_the_truth_has_them() -> None:
    a = np.array([[0, 1, 1], [2, 0, 0]], np.uint8)
    assert dice_scores(a, a, 3) == {1: 1.0, 2: 1.0}
    assert dice_scores(a, np.roll(a, 1, axis=0) * 2, 4) == {2: 0.0, 4: 0.0}


def test_labels_above_the_highest_are_left_out() -> None:
    a = np.array([1, 7, 7], np.uint8)
    assert dice_scores(a, a, 2) == {1: 1.0}


def test_views_count_like_their_copies() -> None:
    a = np.random.default_rng(0).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    b = np.random.default_rng(1).integers(0, 3, (6, 5, 4)).astype(np.uint8).transpose(2, 1, 0)[::-1]
    assert dice_scores(a, b, 2) == dice_scores(a, b.copy(), 2)


def test_maps_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        dice_scores(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), 1)
