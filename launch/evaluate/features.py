"""Features of a frozen encoder: every image once, in order, on any number of ranks, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.images import Source
from ...data.views import View, Viewed, Views, read_views, refuse_unreadable
from ...models.method import Method
from ..world import World
from .store import Features, Store

Compute = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """How images come to the encoder; none of it changes what is found."""

    workers: int = 0
    batch: int = 64  # of one forward pass; batches are cut alike for any number of ranks
    prefetch: int = 2
    on_error: str = "stop"


def pooled_layers(method: Method, images: Tensor, layers: int) -> Tensor:
    """Features `[B, layers, 1 or 2, D]` float32 of uint8 images: of each of the last layers, as normalised by the
    encoder's last norm (VISSL's), the mean of the patch tokens and, where there is one, the class token."""
    encoder = method.observed
    with method.autocast():
        if layers == 1:
            tokens = encoder(method.normalise(images))
            first = encoder.num_prefix_tokens
            found: Any = [(tokens[:, first:], tokens[:, :first])]
        else:
            found = encoder.forward_intermediates(
                method.normalise(images), layers, norm=True, output_fmt="NLC", intermediates_only=True,
                return_prefix_tokens=True,
            )  # fmt: skip
    kinds = [torch.cat([patches.float().mean(dim=1, keepdim=True), prefix.float()], dim=1) for patches, prefix in found]
    return torch.stack(kinds, dim=1)


def all_tokens(method: Method, images: Tensor) -> Tensor:
    """Normalised tokens `[B, prefix + N, D]` float32 of the last layer of uint8 images."""
    with method.autocast():
        return method.observed(method.normalise(images)).float()


def computed(compute: Compute, batches: Iterator[Viewed], device: torch.device) -> Iterator[tuple[Viewed, Tensor]]:
    """Each batch with what `compute` makes of it, in host memory; a GPU works on the next while one is copied."""
    before: tuple[Viewed, Tensor, torch.cuda.Event | None] | None = None
    for viewed in batches:
        if not len(viewed.places):
            yield viewed, torch.empty(0)
            continue
        with torch.inference_mode():
            out = compute(viewed.images.to(device, non_blocking=True))
        event = None
        if device.type == "cuda":
            host = torch.empty(out.shape, dtype=out.dtype, pin_memory=True)
            out = host.copy_(out, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        if before is not None:
            yield _arrived(*before)
        before = viewed, out, event
    if before is not None:
        yield _arrived(*before)


def _arrived(viewed: Viewed, out: Tensor, event: torch.cuda.Event | None) -> tuple[Viewed, Tensor]:
    if event is not None:
        event.synchronize()
    return viewed, out


def extract(
    compute: Compute,
    source: Source,
    indices: np.ndarray,
    view: View,
    image_shape: tuple[int, int, int],
    world: World,
    reading: Reading,
    folder: Path,
    name: str,
    dtype: Any = np.float32,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Features, Store]:
    """What `compute` makes of the images `indices` of `source`, each once and in that order; the same on all ranks.

    Batches are dealt to the ranks in turn, and each holds the same images whatever their number, so that rounding does
    not depend on it. Raises DataError for an image that cannot be read, unless `reading.on_error` is skip.
    """
    views = Views(source, indices, view, reading.batch)
    mine = list(range(world.rank, len(views), world.size))
    batches = read_views(views, mine, reading.workers, reading.prefetch, pin=world.device.type == "cuda")
    with torch.inference_mode():
        shape = tuple(compute(torch.zeros(1, *image_shape, dtype=torch.uint8, device=world.device)).shape[1:])
    store = Store(len(indices), shape, dtype, world, folder, name)
    labels = np.full(len(indices), -1, np.int64)
    read = np.zeros(len(indices), bool)
    unreadable: list[str] = []
    failure: Exception | None = None
    try:
        for viewed, values in computed(compute, batches, world.device):
            unreadable += viewed.unreadable
            if viewed.unreadable and reading.on_error == "stop":
                refuse_unreadable(viewed.unreadable)
            _write(store, viewed.places, values.numpy())
            labels[viewed.places] = viewed.labels
            read[viewed.places] = True
            progress(len(viewed.places) + len(viewed.unreadable))
    except Exception as error:  # told to all ranks below, so that none waits
        failure = error
    world.agree(lambda: _raise(failure))
    parts = world.gather_host((labels[read], np.flatnonzero(read), unreadable))
    for theirs, places, _ in parts:
        labels[places], read[places] = theirs, True
    unreadable = sorted(line for _, _, lines in parts for line in lines)
    values = store.finish()
    if unreadable:
        values = values[read]
    return Features(values, labels[read], np.asarray(indices)[read], unreadable), store


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _write(store: Store, places: list[int], values: np.ndarray) -> None:
    """Rows of a batch at their places, in runs: an unreadable image leaves a gap."""
    cuts = [0, *(i for i in range(1, len(places)) if places[i] != places[i - 1] + 1), len(places)]
    for first, last in pairwise(cuts):
        if last > first:
            store.write(places[first], values[first:last])
