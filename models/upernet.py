"""UperNet on a plain vision transformer: a pyramid from four depths, pyramid pooling, fusion (Xiao et al., 2018).

The pyramid is that of BEiT's and MAE's ADE20K recipes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch_norm import SyncedBatchNorm

POOLS = (1, 2, 3, 6)
NORMS = ("group", "batch")


def norm_of(kind: str, channels: int) -> nn.Module:
    """GroupNorm of up to 32 groups of 8 channels or more, or BatchNorm over all ranks; ValueError for others."""
    if kind not in NORMS:
        raise ValueError(f"method.segmenter.norm={kind!r} is not known; choose one of {', '.join(NORMS)}.")
    if kind == "batch":
        return SyncedBatchNorm(channels)
    groups = math.gcd(32, channels)
    while groups > 1 and channels < 8 * groups:  # a pooled map of one pixel has no more than its group's channels
        groups //= 2
    return nn.GroupNorm(groups, channels)


def convolution(inputs: int, outputs: int, kernel: int, norm: str) -> nn.Sequential:
    """Convolution without bias that keeps height and width, norm, ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, norm_of(norm, outputs), nn.ReLU())


def resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Maps `[B, C, h, w]` at another height and width, bilinear between pixel centres."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """Four maps `[B, D, rows, columns]` of one grid to four scales: ×4, ×2, ×1 and ×½ of the grid."""

    def __init__(self, width: int, norm: str):
        super().__init__()

        def double() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.quadrupled = nn.Sequential(double(), norm_of(norm, width), nn.GELU(), double())
        self.doubled = double()

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        # A last odd row or column is pooled with what is there of it.
        return [self.quadrupled(first), self.doubled(second), third, F.max_pool2d(fourth, 2, ceil_mode=True)]


class UperHead(nn.Module):
    """The four maps of a pyramid `[B, width, ·, ·]` fused to features `[B, channels, ·, ·]` at the finest scale."""

    def __init__(self, width: int, channels: int, norm: str):
        super().__init__()
        self.pools = nn.ModuleList(convolution(width, channels, 1, norm) for _ in POOLS)
        self.pooled = convolution(width + len(POOLS) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(convolution(width, channels, 1, norm) for _ in range(3))
        self.smooths = nn.ModuleList(convolution(channels, channels, 3, norm) for _ in range(3))
        self.fused = convolution(4 * channels, channels, 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        coarse = maps[-1]
        pooled = [
            resized(pool(F.adaptive_avg_pool2d(coarse, side)), coarse.shape[-2:])
            for side, pool in zip(POOLS, self.pools, strict=True)
        ]
        levels = [lateral(one) for lateral, one in zip(self.laterals, maps, strict=False)]
        levels.append(self.pooled(torch.cat([coarse, *pooled], dim=1)))
        for finer in (2, 1, 0):
            levels[finer] = levels[finer] + resized(levels[finer + 1], levels[finer].shape[-2:])
        levels[:3] = [smooth(level) for smooth, level in zip(self.smooths, levels, strict=False)]
        return self.fused(torch.cat([resized(level, levels[0].shape[-2:]) for level in levels], dim=1))

    def flops(self, sizes: Sequence[tuple[int, int]]) -> float:
        """Floating-point operations of a forward on one image's maps of `sizes` (rows, columns)."""
        weights = [sum(p.numel() for p in part.parameters() if p.ndim == 4) for part in (self.pooled, self.fused)]
        areas = [rows * columns for rows, columns in sizes]
        found = 2.0 * (weights[0] * areas[3] + weights[1] * areas[0])
        for area, lateral, smooth in zip(areas, self.laterals, self.smooths, strict=False):
            found += 2.0 * area * sum(p.numel() for m in (lateral, smooth) for p in m.parameters() if p.ndim == 4)
        return found
