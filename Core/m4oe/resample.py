"""Between a volume's own grid and the canonical grid that the network sees, slab by slab and on the device.

Both grids share their outer borders and, up to a permutation and flips, their axes: an oblique volume keeps its own
slice planes. Shape suffixes: Z slice, H and W row and column of the canonical grid, K class; J and I row and column
of the volume; P pixel.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import CANONICAL_AXES, Volume
from .modality import finite_sample
from .spec import IntensityRule

_SCORES_AT_ONCE = 1 << 22


class CanonicalVolume:
    """A volume as the network sees it, computed on demand: nearest axis order, model spacing, intensity in [0, 1].

    Attributes:
        shape: Slices, rows and columns (Z, H, W) of the canonical grid.
        source: The volume in canonical axis order: a view, in its own type.
    """

    def __init__(
        self,
        volume: Volume,
        pixel_mm: float,
        slice_mm: float,
        rule: IntensityRule,
        offset: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepares the mapping; nothing of the volume is copied.

        Args:
            volume: Volume of any type and orientation.
            pixel_mm: In-plane spacing of the canonical grid.
            slice_mm: Its slice spacing; thicker slices stay as they are.
            rule: How intensities are mapped to [0, 1].
            offset: Added to the stored values first.
            device: Where slices are computed.
        """
        self.source = volume.to_axes(CANONICAL_AXES)
        self.device = torch.device(device)
        spacing = self.source.grid.spacing
        wanted = (max(slice_mm, spacing[2]), pixel_mm, pixel_mm)
        extents = [size * step for size, step in zip(self.source.grid.shape, spacing[::-1], strict=True)]
        slices, rows, columns = (_count(extent / step) for extent, step in zip(extents, wanted, strict=True))
        self.shape = (slices, rows, columns)
        self.offset = offset
        self.low, self.high = _bounds(self.source.array, rule, offset)

    def slices(self, start: int, stop: int) -> Tensor:
        """Canonical slices [Z, H, W] of the range [start, stop), float32 in [0, 1]; NaN becomes 0."""
        first, last, weights_ZS = self._slice_weights(start, stop)
        slab = np.array(self.source.array[first:last], dtype=np.float32, order="C")
        x_SJI = torch.from_numpy(slab).to(self.device)
        x_SJI.add_(self.offset - self.low).div_(self.high - self.low).clamp_(0, 1).nan_to_num_(0.0)
        x_SHW = F.interpolate(x_SJI[:, None], self.shape[1:], mode="bilinear", antialias=True)[:, 0]
        return torch.tensordot(weights_ZS.to(self.device), x_SHW, 1) if weights_ZS is not None else x_SHW

    def stacks(self, start: int, stop: int, channels: int) -> Tensor:
        """Slices with their neighbours as channels: [Z, channels, H, W]; the border slice is its own neighbour."""
        reach = channels // 2
        first, last = max(0, start - reach), min(self.shape[0], stop + reach)
        x_ZHW = self.slices(first, last)
        wanted = torch.arange(start, stop)[:, None] + torch.arange(channels)[None, :] - reach
        return x_ZHW[(wanted.clamp(0, self.shape[0] - 1) - first).to(self.device)]

    def labels(self, labels: Volume) -> np.ndarray:
        """A label map of the same grid at the canonical voxels' centres, by nearest neighbour: [Z, H, W].

        Raises:
            ValueError: The label map lies on another grid.
        """
        if not self.source.grid.is_close(labels.grid.to_axes(CANONICAL_AXES)):
            raise ValueError("the label map lies on another grid than its image; resample it first")
        array = labels.to_axes(CANONICAL_AXES).array
        nearest = [
            np.floor((np.arange(coarse) + 0.5) * fine / coarse).astype(int)
            for coarse, fine in zip(self.shape, array.shape, strict=True)
        ]
        return np.ascontiguousarray(array[np.ix_(*nearest)])

    def _slice_weights(self, start: int, stop: int) -> tuple[int, int, Tensor | None]:
        """Source slices [first, last) behind a range, and their weights: a triangle as wide as the step."""
        count = self.source.grid.shape[0]
        if count == self.shape[0]:
            return start, stop, None
        step = count / self.shape[0]
        centres_Z = (torch.arange(start, stop) + 0.5) * step - 0.5
        first = max(0, int(np.floor(float(centres_Z[0]) - step)))
        last = min(count, int(np.ceil(float(centres_Z[-1]) + step)) + 1)
        distance_ZS = (centres_Z[:, None] - torch.arange(first, last)[None, :]).abs()
        weights_ZS = (1 - distance_ZS / step).clamp(min=0)
        return first, last, weights_ZS / weights_ZS.sum(1, keepdim=True)


class LabelPainter:
    """Brings scores of canonical slices back to the volume's grid and keeps only the best class of each voxel.

    Scores are interpolated, not labels. Where the four pixels around a voxel agree on the best class, so does any
    mean of them; only the others are interpolated, which is exact and several times faster.
    """

    def __init__(self, shape: tuple[int, int, int], canonical: tuple[int, int, int], labels: np.ndarray) -> None:
        """Prepares to fill `labels`.

        Args:
            shape: Slices, rows and columns of the volume in canonical axis order.
            canonical: Those of the canonical grid.
            labels: Array of `shape`, any strides, unsigned, that receives the labels.
        """
        self.canonical = canonical
        self.labels = labels
        self.position_Z = _positions(shape[0], canonical[0])
        self.rows, self.columns = _positions(shape[1], canonical[1]), _positions(shape[2], canonical[2])
        self.received = 0
        self.painted = 0
        self.last_1HWK: Tensor | None = None

    def add(self, scores_ZHWK: Tensor) -> None:
        """Takes the scores of the next canonical slices and paints every slice of the volume they complete."""
        known = scores_ZHWK if self.last_1HWK is None else torch.cat([self.last_1HWK, scores_ZHWK])
        first = self.received - (self.last_1HWK is not None)
        self.received += len(scores_ZHWK)
        complete = len(self.position_Z) if self.received == self.canonical[0] else self._reached(self.received - 1)
        for start in range(self.painted, complete, len(known)):
            stop = min(start + len(known), complete)
            self.labels[start:stop] = self._paint(known, self.position_Z[start:stop] - first).cpu().numpy()
        self.painted = complete
        self.last_1HWK = known[-1:]

    def _reached(self, position: int) -> int:
        return int((self.position_Z <= position).sum())

    def _paint(self, known_ZHWK: Tensor, position_Z: Tensor) -> Tensor:
        below = position_Z.floor().long()
        above = (below + 1).clamp(max=len(known_ZHWK) - 1)
        share = (position_Z - below).to(known_ZHWK)[:, None, None, None]
        return self._in_plane(known_ZHWK[below].lerp(known_ZHWK[above], share))

    def _in_plane(self, scores_ZHWK: Tensor) -> Tensor:
        return upsampled_argmax(scores_ZHWK, self.rows, self.columns)


class FieldPainter(LabelPainter):
    """Brings one number per voxel, in [0, 255] and with K = 1, to the volume's grid by linear interpolation."""

    def _in_plane(self, scores_ZHWK: Tensor) -> Tensor:
        size = (len(self.rows), len(self.columns))
        field_ZJI = F.interpolate(scores_ZHWK.permute(0, 3, 1, 2), size, mode="bilinear")[:, 0]
        return field_ZJI.round().to(torch.uint8)


def upsampled_argmax(scores_ZHWK: Tensor, rows_J: Tensor, columns_I: Tensor) -> Tensor:
    """Best class [Z, J, I] (uint8) of scores interpolated bilinearly at rows and columns.

    Args:
        scores_ZHWK: Scores on the coarse grid.
        rows_J: Fractional row of each fine row, in [0, H - 1].
        columns_I: Fractional column of each fine column, in [0, W - 1].
    """
    device = scores_ZHWK.device
    top_J, left_I = rows_J.floor().long().to(device), columns_I.floor().long().to(device)
    best_ZHW = scores_ZHWK.max(-1).indices.to(torch.uint8)
    padded = F.pad(best_ZHW[:, None].float(), (0, 1, 0, 1), mode="replicate")[:, 0].to(best_ZHW.dtype)
    mixed_ZHW = (best_ZHW != padded[:, :-1, 1:]) | (best_ZHW != padded[:, 1:, :-1]) | (best_ZHW != padded[:, 1:, 1:])
    labels_ZJI = best_ZHW[:, top_J][:, :, left_I]
    pixels = mixed_ZHW[:, top_J][:, :, left_I].nonzero()
    down_J = rows_J.frac().to(device, scores_ZHWK.dtype)
    right_I = columns_I.frac().to(device, scores_ZHWK.dtype)
    at_once = max(1, _SCORES_AT_ONCE // scores_ZHWK.shape[-1])
    for z, j, i in (chunk.unbind(1) for chunk in pixels.split(at_once)):
        scores_PK = _bilinear(scores_ZHWK, z, top_J[j], left_I[i], down_J[j, None], right_I[i, None])
        labels_ZJI[z, j, i] = scores_PK.max(-1).indices.to(labels_ZJI.dtype)
    return labels_ZJI


def _bilinear(scores_ZHWK: Tensor, z: Tensor, top: Tensor, left: Tensor, down_P1: Tensor, right_P1: Tensor) -> Tensor:
    _, height, width, classes = scores_ZHWK.shape
    flat_PK = scores_ZHWK.reshape(-1, classes)
    below, beside = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    corner = lambda row, column: flat_PK[(z * height + row) * width + column]  # noqa: E731
    upper = corner(top, left).lerp_(corner(top, beside), right_P1)
    lower = corner(below, left).lerp_(corner(below, beside), right_P1)
    return upper.lerp_(lower, down_P1)


def _count(voxels: float) -> int:
    """Rounds half up with some slack, as the spacing of an oblique affine has rounding errors."""
    return max(1, int(voxels + 0.5 + 1e-4))


def _positions(fine: int, coarse: int) -> Tensor:
    """Fractional coarse index of each fine voxel's centre when both grids share their outer borders."""
    return ((torch.arange(fine, dtype=torch.float64) + 0.5) * coarse / fine - 0.5).clamp(0, coarse - 1)


def _bounds(array: np.ndarray, rule: IntensityRule, offset: float) -> tuple[float, float]:
    if rule.kind == "window":
        return rule.low, rule.high
    sample = finite_sample(array)
    sample = sample[sample != 0]
    low, high = np.percentile(sample, [rule.low, rule.high]) + offset if sample.size else (0.0, 1.0)
    return float(low), float(max(high, low + 1e-6 * max(1.0, abs(low))))
