"""Testing by sliding windows: what a model that takes one size says of images of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin on an axis: every `stride`, the last one at the end."""
    count = max(0, length - window + stride - 1) // stride + 1
    return [max(0, min(i * stride, length - window)) for i in range(count)]


@dataclass(frozen=True)
class Window:
    """A window of one of the views of an image: `pixels` `[C, h, w]`, padded, of which `rows` × `columns` are image."""

    view: int
    top: int
    left: int
    rows: int
    columns: int
    pixels: Tensor


def windows(
    views: Sequence[Tensor], window: tuple[int, int], stride: tuple[int, int], fill: Tensor
) -> Iterator[Window]:
    """The windows of views `[C, H, W]` of an image; smaller views are padded with the colour `fill` `[C, 1, 1]`."""
    for number, view in enumerate(views):
        height, width = view.shape[-2:]
        for top in starts(height, window[0], stride[0]):
            for left in starts(width, window[1], stride[1]):
                part = view[:, top : top + window[0], left : left + window[1]]
                rows, columns = part.shape[-2:]
                if (rows, columns) != tuple(window):
                    whole = fill.to(part.dtype).expand(-1, *window).clone()
                    whole[:, :rows, :columns] = part
                    part = whole
                yield Window(number, top, left, rows, columns, part)


def predict_sliding(
    views: Sequence[Tensor],
    flipped: Sequence[bool],
    size: tuple[int, int],
    cut: Iterable[Window],
    ask: Callable[[Tensor], Tensor],
    batch: int,
) -> Tensor:
    """Class probabilities `[K, *size]` of an image: the mean over its views of what windows say of them.

    Where windows of a view overlap their logits are averaged; a view's are resized (bilinear) to `size`, and turned
    back where it was `flipped`. `ask` gives logits `[n, K, h, w]` of windows `[n, C, h, w]`, at most `batch` at once.
    """
    sums: list[Tensor | None] = [None] * len(views)
    counts = [torch.zeros(view.shape[-2:]) for view in views]
    for group in _groups(cut, batch):
        logits = ask(torch.stack([one.pixels for one in group]))
        for one, found in zip(group, logits, strict=True):
            total = sums[one.view]
            if total is None:
                total = sums[one.view] = found.new_zeros(len(found), *views[one.view].shape[-2:])
            place = slice(one.top, one.top + one.rows), slice(one.left, one.left + one.columns)
            total[:, place[0], place[1]] += found[:, : one.rows, : one.columns]
            counts[one.view][place] += 1
    mean: Tensor | None = None
    for total, count, turned in zip(sums, counts, flipped, strict=True):
        assert total is not None
        logits = F.interpolate((total / count.to(total.device))[None], size=size, mode="bilinear", align_corners=False)[
            0
        ]
        chances = logits.softmax(dim=0)
        chances = chances.flip(-1) if turned else chances
        mean = chances if mean is None else mean + chances
    assert mean is not None, "there is at least one view"
    return mean / len(views)


def _groups(items: Iterable[Window], size: int) -> Iterator[list[Window]]:
    group: list[Window] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
