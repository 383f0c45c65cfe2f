"""The anatomy of phantoms: paints muscles, bones, organs and vessels, one over the other, into a body.

Every shape varies by what is drawn from the body's generator, in a fixed order.
"""

from __future__ import annotations

import numpy as np

from .body import TISSUES, Array, Body, Box, paint_trunk

_BOWEL = ("bowel_wall", "bowel_fluid", "faeces", "gas")


def _points(text: str) -> Array:
    """Numbers [n, 4] from "x y z radius | x y z radius | ..."."""
    return np.array([point.split() for point in text.split("|")], float)


_LORDOSIS = ((-320, -250, -200, -140, -90, 0, 120, 220), (20, 30, 30, 4, -10, 0, 9, 6))  # z, shift of the spine in y

# Tubes through (x, y, z, radius); those of a pair are drawn for the left side and mirrored.
_AORTA = _points("14 24 220 12 | 15 18 130 11.5 | 10 3 70 11 | 9 1 0 10 | 5 -1 -60 9 | 3 0 -92 9")
_CAVA = _points("-16 -18 150 13 | -25 -14 105 13 | -27 -4 60 12 | -22 0 0 11 | -15 6 -60 10.5 | -11 10 -98 10")
_ESOPHAGUS = _points("4 2 220 7 | 8 -1 140 7.5 | 16 -16 105 7.5 | 30 -24 84 8")
_STOMACH = _points("48 14 98 26 | 58 4 80 31 | 60 -26 50 31 | 46 -52 15 26 | 12 -58 2 20 | -20 -48 8 13")
_DUODENUM = _points(
    """
    -24 -46 8 11 | -42 -38 10 11.5 | -50 -20 -8 11.5 | -46 -13 -38 11.5 | -22 -20 -54 10.5 | 10 -24 -52 10 |
    26 -22 -32 10 | 32 -30 -16 10
    """
)
_PANCREAS = _points(
    """
    -20 -17 -28 10 | -32 -24 -8 14 | -18 -34 8 12 | 6 -36 20 10 | 32 -30 28 11.5 | 60 -8 36 11.5 | 82 18 42 9
    """
)
_KIDNEY = _points("56 46 36 18.5 | 66 42 14 25.5 | 72 38 -10 26.5 | 74 32 -34 20.5")
_GALLBLADDER = _points("-46 -24 20 5 | -55 -38 8 11 | -64 -56 -8 14")
_COLON = _points(
    """
    -88 -8 -135 24 | -94 6 -110 26 | -98 14 -60 23 | -92 0 -24 22 | -62 -48 -22 20 | -20 -66 -42 19 | 30 -68 -36 18 |
    74 -40 4 18 | 98 12 30 18 | 106 32 -10 15 | 100 28 -70 14 | 94 10 -125 14 | 60 -2 -165 15 | 20 -22 -160 15 |
    -14 6 -150 15 | -4 34 -178 16 | 2 46 -215 19 | 0 42 -250 16 | 0 36 -275 11
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
    _points("80 -12 -205 11 | 48 -36 -226 8 | 14 -46 -240 9 | 8 -42 -256 8 | 36 -8 -275 7 | 58 26 -284 9"),
)
_MUSCLES = (
    # psoas
    _points("28 36 30 8 | 36 34 -20 15 | 46 28 -80 22 | 60 12 -140 22 | 74 -18 -195 17 | 96 -20 -260 14"),
    # erector spinae
    _points("30 76 220 20 | 34 80 60 25 | 38 80 -60 28 | 30 86 -140 20 | 20 96 -190 9"),
    # quadratus lumborum
    _points("58 66 10 8 | 66 64 -40 13 | 76 60 -95 12"),
    # crus of the diaphragm
    _points("16 16 98 6 | 15 13 40 6 | 13 16 -15 4"),
    # iliacus
    _points("84 2 -120 12 | 84 -6 -150 20 | 82 -24 -190 16"),
)


def paint_anatomy(body: Body) -> None:
    """Fills an empty body; what is painted later takes the place of what lies there."""
    paint_trunk(body)
    _muscles(body)
    _bones(body)
    _spine(body)
    _bowel(body)
    _liver(body)
    _stomach(body)
    _spleen(body)
    _pancreas(body)
    _vessels(body)
    _kidneys(body)
    _pelvis(body)


def _mirror(course: Array, side: int) -> Array:
    """The course on the left (side 1) or on the right (side -1)."""
    return course * (side, 1, 1, 1)


def _varied(body: Body, course: Array, shift: float, volume: float = 0.25) -> Array:
    """Points moved by about `shift` mm, the radius so that the volume varies by a part `volume`."""
    course = course.copy()
    course[:, :3] += body.rng.normal(0, shift, 3) + body.rng.normal(0, 0.6 * shift, (len(course), 3))
    course[:, 3] *= np.exp(body.rng.normal(0, volume / 2) + body.rng.normal(0, 0.06, len(course)))
    return course


def _along_spine(course: Array) -> Array:
    """The course bent as the spine is."""
    course = course.copy()
    course[:, 1] += np.interp(course[:, 2], *_LORDOSIS)
    return course


def _muscles(body: Body) -> None:
    """Muscles beside the spine and in the pelvis, with fat around them."""
    for course in _MUSCLES:
        course = _varied(body, course, 1.5, 0.3)
        for side in (-1, 1):
            box, d, _ = body.tube(_mirror(course, side))
            body.paint(box, d < 1, "visceral_fat", over=("muscle",))
            body.paint(box, d < 0, "muscle", over=("muscle", "visceral_fat", "fat", "lung"))


def _bone(body: Body, box: Box, d: Array) -> None:
    """Cortex and, 3 mm beneath, marrow."""
    body.paint(box, d < 0, "bone")
    body.paint(box, d < -3, "marrow")


def _bones(body: Body) -> None:
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


def _spine(body: Body) -> None:
    """Vertebrae with arch and processes, discs, and the canal with the spinal cord."""
    box = body.box(body.voxels(np.array([(0, 40, z) for z in range(-140, 240, 20)], float)), 75)
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


def _hollow(body: Body, box: Box, d: Array, wall: float, names: tuple[str, str, str], gas: float) -> None:
    """Wall, fluid, and gas where it rises: the front of the lumen, a part `gas` of its depth."""
    outer, fluid, air = names
    lumen = d < -wall
    body.paint(box, d < 0, outer)
    body.paint(box, lumen, fluid)
    if gas > 0 and lumen.any():
        y = body.where[1][box]
        front, back = np.quantile(y[lumen], (0.01, 0.99))
        body.paint(box, lumen & (y < front + gas * (back - front)), air)


def _bowel(body: Body) -> None:
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


def _filled(body: Body, course: Array, wall: float, contents: Array, haustra: float = 0) -> None:
    """A bowel whose parts hold different things; gas lies above fluid."""
    box, d, along = body.tube(course)
    d = d + haustra * np.sin(along * len(course) * 9) + 1.0
    inside = body.inside[box] < -2
    part = np.minimum((along * len(contents)).astype(int), len(contents) - 1)
    body.paint(box, (d < 1.5) & inside, "visceral_fat", over=_BOWEL)
    body.paint(box, (d < 0) & inside, "bowel_wall")
    for tissue in np.unique(contents):
        body.paint(box, (d < -wall) & inside & (contents == tissue)[part], str(tissue))


def _liver(body: Body) -> None:
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


def _liver_shape(body: Body) -> tuple[Box, Array]:
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


def _liver_veins(body: Body) -> None:
    """Branches of the portal vein, and of the hepatic veins above."""
    for root, radius in (((-34, -24, 38), 5), ((-27, -10, 86), 4.5)):
        for _ in range(6):
            end = np.array((-70, -10, 45)) + body.rng.normal(0, (38, 35, 30))
            middle = (np.array(root) + end) / 2 + body.rng.normal(0, 9, 3)
            box, d, _ = body.tube([(*root, radius), (*middle, 0.7 * radius), (*end, 1.6)])
            body.paint(box, d < 0, "liver_vein", over=("liver",))


def _tumors(body: Body) -> None:
    """None to four tumours, some with a cystic core."""
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


def _spleen(body: Body) -> None:
    """An ellipsoid that is hollow towards the stomach."""
    size = np.exp(body.rng.normal(0.12, 0.17))
    centre = body.rng.normal((96, 42, 48), (4, 6, 8))
    box, d = body.ellipsoid(centre, np.array((34, 52, 58)) * size, (25, 15, -20))
    x, y, z = (body.where[n][box] - np.float32(c) for n, c in enumerate(np.add(centre, (-54, -24, 0))))
    hollow = 40 * (1 - np.sqrt((x / 34) ** 2 + (y / 48) ** 2 + (z / 64) ** 2))
    d = np.maximum.reduce([d, hollow, body.inside[box] + 2])
    body.paint(box, d < 2, "visceral_fat", over=("stomach", "stomach_fluid", "stomach_food", "stomach_gas", *_BOWEL))
    body.paint(box, d < 0, "spleen")


def _stomach(body: Body) -> None:
    """Stomach with fluid or food, more or less full, and gas at the front."""
    rng = body.rng
    course = _varied(body, _STOMACH, 5, 0.1)
    course[:, 3] *= rng.uniform(0.62, 1.3)
    box, d, _ = body.tube(course)
    d = np.maximum(d, body.inside[box] + 2)
    body.paint(box, d < 2, "visceral_fat", over=(*_BOWEL, "muscle"))
    filling = "stomach_food" if rng.random() < 0.3 else "stomach_fluid"
    _hollow(body, box, d, rng.uniform(2.5, 5), ("stomach", filling, "stomach_gas"), rng.uniform(-0.2, 0.6))


def _pancreas(body: Body) -> None:
    """Pancreas, with the duodenum around its head."""
    rng = body.rng
    shift = rng.normal(0, (4, 2, 6))
    course = _varied(body, _PANCREAS, 2, 0.3)
    course[:, :3] += shift
    box, d, _ = body.tube(course)
    body.paint(box, d < 2.5, "visceral_fat")
    body.paint(box, d + 1.2 * body.grain[box] < 0, "pancreas")  # lobulated
    course = _varied(body, _DUODENUM, 2, 0.5)
    course[:, :3] += shift
    box, d, along = body.tube(course)
    body.paint(box, (d < 1.5) & (along > 0.15), "visceral_fat")
    gas = rng.uniform(-0.4, 0.35)
    _hollow(body, box, d, rng.uniform(2.5, 6), ("duodenum", "duodenum_fluid", "duodenum_gas"), gas)


def _vessels(body: Body) -> None:
    """Visceral vessels, aorta, vena cava and their branches, and the esophagus, which runs beside them."""
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


def _kidneys(body: Body) -> None:
    """Kidneys, of which one is seldom missing, and the adrenal glands above."""
    rng = body.rng
    missing = rng.choice(3, p=(0.96, 0.02, 0.02))  # neither, right, left
    for side, name, absent in ((-1, "right", missing == 1), (1, "left", missing == 2)):
        course = _mirror(_varied(body, _KIDNEY, 3, 0.24), side)
        course[:, 2] += -3 if side < 0 else 6
        capsule = rng.uniform(5, 14)
        if not absent:
            _kidney(body, course, side, name, capsule)
        _adrenal(body, course[0], side, name)


def _kidney(body: Body, course: Array, side: int, name: str, capsule: float) -> None:
    """Cortex, medulla and sinus, with vessels at the hilum, in perirenal fat `capsule` mm thick."""
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


def _adrenal(body: Body, pole: Array, side: int, name: str) -> None:
    """Two thin limbs that open to the back, like a turned V."""
    at = pole[:3] + np.array((-side * 20, -18, 16 if side < 0 else 8)) + body.rng.normal(0, 2, 3)
    size = np.exp(body.rng.normal(0, 0.12))
    for turn, shift in ((18, (-side * 4, 8, 0)), (-24, (side * 5, 8, -4))):
        box, d = body.ellipsoid(at + shift, np.array((2.6, 11, 14)) * size, (0, 0, side * turn))
        body.paint(
            box, d < 1.2, "visceral_fat", over=("liver", "pancreas", "spleen", "muscle", "stomach", "bowel_wall")
        )
        body.paint(box, d < 0, f"adrenal_{name}")


def _pelvis(body: Body) -> None:
    """Prostate or uterus, and the urinary bladder, more or less full."""
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
