"""Augmentation of a whole batch on its device: one resampling of images and labels, then contrast and acquisition.

All that is drawn for an image comes from its own seed, so that neither the batch nor the rank it is in matters.
Shape suffixes: B image, S slice channel, H and W row and column, K class, E expert, T transform, P control point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..labels import catalogue, structure
from ..spec import ModelSpec
from .data import Batch, Crops

_NEUTRAL = {"scale": 1.0, "aspect": 1.0, "gamma": 1.0, "contrast": 1.0, "coarseness": 1.0}  # 0 of the others
_BLUR_REACH = 4  # pixels
_NOISE_STARTS = (
    1 << 21
)  # where an image's noise may start in the noise of all, as drawing it anew takes ten times as long
_BENDS, _SHADES = 4, 2  # intervals of the control grids of the elastic deformation and of the bias field
_FOLDS = 0.48  # Choi and Lee, Graphical Models 62, 411, 2000: up to 1 / 2.05 a cubic B-spline in 2-D cannot fold


@dataclass(frozen=True)
class Chance:
    """With this probability a value drawn uniformly from low to high, else the value that changes nothing."""

    probability: float
    low: float = 1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        """Refuses what is no probability or no range."""
        if not (0 <= self.probability <= 1 and self.low <= self.high):
            raise ValueError(f"expected a probability from 0 to 1 and low <= high, got {self}")


@dataclass(frozen=True)
class AugmentConfig:
    """How images of a modality are varied; the defaults are for MR.

    Attributes:
        flip: Left and right changed over, with their labels. Rare, as the body it makes has its liver on the left.
        rotation: Degrees.
        scale: Magnification.
        aspect: Rows magnified by it more than columns.
        shift_x: To the left or right, in parts of the crop.
        shift_y: To the front or back, in parts of the crop.
        elastic: Largest move of a control point, in distances between control points; at most 0.48.
        bias: Strength of a smooth field that multiplies the image.
        gamma: Exponent.
        contrast: Factor.
        brightness: Summand.
        blur: Standard deviation of a Gaussian in pixels, which reaches 4.
        coarseness: Pixels along each axis that become one, at low resolution.
        noise: Standard deviation of Gaussian noise.
    """

    flip: Chance = Chance(0.2)
    rotation: Chance = Chance(0.8, -15, 15)
    scale: Chance = Chance(0.8, 0.8, 1.25)
    aspect: Chance = Chance(0.8, 0.9, 1.1)
    shift_x: Chance = Chance(0.8, -0.08, 0.08)
    shift_y: Chance = Chance(0.8, -0.08, 0.08)
    elastic: Chance = Chance(0.3, 0.1, 0.35)
    bias: Chance = Chance(0.4, 0.1, 0.6)
    gamma: Chance = Chance(0.7, 0.7, 1.5)
    contrast: Chance = Chance(0.7, 0.8, 1.2)
    brightness: Chance = Chance(0.7, -0.05, 0.05)
    blur: Chance = Chance(0.15, 0.4, 1.2)
    coarseness: Chance = Chance(0.15, 1.2, 2.5)
    noise: Chance = Chance(0.5, 0.0, 0.05)

    def __post_init__(self) -> None:
        """Refuses a scale that is not positive and a deformation that may fold."""
        if min(self._range(name)[0] for name in _NEUTRAL) <= 0:
            raise ValueError(f"{', '.join(_NEUTRAL)} must be above 0, got {self}")
        if self._range("elastic")[1] > _FOLDS:
            raise ValueError(f"elastic is up to {self.elastic.high}; above {_FOLDS} the image may fold")

    def margin(self, crop: int) -> int:
        """Pixels around a crop that the moves can bring into it."""
        angle = math.radians(min(45, max(map(abs, self._range("rotation")))))
        aspect = max(self._range("aspect")[1], 1 / self._range("aspect")[0])
        shift = max(map(abs, self._range("shift_x") + self._range("shift_y")))
        reach = (0.5 + self._range("elastic")[1] / _BENDS) * (math.sin(angle) + math.cos(angle))
        return math.ceil(crop * (reach * math.sqrt(aspect) / self._range("scale")[0] + shift - 0.5))

    def _range(self, name: str) -> tuple[float, float]:
        """Lowest and highest value that may occur."""
        chance, neutral = getattr(self, name), _NEUTRAL.get(name, 0.0)
        return (min(chance.low, neutral), max(chance.high, neutral)) if chance.probability else (neutral, neutral)


_NAMES = tuple(field.name for field in fields(AugmentConfig))
MR = AugmentConfig()
CT = AugmentConfig(  # HU mean the same in every scanner
    bias=Chance(0),
    gamma=Chance(0.5, 0.85, 1.2),
    contrast=Chance(0.5, 0.9, 1.1),
    brightness=Chance(0.5, -0.04, 0.04),
)
AUGMENT: Mapping[str, AugmentConfig] = {"CT": CT, "MR": MR}
AUGMENT_GATE: Mapping[str, AugmentConfig] = {"CT": CT, "MR": CT}  # it tells modalities by the contrast that MR varies


class Augmenter:
    """Turns crops into a batch on the device, each image varied as fits its modality."""

    def __init__(
        self,
        spec: ModelSpec,
        crop: int,
        configs: Mapping[str, AugmentConfig] = AUGMENT,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepares what all batches share.

        Args:
            spec: The model that is trained.
            crop: Rows and columns of the images that come out.
            configs: How to vary the images, by modality.
            device: Where to work.
        """
        self.crop, self.device = crop, torch.device(device)
        chances = [[getattr(configs[expert.modality], name) for name in _NAMES] for expert in spec.experts]
        self.chances_ET3 = torch.tensor([[[c.probability, c.low, c.high] for c in row] for row in chances])
        self.neutral_T = torch.tensor([_NEUTRAL.get(name, 0.0) for name in _NAMES])
        self.mirrored_K, self.unnamed_K = mirrored_labels(spec.structures)
        self.bends_HP, self.shades_HP = (_splines(crop, count).to(self.device) for count in (_BENDS, _SHADES))
        point_P = (torch.arange(_BENDS + 3) - 1) / _BENDS - 0.5
        self.points_2PP = torch.stack([point_P.expand(len(point_P), -1), point_P[:, None].expand(-1, len(point_P))])
        self.taps = torch.arange(-_BLUR_REACH, _BLUR_REACH + 1, device=self.device)
        count = spec.network.channels * crop * crop + _NOISE_STARTS
        self.noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(self.device)

    def __call__(self, crops: Crops) -> Batch:
        """The augmented batch; images are float32 in [0, 1]."""
        drawn, bends_B2PP, shades_B1PP = self._draw(crops)
        flipped_B = (drawn["flip"] > 0) & ~(crops.annotated_BK & self.unnamed_K).any(1)
        swap_BK = torch.where(flipped_B[:, None], self.mirrored_K, torch.arange(len(self.mirrored_K)))
        grid_BHW2 = self._grid(drawn, flipped_B, bends_B2PP, crops.labels_BHW.shape[-1])
        images = self._sample(self._on_device(crops.images_BSHW), grid_BHW2, "bilinear")
        labels = self._sample(self._on_device(crops.labels_BHW[:, None]), grid_BHW2, "nearest")
        labels = self._on_device(swap_BK).gather(1, labels.flatten(1).long()).view(-1, self.crop, self.crop)
        self._vary(images, drawn, shades_B1PP)
        self._acquire(images, drawn, crops.seeds)
        annotated_BK = self._on_device(crops.annotated_BK.gather(1, swap_BK))
        told_B = torch.tensor([seed % 2 == 1 for seed in crops.seeds])
        return Batch(images.clamp_(0, 1), labels, annotated_BK, crops.experts_B, told_B, crops.names)

    def _draw(self, crops: Crops) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Each transform's values [B], on the CPU, and the control points of deformation and bias field."""
        sizes = (len(_NAMES), len(_NAMES), 2 * (_BENDS + 3) ** 2, (_SHADES + 3) ** 2)
        each = [torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed)) for seed in crops.seeds]
        chosen_BT, place_BT, bends, shades = torch.stack(each).split(sizes, 1)
        probability_BT, low_BT, high_BT = self.chances_ET3[crops.experts_B].unbind(-1)
        values_BT = torch.where(chosen_BT < probability_BT, low_BT.lerp(high_BT, place_BT), self.neutral_T)
        drawn = dict(zip(_NAMES, values_BT.unbind(1), strict=True))
        bends_B2PP = (2 * bends - 1).view(-1, *self.points_2PP.shape) * _each(drawn["elastic"]) / _BENDS
        shades_B1PP = (2 * shades - 1).view(-1, 1, _SHADES + 3, _SHADES + 3) * _each(drawn["bias"])
        return drawn, bends_B2PP, shades_B1PP

    def _grid(self, drawn: Mapping[str, Tensor], flipped_B: Tensor, bends_B2PP: Tensor, size: int) -> Tensor:
        """Where each pixel comes from, in the coordinates of `grid_sample` on images of `size` rows and columns.

        Turn, scale and shift move the control points as well: a spline follows every affine map of them exactly.
        """
        angle, stretch = drawn["rotation"].deg2rad(), drawn["aspect"].sqrt()
        x, y = stretch / drawn["scale"], 1 / (stretch * drawn["scale"])
        x = torch.where(flipped_B, -x, x)
        turn = torch.stack([angle.cos() * x, -angle.sin() * y, angle.sin() * x, angle.cos() * y], -1).view(-1, 2, 2)
        shift_B2 = torch.stack([drawn["shift_x"], drawn["shift_y"]], -1)
        points_B2PP = torch.einsum("bij,bjpq->bipq", turn, self.points_2PP + bends_B2PP) + shift_B2[:, :, None, None]
        grid_B2HW = _smooth(self._on_device(points_B2PP * (2 * self.crop / size)), self.bends_HP)
        return grid_B2HW.permute(0, 2, 3, 1)

    def _sample(self, images_BCHW: Tensor, grid_BHW2: Tensor, mode: str) -> Tensor:
        """The one resampling; on a CPU image by image, as each then stays in the cache of its core."""
        count = 1 if self.device.type == "cpu" else len(images_BCHW)
        parts = zip(images_BCHW.split(count), grid_BHW2.split(count), strict=True)
        return torch.cat([F.grid_sample(part.float(), grid, mode, align_corners=False) for part, grid in parts])

    def _vary(self, images_BSHW: Tensor, drawn: Mapping[str, Tensor], shades_B1PP: Tensor) -> None:
        """Contrast and brightness, in place."""
        gamma, contrast, brightness = (self._on_device(_each(drawn[n])) for n in ("gamma", "contrast", "brightness"))
        if _occurs(drawn, "bias"):
            images_BSHW.mul_(_smooth(self._on_device(shades_B1PP), self.shades_HP).exp_())
        if _occurs(drawn, "gamma"):
            images_BSHW.log2_().mul_(gamma).exp2_()  # a power, in half of its time
        images_BSHW.mul_(contrast).add_(brightness)

    def _acquire(self, images_BSHW: Tensor, drawn: Mapping[str, Tensor], seeds: Sequence[int]) -> None:
        """Resolution and noise, in place."""
        for name, change in (("blur", self._blur), ("coarseness", _coarsen)):
            if _occurs(drawn, name):
                rows = (drawn[name] != _NEUTRAL.get(name, 0.0)).nonzero()[:, 0]
                places, values = self._on_device(rows), self._on_device(drawn[name][rows])
                images_BSHW[places] = change(images_BSHW[places], values)
        if _occurs(drawn, "noise"):
            count = images_BSHW[0].numel()
            noises = [self.noise[start : start + count] for start in (seed % _NOISE_STARTS for seed in seeds)]
            images_BSHW.addcmul_(torch.stack(noises).view_as(images_BSHW), self._on_device(_each(drawn["noise"])))

    def _blur(self, images_BSHW: Tensor, sigma_B: Tensor) -> Tensor:
        """Blurred by Gaussians."""
        weights = (-0.5 * (self.taps / sigma_B[:, None]) ** 2).softmax(-1)
        weights = weights.repeat_interleave(images_BSHW.shape[1], 0)[:, None, None]
        flat = F.pad(images_BSHW.flatten(0, 1)[None], 4 * [_BLUR_REACH], mode="replicate")
        flat = F.conv2d(F.conv2d(flat, weights, groups=len(weights)), weights.mT, groups=len(weights))
        return flat.view(images_BSHW.shape)

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def mirrored_labels(structures: Sequence[str]) -> tuple[Tensor, Tensor]:
    """What left and right change over.

    Args:
        structures: Keys of labels 1, 2 and so on.

    Returns:
        Label [K] of each label in the mirrored body, and whether [K] the model has no name for it there: an image
        with a left kidney must not be mirrored for a model that knows no right one.
    """
    mirrored, unnamed = list(range(len(structures) + 1)), [False] * (len(structures) + 1)
    for label, key in enumerate(structures, start=1):
        other = _other_side(key)
        unnamed[label] = other not in structures
        mirrored[label] = label if unnamed[label] else structures.index(other) + 1
    return torch.tensor(mirrored), torch.tensor(unnamed)


def _other_side(key: str) -> str:
    """The key of the mirrored structure, "" where it has none."""
    sides = {"left": "right", "right": "left"}
    side = structure(key).laterality
    if side not in sides:
        return key
    if key.startswith("heart_"):  # chambers have their names by form, and keep them in a mirrored heart
        return ""
    other = catalogue().get("_".join(sides.get(word, word) for word in key.split("_")))
    return other.key if other and other.laterality == sides[side] else ""


def _splines(size: int, intervals: int) -> Tensor:
    """Weights [H, P] of uniform cubic B-splines at the centres of `size` pixels over `intervals` + 3 control points."""
    place = (torch.arange(size) + 0.5) * intervals / size
    distance_HP = (place[:, None] + 1 - torch.arange(intervals + 3)).abs()
    near, far = 2 / 3 - distance_HP**2 + distance_HP**3 / 2, (2 - distance_HP).clamp(min=0) ** 3 / 6
    return torch.where(distance_HP < 1, near, far)


def _smooth(points_BCPP: Tensor, weights_HP: Tensor) -> Tensor:
    """The field [B, C, H, W] of these control points."""
    return weights_HP @ points_BCPP @ weights_HP.mT


def _coarsen(images_BSHW: Tensor, pixels_B: Tensor) -> Tensor:
    """Sampled at that many times fewer pixels along both axes, and interpolated again."""
    size = images_BSHW.shape[-1]
    count_B1 = (size / pixels_B).round().clamp(1, size)[:, None]
    pixel_H = torch.arange(size, device=pixels_B.device) + 0.5
    coarse = F.grid_sample(images_BSHW, _square(2 * pixel_H / count_B1 - 1), align_corners=False, padding_mode="border")
    place_BH = (pixel_H * count_B1 / size).clamp(min=0.5).minimum(count_B1 - 0.5)
    return F.grid_sample(coarse, _square(2 * place_BH / size - 1), align_corners=False)


def _square(line_BH: Tensor) -> Tensor:
    """The grid [B, H, W, 2] that has these coordinates along both axes."""
    x_BHW = line_BH[:, None, :].expand(-1, line_BH.shape[1], -1)
    return torch.stack([x_BHW, x_BHW.mT], -1)


def _occurs(drawn: Mapping[str, Tensor], name: str) -> bool:
    """Whether a transform changes any image; asked on the CPU, so that nothing waits for the device."""
    return bool((drawn[name] != _NEUTRAL.get(name, 0.0)).any())


def _each(values_B: Tensor) -> Tensor:
    return values_B[:, None, None, None]
