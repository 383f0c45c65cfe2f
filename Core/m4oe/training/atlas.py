"""Atlases: a person's label map with every voxel's tissue, from which `synthesis` draws images of any contrast.

Structures tell the tissue of their voxels; some hold several, and what no structure covers is split as well, into gas,
fat, muscle, bone and the like: by the intensities of the image that the labels belong to, or without one by depth and
chance. A background that looks the same in every image is learned by heart (Billot et al., "SynthSeg", Medical Image
Analysis 86, 2023, section 3.2).

Shape suffixes: Z slice, H and W row and column of the canonical grid, C tissue class, K label, M place of a structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..geometry import Volume
from ..labels import catalogue
from ..modality import modality_evidence
from ..resample import CanonicalVolume
from ..spec import IntensityRule, ModelSpec
from .body import TISSUES
from .cases import CaseFiles, expert_of, on_grid, read_labels, whole_planes
from .data import annotated_classes
from .dome import GOES_ON, continue_upwards

_BODY_HU = -300.0
_BODY_SHARE = 0.08  # of an MR volume's range, above which there is a body
_RULES = {"CT": IntensityRule("window", -1024, 1500), "MR": IntensityRule("percentile", 0.5, 99.5)}
_RIM_MM = {"cortex": 6.0, "csf": 4.0}  # of kidneys, and around the spinal cord, which label maps draw with its fluid
_SKIN_MM = (8.0, 22.0)  # fat below the skin where there is no image to show it
_WALL_MM = (5.0, 14.0)  # muscle below that fat
_UNKNOWN = "unknown"  # what a label map without an image calls the rest of the body
_VESSELS = 0.35  # how far from where two noises cross zero, in their standard deviations
_LIKE = {  # tissues of a structure, in no order; several where it holds several
    "liver": ("liver", "liver_vein"),
    "kidney_right": ("cortex_right", "medulla_right"),
    "kidney_left": ("cortex_left", "medulla_left"),
    "kidney": ("cortex_left", "medulla_left"),
    "stomach": ("stomach_gas", "stomach_fluid", "stomach_food"),
    "duodenum": ("duodenum_gas", "duodenum", "duodenum_fluid"),
    "colon": ("gas", "faeces", "bowel_wall"),
    "rectum": ("gas", "faeces", "bowel_wall"),
    "small_bowel": ("gas", "bowel_fluid", "bowel_wall"),
    "esophagus": ("esophagus_gas", "esophagus"),
    "adrenal_gland_right": ("adrenal_right",),
    "adrenal_gland_left": ("adrenal_left",),
    "urinary_bladder": ("bladder",),
    "prostate_or_uterus": ("prostate",),
    "kidney_cyst": ("urine",),
    "liver_tumor": ("tumor_hypo",),
    "spinal_cord": ("csf", "cord"),
    "intervertebral_discs": ("disc",),
    "costal_cartilages": ("disc",),
    "heart": ("blood", "myocardium"),
    "portal_vein_and_splenic_vein": ("vein",),
    "body": (_UNKNOWN,),
    **{key: ("lung",) for key in catalogue() if key.startswith("lung_")},
    **{key: ("vein",) for key in catalogue() if "vein" in key or "vena" in key},
}
_KINDS = {"bone": ("bone", "marrow"), "vessel": ("blood",), "muscle": ("muscle",)}
_REST_CT = ("gas", "lung", "visceral_fat", "muscle", "bone")  # of what no label names
_BOWEL = 0.6  # smooth noise above which muscle on CT is the wall of bowel: their HU are the same
# The same on MR with its shares, of which k-means would call a fifth bone
_REST_MR = {"bone": 0.05, "muscle": 0.45, "bowel_wall": 0.2, "fat": 0.3}
_MADE_UP = ("visceral_fat", "muscle", "bowel_wall", "bowel_fluid", "gas", "marrow")


@dataclass(frozen=True, eq=False)
class Atlas:
    """A person on the canonical grid, without an appearance.

    Attributes:
        classes_ZHW: Tissue class, uint8; 0 outside of the body.
        texture_ZHW: What the image adds to the mean of each class, 1 being 100 HU or half of the range of an MR volume,
            float16; None without an image.
        tissues: Names in TISSUES by class.
        labels_C: The model's label of each class.
        annotated_K: Which labels are known; the others may be anywhere.
        spacing: (Z, H, W) in mm.
        slices_of: Slices that show a label.
        places_M4: Centre (Z, H, W) and radius in mm of the structures.
        name: For messages.
        weight: How often it is drawn, relative to other atlases.
        expert: That of the MR image, whose contrast may be drawn again; empty for none.
        signals_C: Mean of each class in that image, in [0, 1]; NaN where the image does not show it.
    """

    classes_ZHW: NDArray[np.uint8]
    texture_ZHW: NDArray[np.float16] | None
    tissues: tuple[str, ...]
    labels_C: NDArray[np.int64]
    annotated_K: NDArray[np.bool_]
    spacing: tuple[float, ...]
    slices_of: Mapping[int, NDArray[np.int64]]
    places_M4: NDArray[np.float32]
    name: str = ""
    weight: float = 1.0
    expert: str = ""
    signals_C: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def load_atlas(case: CaseFiles, spec: ModelSpec, weight: float = 1.0) -> Atlas:
    """The atlas of a labelled case, whatever its modality; where the image is the label map itself, of that alone.

    Structures that the model does not know, or that are not annotated, say what tissue their voxels are.

    Raises:
        ValueError: A file cannot be read, or image and labels do not belong together.
    """
    from ..files import read_volume

    labels = read_labels(case)
    image = None
    if case.image != case.label:
        image = replace(read_volume(case.image, 0), name=case.case, modality=case.modality)
        labels = on_grid(labels, image.grid)
    labels = replace(labels, array=np.stack([plane.astype(np.int64) for plane in whole_planes(labels.array)]))
    atlas = make_atlas(labels, case.labels, case.annotated, spec, image, case.case, weight)
    return replace(atlas, expert=expert_of(case)) if image and case.modality == "MR" else atlas


def make_atlas(
    labels: Volume,
    meanings: Mapping[int, str],
    annotated: Sequence[str],
    spec: ModelSpec,
    image: Volume | None = None,
    name: str = "",
    weight: float = 1.0,
) -> Atlas:
    """Splits a person into tissues.

    Args:
        labels: Label map in whole numbers.
        meanings: Structure by label value; "background", or "body" for what is in it and has no name.
        annotated: Keys of the model's structures that are known here, found or not.
        spec: Of the model that is trained.
        image: CT or MR on the same grid.
        name: For messages.
        weight: See `Atlas`.

    Raises:
        ValueError: The map shows nothing that has a name.
    """
    modality = image.modality or modality_evidence(image).modality if image else ""
    picture = image or replace(labels, array=labels.array.astype(np.float32))
    offset = modality_evidence(image).offset if image else 0.0
    canonical = CanonicalVolume(picture, spec.pixel_mm, spec.slice_mm, _RULES[modality or "MR"], offset)
    values_ZHW = canonical.labels(labels)
    intensity_ZHW = canonical.slices(0, canonical.shape[0]).numpy() if image else None
    size = [
        shape * step
        for shape, step in zip(canonical.source.grid.shape, canonical.source.grid.spacing[::-1], strict=True)
    ]
    spacing = tuple(extent / count for extent, count in zip(size, canonical.shape, strict=True))
    parts = _Parts(values_ZHW.shape, spacing, intensity_ZHW, modality)
    named = {value: key for value, key in meanings.items() if key != "background"}
    for value, key in named.items():
        parts.add(values_ZHW == value, tissues_of(key), spec.labels_of([key])[0] if key in annotated else 0)
    if not parts.labels[1:]:
        raise ValueError(f"{name}: the label map shows none of {', '.join(named.values())}")
    if intensity_ZHW is not None:
        known = np.isin(values_ZHW, list(named))
        parts.add_rest(_inside(intensity_ZHW, modality) & ~known)
    means_C = np.zeros(0) if intensity_ZHW is None else _means(intensity_ZHW, parts.classes_ZHW)
    texture_ZHW = _texture(intensity_ZHW, means_C, parts.classes_ZHW, modality)
    if GOES_ON.issuperset(_annotated_at_the_top(parts, spec)) and not {"lung", "myocardium"} & _tissues_of(annotated):
        texture_ZHW = parts.continue_upwards(texture_ZHW)
    labels_C = np.array(parts.labels)
    shown_ZHW = labels_C[parts.classes_ZHW]
    slices_of = {int(n): np.flatnonzero((shown_ZHW == n).any((1, 2))) for n in np.unique(shown_ZHW) if n}
    places = [_place(shown_ZHW == label, spacing) for label in slices_of]
    return Atlas(
        parts.classes_ZHW,
        texture_ZHW,
        tuple(parts.tissues),
        labels_C,
        annotated_classes(annotated, spec),
        spacing,
        slices_of,
        np.array(places, np.float32).reshape(-1, 4),
        name,
        weight,
        signals_C=np.pad(means_C, (0, len(parts.tissues) - len(means_C)), constant_values=np.nan),
    )


def _annotated_at_the_top(parts: _Parts, spec: ModelSpec) -> set[str]:
    """Keys of the model's structures that the last slice shows."""
    return {spec.structures[label - 1] for label in np.array(parts.labels)[np.unique(parts.classes_ZHW[-1])] if label}


def _tissues_of(keys: Sequence[str]) -> set[str]:
    return {tissue for key in keys for tissue in tissues_of(key)}


def tissues_of(key: str) -> tuple[str, ...]:
    """Names in TISSUES of what a structure consists of; muscle where nothing better is known."""
    if key in _LIKE:
        return _LIKE[key]
    if key in TISSUES:
        return (key,)
    return _KINDS.get(catalogue()[key].kind, ("muscle",)) if key in catalogue() else ("muscle",)


def negative_atlas(seed: int, spec: ModelSpec) -> Atlas:
    """A head, a thigh or two, made up: ovals of fat, muscle and bone with nothing in them that has a label."""
    rng = np.random.default_rng([seed, 7])
    shape, spacing = (40, 96, 120), (spec.slice_mm, spec.pixel_mm, spec.pixel_mm)
    head, pair = rng.random() < 0.5, rng.random() < 0.5
    z, y, x = np.meshgrid(*(np.arange(n) - n / 2 for n in shape), indexing="ij")
    size = rng.uniform(60, 95) / spec.pixel_mm
    wobble = _smooth_noise(rng, shape, 14) * 0.06
    centre = size * rng.uniform(0.75, 0.95) if pair and not head else 0.0
    size = min(size, 52 - centre) if centre else size
    narrow = 1 + (z / shape[0] * 2) ** 2 * rng.uniform(0, 0.4)
    depth = (1 - np.hypot((abs(x) - centre if centre else x) / rng.uniform(0.8, 1), y) * narrow / size + wobble) * size
    depth = depth * spec.pixel_mm  # mm below the skin
    parts = _Parts(shape, spacing, None, "")
    fat = rng.uniform(3, 7) if head else rng.uniform(5, 20)
    core = depth > fat
    parts.add((depth > 0) & ~core, ("fat",), 0)
    if head:
        skull = core & (depth < fat + rng.uniform(4, 9))
        parts.add(skull, ("bone", "marrow"), 0)
        core &= ~skull
    if head:
        base = (rng.uniform(-0.35, 0.05) - rng.uniform(0.2, 0.6) * y / size) * shape[0]  # the face lies in front of it
        _add_brain(parts, core & (z > base), depth - fat, x, rng)
        core &= z <= base
    kinds = ("muscle", "gas", "fat", "bone", "csf") if head else ("muscle", "muscle", "visceral_fat", "vein")
    noise = np.stack([_smooth_noise(rng, shape, rng.uniform(4, 12)) + rng.uniform(0, 1) for _ in kinds])
    for number, kind in enumerate(kinds):
        parts.add(core & (noise.argmax(0) == number), (kind,), 0)
    if not head:
        parts.add(core & (depth > depth.max() - rng.uniform(10, 16)), ("bone", "marrow"), 0)
    known = np.ones(len(spec.structures) + 1, bool)
    nowhere = np.empty((0, 4), np.float32)
    labels_C = np.array(parts.labels)
    return Atlas(parts.classes_ZHW, None, tuple(parts.tissues), labels_C, known, spacing, {}, nowhere, "negative")


def _add_brain(parts: _Parts, mask: NDArray[np.bool_], depth: NDArray, x: NDArray, rng: np.random.Generator) -> None:
    """White matter, folds of grey matter around it, and fluid between them, in the middle and in the ventricles."""
    folds, ventricle = _smooth_noise(rng, mask.shape, rng.uniform(2, 4)), _smooth_noise(rng, mask.shape, 7)
    deep = rng.uniform(18, 30)
    fluid = (abs(folds) < 0.12) & (depth < deep) | (abs(x) < 0.7) | (depth > 1.6 * deep) & (ventricle > 1)
    grey = (folds > 0.4 * depth / deep) & (depth < 1.3 * deep) | (depth > 1.6 * deep) & (ventricle < -1.2)
    for kind, where in (("csf", fluid), ("spleen", grey & ~fluid), ("cord", ~grey & ~fluid)):
        parts.add(mask & where, (kind,), 0)


class _Parts:
    """The classes found so far."""

    def __init__(
        self, shape: tuple[int, ...], spacing: Sequence[float], intensity: NDArray | None, modality: str
    ) -> None:
        self.spacing, self.intensity, self.modality = spacing, intensity, modality
        self.classes_ZHW = np.zeros(shape, np.uint8)
        self.tissues, self.labels = ["air"], [0]

    def add(self, mask: NDArray[np.bool_], tissues: Sequence[str], label: int) -> None:
        """Adds a structure as one class for each of its tissues."""
        if not mask.any():
            return
        if tissues == (_UNKNOWN,):
            tissues, split = _MADE_UP, self._by_chance(mask)
        elif len(tissues) == 1:
            split = np.zeros(int(mask.sum()), int)
        elif tissues[0].startswith(("cortex", "csf", "bone")) and len(tissues) == 2:
            reach = max(_RIM_MM.get(tissues[0].partition("_")[0], 0.0), 1.01 * max(self.spacing[1:]))
            split = (ndimage.distance_transform_edt(np.pad(mask, 1), self.spacing)[1:-1, 1:-1, 1:-1][mask] > reach) * 1
        elif tissues[0] == "liver":
            rng = np.random.default_rng(len(self.tissues))
            tubes = np.hypot(*(_smooth_noise(rng, mask.shape, 5)[mask] for _ in range(2)))
            split = (tubes < _VESSELS) * 1
        elif self.intensity is not None:
            tissues, split = self._by_intensity(mask, tissues)
        else:
            split = _ranks(_smooth_noise(np.random.default_rng(len(self.tissues)), mask.shape, 5)[mask], len(tissues))
        self.classes_ZHW[mask] = (len(self.tissues) + split).astype(np.uint8)
        self.tissues += tissues
        self.labels += [label] * len(tissues)

    def add_rest(self, mask: NDArray[np.bool_]) -> None:
        """Adds what of a body with an image no label names."""
        self.add(mask, _REST_CT if self.modality == "CT" else tuple(_REST_MR), 0)
        if self.modality == "CT":
            noise = _smooth_noise(np.random.default_rng(len(self.tissues)), mask.shape, 5)
            muscle = len(self.tissues) - 1 - _REST_CT[::-1].index("muscle")
            self.add(mask & (self.classes_ZHW == muscle) & (noise > _BOWEL), ("bowel_wall",), 0)

    def continue_upwards(self, texture_ZHW: NDArray[np.float16] | None) -> NDArray[np.float16] | None:
        """Adds the dome of the liver where it was cut off; returns the texture, mirrored there."""
        rng = np.random.default_rng(len(self.tissues))
        self.classes_ZHW, self.tissues, kept = continue_upwards(self.classes_ZHW, self.tissues, self.spacing, rng)
        self.labels += [0] * (len(self.tissues) - len(self.labels))
        if texture_ZHW is None:
            return None
        texture_ZHW = np.pad(texture_ZHW[:kept], ((0, len(self.classes_ZHW) - kept), (0, 0), (0, 0)), mode="reflect")
        return texture_ZHW * (self.classes_ZHW > 0)

    def _by_intensity(self, mask: NDArray[np.bool_], tissues: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
        """k-means of smoothed intensities that start where CT has the tissues, in MR evenly; MR's rest by shares."""
        assert self.intensity is not None
        width, weight = (0.5, 0.7, 0.7), mask.astype(np.float32)  # what is beside the mask has no say
        smooth = ndimage.gaussian_filter(self.intensity * weight, width)[mask]
        smooth = smooth / ndimage.gaussian_filter(weight, width)[mask]
        if self.modality == "CT":
            rule = _RULES["CT"]
            ordered = sorted(tissues, key=lambda name: TISSUES[name].hu)
            start = [(min(TISSUES[name].hu, 300.0) - rule.low) / (rule.high - rule.low) for name in ordered]
        else:
            ordered = sorted(tissues, key=lambda name: TISSUES[name].density / TISSUES[name].t1)
            if tissues == tuple(_REST_MR):
                below = np.cumsum([_REST_MR[name] for name in ordered])[:-1]
                return ordered, np.searchsorted(np.quantile(smooth, below), smooth)
            start = np.quantile(smooth, (np.arange(len(ordered)) + 0.5) / len(ordered)).tolist()
        return ordered, _nearest_means(smooth, np.array(start))

    def _by_chance(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Fat below the skin, muscle below it, and within a mixture of all."""
        rng = np.random.default_rng(int(mask.sum()))
        body = mask | (self.classes_ZHW > 0)
        depth = np.stack([ndimage.distance_transform_edt(plane, self.spacing[1:]) for plane in body])[mask]
        noise = np.stack([_smooth_noise(rng, mask.shape, 5)[mask] for _ in _MADE_UP])
        noise += np.array([0.9, 0.9, 0.5, 0.0, -0.3, 0.0])[:, None]
        skin = rng.uniform(*_SKIN_MM)
        wall = _MADE_UP.index("muscle")
        return np.where(depth < skin, 0, np.where(depth < skin + rng.uniform(*_WALL_MM), wall, noise.argmax(0)))


def _nearest_means(values: NDArray, means: NDArray) -> NDArray[np.int64]:
    """Lloyd's k-means in one dimension, a few steps from `means`: the order of the means stays."""
    for _ in range(8):
        split = np.searchsorted((means[1:] + means[:-1]) / 2, values)
        count = np.bincount(split, minlength=len(means))
        means = np.where(count > 0, np.bincount(split, values, len(means)) / np.maximum(count, 1), means)
        means = np.maximum.accumulate(means)
    return split


def _ranks(values: NDArray, count: int) -> NDArray[np.int64]:
    """As many parts of equal size, by value."""
    return np.searchsorted(np.quantile(values, np.arange(1, count) / count), values)


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], voxels: float) -> NDArray[np.float32]:
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), (voxels / 2, voxels, voxels), mode="wrap")
    return noise / noise.std()


def _inside(intensity_ZHW: NDArray, modality: str) -> NDArray[np.bool_]:
    """The body with all that it encloses in each slice."""
    rule = _RULES["CT"]
    threshold = (_BODY_HU - rule.low) / (rule.high - rule.low) if modality == "CT" else _BODY_SHARE
    mask = ndimage.binary_opening(intensity_ZHW > threshold, iterations=2)
    parts, count = ndimage.label(mask)
    mask = parts == 1 + np.argmax(np.bincount(parts.ravel(), minlength=count + 1)[1:]) if count else mask
    return np.stack([ndimage.binary_fill_holes(ndimage.binary_closing(plane, iterations=2)) for plane in mask])


def _means(intensity_ZHW: NDArray, classes_ZHW: NDArray) -> NDArray[np.float64]:
    flat = classes_ZHW.ravel()
    count_C = np.bincount(flat)
    return np.where(count_C > 0, np.bincount(flat, intensity_ZHW.ravel()) / np.maximum(count_C, 1), np.nan)


def _texture(
    intensity_ZHW: NDArray | None, means_C: NDArray, classes_ZHW: NDArray, modality: str
) -> NDArray[np.float16] | None:
    if intensity_ZHW is None:
        return None
    unit = 100 / (_RULES["CT"].high - _RULES["CT"].low) if modality == "CT" else 0.5
    return np.clip((intensity_ZHW - means_C[classes_ZHW]) / unit, -1, 1).astype(np.float16) * (classes_ZHW > 0)


def _place(mask: NDArray[np.bool_], spacing: Sequence[float]) -> tuple[float, ...]:
    """Centre in mm, and the radius of a ball of the same volume."""
    centre = np.argwhere(mask).mean(0) * spacing
    return (*centre, (mask.sum() * np.prod(spacing) * 3 / (4 * np.pi)) ** (1 / 3))
