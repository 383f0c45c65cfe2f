"""Synthetic torsos: seeded anatomy from implicit shapes, and its picture in CT or MR, with exact labels.

Anatomy lives in a reference body: x to the left, y to the back, z up, in mm; the origin lies between the
kidneys, at the depth of the aorta. A phantom deforms that body, and paints tissue after tissue on a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from ..geometry import Grid, Volume

MODALITIES = ("ct", "mr_t1", "mr_t2", "mr_t1ce")
STRUCTURES = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior_vena_cava", "pancreas", "adrenal_gland_right",
    "adrenal_gland_left", "duodenum", "urinary_bladder", "prostate_or_uterus", "liver_tumor",
)  # fmt: skip
_BOWEL = ("bowel_wall", "bowel_fluid", "faeces", "gas")

Array = NDArray[Any]
Box = tuple[slice, slice, slice]
_EVERYWHERE = (slice(None), slice(None), slice(None))


class Tissue(NamedTuple):
    """How a tissue looks: CT number, contrast uptake, relaxation, and the structure it belongs to."""

    hu: float  # without contrast medium
    arterial: float  # HU that contrast medium adds in the arterial phase
    portal: float  # and in the portal venous phase
    t1: float  # ms at 1.5 T
    t2: float  # ms
    density: float  # of protons, relative to water
    texture: float  # standard deviation in HU; in MR, per cent of the signal
    structure: str = ""


# T1 and T2 of liver, spleen, pancreas, kidney, muscle, fat, marrow, prostate and uterus after de Bazelaire
# et al., Radiology 2004 (1.5 T). The other numbers are round, usual values. Each phantom varies all of them.
TISSUES = {
    "air": Tissue(-1000, 0, 0, 1000, 50, 0.0, 0),
    "table": Tissue(-250, 0, 0, 1000, 50, 0.0, 60),
    "skin": Tissue(20, 5, 15, 800, 35, 0.6, 5),
    "fat": Tissue(-105, 0, 0, 343, 58, 0.9, 4),
    "visceral_fat": Tissue(-98, 0, 2, 343, 58, 0.85, 9),
    "muscle": Tissue(52, 4, 14, 856, 27, 0.8, 9),
    "lung": Tissue(-850, 5, 15, 1200, 30, 0.12, 35),
    "bone": Tissue(650, 0, 0, 400, 12, 0.12, 120),
    "marrow": Tissue(150, 5, 20, 549, 49, 0.6, 40),
    "disc": Tissue(80, 0, 5, 1000, 75, 0.7, 12),
    "csf": Tissue(12, 0, 2, 4000, 1500, 1.0, 3),
    "cord": Tissue(35, 2, 5, 950, 85, 0.8, 3),
    "blood": Tissue(42, 220, 115, 1441, 250, 0.9, 6),
    "vein": Tissue(40, 45, 120, 1441, 200, 0.9, 5),
    "myocardium": Tissue(46, 65, 65, 1000, 55, 0.8, 8),
    "bowel_wall": Tissue(40, 35, 48, 950, 60, 0.8, 8),
    "bowel_fluid": Tissue(15, 0, 3, 2600, 500, 0.95, 12),
    "faeces": Tissue(0, 0, 0, 500, 45, 0.5, 130),
    "gas": Tissue(-930, 0, 0, 1000, 20, 0.01, 15),
    "spleen": Tissue(47, 75, 70, 1057, 79, 0.85, 5, "spleen"),
    "cortex_right": Tissue(33, 140, 150, 966, 87, 0.85, 8, "kidney_right"),
    "medulla_right": Tissue(30, 45, 125, 1412, 85, 0.85, 8, "kidney_right"),
    "cortex_left": Tissue(33, 140, 150, 966, 87, 0.85, 8, "kidney_left"),
    "medulla_left": Tissue(30, 45, 125, 1412, 85, 0.85, 8, "kidney_left"),
    "urine": Tissue(6, 0, 0, 3200, 900, 1.0, 2),
    "gallbladder": Tissue(9, 0, 2, 2200, 500, 0.95, 4, "gallbladder"),
    "esophagus": Tissue(38, 20, 38, 950, 55, 0.8, 8, "esophagus"),
    "esophagus_gas": Tissue(-600, 0, 0, 1000, 20, 0.1, 60, "esophagus"),
    "liver": Tissue(57, 12, 52, 586, 46, 0.8, 4, "liver"),
    "liver_vein": Tissue(42, 35, 105, 1300, 130, 0.85, 4, "liver"),
    "stomach": Tissue(42, 40, 48, 950, 60, 0.8, 8, "stomach"),
    "stomach_fluid": Tissue(12, 0, 2, 2600, 550, 0.95, 14, "stomach"),
    "stomach_food": Tissue(35, 0, 0, 700, 80, 0.75, 45, "stomach"),
    "stomach_gas": Tissue(-940, 0, 0, 1000, 20, 0.01, 10, "stomach"),
    "aorta": Tissue(42, 260, 115, 1441, 250, 0.9, 4, "aorta"),
    "aorta_calcification": Tissue(450, 0, 0, 400, 12, 0.2, 100, "aorta"),
    "inferior_vena_cava": Tissue(40, 40, 105, 1441, 220, 0.9, 8, "inferior_vena_cava"),
    "pancreas": Tissue(40, 60, 48, 584, 46, 0.8, 14, "pancreas"),
    "adrenal_right": Tissue(28, 35, 45, 750, 65, 0.8, 6, "adrenal_gland_right"),
    "adrenal_left": Tissue(28, 35, 45, 750, 65, 0.8, 6, "adrenal_gland_left"),
    "duodenum": Tissue(40, 40, 50, 950, 60, 0.8, 10, "duodenum"),
    "duodenum_fluid": Tissue(18, 0, 3, 2400, 400, 0.9, 15, "duodenum"),
    "duodenum_gas": Tissue(-700, 0, 0, 1000, 20, 0.05, 80, "duodenum"),
    "bladder_wall": Tissue(38, 15, 30, 1000, 60, 0.8, 6, "urinary_bladder"),
    "bladder": Tissue(6, 0, 0, 3200, 900, 1.0, 3, "urinary_bladder"),
    "prostate": Tissue(40, 25, 48, 1317, 88, 0.85, 9, "prostate_or_uterus"),
    "uterus": Tissue(45, 35, 70, 1274, 79, 0.85, 9, "prostate_or_uterus"),
    "tumor_hypo": Tissue(38, 8, 24, 950, 80, 0.85, 9, "liver_tumor"),
    "tumor_hyper": Tissue(46, 60, 35, 850, 70, 0.85, 11, "liver_tumor"),
    "tumor_cystic": Tissue(16, 4, 8, 1700, 160, 0.9, 7, "liver_tumor"),
}
_CODES = {name: code for code, name in enumerate(TISSUES)}
_LABELS = np.array([STRUCTURES.index(t.structure) + 1 if t.structure else 0 for t in TISSUES.values()], np.uint8)


def _points(text: str) -> Array:
    """Numbers [n, 4] from "x y z radius | x y z radius | ..."."""
    return np.array([point.split() for point in text.split("|")], float)


# Trunk by height: half width, front and back of the muscle wall's outside; the same of the cavity within it.
_TRUNK = np.array(
    [
        (220, 118, -88, 90, 106, -76, 78),
        (110, 138, -102, 94, 126, -91, 82),
        (0, 134, -98, 98, 121, -84, 78),
        (-80, 130, -93, 98, 115, -80, 72),
        (-130, 138, -89, 104, 108, -77, 64),
        (-180, 152, -84, 112, 78, -73, 66),
        (-230, 166, -78, 114, 56, -58, 64),
        (-275, 172, -70, 108, 34, -36, 48),
        (-340, 172, -65, 100, 1, -1, 1),
    ],
    float,
)[::-1]
_LORDOSIS = ((-320, -250, -200, -140, -90, 0, 120, 220), (20, 30, 30, 4, -10, 0, 9, 6))  # z, shift of the spine in y

# Tubes through (x, y, z, radius); those of a pair are drawn for the left side and mirrored.
_AORTA = _points("14 24 220 12 | 15 18 130 11.5 | 10 3 70 11 | 9 1 0 10 | 5 -1 -60 9 | 3 0 -92 9")
_CAVA = _points(
    """
    -16 -18 150 13 | -25 -14 105 13 | -27 -4 60 12 | -22 0 0 11 | -15 6 -60 10.5 | -11 10 -98 10
    """
)
_ESOPHAGUS = _points("4 2 220 7 | 8 -1 140 7.5 | 16 -16 105 7.5 | 30 -24 84 8")
_STOMACH = _points(
    """
    48 14 98 26 | 58 4 80 31 | 60 -26 50 31 | 46 -52 15 26 | 12 -58 2 20 | -20 -48 8 13
    """
)
_DUODENUM = _points(
    """
    -24 -46 8 11 | -42 -38 10 11.5 | -50 -20 -8 11.5 | -46 -13 -38 11.5 | -22 -20 -54 10.5 |
    10 -24 -52 10 | 26 -22 -32 10 | 32 -30 -16 10
    """
)
_PANCREAS = _points(
    """
    -20 -17 -28 10 | -32 -24 -8 14 | -18 -34 8 12 | 6 -36 20 10 | 32 -30 28 11.5 | 60 -8 36 11.5 |
    82 18 42 9
    """
)
_KIDNEY = _points("56 46 36 18.5 | 66 42 14 25.5 | 72 38 -10 26.5 | 74 32 -34 20.5")
_GALLBLADDER = _points("-46 -24 20 5 | -55 -38 8 11 | -64 -56 -8 14")
_COLON = _points(
    """
    -88 -8 -135 24 | -94 6 -110 26 | -98 14 -60 23 | -92 0 -24 22 | -62 -48 -22 20 |
    -20 -66 -42 19 | 30 -68 -36 18 | 74 -40 4 18 | 98 12 30 18 | 106 32 -10 15 | 100 28 -70 14 |
    94 10 -125 14 | 60 -2 -165 15 | 20 -22 -160 15 | -14 6 -150 15 | -4 34 -178 16 |
    2 46 -215 19 | 0 42 -250 16 | 0 36 -275 11
    """
)
_ILIAC = _points("4 -2 -92 7 | 26 6 -125 6 | 48 20 -155 5.5 | 66 -20 -205 5 | 80 -52 -250 5")
_FEMUR = _points("97 2 -214 22 | 112 6 -226 15 | 134 14 -244 17 | 134 10 -290 14 | 130 6 -350 13")
_VESSELS = (  # tissue and course of vessels that belong to no structure
    ("vein", _points("0 -26 -10 6 | -8 -28 12 6.5 | -22 -24 28 7 | -40 -22 38 6")),  # portal vein
    ("vein", _points("-6 -28 14 5 | 25 -22 26 4.5 | 55 2 38 4 | 84 24 46 3")),  # splenic vein
    ("vein", _points("-4 -28 -8 5.5 | -10 -30 -50 5 | -30 -35 -100 3")),  # mesenteric vein
    ("blood", _points("8 -8 18 4 | 6 -22 4 3.5 | 2 -31 -30 3.5 | -5 -38 -90 3")),  # mesenteric artery
    ("blood", _points("9 -8 34 4 | 8 -20 36 4 | -12 -26 34 3")),  # coeliac trunk
    ("blood", _points("8 -20 36 3 | 34 -14 42 3 | 66 10 46 3 | 86 28 52 2.5")),  # splenic artery
)
_BONES = (
    # ala of the sacrum
    _points("0 34 -132 20 | 26 44 -140 20 | 40 52 -165 13"),
    # sacrum and coccyx
    _points("0 36 -130 20 | 0 56 -165 17 | 0 74 -200 12 | 0 70 -235 8 | 0 56 -258 5"),
    # ischium
    _points("84 6 -175 14 | 88 8 -198 25 | 86 12 -222 25 | 72 34 -250 13 | 62 36 -282 14"),
    # pubis
    _points(
        """
        80 -12 -205 11 | 48 -36 -226 8 | 14 -46 -240 9 | 8 -42 -256 8 | 36 -8 -275 7 | 58 26 -284 9
        """
    ),
)
_MUSCLES = (
    # psoas
    _points(
        """
        28 36 30 8 | 36 34 -20 15 | 46 28 -80 22 | 60 12 -140 22 | 74 -18 -195 17 | 96 -20 -260 14
        """
    ),
    # erector spinae
    _points("30 76 220 20 | 34 80 60 25 | 38 80 -60 28 | 30 86 -140 20 | 20 96 -190 9"),
    # quadratus lumborum
    _points("58 66 10 8 | 66 64 -40 13 | 76 60 -95 12"),
    # crus of the diaphragm
    _points("16 16 98 6 | 15 13 40 6 | 13 16 -15 4"),
    # iliacus
    _points("84 2 -120 12 | 84 -6 -150 20 | 82 -24 -190 16"),
)


@dataclass(frozen=True)
class Phantom:
    """A synthetic case.

    Attributes:
        image: int16, in HU for "ct", of arbitrary scale and not negative for MR.
        labels: uint8 on the same grid; value n + 1 is STRUCTURES[n].
        modality: One of MODALITIES.
    """

    image: Volume
    labels: Volume
    modality: str


def make_phantom(seed: int, modality: str) -> Phantom:
    """Draw a torso; the same seed gives the same anatomy in every modality, on another grid.

    Raises:
        ValueError: `modality` is not one of MODALITIES.
    """
    if modality not in MODALITIES:
        raise ValueError(f"Unknown modality {modality!r}; choose one of {', '.join(MODALITIES)}.")
    rng = np.random.default_rng([seed, MODALITIES.index(modality)])
    body = _Body(np.random.default_rng([seed, len(MODALITIES)]), *_field_of_view(rng, modality))
    _paint_anatomy(body)
    picture = _ct(body, rng) if modality == "ct" else _mr(body, rng, modality)
    grid = _place(body, rng)
    axes = "LPS" if rng.random() < 0.6 else str(rng.choice(("RAS", "LAS", "LPI", "PSL", "ASL", "SLP")))
    kind, name = "CT" if modality == "ct" else "MR", f"phantom {seed}"
    turned = [Volume(array, grid).to_axes(axes) for array in (picture, _LABELS[body.tissue])]
    image, labels = (Volume(np.ascontiguousarray(v.array), v.grid, name, kind) for v in turned)
    return Phantom(image, labels, modality)


def _field_of_view(rng: Generator, modality: str) -> tuple[tuple[int, int, int], Array, Array]:
    """Shape (k, j, i), first voxel and spacing (x, y, z) of a scan in mm of the body."""
    bottom = rng.uniform(-110, -40) if rng.random() < (0.45 if modality == "ct" else 0.65) else rng.uniform(-290, -210)
    top = rng.uniform(95, 170)
    width = rng.uniform(350, 420) if rng.random() < 0.8 else rng.uniform(290, 340)
    depth = rng.uniform(0.66, 0.85) * width
    spacing = np.array([rng.uniform(1.8, 3.0)] * 2 + [rng.uniform(2.5, 6) if modality == "ct" else rng.uniform(4, 8)])
    size = np.array([width, depth, top - bottom])
    spacing[:2] = max(spacing[0], width / 200, depth / 180)
    spacing[2] = max(spacing[2], size[2] / 120)
    i, j, k = (size / spacing).astype(int)
    return ((k, j, i), np.array([-width / 2 + rng.normal(0, 7), -depth / 2 + rng.normal(0, 9), bottom]), spacing)


def _place(body: _Body, rng: Generator) -> Grid:
    """The body's grid in the scanner: LPS, sometimes a little oblique."""
    tilt = Rotation.from_rotvec(rng.normal(0, 0.06, 3)).as_matrix() if rng.random() < 0.3 else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-1.0, -1.0, 1.0]) * body.spacing
    affine[:3, 3] = tilt @ (body.first * [-1, -1, 1]) + rng.normal(0, 60, 3)
    return Grid(body.tissue.shape, affine)


def _smooth_field(rng: Generator, axes: Sequence[Array], step: float) -> Array:
    """Gaussian noise of unit variance over about `step` mm: float32 [k, j, i] at the axes (x, y, z) in mm."""
    lows, highs = np.array((-290, -250, -380)), np.array((290, 250, 270))
    knots = (np.ceil((highs - lows) / step) + 4).astype(int)
    field = rng.standard_normal(knots[::-1], np.float32)
    for n in (2, 1, 0):  # no matrix product: its threads would quarrel with those of other workers
        at = np.clip((axes[n] - lows[n]) / step, 0, knots[n] - 4) + 1
        taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
        weights = np.exp(-0.5 * ((at[:, None] - taps) / 0.6) ** 2)
        weights = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
        shape = [-1 if n == 2 - m else 1 for m in range(3)]
        parts = [np.take(field, taps[:, m], 2 - n) * weights[:, m].reshape(shape) for m in range(4)]
        field = np.add(parts[0] + parts[1], parts[2] + parts[3])
    return field


class _Body:
    """Voxels of a deformed body: where each lies in the reference body, and the tissue painted so far.

    Attributes:
        rng: Of the anatomy; what is drawn from it may not depend on the grid.
        where: float32 [3, k, j, i], (x, y, z) in the reference body in mm.
        inside: float32 [k, j, i], distance to the abdominal cavity's boundary in mm, negative within.
        grain, folds: float32 [k, j, i], smooth noise of unit variance over about 11 and 30 mm.
        tissue: uint8 [k, j, i], index in TISSUES.
    """

    def __init__(self, rng: Generator, shape: tuple[int, int, int], first: Array, spacing: Array) -> None:
        self.rng, self.first, self.spacing = rng, first, spacing
        self.tissue = np.zeros(shape, np.uint8)
        self.inside = np.zeros(shape, np.float32)
        self.axes = [first[n] + spacing[n] * np.arange(shape[2 - n]) for n in range(3)]
        scale = rng.normal(1, 0.055) * np.exp(rng.normal(0, (0.05, 0.06, 0.06)))
        self.matrix = Rotation.from_rotvec(rng.normal(0, 0.035, 3)).as_matrix() / scale[:, None]
        x, y, z = (axis.astype(np.float32) for axis in self.axes)
        self.where = np.empty((3, *shape), np.float32)
        for n, row in enumerate(self.matrix.astype(np.float32)):
            self.where[n] = row[0] * x + row[1] * y[:, None] + row[2] * z[:, None, None]
            self.where[n] += 6.5 * _smooth_field(rng, self.axes, 85) + 1.6 * _smooth_field(rng, self.axes, 28)
        self.grain = _smooth_field(rng, self.axes, 11)
        self.folds = _smooth_field(rng, self.axes, 30)

    def voxels(self, points: Array) -> Array:
        """Where points [n, 3] of the reference body lie, in voxels (i, j, k), fractional, perhaps outside."""
        last = np.array(self.tissue.shape[::-1]) - 1
        inverse = np.linalg.inv(self.matrix).T / self.spacing
        position = np.zeros_like(points) + last / 2
        for _ in range(3):  # the deformation is inverted by fixed-point iteration
            voxel = np.clip(np.rint(position), 0, last).astype(int)
            i, j, k = voxel.T
            position = voxel + (points - self.where[:, k, j, i].T) @ inverse
        return position

    def box(self, low: Array, high: Array, radius: float) -> Box:
        """The voxels from `low` to `high` (i, j, k) and about `radius` mm around them."""
        margin = 1.2 * radius / self.spacing + 1
        size = self.tissue.shape[::-1]
        i, j, k = (
            slice(min(max(int(a), 0), n), min(max(int(b) + 1, 0), n))
            for a, b, n in zip(low - margin, high + margin, size, strict=True)
        )
        return k, j, i

    def paint(self, box: Box, mask: Array, tissue: str, over: Sequence[str] = ()) -> None:
        """Give the voxels of `mask` a tissue, where they hold one of `over`, if any is named."""
        view = self.tissue[box]
        if over:
            mask = mask & np.isin(view, [_CODES[name] for name in over])
        view[mask] = _CODES[tissue]

    def ellipsoid(self, centre: ArrayLike, radii: ArrayLike, turn: ArrayLike = (0, 0, 0)) -> tuple[Box, Array]:
        """Box and approximate distance in mm; `turn` is in degrees about x, y, z."""
        radii = np.asarray(radii, float)
        position = self.voxels(np.array([centre], float))[0]
        box = self.box(position, position, radii.max())
        rows = (Rotation.from_euler("xyz", turn, degrees=True).as_matrix().T / radii[:, None]).astype(np.float32)
        x, y, z = (self.where[n][box] - np.float32(c) for n, c in enumerate(np.asarray(centre, float)))
        norm = np.sqrt(sum((row[0] * x + row[1] * y + row[2] * z) ** 2 for row in rows))
        return box, (norm - 1) * np.float32(radii.min())

    def tube(self, course: ArrayLike) -> tuple[Box, Array, Array]:
        """Box, distance in mm and position along it (0 to 1) of a tube through (x, y, z, radius) [n, 4]."""
        points = _course(np.asarray(course, float))
        voxels = self.voxels(points[:, :3])
        box = self.box(voxels.min(0), voxels.max(0), points[:, 3].max() + 4)
        start = np.array([s.start for s in box])
        distance = np.full([max(s.stop - s.start, 0) for s in box], 99, np.float32)
        along = np.zeros_like(distance)
        for n, (a, b) in enumerate(pairwise(points)):
            ends = voxels[n : n + 2]
            part = self.box(ends.min(0), ends.max(0), max(a[3], b[3]) + 4)
            local = tuple(slice(max(s.start - o, 0), max(s.stop - o, 0)) for s, o in zip(part, start, strict=True))
            step = (b - a).astype(np.float32)
            x, y, z = (self.where[m][box][local] - np.float32(a[m]) for m in range(3))
            t = np.clip((step[0] * x + step[1] * y + step[2] * z) / (step[:3] @ step[:3]), 0, 1)
            d = np.sqrt((x - step[0] * t) ** 2 + (y - step[1] * t) ** 2 + (z - step[2] * t) ** 2)
            d -= np.float32(a[3]) + step[3] * t
            closer = d < distance[local]
            distance[local][closer] = d[closer]
            along[local][closer] = (n + t[closer]) / (len(points) - 1)
        return box, distance, along


def _course(points: Array) -> Array:
    """Points of a smooth curve through `points` (x, y, z, radius), about one radius apart."""
    steps = np.linalg.norm(np.diff(points[:, :3], axis=0), axis=1)
    at = np.concatenate([[0], np.cumsum(steps)])
    count = max(int(at[-1] / max(0.9 * points[:, 3].mean(), 4)), 3)
    curve = CubicHermiteSpline(at, points, np.gradient(points, at, axis=0))(np.linspace(0, at[-1], count + 1))
    curve[:, 3] = np.maximum(curve[:, 3], 0.6 * points[:, 3].min())
    return curve


def _paint_anatomy(body: _Body) -> None:
    for step in (
        _trunk,
        _muscles,
        _bones,
        _spine,
        _bowel,
        _liver,
        _stomach,
        _spleen,
        _pancreas,
        _vessels,
        _kidneys,
        _pelvis,
    ):
        step(body)


def _radial(x: Array, y: Array, profile: Array) -> Array:
    """Distance in mm to the trunk's outline, profile [k, 3] of half width, front and back."""
    width, front, back = (profile[:, n, None, None].astype(np.float32) for n in range(3))
    y = y - (front + back) / 2
    u, v = (x / width) ** 2, (y / ((back - front) / 2)) ** 2
    rho = np.sqrt(0.4 * (u + v) + 0.6 * np.sqrt(u * u + v * v)) + np.float32(1e-3)  # a rounded box
    return np.hypot(x, y) * (1 - 1 / rho)


def _trunk(body: _Body) -> None:
    """Skin, fat, muscle wall, cavity, ribs, and the chest above the diaphragm."""
    x, y, z = body.where
    height = z.mean(axis=(1, 2))
    profile = np.stack([np.interp(height, _TRUNK[:, 0], column) for column in _TRUNK[:, 1:].T], axis=1)
    wall, body.inside = _radial(x, y, profile[:, :3]), _radial(x, y, profile[:, 3:])
    uneven = _smooth_field(body.rng, body.axes, 100)
    fat = (
        body.rng.lognormal(3.05, 0.45)
        * (1 + 0.2 * uneven)
        * np.interp(height, (-200, 0, 150), (1.6, 1, 0.75))[:, None, None]
    )
    body.paint(_EVERYWHERE, wall < fat, "skin")
    body.paint(_EVERYWHERE, wall < fat - 2.5, "fat")
    body.paint(_EVERYWHERE, wall < 0, "muscle")
    body.paint(_EVERYWHERE, (wall < -2) & (abs(body.folds) < 0.09) & (z < -95), "fat")  # between the muscles of the hip
    body.paint(_EVERYWHERE, body.inside < 0, "visceral_fat")
    body.paint(_EVERYWHERE, (body.inside < -8) & (body.grain > 2.2) & (z < 30), "vein")  # mesenteric
    dome = _diaphragm(body, x, y, z)
    body.paint(_EVERYWHERE, (body.inside < 0) & (dome > -2), "muscle")
    body.paint(_EVERYWHERE, (body.inside < -1) & (dome > 2), "lung")
    _ribs(body, x, y, z, wall)
    _heart(body, dome)
    body.inside = np.maximum(body.inside, dome)


def _diaphragm(body: _Body, x: Array, y: Array, z: Array) -> Array:
    """Height above the diaphragm in mm."""
    right, left = body.rng.normal((116, 106), 10)
    domes = (
        right - 62 * (((x + 60) / 76) ** 2 + ((y + 5) / 92) ** 2),
        left - 62 * (((x - 62) / 74) ** 2 + ((y + 5) / 92) ** 2),
        (right + left) / 2 - 22 - 40 * ((x / 60) ** 2 + ((y + 25) / 90) ** 2),
    )
    return z - np.maximum(np.maximum(domes[0], domes[1]), domes[2])


def _ribs(body: _Body, x: Array, y: Array, z: Array, wall: Array) -> None:
    pitch, phase = body.rng.uniform(24, 29), body.rng.uniform(0, 29)
    across = (z - 0.5 * y + 0.3 * abs(x) + phase) % pitch - pitch / 2
    arch = np.interp(y, (-95, -60, 0, 60), (95, 45, -5, -25)).astype(np.float32)
    round_ = ((wall + 6) / 4.5) ** 2 + (across / 6.5) ** 2
    rib = (round_ < 1) & (z > arch) & (abs(x) > 18)
    body.paint(_EVERYWHERE, rib, "bone")
    body.paint(_EVERYWHERE, rib & (round_ < 0.25), "marrow")
    body.paint(_EVERYWHERE, (abs(x) < 17) & (abs(wall + 6) < 5) & (y < 0) & (z > 112), "marrow")


def _heart(body: _Body, dome: Array) -> None:
    shift = body.rng.normal(0, 6, 3)
    for centre, radii, tissue in (
        ((4, 0, 170), (26, 88, 130), "visceral_fat"),
        ((24, -40, 138), (62, 46, 46), "visceral_fat"),
        ((26, -40, 138), (55, 40, 42), "myocardium"),
        ((36, -42, 136), (27, 20, 24), "blood"),
        ((-2, -46, 140), (24, 22, 28), "vein"),
    ):
        box, d = body.ellipsoid(centre + shift * [1, 1, 0.3], radii, (0, 20, -25))
        body.paint(box, (d < 0) & (dome[box] > 3) & (body.inside[box] < -1), tissue)


def _mirror(course: ArrayLike, side: int) -> Array:
    return np.asarray(course, float) * [side, 1, 1, 1]


def _varied(body: _Body, course: ArrayLike, shift: float = 3, volume: float = 0.25) -> Array:
    """Points moved by about `shift` mm, the radius so that the volume varies by a part `volume`."""
    course = np.array(course, float)
    course[:, :3] += body.rng.normal(0, shift, 3) + body.rng.normal(0, 0.6 * shift, (len(course), 3))
    course[:, 3] *= np.exp(body.rng.normal(0, volume / 2) + body.rng.normal(0, 0.06, len(course)))
    return course


def _along_spine(course: ArrayLike) -> Array:
    """The course bent as the spine is."""
    course = np.array(course, float)
    course[:, 1] += np.interp(course[:, 2], *_LORDOSIS)
    return course


def _muscles(body: _Body) -> None:
    for course in _MUSCLES:
        course = _varied(body, course, 1.5, 0.3)
        for side in (-1, 1):
            box, d, _ = body.tube(_mirror(course, side))
            body.paint(box, d < 1, "visceral_fat", over=("muscle",))
            body.paint(box, d < 0, "muscle", over=("muscle", "visceral_fat", "fat", "lung"))


def _bone(body: _Body, box: Box, d: Array) -> None:
    body.paint(box, d < 0, "bone")
    body.paint(box, d < -3, "marrow")


def _bones(body: _Body) -> None:
    """Pelvis and femora."""
    for side in (-1, 1):
        box, d = body.ellipsoid((side * 90, 18, -142), (7, 64, 62), (0, side * 14, side * 32))
        _bone(body, box, d)
        for course in _BONES:
            box, d, _ = body.tube(_mirror(course, side))
            _bone(body, box, d)
        box, d, _ = body.tube(_mirror(_FEMUR, side))
        body.paint(box, d < 2.5, "disc", over=("bone", "marrow"))
        _bone(body, box, d)


def _spine(body: _Body) -> None:
    box = body.box(*_span(body.voxels(np.array([(0, 40, z) for z in range(-140, 240, 20)], float))), 75)
    x, y, z = (body.where[n][box] for n in range(3))
    y = y - np.interp(z, *_LORDOSIS).astype(np.float32)
    pitch = body.rng.uniform(33, 38)
    phase = (z + body.rng.uniform(0, pitch)) / pitch % 1
    above = z > -138
    body_ = 18 * (np.sqrt((x / (22 - 0.02 * z)) ** 2 + ((y - 28) / 17) ** 2) - 1) + 3 * np.sin(np.pi * phase / 0.76)
    corpus = above & (body_ < 0) & (phase < 0.76)
    ring = np.hypot(x / 11, (y - 53) / 9)
    arch = (ring < 1.55) & (phase > 0.15) & (phase < 0.85)
    arch |= (abs(x) < 4) & (y > 60) & (y < 92) & (abs(phase + 0.006 * (y - 60) - 0.65) < 0.22)
    arch |= (abs(y - 55) < 5) & (abs(x) < 40) & (abs(phase - 0.45) < 0.13)
    body.paint(box, above & (body_ < 0), "disc")
    body.paint(box, above & arch, "bone")
    body.paint(box, above & arch & (abs(phase - 0.45) < 0.07), "marrow")
    body.paint(box, corpus, "bone")
    body.paint(box, corpus & (body_ < -2.5) & (abs(phase - 0.38) < 0.32), "marrow")
    body.paint(box, (ring < 1) & (z > -230), "visceral_fat")
    body.paint(box, (ring < 0.85) & (z > -190), "csf")
    body.paint(box, (np.hypot(x, y - 53) < 5) & (z > 20), "cord")


def _span(points: Array) -> tuple[Array, Array]:
    return points.min(0), points.max(0)


def _hollow(body: _Body, shape: tuple[Box, Array, Array], wall: float, names: tuple[str, str, str], gas: float) -> None:
    """Wall, fluid, and gas where it rises: the front of the lumen, a part `gas` of its depth."""
    box, d, _ = shape
    outer, fluid, air = names
    lumen = d < -wall
    body.paint(box, d < 0, outer)
    body.paint(box, lumen, fluid)
    if gas > 0 and lumen.any():
        y = body.where[1][box]
        front, back = np.quantile(y[lumen], (0.01, 0.99))
        body.paint(box, lumen & (y < front + gas * (back - front)), air)


def _bowel(body: _Body) -> None:
    """Small bowel in loops between left and right, and the colon around them."""
    rng = body.rng
    for depth, levels in ((-2, 6), (-32, 7), (-62, 7)):
        rows = np.linspace(-20, -165, levels)
        points = [
            (side * x, depth, z)
            for n, z in enumerate(rows)
            for side in [1 if n % 2 else -1]
            for x in (-72, -36, 0, 36, 72)
        ]
        loop = np.column_stack([rng.normal(points, (9, 9, 9)), rng.uniform(9, 14, len(points))])
        loop[:, 0] *= np.interp(loop[:, 2], (-200, -110), (0.5, 1))
        _filled(body, loop, 2.5, rng.choice(_BOWEL, 24, p=(0.5, 0.38, 0.04, 0.08)))
    colon = _varied(body, _COLON, 7, 0.3)
    _filled(body, colon, 2.5, rng.choice(_BOWEL, 24, p=(0.15, 0.1, 0.45, 0.3)), haustra=2.5)


def _filled(body: _Body, course: Array, wall: float, contents: Array, haustra: float = 0) -> None:
    """A bowel whose parts hold different things; gas lies above fluid."""
    box, d, along = body.tube(course)
    d = d + haustra * np.sin(along * len(course) * 9) + 1.0
    inside = body.inside[box] < -2
    part = np.minimum((along * len(contents)).astype(int), len(contents) - 1)
    body.paint(box, (d < 1.5) & inside, "visceral_fat", over=_BOWEL)
    body.paint(box, (d < 0) & inside, "bowel_wall")
    for tissue in np.unique(contents):
        body.paint(box, (d < -wall) & inside & (contents == tissue)[part], str(tissue))


def _liver(body: _Body) -> None:
    """Right lobe under the dome, left lobe as a wedge to the front, clefts, veins, gallbladder, tumours."""
    rng = body.rng
    box, d = _liver_shape(body)
    body.paint(box, d < 1.5, "visceral_fat", over=_BOWEL)
    body.paint(box, d < 0, "liver")
    for centre, radii, turn in (
        ((-26, -22, 36), (24, 9, 9), -10),  # porta hepatis
        ((8, -62, 48), (rng.uniform(0.5, 3), 26, 22), rng.normal(0, 20)),  # falciform ligament
    ):
        cleft, depth = body.ellipsoid(rng.normal(centre, 4), radii, (0, 0, turn))
        body.paint(cleft, depth < 0, "visceral_fat", over=("liver",))
    _liver_veins(body)
    if rng.random() > 0.12:
        box, d, _ = body.tube(_varied(body, _GALLBLADDER, 4, 0.5))
        body.paint(box, d < 1.5, "bowel_wall", over=("visceral_fat", *_BOWEL))
        body.paint(box, (d < 0) & (body.inside[box] < -2), "gallbladder")
    _tumors(body)


def _liver_shape(body: _Body) -> tuple[Box, Array]:
    """Two lobes, cut by diaphragm, wall, the oblique visceral surface and what lies at the spine."""
    rng = body.rng
    size = np.exp(rng.normal(0.04, 0.09))
    lobes = (
        body.ellipsoid(rng.normal((-70, -6, 38), 4), np.array((78, 92, 98)) * size),
        body.ellipsoid(rng.normal((16, -48, 70), (10, 5, 5)), np.array((66, 42, 36)) * size, (10, -12, 12)),
    )
    box, d = _union(*lobes)
    x, y, z = (body.where[n][box] for n in range(3))
    slope, tip = rng.uniform(0.5, 0.72), rng.normal(-42, 14)
    visceral = 0.75 * (tip + slope * (x + 118) + 0.45 * (y + 25) - z + 8 * body.folds[box])
    spinal = 30 - np.hypot(x + 10, y - 44)
    return box, np.maximum.reduce([d, visceral, body.inside[box] + 2, spinal])


def _union(*parts: tuple[Box, Array]) -> tuple[Box, Array]:
    """The common box, and the smaller distance."""
    sides = zip(*(box for box, _ in parts), strict=True)
    k, j, i = (slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)
    distance = np.full((k.stop - k.start, j.stop - j.start, i.stop - i.start), 99, np.float32)
    for box, d in parts:
        local = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, (k, j, i), strict=True))
        distance[local] = np.minimum(distance[local], d)
    return (k, j, i), distance


def _liver_veins(body: _Body) -> None:
    for root, radius in (((-34, -24, 38), 5), ((-27, -10, 86), 4.5)):
        for _ in range(6):
            end = np.array((-70, -10, 45)) + body.rng.normal(0, (38, 35, 30))
            middle = (np.array(root) + end) / 2 + body.rng.normal(0, 9, 3)
            box, d, _ = body.tube([(*root, radius), (*middle, 0.7 * radius), (*end, 1.6)])
            body.paint(box, d < 0, "liver_vein", over=("liver",))


def _tumors(body: _Body) -> None:
    rng = body.rng
    for _ in range(rng.choice(5, p=(0.4, 0.25, 0.15, 0.1, 0.1))):
        centre = np.array((-72, -5, 45)) + rng.uniform(-1, 1, 3) * (48, 55, 50)
        radius = np.clip(rng.lognormal(2.6, 0.5), 5, 40)
        tissue = str(rng.choice(("tumor_hypo", "tumor_hyper", "tumor_cystic"), p=(0.5, 0.35, 0.15)))
        core = rng.random() < 0.35
        box, d = body.ellipsoid(centre, radius * np.exp(rng.normal(0, 0.15, 3)), rng.uniform(0, 180, 3))
        body.paint(box, d < 0, tissue, over=("liver", "liver_vein"))
        if core:
            body.paint(box, d < -0.5 * radius, "tumor_cystic", over=(tissue,))


def _spleen(body: _Body) -> None:
    """An ellipsoid that is hollow towards the stomach."""
    size = np.exp(body.rng.normal(0.12, 0.17))
    centre = body.rng.normal((96, 42, 48), (4, 6, 8))
    box, d = body.ellipsoid(centre, np.array((34, 52, 58)) * size, (25, 15, -20))
    x, y, z = (body.where[n][box] - np.float32(c) for n, c in enumerate(np.add(centre, (-54, -24, 0))))
    hollow = 40 * (1 - np.sqrt((x / 34) ** 2 + (y / 48) ** 2 + (z / 64) ** 2))
    d = np.maximum.reduce([d, hollow, body.inside[box] + 2])
    body.paint(box, d < 2, "visceral_fat", over=("stomach", "stomach_fluid", "stomach_food", "stomach_gas", *_BOWEL))
    body.paint(box, d < 0, "spleen")


def _stomach(body: _Body) -> None:
    rng = body.rng
    course = _varied(body, _STOMACH, 5, 0.1)
    course[:, 3] *= rng.uniform(0.62, 1.3)
    box, d, along = body.tube(course)
    d = np.maximum(d, body.inside[box] + 2)
    body.paint(box, d < 2, "visceral_fat", over=(*_BOWEL, "muscle"))
    filling = "stomach_food" if rng.random() < 0.3 else "stomach_fluid"
    _hollow(body, (box, d, along), rng.uniform(2.5, 5), ("stomach", filling, "stomach_gas"), rng.uniform(-0.2, 0.6))


def _pancreas(body: _Body) -> None:
    """Pancreas, with the duodenum around its head, and the adrenal glands behind."""
    rng = body.rng
    shift = rng.normal(0, (4, 2, 6))
    course = _varied(body, _PANCREAS, 2, 0.3)
    course[:, :3] += shift
    box, d, _ = body.tube(course)
    body.paint(box, d < 2.5, "visceral_fat")
    body.paint(box, d + 1.2 * body.grain[box] < 0, "pancreas")  # lobulated
    course = _varied(body, _DUODENUM, 2, 0.5)
    course[:, :3] += shift
    tube = body.tube(course)
    body.paint(tube[0], (tube[1] < 1.5) & (tube[2] > 0.15), "visceral_fat")
    gas = rng.uniform(-0.4, 0.35)
    _hollow(body, tube, rng.uniform(2.5, 6), ("duodenum", "duodenum_fluid", "duodenum_gas"), gas)


def _vessels(body: _Body) -> None:
    rng = body.rng
    shift = rng.normal(0, (3, 1.5, 0))
    for tissue, course in _VESSELS:
        box, d, _ = body.tube(_varied(body, course, 1.5, 0.3))
        body.paint(box, d < 1.5, "visceral_fat", over=("pancreas", "bowel_wall"))
        body.paint(box, d < 0, tissue)
    aorta = _along_spine(_varied(body, _AORTA, 1.5, 0.3))
    aorta[:, :2] += shift[:2]
    cava = _along_spine(_varied(body, _CAVA, 1.5, 0.25)) * (1, 1, 1, 0.93)
    for side in (-1, 1):
        branch = _mirror(_varied(body, _ILIAC, 1.5), side)
        branch[0, :2] = aorta[-1, :2]
        box, d, _ = body.tube(branch)
        body.paint(box, d < 0, "blood")
        branch[:, :3] += (0, 9, -8)
        branch[0, :2] = cava[-1, :2]
        box, d, _ = body.tube(branch * (1, 1, 1, 1.15))
        body.paint(box, d < 0, "vein")
    for name, course in (("inferior_vena_cava", cava), ("aorta", aorta)):
        box, d, _ = body.tube(course)
        body.paint(box, d < 2, "visceral_fat", over=("muscle", "duodenum", "pancreas", "bowel_wall"))
        body.paint(box, d < 0, name)
        if name == "aorta" and rng.random() < 0.4:
            spots = np.sin(body.where[2][box] * 0.31) * np.sin(body.where[0][box] * 0.4 + 1) > 0.5
            body.paint(box, (d < 0) & (d > -2) & spots, "aorta_calcification")
    box, d, _ = body.tube(_varied(body, _ESOPHAGUS, 1.5, 0.4))
    body.paint(box, d < 1.5, "visceral_fat", over=("liver", "lung", "muscle"))
    body.paint(box, d < 0, "esophagus", over=tuple(n for n in TISSUES if n not in ("aorta", "stomach", "stomach_gas")))
    if rng.random() < 0.5:
        body.paint(box, d < -5, "esophagus_gas", over=("esophagus",))


def _kidneys(body: _Body) -> None:
    rng = body.rng
    missing = rng.choice(3, p=(0.96, 0.02, 0.02))  # neither, right, left
    for side, name, absent in ((-1, "right", missing == 1), (1, "left", missing == 2)):
        course = _mirror(_varied(body, _KIDNEY, 3, 0.24), side)
        course[:, 2] += -3 if side < 0 else 6
        capsule = rng.uniform(5, 14)
        if not absent:
            _kidney(body, course, side, name, capsule)
        _adrenal(body, course[0], side, name)


def _kidney(body: _Body, course: Array, side: int, name: str, capsule: float) -> None:
    box, d, _ = body.tube(course)
    space = body.tube(np.add(course, (-side * 7, 7, 0, capsule - 5)))  # perirenal, wider to the spine and the back
    loose = ("liver", "liver_vein", "spleen", "stomach", *_BOWEL)
    body.paint(space[0], (space[1] < 0) & (body.inside[space[0]] < -1), "visceral_fat", over=loose)
    body.paint(box, d < 2, "visceral_fat", over=loose)
    hilum = np.add(course[1:3, :3].mean(0), (-side * 14, -5, 0))
    sinus_box, sinus = body.ellipsoid(hilum, (18, 8, 19), (0, 0, -side * 25))
    sinus = sinus + 2.5 * body.grain[sinus_box]
    body.paint(box, d < 0, f"cortex_{name}")
    body.paint(box, (d < -6) & (body.grain[box] > -0.5), f"medulla_{name}")
    body.paint(sinus_box, sinus < 0, "visceral_fat", over=(f"cortex_{name}", f"medulla_{name}"))
    body.paint(sinus_box, sinus < -7, "urine", over=("visceral_fat",))
    for tissue, target in (("vein", (side * 14 - 4, -5, hilum[2] + 8)), ("blood", (8, 2, hilum[2] + 12))):
        end = np.array(target)
        vessel = body.tube([(*hilum, 2.5), (*((hilum + end) / 2), 4), (*end, 4.5)])
        body.paint(vessel[0], vessel[1] < 0, tissue, over=("visceral_fat", "muscle"))


def _adrenal(body: _Body, pole: Array, side: int, name: str) -> None:
    """Two thin limbs that open to the back, like a turned V."""
    at = pole[:3] + np.array((-side * 20, -18, 16 if side < 0 else 8)) + body.rng.normal(0, 2, 3)
    size = np.exp(body.rng.normal(0, 0.12))
    for turn, shift in ((18, (-side * 4, 8, 0)), (-24, (side * 5, 8, -4))):
        box, d = body.ellipsoid(at + shift, np.array((2.6, 11, 14)) * size, (0, 0, side * turn))
        body.paint(
            box, d < 1.2, "visceral_fat", over=("liver", "pancreas", "spleen", "muscle", "stomach", "bowel_wall")
        )
        body.paint(box, d < 0, f"adrenal_{name}")


def _pelvis(body: _Body) -> None:
    rng = body.rng
    fill = np.clip(np.exp(rng.normal(0.1, 0.28)), 0.5, 1.7)
    male = rng.random() < 0.5
    low = rng.normal((0, -22, -216), (4, 4, 5))
    radii = np.array((36, 28, 27)) * fill
    base = np.add(low, (0, 0, max(radii[2] - 22, 0)))
    if male:
        box, d = body.ellipsoid(np.add(low, (0, 10, -36)), np.array((22, 17, 18)) * np.exp(rng.normal(0, 0.14)))
        body.paint(box, d < 0, "prostate", over=("visceral_fat", "muscle", "fat", *_BOWEL))
    else:
        size = np.exp(rng.normal(0, 0.15))
        box, d, _ = body.tube(
            np.array([(0, 26, -228, 11), (2, 18, -205, 13), (4, 2, -178 + 10 * fill, 19)]) * (1, 1, 1, size)
        )
        body.paint(box, d < 0, "uterus", over=("visceral_fat", "muscle", "fat", *_BOWEL))
    box, d = body.ellipsoid(base, radii, (rng.normal(0, 8), 0, 0))
    d = np.maximum(d, body.inside[box] + 3)
    body.paint(box, d < 1.5, "visceral_fat", over=_BOWEL)
    body.paint(box, d < 0, "bladder_wall")
    body.paint(box, d < -rng.uniform(2, 5), "bladder")


def _ct(body: _Body, rng: Generator) -> Array:
    """HU, int16 [k, j, i]."""
    tissue = body.tissue
    if rng.random() < 0.7:
        _table(body, rng)
    early, late = _phase(rng, native=0.3)
    drawn = np.array([t.hu + early * t.arterial + late * t.portal for t in TISSUES.values()])
    drawn += rng.normal(0, np.where(drawn < -400, 12, 4 + 0.05 * abs(drawn)))
    if rng.random() < 0.25:  # oral contrast medium
        for name in ("bowel_fluid", "stomach_fluid", "duodenum_fluid"):
            drawn[_CODES[name]] += rng.uniform(60, 300)
    drawn[_CODES["liver"]] -= max(rng.normal(-8, 15), 0)  # fat in the liver
    image = _textured(body, rng, drawn.astype(np.float32), np.array([t.texture for t in TISSUES.values()], np.float32))
    width = (rng.uniform(0.15, 0.5), *[rng.uniform(0.45, 0.8)] * 2)
    gain = np.prod([np.sqrt(1 / max(2 * np.sqrt(np.pi) * w, 1)) for w in width])
    image += np.float32(np.clip(rng.lognormal(2.4, 0.5), 4, 32) / gain) * rng.standard_normal(tissue.shape, np.float32)
    return np.clip(np.rint(_blurred(image, width)), -1024, 3071).astype(np.int16)


def _phase(rng: Generator, native: float) -> tuple[float, float]:
    """How much of the arterial and of the portal venous enhancement is there."""
    if rng.random() < native:
        return 0.0, 0.0
    late, strength = rng.choice((0.0, 1.0, rng.random()), p=(0.2, 0.5, 0.3)), rng.uniform(0.65, 1.15)
    return strength * (1 - late), strength * late


def _table(body: _Body, rng: Generator) -> None:
    x, y = body.axes[0], body.axes[1]
    back = y[np.flatnonzero((body.tissue != 0).any(axis=(0, 2)))[-1]]
    top = back + rng.uniform(2, 12) - rng.uniform(0, 40) * (x / 200) ** 2
    board = (abs(y[:, None] - top - 8) < rng.uniform(4, 10)) & (abs(x) < 230)
    body.paint(_EVERYWHERE, np.broadcast_to(board, body.tissue.shape), "table", over=("air",))


def _textured(body: _Body, rng: Generator, mean: Array, spread: Array) -> Array:
    """The mean of each tissue, with grain of about 9 mm."""
    return mean[body.tissue] + spread[body.tissue] * _smooth_field(rng, body.axes, 9)


def _blurred(image: Array, width: Sequence[float]) -> Array:
    for axis, sigma in enumerate(width):
        image = gaussian_filter1d(image, sigma, axis, mode="nearest", truncate=2.5)
    return image


def _mr(body: _Body, rng: Generator, modality: str) -> Array:
    """Signal, int16 [k, j, i], from zero to an arbitrary maximum."""
    signal = _signal(rng, modality)
    image = _textured(body, rng, signal, signal * np.array([t.texture for t in TISSUES.values()], np.float32) / 100)
    image = _blurred(image, (rng.uniform(0.15, 0.5), *[rng.uniform(0.4, 0.8)] * 2))
    image *= np.exp(np.float32(rng.uniform(0.05, 0.3)) * _smooth_field(rng, body.axes, 180))
    noise = np.float32(signal[_CODES["liver"]] * rng.uniform(0.015, 0.07))
    real, imaginary = noise * rng.standard_normal((2, *image.shape), np.float32)
    image = np.hypot(image + real, imaginary)
    top = rng.uniform(200, 4000) / np.quantile(image[::3, ::4, ::4], 0.995)
    return np.clip(np.rint(image * top), 0, 32767).astype(np.int16)


def _signal(rng: Generator, modality: str) -> Array:
    """Signal per tissue: spin echo for T2, spoiled gradient echo for T1 (contrast medium shortens T1)."""
    t1, t2, density = (np.array([getattr(t, n) for t in TISSUES.values()]) for n in ("t1", "t2", "density"))
    count = len(TISSUES)
    t1, t2 = (t1 * rng.uniform(0.95, 1.3) * np.exp(rng.normal(0, 0.1, count)), t2 * np.exp(rng.normal(0, 0.1, count)))
    if modality == "mr_t2":
        echo, repetition = rng.uniform(60, 120), rng.uniform(1800, 6000)
        signal = density * (1 - np.exp(-repetition / t1)) * np.exp(-echo / t2)
        flow = rng.uniform(0.1, 1)
    else:
        if modality == "mr_t1ce":
            early, late = _phase(rng, native=0)
            t1 = 1 / (1 / t1 + 0.0045 / 50 * np.array([early * t.arterial + late * t.portal for t in TISSUES.values()]))
        repetition, angle = (
            (rng.uniform(3.5, 7), rng.uniform(9, 15)) if rng.random() < 0.6 else (rng.uniform(100, 180), 75)
        )
        decay, angle = np.exp(-repetition / t1), np.deg2rad(angle)
        signal = (
            density
            * np.sin(angle)
            * (1 - decay)
            / (1 - np.cos(angle) * decay)
            * np.exp(-rng.uniform(1, 4.8) / (0.6 * t2))
        )
        flow = rng.uniform(0.6, 1.5)
    for name in ("blood", "aorta", "vein", "inferior_vena_cava"):
        signal[_CODES[name]] *= flow if modality != "mr_t1ce" else 1
    if rng.random() < {"mr_t1": 0.35, "mr_t2": 0.5, "mr_t1ce": 0.85}[modality]:
        suppressed = rng.uniform(0.05, 0.35)
        for name in ("fat", "visceral_fat", "marrow"):
            signal[_CODES[name]] *= suppressed
    signal[_CODES["air"]] = signal[_CODES["table"]] = 0
    return (signal / signal.max()).astype(np.float32)
