"""Synthesis: training images of any contrast from label maps, as SynthSeg makes them, on the device of the training.

An image is three slices of an `Atlas`. Drawn for each anew are: a large smooth deformation, tilt, the proportions of
the body, size and place of single organs, slice distance and thickness; the signal of each tissue (in CT HU with
contrast phases; in MR the signal equations of spin and gradient echoes with T1, T2 and density of the literature, fat
suppressed or not, and each tissue varied at random on top; for the expert of the body's own MR image sometimes that
image's means); texture of the real image and of chance, lesions, arms, table, a truncated field of view, and ghosts of
motion. The rest the `Augmenter` does with synthetic and real images alike: rotation, scale, bias field, gamma,
resolution, blur and noise.

Sources: Billot et al., "SynthSeg", Medical Image Analysis 86, 2023 (images from label maps, random contrast and
resolution); Hoffmann et al., "SynthMorph", IEEE Transactions on Medical Imaging 41, 2022 (shapes and contrasts beyond
the real ones); Billot et al., "Partial Volume Segmentation of Brain MRI Scans of Any Resolution and Contrast", MICCAI
2020 (slice thickness).

Shape suffixes: S slice, H and W row and column, Z source slice, B image, C tissue class, P control point, M structure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from ..spec import ModelSpec
from .atlas import Atlas
from .body import CODES, TISSUES, TWINS
from .data import Crops, Sampler
from .phantom import MODALITIES, tissue_hu, tissue_signal

_REAL = 0.2  # share of real images for an expert that has some
_ANY_SLICE = 0.4
_COARSE = 4  # pixels between the points at which the deformation is computed
_BANK = 1 << 21
_PARTS = 0.3  # share of images that show part of the body, as parts of a large slice do
_PART, _MIDDLE = 0.2, 0.03  # how far their middle lies from the body's, in crops
_DIM = 0.3  # share of MR images that are dimmer than their volume, far from the coils or without fluid
_ORGANS = ((0.6, 0.2, 0.2), (35.0, 15.0, 15.0))  # how far they move, upwards and in the plane: of the radius, most mm
_LOBES = ((0.2, 0.6, 0.6), (15.0, 45.0, 45.0))  # the same of parts of organs: left lobes of the liver end anywhere
_LARGE_MM = 30.0  # radius from which on an organ has such parts
_WILD = 0.05  # share of MR images whose tissues have any signal
_AGAIN = 0.3  # share of an MR expert's images of a body whose own image is that expert's, that look like it
_EXCRETION = 0.25  # share of CT and of contrast-enhanced T1 images in which the kidneys excrete contrast medium
_CYST = {  # brightness of the finished image: in CT of water in the window, in MR of fluid
    "ct": (0.38, 0.48),
    "mr_t1": (0.02, 0.3),
    "mr_t2": (0.6, 1.0),
    "mr_t1ce": (0.02, 0.25),
}
_IRON = 0.3  # share of T2 images in which iron makes the liver darker, or liver and spleen
_LIVER = [CODES["liver"], CODES["liver_vein"]]
_IRON_IN = (_LIVER, [*_LIVER, CODES["spleen"]])
_KIDNEY = [CODES[name] for name in CODES if name.startswith(("cortex", "medulla", "urine"))]
_URINE = [CODES["urine"], CODES["bladder"], CODES["medulla_right"], CODES["medulla_left"]]
_TEXTURE = torch.tensor([tissue.texture for tissue in TISSUES.values()])


class Example(NamedTuple):
    """A synthetic image."""

    atlas: str  # name of the label map
    image: NDArray[np.float32]  # [H, W] in [0, 1]
    labels: NDArray[np.uint8]  # [H, W]


class Synthesiser:
    """Crops of any step, as many of each expert, of which seed and step alone decide; real images among them."""

    def __init__(
        self,
        spec: ModelSpec,
        atlases: Sequence[Atlas],
        images: int,
        crop: int,
        seed: int,
        real: Sampler | None = None,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        gate: bool = False,
    ) -> None:
        """Sends the atlases to the device.

        Args:
            spec: Of the model that is trained.
            atlases: What to draw from.
            images: Images of each expert in the batch of all ranks.
            crop: Rows and columns that the network sees.
            seed: Of the run.
            real: Gives real images, with the same number of images, crop and seed.
            rank: Which part of the batch is wanted, below `world`.
            world: Number of parts.
            device: Where to work.
            gate: For training of the gate: contrasts that could be any modality's are left out.
        """
        self.spec, self.atlases, self.images, self.crop, self.seed = spec, atlases, images, crop, seed
        self.real, self.rank, self.world, self.device, self.gate = real, rank, world, torch.device(device), gate
        self.margin = crop // 8  # around a crop, which augmentation may move into it
        if real:
            real.margin = self.margin  # images of a batch are of one size
        self.shares = np.cumsum([atlas.weight for atlas in atlases])
        self.classes = [torch.from_numpy(atlas.classes_ZHW).to(self.device) for atlas in atlases]
        self.textures = [
            None if atlas.texture_ZHW is None else torch.from_numpy(atlas.texture_ZHW).to(self.device)
            for atlas in atlases
        ]
        self.noise = torch.randn(_BANK, generator=torch.Generator().manual_seed(0)).to(self.device)

    def crops_at(self, step: int) -> Crops:
        """This rank's crops of a step, in the order of the experts."""
        rows = [(expert, place) for expert in range(len(self.spec.experts)) for place in range(self.images)]
        mine = [(expert, place) for expert, place in rows if place % self.world == self.rank]
        taken, experts = self._real_ones(step)
        parts = []
        for expert, place in mine:
            rng = np.random.default_rng([self.seed, step, expert, place])
            found = experts.index(expert) if expert in experts else -1
            if taken is not None and found >= 0 and rng.random() < _REAL:
                at = found * (self.images // self.world) + place // self.world
                parts.append(_one(taken, at, self.device))
            else:
                parts.append(self.draw(expert, rng))
        return _joined(parts)

    def _real_ones(self, step: int) -> tuple[Crops | None, list[int]]:
        if self.real is None:
            return None, []
        return self.real.crops_at(step), [group[0].expert for group in self.real.groups]

    def draw(self, expert: int, rng: Generator) -> Crops:
        """One synthetic image for an expert."""
        number = int(np.searchsorted(self.shares, rng.random() * self.shares[-1], side="right"))
        atlas, size = self.atlases[number], self.crop + 2 * self.margin
        step_mm = self.spec.slice_mm * (rng.uniform(1, 2.8) if rng.random() < 0.6 else 1.0)
        places_SHW3 = self._places(atlas, size, step_mm, rng)
        first, last = _span(places_SHW3[..., 0], len(atlas.classes_ZHW))
        classes_ZHW = self.classes[number][first:last].long()
        contrast = _contrast(self.spec.experts[expert].name, self.spec.experts[expert].modality, rng)
        again = self.spec.experts[expert].name == atlas.expert and rng.random() < _AGAIN
        slab_ZHW = self._paint(atlas, number, classes_ZHW, first, contrast, rng, again)
        slab_ZHW = _thick(slab_ZHW, step_mm / atlas.spacing[0], rng)
        places_SHW3[..., 0] -= first
        image_SHW = _sampled(slab_ZHW, places_SHW3, "bilinear")
        middle = slice(len(places_SHW3) // 2, len(places_SHW3) // 2 + 1)
        labels_C = torch.from_numpy(atlas.labels_C).to(self.device)
        found_HW = labels_C[_sampled(classes_ZHW.float(), places_SHW3[middle], "nearest")[0].round().long()]
        return self._finished(atlas, expert, image_SHW, found_HW, contrast, rng)

    # Shape

    def _places(self, atlas: Atlas, size: int, step_mm: float, rng: Generator) -> Tensor:
        """Where in the atlas each pixel comes from: [S, H, W, 3] in voxels (Z, H, W)."""
        spacing, shape, coarse = np.array(atlas.spacing), np.array(atlas.classes_ZHW.shape), -(-size // _COARSE)
        line = (torch.arange(coarse, device=self.device) - (coarse - 1) / 2) * _COARSE * self.spec.pixel_mm
        count = self.spec.network.channels
        depth_S = (torch.arange(count, device=self.device) - count // 2) * step_mm
        place_3SHW = torch.stack(torch.meshgrid(depth_S, line, line, indexing="ij"))
        turn = _float32(_tilt(rng) * np.exp(rng.normal(0, (0.1, 0.09, 0.09))), self.device)
        moved_3SHW = torch.einsum("ij,jshw->ishw", turn, place_3SHW)
        spread = self.crop * (_PART if rng.random() < _PARTS else _MIDDLE)
        centre = np.array([_slice(atlas, rng), *(shape[1:] / 2 + rng.normal(0, spread, 2))]) * spacing
        moved_3SHW += _float32(centre, self.device)[:, None, None, None]
        near_M4 = _near(atlas.places_M4, centre[0])
        moved_3SHW = _organs_changed(moved_3SHW, near_M4, _ORGANS, rng)
        moved_3SHW = _organs_changed(moved_3SHW, _lobes(near_M4, rng), _LOBES, rng)
        moved_3SHW += _bent(coarse, depth_S, rng)
        voxels_S3HW = (moved_3SHW / _float32(spacing, self.device)[:, None, None, None]).transpose(0, 1)
        full = F.interpolate(voxels_S3HW, scale_factor=_COARSE, mode="bilinear", align_corners=False)
        return full[..., :size, :size].permute(0, 2, 3, 1).contiguous()

    # Appearance

    def _paint(
        self,
        atlas: Atlas,
        number: int,
        classes_ZHW: Tensor,
        first: int,
        contrast: str,
        rng: Generator,
        again: bool = False,
    ) -> Tensor:
        """Intensities of a slab, in HU or of any scale from 0 on; `again` those of the atlas's own MR image, varied."""
        codes = [CODES[name] for name in atlas.tissues]
        means_C, spread_C = _signals(codes, contrast, rng, wild=0.0 if self.gate or again else _WILD)
        if again:
            ratio = _own_signals(atlas.signals_C, means_C, rng) / means_C.clamp(min=1e-6)
            means_C, spread_C = ratio * means_C, ratio * spread_C
        means, spread = means_C.to(self.device), spread_C.to(self.device)
        image_ZHW = means[classes_ZHW]
        voxels = classes_ZHW.numel()
        bank = self.noise if voxels < _BANK else self.noise.repeat(1 + voxels // _BANK)
        start = int(rng.integers(len(bank) - voxels))
        noise_ZHW = bank[start : start + voxels].view(classes_ZHW.shape)
        image_ZHW = image_ZHW.addcmul(noise_ZHW, spread[classes_ZHW], value=float(rng.uniform(0.3, 1.6)))
        texture = self.textures[number]
        if texture is not None and rng.random() < 0.8:
            strength = 100 * rng.uniform(0, 1.2) if contrast == "ct" else rng.uniform(-0.5, 0.5)
            grain_ZHW = texture[first : first + len(classes_ZHW)].float()
            scale = torch.ones_like(means) if contrast == "ct" else means
            image_ZHW = image_ZHW.addcmul(grain_ZHW, scale[classes_ZHW], value=float(strength))
        rule = self.spec.intensity["CT" if contrast == "ct" else "MR"]
        return (image_ZHW - rule.low) / (rule.high - rule.low) if contrast == "ct" else image_ZHW

    def _finished(
        self, atlas: Atlas, expert: int, image_SHW: Tensor, found_HW: Tensor, contrast: str, rng: Generator
    ) -> Crops:
        """Adds what lies beside and in the body, and scales intensities as the model's rule does."""
        body_HW = image_SHW[len(image_SHW) // 2] > 0.02
        image_SHW = image_SHW.clamp(0, 1) if contrast == "ct" else _scaled(_shaded(image_SHW, rng), rng)
        if contrast == "ct" and rng.random() < 0.6:
            _add_table(image_SHW, body_HW, self.spec.pixel_mm, rng)
        if rng.random() < 0.2:
            _add_cyst(image_SHW, body_HW & (found_HW == 0), contrast, self.spec.pixel_mm, rng)
        if rng.random() < 0.12:
            _add_arms(image_SHW, body_HW, self.spec.pixel_mm, rng)
        if atlas.slices_of and rng.random() < 0.12:
            found_HW = self._with_lesion(atlas, image_SHW, found_HW, rng)
        image_SHW = _softened(image_SHW, rng)
        if contrast != "ct":
            _add_artefacts(image_SHW, rng)
        if rng.random() < 0.3:
            _truncate(image_SHW, found_HW, self.crop, rng)
        seed = int(rng.integers(1 << 62))
        known = torch.from_numpy(atlas.annotated_K)[None]
        labels = found_HW.to(torch.uint8)[None]
        image = image_SHW.clamp(0, 1).half()[None]
        return Crops(image, labels, known, torch.tensor([expert]), (f"{atlas.name} as {contrast}",), (seed,))

    def _with_lesion(self, atlas: Atlas, image_SHW: Tensor, found_HW: Tensor, rng: Generator) -> Tensor:
        """Labels with a round tumour in the liver, where the model knows both."""
        if not {"liver", "liver_tumor"} <= set(self.spec.structures):
            return found_HW
        liver, tumor = self.spec.labels_of(["liver", "liver_tumor"])
        pixels = (found_HW == liver).nonzero()
        if len(pixels) == 0 or not atlas.annotated_K[tumor]:
            return found_HW
        row, column = pixels[int(rng.integers(len(pixels)))].tolist()
        line = torch.arange(len(found_HW), device=self.device)
        away_HW = torch.hypot(line[:, None] - row + 0.0, line - column + 0.0)
        radius = rng.uniform(5, 22) / self.spec.pixel_mm
        liver_mean = image_SHW[len(image_SHW) // 2][found_HW == liver].mean()
        change = float(rng.choice([-1, 1])) * rng.uniform(0.08, 0.3)
        for plane_HW in image_SHW:
            plane_HW += change * liver_mean.clamp(min=0.3) * (radius - away_HW).clamp(0, 1) * (found_HW == liver)
        return torch.where((found_HW == liver) & (away_HW < radius), tumor, found_HW)

    def examples(self, expert: int, count: int) -> list[Example]:
        """Synthetic images for an expert, always the same."""
        found = []
        for number in range(count):
            crop = self.draw(expert, np.random.default_rng([expert, number]))
            image_HW = crop.images_BSHW[0, crop.images_BSHW.shape[1] // 2]
            found.append(
                Example(
                    crop.names[0].rpartition(" as ")[0],
                    image_HW.float().cpu().numpy(),
                    crop.labels_BHW[0].cpu().numpy(),
                )
            )
        return found


# Parts of a shape


def _slice(atlas: Atlas, rng: Generator) -> float:
    """A slice, more often than not one that shows a structure drawn at random; long ones come up a little more often.

    The ends of a structure are the harder part, and come up more often than its middle.
    """
    if atlas.slices_of and rng.random() >= _ANY_SLICE:
        length = np.array([len(slices) for slices in atlas.slices_of.values()]) ** 0.25
        slices = atlas.slices_of[int(rng.choice(list(atlas.slices_of), p=length / length.sum()))]
        return float(slices[int(rng.beta(0.6, 0.6) * len(slices))]) + rng.uniform(-0.5, 0.5)
    return rng.uniform(0, len(atlas.classes_ZHW) - 1)


def _float32(array: NDArray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).float().to(device)


def _tilt(rng: Generator) -> np.ndarray:
    """A small rotation [3, 3] of (Z, H, W) about the axes in the plane; the Augmenter turns in the plane."""
    a, b = rng.normal(0, 0.07, 2)
    about_w = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_h = np.array([[np.cos(b), 0, -np.sin(b)], [0, 1, 0], [np.sin(b), 0, np.cos(b)]])
    return about_w @ about_h


def _near(places_M4: NDArray[np.float32], depth: float) -> NDArray[np.float32]:
    """The structures that slices at a depth in mm may show."""
    return places_M4[abs(places_M4[:, 0] - depth) < 2.5 * places_M4[:, 3]]


def _lobes(places_M4: NDArray[np.float32], rng: Generator) -> NDArray[np.float32]:
    """A part of each large structure, somewhere around its middle; like `Atlas.places_M4`."""
    large_M4 = places_M4[places_M4[:, 3] > _LARGE_MM]
    way_M3 = rng.normal(size=(len(large_M4), 3))
    way_M3 *= rng.uniform(0.4, 1.3, (len(large_M4), 1)) / np.linalg.norm(way_M3, axis=1, keepdims=True)
    return np.column_stack([large_M4[:, :3] + way_M3 * large_M4[:, 3:], 0.6 * large_M4[:, 3]]).astype(np.float32)


def _organs_changed(
    place_3SHW: Tensor,
    places_M4: NDArray[np.float32],
    moved: tuple[tuple[float, ...], tuple[float, ...]],
    rng: Generator,
) -> Tensor:
    """Each structure a little larger or smaller along each axis and moved, fading out around it."""
    count, device = len(places_M4), place_3SHW.device
    if count == 0:
        return place_3SHW
    radius_M1 = places_M4[:, 3:].clip(min=8)
    grow_M3 = _float32(rng.normal(0, 0.2, (count, 3)).clip(-0.35, 0.45), device)
    share, most = moved[0], np.array(moved[1])
    shift_M3 = _float32((rng.normal(0, share, (count, 3)) * radius_M1).clip(-most, most), device)
    from_centre_M3SHW = place_3SHW - _float32(places_M4[:, :3], device)[..., None, None, None]
    radius_M = _float32(radius_M1[:, 0], device)
    weight_M1SHW = (
        -0.5 * (from_centre_M3SHW.square().sum(1, True) / (1.4 * radius_M[:, None, None, None, None]) ** 2)
    ).exp()
    change = from_centre_M3SHW * grow_M3[..., None, None, None] + shift_M3[..., None, None, None]
    total_1SHW = weight_M1SHW.sum(0).clamp(min=1)  # where structures overlap they share
    return place_3SHW + (change * weight_M1SHW).sum(0) / total_1SHW


def _bent(size: int, depth_S: Tensor, rng: Generator) -> Tensor:
    """A smooth displacement [3, S, H, W] in mm that changes with the depth."""
    moved_3SHW = torch.zeros(3, len(depth_S), size, size, device=depth_S.device)
    for points, largest in ((4, 12.0), (7, 5.0)):
        drawn = _float32(rng.normal(0, rng.uniform(0, largest), (2, 3, points, points)), depth_S.device)
        here, slope = F.interpolate(drawn, (size, size), mode="bicubic", align_corners=True)
        moved_3SHW += here[:, None] + slope[:, None] * (depth_S / 60)[:, None, None]
    return moved_3SHW


def _span(depth_SHW: Tensor, count: int) -> tuple[int, int]:
    """Source slices around those that are asked for; clamps the places to the atlas."""
    depth_SHW.clamp_(0, count - 1)
    low, high = float(depth_SHW.min()), float(depth_SHW.max())
    return max(0, int(low) - 2), min(count, int(high) + 4)


def _sampled(volume_ZHW: Tensor, places_SHW3: Tensor, mode: str) -> Tensor:
    """The volume at places in voxels, 0 beyond it within the plane."""
    size = torch.tensor(volume_ZHW.shape, device=places_SHW3.device)
    grid = (2 * places_SHW3 + 1) / size - 1
    return F.grid_sample(volume_ZHW[None, None], grid.flip(-1)[None], mode, align_corners=False)[0, 0]


def _thick(slab_ZHW: Tensor, slices: float, rng: Generator) -> Tensor:
    """Slices that average over part or all of their distance, in slices of the atlas; what is left of it is the gap."""
    thickness = slices * rng.uniform(0.5, 1.1)
    reach = math.ceil((thickness - 1) / 2)
    if reach < 1:
        return slab_ZHW
    weights = ((thickness + 1) / 2 - torch.arange(-reach, reach + 1).abs()).clamp(max=1) / thickness
    padded = F.pad(slab_ZHW[None, None], (0, 0, 0, 0, reach, reach), mode="replicate")
    return F.conv3d(padded, weights.to(slab_ZHW)[None, None, :, None, None])[0, 0]


# Parts of an appearance


def _contrast(name: str, modality: str, rng: Generator) -> str:
    """The contrast that an expert is for; any of its modality where its name is none."""
    known = MODALITIES if name in MODALITIES else [m for m in MODALITIES if m.startswith(modality.lower())]
    return name if name in MODALITIES else str(rng.choice(known))


def _signals(codes: Sequence[int], contrast: str, rng: Generator, wild: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each class."""
    spread = _TEXTURE[codes]
    if contrast == "ct":
        drawn = tissue_hu(rng)[codes]
        if rng.random() < _EXCRETION:
            drawn = drawn + np.isin(codes, _KIDNEY) * rng.uniform(0, 180)
        drawn = drawn + rng.normal(0, 1, len(TISSUES))[TWINS][codes] * np.where(
            drawn < -400, 20, 12 + 0.15 * abs(drawn)
        )
        drawn[0] = -1000
        return torch.from_numpy(drawn).float(), spread
    if rng.random() < wild:
        drawn = rng.random(len(codes)) ** rng.uniform(0.6, 1.5)
    else:
        alike, own = rng.normal(0, rng.uniform(0.05, 0.22), len(TISSUES))[TWINS][codes], rng.normal(0, 0.04, len(codes))
        drawn = tissue_signal(rng, contrast, varied=True)[codes] * np.exp(alike + own)
        if contrast == "mr_t1ce" and rng.random() < _EXCRETION:  # bright, or dark where the medium is too dense
            drawn = np.where(np.isin(codes, _URINE), drawn.max() * rng.uniform(0, 1.3), drawn)
        if contrast == "mr_t2" and rng.random() < _IRON:
            drawn = np.where(np.isin(codes, _IRON_IN[rng.integers(2)]), drawn * rng.uniform(0.2, 1), drawn)
    drawn[0] = 0
    means = torch.from_numpy(np.asarray(drawn)).float()
    return means, means * (spread.clamp(max=20) / 100 + 0.02)


def _own_signals(signals_C: NDArray[np.float64], means_C: Tensor, rng: Generator) -> Tensor:
    """The signals that an image shows, a little varied; for tissues that it lacks the drawn ones in proportion."""
    shown_C = torch.from_numpy(signals_C * np.exp(rng.normal(0, 0.15, len(signals_C)))).float()
    seen_C = ~shown_C.isnan() & (means_C > 0)
    proportion = (shown_C[seen_C] / means_C[seen_C]).median() if seen_C.any() else 1.0
    return torch.where(seen_C, shown_C, means_C * proportion)


def _softened(image_SHW: Tensor, rng: Generator) -> Tensor:
    """Edges less sharp than those of a label map, as the point spread of a scanner draws them."""
    blurred_SHW = F.avg_pool2d(F.pad(image_SHW[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    return torch.lerp(image_SHW, blurred_SHW, rng.uniform(0, 1))


def _shaded(image_SHW: Tensor, rng: Generator) -> Tensor:
    """Brighter near the coils, as half of the images are."""
    if rng.random() < 0.5:
        return image_SHW
    points = torch.from_numpy(rng.normal(0, rng.uniform(0.1, 0.6), (1, 1, 3, 3))).float().to(image_SHW.device)
    field = F.interpolate(points, image_SHW.shape[-2:], mode="bicubic", align_corners=True)
    return image_SHW * field[0].clamp(-1.5, 1.5).exp()


def _scaled(image_SHW: Tensor, rng: Generator) -> Tensor:
    """From the low to the high percentile of what is seen, as far as a few slices tell those of a volume."""
    seen = image_SHW.flatten()[:: max(1, image_SHW.numel() // 20_000)]
    seen = seen[seen > 0]
    high = torch.quantile(seen, 0.985) if len(seen) else image_SHW.new_tensor(1.0)
    dimmer = rng.uniform(-0.25, 0.4) + (rng.uniform(0, 0.8) if rng.random() < _DIM else 0.0)
    return (image_SHW / (high * float(np.exp(dimmer))).clamp(min=1e-6)).clamp(0, 1)


def _add_table(image_SHW: Tensor, body_HW: Tensor, pixel_mm: float, rng: Generator) -> None:
    """The curved board below the body, in place."""
    rows = body_HW.any(1).nonzero()
    if len(rows) == 0:
        return
    line = torch.arange(image_SHW.shape[-1], device=image_SHW.device)
    across = (line - len(line) / 2) * pixel_mm
    top = float(rows[-1]) + rng.uniform(1, 10) - rng.uniform(0, 40) / pixel_mm * (across / 200) ** 2
    board = (line[:, None] > top) & (line[:, None] < top + rng.uniform(1, 6)) & (across.abs() < 230)
    image_SHW.masked_fill_(board & ~body_HW, float(rng.uniform(0, 0.7)))


def _add_cyst(image_SHW: Tensor, free_HW: Tensor, contrast: str, pixel_mm: float, rng: Generator) -> None:
    """A cyst of any size where there is no structure, in place: not all that is large and even is a liver."""
    pixels = free_HW.nonzero()
    if len(pixels) == 0:
        return
    row, column = pixels[int(rng.integers(len(pixels)))].tolist()
    line = torch.arange(len(free_HW), device=image_SHW.device)
    away_HW = torch.hypot((line[:, None] - row) * rng.uniform(0.7, 1.4), line - column + 0.0)
    image_SHW.masked_fill_((away_HW < rng.uniform(5, 60) / pixel_mm) & free_HW, rng.uniform(*_CYST[contrast]))


def _add_arms(image_SHW: Tensor, body_HW: Tensor, pixel_mm: float, rng: Generator) -> None:
    """Arms beside the body, muscle around a bone, in place; what lies beyond the image is cut."""
    columns, rows = body_HW.any(0).nonzero(), body_HW.any(1).nonzero()
    if len(columns) == 0:
        return
    line = torch.arange(image_SHW.shape[-1], device=image_SHW.device)
    radius, gap = rng.uniform(25, 45) / pixel_mm, rng.uniform(2, 8) / pixel_mm
    row = float(rows.float().mean()) + rng.normal(0, 8)
    muscle, bone = rng.uniform(0.2, 0.8), rng.uniform(0, 1)
    for column in (float(columns[0]) - gap - radius, float(columns[-1]) + gap + radius):
        away = torch.hypot((line[:, None] - row) / 1.2, line - column) / radius
        image_SHW.masked_fill_((away < 1) & ~body_HW, float(muscle))
        image_SHW.masked_fill_((away < 0.25) & ~body_HW, float(bone))


def _add_artefacts(image_SHW: Tensor, rng: Generator) -> None:
    """A ghost of motion, and air that is not black, in place."""
    if rng.random() < 0.12:
        shift = int(rng.integers(8, image_SHW.shape[-1] // 2))
        image_SHW += rng.uniform(0.03, 0.12) * image_SHW.roll(shift, -2)
    if rng.random() < 0.5:
        image_SHW += rng.uniform(0, 0.03)


def _truncate(image_SHW: Tensor, found_HW: Tensor, crop: int, rng: Generator) -> None:
    """Darkness beyond a smaller field of view, in place."""
    size = image_SHW.shape[-1]
    for axis in (-2, -1):
        for end in (0, 1):
            cut = (size - crop) // 2 + int(rng.uniform(0, 0.16) * crop)
            for part in (image_SHW, found_HW):
                part.narrow(axis, 0 if end == 0 else size - cut, cut).zero_()


# Batches


def _one(crops: Crops, at: int, device: torch.device) -> Crops:
    part = slice(at, at + 1)
    return Crops(
        crops.images_BSHW[part].to(device),
        crops.labels_BHW[part].to(device),
        crops.annotated_BK[part],
        crops.experts_B[part],
        crops.names[part],
        crops.seeds[part],
    )


def _joined(parts: Sequence[Crops]) -> Crops:
    images, labels, annotated, experts = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("images_BSHW", "labels_BHW", "annotated_BK", "experts_B")
    )
    names = tuple(name for part in parts for name in part.names)
    return Crops(images, labels, annotated, experts, names, tuple(seed for part in parts for seed in part.seeds))
