"""Pictures of what a run sees: images with their context and target masks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_COLOURS = ((230, 80, 60), (70, 130, 220), (240, 180, 40), (90, 180, 90), (160, 90, 200), (80, 190, 190))


def _patch_map(patches: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Flat patch indices `[K]` as a boolean picture `[height, width]`."""
    chosen = torch.zeros(grid[0] * grid[1], dtype=torch.float32)
    chosen[patches] = 1.0
    return F.interpolate(chosen.reshape(1, 1, *grid), size=(height, width), mode="nearest")[0, 0].bool()


def draw_masks(
    images: Tensor, context: Tensor, targets: Tensor, grid: tuple[int, int], count: int = 8, side: int = 128
) -> Tensor:
    """One row an image: the crop, its context blocks, its target blocks in colour; uint8 `[3, rows, columns]`.

    `images` `[B, C, H, W]` uint8 (channels beyond three are left out), `context` `[E, B, Nc]`, `targets`
    `[T, B, Nt]`; small images are enlarged to `side` pixels without smoothing.
    """
    images, context, targets = images[:count].cpu(), context[:, :count].cpu(), targets[:, :count].cpu()
    factor = max(1, -(-side // min(images.shape[-2:])))
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3).float()
    height, width = images.shape[-2:]
    rows = []
    for i, image in enumerate(images):
        seen = torch.zeros(height, width, dtype=torch.bool)
        for block in context[:, i]:
            seen |= _patch_map(block, grid, height, width)
        known = torch.where(seen, image, 255 - 0.15 * (255 - image))
        painted = image * 0.35 + 255 * 0.65
        for t, block in enumerate(targets[:, i]):
            colour = torch.tensor(_COLOURS[t % len(_COLOURS)], dtype=torch.float32)[:, None, None]
            painted = torch.where(_patch_map(block, grid, height, width), 0.6 * image + 0.4 * colour, painted)
        rows.append(torch.cat([F.pad(part, (2, 2, 2, 2), value=255) for part in (image, known, painted)], dim=2))
    return torch.cat(rows, dim=1).clamp(0, 255).to(torch.uint8)
