"""Batches as a function of (seed, step): the same for any number of workers, after any restart, and split over ranks.

A request (see `order`) names what a micro-batch holds, a worker process makes it, and the iteration runs from a first
to a last optimiser step without a pause where one epoch ends and the next begins.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .augment import Augment
from .batch import Batch
from .decode import UnreadableImage
from .images import DataError, Source
from .masks import Masks
from .order import Order, Plan, Request, Requests
from .streams import words

_ATTEMPTS = 100  # samples tried in the place of an unreadable one before even `skip` gives up
MakeMasks = Callable[[int, np.ndarray, int, np.ndarray], Masks]


@dataclass(frozen=True)
class Refusal:
    """A sentence for the user in the place of a batch: torch would wrap an exception in the worker's traceback."""

    message: str


def _tensor(patches: np.ndarray | None) -> torch.Tensor | None:
    return None if patches is None else torch.from_numpy(patches)


def replacements(seed: int, epoch: int, wanted: int, n: int) -> np.ndarray:
    """The samples that are tried in the place of an unreadable one, `[100]` int64: a function of what was wanted.

    A wanted sample stands for its position, since the order of an epoch holds it once.
    """
    return (words(seed, "replacement", epoch, np.array([wanted]), _ATTEMPTS)[0] % np.uint32(n)).astype(np.int64)


def read_or_replace(
    source: Source, seed: int, epoch: int, wanted: int, on_error: str, skipped: list[str]
) -> tuple[np.ndarray, int]:
    """The image of sample `wanted`, or one in its place, and the id of the one read; adds to `skipped` what failed.

    Raises `DataError` with `on_error` "stop" for the first that cannot be read, else for a hundred in a row.
    """
    i, error = wanted, None
    for attempt in range(_ATTEMPTS):
        try:
            return source.read(i), i
        except UnreadableImage as unreadable:
            error = unreadable
            if on_error == "stop":
                raise DataError(
                    f"An image cannot be read ({error}): repair or remove it, or set data.on_error=skip."
                ) from None
            skipped.append(str(error))
            if attempt == 0:
                others = replacements(seed, epoch, wanted, len(source))
            i = int(others[attempt])
    raise DataError(f"{_ATTEMPTS} images in a row cannot be read, the last is {error}: check data.path.")


def add_masks(batch: Batch, masks: MakeMasks | None, seed: int) -> Batch:
    """The batch with the masks of its samples."""
    if masks is not None:
        made = masks(seed, batch.epochs.numpy(), batch.step, batch.sample_ids.numpy())
        batch.context, batch.targets, batch.visible = map(_tensor, (made.context, made.targets, made.visible))
        batch.redraws = made.redraws
    return batch


class Batches(Dataset[Batch]):
    """The micro-batch of each request: images read, decoded, cropped and augmented, masks made, all stacked.

    The random numbers of `augment` are a function of (seed, epoch, sample id). `masks(seed, epochs, step, sample_ids)`
    draws the masks, or `masks` is None. `on_error` says what an unreadable image does: "skip" takes another in its
    place and names it in `Batch.skipped`, "stop" raises `DataError`.
    """

    def __init__(self, source: Source, augment: Augment, masks: MakeMasks | None, *, seed: int, on_error: str = "skip"):
        self._source = source
        self._augment = augment
        self._masks = masks
        self._seed = seed
        self._on_error = on_error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, request: Request) -> Batch:
        augment, skipped = self._augment, []
        numbers = augment.numbers(self._seed, request.epochs, request.ids)
        images, ids, labels = [], request.ids.copy(), []
        for row, (epoch, wanted) in enumerate(zip(request.epochs.tolist(), request.ids.tolist(), strict=True)):
            image, i = read_or_replace(self._source, self._seed, epoch, wanted, self._on_error, skipped)
            if i != wanted:
                ids[row] = i
                numbers[row] = augment.numbers(self._seed, np.array([epoch]), np.array([i]))[0]
            images.append(augment(image, numbers[row]))
            labels.append(self._source.label(i))
        batch = Batch(
            images=torch.stack(images),
            sample_ids=torch.from_numpy(ids),
            labels=torch.tensor(labels, dtype=torch.int64),
            epochs=torch.from_numpy(request.epochs),
            step=request.step,
            look=augment.left_for_device(numbers),
            skipped=skipped,
        )
        return add_masks(batch, self._masks, self._seed)


class _Guarded(Dataset):
    """`Batches` that hand over their `DataError` instead of raising it."""

    def __init__(self, batches: Dataset[Batch]):
        self._batches = batches

    def __getitem__(self, request: Request) -> Batch | Refusal:
        try:
            return self._batches[request]
        except DataError as error:
            return Refusal(str(error))


def _end_when_the_parent_says() -> None:
    parent = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if parent is not None and sender == parent.pid:
            os._exit(0)


def start_worker(worker: int) -> None:
    """Make this a loader worker: one thread, and deaf to signals that are meant for its parent."""
    torch.set_num_threads(1)
    # A launcher or a Ctrl-C signals the whole process group; the trainer then writes a last checkpoint and still
    # needs its workers. Only the trainer's own SIGTERM ends one: were that ignored too, the trainer's exit, which
    # terminates and joins workers left over by an exception, would wait for ever.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


class Loader:
    """The micro-batches of a plan's rank, from a source with images by index.

    `order` has the ids of `source`. Each pass yields the same `Batch`es bit for bit, whatever `plan.workers`. Raises
    `DataError` while iterating for images that cannot be read.
    """

    def __init__(self, source: Source, augment: Augment, masks: MakeMasks | None, order: Order, plan: Plan):
        self._open(Batches(source, augment, masks, seed=plan.seed, on_error=plan.on_error), order, plan)

    @classmethod
    def of(cls, batches: Dataset[Batch], order: Order, plan: Plan) -> Loader:
        """The loader of what `batches[request]` makes of each `Request`."""
        loader = cls.__new__(cls)
        loader._open(batches, order, plan)
        return loader

    def _open(self, batches: Dataset[Batch], order: Order, plan: Plan) -> None:
        self.requests = Requests(order, plan)
        self._loader = DataLoader(
            _Guarded(batches),
            sampler=self.requests,
            batch_size=None,
            num_workers=plan.workers,
            worker_init_fn=start_worker,
            pin_memory=plan.pin_memory,
            prefetch_factor=plan.prefetch if plan.workers else None,
            # Without one of its own, torch takes a number from the global generator at every start.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        return batches(self._loader)


# What is raised here where a worker dies while it hands a batch over, by the socket that its memory comes through.
_CUT_OFF = (ConnectionError, EOFError, FileNotFoundError)


def dead_worker(error: Exception) -> DataError | None:
    """A sentence in the place of torch's error for a loader worker that died, which comes at any point of the loop."""
    text = str(error).split(chr(10))[0] or type(error).__name__
    # The same kinds of error raised in a worker come here with another text: Caught … in DataLoader worker process.
    if not text.startswith("DataLoader worker") and (not isinstance(error, _CUT_OFF) or text.startswith("Caught ")):
        return None
    with contextlib.suppress(ValueError):  # not the main thread
        # torch raises in this handler for every worker that died, wherever the run is on its way out by now.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return DataError(
        f"A loader worker died ({text}); often memory or /dev/shm is used up: lower loader.workers or "
        "loader.micro_batch."
    )


def batches(loader: DataLoader) -> Iterator[Batch]:
    """What `loader` yields, where a worker's `DataError` is raised here as one sentence without its traceback."""
    iterator = iter(loader)
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, *_CUT_OFF) as error:
                if not loader.num_workers:
                    raise
                raise dead_worker(error) or error from None
            if isinstance(item, Refusal):
                raise DataError(item.message)
            yield item
    finally:
        del iterator  # ends the workers now, not when the last traceback that holds this frame is gone
