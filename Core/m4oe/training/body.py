"""The body of a phantom: its tissues, where its voxels lie, the shapes painted into them, and the trunk.

Shapes are given in a reference body: x to the left, y to the back, z up, in mm; the origin lies between the kidneys, at
the depth of the aorta.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.spatial.transform import Rotation

Array = NDArray[Any]
Box = tuple[slice, slice, slice]
EVERYWHERE: Box = np.s_[:, :, :]


class Tissue(NamedTuple):
    """How a tissue looks: CT number, contrast uptake, relaxation, and the structure it belongs to."""

    hu: float  # without contrast medium
    arterial: float  # HU that contrast medium adds in the arterial phase
    portal: float  # and in the portal venous phase
    t1: float  # ms, approximately, at 1.5 T; about a fifth longer at 3 T (de Bazelaire et al., Radiology 2004)
    t2: float  # ms, approximately
    density: float  # of protons, relative to water
    texture: float  # standard deviation in HU; in MR, per cent of the signal
    structure: str = ""


# Round, usual values, which each phantom varies.
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
CODES = {name: code for code, name in enumerate(TISSUES)}  # values of Body.tissue
_ALIKE = {
    **{f"{part}_left": f"{part}_right" for part in ("cortex", "medulla", "adrenal")},
    **{"visceral_fat": "fat", "aorta": "blood", "inferior_vena_cava": "vein"},
}
TWINS = [CODES[_ALIKE.get(name, name)] for name in TISSUES]  # by code, the tissue that looks alike in one body

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


class Body:
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
            self.where[n] += 6.5 * smooth_field(rng, self.axes, 85) + 1.6 * smooth_field(rng, self.axes, 28)
        self.grain = smooth_field(rng, self.axes, 11)
        self.folds = smooth_field(rng, self.axes, 30)

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

    def box(self, points: Array, radius: float) -> Box:
        """The voxels that hold points [n, 3] in voxels (i, j, k), and about `radius` mm around them."""
        margin = 1.2 * radius / self.spacing + 1
        low, high = points.min(0) - margin, points.max(0) + margin
        size = self.tissue.shape[::-1]
        i, j, k = (
            slice(min(max(int(a), 0), n), min(max(int(b) + 1, 0), n)) for a, b, n in zip(low, high, size, strict=True)
        )
        return k, j, i

    def paint(self, box: Box, mask: Array, tissue: str, over: Sequence[str] = ()) -> None:
        """Give the voxels of `mask` a tissue, where they hold one of `over`, if any is named."""
        view = self.tissue[box]
        if over:
            mask = mask & np.isin(view, [CODES[name] for name in over])
        view[mask] = CODES[tissue]

    def ellipsoid(self, centre: ArrayLike, radii: ArrayLike, turn: ArrayLike = (0, 0, 0)) -> tuple[Box, Array]:
        """Box and approximate distance in mm; `turn` is in degrees about x, y, z."""
        radii = np.asarray(radii, float)
        box = self.box(self.voxels(np.array([centre], float)), radii.max())
        rows = (Rotation.from_euler("xyz", turn, degrees=True).as_matrix().T / radii[:, None]).astype(np.float32)
        x, y, z = (self.where[n][box] - np.float32(c) for n, c in enumerate(np.asarray(centre, float)))
        norm = np.sqrt(sum((row[0] * x + row[1] * y + row[2] * z) ** 2 for row in rows))
        return box, (norm - 1) * np.float32(radii.min())

    def tube(self, course: ArrayLike) -> tuple[Box, Array, Array]:
        """Box, distance in mm and position along it (0 to 1) of a tube through (x, y, z, radius) [n, 4]."""
        points = _course(np.asarray(course, float))
        voxels = self.voxels(points[:, :3])
        box = self.box(voxels, points[:, 3].max() + 4)
        start = np.array([s.start for s in box])
        distance = np.full([max(s.stop - s.start, 0) for s in box], 99, np.float32)
        along = np.zeros_like(distance)
        for n, (a, b) in enumerate(pairwise(points)):
            part = self.box(voxels[n : n + 2], max(a[3], b[3]) + 4)
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


def smooth_field(rng: Generator, axes: Sequence[Array], step: float) -> Array:
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


def paint_trunk(body: Body) -> None:
    """Skin, fat, muscle wall, cavity, ribs, and the chest above the diaphragm."""
    x, y, z = body.where
    height = z.mean(axis=(1, 2))
    profile = np.stack([np.interp(height, _TRUNK[:, 0], column) for column in _TRUNK[:, 1:].T], axis=1)
    wall, body.inside = _radial(x, y, profile[:, :3]), _radial(x, y, profile[:, 3:])
    uneven = smooth_field(body.rng, body.axes, 100)
    fat = (
        body.rng.lognormal(3.05, 0.45)
        * (1 + 0.2 * uneven)
        * np.interp(height, (-200, 0, 150), (1.6, 1, 0.75))[:, None, None]
    )
    body.paint(EVERYWHERE, wall < fat, "skin")
    body.paint(EVERYWHERE, wall < fat - 2.5, "fat")
    body.paint(EVERYWHERE, wall < 0, "muscle")
    body.paint(EVERYWHERE, (wall < -2) & (abs(body.folds) < 0.09) & (z < -95), "fat")  # between the muscles of the hip
    body.paint(EVERYWHERE, body.inside < 0, "visceral_fat")
    body.paint(EVERYWHERE, (body.inside < -8) & (body.grain > 2.2) & (z < 30), "vein")  # mesenteric
    dome = _diaphragm(body, x, y, z)
    body.paint(EVERYWHERE, (body.inside < 0) & (dome > -2), "muscle")
    body.paint(EVERYWHERE, (body.inside < -1) & (dome > 2), "lung")
    _ribs(body, x, y, z, wall)
    _heart(body, dome)
    body.inside = np.maximum(body.inside, dome)


def _radial(x: Array, y: Array, profile: Array) -> Array:
    """Distance in mm to the trunk's outline, profile [k, 3] of half width, front and back."""
    width, front, back = (profile[:, n, None, None].astype(np.float32) for n in range(3))
    y = y - (front + back) / 2
    u, v = (x / width) ** 2, (y / ((back - front) / 2)) ** 2
    rho = np.sqrt(0.4 * (u + v) + 0.6 * np.sqrt(u * u + v * v)) + np.float32(1e-3)  # a rounded box
    return np.hypot(x, y) * (1 - 1 / rho)


def _diaphragm(body: Body, x: Array, y: Array, z: Array) -> Array:
    """Height above the diaphragm in mm."""
    right, left = body.rng.normal((116, 106), 10)
    domes = (
        right - 62 * (((x + 60) / 76) ** 2 + ((y + 5) / 92) ** 2),
        left - 62 * (((x - 62) / 74) ** 2 + ((y + 5) / 92) ** 2),
        (right + left) / 2 - 22 - 40 * ((x / 60) ** 2 + ((y + 25) / 90) ** 2),
    )
    return z - np.maximum(np.maximum(domes[0], domes[1]), domes[2])


def _ribs(body: Body, x: Array, y: Array, z: Array, wall: Array) -> None:
    """Ribs and breastbone, 6 mm under the outside of the muscle wall."""
    pitch, phase = body.rng.uniform(24, 29), body.rng.uniform(0, 29)
    across = (z - 0.5 * y + 0.3 * abs(x) + phase) % pitch - pitch / 2
    arch = np.interp(y, (-95, -60, 0, 60), (95, 45, -5, -25)).astype(np.float32)
    round_ = ((wall + 6) / 4.5) ** 2 + (across / 6.5) ** 2
    rib = (round_ < 1) & (z > arch) & (abs(x) > 18)
    body.paint(EVERYWHERE, rib, "bone")
    body.paint(EVERYWHERE, rib & (round_ < 0.25), "marrow")
    body.paint(EVERYWHERE, (abs(x) < 17) & (abs(wall + 6) < 5) & (y < 0) & (z > 112), "marrow")


def _heart(body: Body, dome: Array) -> None:
    """Mediastinum, pericardial fat, and the heart with two of its chambers, where they lie above the diaphragm."""
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
