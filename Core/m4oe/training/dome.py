"""The dome of the liver for label maps that lack it: many a label map ends within the liver, or knows no lungs.

Trained on those alone, a network takes the liver between lungs for anything else. So what they lack is made up: above
their last slice the organs of the abdomen narrow and end, as below a diaphragm, lungs take their room, and the heart
grows out of the middle; all else goes on as it is.

Shape suffixes: Z slice, upwards, H and W row and column; C tissue class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

from .body import TISSUES

_ORGANS = (
    "liver", "spleen", "stomach", "kidney_right", "kidney_left", "adrenal_gland_right", "adrenal_gland_left",
    "gallbladder", "pancreas", "duodenum", "liver_tumor",
)  # fmt: skip
GOES_ON = frozenset(
    (*_ORGANS, "aorta", "inferior_vena_cava", "esophagus")
)  # what may be above where the label map ended
_LUNG, _HEART, _CHAMBER = "lung", "myocardium", "blood"
_STAYS = ("air", "aorta", "inferior_vena_cava", "esophagus", "bone", "marrow", "disc", "cord")
_CUT, _DOMED = 0.3, 0.8  # of the liver's largest section: above, it is cut off; below, its dome has begun
_CLOSED_MM = 15.0  # gaps between organs that belong to the cavity
_SPINE_MM = (60.0, 45.0)  # behind the middle of the body, and how far around it there is no cavity
_LIVER_MM = (35.0, 60.0)  # height of the dome
_HEART_MM = (38.0, 52.0)  # half of its height and width on a slice
_ABOVE_MM = 12.0  # of lungs and heart above the dome


def continue_upwards(
    classes_ZHW: NDArray[np.uint8], tissues: Sequence[str], spacing: Sequence[float], rng: Generator
) -> tuple[NDArray[np.uint8], list[str], int]:
    """Classes with the dome of the liver on them, all tissues, and how many of the slices stayed as they were.

    Where the map shows the dome and lungs nothing changes. Where it shows the dome but no lungs, the made-up one takes
    its place.

    Args:
        classes_ZHW: Class of each voxel, 0 outside of the body.
        tissues: Names in TISSUES by class.
        spacing: (Z, H, W) in mm.
        rng: Draws how high the dome is.
    """
    organ_C = np.array([TISSUES[name].structure or name for name in tissues])
    area_Z = np.isin(classes_ZHW, np.flatnonzero(organ_C == "liver")).sum((1, 2))
    kept = len(classes_ZHW)
    if area_Z[-1] < _CUT * area_Z.max() and _LUNG not in tissues:
        kept = 1 + int(np.flatnonzero(area_Z > _DOMED * area_Z.max())[-1])
    elif area_Z[-1] < _CUT * area_Z.max() or not area_Z.any():
        return classes_ZHW, list(tissues), kept
    top_HW = classes_ZHW[kept - 1]
    names = [*tissues, *(name for name in (_LUNG, _HEART, _CHAMBER) if name not in tissues)]
    depths = {organ: _depth(np.isin(top_HW, np.flatnonzero(organ_C == organ)), spacing) for organ in _ORGANS}
    organs_HW, stays_HW = (
        np.isin(top_HW, np.flatnonzero(np.isin(organ_C, kinds))) for kinds in ((*_ORGANS, _LUNG), _STAYS)
    )
    cavity_HW = _cavity(organs_HW, stays_HW, spacing)
    heights = {organ: rng.uniform(0.4, 0.9) * depth_HW.max() for organ, depth_HW in depths.items()}
    heights["liver"] = rng.uniform(*_LIVER_MM)
    above = []
    for height in np.arange(spacing[0], heights["liver"] + _ABOVE_MM, spacing[0]):
        plane_HW = np.where(cavity_HW, names.index(_LUNG), top_HW).astype(np.uint8)
        _add_heart(plane_HW, cavity_HW, height, names, spacing)
        for organ, depth_HW in depths.items():
            if height < heights[organ]:
                left_HW = _narrowed(depth_HW, height / heights[organ], spacing)
                plane_HW[left_HW] = top_HW[left_HW]
        above.append(plane_HW)
    return np.concatenate([classes_ZHW[:kept], np.stack(above)]), names, kept


def _narrowed(depth_HW: NDArray[np.float64], height: float, spacing: Sequence[float]) -> NDArray[np.bool_]:
    """What is left of an organ at a height from 0 to 1: a disc around its thickest part, in the end."""
    within = np.sqrt(1 - height**2)
    thickest = np.array(np.unravel_index(depth_HW.argmax(), depth_HW.shape))[:, None, None]
    away_HW = np.hypot(*((np.indices(depth_HW.shape) - thickest) * np.array(spacing[1:])[:, None, None]))
    return (depth_HW > 0.4 * (1 - within) * depth_HW.max()) & (away_HW <= within * away_HW[depth_HW > 0].max())


def _depth(mask_HW: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance from the edge in mm."""
    return ndimage.distance_transform_edt(mask_HW, spacing[1:])


def _cavity(organs_HW: NDArray[np.bool_], stays_HW: NDArray[np.bool_], spacing: Sequence[float]) -> NDArray[np.bool_]:
    """The organs with the gaps between them, and as much on the other side of the body; not its back in the middle."""
    near_HW = _depth(~organs_HW, spacing) < _CLOSED_MM
    half_HW = (_depth(near_HW, spacing) > _CLOSED_MM) | organs_HW
    rows, columns = np.nonzero(~stays_HW)
    across = np.arange(half_HW.shape[1])
    mirrored = np.clip(columns.min() + columns.max() - across, 0, len(across) - 1)
    down_mm = (np.arange(half_HW.shape[0])[:, None] - rows.mean()) * spacing[1]
    from_spine_HW = np.hypot(down_mm - _SPINE_MM[0], (across - columns.mean()) * spacing[2])
    return organs_HW | (half_HW | half_HW[:, mirrored]) & ~stays_HW & (from_spine_HW > _SPINE_MM[1])


def _add_heart(
    plane_HW: NDArray[np.uint8],
    cavity_HW: NDArray[np.bool_],
    height: float,
    names: Sequence[str],
    spacing: Sequence[float],
) -> None:
    """The heart and two of its chambers in the front of the cavity, left of the middle, in place."""
    grown = np.sqrt(np.clip((height - 6) / 30, 0, 1))
    if grown == 0:
        return
    rows, columns = (np.flatnonzero(cavity_HW.any(axis)) for axis in (1, 0))
    size = np.array(_HEART_MM) * grown
    middle = np.array([0.65 * rows[0] + 0.35 * rows[-1], 0.4 * columns[0] + 0.6 * columns[-1]])
    away_HW2 = (np.moveaxis(np.indices(plane_HW.shape), 0, -1) - middle) * spacing[1:] / size
    plane_HW[cavity_HW & (np.hypot(*np.moveaxis(away_HW2, -1, 0)) < 1)] = names.index(_HEART)
    for side in (-0.45, 0.35):
        chamber_HW = np.hypot(*np.moveaxis(away_HW2 - (0.0, side), -1, 0)) < 0.36
        plane_HW[cavity_HW & chamber_HW] = names.index(_CHAMBER)
