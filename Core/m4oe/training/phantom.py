"""Synthetic torsos: a seeded body on a grid, and its picture in CT or MR, with exact labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation

from ..geometry import Grid, Volume
from .anatomy import paint_anatomy
from .body import CODES, EVERYWHERE, TISSUES, TWINS, Array, Body, smooth_field

MODALITIES = ("ct", "mr_t1", "mr_t2", "mr_t1ce")
STRUCTURES = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver",
    "stomach", "aorta", "inferior_vena_cava", "pancreas", "adrenal_gland_right",
    "adrenal_gland_left", "duodenum", "urinary_bladder", "prostate_or_uterus", "liver_tumor",
)  # fmt: skip
_FAT = ("fat", "visceral_fat", "marrow")
_LABELS = np.array([STRUCTURES.index(t.structure) + 1 if t.structure else 0 for t in TISSUES.values()], np.uint8)


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
    body = Body(np.random.default_rng([seed, len(MODALITIES)]), *_field_of_view(rng, modality))
    paint_anatomy(body)
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


def _place(body: Body, rng: Generator) -> Grid:
    """The body's grid in the scanner: LPS, sometimes a little oblique."""
    tilt = Rotation.from_rotvec(rng.normal(0, 0.06, 3)).as_matrix() if rng.random() < 0.3 else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.diag([-1.0, -1.0, 1.0]) * body.spacing
    affine[:3, 3] = tilt @ (body.first * [-1, -1, 1]) + rng.normal(0, 60, 3)
    return Grid(body.tissue.shape, affine)


def _ct(body: Body, rng: Generator) -> Array:
    """HU, int16 [k, j, i]."""
    tissue = body.tissue
    if rng.random() < 0.7:
        _table(body, rng)
    drawn = tissue_hu(rng)
    image = _textured(body, rng, drawn, _column("texture").astype(np.float32))
    width = (rng.uniform(0.15, 0.5), *[rng.uniform(0.45, 0.8)] * 2)
    gain = np.prod([np.sqrt(1 / max(2 * np.sqrt(np.pi) * w, 1)) for w in width])
    image += np.float32(np.clip(rng.lognormal(2.4, 0.5), 4, 32) / gain) * rng.standard_normal(tissue.shape, np.float32)
    return np.clip(np.rint(_blurred(image, width)), -1024, 3071).astype(np.int16)


def tissue_hu(rng: Generator) -> Array:
    """HU of each tissue in the order of their codes, float32, as one scan may show them in one of its phases."""
    early, late = _phase(rng, native=0.3)
    drawn = _column("hu") + early * _column("arterial") + late * _column("portal")
    drawn += rng.normal(0, np.where(drawn < -400, 12, 4 + 0.05 * abs(drawn)))
    if rng.random() < 0.25:  # oral contrast medium
        for name in ("bowel_fluid", "stomach_fluid", "duodenum_fluid"):
            drawn[CODES[name]] += rng.uniform(60, 300)
    drawn[CODES["liver"]] -= max(rng.normal(-8, 15), 0)  # fat in the liver
    return drawn.astype(np.float32)


def _column(name: str) -> Array:
    """One property of all tissues, in the order of their codes."""
    return np.array([getattr(tissue, name) for tissue in TISSUES.values()])


def _phase(rng: Generator, native: float) -> tuple[float, float]:
    """How much of the arterial and of the portal venous enhancement is there."""
    if rng.random() < native:
        return 0.0, 0.0
    late, strength = rng.choice((0.0, 1.0, rng.random()), p=(0.2, 0.5, 0.3)), rng.uniform(0.65, 1.15)
    return strength * (1 - late), strength * late


def _table(body: Body, rng: Generator) -> None:
    """The curved board that the patient lies on."""
    x, y = body.axes[0], body.axes[1]
    back = y[np.flatnonzero((body.tissue != 0).any(axis=(0, 2)))[-1]]
    top = back + rng.uniform(2, 12) - rng.uniform(0, 40) * (x / 200) ** 2
    board = (abs(y[:, None] - top - 8) < rng.uniform(4, 10)) & (abs(x) < 230)
    body.paint(EVERYWHERE, np.broadcast_to(board, body.tissue.shape), "table", over=("air",))


def _textured(body: Body, rng: Generator, mean: Array, spread: Array) -> Array:
    """The mean of each tissue, with grain of about 9 mm."""
    return mean[body.tissue] + spread[body.tissue] * smooth_field(rng, body.axes, 9)


def _blurred(image: Array, width: Sequence[float]) -> Array:
    """Gaussian blur by `width` voxels along (k, j, i)."""
    for axis, sigma in enumerate(width):
        image = gaussian_filter1d(image, sigma, axis, mode="nearest", truncate=2.5)
    return image


def _mr(body: Body, rng: Generator, modality: str) -> Array:
    """Signal, int16 [k, j, i], from zero to an arbitrary maximum."""
    signal = tissue_signal(rng, modality)
    image = _textured(body, rng, signal, signal * _column("texture").astype(np.float32) / 100)
    image = _blurred(image, (rng.uniform(0.15, 0.5), *[rng.uniform(0.4, 0.8)] * 2))
    image *= np.exp(np.float32(rng.uniform(0.05, 0.3)) * smooth_field(rng, body.axes, 180))
    noise = np.float32(signal[CODES["liver"]] * rng.uniform(0.015, 0.07))
    real, imaginary = noise * rng.standard_normal((2, *image.shape), np.float32)
    image = np.hypot(image + real, imaginary)
    top = rng.uniform(200, 4000) / np.quantile(image[::3, ::4, ::4], 0.995)
    return np.clip(np.rint(image * top), 0, 32767).astype(np.int16)


def tissue_signal(rng: Generator, modality: str, varied: bool = False) -> Array:
    """Signal per tissue, float32 from 0 to 1; T1 is that of a field of about 1.5 to 3 T.

    T2 can be `varied` as much as the literature's values differ: muscle has about 30 ms in one (de Bazelaire et al.,
    Radiology 2004) and 44 in another (Stanisz et al., MRM 54, 2005), trains of echoes leave fat brighter than its T2
    tells (Henkelman et al., JMRI 4, 1994), and fast blood has left the slice before its echo.
    """
    count, density = len(TISSUES), _column("density")
    alike = TWINS if varied else np.arange(count)
    t1 = _column("t1") * rng.uniform(0.95, 1.3) * np.exp(rng.normal(0, 0.1, count))[alike]
    t2 = _column("t2") * np.exp(rng.normal(0, 0.2 if varied else 0.1, count))[alike]
    if varied:
        t2[CODES["muscle"]] *= 1.3
        t2[[CODES[name] for name in _FAT]] *= rng.uniform(1, 2.2) if modality == "mr_t2" else 1.0
    if modality == "mr_t2":
        signal, flow = _spin_echo(rng, t1, t2, density), rng.uniform(0.1, 1)
    else:
        if modality == "mr_t1ce":
            early, late = _phase(rng, native=0)
            # Contrast medium that adds 50 HU to CT adds 4.5 per second to the rate of relaxation.
            t1 = 1 / (1 / t1 + 0.0045 / 50 * (early * _column("arterial") + late * _column("portal")))
        signal, flow = _gradient_echo(rng, t1, t2, density), rng.uniform(0.6, 1.5)
    for name in ("blood", "aorta", "vein", "inferior_vena_cava"):
        signal[CODES[name]] *= flow if modality != "mr_t1ce" else 1
    if varied and modality == "mr_t2":
        signal[CODES["aorta"]] *= rng.uniform(0.1, 1)
    if rng.random() < {"mr_t1": 0.35, "mr_t2": 0.5, "mr_t1ce": 0.85}[modality]:
        suppressed = rng.uniform(0.05, 0.35)
        for name in _FAT:
            signal[CODES[name]] *= suppressed
    signal[CODES["air"]] = signal[CODES["table"]] = 0
    return (signal / signal.max()).astype(np.float32)


def _spin_echo(rng: Generator, t1: Array, t2: Array, density: Array) -> Array:
    """Signal of a T2-weighted spin echo.

    Those triggered by breathing repeat within one to three breaths, too soon for fluid to outshine the kidneys much.
    """
    echo, repetition = rng.uniform(60, 120), rng.uniform(1200, 5000)
    return density * (1 - np.exp(-repetition / t1)) * np.exp(-echo / t2)


def _gradient_echo(rng: Generator, t1: Array, t2: Array, density: Array) -> Array:
    """Signal of a T1-weighted spoiled gradient echo, fast in 3-D or slow in 2-D."""
    if rng.random() < 0.6:
        repetition, angle = rng.uniform(3.5, 7), np.deg2rad(rng.uniform(9, 15))
    else:
        repetition, angle = rng.uniform(100, 180), np.deg2rad(75)
    decay, echo = np.exp(-repetition / t1), rng.uniform(1, 4.8)
    steady = density * np.sin(angle) * (1 - decay) / (1 - np.cos(angle) * decay)
    return steady * np.exp(-echo / (0.6 * t2))  # T2* is shorter than T2
