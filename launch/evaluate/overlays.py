"""Label maps in colours, over the images that they are of."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

IGNORED = 255
_ROW = 16  # pixels of a legend's line


def palette(classes: int) -> np.ndarray:
    """A colour for each class, uint8 `[classes, 3]`: hues a golden section apart, in three lightnesses."""
    found = [colorsys.hls_to_rgb(i * 0.61803399 % 1.0, (0.5, 0.35, 0.7)[i % 3], 0.9) for i in range(classes)]
    return np.rint(255 * np.array(found).reshape(-1, 3)).astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """uint8 `[H, W, 3]`: the image in grey under the colours of its labels `[H, W]`; ignored pixels stay."""
    rgb = _rgb(image).astype(np.float32)
    grey = rgb.mean(axis=2, keepdims=True)
    table = np.zeros((256, 3), dtype=np.float32)
    table[: len(colours)] = colours
    mixed = (1 - strength) * grey + strength * table[labels]
    return np.rint(np.where((labels == IGNORED)[..., None], rgb, mixed)).astype(np.uint8)


def map_panels(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Side by side the image, its mask and the prediction, with white frames; uint8 `[·, ·, 3]`.

    `image` is uint8 `[H, W, C]`, `truth` and `predicted` are labels `[H, W]`.
    """
    panels = [_rgb(image), overlay(image, truth, colours), overlay(image, predicted, colours)]
    return np.concatenate([np.pad(panel, ((2, 2), (2, 2), (0, 0)), constant_values=255) for panel in panels], axis=1)


def draw_maps(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """`map_panels` above the names of the classes that are there."""
    colours = palette(len(names))
    rows = map_panels(image, truth, predicted, colours)
    there = [i for i in np.unique(np.concatenate([truth.ravel(), predicted.ravel()])) if i != IGNORED]
    columns = max(1, rows.shape[1] // 130)
    legend = Image.new("RGB", (rows.shape[1], _ROW * -(-len(there) // columns)), "white")
    pen = ImageDraw.Draw(legend)
    for place, label in enumerate(there):
        x, y = 4 + 130 * (place % columns), _ROW * (place // columns)
        pen.rectangle((x, y + 3, x + 9, y + 12), fill=tuple(int(c) for c in colours[label]))
        pen.text((x + 14, y + 2), names[int(label)][:18], fill="black")
    return np.concatenate([rows, np.asarray(legend)], axis=0)


def _rgb(image: np.ndarray) -> np.ndarray:
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)
