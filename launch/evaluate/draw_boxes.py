"""Detections drawn on their image: boxes, names and scores, masks in colour."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor


def colour_of(label: int) -> tuple[int, int, int]:
    """A bright colour for a label, far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: np.ndarray, found: dict[str, Tensor], names: Sequence[str], least: float = 0.5
) -> Image.Image:
    """The image `[H, W, 1 or 3]` uint8 with the detections (see `Detector.predict`) of a score of `least` or more."""
    pixels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[:, :, :3]
    chosen = (found["scores"] >= least).nonzero()[:, 0].tolist()[::-1]  # the best on top
    painted = pixels.astype(np.float32)
    for one in chosen if "masks" in found else []:
        mask = found["masks"][one].cpu().numpy()
        painted[mask] = 0.55 * painted[mask] + 0.45 * np.array(colour_of(int(found["labels"][one])), np.float32)
    picture = Image.fromarray(painted.round().astype(np.uint8))
    pen, line = ImageDraw.Draw(picture), max(1, round(min(picture.size) / 250))
    for one in chosen:
        label, box = int(found["labels"][one]), found["boxes"][one].tolist()
        pen.rectangle(box, outline=colour_of(label), width=line)
        text = f"{names[label - 1]} {float(found['scores'][one]):.2f}"
        _, _, _, height = pen.textbbox((0, 0), text)
        corner = (box[0], box[1] - height - line if box[1] > height + line else box[1] + line)  # above, where it fits
        pen.rectangle(pen.textbbox(corner, text), fill=colour_of(label))
        pen.text(corner, text, fill=(0, 0, 0))
    return picture
