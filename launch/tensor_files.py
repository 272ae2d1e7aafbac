"""The tensors of a portable checkpoint, read by name in one process, whoever wrote them in however many."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .errors import UserError
from .unpickle import Inert, restricted


class _Properties(TensorProperties):
    """Properties as any torch wrote them: 2.12 added strides, which earlier ones do not read."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[:5])


DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_ALLOWED = {
    **DTYPES,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": {str(torch.strided): torch.strided}.__getitem__,
    "pathlib.PosixPath": Inert,
    "pathlib.WindowsPath": Inert,
    "pathlib._local.PosixPath": Inert,
    "pathlib._local.WindowsPath": Inert,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _StorageInfo,
    **{
        f"torch.distributed.checkpoint.metadata.{found.__name__}": found
        for found in (
            _MEM_FORMAT_ENCODING, BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta,
            TensorStorageMetadata,
        )
    },
    "torch.distributed.checkpoint.metadata.TensorProperties": _Properties,
}  # fmt: skip
_METADATA = restricted(_ALLOWED)


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, except that its metadata cannot run code.

    Reading the metadata raises UserError where it is missing, damaged, or holds anything else.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                metadata = _METADATA.load(file)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); take another checkpoint.") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is damaged: {error}; take another checkpoint.") from error
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path} is damaged: it is not the metadata of a checkpoint; take another checkpoint.")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


@dataclass(frozen=True)
class Described:
    """Shape and type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


class TensorFiles:
    """The tensors of a folder by torch.distributed.checkpoint: what there is, and each by its name.

    No process group is needed, and none is used. Raises UserError that names a damaged file.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = SafeReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.described = {
            name: Described(tuple(entry.size), entry.properties.dtype) for name, entry in self._entries.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU."""
        entry, whole = self._entries[name], self.described[name]
        # Pieces of one tensor do not overlap, so that their sizes tell whether they cover it.
        if sum(prod(chunk.sizes) for chunk in entry.chunks) != whole.count:
            raise UserError(f"{self.folder} is damaged: its pieces of {name} do not make it up.")
        if len(entry.chunks) == 1:
            return self._piece(name, entry.chunks[0], whole.dtype)
        tensor = torch.empty(whole.shape, dtype=whole.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensor[place].copy_(self._piece(name, chunk, whole.dtype))
        return tensor

    def _piece(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        info = self._reader.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None or info.transform_descriptors or Path(info.relative_path).name != info.relative_path:
            raise UserError(f"{self.folder} is damaged: its metadata does not say where {name} lies.")
        path = self.folder / info.relative_path
        try:
            with path.open("rb") as file:
                piece = torch.load(self._reader._slice_file(file, info), map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); take another checkpoint.") from error
        except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged at {name} ({reason}); take another checkpoint.") from error
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes or piece.dtype != dtype:
            raise UserError(f"{path} is damaged at {name}: another tensor stands there; take another checkpoint.")
        return piece

    def items(self, wanted: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of those whose name is `wanted`, one after another; only one is held."""
        for name in self.described:
            if wanted(name):
                yield name, self.read(name)


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a portable checkpoint whose name is `wanted`, on the CPU.

    Raises UserError that names a missing or damaged file.
    """
    return dict(TensorFiles(Path(folder)).items(wanted))
