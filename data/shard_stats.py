"""What a set of shards holds: counts, sizes, the balance of classes, mean and std, and a sheet to look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .decode import UnreadableImage, to_channels
from .images import DataError
from .pixel_moments import chosen, pixel_moments
from .shards import ShardPath, Shards

_TILE = 96  # pixels of a picture on the sheet
_GAP = 4
Progress = Callable[[int, int], None]


@dataclass
class Stats:
    """What `measure` found; `mean` and `std` are per channel in 0…1, where every image counts the same."""

    shards: int
    samples: int
    bytes: int  # of the tars
    image_bytes: tuple[int, int, int]  # least, median, most
    labels: dict[str, int]  # images of each class, by its name or number; those without a label under "none"
    channels: int
    measured: int = 0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    sides: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # height and width: least, median, most
    unreadable: list[str] = field(default_factory=list)


def _spread(values: Any) -> tuple[int, int, int]:
    low, middle, high = np.quantile(np.asarray(values), (0, 0.5, 1), method="nearest")
    return int(low), int(middle), int(high)


def _labels(shards: Shards) -> dict[str, int]:
    values, counts = np.unique(shards.labels, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    names = {-1: "none", **{i: name for i, name in enumerate(shards.classes or ())}}
    everything = sorted({*found, *range(len(shards.classes or ()))})
    return {names.get(label, str(label)): found.get(label, 0) for label in everything}


def measure(path: ShardPath, split: str | None = None, *, sample: int | None = 2000, threads: int = 1,
            progress: Progress | None = None) -> Stats:  # fmt: skip
    """Count what `path` holds (see `Shards`) and measure `sample` of its images, always the same ones; None: all.

    `progress(images, of)` is called after each. Raises DataError for shards that do not open, and where none of the
    images chosen can be read.
    """
    if sample is not None and sample < 1:
        raise DataError(f"--sample {sample} is out of range: choose 1 or more.")
    shards = Shards(path, split)
    size = sum(os.stat(tar).st_size for tar in shards.paths)
    stats = Stats(len(shards.paths), len(shards), size, _spread(shards.sizes), _labels(shards), shards.channels)
    found = pixel_moments(shards, chosen(len(shards), sample), threads, progress)
    stats.measured, stats.mean, stats.std = len(found.heights), found.mean, found.std
    stats.sides = {"height": _spread(found.heights), "width": _spread(found.widths)}
    stats.unreadable = found.unreadable
    return stats


def contact_sheet(path: ShardPath, split: str | None = None, *, columns: int = 12, rows: int = 8) -> Image.Image:
    """Thumbnails of some images, always the same ones, row by row in the order of the shards.

    The first three channels of images with more are shown; unreadable ones are red. Raises DataError as `Shards`.
    """
    shards = Shards(path, split)
    places = chosen(len(shards), columns * rows)
    step = _TILE + _GAP
    rows = -(-len(places) // columns)
    sheet = Image.new("RGB", (columns * step + _GAP, rows * step + _GAP), "white")
    for place, i in enumerate(places):
        try:
            pixels = shards.read(i)
            tile = Image.fromarray(to_channels(pixels, 3) if pixels.shape[2] in (1, 3) else _three(pixels))
        except UnreadableImage:
            tile = Image.new("RGB", (_TILE, _TILE), "red")
        # Small images are shown larger, with their pixels to be seen.
        scale = _TILE / max(tile.size)
        size = max(1, round(tile.width * scale)), max(1, round(tile.height * scale))
        tile = tile.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
        x = _GAP + place % columns * step + (_TILE - tile.width) // 2
        sheet.paste(tile, (x, _GAP + place // columns * step + (_TILE - tile.height) // 2))
    return sheet


def _three(pixels: np.ndarray) -> np.ndarray:
    """The first three channels; the first alone where there are two."""
    return np.ascontiguousarray(pixels[..., :3]) if pixels.shape[2] > 2 else np.repeat(pixels[..., :1], 3, axis=2)
