"""Pictures of what a run sees and does: masks on images, reconstructions, the shifts of an adversary."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

_COLOURS = ((230, 80, 60), (70, 130, 220), (240, 180, 40), (90, 180, 90), (160, 90, 200), (80, 190, 190))


def _patch_map(patches: Tensor, grid: tuple[int, int], height: int, width: int) -> Tensor:
    """Flat patch indices `[K]` as a boolean picture `[height, width]`."""
    chosen = torch.zeros(grid[0] * grid[1], dtype=torch.float32)
    chosen[patches] = 1.0
    return F.interpolate(chosen.reshape(1, 1, *grid), size=(height, width), mode="nearest")[0, 0].bool()


def enlarged(images: Tensor, side: int) -> Tensor:
    """Images `[B, C, H, W]` as float RGB (channels beyond three left out), enlarged to `side` without smoothing."""
    factor = max(1, -(-side // min(images.shape[-2:])))
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3).float()


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Pictures `[3, H, W]` side by side with a white frame each."""
    return torch.cat([F.pad(part, (2, 2, 2, 2), value=255) for part in parts], dim=2)


def draw_masks(
    images: Tensor, context: Tensor, targets: Tensor, grid: tuple[int, int], count: int = 8, side: int = 128
) -> Tensor:
    """One row an image: the crop, its context blocks, its target blocks in colour; uint8 `[3, rows, columns]`.

    `images` `[B, C, H, W]` uint8 (channels beyond three are left out), `context` `[E, B, Nc]`, `targets`
    `[T, B, Nt]`; small images are enlarged to `side` pixels without smoothing.
    """
    context, targets = context[:, :count].cpu(), targets[:, :count].cpu()
    images = enlarged(images[:count].cpu(), side)
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
        rows.append(side_by_side([image, known, painted]))
    return torch.cat(rows, dim=1).clamp(0, 255).to(torch.uint8)


def draw_reconstructions(
    images: Tensor, masked: Tensor, predicted: Tensor, grid: tuple[int, int], count: int = 8, side: int = 128
) -> Tensor:
    """One row an image: the crop, its visible patches, and these with the predicted ones; uint8 `[3, rows, columns]`.

    `images` and `predicted` are `[B, C, H, W]` in 0…255, `masked` `[B, N]` bool.
    """
    shown, painted = enlarged(images[:count].cpu(), side), enlarged(predicted[:count].cpu(), side)
    rows = []
    for image, hidden, guess in zip(shown, masked[:count].cpu(), painted, strict=True):
        hidden = _patch_map(hidden.nonzero().flatten(), grid, *image.shape[-2:])
        grey = torch.where(hidden, torch.full_like(image, 128.0), image)
        rows.append(side_by_side([image, grey, torch.where(hidden, guess, image)]))
    return torch.cat(rows, dim=1).clamp(0, 255).to(torch.uint8)


def draw_shifts(
    shifts: dict[str, Tensor], masked: Tensor, grid: tuple[int, int], side: int = 144, columns: int = 6
) -> Tensor:
    """An arrow field a layer: where each masked patch stands to the model; uint8 `[3, height, width]`.

    `shifts` are `[layers, 2]` in rows and columns of patches by name, `masked` is `[N]` bool. A visible patch
    is a dot.
    """
    panels = [
        (f"{name} {layer}", row)
        for name, rows in shifts.items()
        for layer, row in enumerate(rows.nan_to_num().tolist())  # to NaN, Pillow would draw for ever
    ]
    lines = math.ceil(len(panels) / columns)
    canvas = Image.new("RGB", (side * min(columns, len(panels)), (side + 16) * lines), "white")
    draw = ImageDraw.Draw(canvas)
    # Room for arrows that leave the grid, so that the same scale serves all panels.
    reach = max([1.0, *(abs(value) for _, row in panels for value in row)])
    scale = (side - 8) / (max(grid) + 2 * reach)
    for number, (title, (down, right)) in enumerate(panels):
        left, top = side * (number % columns), (side + 16) * (number // columns)
        draw.text((left + 4, top + 2), f"{title}: {down:+.2f}, {right:+.2f}", fill="black")
        for patch, hidden in sorted(enumerate(masked.tolist()), key=lambda each: each[1]):  # no dot covers an arrow
            row, column = divmod(patch, grid[1])
            x, y = left + 4 + (column + 0.5 + reach) * scale, top + 16 + (row + 0.5 + reach) * scale
            if hidden:
                _arrow(draw, x, y, x + right * scale, y + down * scale)
            else:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(150, 150, 150))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)


def _arrow(draw: ImageDraw.ImageDraw, x: float, y: float, to_x: float, to_y: float) -> None:
    draw.line((x, y, to_x, to_y), fill=_COLOURS[0], width=1)
    direction, head = math.atan2(to_y - y, to_x - x), min(4.0, math.hypot(to_x - x, to_y - y) / 2)
    for turn in (2.6, -2.6):
        end = (to_x + head * math.cos(direction + turn), to_y + head * math.sin(direction + turn))
        draw.line((to_x, to_y, *end), fill=_COLOURS[0], width=1)
