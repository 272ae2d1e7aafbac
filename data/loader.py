"""Batches as a function of (seed, step): the same for any number of workers, after any restart, and split over ranks.

A request names what a micro-batch holds, a worker process makes it, and the iteration runs from a first to a last
optimiser step without a pause where one epoch ends and the next begins.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .batch import Batch
from .decode import UnreadableImage
from .images import DataError, Source
from .masks import Masks
from .streams import generator

_REPLACEMENTS = 100  # unreadable images in a row before even `skip` gives up


def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` samples in `epoch`, `[n]` int64: a function of (seed, epoch)."""
    return generator(seed, "order", epoch).permutation(n)


@dataclass(frozen=True)
class Request:
    """What one micro-batch holds: samples `ids` `[B]` of `epochs` `[B]`, for micro-batch `micro` of step `step`."""

    epochs: np.ndarray
    step: int  # global optimiser step, from 0, over all epochs
    micro: int
    ids: np.ndarray


def epoch_length(n: int, global_batch: int, remainder: str) -> int:
    """Positions of one epoch of `n` samples: all with `remainder` "carry", whole global batches with "drop".

    Raises `DataError` for another remainder.
    """
    if remainder not in ("carry", "drop"):
        raise DataError(f"data.remainder={remainder!r} is unknown: choose carry or drop.")
    return n if remainder == "carry" else n // global_batch * global_batch


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def check_batch_sizes(n: int, global_batch: int, micro_batch: int, world: int) -> None:
    """Raise `DataError` unless `global_batch` of the `n` images divides into whole micro-batches of `world` ranks."""
    if global_batch < 1 or micro_batch < 1:
        raise DataError(f"optim.batch_size={global_batch} and loader.micro_batch={micro_batch} must be 1 or more.")
    unit = world * micro_batch
    if global_batch % unit:
        near = " or ".join(str(size) for size in (global_batch // unit * unit, -(-global_batch // unit) * unit) if size)
        advice = f"set optim.batch_size to {near}"
        if global_batch % world == 0:
            fitting = sorted(_divisors(global_batch // world), key=lambda d: (abs(d - micro_batch), -d))[:3]
            advice += f", or loader.micro_batch to {' or '.join(map(str, sorted(fitting)))}"
        raise DataError(
            f"optim.batch_size={global_batch} does not divide into {world} rank(s) with micro-batches of "
            f"loader.micro_batch={micro_batch}: {advice}."
        )
    if n < global_batch:
        raise DataError(
            f"The data set has {n} images, less than one optim.batch_size={global_batch}: "
            f"set optim.batch_size to {n // unit * unit or n} or less, or add images."
        )


class Requests(Sampler[Request]):
    """All micro-batches of one rank, from optimiser step `start_step` up to and without `stop_step`.

    Step k takes the positions k · B … (k + 1) · B - 1 of the orders of all epochs, one after another. With
    `remainder="carry"` a step may end one epoch and begin the next, so that every sample is seen once an epoch; with
    "drop" an epoch has `n // global_batch` whole steps, and the rest of its order is left out. Rank r takes the r-th
    of `world` equal slices and cuts it into micro-batches. Raises `DataError` where the sizes do not divide.
    """

    def __init__(
        self,
        *,
        n: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        stop_step: int,
        remainder: str = "carry",
    ):
        assert 0 <= rank < world, f"rank {rank} of {world}"
        check_batch_sizes(n, global_batch, micro_batch, world)
        self.n = n
        self.seed = seed
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.stop_step = stop_step
        self._orders: dict[int, np.ndarray] = {}
        self.epoch_length = epoch_length(n, global_batch, remainder)
        self.micros_per_step = global_batch // (world * micro_batch)

    def __len__(self) -> int:
        return max(0, self.stop_step - self.start_step) * self.micros_per_step

    def __iter__(self) -> Iterator[Request]:
        share = self.global_batch // self.world
        for step in range(self.start_step, self.stop_step):
            for micro in range(self.micros_per_step):
                first = step * self.global_batch + self.rank * share + micro * self.micro_batch
                epochs, places = np.divmod(np.arange(first, first + self.micro_batch), self.epoch_length)
                ids = np.empty_like(places)
                for epoch in np.unique(epochs):
                    ids[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
                yield Request(epochs, step, micro, ids)

    def _order(self, epoch: int) -> np.ndarray:
        """The order of `epoch`; those of the last two asked for are kept, since a step may touch two."""
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = order(self.seed, epoch, self.n)
        return self._orders[epoch]


@dataclass(frozen=True)
class _Refusal:
    """A sentence for the user in the place of a batch: torch would wrap an exception in the worker's traceback."""

    message: str


def _tensor(patches: np.ndarray | None) -> torch.Tensor | None:
    return None if patches is None else torch.from_numpy(patches)


class Batches(Dataset[Batch]):
    """The micro-batch of each request: images read, decoded and augmented, masks made, all stacked.

    `augment(image, rng)` makes uint8 `[C, H, W]` or, of several views, `[V, C, H, W]` of uint8 `[H, W, C]`; its random
    numbers are the stream (seed, "augment", epoch, sample id). `masks(seed, epochs, step, sample_ids)` draws the masks,
    or `masks` is None. `on_error` says what an unreadable image does: "skip" takes the next readable sample in its
    place and names it in `Batch.skipped`, "stop" raises `DataError`.
    """

    def __init__(
        self,
        source: Source,
        augment: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
        masks: Callable[[int, np.ndarray, int, np.ndarray], Masks] | None,
        *,
        seed: int,
        on_error: str = "skip",
    ):
        if on_error not in ("skip", "stop"):
            raise DataError(f"on_error={on_error!r} is unknown: choose skip or stop.")
        self._source = source
        self._augment = augment
        self._masks = masks
        self._seed = seed
        self._on_error = on_error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, request: Request) -> Batch:
        skipped: list[str] = []
        images, ids, labels = [], [], []
        for epoch, wanted in zip(request.epochs.tolist(), request.ids.tolist(), strict=True):
            image, i = self._read(wanted, skipped)
            images.append(self._augment(image, generator(self._seed, "augment", epoch, i)))
            ids.append(i)
            labels.append(self._source.label(i))
        batch = Batch(
            images=torch.stack(images),
            sample_ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            epochs=torch.from_numpy(request.epochs),
            step=request.step,
            skipped=skipped,
        )
        if self._masks is not None:
            masks = self._masks(self._seed, request.epochs, request.step, np.array(ids, dtype=np.int64))
            batch.context = _tensor(masks.context)
            batch.targets = _tensor(masks.targets)
            batch.visible = _tensor(masks.visible)
            batch.redraws = masks.redraws
        return batch

    def _read(self, wanted: int, skipped: list[str]) -> tuple[np.ndarray, int]:
        """The image of sample `wanted`, or of the next one that reads, and the id of the one read."""
        n = len(self._source)
        error: UnreadableImage | None = None
        for i in range(wanted, wanted + min(n, _REPLACEMENTS)):
            try:
                return self._source.read(i % n), i % n
            except UnreadableImage as unreadable:
                error = unreadable
                if self._on_error == "stop":
                    raise DataError(
                        f"An image cannot be read ({error}): repair or remove it, or set data.on_error=skip."
                    ) from None
                skipped.append(str(error))
        raise DataError(f"{len(skipped)} images in a row cannot be read, the last is {error}: check data.path.")


class _Guarded(Dataset):
    """`Batches` that hand over their `DataError` instead of raising it."""

    def __init__(self, batches: Batches):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, request: Request) -> Batch | _Refusal:
        try:
            return self._batches[request]
        except DataError as error:
            return _Refusal(str(error))


def _end_when_the_parent_says() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if parent is not None and sender == parent.pid:
            os._exit(0)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # A launcher or a Ctrl-C signals the whole process group; the trainer then writes a last checkpoint and still
    # needs its workers. Only the trainer's own SIGTERM ends one: were that ignored too, the trainer's exit, which
    # terminates and joins workers left over by an exception, would wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


class Loader:
    """The micro-batches of one rank from `start_step` to `stop_step`, made by `workers` processes (0: in this one).

    Each pass yields the same `Batch`es bit for bit, whatever `workers`; `prefetch` is batches ahead per worker.
    `global_batch` counts images over all ranks per optimiser step, `micro_batch` images of one rank per forward.
    Raises `DataError` for sizes that do not divide, and while iterating for images that cannot be read.
    """

    def __init__(
        self,
        source: Source,
        augment: Callable[[np.ndarray, np.random.Generator], torch.Tensor],
        masks: Callable[[int, np.ndarray, int, np.ndarray], Masks] | None,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        stop_step: int,
        remainder: str = "carry",
        on_error: str = "skip",
        pin_memory: bool = False,
        prefetch: int = 2,
    ):
        self.requests = Requests(
            n=len(source),
            seed=seed,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world=world,
            start_step=start_step,
            stop_step=stop_step,
            remainder=remainder,
        )
        self.micros_per_step = self.requests.micros_per_step
        self._loader = DataLoader(
            _Guarded(Batches(source, augment, masks, seed=seed, on_error=on_error)),
            sampler=self.requests,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
            # Without one of its own, torch takes a number from the global generator at every start.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        return batches(self._loader)


def batches(loader: DataLoader) -> Iterator[Batch]:
    """What `loader` yields, where a worker's `DataError` is raised here as one sentence without its traceback."""
    iterator = iter(loader)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise DataError(
                    f"A loader worker died ({str(error).split(chr(10))[0]}); often memory or /dev/shm is used up: "
                    "lower loader.workers or loader.micro_batch."
                ) from None
            if isinstance(item, _Refusal):
                raise DataError(item.message)
            yield item
    finally:
        del iterator  # ends the workers now, not when the last traceback that holds this frame is gone
