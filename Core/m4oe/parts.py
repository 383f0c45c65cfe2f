"""Slices larger than those of training, in overlapping parts that fade into each other.

A network of windows has learned what surrounds an organ within a training image; shown more at once, it errs.
Source: Isensee et al., "nnU-Net", Nature Methods 18, 2021 (inference by patches of the size of training).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_OVERLAP = 0.5  # of a part, at least


def scores_in_parts(score: Callable[[Tensor], Tensor], stacks_BSHW: Tensor, crop: int) -> Tensor:
    """Scores [B, H, W, K] of slices that are cut into parts where they are larger than training images.

    Args:
        score: Maps [B, S, H, W] to [B, H, W, K].
        stacks_BSHW: Slices with their neighbours as channels.
        crop: Pixels along a side of a training image; 0 to leave all slices whole.
    """
    rows, columns = (parts_of(size, crop) for size in stacks_BSHW.shape[-2:])
    if len(rows) == len(columns) == 1:
        return score(stacks_BSHW)
    weights_HW1 = stacks_BSHW.new_zeros(*stacks_BSHW.shape[-2:], 1, dtype=torch.float32)
    total_BHWK: Tensor | None = None
    for row in rows:
        for column in columns:
            part_BHWK = score(stacks_BSHW[..., row, column])
            if total_BHWK is None:
                total_BHWK = part_BHWK.new_zeros(len(stacks_BSHW), *stacks_BSHW.shape[-2:], part_BHWK.shape[-1])
            fade_HW1 = torch.outer(*(_fade(size, part_BHWK) for size in part_BHWK.shape[1:3]))[..., None]
            total_BHWK[:, row, column] += part_BHWK * fade_HW1
            weights_HW1[row, column] += fade_HW1
    assert total_BHWK is not None  # there is at least one part
    return total_BHWK / weights_HW1


def parts_of(size: int, crop: int) -> list[slice]:
    """Parts of `crop` pixels that cover `size` pixels, each overlapping the next; one where it is small enough."""
    if crop == 0 or size <= crop:
        return [slice(0, size)]
    count = 1 + math.ceil((size - crop) / (crop - math.ceil(_OVERLAP * crop)))
    return [slice(start, start + crop) for start in np.linspace(0, size - crop, count).round().astype(int).tolist()]


def _fade(size: int, like: Tensor) -> Tensor:
    """From 1 in the first pixel up to the middle, and down again."""
    pixel = torch.arange(1, size + 1, dtype=torch.float32, device=like.device)
    return torch.minimum(pixel, size + 1 - pixel)
