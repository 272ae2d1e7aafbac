"""Batches for benchmarks that need no images: random pixels with the recipe's masks, or with something to find."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from .build import build_masks
from .config import Config
from .world import World

OBJECTS = 7  # on each image of a detector's batch, about as many as COCO has


def fixed_batches(config: Config, world: World, batch: int, count: int = 4) -> list[Batch]:
    """Batches of random pixels with the recipe's masks or random truth, other ones on each rank, on its device."""
    grid = tuple(side // config.model.patch_size for side in config.model.image_size)
    masks = build_masks(config, grid)  # pyright: ignore[reportArgumentType]
    views = (config.data.views,) if config.data.views > 1 else ()
    shape = (batch, *views, config.model.channels, *config.model.image_size)
    generator = torch.Generator().manual_seed(config.seed + world.rank)
    out = []
    for number in range(count):
        ids = (number * world.size + world.rank) * batch + np.arange(batch)
        drawn = masks(config.seed, 0, 0, ids) if masks else None
        parts: dict[str, Any] = {name: getattr(drawn, name, None) for name in ("context", "targets", "visible")}
        parts = {name: torch.from_numpy(part) for name, part in parts.items() if part is not None}
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        zeros = torch.zeros(batch, dtype=torch.int64)
        made = Batch(
            images=images, sample_ids=torch.from_numpy(ids), labels=zeros, epochs=zeros.clone(), step=number,
            truth=_truth(config, batch, generator), **parts,
        )  # fmt: skip
        out.append(made.to(world.device))
    return out


def _truth(config: Config, batch: int, generator: torch.Generator) -> Tensor | list[dict[str, Tensor]] | None:
    """What a task is to find: a class for each patch, or `OBJECTS` boxes of random sizes, filled by their masks."""
    size, patch = config.model.image_size, config.model.patch_size
    if config.method.kind == "segment":
        rows, columns = (-(-side // patch) for side in size)
        drawn = torch.randint(config.method.segmenter.classes or 150, (batch, rows, columns), generator=generator)
        maps = drawn.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
        return maps[:, : size[0], : size[1]].contiguous()
    if config.method.kind != "detect":
        return None
    section, found = config.method.detector, []
    for _ in range(batch):
        sides = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
        spans = 0.05 * 12.0 ** torch.rand(OBJECTS, 2, generator=generator)  # 5 to 60 % of a side
        starts = (1 - spans) * torch.rand(OBJECTS, 2, generator=generator)
        boxes = torch.cat([starts, starts + spans], dim=1) * sides
        one = {"boxes": boxes, "labels": torch.randint(1, (section.classes or 80) + 1, (OBJECTS,), generator=generator)}
        if section.masks:
            one["masks"] = torch.zeros(OBJECTS, *size, dtype=torch.uint8)
            for mask, box in zip(one["masks"], boxes.tolist(), strict=True):
                left, top, right, bottom = (int(edge) for edge in box)
                mask[top : bottom + 1, left : right + 1] = 1
        found.append(one)
    return found
