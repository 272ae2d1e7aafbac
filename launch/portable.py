"""One layout for the state of every engine: whole tensors by name, written and read in whatever pieces a rank holds.

The files are those of `torch.distributed.checkpoint`, whose own tools read them, too.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .tensor_files import SafeReader


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a tensor of `shape`: `values` are `numel` numbers in a row from number `start` on.

    All engines divide tensors so: by rows (FSDP2), in equal parts (ZeRO 3), anywhere (ZeRO 1 and 2), or not at all.
    """

    values: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @staticmethod
    def whole(tensor: Tensor) -> Piece:
        return Piece(tensor.detach(), tuple(tensor.shape))


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor, and where in a row of numbers it begins."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    begin: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The numbers `start` … `stop - 1` of a tensor of `shape`, row-major, as boxes in order (2 a dimension at most)."""
    if stop <= start:
        return
    if not shape:
        yield Box((), (), start)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all within one row
        yield from _in_row(shape, first - 1, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if last > first:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), first * row)
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    begin = index * math.prod(shape[1:])
    for box in boxes(shape[1:], start - begin, stop - begin):
        yield Box((index, *box.offsets), (1, *box.sizes), begin + box.begin)


def _boxes_of(piece: Piece) -> list[Box]:
    return list(boxes(piece.shape, piece.start, piece.start + piece.values.numel()))


class _Places:
    """Where the library finds the boxes of pieces: by name and offsets."""

    def __init__(self, pieces: Mapping[str, Piece]):
        self.found = {(name, box.offsets): (piece, box) for name, piece in pieces.items() for box in _boxes_of(piece)}

    def __getitem__(self, index: MetadataIndex) -> Tensor:
        return _view(*self.found[index.fqn, tuple(index.offset or ())])


def _view(piece: Piece, box: Box) -> Tensor:
    """The box of a piece, as a view on its values."""
    flat = piece.values.view(-1)  # a view, or loading would fill a copy
    return flat[box.begin - piece.start :][: box.numel].view(box.sizes)


class _SavePlanner(DefaultSavePlanner):
    """Plans boxes of pieces, which the default planner does not know."""

    def __init__(self, pieces: Mapping[str, Piece]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._places = _Places(pieces)

    def create_local_plan(self) -> SavePlan:
        items = []
        for (name, _), (piece, box) in self._places.found.items():
            offsets = torch.Size(box.offsets)
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, torch.Size(box.sizes)),
                TensorProperties.create_from_tensor(piece.values),
                torch.Size(piece.shape),
            )
            items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._places[write_item.index]


class _LoadPlanner(DefaultLoadPlanner):
    """Fills pieces from whatever boxes were saved."""

    def __init__(self, pieces: Mapping[str, Piece]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces, self._places = pieces, _Places(pieces)

    def create_local_plan(self) -> LoadPlan:
        assert isinstance(self.metadata, Metadata)
        items: list[ReadItem] = []
        for name, piece in self._pieces.items():
            chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in _boxes_of(piece)]
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._places[read_item.dest_index]
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dimension, offset, length)
        return view


def staged(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Copies of the pieces in host memory, which training cannot change any more."""
    return {
        name: Piece(piece.values.detach().to("cpu", copy=True), piece.shape, piece.start)
        for name, piece in pieces.items()
    }


@contextlib.contextmanager
def _as_oserror() -> Iterator[None]:
    """The library gathers what its ranks met in an exception that nothing else catches; here as an OSError."""
    try:
        yield
    except CheckpointException as error:
        failure = next((found[0] for found in error.failures.values()), error)
        raise OSError((str(failure).strip() or type(failure).__name__).splitlines()[0]) from error


def write(folder: Path, pieces: Mapping[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Write the pieces of all ranks of `group` (None: of this process alone) to `folder`; every rank calls this.

    Raises OSError on every rank where one of them met an error.
    """
    with warnings.catch_warnings(), _as_oserror():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says so of every single process
        # The planner looks the values up by itself; the names alone go to the library.
        dcp.save(  # pyright: ignore
            dict.fromkeys(pieces, None), storage_writer=FileSystemWriter(folder), planner=_SavePlanner(pieces),
            process_group=group, no_dist=group is None,
        )  # fmt: skip


def read(folder: Path, pieces: Mapping[str, Piece]) -> None:
    """Fill the pieces from `folder`, in place and without a word to other ranks.

    Every name must be there with its shape: ValueError names the first that differs. Raises OSError where a file
    cannot be read.
    """
    stored = SafeReader(folder).read_metadata().state_dict_metadata
    for name, piece in pieces.items():
        if name not in stored:
            raise ValueError(f"it has no {name}")
        there = tuple(getattr(stored[name], "size", ()))
        if there != tuple(piece.shape):
            raise ValueError(f"{name} is {there} there and {tuple(piece.shape)} here")
    with warnings.catch_warnings(), _as_oserror():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(  # pyright: ignore
            dict.fromkeys(pieces, None), storage_reader=SafeReader(folder), planner=_LoadPlanner(pieces), no_dist=True
        )


def names(folder: Path) -> set[str]:
    """The tensors that a folder holds."""
    return set(SafeReader(folder).read_metadata().state_dict_metadata)


def files_of_rank(folder: Path, rank: int) -> list[Path]:
    """What rank `rank` wrote; the description of all is rank 0's."""
    mine = sorted(path for path in folder.glob(f"__{rank}_*") if path.is_file())
    return [*mine, folder / ".metadata"] if rank == 0 else mine
