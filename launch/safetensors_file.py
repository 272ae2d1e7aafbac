"""Weights as one `.safetensors` file, written tensor by tensor, checked, and only then given its name."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import UserError
from .tensor_files import Described

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_CHUNK = 1 << 24


def check_free(path: Path) -> None:
    """Raises UserError if a file cannot be made at `path`: something stands there, or there is no such folder."""
    for taken in (path, _aside(path)):
        if os.path.lexists(taken):
            raise UserError(f"{taken} exists already and is not overwritten; choose another file, or move it away.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; make it, or choose another file.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent} is not writable; choose another folder.")


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_tensors(
    path: Path, tensors: Mapping[str, Described], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> int:
    """Write `tensors`, each as `read(name)` gives it, which is called once for each; returns the bytes of the file.

    The file is written aside as `.part`, read back and compared by checksum, and renamed: under its name it is whole.
    Raises UserError if something stands there already, the disk does not take it, or it comes back otherwise.
    """
    check_free(path)
    header, names = _header(tensors, metadata)
    size = len(header) + sum(described.bytes for described in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UserError(f"{path} takes {size:,} bytes and the disk has {free:,}; make room, or choose another disk.")
    aside = _aside(path)
    try:
        file = aside.open("xb")
    except OSError as error:
        raise UserError(f"{aside} could not be made ({error.strerror}); choose another file.") from error
    try:
        with file:
            crc = _write(file, header)
            for name in names:
                tensor, described = read(name).detach(), tensors[name]
                assert (tuple(tensor.shape), tensor.dtype) == (described.shape, described.dtype), name
                tensor = tensor.contiguous().reshape(-1).view(torch.uint8)
                crc = _write(file, memoryview(tensor.numpy()), crc)  # pyright: ignore[reportArgumentType]
                del tensor  # before the next is read, or two are held
            file.flush()
            os.fsync(file.fileno())
        if _read_back(aside) != (crc, size):
            raise UserError(f"{path} came back from the disk with other bytes than were written; choose another disk.")
        if os.path.lexists(path):
            raise UserError(f"{path} has come into being meanwhile and is not overwritten; choose another file.")
        aside.rename(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} could not be written ({error.strerror or error}); make room, or choose another "
                            "file.") from error  # fmt: skip
        raise
    return size


def _header(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The file's first bytes, and the names in the order of their data: wide types first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    begin = 0
    for name in names:
        described = tensors[name]
        if described.dtype not in _NAMES:
            raise UserError(
                f"{name} is of {described.dtype}, which a safetensors file cannot hold; leave its part out."
            )
        end = begin + described.bytes
        entries[name] = {
            "dtype": _NAMES[described.dtype], "shape": list(described.shape), "data_offsets": [begin, end],
        }  # fmt: skip
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _write(file: IO[bytes], content: bytes | memoryview, crc: int = 0) -> int:
    """Write in pieces (a kernel takes 2 GiB at once), and go on with the checksum."""
    view = memoryview(content)
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        file.write(piece)
        crc = zlib.crc32(piece, crc)
    return crc


def _read_back(path: Path) -> tuple[int, int]:
    """Checksum and bytes of a file."""
    crc = size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return crc, size


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Described]]:
    """Metadata and tensors of a file, in its order; UserError if it is damaged."""
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            described = {
                name: Described(tuple(one.get_shape()), dtypes[one.get_dtype()]) for name, one in found.items()
            }
            return dict(file.metadata() or {}), described
    except KeyError as error:
        raise UserError(f"{path} holds numbers of type {error}, which is not known here.") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a safetensors file: {str(error).splitlines()[0]}.") from error
