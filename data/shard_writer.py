"""Writing shards: the same bytes from any number of processes, complete shards only, and a way on after a kill."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .images import DataError, Source
from .shard_samples import Encoding, Sample, Unreadable, encode_task
from .shards import (
    FORMAT,
    KINDS,
    MANIFEST,
    UNFINISHED,
    IndexProblem,
    ShardIndex,
    index_path,
    read_manifest,
    sync_folder,
    write_file,
)
from .streams import generator
from .write_tasks import in_order, open_to_write, processes_for, tasks_of

_END = bytes(1024)  # two empty blocks end a tar
_LOCK = ".writing.lock"
_OURS = re.compile(r"\.writing-.*|\.writing\.lock")
Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class WriteOptions:
    """What decides the bytes of the shards, beside the source.

    A shard ends before the sample that would bring it over `shard_bytes`, or after `samples_per_shard` samples where
    that is given. `max_side` is in pixels, `quality` is JPEG's. Raises `DataError` for values that cannot be.
    """

    seed: int = 0
    shard_bytes: int = 500_000_000
    samples_per_shard: int | None = None
    max_side: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seed", 0, 2**32 - 1), ("shard_bytes", 1, 2**40), ("samples_per_shard", 1, 2**31), ("max_side", 1, 65_500),
            ("quality", 1, 100),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = "shard-size" if name == "shard_bytes" else name.replace("_", "-")
                raise DataError(f"--{flag} {value} is out of range: choose {low} … {high}.")


@dataclass(frozen=True)
class Written:
    """What `write_shards` leaves: the manifest, and how many of its shards an earlier call had finished."""

    manifest: dict[str, Any]
    kept: int


class ShardFile:
    """A tar that grows beside its final name, and gets it together with its index when it is complete."""

    def __init__(self, folder: str, name: str):
        self.folder, self.name = folder, name
        self.bytes = 0
        self._aside = os.path.join(folder, f".writing-{name}")
        self._file = open(self._aside, "wb")  # noqa: SIM115 - `finish` and `abandon` close it
        self._crc32 = 0
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._channels: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._rows)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self.bytes += len(data)

    def add(self, sample: Sample) -> None:
        """Append the tar members of a sample; raises OSError."""
        place = self.bytes + sample.offset
        self._rows.append((place, sample.size, sample.crc32, sample.label, KINDS.index(sample.kind)))
        self._channels[str(sample.channels)] += 1
        self._write(sample.segment)

    def finish(self) -> dict[str, Any]:
        """Make tar and index last, and say what the manifest says of them; raises OSError."""
        self._write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = os.path.join(self.folder, self.name)
        # The index first: a tar under its final name is never without one.
        ShardIndex.of(self.bytes, self._crc32, self._rows).save(index_path(path))
        os.replace(self._aside, path)
        sync_folder(self.folder)
        facts = {"name": self.name, "samples": len(self), "bytes": self.bytes, "crc32": self._crc32}
        return {**facts, "channels": dict(sorted(self._channels.items()))}

    def abandon(self) -> None:
        """Remove what is not finished."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, which a full disk refuses once more
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._aside)


def save_manifest(folder: str, name: str, manifest: dict[str, Any]) -> None:
    """Write a manifest with the sums over its shards; raises OSError."""
    shards = manifest["shards"]
    channels: Counter[str] = Counter()
    for shard in shards:
        channels.update(shard["channels"])
    sums = {"samples": sum(s["samples"] for s in shards), "bytes": sum(s["bytes"] for s in shards)}
    manifest.update(sums, channels=dict(sorted(channels.items())))
    write_file(os.path.join(folder, name), (json.dumps(manifest, indent=1) + "\n").encode())


@contextlib.contextmanager
def _folder(dest: str, root: str | None) -> Iterator[None]:
    """Hold `dest` for this process; raises DataError where it cannot be written to or holds something else."""
    if root and os.path.commonpath((os.path.realpath(root), os.path.realpath(dest))) == os.path.realpath(root):
        raise DataError(f"{dest} lies inside the images' folder {root}, and would become a class: choose another.")
    try:
        os.makedirs(dest, exist_ok=True)
        found = sorted(name for name in os.listdir(dest) if not _OURS.fullmatch(name))
        if found and not {MANIFEST, UNFINISHED} & set(found):
            raise DataError(f"{dest} holds something else ({found[0]}): choose an empty or a new folder.")
        lock = os.open(os.path.join(dest, _LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DataError(f"{dest} cannot be written to ({error.strerror}): choose another folder.") from None
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another process writes to {dest}: wait for it, or choose another folder.") from None
        try:
            for name in os.listdir(dest):
                if name.startswith(".writing-"):
                    os.unlink(os.path.join(dest, name))
            yield
        finally:
            os.unlink(os.path.join(dest, _LOCK))
    finally:
        os.close(lock)


def _earlier(dest: str) -> tuple[dict[str, Any] | None, bool]:
    """What an earlier call left, and whether it had finished; raises DataError for what cannot be used."""
    path = os.path.join(dest, UNFINISHED)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file), False
    except FileNotFoundError:
        return read_manifest(dest), True
    except (OSError, ValueError):
        raise DataError(f"{path} cannot be read: remove {dest} and write it anew.") from None


def _check_same(dest: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError unless an earlier call had the same images and options."""
    before = {"version": earlier.get("version"), **earlier.get("source", {}), **earlier.get("options", {})}
    wanted = {"version": now["version"], **now["source"], **now["options"]}
    changed = [
        f"{k}: {before.get(k)} -> {v}" for k, v in wanted.items() if k not in ("path", "crc32") and before.get(k) != v
    ]
    if not changed and before.get("crc32") != wanted["crc32"]:
        changed = ["other names or labels of images"]
    if changed:
        raise DataError(
            f"{dest} was written with other settings ({', '.join(changed)}): give the same ones, or another folder."
        )


def _finished(dest: str, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first of `shards` that are there, up to one that is missing; raises DataError for one that has changed."""
    for place, shard in enumerate(shards):
        path = os.path.join(dest, shard["name"])
        if not os.path.exists(path):
            return shards[:place]
        try:
            index = ShardIndex.load(index_path(path))
        except IndexProblem as problem:
            raise DataError(
                f"{index_path(path)} cannot be used: {problem}; move {shard['name']} away to have it written again."
            ) from None
        facts = os.stat(path).st_size, index.tar_bytes, index.tar_crc32, len(index.blocks)
        if facts != (shard["bytes"], shard["bytes"], shard["crc32"], shard["samples"]):
            raise DataError(f"{path} has changed since it was written: move it away to have it written again.")
    return shards


def write_shards(
    source: str | Source,
    dest: str | os.PathLike[str],
    *,
    split: str | None = None,
    holdout: float = 0.1,
    options: WriteOptions | None = None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the images of `source` to shards in the folder `dest`, or go on where an earlier call was cut off.

    `source` is a folder of images, `digits`, `<torchvision set>:DIR`, shards, or a `Source`. `split` is train or val,
    where a source without a val split holds out the share `holdout` of train; None takes train, or all there is.
    The bytes depend on images and `options` alone, not on `processes` (None: one for each core where that pays).
    Images that cannot be read are left out and listed in the manifest under `unreadable`. `progress(images, of, bytes)`
    is called after every image. Raises `DataError` for sources and folders that do not serve; finished shards stay, and
    nothing of others is overwritten.
    """
    options = options or WriteOptions()
    dest = os.path.expanduser(os.fspath(dest))
    opened, root, about = open_to_write(source, split, holdout)
    now: dict[str, Any] = {"format": "elsewhere shards", "version": FORMAT, "source": about,
                           "options": asdict(options), "classes": opened.classes}  # fmt: skip
    with _folder(dest, root):
        earlier, complete = _earlier(dest)
        shards: list[dict[str, Any]] = []
        if earlier is not None:
            _check_same(dest, earlier, now)
            shards = _finished(dest, earlier["shards"])
            if complete and len(shards) == len(earlier["shards"]):
                return Written(earlier, len(shards))
        kept = len(shards)
        start = shards[-1]["until"] if shards else 0
        unreadable = [u for u in (earlier or {}).get("unreadable", ()) if u["position"] < start]
        manifest = {**now, "shards": shards, "unreadable": unreadable}
        order = generator(options.seed, "shards", 0).permutation(len(opened))[start:].tolist()
        tasks = tasks_of(opened, root, iter(order))
        given = None if root else opened, opened.classes, Encoding(options.max_side, options.quality)
        count = processes_for(processes, len(order), root is not None)
        samples = in_order(tasks, encode_task, given, count, "; it goes on after the last finished shard")
        try:
            save_manifest(dest, UNFINISHED, manifest)
            with contextlib.closing(samples):
                _write(samples, start, dest, manifest, options, progress)
            if not shards:
                raise DataError(f"None of the {len(opened)} images can be read, the first is {_line(unreadable[0])}.")
            save_manifest(dest, MANIFEST, manifest)
            os.unlink(os.path.join(dest, UNFINISHED))
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "is full: make room" if full else f"cannot be written to ({error.strerror}): mend that"
            raise DataError(
                f"{dest} {reason} and run the same command again; {len(shards)} finished shard(s) are kept."
            ) from None
    return Written(manifest, kept)


def _line(unreadable: dict[str, Any]) -> str:
    return f"{unreadable['path']}: {unreadable['reason']}"


def _write(
    samples: Iterator[Sample | Unreadable], start: int, dest: str, manifest: dict[str, Any], options: WriteOptions,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Write `samples`, the first at place `start` of the order, to shards; adds to the manifest's lists."""
    shards, unreadable, total = manifest["shards"], manifest["unreadable"], manifest["source"]["images"]
    done = sum(shard["bytes"] for shard in shards)
    file: ShardFile | None = None

    def finish(until: int) -> None:
        nonlocal file, done
        if file is not None:
            shards.append({**file.finish(), "until": until})
            done += file.bytes
            file = None
            save_manifest(dest, UNFINISHED, manifest)

    try:
        if progress:
            progress(start, total, done)
        for position, sample in enumerate(samples, start):
            if isinstance(sample, Unreadable):
                unreadable.append({"position": position, "path": sample.name, "reason": sample.reason})
            else:
                full = options.shard_bytes if options.samples_per_shard is None else None
                if file and full and file.bytes + len(sample.segment) + len(_END) > full:
                    finish(position)
                file = file or ShardFile(dest, f"shard-{len(shards):06d}.tar")
                file.add(sample)
                if len(file) == options.samples_per_shard:
                    finish(position + 1)
            if progress:
                progress(position + 1, total, done + (file.bytes if file else 0))
        finish(total)
    finally:
        if file is not None:
            file.abandon()
