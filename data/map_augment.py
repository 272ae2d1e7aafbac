"""The training views of segmentation: ADE20K's pipeline, every number of it keyed by sample; and batches of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .augment import resize
from .batch import Batch
from .loader import read_or_replace
from .order import Request
from .segmentation import IGNORED, Maps, read_pair
from .streams import uniforms

_TRIES = 10  # of a crop that is not of one class
_NUMBERS = 1 + 2 * _TRIES + 1 + 9  # scale, places, flip, distortion


def fitted(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int]:
    """(height, width) of an image resized into `scale` (long side, short side), its proportions kept."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Labels `[H, W]` uint8 at another size, each the nearest by pixel centres."""
    if labels.shape == tuple(size):
        return labels
    maps = torch.from_numpy(np.array(labels, order="C"))[None, None]
    return torch.nn.functional.interpolate(maps, size=tuple(size), mode="nearest-exact")[0, 0].numpy()


def distort(image: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue of uint8 `[H, W, C]` changed, each with a chance of ½ (Liu et al., SSD).

    Brightness by up to ±32, contrast and saturation by 0.5 … 1.5, hue by up to ±36°; contrast comes second or last.
    `u` holds nine uniform numbers. Images that are not RGB keep saturation and hue.
    """

    def contrast(pixels: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(pixels * np.float32(0.5 + u[4])), 0, 255).astype(np.uint8) if u[3] < 0.5 else pixels

    if u[0] < 0.5:
        image = np.clip(image.astype(np.float32) + np.rint(64 * u[1] - 32), 0, 255).astype(np.uint8)
    first = u[2] < 0.5
    image = contrast(image) if first else image
    if image.shape[2] == 3 and (u[5] < 0.5 or u[7] < 0.5):
        hue, saturation, value = Image.fromarray(image).convert("HSV").split()
        if u[5] < 0.5:
            stronger = np.asarray(saturation).astype(np.float32) * np.float32(0.5 + u[6])
            saturation = Image.fromarray(np.clip(np.rint(stronger), 0, 255).astype(np.uint8))
        if u[7] < 0.5:  # a circle of 256
            hue = Image.fromarray(np.asarray(hue) + np.uint8(round((u[8] - 0.5) * 51.2) % 256))
        image = np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))
    return image if first else contrast(image)


@dataclass(frozen=True, kw_only=True)
class MapAugment:
    """Random resize, crop, flip and distortion of an image and its labels, padded to `size` (height, width).

    An image is resized into `scale` (long and short side, pixels) times a factor drawn from `resize`. Of ten crops the
    first is taken in which no class has more than `most_of_one_class` of the labelled pixels, else the last. `fill` is
    the padding's colour per channel, beside `IGNORED` labels. Raises ValueError for values out of range.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    resize: tuple[float, float] = (0.5, 2.0)
    most_of_one_class: float = 0.75
    flip: float = 0.5
    distort: bool = True
    fill: tuple[int, ...] = (124, 116, 104)
    interpolation: str = "bilinear"

    on_device = False  # nothing is left for a batch on the device

    def __post_init__(self):
        if not 0 < self.resize[0] <= self.resize[1]:
            raise ValueError(f"data.maps.resize={self.resize} are factors: choose 0 < low <= high.")
        if not 0 < self.most_of_one_class <= 1:
            raise ValueError(f"data.maps.most_of_one_class={self.most_of_one_class} is a share: choose 0 … 1, not 0.")

    def numbers(self, seed: int, epochs: np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
        """The uniform numbers of samples `[B]` in `epochs` `[B]`: `[B, 31]`."""
        return uniforms(seed, "label maps", epochs, sample_ids, _NUMBERS)

    def __call__(self, image: np.ndarray, labels: np.ndarray, u: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 `[H, W, C]` and `[H, W]` -> uint8 `[C, *size]` and int64 `[*size]`, by their 31 numbers."""
        factor = self.resize[0] + (self.resize[1] - self.resize[0]) * u[0]
        size = fitted(*labels.shape, (self.scale[0] * factor, self.scale[1] * factor))  # pyright: ignore
        labels = resize_labels(labels, size)
        top, left = self._place(labels, u[1 : 1 + 2 * _TRIES])
        height, width = min(self.size[0], size[0]), min(self.size[1], size[1])
        labels = labels[top : top + height, left : left + width]
        pixels = resize(image, size, self.interpolation)[:, top : top + height, left : left + width]
        image = pixels.permute(1, 2, 0).numpy()
        if u[1 + 2 * _TRIES] < self.flip:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if self.distort:
            image = distort(np.ascontiguousarray(image), u[2 + 2 * _TRIES :])
        return padded(image, self.size, self.fill), _padded_labels(labels, self.size)

    def _place(self, labels: np.ndarray, u: np.ndarray) -> tuple[int, int]:
        spare = [max(0, whole - part) for whole, part in zip(labels.shape, self.size, strict=True)]
        top = left = 0
        for attempt in range(_TRIES):
            top, left = (int(number * (room + 1)) for number, room in zip(u[2 * attempt :], spare, strict=False))
            if self.most_of_one_class == 1:
                break
            counts = np.bincount(labels[top : top + self.size[0], left : left + self.size[1]].ravel(), minlength=256)
            counts[IGNORED] = 0
            if np.count_nonzero(counts) > 1 and counts.max() < self.most_of_one_class * counts.sum():
                break
        return top, left


def padded(image: np.ndarray, size: tuple[int, int], fill: tuple[int, ...]) -> Tensor:
    """uint8 `[H, W, C]` as `[C, *size]`, with `fill` below and to the right where it is smaller."""
    planes = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, *size)
    planes[:, : image.shape[0], : image.shape[1]] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    return planes


def _padded_labels(labels: np.ndarray, size: tuple[int, int]) -> Tensor:
    maps = torch.full(size, IGNORED, dtype=torch.int64)
    maps[: labels.shape[0], : labels.shape[1]] = torch.from_numpy(np.array(labels, order="C"))
    return maps


class _Pairs:
    """A source whose `read` gives image and labels."""

    def __init__(self, source: Maps):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return read_pair(self._source, i)


class MapBatches(Dataset[Batch]):
    """The micro-batch of each request: uint8 images, and label maps in `truth`, a function of (seed, epoch, sample id).

    `on_error` says what an unreadable image or mask does: "skip" takes another in its place and names it in
    `Batch.skipped`, "stop" raises `DataError`.
    """

    def __init__(self, source: Maps, augment: MapAugment, *, seed: int, on_error: str = "stop"):
        self._pairs, self._augment, self._seed, self._on_error = _Pairs(source), augment, seed, on_error

    def __getitem__(self, request: Request) -> Batch:
        numbers = self._augment.numbers(self._seed, request.epochs, request.ids)
        images, truth, ids, skipped = [], [], request.ids.copy(), []
        for row, (epoch, wanted) in enumerate(zip(request.epochs.tolist(), request.ids.tolist(), strict=True)):
            pair, i = read_or_replace(self._pairs, self._seed, epoch, wanted, self._on_error, skipped)  # pyright: ignore
            if i != wanted:
                ids[row] = i
                numbers[row] = self._augment.numbers(self._seed, np.array([epoch]), np.array([i]))[0]
            image, labels = self._augment(pair[0], pair[1], numbers[row])
            images.append(image)
            truth.append(labels)
        return Batch(
            images=torch.stack(images),
            sample_ids=torch.from_numpy(ids),
            labels=torch.full((len(ids),), -1, dtype=torch.int64),
            epochs=torch.from_numpy(request.epochs),
            step=request.step,
            truth=torch.stack(truth),
            skipped=skipped,
        )
