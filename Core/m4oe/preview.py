"""One picture of a segmentation: three slices, the surfaces of all structures and their volumes in mL.

OpenGL is not involved: the picture needs no display, no graphics library, and comes out alike on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .files import atomic_write
from .geometry import Volume
from .labels import Structure, structure
from .raster import INK, Facets, Floats, blend, contour, draw_dot, draw_text, fit, render, resize, write_png

_WIDTH, _HEIGHT, _MARGIN, _TOP, _GAP, _LEGEND = 1920, 1080, 48, 128, 12, 348
_PAGE, _RULE, _MUTED = (0.043, 0.051, 0.067), (0.15, 0.17, 0.21), (0.55, 0.6, 0.67)
_LETTER = (0.98, 0.82, 0.42)
_SKY, _GROUND = (0.125, 0.15, 0.19), (0.03, 0.036, 0.048)  # behind the surfaces
_CT_WINDOW, _AIR = (-160.0, 240.0), -200  # HU
_ROWS = 40  # of the legend
_FILL, _OUTLINE = 0.42, 2.0  # opacity; pixels
_LONGEST = 160  # voxels along the longest side of what surfaces are made from
_THICK = 1.6  # times as long as wide: voxels between which shapes are interpolated
_PAD = 3  # voxels around a structure, so that smoothing does not cut it
_SAMPLES = 2  # per pixel and axis of the surfaces, for smooth edges
_GLASS = 0.5  # opacity of a structure that holds another one
_TILT = np.deg2rad(14)  # of the viewer above the front
# LPS to right of the picture, down, towards the viewer
_VIEW = np.array([[1, 0, 0], [0, -np.sin(_TILT), -np.cos(_TILT)], [0, -np.cos(_TILT), np.sin(_TILT)]])


class _Plane(NamedTuple):
    name: str
    axis: int  # array axis (0 = k) that crosses the plane
    flip: bool  # rows of the array run upwards
    letters: str  # left, right, top, bottom


_PLANES = (
    _Plane("Axial", 0, False, "RLAP"),
    _Plane("Coronal", 1, True, "RLSI"),
    _Plane("Sagittal", 2, True, "APSI"),
)


class _Sample(NamedTuple):
    """The labels inside their box, thinned for speed."""

    array: NDArray[Any]  # [k, j, i]
    start: tuple[int, ...]  # (k, j, i) of its first voxel
    step: tuple[int, ...]  # voxels from one of its voxels to the next
    spacing: NDArray[np.float64]  # mm along (k, j, i)


def write_preview(
    path: str | os.PathLike[str], volume: Volume, labels: Volume, structures: Mapping[int, str], title: str
) -> None:
    """Writes a PNG of 1920 x 1080 pixels that shows `labels` on `volume`.

    Slices are in radiological convention, follow the nearest axis order of the volume and lie where most structures
    are cut well.

    Args:
        volume: Any voxel type; NaN is drawn black.
        labels: Whole numbers on the grid of `volume`.
        structures: Label value to structure key; other values are not drawn.

    Raises:
        ValueError: The grids differ, or a key is unknown.
        OSError: The file cannot be written.
    """
    if not labels.grid.is_close(volume.grid):
        raise ValueError(
            f"The labels must lie on the grid of the volume, {volume.grid.shape} with {volume.grid.spacing} mm; "
            f"they lie on {labels.grid.shape} with {labels.grid.spacing} mm, or elsewhere in space."
        )
    volume, labels = volume.to_axes("LPS"), labels.to_axes("LPS")
    counts = _counts(labels.array, max(structures, default=0) + 1)
    found = {value: structure(key) for value, key in structures.items() if counts[value]}
    picture = np.full((_HEIGHT, _WIDTH, 3), _PAGE, np.float32)
    _draw_header(picture, volume, title)
    _draw_legend(picture, [(item, counts[value] * labels.grid.voxel_ml) for value, item in found.items()])
    axial, surfaces, coronal, sagittal = _panels(picture)
    sample = _sample(labels, found)
    window = _window(volume)
    for plane, panel in zip(_PLANES, (axial, coronal, sagittal), strict=True):
        _draw_slice(panel, plane, _best_slice(sample, plane.axis, found), volume, labels, found, window)
    _draw_surfaces(surfaces, sample, found)
    with atomic_write(path) as temporary:
        write_png(temporary, picture)


def _panels(picture: Floats) -> list[Floats]:
    """Views of the picture: upper left, upper right, lower left, lower right."""
    width = (_WIDTH - 2 * _MARGIN - _LEGEND - _GAP) // 2
    height = (_HEIGHT - _TOP - _MARGIN - _GAP) // 2
    panels = []
    for row in (_TOP, _TOP + height + _GAP):
        for column in (_MARGIN, _MARGIN + width + _GAP):
            picture[row - 1 : row + height + 1, column - 1 : column + width + 1] = _RULE
            panels.append(picture[row : row + height, column : column + width])
            panels[-1][:] = 0
    return panels


# ---- labels


def _counts(array: NDArray[Any], size: int) -> NDArray[np.int64]:
    counts = np.zeros(size, np.int64)
    for plane in array:  # one by one, as bincount makes 64-bit integers of what it counts
        counts += np.bincount(plane.ravel().astype(np.intp), minlength=size)[:size]
    return counts


def _sample(labels: Volume, structures: Mapping[int, Structure]) -> _Sample:
    array, spacing = labels.array, np.array(labels.grid.spacing[::-1])
    if not structures:
        center = tuple(size // 2 for size in array.shape)
        return _Sample(np.zeros((1, 1, 1), np.intp), center, (1, 1, 1), spacing)
    seen = [np.flatnonzero(array.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    start = [int(index[0]) for index in seen]
    stop = [int(index[-1]) + 1 for index in seen]
    longest = max((np.array(stop) - start) * spacing)
    step = [max(1, round(longest / _LONGEST / mm)) for mm in spacing]
    box = tuple(slice(*ends) for ends in zip(start, stop, step, strict=True))
    return _Sample(array[box].astype(np.intp), tuple(start), tuple(step), spacing * step)


def _best_slice(sample: _Sample, axis: int, structures: Mapping[int, Structure]) -> int:
    """Index into the volume of the slice that cuts most structures well."""
    across = tuple(n for n in range(3) if n != axis)
    score = np.zeros(sample.array.shape[axis])
    for value in structures:
        area = (sample.array == value).sum(axis=across)
        score += np.sqrt(area / max(1, area.max()))
    return sample.start[axis] + int(score.argmax()) * sample.step[axis]


def _field(mask: NDArray[np.bool_], spacing: Floats) -> Floats:
    """Field of a mask, 2-D or 3-D, that is positive inside, negative outside and about zero at the edge.

    Where voxels are much longer than wide it holds distances within each layer of voxels, in voxels, so that what
    is interpolated between the layers has no steps.
    """
    thick = int(np.argmax(spacing))
    if spacing[thick] < _THICK * np.delete(spacing, thick).max():
        return ndimage.gaussian_filter(mask.astype(np.float32), 0.5) - np.float32(0.5)
    width = np.delete(spacing, thick)
    layers = np.moveaxis(mask, thick, 0)
    field = np.zeros(layers.shape, np.float32)
    for n in np.flatnonzero(layers.any(axis=tuple(range(1, mask.ndim)))):
        framed = np.pad(layers[n], 1)  # so that there is an outside
        inner, outer = (np.asarray(ndimage.distance_transform_edt(side, width)) for side in (framed, ~framed))
        field[n] = (inner - outer)[(slice(1, -1),) * (mask.ndim - 1)] / (2 * width.min())
    field[field == 0] = -field.max()  # layers without the structure: the edge is half way to them
    return np.moveaxis(field, 0, thick)


# ---- slices


def _window(volume: Volume) -> tuple[float, float]:
    step = max(1, round((volume.array.size / 1e6) ** (1 / 3)))
    some = volume.array[::step, ::step, ::step].astype(np.float32)
    some = some[np.isfinite(some) & (some != 0)]
    if volume.modality == "CT" or some.min(initial=0) < _AIR:
        return _CT_WINDOW
    low, high = np.percentile(some, (0.5, 99.5)) if some.size else (0, 1)
    return float(low), float(high if high > low else low + 1)


def _draw_slice(
    panel: Floats,
    plane: _Plane,
    index: int,
    volume: Volume,
    labels: Volume,
    structures: Mapping[int, Structure],
    window: tuple[float, float],
) -> None:
    grey, values = (np.take(item.array, index, axis=plane.axis) for item in (volume, labels))
    if plane.flip:
        grey, values = grey[::-1], values[::-1]
    low, high = window
    grey = np.nan_to_num((grey.astype(np.float32) - low) / (high - low), nan=0, posinf=1, neginf=0).clip(0, 1)
    spacing = np.delete(volume.grid.spacing[::-1], plane.axis)
    size = np.array(grey.shape) * spacing
    scale = float(min(panel.shape[:2] / size))  # pixels per mm
    shape = [max(1, round(mm * scale)) for mm in size]
    image = np.repeat(resize(grey, shape, order=3).clip(0, 1)[..., None], 3, axis=2)
    for value in np.intersect1d(values, list(structures)):
        field = _field(values == value, spacing)
        _paint(image, resize(field, shape, order=1), structures[int(value)].color)
    row, column = (panel.shape[0] - shape[0]) // 2, (panel.shape[1] - shape[1]) // 2
    panel[row : row + shape[0], column : column + shape[1]] = image
    _annotate(panel, plane.name, plane.letters)
    mm = next((mm for mm in (100, 50, 20, 10, 5, 2) if mm * scale < 0.2 * panel.shape[1]), 1)
    _draw_scale_bar(panel, round(mm * scale), f"{mm / 10:g} cm")


def _paint(image: Floats, field: Floats, color: tuple[int, int, int]) -> None:
    """Fills where the field is positive, and draws an outline inside of that edge."""
    slope = [np.gradient(field, axis=n) if field.shape[n] > 1 else np.zeros(1) for n in (0, 1)]
    depth = field / np.hypot(*slope).clip(1e-3)  # pixels inside of the edge
    inside = (depth + 0.5).clip(0, 1)
    blend(image, np.array(color) / 255, inside * (_OUTLINE + 0.5 - depth).clip(_FILL, 1))


# ---- surfaces


def _draw_surfaces(panel: Floats, sample: _Sample, structures: Mapping[int, Structure]) -> None:
    panel[:] = np.linspace(_SKY, _GROUND, len(panel))[:, None]
    facets = {value: _facets(sample, value, item) for value, item in structures.items() if value in sample.array}
    if facets:
        canvas = panel.repeat(_SAMPLES, axis=0).repeat(_SAMPLES, axis=1)
        facets = dict(zip(facets, fit(list(facets.values()), *canvas.shape[:2]), strict=True))
        parents = {item.parent for item in structures.values()}
        hollow = [value for value in facets if structures[value].key in parents]
        solid, depth = render([facets[value] for value in facets if value not in hollow], *canvas.shape[:2])
        glass, front = render([facets[value] for value in hollow], *canvas.shape[:2])
        blend(canvas, solid, np.isfinite(depth))
        blend(canvas, glass, _GLASS * (front > depth))
        panel[:] = canvas.reshape(len(panel), _SAMPLES, -1, _SAMPLES, 3).mean(axis=(1, 3))
    else:
        draw_text(panel, panel.shape[0] // 2, panel.shape[1] // 2, "No structure found", 22, _MUTED, "center")
    _annotate(panel, "Surfaces", "RLSI")


def _facets(sample: _Sample, value: int, item: Structure) -> Facets:
    """Smooth surface that encloses as much as the voxels do."""
    box = ndimage.find_objects((sample.array == value).astype(np.uint8))[0]
    mask = np.pad(sample.array[box] == value, _PAD)
    voxel = max(sample.spacing.min(), max(sample.spacing * sample.array.shape) / _LONGEST)
    field = _field(mask, sample.spacing)
    field = resize(field, np.rint(mask.shape * np.maximum(1, sample.spacing / voxel)).astype(int), order=1)
    ratio = np.array(field.shape) / mask.shape
    field = ndimage.gaussian_filter((field + 0.5).clip(0, 1), np.clip(0.5 * ratio.max(), 1, 2), mode="constant")
    inside = round(float(mask.sum() * ratio.prod()))
    border = [-inside - 1, -inside]
    level = np.partition(field, border, axis=None)[border].mean().clip(0.2 * field.max(), 0.5 * field.max())
    corner = np.array([part.start for part in box]) - _PAD + 0.5 / ratio - 0.5
    points, normals, triangles = contour(field, level, sample.spacing / ratio, sample.spacing * corner)
    colors = np.full((len(triangles), 3), np.array(item.color) / 255)
    return Facets((points @ _VIEW.T)[triangles], (normals @ _VIEW.T)[triangles], colors)


# ---- type and lines


def _draw_header(picture: Floats, volume: Volume, title: str) -> None:
    k, j, i = volume.grid.shape
    facts = [
        volume.name,
        volume.modality or "",
        f"{i} × {j} × {k} voxels",
        " × ".join(f"{mm:.3g}" for mm in volume.grid.spacing) + " mm",
    ]
    draw_text(picture, 54, _MARGIN, title, 32, bold=True, room=_WIDTH - 2 * _MARGIN)
    draw_text(picture, 93, _MARGIN, "   ·   ".join(filter(None, facts)), 18, _MUTED, room=_WIDTH - 2 * _MARGIN)


def _draw_legend(picture: Floats, rows: list[tuple[Structure, float]]) -> None:
    if not rows:
        return
    left, right = _WIDTH - _MARGIN - _LEGEND + 40, _WIDTH - _MARGIN
    draw_text(picture, _TOP + 14, left, "Structure", 16, _MUTED)
    draw_text(picture, _TOP + 14, right, "Volume", 16, _MUTED, align="right")
    picture[_TOP + 36, left:right] = _RULE
    shown = rows if len(rows) <= _ROWS else rows[: _ROWS - 1]
    pitch = min(38, (_HEIGHT - _MARGIN - _TOP - 48) / (len(shown) + 1))
    size = min(19, int(pitch * 0.7))
    if len(rows) > len(shown):
        draw_text(picture, _HEIGHT - _MARGIN - 10, left, f"and {len(rows) - len(shown)} more", size, _MUTED)
    for n, (item, volume_ml) in enumerate(shown):
        row = round(_TOP + 48 + pitch * (n + 0.5))
        draw_dot(picture, row, left + 8, min(8, 0.36 * pitch), item.color)
        amount = f"{volume_ml:,.0f} mL" if volume_ml >= 10 else f"{volume_ml:.1f} mL"
        width = draw_text(picture, row, right, amount, size, _MUTED, "right")
        draw_text(picture, row, left + 30, item.name, size, room=right - left - 46 - width)


def _annotate(panel: Floats, name: str, letters: str) -> None:
    height, width = panel.shape[:2]
    left, right, top, bottom = tuple(letters)
    draw_text(panel, 24, 16, name, 18, bold=True)
    draw_text(panel, height // 2, 16, left, 18, _LETTER, bold=True)
    draw_text(panel, height // 2, width - 16, right, 18, _LETTER, "right", bold=True)
    draw_text(panel, 24, width // 2, top, 18, _LETTER, "center", bold=True)
    draw_text(panel, height - 24, width // 2, bottom, 18, _LETTER, "center", bold=True)


def _draw_scale_bar(panel: Floats, length: int, text: str) -> None:
    row = panel.shape[0] - 22
    panel[row - 1 : row + 1, 16 : 16 + length] = INK
    for end in (16, 14 + length):
        panel[row - 6 : row + 1, end : end + 2] = INK
    draw_text(panel, row - 16, 16 + length // 2, text, 14, align="center")
