"""The three ways in which the images of a run are read, behind one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from .augment import Augment
from .batch import Batch
from .ffcv import Beton, FfcvLoader
from .images import Source, Subset
from .loader import Loader, MakeMasks
from .order import Order, Plan
from .webdataset import Stream, StreamLoader


class Reader(Protocol):
    """The micro-batches of a plan's rank, the same ones in every pass."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def open_reader(
    train: Source | Stream, augment: Augment, masks: MakeMasks | None, order: Order | None, plan: Plan, kind: str
) -> Reader:
    """The reader of `train`: webdataset for a stream, FFCV's loader with `kind` "ffcv", else images by index.

    Only a stream needs no `order`. Raises `DataError` for a plan or an augmentation that the reader cannot do.
    """
    if isinstance(train, Stream):
        return StreamLoader(train, augment, masks, plan)
    assert order is not None
    if kind == "ffcv":
        subset = train if isinstance(train, Subset) else None
        beton = subset.source if subset else train
        assert isinstance(beton, Beton)
        return FfcvLoader(beton, subset.indices if subset else None, augment, masks, order, plan)
    return Loader(train, augment, masks, order, plan)
