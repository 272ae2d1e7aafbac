"""Which shard each logical stream reads when: a function of the shards' counts, the seed and the number of streams."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .images import DataError
from .order import permutation

_MOST_STREAMS = 64  # by default: each keeps a shard open and a shuffle buffer full


@dataclass(frozen=True)
class Slot:
    """One reading of one shard, or of part `part` of it: its samples part, part + parts, part + 2 · parts, …"""

    number: int  # in the endless list of shards
    epoch: int
    shard: int
    part: int
    samples: int


class StreamOrder:
    """The endless list of shards, one permutation after another; stream l reads slots l, l + L, l + 2L, …

    `counts` `[S]` are the samples of the shards. Where there are fewer shards than `streams`, each is shared by
    `parts` of them, and S · parts parts are permuted in the place of S shards.
    """

    def __init__(self, counts: np.ndarray, streams: int, seed: int):
        self.streams, self.seed = streams, seed
        self.parts = -(-streams // len(counts))
        within = np.arange(self.parts)
        self._samples = np.maximum(0, -(-(counts[:, None] - within) // self.parts)).ravel()  # [S · parts]
        self._known: tuple[int, np.ndarray] = -1, within

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._known[0] != epoch:
            self._known = epoch, permutation(self.seed, epoch, len(self._samples), "shards")
        return self._known[1]

    def slot(self, number: int) -> Slot:
        """Slot `number` of the list, from 0."""
        epoch, place = divmod(number, len(self._samples))
        chosen = int(self._permutation(epoch)[place])
        return Slot(number, epoch, *divmod(chosen, self.parts), int(self._samples[chosen]))

    def places(self, passed: int) -> list[tuple[int, int]]:
        """For every stream, the number of the slot that holds its sample `passed`, and the sample's place in that."""
        left = np.full(self.streams, passed)
        found: dict[int, tuple[int, int]] = {}
        for epoch in itertools.count():
            samples = self._samples[self._permutation(epoch)]
            slots = epoch * len(samples) + np.arange(len(samples))
            reader = slots % self.streams
            totals = np.bincount(reader, samples, self.streams).astype(np.int64)
            for stream in np.flatnonzero((left >= 0) & (left < totals)).tolist():
                own = reader == stream
                ends = np.cumsum(samples[own])
                nth = int(np.searchsorted(ends, left[stream], side="right"))
                place = left[stream] - (ends[nth - 1] if nth else 0)
                found[stream] = int(slots[own][nth]), int(place)
            if len(found) == self.streams:
                return [found[stream] for stream in range(self.streams)]
            left -= totals  # below 0 for those that are found
        raise AssertionError("unreachable")


def choose_streams(wanted: int | None, shards: int, global_batch: int) -> int:
    """The number of streams: `wanted`, or the largest power of two up to 64 that both shards and batch allow.

    Raises `DataError` where `wanted` does not divide the batch.
    """
    if wanted is None:
        return max(n for n in (1, 2, 4, 8, 16, 32, _MOST_STREAMS) if n == 1 or (n <= shards and not global_batch % n))
    if wanted < 1 or global_batch % wanted:
        raise DataError(
            f"data.streams={wanted} does not divide optim.batch_size={global_batch}: choose "
            f"{_near([n for n in range(1, global_batch + 1) if not global_batch % n], wanted)}."
        )
    return wanted


def check_division(streams: int, world: int, workers: int, global_batch: int) -> None:
    """Raise `DataError` unless `streams` divide evenly among `workers` loader processes of each of `world` ranks."""
    readers = world * max(1, workers)
    if streams % readers:
        advice = []
        if not streams % world:
            fitting = [n for n in range(1, streams + 1) if not streams // world % n]
            advice.append(f"loader.workers to {_near(fitting, workers)}")
        fitting = [n for n in range(readers, global_batch + 1, readers) if not global_batch % n]
        if fitting:
            advice.append(f"data.streams, which changes the order of the images, to {_near(fitting, streams)}")
        where = f"{world} rank(s) with loader.workers={workers} each" if workers else f"{world} rank(s)"
        raise DataError(
            f"data.streams={streams} does not divide evenly among {where}: set "
            f"{', or '.join(advice) or f'the number of ranks to a divisor of {streams}'}."
        )


def _near(choices: list[int], wanted: int) -> str:
    """The two of `choices` that are nearest to `wanted`, as words."""
    return " or ".join(map(str, sorted(sorted(choices, key=lambda n: (abs(n - wanted), n))[:2])))
