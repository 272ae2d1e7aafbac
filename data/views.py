"""Images for measuring: chosen ones in order, a whole batch at a time, as one deterministic or augmented view each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Augment, evaluation_view
from .decode import UnreadableImage
from .images import DataError, Source
from .loader import dead_worker, start_worker


class View(Protocol):
    """What makes uint8 `[C, H, W]` of image `index`, uint8 `[H, W, C]`."""

    def __call__(self, image: np.ndarray, index: int) -> Tensor: ...


@dataclass(frozen=True)
class CentreView:
    """The evaluation view: resized to cover 8/7 of `size`, centre crop; see `evaluation_view`."""

    size: tuple[int, int]
    interpolation: str

    def __call__(self, image: np.ndarray, index: int) -> Tensor:
        return evaluation_view(image, self.size, self.interpolation)


@dataclass(frozen=True)
class RandomView:
    """A training view, random as a function of (seed, epoch, index)."""

    augment: Augment
    seed: int
    epoch: int

    def __call__(self, image: np.ndarray, index: int) -> Tensor:
        numbers = self.augment.numbers(self.seed, np.array([self.epoch]), np.array([index]))
        return self.augment(image, numbers[0])


class Viewed(NamedTuple):
    """A batch of views and where they stand among those asked for."""

    images: Tensor  # [B, C, H, W] uint8
    labels: list[int]  # -1 where unknown
    places: list[int]
    unreadable: list[str]  # one line an image that is left out


class Views(Dataset[Viewed]):
    """Batch `b` holds the images `indices[b · batch : (b + 1) · batch]` of `source`, without unreadable ones."""

    def __init__(self, source: Source, indices: np.ndarray, view: View, batch: int):
        self.source, self.indices, self.view, self.batch = source, np.asarray(indices), view, batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __getitem__(self, b: int) -> Viewed:
        first = b * self.batch
        found = Viewed(torch.empty(0), [], [], [])
        images = []
        for place, index in enumerate(self.indices[first : first + self.batch].tolist(), start=first):
            try:
                images.append(self.view(self.source.read(index), index))
            except UnreadableImage as error:
                found.unreadable.append(str(error))
                continue
            found.labels.append(self.source.label(index))
            found.places.append(place)
        return found._replace(images=torch.stack(images)) if images else found


def read_views(
    views: Views, batches: list[int], workers: int, prefetch: int = 2, pin: bool = False
) -> Iterator[Viewed]:
    """The batches of `views` with these numbers, in this order, made by `workers` processes ahead of their use.

    Raises DataError where a worker dies.
    """
    loader = DataLoader(
        views, batch_size=None, sampler=batches, num_workers=workers, worker_init_fn=start_worker, pin_memory=pin,
        prefetch_factor=prefetch if workers else None, generator=torch.Generator(),
    )  # fmt: skip
    try:
        yield from loader
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        dead = dead_worker(error) if workers else None
        if dead is None:
            raise
        raise dead from None


def refuse_unreadable(unreadable: list[str]) -> None:
    """Raise DataError for the first image that cannot be read."""
    if unreadable:
        raise DataError(
            f"An image cannot be read ({unreadable[0]}): repair or remove it, or set data.on_error=skip, which leaves "
            "it out and counts it."
        )
