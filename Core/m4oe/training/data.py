"""Training images: cases on the canonical grid in memory, and modality-balanced batches of augmented slices.

Shape suffixes: Z slice, H and W row and column, B image, S slice channel (a slice and its neighbours).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Volume
from ..resample import CanonicalVolume
from ..spec import ModelSpec

_ROTATION = 0.25  # radians
_ZOOM = (0.8, 1.25)
_SHIFT = 0.08  # of the crop
_GAMMA = (0.7, 1.4)
_NOISE = 0.04


@dataclass(frozen=True)
class Case:
    """A volume and its labels on the canonical grid.

    Attributes:
        image_ZHW: Intensities in [0, 1], float16.
        labels_ZHW: Label map, uint8.
        annotated_K: Which classes its annotators drew; the others are unknown, not background.
        expert: Index of the expert of its modality.
        slices_of: Slices that show a structure, by label.
    """

    image_ZHW: np.ndarray
    labels_ZHW: np.ndarray
    annotated_K: np.ndarray
    expert: int
    slices_of: dict[int, np.ndarray]


@dataclass(frozen=True)
class Batch:
    """Images in [0, 1], labels (int64), the classes known in each image, and the expert of its modality."""

    images_BSHW: Tensor
    labels_BHW: Tensor
    annotated_BK: Tensor
    experts_B: Tensor


def make_case(image: Volume, labels: Volume, annotated: Sequence[str], spec: ModelSpec, expert: int) -> Case:
    """Brings a labelled volume to the canonical grid, in the way prediction does.

    Args:
        image: CT in HU or MR.
        labels: Label map on the image's grid, in the spec's label values.
        annotated: Keys of the structures that were looked for, found or not.
        spec: The model that is trained.
        expert: Index of the expert of the image's modality.
    """
    rule = spec.intensity[spec.experts[expert].modality]
    canonical = CanonicalVolume(image, spec.pixel_mm, spec.slice_mm, rule)
    labels_ZHW = canonical.labels(labels)
    shown = {
        label: np.flatnonzero((labels_ZHW == label).any(axis=(1, 2)))
        for label in np.unique(labels_ZHW).tolist()
        if label
    }
    annotated_K = np.isin(np.arange(len(spec.structures) + 1), [0, *spec.labels_of(annotated)])
    image_ZHW = canonical.slices(0, canonical.shape[0]).half().numpy()
    return Case(image_ZHW, labels_ZHW, annotated_K, expert, shown)


def batches(cases: list[Case], images: int, crop: int, channels: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Endless batches with `images` augmented slices of each expert, in the order of the experts."""
    by_expert = [[case for case in cases if case.expert == expert] for expert in sorted({c.expert for c in cases})]
    while True:
        chosen = [group[rng.integers(len(group))] for group in by_expert for _ in range(images)]
        pairs = [_augmented(case, _pick_slice(case, rng), crop, channels, rng) for case in chosen]
        yield Batch(
            torch.stack([image for image, _ in pairs]),
            torch.stack([labels for _, labels in pairs]),
            torch.from_numpy(np.stack([case.annotated_K for case in chosen])),
            torch.tensor([case.expert for case in chosen]),
        )


def _pick_slice(case: Case, rng: np.random.Generator) -> int:
    """Half of the time any slice, else one that shows a structure drawn at random: small ones come up as often."""
    if not case.slices_of or rng.random() < 0.5:
        return int(rng.integers(len(case.image_ZHW)))
    return int(rng.choice(case.slices_of[int(rng.choice(list(case.slices_of)))]))


def _augmented(case: Case, index: int, crop: int, channels: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One slice with its neighbours, turned, zoomed and shifted in one resampling, with another contrast and noise."""
    around = np.clip(np.arange(channels) - channels // 2 + index, 0, len(case.image_ZHW) - 1)
    image_SHW, labels_HW = torch.from_numpy(case.image_ZHW[around]).float(), torch.from_numpy(case.labels_ZHW[index])
    grid = _sampling_grid(labels_HW.shape[0], labels_HW.shape[1], crop, rng)
    image_SHW = F.grid_sample(image_SHW[None], grid, align_corners=False)[0]
    labels = F.grid_sample(labels_HW[None, None].float(), grid, mode="nearest", align_corners=False)[0, 0].long()
    image_SHW = image_SHW.clamp(0, 1) ** rng.uniform(*_GAMMA) * rng.uniform(0.85, 1.15) + rng.uniform(-0.05, 0.05)
    noise = torch.from_numpy(rng.standard_normal(image_SHW.shape, dtype=np.float32)) * rng.uniform(0, _NOISE)
    return (image_SHW + noise).clamp(0, 1), labels


def _sampling_grid(height: int, width: int, crop: int, rng: np.random.Generator) -> Tensor:
    """Where each pixel of the crop comes from, in normalised coordinates: [1, crop, crop, 2]."""
    angle, zoom = rng.uniform(-_ROTATION, _ROTATION), rng.uniform(*_ZOOM) * rng.uniform(0.92, 1.08, 2)
    shift = rng.uniform(-_SHIFT, _SHIFT, 2) * crop
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * zoom * crop / 2
    theta = np.concatenate([turn, shift[:, None]], axis=1) * 2 / np.array([[width], [height]])
    return F.affine_grid(torch.from_numpy(theta).float()[None], [1, 1, crop, crop], align_corners=False)
