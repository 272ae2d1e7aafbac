"""What reading, decoding and cropping images costs on this machine, side by side in one run."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ..data.augment import Augment
from ..data.ffcv import open_beton
from ..data.ffcv_writer import write_beton
from ..data.images import ImageFolder
from ..data.loader import Loader
from ..data.order import Permutations, Plan
from ..data.prefetch import OnDevice
from ..data.readers import Reader, open_reader
from ..data.shard_writer import WriteOptions, write_shards
from ..data.shards import Shards
from ..data.streams import generator
from ..data.webdataset import Stream
from .host import processor

_BATCH = 16
_BASELINE = "ImageFolder + Pillow"


def _pillow(folder: str, size: int, views: int) -> Callable[[], None]:
    """The baseline: torchvision's ImageFolder, Pillow's bicubic RandomResizedCrop, flip, ToTensor, Normalize."""
    from torchvision import datasets, transforms

    view = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    source = datasets.ImageFolder(folder)

    def read() -> None:
        for i in range(len(source) // _batch(len(source)) * _batch(len(source))):
            image = source[i][0]
            torch.stack([view(image) for _ in range(views)])

    return read


def _ours(make: Callable[[Augment], Reader], size: int, views: int, on_device: bool = False) -> Callable[[], None]:
    """A reader of ours, which makes the same batches in every turn."""
    augment = Augment(
        size=size, crop_scale=(0.08, 1.0), interpolation="bicubic", blur=0.0, grayscale=0.0, views=views,
        on_device=on_device,
    )  # fmt: skip
    batches = OnDevice(make(augment), augment, torch.device("cpu"))

    def read() -> None:
        for _batch in batches:
            pass

    return read


def _batch(images: int) -> int:
    return min(_BATCH, images)


def _plan(images: int) -> Plan:
    """One turn: every image once, but for the rest of a batch."""
    batch = _batch(images)
    return Plan(seed=0, global_batch=batch, micro_batch=batch, stop_step=images // batch)


def _readers(images: str, packed: dict[str, str], size: int, views: int) -> dict[str, Callable[[], None]]:
    """What is compared, by name; each call reads one turn of images."""
    files = ImageFolder(images)
    plan, order = _plan(len(files)), Permutations(len(files), 0)
    shards = Shards(packed["shards"], None, 3)
    stream = Stream(packed["shards"], 3, streams=1, global_batch=plan.global_batch, seed=0)
    found = {
        _BASELINE: _pillow(images, size, views),
        "folder": _ours(lambda augment: Loader(files, augment, None, order, plan), size, views),
        "shards": _ours(lambda augment: Loader(shards, augment, None, order, plan), size, views),
        "webdataset": _ours(lambda augment: open_reader(stream, augment, None, None, plan, "webdataset"), size, views),
    }
    for mode in ("jpg", "raw"):
        if mode in packed:
            beton = open_beton(packed[mode], "train", 3)

            def by_index(augment: Augment, beton: Any = beton) -> Reader:
                return Loader(beton, augment, None, order, plan)

            def by_ffcv(augment: Augment, beton: Any = beton) -> Reader:
                return open_reader(beton, augment, None, order, plan, "ffcv")

            found[f".beton {mode}, by index"] = _ours(by_index, size, views)
            found[f".beton {mode}, ffcv"] = _ours(by_ffcv, size, views, on_device=True)
    return found


def _undecoded(packed: str, seconds: float = 1.0) -> float:
    """Samples a CPU-second that shards give at random places, decoding nothing."""
    shards = Shards(packed, None, 3)
    places = generator(0, "bench data", 1).integers(len(shards), size=100_000).tolist()
    start, done = time.process_time(), 0
    while time.process_time() - start < seconds:
        for i in places[done % 100_000 : done % 100_000 + 1000]:
            shards.read_bytes(i)
            shards.label(i)
        done += 1000
    return done / (time.process_time() - start)


def bench_data(folder: str, images: int = 200, rounds: int = 5) -> dict[str, Any]:
    """Images per CPU-second on one core for one crop of 224 pixels and four of 112, readers in turns.

    `folder` holds folders of classes; its first `images` images are also written to shards and, where FFCV is
    installed, to `.beton` files, in a temporary folder. Returns machine, versions, date and `rows`. Raises DataError
    for a folder that cannot be used.
    """
    torch.set_num_threads(1)
    found = ImageFolder(folder)
    with tempfile.TemporaryDirectory() as aside:
        chosen, packed = os.path.join(aside, "images", "all"), {"shards": os.path.join(aside, "shards")}
        os.makedirs(chosen)
        for i in generator(0, "bench data", 0).permutation(len(found))[:images].tolist():
            path = os.path.abspath(found.name(i))
            os.symlink(path, os.path.join(chosen, f"{i}{os.path.splitext(path)[1]}"))
        folder = os.path.dirname(chosen)
        write_shards(folder, packed["shards"], options=WriteOptions(), processes=1)
        if find_spec("ffcv"):
            for mode in ("jpg", "raw"):
                packed[mode] = os.path.join(aside, f"{mode}.beton")
                write_beton(folder, packed[mode], mode=mode, processes=1)
        rows = []
        for size, views in ((224, 1), (112, 4)):
            readers = _readers(folder, packed, size, views)
            rates: dict[str, list[float]] = {name: [] for name in readers}
            plan = _plan(len(os.listdir(chosen)))
            for turn in range(rounds + 1):
                for name, read in readers.items():
                    start = time.process_time()
                    read()
                    if turn:  # the first pays for imports, caches and FFCV's compiler
                        rates[name].append(plan.stop_step * plan.global_batch / (time.process_time() - start))
            base = statistics.median(rates[_BASELINE])
            for name, each in rates.items():
                median = statistics.median(each)
                rows.append({"views": views, "size": size, "reader": name, "images_per_second": median,
                             "least": min(each), "most": max(each), "ratio": median / base})  # fmt: skip
        return {"machine": processor(), "torch": torch.__version__, "python": platform.python_version(),
                "date": datetime.date.today().isoformat(), "images": len(os.listdir(chosen)), "rows": rows,
                "undecoded_per_second": _undecoded(packed["shards"])}  # fmt: skip


def print_data_table(result: dict[str, Any]) -> None:
    """Print what `bench_data` returned, a line for each reader and crop."""
    print(
        f"{result['machine']}, one core, torch {result['torch']}, Python {result['python']}, {result['date']}; "
        f"{result['images']} images"
    )
    print(f"{'crops':>8} {'reader':22} {'images/s':>9} {'least–most':>15} {'ratio':>6}")
    for row in result["rows"]:
        spread = f"{row['least']:,.0f}–{row['most']:,.0f}"
        print(
            f"{row['views']:>2} × {row['size']:<3} {row['reader']:22} {row['images_per_second']:>9,.0f} {spread:>15} "
            f"{row['ratio']:>6.2f}"
        )
    print(f"shards, read and not decoded: {result['undecoded_per_second']:,.0f} samples/s")
