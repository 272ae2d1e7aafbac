"""Writing FFCV files (`.beton`): the same bytes from any number of processes, and a whole file or none."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from .decode import UnreadableImage, read_image, to_channels
from .ffcv import FORMAT, VERSION, Beton, import_ffcv
from .images import DataError, Source
from .shard_samples import Task, Unreadable
from .shard_writer import Progress
from .shards import sync_folder, write_file
from .streams import generator
from .write_tasks import in_order, open_to_write, processes_for, tasks_of

_CHUNK = 8  # images that a process encodes at once
_MODES = ("jpg", "raw")  # by FFCV's number
_PAGE = 1 << 23  # bytes of FFCV's pages, unless images may need larger ones: an image lies within a page
_MOST_PAGE = 1 << 26


@dataclass(frozen=True)
class BetonOptions:
    """What decides the bytes of a beton, beside the source: FFCV's own options, and the seed of the order.

    `mode` is jpg, raw, or smart: jpg where raw pixels would take more than `smart_threshold` bytes. `max_side` is in
    pixels, `quality` JPEG's. Raises `DataError` for values that cannot be.
    """

    mode: str = "jpg"
    quality: int = 90
    max_side: int | None = None
    seed: int = 0
    smart_threshold: int = 256 * 256 * 3

    def __post_init__(self) -> None:
        if self.mode not in (*_MODES, "smart"):
            raise DataError(f"mode={self.mode!r} is unknown: choose jpg, raw or smart.")
        for name, low, high in (
            ("quality", 1, 100), ("max_side", 1, 65_500), ("seed", 0, 2**32 - 1), ("smart_threshold", 0, 2**40),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise DataError(f"{name.replace('_', '-')} {value} is out of range: choose {low} … {high}.")

    @property
    def page(self) -> int:
        """Bytes of a page, a power of two that any image of these options fits in, as far as they tell."""
        largest = _MOST_PAGE if self.max_side is None else 3 * self.max_side**2
        if self.mode == "jpg":
            largest = min(largest, 2 * _PAGE)
        return max(_PAGE, min(1 << (largest - 1).bit_length(), 1 << 31))


@dataclass(frozen=True)
class _Encoded:
    """An image as it stands in a beton; `mode` is its place in `_MODES`."""

    mode: int
    height: int
    width: int
    label: int
    data: bytes


def _encode(image: np.ndarray, label: int, options: BetonOptions, name: str) -> _Encoded:
    """The uint8 `[H, W, 3]` image as FFCV's RGBImageField encodes it; raises `UnreadableImage`.

    FFCV itself, which takes each process seconds to import, would encode JPEG in the smart mode only to measure it.
    """
    cv2 = import_ffcv("cv2")
    cv2.setNumThreads(1)
    height, width = image.shape[:2]
    if options.max_side and max(height, width) > options.max_side:
        ratio = options.max_side / max(height, width)
        size = max(1, int(ratio * width)), max(1, int(ratio * height))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
    raw = options.mode == "raw" or (options.mode == "smart" and image.nbytes <= options.smart_threshold)
    if max(height, width) > 65_500:  # JPEG's limit, and two bytes are FFCV's
        raise UnreadableImage(name, f"has {height}x{width} pixels, more than a beton holds: set max-side")
    if raw:
        data = np.ascontiguousarray(image).tobytes()
    else:
        rgb = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        data = cv2.imencode(".jpg", rgb, [int(cv2.IMWRITE_JPEG_QUALITY), options.quality])[1].tobytes()
    if len(data) > options.page:
        raise UnreadableImage(name, f"takes {len(data)} bytes, more than a page of {options.page}: set max-side")
    return _Encoded(_MODES.index("raw" if raw else "jpg"), height, width, label, data)


def _encode_task(task: Task, source: Source | None, options: BetonOptions) -> _Encoded | Unreadable:
    try:
        if isinstance(task.image, str):
            return _encode(read_image(task.image, 3), task.label, options, task.name)
        assert source is not None
        image = to_channels(source.read(task.image), 3, task.name)
        return _encode(image, source.label(task.image), options, task.name)
    except UnreadableImage as error:
        return Unreadable(task.name, error.reason)
    except OSError as error:
        return Unreadable(task.name, error.strerror or str(error))


@contextlib.contextmanager
def _aside(dest: str) -> Iterator[str]:
    """Where the file grows until it gets its name, held for this process and removed where it does not get there.

    Raises `DataError` where `dest` exists, or where another process writes to it.
    """
    folder, name = os.path.split(dest)
    path = os.path.join(folder, f".writing-{name}")
    os.makedirs(folder or ".", exist_ok=True)
    for taken in (dest, f"{dest}.json"):
        if os.path.lexists(taken):
            raise DataError(f"{taken} exists: remove it, or choose another name.")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"Another process writes {dest}: wait for it, or choose another name.") from None
        try:
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):  # it has its name
                os.unlink(path)
    finally:
        os.close(descriptor)


def _write(path: str, images: int, options: BetonOptions, encoded: Iterator[_Encoded | Unreadable],
           progress: Progress | None) -> tuple[int, list[dict[str, Any]]]:  # fmt: skip
    """Write `encoded`, `images` in all, to `path`; returns how many are in it, and which cannot be read."""
    fields, writers = import_ffcv("ffcv.fields"), import_ffcv("ffcv.writer")
    kinds = {"image": fields.RGBImageField(), "label": fields.IntField()}
    writer = writers.DatasetWriter(path, kinds, page_size=options.page, num_workers=1)
    writer.num_samples = images
    writer.prepare()
    # FFCV's own loop would start processes that share this memory, and wait for ever once one of them is gone.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    rows: Any = np.zeros(images, writer.metadata_type)
    writer.metadata_sm = SimpleNamespace(buf=rows.view(np.uint8))
    pages = import_ffcv("ffcv.memory_allocator").MemoryAllocator(path, writer.data_region_start, options.page)
    unreadable: list[dict[str, Any]] = []
    done = written = 0
    with pages:
        if progress:
            progress(0, images, 0)
        for position, image in enumerate(encoded):
            if isinstance(image, Unreadable):
                unreadable.append({"position": position, "path": image.name, "reason": image.reason})
            else:
                pages.set_current_sample(done)
                start, memory = pages.malloc(len(image.data))
                memory[:] = np.frombuffer(image.data, np.uint8)
                rows["f0"][done] = image.mode, image.width, image.height, start
                rows["f1"][done] = image.label
                done, written = done + 1, written + len(image.data)
            if progress:
                progress(position + 1, images, written)
    if not done:
        first = unreadable[0]
        raise DataError(f"None of the {images} images can be read, the first is {first['path']}: {first['reason']}.")
    writer.header["num_samples"] = done  # the rows of the others stay, behind the last
    writer.finalize(pages.allocations)
    return done, unreadable


def write_beton(
    source: str | Source,
    dest: str | os.PathLike[str],
    *,
    split: str | None = None,
    holdout: float = 0.1,
    mode: str = "jpg",
    quality: int = 90,
    max_side: int | None = None,
    seed: int = 0,
    processes: int | None = None,
    smart_threshold: int = BetonOptions.smart_threshold,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the images of `source` to the FFCV file `dest`, in a seeded order, and return what `DEST.json` says.

    `source`, `split` and `holdout` are those of `write_shards`; images become 8-bit RGB, `mode` and the options after
    it are those of `BetonOptions`. The bytes do not depend on `processes` (None: one for each core where that pays).
    Images that cannot be read are left out and listed under `unreadable`. `progress(images, of, bytes)` is called
    after every image. What is cut off leaves nothing and begins anew. Raises `DataError` for sources and names that do
    not serve, and without FFCV; nothing that exists is overwritten.
    """
    options = BetonOptions(mode, quality, max_side, seed, smart_threshold)
    dest = os.path.expanduser(os.fspath(dest))
    if not dest.endswith(".beton"):
        raise DataError(f"{dest} does not end in .beton: name it so, or the reader will not know it.")
    opened, root, about = open_to_write(source, split, holdout)
    if opened.channels not in (None, 1, 3):
        raise DataError(f"The images have {opened.channels} channels, and FFCV stores RGB only: write shards.")
    try:
        with _aside(dest) as path:
            order = generator(seed, "shards", 0).permutation(len(opened)).tolist()
            tasks = tasks_of(opened, root, iter(order))
            count = processes_for(processes, len(order), root is not None)
            images = in_order(tasks, _encode_task, (None if root else opened, options), count)
            with contextlib.closing(images):
                done, unreadable = _write(path, len(order), options, images, progress)
            Beton(path)  # checks it, before anything relies on it
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            manifest = {
                "format": FORMAT, "version": VERSION, "samples": done, "bytes": os.path.getsize(path),
                "classes": opened.classes, "mode": mode, "split": about["split"], "source": about,
                "options": asdict(options), "unreadable": unreadable,
            }  # fmt: skip
            # First what stands beside it: a beton under its final name is never without it.
            write_file(f"{dest}.json", (json.dumps(manifest, indent=1) + "\n").encode())
            os.replace(path, dest)
            sync_folder(os.path.dirname(dest))
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full: make room" if full else f"{error.strerror}: mend that"
        raise DataError(f"{dest} cannot be written ({reason}), and write it again.") from None
    return manifest
