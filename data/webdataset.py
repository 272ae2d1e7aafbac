"""Shards that are read from start to end, from far away or through a command, in an order that can be resumed exactly.

The webdataset library opens and parses the tars and shuffles within a shard. Which stream reads which shard when
(see `stream_order`), how streams are dealt to ranks and workers, and where a resumed run goes on, is decided here.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from . import stream_shards
from .augment import Augment
from .batch import Batch
from .decode import UnreadableImage, decode
from .images import DataError
from .loader import MakeMasks, Refusal, add_masks, batches, start_worker
from .order import Plan
from .stream_order import Slot, check_division
from .stream_shards import Raw, Stream, groups_of, image_of, is_remote
from .streams import words

__all__ = ["Stream", "StreamLoader", "is_remote"]

_ATTEMPTS = 100  # images, and shards, that are tried in the place of unreadable ones before even `skip` gives up


@dataclass(frozen=True, slots=True)
class Item:
    """What a stream gives at `place` of its `slot`; `notes` tell what was found wrong with the shard by then."""

    slot: Slot
    place: int
    raw: Raw
    notes: tuple[str, ...]


class _Reading:
    """The shards of a stream as they are read in one process."""

    def __init__(self, stream: Stream, on_error: str):
        self.stream, self.on_error = stream, on_error

    def items(self, number: int) -> Iterator[Item]:
        """The samples of slot `number` in their shuffled order, exactly as many as it counts."""
        from webdataset.filters import detshuffle

        slot, notes = self.stream.order.slot(number), []
        mixed = words(self.stream.order.seed, "slot shuffle", 0, np.array([number]), 2)[0]
        shuffle = detshuffle(self.stream.shuffle_buffer, seed=int(mixed[0]) << 32 | int(mixed[1]))
        for place, raw in enumerate(shuffle.run(self._samples(slot, notes))):
            yield Item(slot, place, raw, tuple(notes))
            notes.clear()

    def _samples(self, slot: Slot, notes: list[str]) -> Iterator[Raw]:
        """As many samples as `slot` counts: its shard's, and where that has fewer, some of them once more.

        A shard that gives none at all is replaced by that of the stream's next slot. Adds to `notes` what is wrong
        with the shard; raises `DataError` for it with `on_error` "stop", and where a hundred shards give none.
        """
        given, reason = yield from self._through(slot, slot.samples, notes)
        lacking, url = slot.samples - given, self.stream.urls[slot.shard]
        if reason:
            if self.on_error == "stop":
                raise DataError(
                    f"A shard cannot be read to its end ({url}: {reason}): repair or replace it, or set "
                    "data.on_error=skip."
                )
            # Once for each image: what is skipped is counted by its lines, and a line is printed once.
            notes += [f"{url}: {reason}; {lacking} of its {slot.samples} samples are replaced"] * lacking
        readable, useless = given, set()
        while lacking:
            if not readable:
                useless.add(slot.shard)
                if len(useless) >= min(_ATTEMPTS, np.count_nonzero(self.stream.counts)):
                    raise DataError(
                        f"{len(useless)} shard(s) in a row cannot be read, the last is {url} "
                        f"({reason or 'it has fewer images than data.streams'}): check data.path and how it is reached."
                    )
            while slot.shard in useless or not slot.samples:
                slot = self.stream.order.slot(slot.number + self.stream.streams)
                url = self.stream.urls[slot.shard]
            readable, reason = yield from self._through(slot, min(lacking, readable or slot.samples), [])
            lacking -= readable

    def _through(self, slot: Slot, limit: int, notes: list[str]) -> Generator[Raw, None, tuple[int, str]]:
        """The first `limit` samples of a slot's shard in its own order; returns how many came, and why not all did."""
        url, parts = self.stream.urls[slot.shard], self.stream.order.parts
        passed = given = 0  # groups of the tar, samples of this part
        pauses = iter(stream_shards.PAUSES)
        while limit:
            place = 0
            try:
                for position, (key, members) in enumerate(groups_of(url)):
                    image = image_of(members)
                    place += image is not None
                    if position < passed:  # on an earlier try
                        continue
                    passed, pauses = position + 1, iter(stream_shards.PAUSES)
                    if image is None:
                        if position % parts == slot.part:
                            notes.append(f"{url}, {key}: has no image, only .{', .'.join(members)}")
                    elif (place - 1) % parts == slot.part:
                        given += 1
                        yield Raw(slot.shard, place - 1, key, *image)
                        if given == limit:
                            return given, ""
                whole = place >= self.stream.counts[slot.shard] or not self.stream.exact
                reason = "" if place and whole else f"it ends after {place} images"
            except OSError as error:
                reason = str(error)
            pause = next(pauses, None)
            if not reason or pause is None:
                return given, reason
            time.sleep(pause)
        return 0, ""


class _Cursor:
    """One logical stream, from a place on."""

    def __init__(self, reading: _Reading, number: int, place: int):
        self._reading = reading
        self._items = self._from(number, place)
        self._ahead: deque[Item] = deque()  # read to replace an unreadable one before them, and still to be taken

    def _from(self, number: int, place: int) -> Generator[Item, None, None]:
        while True:
            yield from itertools.islice(self._reading.items(number), place, None)
            number, place = number + self._reading.stream.streams, 0

    def close(self) -> None:
        """Close the shard; by itself a cursor would wait for the garbage collector, and a command with it."""
        self._items.close()

    def take(self, count: int) -> list[Item]:
        """The next `count` samples, not decoded."""
        return [self._ahead.popleft() if self._ahead else next(self._items) for _ in range(count)]

    def _following(self) -> Iterator[Item]:
        for i in itertools.count():
            if i == len(self._ahead):
                self._ahead.append(next(self._items))
            yield self._ahead[i]

    def _others(self, item: Item, taken: list[Item]) -> Iterator[Item]:
        """What may replace `item`: the rest of its slot, the slot from its start, then what the stream has next."""
        rest = itertools.chain(taken, self._following())
        yield from itertools.takewhile(lambda other: other.slot == item.slot, rest)
        yield from itertools.islice(self._reading.items(item.slot.number), item.place)
        rest = itertools.chain(taken, self._following())
        yield from (other for other in rest if other.slot != item.slot)

    def readable(self, item: Item, taken: list[Item], skipped: list[str]) -> tuple[np.ndarray, Raw]:
        """The image of `item`, or of one in its place, with what it was read from; `taken` are those after it.

        Adds to `skipped` what is wrong with `item`; raises `DataError` as `read_or_replace` does.
        """
        stream, error = self._reading.stream, None
        candidates = itertools.chain([item], self._others(item, taken))
        for other in itertools.islice(candidates, _ATTEMPTS):
            raw = other.raw
            try:
                return decode(raw.data, stream.channels, f"{stream.urls[raw.shard]}, {raw.key}"), raw
            except UnreadableImage as unreadable:
                error = unreadable
            if self._reading.on_error == "stop":
                raise DataError(
                    f"An image cannot be read ({error}): repair or remove it, or set data.on_error=skip."
                ) from None
            if other is item:
                skipped.append(str(error))
        raise DataError(f"{_ATTEMPTS} images in a row cannot be read, the last is {error}: check data.path.")


class _Parts(IterableDataset[Batch | Refusal]):
    """Of every step of a plan's rank, the samples of this worker's streams, stream by stream."""

    def __init__(self, stream: Stream, augment: Augment, plan: Plan):
        self._stream, self._augment, self._plan = stream, augment, plan

    def __iter__(self) -> Iterator[Batch | Refusal]:
        plan, worker = self._plan, get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        cursors: list[_Cursor] = []
        try:
            reading, each = _Reading(self._stream, plan.on_error), plan.global_batch // self._stream.streams
            places = self._stream.order.places(plan.start_step * each)[plan.rank :: plan.world]
            own = len(places) // workers
            cursors = [_Cursor(reading, *place) for place in places[number * own : (number + 1) * own]]
            for step in range(plan.start_step, plan.stop_step):
                yield self._part(step, [(cursor, cursor.take(each)) for cursor in cursors])
        except DataError as error:
            yield Refusal(str(error))
        finally:
            for cursor in cursors:
                cursor.close()

    def _part(self, step: int, taken: list[tuple[_Cursor, list[Item]]]) -> Batch:
        seed, augment = self._plan.seed, self._augment
        items = [item for _, own in taken for item in own]
        epochs = np.array([item.slot.epoch for item in items], dtype=np.int64)
        ids = np.array([item.raw.id for item in items], dtype=np.int64)
        numbers = augment.numbers(seed, epochs, ids)
        images, labels, skipped = [], [], []
        for cursor, own in taken:
            for i, item in enumerate(own):
                row = len(images)
                skipped += item.notes
                image, raw = cursor.readable(item, own[i + 1 :], skipped)
                if raw is not item.raw:
                    ids[row] = raw.id
                    numbers[row] = augment.numbers(seed, epochs[row : row + 1], ids[row : row + 1])[0]
                images.append(augment(image, numbers[row]))
                labels.append(raw.label)
        return Batch(
            images=torch.stack(images),
            sample_ids=torch.from_numpy(ids),
            labels=torch.tensor(labels, dtype=torch.int64),
            epochs=torch.from_numpy(epochs),
            step=step,
            look=augment.left_for_device(numbers),
            skipped=skipped,
        )


def _made_of(parts: list[Batch], change: Callable[[list[torch.Tensor]], torch.Tensor], skipped: list[str]) -> Batch:
    """A batch of which each tensor is made by `change` from those of `parts`."""
    tensors = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Batch)}
    made = {name: change(own) for name, own in tensors.items() if isinstance(own[0], torch.Tensor)}
    return replace(parts[0], **made, skipped=skipped)


class StreamLoader:
    """The micro-batches of a plan's rank from a stream of shards: a step's are ordered by stream, then by place.

    The samples of a step are the same set for any number of ranks and of workers that divide the streams. Raises
    `DataError` for other numbers, and while iterating for what cannot be read.
    """

    def __init__(self, stream: Stream, augment: Augment, masks: MakeMasks | None, plan: Plan):
        assert plan.global_batch == stream.global_batch
        check_division(stream.streams, plan.world, plan.workers, plan.global_batch)
        self._masks, self._plan = masks, plan
        self._loader = DataLoader(
            _Parts(stream, augment, plan),
            batch_size=None,
            num_workers=plan.workers,
            worker_init_fn=start_worker,
            prefetch_factor=plan.prefetch if plan.workers else None,
            # Without one of its own, torch takes a number from the global generator at every start.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        plan = self._plan
        parts = batches(self._loader)
        try:
            # torch asks the workers in turn, so the parts of one step follow one another.
            for _ in range(plan.start_step, plan.stop_step):
                step = list(itertools.islice(parts, max(1, plan.workers)))
                skipped = [line for part in step for line in part.skipped]
                whole = step[0] if len(step) == 1 else _made_of(step, torch.cat, [])
                for first in range(0, plan.share, plan.micro_batch):
                    rows = slice(first, first + plan.micro_batch)
                    batch = _made_of([whole], lambda own, rows=rows: own[0][rows], [] if first else skipped)
                    batch = add_masks(batch, self._masks, plan.seed)
                    yield batch.pin_memory() if plan.pin_memory else batch
        finally:
            del parts  # ends the workers now, not when the last traceback that holds this frame is gone
