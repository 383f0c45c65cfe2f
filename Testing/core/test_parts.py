from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m4oe.parts import parts_of, scores_in_parts
from torch import Tensor


@settings(deadline=None)
@given(st.integers(1, 900), st.integers(4, 256))
def test_parts_cover_all_pixels_overlap_by_half_and_are_as_large_as_in_training(size: int, crop: int) -> None:
    parts = parts_of(size, crop)
    assert parts[0].start == 0 and parts[-1].stop == size
    assert all(part.stop - part.start == min(size, crop) for part in parts)
    assert all(one.stop - other.start >= crop // 2 for one, other in pairwise(parts))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([0, 16, 24]))
def test_parts_are_put_together_where_they_were_cut(height: int, width: int, crop: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * width))
    torch.testing.assert_close(scores_in_parts(lambda part: part.movedim(1, -1), images, crop), images.movedim(1, -1))


def test_the_network_never_sees_more_than_in_training() -> None:
    seen: list[tuple[int, ...]] = []

    def score(part: Tensor) -> Tensor:
        seen.append(tuple(part.shape[-2:]))
        return part.movedim(1, -1)

    scores_in_parts(score, torch.rand(1, 3, 14, 30), 16)
    assert seen == [(14, 16)] * 3


def test_parts_fade_into_each_other() -> None:
    """Where two parts disagree, the scores go from the one's to the other's without a step."""
    calls = iter((0.0, 1.0))
    line = scores_in_parts(lambda part: torch.full((1, 10, 16, 1), next(calls)), torch.rand(1, 3, 10, 24), 16)[
        0, 5, :, 0
    ]
    assert line[0] == 0 and line[-1] == 1
    assert (line.diff() >= 0).all() and line.diff().max() < 0.2
