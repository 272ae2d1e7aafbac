"""FFCV files (`.beton`): their images at random as a `Source`, and batches through FFCV's own loader.

FFCV is optional and takes seconds to import: it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from queue import Empty
from typing import Any

import numpy as np
import torch

from .augment import Augment, crop_box
from .batch import Batch
from .decode import UnreadableImage, decode, luma, to_channels
from .images import DataError, Subset
from .loader import MakeMasks, add_masks, read_or_replace
from .order import Order, Plan, Request, Requests

FORMAT, VERSION = "elsewhere beton", 1  # of the .json beside a beton

_HEADER = struct.Struct("<HHIQQ")  # version, fields, page size, samples, offset of the allocation table
_FFCV_VERSION, _JPG, _RAW = 2, 0, 1
_SPAN = 65_536  # samples from one start of FFCV's thread to the next: it lists its batches when it starts
_LIMIT = 120.0  # seconds without a batch
_COMPILE_LIMIT = 900.0  # seconds to the first one, for which numba compiles
_END_LIMIT = 30.0  # seconds for the thread to end
_INSTALL = (
    "`apt-get install --no-install-recommends build-essential python3-dev pkg-config libopencv-dev libturbojpeg0-dev`, "
    "then `pip install ffcv` (see docs/install.md)"
)


def import_ffcv(module: str) -> Any:
    """The `module` of FFCV, or one that comes with it; raises `DataError` with the commands that install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f".beton files need FFCV, which cannot be imported ({error}): {_INSTALL}.") from None


@dataclass(frozen=True)
class _Layout:
    """What is where in a beton, from which a worker process opens it again without FFCV."""

    size: int
    samples: int
    rows_at: int
    row: np.dtype  # the metadata of one sample
    table_at: int
    fields: tuple[str, ...]
    image: int  # place in `fields`
    label: int | None


def _layout(path: str) -> _Layout:
    """The layout of the beton at `path`, as FFCV reads it; raises `DataError` for what is none, or cut short."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check data.path.") from None
    version, fields, _, samples, table_at = _HEADER.unpack(head.ljust(_HEADER.size, b"\0"))
    if version != _FFCV_VERSION:
        raise DataError(f"{path} is no FFCV file of version {_FFCV_VERSION}: give one that FFCV wrote.")
    if not (fields and samples and table_at) or max(samples, table_at) > size:
        raise DataError(f"{path} is empty, unfinished or cut short: copy it again, or write it anew.")
    types = import_ffcv("ffcv.fields")
    try:
        reader = import_ffcv("ffcv.reader").Reader(path)
    except (AssertionError, ValueError, KeyError, OSError) as error:
        raise DataError(f"FFCV cannot read {path} ({' '.join(str(error).split())}): write it anew.") from None
    names, kinds = tuple(reader.handlers), [type(field) for field in reader.handlers.values()]
    images = [i for i, kind in enumerate(kinds) if kind is types.RGBImageField]
    if len(images) != 1:
        raise DataError(f"{path} has {len(images)} image fields: write it with one RGBImageField.")
    numbers = [i for i, kind in enumerate(kinds) if kind is types.IntField]
    named = [i for i in numbers if names[i] == "label"] if len(numbers) > 1 else numbers
    rows_at = _HEADER.size + reader.field_descriptors.nbytes
    return _Layout(
        size, samples, rows_at, reader.metadata_type, table_at, names, images[0], named[0] if named else None
    )


class Beton:
    """The images of a `.beton` that FFCV wrote, with one RGBImageField and perhaps one IntField, the class.

    `channels` is 3, or 1 for their luma. The names of classes come from `PATH.json`, which `write_beton` leaves beside
    it. Raises `DataError` for what is no such file or is cut short, and without FFCV.
    """

    def __init__(self, path: str | os.PathLike[str], channels: int | None = 3):
        self.path = os.path.expanduser(os.fspath(path))
        if channels not in (None, 1, 3):
            raise DataError(f"{self.path} holds RGB images, but the recipe expects {channels} channels: write shards.")
        self.channels: int = channels or 3
        self.layout = _layout(self.path)
        self._load()
        manifest = _manifest(self.path)
        if manifest and (manifest.get("version"), manifest.get("samples")) != (VERSION, len(self)):
            raise DataError(f"{self.path}.json describes another file than {self.path}: move it away.")
        self.classes: list[str] | None = manifest.get("classes") if manifest else None

    def _load(self) -> None:
        """Read what is known of each sample, and check it: FFCV would read and write outside of its memory."""
        layout = self.layout
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - open as long as the source is
            if os.fstat(self._file.fileno()).st_size != layout.size:
                raise DataError(f"{self.path} changed while it is in use: start again.")
            rows = np.fromfile(self.path, layout.row, layout.samples, offset=layout.rows_at)
            table = np.fromfile(self.path, "<u8", offset=layout.table_at)  # of each image: sample, start, size
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}): check data.path.") from None
        if len(rows) < layout.samples or len(table) % 3 or not len(table):
            raise DataError(f"{self.path} is cut short: copy it again, or write it anew.")
        image = rows[f"f{layout.image}"]
        self._raw, self._starts = image["mode"] == _RAW, image["data_ptr"].astype(np.int64)
        self.heights, self.widths = image["height"].astype(np.int64), image["width"].astype(np.int64)
        starts, sizes = table.reshape(-1, 3)[:, 1:].astype(np.int64).T
        order = np.argsort(starts)
        found = order[np.searchsorted(starts, self._starts, sorter=order).clip(max=len(starts) - 1)]
        self._sizes, area = sizes[found], self.heights * self.widths
        good = (starts[found] == self._starts) & (self._starts + self._sizes <= layout.table_at) & (area > 0)
        good &= (self._starts >= layout.rows_at) & np.where(
            self._raw, self._sizes == 3 * area, (image["mode"] == _JPG) & (self._sizes > 0)
        )
        if not good.all():
            raise DataError(f"{self.path} is damaged at image {good.argmin()}: copy it again, or write it anew.")
        self.labels = np.full(len(rows), -1) if layout.label is None else rows[f"f{layout.label}"].astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """The path and what says how to read it: a worker process reads the rest anew."""
        return {name: self.__dict__[name] for name in ("path", "channels", "layout", "classes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    def __len__(self) -> int:
        return self.layout.samples

    def read(self, i: int) -> np.ndarray:
        """Image `i`, `[H, W, channels]` uint8, read-only; raises `UnreadableImage`."""
        shape, size = (int(self.heights[i]), int(self.widths[i]), 3), int(self._sizes[i])
        try:
            data = os.pread(self._file.fileno(), size, int(self._starts[i]))
        except OSError as error:
            raise UnreadableImage(self.name(i), f"the file cannot be read ({error.strerror})") from None
        if len(data) != size:
            raise UnreadableImage(self.name(i), f"the file ends {size - len(data)} bytes before the image does")
        image = np.frombuffer(data, np.uint8).reshape(shape) if self._raw[i] else decode(data, 3, self.name(i))
        if image.shape != shape:
            raise UnreadableImage(self.name(i), f"has {image.shape[:2]} pixels where {shape[:2]} were written")
        return to_channels(image, self.channels, self.name(i))

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def name(self, i: int) -> str:
        return f"{self.path}[{i}]"


def _manifest(path: str) -> dict[str, Any] | None:
    """What `write_beton` left beside the beton at `path`, None where nothing is ours; raises `DataError`."""
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}.json cannot be read ({' '.join(str(error).split())}): move it away.") from None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _of_split(path: str | os.PathLike[str], split: str) -> str | None:
    """The beton of `split` in the folder `path`, None where it has none."""
    found = os.path.join(os.path.expanduser(os.fspath(path)), f"{split}.beton")
    return found if os.path.isfile(found) else None


def names_beton(path: Any) -> bool:
    """Whether `path` is something that `open_beton` opens: a `.beton`, or a folder with one for train or val."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    return os.fspath(path).endswith(".beton") or any(_of_split(path, split) for split in ("train", "val"))


def has_beton_val(path: str | os.PathLike[str]) -> bool:
    """Whether `path` has a val split: a folder with `val.beton`, or a file written from one; raises `DataError`."""
    manifest = _manifest(os.path.expanduser(os.fspath(path)))
    return _of_split(path, "val") is not None or (manifest is not None and manifest.get("split") == "val")


def open_beton(path: str | os.PathLike[str], split: str | None = None, channels: int | None = 3) -> Beton:
    """The beton at `path`, or the one of `split` (None: train) in the folder `path`; raises `DataError`."""
    if split == "val" and not has_beton_val(path):
        raise DataError(f"{path} has no val split: write one beside train.beton as val.beton.")
    if not os.path.isdir(os.path.expanduser(os.fspath(path))):
        return Beton(path, channels)
    found = _of_split(path, split or "train")
    if found is None:
        raise DataError(f"{path} has no {split or 'train'}.beton: write one, or give the .beton file itself.")
    return Beton(found, channels)


def _crops(size: tuple[int, int], views: int) -> Any:
    """FFCV's decoder for rows `[B, 1 + 4 V]`: a sample, and the crop (top, left, height, width) of each view.

    It gives uint8 `[B, V, 3, *size]`, and `[B, 1]` with 1 where an image cannot be decoded. An image is decoded once
    for all of its views; crops are resized by OpenCV's INTER_AREA, the only way that FFCV has.
    """
    libffcv, compiler = import_ffcv("ffcv.libffcv"), import_ffcv("ffcv.pipeline.compiler").Compiler
    base, query = (import_ffcv(f"ffcv.pipeline.{name}") for name in ("operation", "allocation_query"))
    tall, wide = size

    class Crops(base.Operation):
        def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
            memory = [query.AllocationQuery(shape, np.dtype("u1")) for shape in ((views, 3, tall, wide), (1,))]
            return replace(previous_state, jit_mode=True, shape=memory[0].shape, dtype=np.dtype("u1")), tuple(memory)

        def generate_code(self) -> Callable:
            read, each = self.memory_read, compiler.get_iterator()
            imdecode, resize_crop = compiler.compile(libffcv.imdecode), compiler.compile(libffcv.resize_crop)

            def crops(rows, memory, metadata, storage):
                images, failed = memory
                for i in each(len(rows)):
                    field = metadata[rows[i, 0]]
                    data = read(field["data_ptr"], storage)
                    height, width, status = np.uint32(field["height"]), np.uint32(field["width"]), 0
                    if field["mode"] == _RAW:
                        image = data.reshape(height, width, 3)
                    else:
                        # One for each thread at a time; FFCV's own decoders keep one for each image of each batch.
                        image = np.empty((height, width, 3), np.uint8)
                        status = imdecode(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                    failed[i, 0] = status != 0
                    view = np.empty((tall, wide, 3), np.uint8)
                    for v in range(views if status == 0 else 0):
                        box = rows[i, 1 + 4 * v : 5 + 4 * v]
                        resize_crop(image, box[0], box[0] + box[2], box[1], box[1] + box[3], view)
                        for c in range(3):
                            for y in range(tall):
                                for x in range(wide):
                                    images[i, v, c, y, x] = view[y, x, c]
                return images[: len(rows)], failed[: len(rows)]

            crops.is_parallel = True  # pyright: ignore[reportFunctionMemberAccess]
            return crops

    return Crops()


@cache
def _thread_type() -> Any:
    """FFCV's thread of an epoch, but one that tells what went wrong and that ends when it is told to."""

    class EpochThread(import_ffcv("ffcv.loader.epoch_iterator").EpochIterator):
        def __init__(self, loader: Any, batches: int, make: Callable[[Callable[[np.ndarray], Any]], Batch]):
            self.error: BaseException | None = None
            self._make = make
            # FFCV counts off the batches by this; which samples are in them is found when their turn comes.
            super().__init__(loader, range(batches * loader.batch_size))

        def run(self) -> None:
            try:
                super().run()
            except BaseException as error:
                self.error = error

        def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Batch:
            if self.terminate_event.is_set():
                raise StopIteration  # which ends `run`
            pipeline = super().run_pipeline
            return self._make(lambda rows: pipeline(b_ix, rows, batch_slot, cuda_event)[0])

        def take(self, limit: float) -> Batch:
            """The next batch; raises `DataError` where the thread failed, or gives none for `limit` seconds."""
            path, until = self.loader.fname, time.monotonic() + limit
            while True:
                alive = self.is_alive()  # asked before the queue, which the thread may fill just before it ends
                with contextlib.suppress(Empty):
                    return self.output_queue.get(timeout=0.2 if alive else 0)[1]
                if isinstance(self.error, DataError):
                    raise self.error
                if not alive:
                    reason = " ".join(f"{type(self.error).__name__}: {self.error}".split())
                    raise DataError(
                        f"FFCV failed on {path} ({reason}): set data.source=auto to do without its loader."
                    ) from self.error
                if time.monotonic() > until:
                    raise DataError(f"FFCV gave no batch of {path} in {limit:.0f} s: check the drive that it is on.")

        def end(self) -> None:
            """Stop the thread and wait for it, unless it hangs: it would not keep the process from ending."""
            self.terminate_event.set()
            until = time.monotonic() + _END_LIMIT
            while self.is_alive() and time.monotonic() < until:
                with contextlib.suppress(Empty):
                    self.output_queue.get_nowait()  # a full queue would hold it
                self.join(0.02)

    return EpochThread


class FfcvLoader:
    """The micro-batches of a plan's rank through FFCV's loader: those of `Loader`, but with FFCV's pixels.

    Samples, labels, masks, crops and what is left for the device are the same. Crops are resized by OpenCV's
    INTER_AREA, whatever `augment.interpolation`, and JPEGs decoded by the quick transform. `indices` `[N]` maps the ids
    of `order` to images of `source` (None: they are the same). `plan.workers` counts threads. Raises `DataError` for
    an augmentation that would change looks on the host, and while iterating for what fails.
    """

    def __init__(
        self, source: Beton, indices: np.ndarray | None, augment: Augment, masks: MakeMasks | None, order: Order,
        plan: Plan,
    ):  # fmt: skip
        if augment.changes_looks and not augment.on_device:
            raise DataError("data.source=ffcv needs loader.augment=device: FFCV crops, the device does the rest.")
        self.requests = Requests(order, plan)
        self._beton, self._augment, self._masks, self._plan = source, augment, masks, plan
        self._source = source if indices is None else Subset(source, indices)
        self._rows = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        self._size = (augment.size, augment.size) if isinstance(augment.size, int) else augment.size
        self._pin = plan.pin_memory and torch.cuda.is_available()
        self._limit = _COMPILE_LIMIT
        fields, image = source.layout.fields, source.layout.fields[source.layout.image]
        spec = import_ffcv("ffcv.pipeline.pipeline_spec").PipelineSpec(image, _crops(self._size, augment.views))
        most = import_ffcv("numba").config.NUMBA_NUM_THREADS
        threads = torch.get_num_threads()
        self._loader = import_ffcv("ffcv.loader").Loader(
            source.path,
            batch_size=plan.micro_batch,
            num_workers=min(max(1, plan.workers), most),
            os_cache=True,  # the other cache asks which samples come, and keeps whole pages
            seed=0,  # orders nothing here, but without it FFCV draws from numpy's global generator
            pipelines={**dict.fromkeys(fields), image: spec},  # None: not read
            batches_ahead=max(1, plan.prefetch),
        )
        torch.set_num_threads(threads)  # FFCV gives the whole process as many as it takes itself
        # Its tables in Python are for the other cache, and take 400 MB for a million images.
        vars(self._loader.memory_manager).update(ptr_to_size={}, sample_to_pages={}, page_to_samples={})

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        requests, left, threads = iter(self.requests), len(self), torch.get_num_threads()
        while left:
            count = min(left, max(1, _SPAN // self._plan.micro_batch))
            left -= count
            thread = _thread_type()(self._loader, count, lambda decode: self._batch(next(requests), decode))
            try:
                for place in range(count):
                    batch = thread.take(self._limit)
                    self._limit = _LIMIT
                    if not place:
                        torch.set_num_threads(threads)
                    yield batch
            finally:
                thread.end()

    def _batch(self, request: Request, decode: Callable[[np.ndarray], Any]) -> Batch:
        """The batch of a request; `decode` runs FFCV's pipeline over rows of samples and crops, in FFCV's thread."""
        augment, plan, ids, skipped = self._augment, self._plan, request.ids.copy(), []
        numbers = augment.numbers(plan.seed, request.epochs, ids)
        rows = self._rows[ids]
        sizes = zip(self._beton.heights[rows].tolist(), self._beton.widths[rows].tolist(), strict=True)
        boxes = np.array([[self._box(size, u) for u in views] for size, views in zip(sizes, numbers, strict=True)])
        decoded, failed = decode(np.concatenate([rows[:, None], boxes.reshape(len(rows), -1)], axis=1))
        if self._beton.channels == 1:
            decoded = np.moveaxis(luma(np.moveaxis(decoded, 2, -1)), -1, 2)
        images = torch.empty(decoded.shape, dtype=torch.uint8, pin_memory=self._pin)
        images.copy_(torch.from_numpy(decoded))  # FFCV writes the next batches into the same memory
        for row in np.flatnonzero(failed).tolist():
            epoch, wanted = int(request.epochs[row]), int(ids[row])
            image, i = read_or_replace(self._source, plan.seed, epoch, wanted, plan.on_error, skipped)
            if i != wanted:
                ids[row] = i
                numbers[row] = augment.numbers(plan.seed, np.array([epoch]), np.array([i]))[0]
            images[row] = self._crop(image, numbers[row])
        batch = Batch(
            images=images[:, 0] if augment.views == 1 else images,
            sample_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(self._beton.labels[self._rows[ids]]),
            epochs=torch.from_numpy(request.epochs),
            step=request.step,
            look=augment.left_for_device(numbers),
            skipped=skipped,
        )
        batch = add_masks(batch, self._masks, plan.seed)
        return batch.pin_memory() if self._pin else batch

    def _box(self, size: tuple[int, ...], u: np.ndarray) -> tuple[int, int, int, int]:
        return crop_box(size[0], size[1], self._augment.crop_scale, self._augment.crop_aspect, u[:22])

    def _crop(self, image: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
        """The views `[V, C, *size]` of an image `[H, W, C]` that FFCV could not decode, resized as it does."""
        pixels = np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        views = np.empty((len(numbers), *self._size, 3), dtype=np.uint8)
        for view, u in zip(views, numbers, strict=True):
            top, left, height, width = self._box(image.shape, u)
            import_ffcv("ffcv.libffcv").resize_crop(pixels, top, top + height, left, left + width, view)
        return torch.from_numpy(np.moveaxis(views, -1, 1)[:, : image.shape[2]])
