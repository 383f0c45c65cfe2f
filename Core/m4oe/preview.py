"""One picture of a segmentation: three slices, the surfaces of all structures and their volumes in mL.

OpenGL is not involved: the picture needs no display, no graphics library, and comes out alike on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from .files import atomic_write
from .geometry import Volume, foreground_box
from .labels import Structure, catalogue, structure
from .modality import modality_evidence
from .raster import INK, Facets, Floats, blend, contour, draw_dot, draw_text, fit, lab, render, resize, write_png
from .resample import CanonicalVolume
from .spec import IntensityRule

if TYPE_CHECKING:
    from .training.synthesis import Synthesiser

_WIDTH, _HEIGHT, _MARGIN, _TOP, _GAP, _LEGEND = 1920, 1080, 48, 128, 12, 348
_EDGE = 26  # pixels around a slice, for its letters and scale
_PAGE, _RULE, _MUTED, _LETTER = (0.043, 0.051, 0.067), (0.15, 0.17, 0.21), (0.55, 0.6, 0.67), (0.98, 0.82, 0.42)
_SKY, _GROUND = (0.125, 0.15, 0.19), (0.03, 0.036, 0.048)  # behind the surfaces
_CT_RULE, _MR_RULE = IntensityRule("window", -160, 240), IntensityRule("percentile", 0.5, 99.5)
_DARK, _THIN = 0.07, 0.04  # brightness of air at most; what no body is thinner than, of the longer side of a slice
_FEW = 4  # slices that leave nothing to see across them
_ROWS, _ROOMY = 64, 22  # of the legend; up to how many each structure that was not found has its own
_TWO_LINES = 34  # pixels between rows that have room for two lines
_SEEN = (0.5, 1, 1)  # how much lightness and hue count, as shadows and the slice change how light a colour is
_NOTHING = "No structure found"
_FILL, _OUTLINE = 0.48, 2.0  # opacity; pixels
_LONGEST = 160  # voxels along the longest side of what surfaces are made from
_THICK = 1.6  # times as long as wide: voxels between which shapes are interpolated
_PAD = 3  # voxels around a structure, so that smoothing does not cut it
_SAMPLES = 2  # per pixel and axis of the surfaces, for smooth edges
_TILE, _HEAD = 300, 36  # pixels of a slice that is compared, and above it
_SMALL, _NAME, _EXAMPLES = 200, 18, 8  # of a synthetic one, of its name; how many there are for an expert
_GLASS = 0.62  # opacity of a structure that holds another one
_TILT = np.deg2rad(14)  # of the viewer above the front
# LPS to right of the picture, down, towards the viewer
_VIEW = np.array([[1, 0, 0], [0, -np.sin(_TILT), -np.cos(_TILT)], [0, -np.cos(_TILT), np.sin(_TILT)]])


# Name and letters (left, right, top, bottom) of the planes that the array axes k, j and i cross
_PLANES = (("Axial", "RLAP"), ("Coronal", "RLSI"), ("Sagittal", "APSI"))


class _Sample(NamedTuple):
    """The labels inside their box, thinned for speed."""

    array: NDArray[np.intp]  # [k, j, i]
    box: tuple[slice, ...]  # where in the volume its voxels come from
    spacing: NDArray[np.float64]  # mm along (k, j, i)


def write_preview(
    path: str | os.PathLike[str],
    volume: Volume,
    labels: Volume,
    structures: Mapping[int, str],
    title: str,
    flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
    asked: Collection[str] = (),
) -> None:
    """Writes a PNG of 1920 x 1080 pixels that shows `labels` on `volume`.

    Slices are in radiological convention, follow the nearest axis order of the volume, lie where most structures
    are cut well and end at the body. A volume of less than four slices is shown as a single one, without surfaces.
    Colours follow the catalogue as far as they can be told apart, and depend on nothing but the keys in `structures`.

    Args:
        volume: Any voxel type; NaN is drawn black.
        labels: Whole numbers on the grid of `volume`.
        structures: Label value to structure key; other values are not drawn.
        flags: What to check, by structure, for the legend.
        asked: Structures that were looked for; the legend tells which of them were not found.

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
    box = foreground_box(labels.array) or tuple(slice(size // 2, size // 2 + 1) for size in labels.array.shape)
    counts = _areas(labels.array[box], 0, max(structures, default=0) + 1).sum(axis=0)
    items = _told_apart(structures)
    found = {value: item for value, item in items.items() if counts[value]}
    picture = np.full((_HEIGHT, _WIDTH, 3), _PAGE, np.float32)
    _draw_frame(picture, volume, title)
    rows = [(item, counts[value] * labels.grid.voxel_ml) for value, item in found.items()]
    missing = [item.name for value, item in items.items() if value not in found and item.key in asked]
    _draw_legend(picture, rows, missing, flags)
    sample = _sample(labels, box)
    low, high = _window(volume)
    flat = min(volume.array.shape) < _FEW
    panels = _panels(picture, 1 if flat else 2)
    if not flat:
        _draw_surfaces(panels.pop(1), sample, found)
    for axis, panel in zip((int(np.argmin(volume.array.shape)),) if flat else range(3), panels, strict=True):
        index = _best_slice(sample, axis, found)
        grey, values = (np.take(item.array, index, axis) for item in (volume, labels))
        grey = np.nan_to_num((grey.astype(np.float32) - low) / (high - low), nan=0, posinf=1, neginf=0).clip(0, 1)
        _draw_slice(panel, axis, grey, values, np.delete(volume.grid.spacing[::-1], axis), found)
    with atomic_write(path) as temporary:
        write_png(temporary, picture)


class Comparison(NamedTuple):
    """A case to compare: its volume, the true labels and those that were predicted, on one grid."""

    name: str
    volume: Volume
    truth: Volume
    predicted: Volume


def write_comparison(path: str | os.PathLike[str], cases: Sequence[Comparison], structures: Mapping[int, str]) -> None:
    """Writes a PNG with a row for each case: the slice where the truth has most, its truth, and what was predicted.

    Args:
        structures: Label value to structure key.

    Raises:
        OSError: The file cannot be written.
    """
    items = _told_apart(structures)
    picture = np.full((len(cases) * (_TILE + _HEAD) + _GAP, 3 * (_TILE + _GAP) + _GAP, 3), _PAGE, np.float32)
    for number, case in enumerate(cases):
        volume, truth, predicted = (item.to_axes("LPS") for item in case[1:])
        low, high = _window(volume)
        index = int((truth.array > 0).sum(axis=(1, 2)).argmax())
        grey = np.nan_to_num((volume.array[index].astype(np.float32) - low) / (high - low), posinf=1, neginf=0)
        top = number * (_TILE + _HEAD) + _HEAD
        none = np.zeros_like(truth.array[index])
        shown = ((case.name, none), ("Truth", truth.array[index]), ("Prediction", predicted.array[index]))
        for column, (title, values) in enumerate(shown):
            left = _GAP + column * (_TILE + _GAP)
            draw_text(picture, top - _HEAD // 2, left, title, 17, bold=column > 0, room=_TILE)
            panel = picture[top : top + _TILE, left : left + _TILE]
            panel[:] = 0
            _draw_slice(panel, 0, grey.clip(0, 1), values, np.array(volume.grid.spacing[1::-1]), items)
    with atomic_write(path) as temporary:
        write_png(temporary, picture)


def write_synthesis(path: str | os.PathLike[str], synthesiser: Synthesiser) -> None:
    """Writes a PNG with two rows of synthetic images for each expert: as they are, and with their labels.

    Raises:
        OSError: The file cannot be written.
    """
    spec, step = synthesiser.spec, _SMALL + _GAP
    items, height = _told_apart(spec.label_keys), 2 * step + _HEAD + _NAME
    picture = np.full((len(spec.experts) * height, _EXAMPLES * step + _GAP, 3), _PAGE, np.float32)
    for expert, title in enumerate(spec.expert_names):
        top = expert * height + _HEAD + _NAME
        draw_text(picture, expert * height + _HEAD // 2, _GAP, title, 17, bold=True)
        for column, example in enumerate(synthesiser.examples(expert, _EXAMPLES)):
            left = _GAP + column * step
            draw_text(picture, top - _NAME // 2, left, example.atlas, 12, _MUTED, room=_SMALL)
            for first, values in ((top, []), (top + step, np.intersect1d(example.labels, list(items)))):
                panel = picture[first : first + _SMALL, left : left + _SMALL]
                panel[:] = resize(example.image, panel.shape[:2], order=1)[..., None]
                for value in values:
                    field = resize(_field(example.labels == value, np.ones(2)), panel.shape[:2], order=1)
                    _paint(panel, field, items[int(value)].color)
    with atomic_write(path) as temporary:
        write_png(temporary, picture)


def _panels(picture: Floats, side: int) -> list[Floats]:
    """Views of the picture, `side` times `side` of them, row by row."""
    width = (_WIDTH - 2 * _MARGIN - _LEGEND + _GAP) // side - _GAP
    height = (_HEIGHT - _TOP - _MARGIN + _GAP) // side - _GAP
    panels = []
    for row in range(_TOP, _TOP + side * (height + _GAP), height + _GAP):
        for column in range(_MARGIN, _MARGIN + side * (width + _GAP), width + _GAP):
            picture[row - 1 : row + height + 1, column - 1 : column + width + 1] = _RULE
            panels.append(picture[row : row + height, column : column + width])
            panels[-1][:] = 0
    return panels


def _told_apart(structures: Mapping[int, str]) -> dict[int, Structure]:
    """The structures in colours for the picture: far from each other, and as like the catalogue's as that allows."""
    if not structures:
        return {}
    items = {value: structure(key) for value, key in structures.items()}
    keys = [key for key in catalogue() if key in structures.values()]  # in this order as values differ between models
    palette = np.indices((16, 16, 16)).reshape(3, -1).T * 17
    light, *chroma = lab(palette).T
    palette = palette[(abs(light - 67) < 18) & (abs(np.hypot(*chroma) - 55) < 15)]  # neither grey, dark nor glaring
    own, shades = (lab(colors) * _SEEN for colors in ([structure(key).color for key in keys], palette))
    picked = [cdist(own[:1], shades).argmin()]
    for _ in keys[1:]:
        picked.append(cdist(shades[picked], shades).min(axis=0).argmax())
    unlike = cdist(own, shades[picked])
    unlike[[structure(key).laterality == "left" for key in keys]] = 0  # else they resemble their right twins
    colors = dict(zip(keys, palette[picked][linear_sum_assignment(unlike)[1]].tolist(), strict=True))
    return {value: replace(item, color=tuple(colors[item.key])) for value, item in items.items()}


def _areas(array: NDArray[Any], axis: int, size: int) -> NDArray[np.int64]:
    """Voxels [slice, value] of the values below `size` in the slices across an axis."""
    slices = np.moveaxis(array, axis, 0)  # one by one, as bincount makes 64-bit integers of what it counts
    return np.array([np.bincount(part.ravel().astype(np.intp), minlength=size)[:size] for part in slices])


def _sample(labels: Volume, box: tuple[slice, ...]) -> _Sample:
    spacing = np.array(labels.grid.spacing[::-1])
    longest = max(np.array([part.stop - part.start for part in box]) * spacing)
    step = [max(1, round(longest / _LONGEST / mm)) for mm in spacing]
    box = tuple(slice(part.start, part.stop, n) for part, n in zip(box, step, strict=True))
    return _Sample(labels.array[box].astype(np.intp), box, spacing * step)


def _best_slice(sample: _Sample, axis: int, values: Collection[int]) -> int:
    """Index into the volume of the slice that cuts most structures well."""
    area = _areas(sample.array, axis, max(values, default=0) + 1)[:, list(values)]
    score = np.sqrt(area / area.max(axis=0).clip(1)).sum(axis=1)
    part = sample.box[axis]
    return part.start + part.step * int(score.argmax() if values else len(score) // 2)


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
    field = np.full(layers.shape, -np.inf, np.float32)
    for n in np.flatnonzero(layers.any(axis=tuple(range(1, mask.ndim)))):
        framed = np.pad(layers[n], 1)  # so that there is an outside
        inner, outer = (np.asarray(ndimage.distance_transform_edt(side, width)) for side in (framed, ~framed))
        field[n] = (inner - outer)[(slice(1, -1),) * (mask.ndim - 1)] / (2 * width.min())
    return np.moveaxis(field.clip(-field.max()), 0, thick)  # the edge is half way to layers without the structure


# ---- slices


def _window(volume: Volume) -> tuple[float, float]:
    evidence = modality_evidence(volume)
    seen = CanonicalVolume(volume, 1, 1, _CT_RULE if evidence.modality == "CT" else _MR_RULE, evidence.offset)
    return seen.low - evidence.offset, seen.high - evidence.offset


def _draw_slice(
    panel: Floats, axis: int, grey: Floats, values: NDArray[Any], spacing: Floats, structures: Mapping[int, Structure]
) -> None:
    if axis:  # rows of the array run upwards
        grey, values = grey[::-1], values[::-1]
    body = _body(grey, values, spacing)
    grey, values = grey[body], values[body]
    room = panel[_EDGE:-_EDGE, _EDGE:-_EDGE]
    size = np.array(grey.shape) * spacing
    scale = float(min(room.shape[:2] / size))  # pixels per mm
    shape = np.rint(size * scale).astype(int).clip(1)
    image = np.repeat(resize(grey, shape, order=3).clip(0, 1)[..., None], 3, axis=2)
    for value in np.intersect1d(values, list(structures)):
        field = _field(values == value, spacing)
        _paint(image, resize(field, shape, order=1), structures[int(value)].color)
    row, column = (room.shape[:2] - shape) // 2
    room[row : row + shape[0], column : column + shape[1]] = image
    _annotate(panel, *_PLANES[axis])
    longest = 0.2 * panel.shape[1]
    mm = max(n * 10.0**power for power in range(-6, 3) for n in (1, 2, 5) if n * 10**power * scale < longest)
    bar, bottom = round(mm * scale), panel.shape[0] - _EDGE // 2
    panel[bottom - 1 : bottom + 2, 16 : 16 + bar] = INK
    draw_text(panel, bottom, 26 + bar, f"{mm / 10:g} cm" if mm >= 10 else f"{mm:g} mm", 14)


def _body(grey: Floats, values: NDArray[Any], spacing: Floats) -> tuple[slice, ...]:
    """Rows and columns of a slice that hold what is brighter than air and no thin table, and all labels."""
    thin = np.rint(_THIN * max(grey.shape * spacing) / spacing).astype(int).clip(1)
    bright = ndimage.grey_opening((grey > _DARK).astype(np.uint8), thin)
    box = foreground_box((bright | (values > 0))[None]) or np.s_[:1, 0 : grey.shape[0], 0 : grey.shape[1]]
    return tuple(slice(max(0, part.start - n // 2), part.stop + n // 2) for part, n in zip(box[1:], thin, strict=True))


def _paint(image: Floats, field: Floats, color: tuple[int, int, int]) -> None:
    """Fills where the field is positive, and draws an outline inside of that edge."""
    slope = [np.gradient(field, axis=n) if field.shape[n] > 1 else np.zeros(1) for n in (0, 1)]
    depth = field / np.hypot(*slope).clip(1e-3)  # pixels inside of the edge
    inside = (depth + 0.5).clip(0, 1)
    blend(image, np.array(color) / 255, inside * (_OUTLINE + 0.5 - depth).clip(_FILL, 1))


# ---- surfaces


def _draw_surfaces(panel: Floats, sample: _Sample, structures: Mapping[int, Structure]) -> None:
    panel[:] = np.linspace(_SKY, _GROUND, len(panel))[:, None]
    _annotate(panel, "Surfaces", "RLSI")
    boxes = dict(enumerate(ndimage.find_objects(sample.array), start=1))
    items = {value: item for value, item in structures.items() if boxes.get(value)}
    if not items:
        draw_text(panel, panel.shape[0] // 2, panel.shape[1] // 2, _NOTHING, 28, _LETTER, "center", bold=True)
        return
    canvas = panel.repeat(_SAMPLES, axis=0).repeat(_SAMPLES, axis=1)
    facets = fit([_facets(sample, value, boxes[value], item) for value, item in items.items()], *canvas.shape[:2])
    parents = {item.parent for item in structures.values()}
    hollow = [item.key in parents for item in items.values()]
    solid, depth = render([part for part, glass in zip(facets, hollow, strict=True) if not glass], *canvas.shape[:2])
    shell, front = render([part for part, glass in zip(facets, hollow, strict=True) if glass], *canvas.shape[:2])
    blend(canvas, solid, np.isfinite(depth))
    blend(canvas, shell, _GLASS * (front > depth))
    panel[:] = canvas.reshape(len(panel), _SAMPLES, -1, _SAMPLES, 3).mean(axis=(1, 3))


def _facets(sample: _Sample, value: int, box: tuple[slice, ...], item: Structure) -> Facets:
    """Smooth surface that encloses as much as the voxels do."""
    mask = np.pad(sample.array[box] == value, _PAD)
    voxel = max(sample.spacing.min(), max(sample.spacing * sample.array.shape) / _LONGEST)
    field = _field(mask, sample.spacing)
    field = resize(field, np.rint(mask.shape * np.maximum(1, sample.spacing / voxel)).astype(int), order=1)
    ratio = np.array(field.shape) / mask.shape
    field = ndimage.gaussian_filter((field + 0.5).clip(0, 1), np.clip(0.5 * ratio.max(), 1, 2), mode="constant")
    level = np.quantile(field, 1 - mask.mean()).clip(0.2 * field.max(), 0.5 * field.max())
    corner = np.array([part.start for part in box]) - _PAD + 0.5 / ratio - 0.5
    points, normals, triangles = contour(field, level, sample.spacing / ratio, sample.spacing * corner)
    colors = np.full((len(triangles), 3), np.array(item.color) / 255)
    return Facets((points @ _VIEW.T)[triangles], (normals @ _VIEW.T)[triangles], colors)


# ---- type and lines


def _draw_frame(picture: Floats, volume: Volume, title: str) -> None:
    k, j, i = volume.grid.shape
    size, spacing = f"{i} × {j} × {k} voxels", " × ".join(f"{mm:.3g}" for mm in volume.grid.spacing) + " mm"
    facts = "   ·   ".join(filter(None, (volume.modality, size, spacing)))
    draw_text(picture, 54, _MARGIN, title, 32, bold=True, room=_WIDTH - 2 * _MARGIN)
    draw_text(picture, 93, _MARGIN, facts, 18, _MUTED)
    draw_text(picture, _HEIGHT - 24, _MARGIN, "Research use only; not a medical device", 15, _MUTED)


def _draw_legend(
    picture: Floats, rows: list[tuple[Structure, float]], missing: list[str], flags: Mapping[str, Sequence[str]]
) -> None:
    left, right = _WIDTH - _MARGIN - _LEGEND + 28, _WIDTH - _MARGIN
    if not rows:
        draw_text(picture, _TOP + 14, left, _NOTHING, 24, _LETTER, bold=True)
        draw_text(picture, _TOP + 50, left, "Check the field of view and the modality.", 16, _MUTED)
        return
    draw_text(picture, _TOP + 14, left, "Structure", 16, _MUTED)
    draw_text(picture, _TOP + 14, right, "Volume", 16, _MUTED, align="right")
    picture[_TOP + 36, left:right] = _RULE
    shown = rows if len(rows) <= _ROWS else rows[: _ROWS - 1]
    last = [(f"and {len(rows) - len(shown)} more", "")] if len(shown) < len(rows) else []
    listed = len(missing) == 1 or len(rows) + len(missing) <= _ROOMY
    last += [(name, "not found") for name in (missing if listed else [f"{len(missing)} others"] if missing else [])]
    pitch = min(38, (_HEIGHT - _MARGIN - _TOP - 48) / (len(shown) + len(last)))
    size = min(19, int(pitch * 0.78))
    for n, (name, state) in enumerate(last, start=len(shown)):
        row = round(_TOP + 48 + pitch * (n + 0.5))
        width = draw_text(picture, row, right, state, min(size, 15), _MUTED, "right")
        draw_text(picture, row, left + 30, name, size, _MUTED, room=right - left - 46 - width)
    for n, (item, volume_ml) in enumerate(shown):
        row = round(_TOP + 48 + pitch * (n + 0.5))
        draw_dot(picture, row, left + 8, min(8, 0.36 * pitch), item.color)
        amount = f"{volume_ml:,.0f} mL" if volume_ml >= 10 else f"{volume_ml:.1f} mL"
        width = draw_text(picture, row, right, amount, size, _MUTED, "right")
        room, words = right - left - 46 - width, ", ".join(flags.get(item.key, ()))
        if words and pitch >= _TWO_LINES:
            draw_text(picture, row + 9, left + 30, words, 13, _LETTER, room=room)
            row -= 8
        draw_text(picture, row, left + 30, item.name, size, _LETTER if words else INK, room=room)


def _annotate(panel: Floats, name: str, letters: str) -> None:
    (height, width), near = panel.shape[:2], _EDGE // 2
    draw_text(panel, near, 16, name, 18, bold=True)
    rows, columns = (height // 2, height // 2, near, height - near), (near, width - near, width // 2, width // 2)
    for row, column, letter in zip(rows, columns, letters, strict=True):
        draw_text(panel, row, column, letter, 18, _LETTER, "center", bold=True)
