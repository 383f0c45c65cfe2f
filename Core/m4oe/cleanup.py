"""Removes islands from a label map, structure by structure."""

from __future__ import annotations

from collections.abc import Mapping

import cc3d
import numpy as np

from .geometry import foreground_box
from .labels import structure

SHARE_OF_LARGEST = 0.2
SMALLEST_LESION_ML = 0.05


def remove_islands(labels: np.ndarray, keys: Mapping[int, str], voxel_ml: float) -> dict[int, int]:
    """Removes components that are too small to be true, in place.

    An organ or vessel keeps its largest component and those of at least a fifth of it (a field of view or a stomach
    may cut it in parts); a lesion keeps every component of at least 0.05 mL.

    Args:
        labels: Label map [k, j, i], unsigned, changed in place; 0 is background.
        keys: Structure key by label value.
        voxel_ml: Volume of one voxel in mL.

    Returns:
        Remaining voxels by label value, only of structures that are present.
    """
    box = foreground_box(labels)
    if box is None:
        return {}
    inside = labels[box]
    components = cc3d.connected_components(np.ascontiguousarray(inside), connectivity=6)
    sizes = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"].astype(np.int64)
    values = np.zeros(len(sizes), inside.dtype)
    for plane, numbers in zip(inside, components, strict=True):
        values[numbers] = plane
    keep = np.zeros(len(sizes), bool)
    counts = {}
    for label in np.unique(values[1:]).tolist():
        mine = np.flatnonzero(values == label)
        keep[mine] = sizes[mine] >= _smallest(keys[label], int(sizes[mine].max()), voxel_ml)
        if remaining := int(sizes[mine][keep[mine]].sum()):
            counts[label] = remaining
    if not keep[1:].all():
        for plane, numbers in zip(inside, components, strict=True):
            plane[~keep[numbers]] = 0
    return counts


def _smallest(key: str, largest: int, voxel_ml: float) -> float:
    if structure(key).kind == "lesion":
        return SMALLEST_LESION_ML / voxel_ml
    return SHARE_OF_LARGEST * largest
