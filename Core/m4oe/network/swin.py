"""Swin transformer blocks for feature maps of any size (Liu et al., "Swin Transformer", ICCV 2021).

Shape suffixes: B image, H and W token rows and columns, C channel, M windows of one image, T tokens of a
window, N attention heads, D channels of a head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moe import MoEFeedForward, Routing

MASKED = -100.0


def window_partition(x_BHWC: Tensor, window: int) -> Tensor:
    """Cuts [B, H, W, C] into windows [B * M, T, C]; H and W are multiples of `window`."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def window_reverse(x_WTC: Tensor, window: int, height: int, width: int) -> Tensor:
    """Puts windows [B * M, T, C] back together as [B, H, W, C]: the inverse of `window_partition`."""
    x = x_WTC.view(-1, height // window, width // window, window, window, x_WTC.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x_WTC.shape[-1])


def _axis_regions(size: int, padded: int, shift: int) -> Tensor:
    """Number of the region of each position on one axis after padding and cyclic shift.

    Padding is a region of its own, so no real token ever looks at it; what the shift wraps around is another.
    """
    regions = (torch.arange(padded) >= size).long()
    if shift:
        regions[:shift] = 2
    return regions.roll(-shift)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # kept for later calls, which may train
def attention_mask(
    size: tuple[int, int], window: int, shift: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """Additive mask [M, T, T]: zero within a region, `MASKED` across; None where there is one region only."""
    padded = [-(-length // window) * window for length in size]
    if list(size) == padded and shift == (0, 0):
        return None
    rows, columns = (_axis_regions(*axis) for axis in zip(size, padded, shift, strict=True))
    regions_HW = rows[:, None] * 3 + columns[None, :]
    regions_MT = window_partition(regions_HW[None, :, :, None], window)[..., 0]
    differs_MTT = regions_MT[:, :, None] != regions_MT[:, None, :]
    return (differs_MTT * MASKED).to(device=device, dtype=dtype)


@lru_cache(maxsize=8)
@torch.inference_mode(mode=False)
def _relative_position_index(window: int, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of tokens of a window: [T * T]."""
    steps = torch.arange(window)
    position_2T = torch.stack(torch.meshgrid(steps, steps, indexing="ij")).flatten(1)
    offset_2TT = position_2T[:, :, None] - position_2T[:, None, :] + window - 1
    return (offset_2TT[0] * (2 * window - 1) + offset_2TT[1]).flatten().to(device)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias (equation 4)."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        """Builds attention of `heads` heads over windows of `window` x `window` tokens of `dim` channels."""
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_WTC: Tensor, mask_MTT: Tensor | None) -> Tensor:
        """Attends within each window of [B * M, T, C]; `mask_MTT` is added to the scores."""
        windows, tokens, channels = x_WTC.shape
        qkv = self.qkv(x_WTC).view(windows, tokens, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        table = self.relative_position_bias_table
        bias = table[_relative_position_index(self.window, table.device)]
        bias = bias.view(tokens, tokens, self.heads).permute(2, 0, 1)[None].to(query.dtype)
        if mask_MTT is not None:
            bias_MNTT = bias + mask_MTT[:, None].to(query.dtype)
            images = windows // len(mask_MTT)
            bias = bias_MNTT.expand(images, *bias_MNTT.shape).reshape(windows, *bias_MNTT.shape[1:])
        out_WNTD = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(out_WNTD.transpose(1, 2).reshape(windows, tokens, channels))


class DropPath(nn.Module):
    """Stochastic depth per image (Huang et al., ECCV 2016)."""

    def __init__(self, probability: float) -> None:
        """Builds a layer that drops a branch with this probability in training."""
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Zeroes whole images of [B, ...] at random and scales the others up, in training only."""
        if not self.training or self.probability == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.probability
        return x * keep.to(x.dtype) / (1 - self.probability)


class SwinBlock(nn.Module):
    """Window attention, then a feed-forward layer of experts, both as residual branches after layer norm."""

    def __init__(self, dim: int, heads: int, window: int, shifted: bool, ffn: MoEFeedForward, drop: float) -> None:
        """Builds a block; `shifted` moves the windows by half their size."""
        super().__init__()
        self.window = window
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = ffn
        self.drop_path = DropPath(drop)

    def forward(self, x_BHWC: Tensor, routing: Routing | None = None) -> Tensor:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        x_BHWC = x_BHWC + self.drop_path(self._attend(self.norm1(x_BHWC)))
        return x_BHWC + self.drop_path(self.ffn(self.norm2(x_BHWC), routing))

    def _attend(self, x_BHWC: Tensor) -> Tensor:
        """Pads before the cyclic shift: the other order would let padding wrap between opposite borders."""
        _, height, width, _ = x_BHWC.shape
        window = self.window
        shift = tuple(window // 2 if self.shifted and size > window else 0 for size in (height, width))
        mask = attention_mask((height, width), window, (shift[0], shift[1]), x_BHWC.device, torch.float32)
        x = _pad(x_BHWC, -height % window, -width % window)
        padded = x.shape[1:3]
        x = x.roll((-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        x = window_reverse(self.attn(window_partition(x, window), mask), window, *padded)
        x = x.roll(shift, (1, 2)) if any(shift) else x
        return x[:, :height, :width]


def _pad(x_BHWC: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(x_BHWC, (0, 0, 0, columns, 0, rows)) if rows or columns else x_BHWC  # F.pad by nothing copies


class PatchMerging(nn.Module):
    """Halves the feature map and doubles its channels (section 3.1)."""

    def __init__(self, dim: int) -> None:
        """Builds the layer for `dim` channels."""
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Maps [B, H, W, C] to [B, H / 2, W / 2, 2 C]; H and W are even."""
        batch, height, width, channels = x_BHWC.shape
        x = x_BHWC.view(batch, height // 2, 2, width // 2, 2, channels)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class PatchExpand(nn.Module):
    """Doubles the feature map and halves its channels (Cao et al., "Swin-Unet", 2021, section 3.4)."""

    def __init__(self, dim: int) -> None:
        """Builds the layer for `dim` channels."""
        super().__init__()
        self.expand = nn.Linear(dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Maps [B, H, W, C] to [B, 2 H, 2 W, C / 2]."""
        return self.norm(unfold_pixels(self.expand(x_BHWC), 2))


def unfold_pixels(x_BHWC: Tensor, factor: int) -> Tensor:
    """Moves channels into space: [B, H, W, factor^2 * C] to [B, factor * H, factor * W, C]."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.view(batch, height, width, factor, factor, channels // factor**2)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height * factor, width * factor, -1)
