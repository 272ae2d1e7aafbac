"""What extracting features costs beside the encoder alone, and how long exact k-NN takes."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.sources import open_source
from ..data.streams import generator
from ..data.views import CentreView, Views
from .evaluate.features import Reading, extract, pooled_layers
from .evaluate.nearest import NEIGHBOURS, Nearest
from .evaluate.precision import choose_compute
from .evaluate.session import Options, joined, loader_workers
from .host import processor


def _facts() -> dict[str, Any]:
    return {"machine": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "date": date.today().isoformat()}  # fmt: skip


def bench_features(
    checkpoint: Path, overrides: Sequence[str], recipe: str | None, images: int, rounds: int, layers: int
) -> dict[str, Any]:
    """Images per second of extraction and of the encoder alone, each turn of one beside a turn of the other.

    The encoder alone takes normalised batches that lie on the device. Both run in the same precision and batch.
    Raises UserError or DataError for what a user can mend.
    """
    options = Options(checkpoint, overrides, recipe=recipe)
    with joined(options) as (world, method, config, what), tempfile.TemporaryDirectory() as folder:
        source = open_source(config.data.places()[0], "train", config.model.channels, 0.0, config.data.source)
        count = min(images, len(source))
        batch = config.loader.micro_batch or (256 if world.device.type == "cuda" else 64)
        indices = generator(0, "bench features", 0).permutation(len(source))[:count]
        view, size = CentreView(config.model.image_size, config.data.interpolation), config.model.image_size
        reading = Reading(loader_workers(config, world), batch, config.loader.prefetch)
        sample = Views(source, indices[:batch], view, batch)[0].images.to(world.device)
        precision = choose_compute(method, config.engine.precision, world.device, sample, config.engine.compile)
        inputs = method.normalise(sample)

        def alone() -> None:
            with torch.inference_mode(), method.autocast():
                for first in range(0, count, batch):
                    method.encoder(inputs[: min(batch, count - first)])
            if world.device.type == "cuda":
                torch.cuda.synchronize()

        def extraction() -> None:
            extract(
                lambda pixels: pooled_layers(method, pixels, layers), source, indices, view,
                (method.encoder.channels, *size), world, reading, Path(folder), "bench",
            )  # fmt: skip

        rates: dict[str, list[float]] = {"alone": [], "extraction": []}
        alone()
        for _ in range(rounds):
            for name, turn in (("alone", alone), ("extraction", extraction)):
                start = time.perf_counter()
                turn()
                rates[name].append(count / (time.perf_counter() - start))
        ratios = [b / a for a, b in zip(rates["alone"], rates["extraction"], strict=True)]
        return {
            **_facts(), "encoder": what, "precision": precision, "batch": batch, "workers": reading.workers,
            "images": count, "layers": layers, "ratio": statistics.median(ratios),
            "rows": [{"what": name, "images_per_s": statistics.median(found), "least": min(found), "most": max(found)}
                     for name, found in rates.items()],
        }  # fmt: skip


def print_features_table(result: dict[str, Any]) -> None:
    print(f"{result['encoder']}, {result['precision']}, batch {result['batch']}, {result['workers']} workers")
    print(f"{'':<12}{'images/s':>10}  least–most, {result['images']} images a turn")
    for row in result["rows"]:
        print(f"{row['what']:<12}{row['images_per_s']:>10,.1f}  {row['least']:,.1f}–{row['most']:,.1f}")
    print(f"extraction / alone, median of turns side by side: {result['ratio']:.3f}")
    _print_facts(result)


def bench_nearest(images: int, asked: int, width: int) -> dict[str, Any]:
    """Seconds of exact k-NN for all k of the probe on random features of ten classes."""
    import resource

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rng = np.random.default_rng(0)
    train = rng.standard_normal((images, width), np.float32)
    val = rng.standard_normal((asked, width), np.float32)
    labels = rng.integers(0, 10, images)
    wall, cpu = time.perf_counter(), time.process_time()
    Nearest(train, labels, device).votes(val, NEIGHBOURS).cpu()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**_facts(), "device": device.type, "train": images, "val": asked,
            "width": width, "seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak}  # fmt: skip


def print_nearest_table(result: dict[str, Any]) -> None:
    shape = f"{result['train']:,} × {result['val']:,} × {result['width']}"
    print(f"{shape} on {result['device']}: {result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of processors), "
          f"peak {result['peak_bytes'] / 1e9:.1f} GB")  # fmt: skip
    _print_facts(result)


def _print_facts(result: dict[str, Any]) -> None:
    print(f"{result['machine']}, {result['threads']} threads, torch {result['torch']}, Python {result['python']}, "
          f"{result['date']}")  # fmt: skip
