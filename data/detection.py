"""Batches for detection: images placed on a canvas of one size, with boxes and masks moved along.

Large-scale jitter is that of Ghiasi et al. (Simple Copy-Paste, CVPR 2021) as ViTDet uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .batch import Batch
from .coco import CocoImages, mask_tools
from .decode import UnreadableImage
from .loader import read_or_replace
from .order import Request
from .streams import uniforms

_SMALLEST = 1e-3  # pixels: narrower boxes are left out


@dataclass(frozen=True)
class Placement:
    """Where an image lies on the canvas: perhaps mirrored, resized to `size` (rows, columns), cut from `start` on."""

    size: tuple[int, int]
    start: tuple[int, int] = (0, 0)
    mirrored: bool = False


def fitted(size: Sequence[int], canvas: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """`size` (height, width) at the largest scale that fits into `scale` times the canvas, 1 pixel at least."""
    factor = min(scale * canvas[0] / size[0], scale * canvas[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def jittered(
    size: Sequence[int], canvas: tuple[int, int], numbers: np.ndarray, scales: tuple[float, float], flip: float
) -> Placement:
    """The placement that four `numbers` in [0, 1) draw: mirrored, the scale between `scales`, and what is cut out."""
    resized = fitted(size, canvas, scales[0] + (scales[1] - scales[0]) * float(numbers[1]))
    start = [
        int(number * (max(0, side - room) + 1)) for number, side, room in zip(numbers[2:], resized, canvas, strict=True)
    ]
    return Placement(resized, (start[0], start[1]), bool(numbers[0] < flip))


def place_image(image: np.ndarray, where: Placement, canvas: tuple[int, int], fill: Tensor, mode: str) -> Tensor:
    """An image `[H, W, C]` uint8 on a canvas `[C, rows, columns]` uint8 that is `fill` `[C]` elsewhere.

    `mode` is bilinear or bicubic, with antialiasing.
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] if image.flags.writeable else \
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None]  # fmt: skip
    if where.mirrored:
        pixels = pixels.flip(3)
    if tuple(pixels.shape[2:]) != where.size:
        pixels = F.interpolate(pixels, size=where.size, mode=mode, antialias=True, align_corners=False)
    (top, left), out = where.start, fill[:, None, None].expand(-1, *canvas).clone()
    part = pixels[0, :, top : top + canvas[0], left : left + canvas[1]]
    out[:, : part.shape[1], : part.shape[2]] = part
    return out


def place_boxes(boxes: np.ndarray, size: Sequence[int], where: Placement, canvas: tuple[int, int]) -> np.ndarray:
    """Boxes `[n, 4]` (left, top, right, bottom) of an image of `size` on the canvas, cut to what is seen of them."""
    height, width = size
    if where.mirrored:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    scale = np.array([where.size[1] / width, where.size[0] / height] * 2)
    moved = boxes * scale - np.array([where.start[1], where.start[0]] * 2)
    return moved.clip(0, [canvas[1], canvas[0]] * 2)


def place_mask(outline: list | dict, size: Sequence[int], where: Placement, canvas: tuple[int, int]) -> np.ndarray:
    """The mask `[rows, columns]` uint8 on the canvas of polygons or a run-length code of an image of `size`."""
    tools, (height, width) = mask_tools(), size
    if isinstance(outline, list):
        across, down = where.size[1] / width, where.size[0] / height
        moved = []
        for polygon in outline:
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
            columns = width - points[:, 0] if where.mirrored else points[:, 0]
            points = np.stack([columns * across - where.start[1], points[:, 1] * down - where.start[0]], axis=1)
            moved.append(points.ravel().tolist())
        return tools.decode(tools.merge(tools.frPyObjects(moved, *canvas)))
    code = tools.frPyObjects(outline, height, width) if isinstance(outline["counts"], list) else outline
    mask = torch.from_numpy(tools.decode(code))
    mask = mask.flip(1) if where.mirrored else mask
    mask = F.interpolate(mask[None, None], size=where.size, mode="nearest-exact")[0, 0].numpy()
    out = np.zeros(canvas, dtype=np.uint8)
    part = mask[where.start[0] :, where.start[1] :][: canvas[0], : canvas[1]]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """The box `[n, 4]` of each mask `[n, rows, columns]` that is not empty."""
    out = np.zeros((len(masks), 4))
    for box, mask in zip(out, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return out


class DetectionBatches(Dataset[Batch]):
    """The micro-batch of each request: images by large-scale jitter on a canvas, and in `truth` what is seen there.

    Each has boxes `[n, 4]` float32, labels `[n]` int64 and, if `masks`, masks `[n, rows, columns]` uint8, from which
    the boxes are then taken. All is a function of (seed, epoch, sample id). `fill` are the pixels outside of an image.
    """

    def __init__(
        self,
        source: CocoImages,
        canvas: tuple[int, int],
        *,
        jitter: tuple[float, float],
        flip: float,
        interpolation: str,
        fill: Sequence[int],
        masks: bool,
        seed: int,
        on_error: str,
    ):
        self.source, self.canvas, self.jitter, self.flip = source, canvas, jitter, flip
        self.interpolation, self.fill = interpolation, torch.tensor(fill, dtype=torch.uint8)
        self.masks, self.seed, self.on_error = masks, seed, on_error

    def __getitem__(self, request: Request) -> Batch:
        images, truth, ids, skipped = [], [], request.ids.copy(), []
        for row, (epoch, wanted) in enumerate(zip(request.epochs.tolist(), request.ids.tolist(), strict=True)):
            image, i = read_or_replace(self.source, self.seed, epoch, wanted, self.on_error, skipped)
            ids[row] = i
            numbers = uniforms(self.seed, "jitter", epoch, np.array([i]), 4)[0]
            where = jittered(image.shape[:2], self.canvas, numbers, self.jitter, self.flip)
            images.append(place_image(image, where, self.canvas, self.fill, self.interpolation))
            truth.append(self.truth(i, where))
        return Batch(
            images=torch.stack(images),
            sample_ids=torch.from_numpy(ids),
            labels=torch.full((len(ids),), -1),
            epochs=torch.from_numpy(request.epochs),
            step=request.step,
            truth=truth,
            skipped=skipped,
        )

    def truth(self, i: int, where: Placement) -> dict[str, Tensor]:
        """What is seen of the objects of image `i`, placed so."""
        boxes, labels, outlines = self.source.objects(i)
        size = self.source.sizes[i].tolist()
        boxes = place_boxes(boxes, size, where, self.canvas)
        seen = np.all(boxes[:, 2:] - boxes[:, :2] > _SMALLEST, axis=1)
        out: dict[str, np.ndarray] = {}
        if self.masks:
            masks = [place_mask(outlines[k], size, where, self.canvas) for k in np.flatnonzero(seen)]
            seen[np.flatnonzero(seen)] = [mask.any() for mask in masks]
            masks = [mask for mask in masks if mask.any()]
            out["masks"] = np.stack(masks) if masks else np.zeros((0, *self.canvas), np.uint8)
            boxes = boxes_of(out["masks"])
        else:
            boxes = boxes[seen]
        out |= {"boxes": boxes.astype(np.float32), "labels": labels[seen]}
        return {name: torch.from_numpy(array) for name, array in out.items()}


class WholeImages(Dataset):
    """Images `indices` of a source as they are measured: as large as fits on the canvas, upper left.

    Each gives (canvas `[C, rows, columns]` uint8, `[2]` filled, `[2]` own size, index); for an image that cannot be
    read the index alone, or with `on_error` "stop" a sentence.
    """

    def __init__(
        self, source: CocoImages, indices: np.ndarray, canvas: tuple[int, int], interpolation: str,
        fill: Sequence[int], on_error: str,
    ):  # fmt: skip
        self.source, self.indices, self.canvas, self.interpolation = source, indices, canvas, interpolation
        self.fill, self.on_error = torch.tensor(fill, dtype=torch.uint8), on_error

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, Tensor, int] | int | str:
        i = int(self.indices[place])
        try:
            image = self.source.read(i)
        except UnreadableImage as error:
            return i if self.on_error == "skip" else f"An image cannot be read ({error}): repair or remove it."
        where = Placement(fitted(image.shape[:2], self.canvas))
        placed = place_image(image, where, self.canvas, self.fill, self.interpolation)
        return placed, torch.tensor(where.size), torch.tensor(image.shape[:2]), i


def stack_whole(items: list) -> tuple[Tensor, Tensor, Tensor, list[int], int] | str:
    """Of items of `WholeImages` the stacked images, filled parts and sizes, indices, and how many are unreadable.

    In their place the sentence of one that stops.
    """
    for item in items:
        if isinstance(item, str):
            return item
    read = [item for item in items if not isinstance(item, int)]
    if not read:
        return torch.empty(0), torch.empty(0), torch.empty(0), [], len(items)
    images, filled, sizes, indices = zip(*read, strict=True)
    return torch.stack(images), torch.stack(filled), torch.stack(sizes), list(indices), len(items) - len(read)
