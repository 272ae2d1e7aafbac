"""Measuring a segmenter: every held-out image once, at its mask's own resolution, over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...data.augment import resize
from ...data.decode import UnreadableImage
from ...data.images import DataError
from ...data.loader import dead_worker, start_worker
from ...data.map_augment import fitted
from ...data.segmentation import Maps, read_pair
from ...models.segmenter import Segmenter
from ..efficiency_settings import SlidingSection
from ..engine.base import Engine
from .confusion import confusion, figures
from .overlays import draw_maps
from .sliding import predict_sliding, windows


class _Views(Dataset):
    """Of each chosen image: its place, its views uint8 `[C, h, w]`, which are mirrored, its labels, and itself.

    What cannot be read is the sentence on it instead.
    """

    def __init__(self, source: Maps, indices: np.ndarray, scale: tuple[float, float], scales: list[float], flip: bool):
        self.source, self.indices, self.scale, self.scales, self.flip = source, indices, scale, scales, flip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[int, list[Tensor], list[bool], Tensor, Tensor] | UnreadableImage | DataError:
        index = int(self.indices[i])
        try:
            image, labels = read_pair(self.source, index)
        except (UnreadableImage, DataError) as error:
            return error
        views, flipped = [], []
        for factor in self.scales:
            size = fitted(*labels.shape, (factor * self.scale[0], factor * self.scale[1]))  # pyright: ignore
            view = resize(image, size, "bilinear")
            views += [view, view.flip(-1)] if self.flip else [view]
            flipped += [False, True] if self.flip else [False]
        return index, views, flipped, torch.from_numpy(labels), torch.from_numpy(np.array(image))


def measure_maps(
    engine: Engine,
    val: Maps,
    scale: tuple[float, float],
    section: SlidingSection,
    fill: tuple[int, ...],
    workers: int,
    on_error: str = "stop",
    draw: Path | None = None,
    pictures: int = 16,
) -> dict[str, Any]:
    """mIoU, mAcc and aAcc over every image once, and the figures of each class; the same on all ranks.

    Images are resized into `scale` (long and short side), seen through windows of the encoder's size and judged at the
    size of their masks. Those that cannot be read are counted apart with `on_error` "skip", else raise DataError. The
    first `pictures` images are drawn into the folder `draw`, beside their masks.
    """
    world, method = engine.world, engine.method
    assert isinstance(method, Segmenter) and val.classes is not None
    window, classes = method.encoder.image_size, method.classes
    stride = section.stride or tuple(max(1, side * 2 // 3) for side in window)
    if any(step > side for step, side in zip(stride, window, strict=True)):
        raise DataError(f"probe.sliding.stride={list(stride)} leaves gaps between windows of {list(window)}: lower it.")
    views = _Views(val, np.arange(len(val))[world.rank :: world.size], scale, section.scales, section.flip)
    loader = DataLoader(
        views, batch_size=None, num_workers=workers, worker_init_fn=start_worker, generator=torch.Generator()
    )
    items = iter(loader)
    colour = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
    nothing = colour.expand(1, -1, *window).to(world.device)

    def ask(pixels: Tensor) -> Tensor:
        return engine.ask("predict", pixels.to(world.device))

    matrix, seen, unreadable = np.zeros((classes, classes), dtype=np.int64), 0, 0
    for _ in range(-(-len(val) // world.size)):
        try:
            item = next(items, None)
        except RuntimeError as error:
            raise dead_worker(error) or error from None
        if isinstance(item, DataError) or (isinstance(item, UnreadableImage) and on_error == "stop"):
            advice = ": repair or remove it, or set data.on_error=skip."
            raise item if isinstance(item, DataError) else DataError(f"An image cannot be read ({item}){advice}")
        unreadable += isinstance(item, UnreadableImage)
        cut = list(windows(item[1], window, stride, colour)) if isinstance(item, tuple | list) else []  # pyright: ignore
        asks = -(-len(cut) // section.batch)
        # The same number of forward passes on every rank, since weights may have to be gathered for each.
        for _ in range(max(world.gather_host(asks)) - asks):
            ask(nothing)
        if not isinstance(item, tuple | list):
            continue
        index, seen_as, flipped, labels, image = item
        size = (int(labels.shape[0]), int(labels.shape[1]))
        found = predict_sliding(seen_as, flipped, size, cut, ask, section.batch).argmax(dim=0).to(torch.uint8)
        predicted = found.cpu().numpy()
        matrix += confusion(labels.numpy(), predicted, classes)
        seen += 1
        if draw is not None and index < pictures:
            draw.mkdir(parents=True, exist_ok=True)
            picture = draw_maps(image.numpy(), labels.numpy(), predicted, val.classes)
            Image.fromarray(picture).save(draw / f"{index:04}_{Path(val.name(index)).stem}.png")
    parts = world.gather_host((matrix, seen, unreadable))
    matrix, seen, unreadable = (sum(part[i] for part in parts) for i in range(3))
    if not seen:
        raise DataError("None of the held-out images can be read: check data.path.")
    return {**figures(np.asarray(matrix), val.classes), "images": int(seen), "unreadable": int(unreadable)}
