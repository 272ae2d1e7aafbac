"""What reading, decoding and cropping images costs on this machine, side by side in one run."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from ..data.augment import Augment
from ..data.images import ImageFolder
from ..data.shard_writer import WriteOptions, write_shards
from ..data.shards import Shards
from ..data.streams import generator

_BATCH = 16  # images of one turn


def _pillow(folder: str, size: int, views: int) -> Callable[[int], Any]:
    """The baseline: torchvision's ImageFolder, Pillow's bicubic RandomResizedCrop, flip, ToTensor, Normalize."""
    from torchvision import datasets, transforms

    view = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    source = datasets.ImageFolder(folder)

    def read(i: int) -> list[torch.Tensor]:
        image = source[i % len(source)][0]
        return [view(image) for _ in range(views)]

    return read


def _ours(source: Any, size: int, views: int) -> Callable[[int], Any]:
    augment = Augment(
        size=size, crop_scale=(0.08, 1.0), interpolation="bicubic", flip=0.5, blur=0.0, grayscale=0.0, views=views
    )
    return lambda i: augment(source.read(i % len(source)), generator(0, "augment", 0, i))


def bench_data(folder: str, images: int = 200, rounds: int = 9) -> dict[str, Any]:
    """Images per CPU-second on one core for one crop of 224 pixels and four of 112, readers in turns.

    `folder` holds folders of classes; its first `images` images are also written to shards, in a temporary folder.
    Returns machine, versions, date and `rows`. Raises DataError for a folder that cannot be used.
    """
    torch.set_num_threads(1)
    found = ImageFolder(folder)
    with tempfile.TemporaryDirectory() as aside:
        chosen, packed = os.path.join(aside, "images", "all"), os.path.join(aside, "shards")
        os.makedirs(chosen)
        for i in generator(0, "bench data", 0).permutation(len(found))[:images].tolist():
            path = os.path.abspath(found.name(i))
            os.symlink(path, os.path.join(chosen, f"{i}{os.path.splitext(path)[1]}"))
        folder = os.path.dirname(chosen)
        write_shards(folder, packed, options=WriteOptions(), processes=1)
        files, shards = ImageFolder(folder), Shards(packed, None, 3)
        rows = []
        for size, views in ((224, 1), (112, 4)):
            readers = {
                "ImageFolder + Pillow": _pillow(folder, size, views),
                "elsewhere, folder": _ours(files, size, views),
                "elsewhere, shards": _ours(shards, size, views),
            }
            rates: dict[str, list[float]] = {name: [] for name in readers}
            for turn in range(rounds + 1):
                for name, read in readers.items():
                    start = time.process_time()
                    for i in range(turn * _BATCH, (turn + 1) * _BATCH):
                        read(i)
                    if turn:  # the first pays for imports and caches
                        rates[name].append(_BATCH / (time.process_time() - start))
            base = statistics.median(rates["ImageFolder + Pillow"])
            for name, each in rates.items():
                median = statistics.median(each)
                rows.append({"views": views, "size": size, "reader": name, "images_per_second": median,
                             "least": min(each), "most": max(each), "ratio": median / base})  # fmt: skip
    return {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
            "python": platform.python_version(), "date": datetime.date.today().isoformat(), "images": len(files),
            "rows": rows}  # fmt: skip


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
