"""Training shards: tars that webdataset reads, an offset index beside each, and random access to their images."""

from __future__ import annotations

import glob
import json
import os
import re
import struct
import time
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .decode import UnreadableImage, decode
from .images import DataError

MANIFEST = "manifest.json"
UNFINISHED = "manifest.unfinished.json"  # stands in the manifest's place until every shard is written
FORMAT = 1
KINDS = ("jpg", "png", "npy", "other")

_BLOCK = 512  # a tar's unit: headers and data start at its multiples
_MAGIC = b"elsewidx"
_HEADER = struct.Struct("<8sIIQQI")  # magic, version, crc32 of the tar, bytes of the tar, samples, crc32 of the columns
_COLUMNS = (("blocks", "<u4"), ("sizes", "<u4"), ("crcs", "<u4"), ("labels", "<i4"), ("kinds", "u1"))
_MOST_OPEN = 256  # file descriptors of one process
_PAUSES = (0.1, 0.4, 1.5)  # seconds before a vanished shard is tried again
_GIVEN_UP_FOR = 60.0  # seconds in which a shard that stayed away is not waited for again
_REPAIR = "`elsewhere shards repair"

ShardPath = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class IndexProblem(ValueError):
    """An index file cannot be used; the message says why."""


def write_file(path: str, data: bytes) -> None:
    """Put `data` at `path` whole or not at all: written aside, synced, renamed; raises OSError."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".writing-{name}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        if os.path.exists(aside):
            os.unlink(aside)
        raise
    sync_folder(folder)


def sync_folder(folder: str) -> None:
    """Make the names in `folder` last through a power cut."""
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def index_path(tar: str) -> str:
    """Where the index of a shard stands."""
    return (tar[: -len(".tar")] if tar.endswith(".tar") else tar) + ".idx"


@dataclass
class ShardIndex:
    """Where the images of one tar are, and which tar that is: 17 bytes a sample."""

    tar_bytes: int
    tar_crc32: int
    blocks: np.ndarray  # [N] uint32, where an image's bytes start, in units of 512
    sizes: np.ndarray  # [N] uint32, bytes of the image
    crcs: np.ndarray  # [N] uint32, crc32 of the image's bytes
    labels: np.ndarray  # [N] int32, -1 where there is none
    kinds: np.ndarray  # [N] uint8, place in KINDS

    @classmethod
    def of(cls, tar_bytes: int, tar_crc32: int, rows: Sequence[tuple[int, int, int, int, int]]) -> ShardIndex:
        """The index of `rows` (byte offset, size, crc32, label, kind), in their order."""
        offsets, *others = zip(*rows, strict=True) if rows else ((),) * len(_COLUMNS)
        columns = [[offset // _BLOCK for offset in offsets], *others]
        arrays = (np.array(c, dtype=kind) for c, (_, kind) in zip(columns, _COLUMNS, strict=True))
        return cls(tar_bytes, tar_crc32, *arrays)

    def save(self, path: str) -> None:
        """Write the index to `path`, whole or not at all; raises OSError."""
        columns = b"".join(getattr(self, name).astype(kind, copy=False).tobytes() for name, kind in _COLUMNS)
        header = (_MAGIC, FORMAT, self.tar_crc32, self.tar_bytes, len(self.blocks), zlib.crc32(columns))
        write_file(path, _HEADER.pack(*header) + columns)

    @classmethod
    def load(cls, path: str) -> ShardIndex:
        """The index at `path`; raises IndexProblem where it is missing, damaged or of another format."""
        try:
            with open(path, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            raise IndexProblem("it is missing") from None
        except OSError as error:
            raise IndexProblem(f"it cannot be read ({error.strerror})") from None
        if len(data) < _HEADER.size or data[:8] != _MAGIC:
            raise IndexProblem("it is no index")
        _, version, tar_crc32, tar_bytes, count, crc32 = _HEADER.unpack_from(data)
        if version != FORMAT:
            raise IndexProblem(f"it has format {version}, but this version reads format {FORMAT}")
        if len(data) != _HEADER.size + count * sum(np.dtype(kind).itemsize for _, kind in _COLUMNS):
            raise IndexProblem(f"it has {len(data)} bytes, which is not right for {count} samples")
        if zlib.crc32(memoryview(data)[_HEADER.size :]) != crc32:
            raise IndexProblem("its checksum is wrong")
        columns, start = [], _HEADER.size
        for _, kind in _COLUMNS:
            columns.append(np.frombuffer(data, kind, count, start))
            start += columns[-1].nbytes
        return cls(tar_bytes, tar_crc32, *columns)


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of the shards in `folder`, None without one; raises DataError for one that cannot be used."""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        version = manifest["version"]
        assert all(isinstance(entry["name"], str) and isinstance(entry["crc32"], int) for entry in manifest["shards"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = getattr(error, "strerror", None) or "it is not what `elsewhere shards write` writes"
        raise DataError(f"{path} cannot be used ({reason}): {_REPAIR} {folder}` makes it anew.") from None
    if version != FORMAT:
        raise DataError(f"{path} has format {version}, but this version reads format {FORMAT}: update elsewhere.")
    return manifest


def tars_in(folder: str) -> list[str]:
    """The tars in `folder`, by name."""
    with os.scandir(folder) as entries:
        names = (e.name for e in entries if e.name.endswith(".tar") and not e.name.startswith("."))
        return [os.path.join(folder, name) for name in sorted(names)]


def is_shard_folder(folder: str) -> bool:
    """Whether `folder` itself holds shards, finished or not."""
    if not os.path.isdir(folder):
        return False
    return any(os.path.exists(os.path.join(folder, n)) for n in (MANIFEST, UNFINISHED)) or bool(tars_in(folder))


def shard_splits(path: ShardPath) -> tuple[str, ...]:
    """Which of train and val have a shard folder of their own below `path`."""
    if not isinstance(path, (str, os.PathLike)):
        return ()
    path = os.path.expanduser(path)
    if is_shard_folder(path):
        return ()
    return tuple(split for split in ("train", "val") if is_shard_folder(os.path.join(path, split)))


def has_val(path: ShardPath) -> bool:
    """Whether `path` is a folder with shards of a val split, which `Shards(path, "val")` opens; raises DataError."""
    splits = shard_splits(path)
    if splits or not isinstance(path, (str, os.PathLike)) or not os.path.isdir(os.path.expanduser(path)):
        return "val" in splits
    manifest = read_manifest(os.path.expanduser(os.fspath(path)))
    return manifest is not None and manifest.get("source", {}).get("split") == "val"


def names_shards(path: ShardPath) -> bool:
    """Whether `path` is something that `Shards` opens, rather than a folder of images or a torchvision set."""
    if not isinstance(path, (str, os.PathLike)):
        return True
    path = os.path.expanduser(path)
    return path.endswith(".tar") or is_shard_folder(path) or bool(shard_splits(path))


def braces(pattern: str) -> list[str]:
    """`a{00..02}b{x,y}` -> every name it stands for, in order."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if not found:
        return [pattern]
    if found[3] is not None:
        inner = found[3].split(",")
    else:
        inner = [str(i).zfill(len(found[1])) for i in range(int(found[1]), int(found[2]) + 1)]
    return [pattern[: found.start()] + text + rest for text in inner for rest in braces(pattern[found.end() :])]


def _in_folder(folder: str, split: str | None) -> list[str]:
    splits = shard_splits(folder)
    if splits:
        if (split or "train") not in splits:
            raise DataError(f"{folder} has shards of {splits[0]} only: write those of {split or 'train'} beside them.")
        return _in_folder(os.path.join(folder, split or "train"), None)
    manifest = read_manifest(folder)
    if manifest is None and os.path.exists(os.path.join(folder, UNFINISHED)):
        raise DataError(f"The shards in {folder} are not finished: run the same `elsewhere shards write` again.")
    if split == "val" and not has_val(folder):
        raise DataError(f"{folder} has no val split: write one with `elsewhere shards write … --split val`.")
    tars = [os.path.join(folder, e["name"]) for e in manifest["shards"]] if manifest else tars_in(folder)
    if not tars:
        raise DataError(f"{folder} holds no shards: write some with `elsewhere shards write SOURCE {folder}`.")
    return tars


def find_shards(path: ShardPath, split: str | None = None) -> list[str]:
    """The tars that `path` names, in order; see `Shards`. Raises DataError where it names none."""
    if not isinstance(path, (str, os.PathLike)):
        return [tar for one in path for tar in find_shards(one, split)]
    path = os.path.expanduser(os.fspath(path))
    if os.path.isdir(path):
        return _in_folder(path, split)
    if os.path.exists(path):
        return [path]
    found = []
    for name in braces(path):
        tars = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not tars:
            raise DataError(f"{name} does not exist: give a folder of shards, or a pattern as shard-{{000000..7}}.tar.")
        found += tars
    return found


class _Descriptor:
    """An open file that closes when the last thread that uses it lets go."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Shards:
    """The images of shards as a `Source`: any of them at once by `pread`, without reading a tar from its start.

    `path` is a folder that `elsewhere shards write` made, a folder with such `train` and `val` folders, a tar, a
    pattern with braces or wildcards, or a list of these. `split` chooses train (also where it is None) or val among
    folders; shards without a val split have none, and `split="val"` then raises. Images have `channels` channels;
    None takes what most of them have. Raises `DataError` for shards that are missing, unfinished or without a fitting
    index; reading raises `UnreadableImage`, which names shard, key and byte offset.
    """

    def __init__(self, path: ShardPath, split: str | None = None, channels: int | None = None):
        if split not in (None, "train", "val"):
            raise DataError(f"split={split!r} is unknown: choose train or val.")
        self._paths = find_shards(path, split)
        self.classes: list[str] | None = None
        self._manifests()
        self._load()
        self.channels: int = channels or self._own_channels or self._probe()

    def _manifests(self) -> None:
        """Take classes, channels and expected checksums from the manifests beside the shards."""
        manifests = {folder: read_manifest(folder) for folder in dict.fromkeys(map(os.path.dirname, self._paths))}
        known = [manifest for manifest in manifests.values() if manifest]
        classes = [manifest["classes"] for manifest in known]
        if any(names != classes[0] for names in classes):
            raise DataError("The shards have different classes: give shards that were written from one set of classes.")
        self.classes = classes[0] if classes else None
        counts: dict[int, int] = {}
        for manifest in known:
            for channels, count in manifest.get("channels", {}).items():
                counts[int(channels)] = counts.get(int(channels), 0) + count
        self._own_channels = max(counts, key=lambda channels: counts[channels]) if counts else None
        self._expected = {
            os.path.join(folder, entry["name"]): entry["crc32"]
            for folder, manifest in manifests.items()
            for entry in (manifest["shards"] if manifest else ())
        }

    def _load(self) -> None:
        """Read the indexes into one array for each column, 16 bytes a sample."""
        indexes = [self._index(path) for path in self._paths]
        self._starts = np.cumsum([0, *(len(index.blocks) for index in indexes)]).tolist()
        self._blocks, self._sizes, self._crcs, self._labels = (
            np.concatenate([getattr(index, name) for index in indexes]) for name, _ in _COLUMNS[:4]
        )
        if not len(self._blocks):
            raise DataError(f"{self._paths[0]} and the other shards hold no images: write them anew.")
        self._open: dict[int, _Descriptor] = {}
        self._gone: dict[int, float] = {}

    def _index(self, path: str) -> ShardIndex:
        folder = os.path.dirname(path) or "."
        try:
            tar_bytes = os.stat(path).st_size
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): restore it, or go on without it in a copy that "
                f"{_REPAIR} {folder} --out DIR` writes."
            ) from None
        try:
            index = ShardIndex.load(index_path(path))
        except IndexProblem as error:
            raise DataError(f"{index_path(path)} cannot be used: {error}; {_REPAIR} {folder}` makes it anew.") from None
        if index.tar_bytes != tar_bytes or index.tar_crc32 != self._expected.get(path, index.tar_crc32):
            raise DataError(
                f"{index_path(path)} describes another tar than {os.path.basename(path)} beside it (cut short or "
                f"replaced): `elsewhere shards verify {folder}` says what is wrong, {_REPAIR} {folder}` mends it."
            )
        return index

    def _probe(self) -> int:
        """The channels of the first image that can be read, among the first hundred."""
        first: UnreadableImage | None = None
        for i in range(min(100, len(self))):
            try:
                channels = decode(self.read_bytes(i), None, self.name(i)).shape[2]
                return channels if channels != 4 else 3  # an alpha channel, or a printer's inks
            except UnreadableImage as error:
                first = first or error
        raise DataError(f"None of the first images can be used; {first}.")

    def __getstate__(self) -> dict[str, Any]:
        """All but the columns and open files, which a spawned worker reads anew: the indexes are quick to open."""
        columns = ("_blocks", "_sizes", "_crcs", "_labels", "_starts", "_open", "_gone")
        return {**{name: value for name, value in self.__dict__.items() if name not in columns}, "_n": len(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        n = state.pop("_n")
        self.__dict__.update(state)
        self._load()
        if len(self) != n:
            raise DataError(f"{self._paths[0]} and the other shards changed while they are in use: start again.")

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, `[N]` int32, -1 where unknown."""
        return self._labels

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of every encoded image, `[N]` uint32."""
        return self._sizes

    @property
    def paths(self) -> list[str]:
        """The tars, in the order of their images."""
        return list(self._paths)

    def label(self, i: int) -> int:
        return int(self._labels[i])

    def _place(self, i: int) -> tuple[int, int]:
        """Shard and byte offset of image `i`."""
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"image {i} of {len(self)}")
        return bisect_right(self._starts, i) - 1, int(self._blocks[i]) * _BLOCK

    def name(self, i: int) -> str:
        """Shard, key and byte offset of image `i`; the key stands in the tar alone."""
        shard, offset = self._place(i)
        try:
            header = os.pread(self._descriptor(shard).number, _BLOCK, offset - _BLOCK)
            member = header[:100].split(b"\0")[0].decode("utf-8", "replace")
        except OSError:
            member = ""
        return f"{self._paths[shard]}, {member or f'sample {i - self._starts[shard]}'} at byte {offset}"

    def _descriptor(self, shard: int) -> _Descriptor:
        """The open file of `shard`. One that a fork inherited serves as well: `pread` moves no shared position."""
        found = self._open.get(shard)
        if found is None:
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)), None)
            found = self._open[shard] = _Descriptor(self._paths[shard])
        return found

    def _pread(self, i: int) -> bytes:
        """The bytes of image `i`, waiting a little for a shard that has gone away, as on a network drive."""
        shard, offset = self._place(i)
        size = int(self._sizes[i])
        for pause in (*_PAUSES, None):
            try:
                descriptor = self._descriptor(shard)
                data = os.pread(descriptor.number, size, offset)
                if len(data) == size:
                    return data
                reason = f"the shard ends {size - len(data)} bytes before the image does"
            except OSError as error:
                reason = f"the shard cannot be read ({error.strerror})"
                self._open.clear()  # a stale handle would stay stale, and too many open files too many
            self._open.pop(shard, None)
            if pause is None or time.monotonic() < self._gone.get(shard, 0.0):
                break
            time.sleep(pause)
        self._gone[shard] = time.monotonic() + _GIVEN_UP_FOR
        raise UnreadableImage(self.name(i), reason)

    def read_bytes(self, i: int) -> bytes:
        """The encoded image `i` (JPEG, PNG or .npy), as it was written; raises `UnreadableImage`."""
        data = self._pread(i)
        if zlib.crc32(data) != self._crcs[i]:
            raise UnreadableImage(self.name(i), "its bytes changed since it was written (checksum)")
        return data

    def read(self, i: int) -> np.ndarray:
        data = self.read_bytes(i)
        try:
            return decode(data, self.channels)
        except UnreadableImage as error:
            raise UnreadableImage(self.name(i), error.reason) from None
