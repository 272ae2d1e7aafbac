"""Mean and standard deviation of the pixels of some images of a source, and how large they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from .decode import UnreadableImage
from .images import DataError, Source
from .streams import generator


@dataclass
class Moments:
    """`mean` and `std` per channel in 0…1, where every image counts the same; sides in pixels, unreadable images."""

    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def chosen(n: int, count: int | None) -> list[int]:
    """`count` of `n` places, ascending and always the same ones; None means all."""
    if count is None or count >= n:
        return list(range(n))
    return np.sort(generator(0, "shard stats", 0).permutation(n)[:count]).tolist()


def pixel_moments(
    source: Source, places: Sequence[int], threads: int = 1, progress: Callable[[int, int], None] | None = None
) -> Moments:
    """The moments of the images at `places`; `progress(images, of)` is called after each.

    Raises DataError where none of them can be read.
    """
    found = Moments()
    sums = squares = np.zeros(1)

    def look(i: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]] | str:
        try:
            pixels = source.read(i)
        except UnreadableImage as error:
            return str(error)
        values = pixels.reshape(-1, pixels.shape[2])
        # Counts of the 256 values give both moments exactly, and faster than floating-point copies of the image.
        counts = np.stack([np.bincount(values[:, c], minlength=256) for c in range(values.shape[1])])
        levels = np.arange(256) / 255
        return counts @ levels / len(values), counts @ levels**2 / len(values), pixels.shape

    with ThreadPoolExecutor(max(1, threads)) as pool:
        for number, seen in enumerate(pool.map(look, places), 1):
            if isinstance(seen, str):
                found.unreadable.append(seen)
            else:
                sums, squares = sums + seen[0], squares + seen[1]
                found.heights.append(seen[2][0])
                found.widths.append(seen[2][1])
            if progress:
                progress(number, len(places))
    if not found.heights:
        raise DataError(f"None of the {len(places)} images can be read; {found.unreadable[0]}.")
    mean = sums / len(found.heights)
    found.mean = mean.tolist()
    found.std = np.sqrt(np.maximum(squares / len(found.heights) - mean**2, 0)).tolist()
    return found
