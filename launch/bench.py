"""What the parts of training cost on this machine, measured one at a time."""

from __future__ import annotations

import platform
import time

import numpy as np

from ..data.masks import block_masks


def bench_masks(seconds: float = 2.0) -> dict:
    """Images per second of both mask settings on a 14×14 grid at batches of 64 and 256, in this thread alone.

    `seconds` is the time spent on each of the four measurements. Returns `machine`, `numpy` and `rows`, a list of
    `setting`, `batch`, `images_per_second` and `redraws_per_image`.
    """
    rows = []
    for setting in ("published", "recommended"):
        masks = block_masks(setting, grid=(14, 14))
        for batch in (64, 256):
            masks(0, 0, 0, np.arange(batch))  # the first call pays for imports and caches
            step = redraws = 0
            start = now = time.perf_counter()
            while not step or now - start < seconds:
                redraws += masks(0, 0, step, np.arange(step * batch, (step + 1) * batch)).redraws
                step += 1
                now = time.perf_counter()
            rows.append(
                {
                    "setting": setting,
                    "batch": batch,
                    "images_per_second": step * batch / (now - start),
                    "redraws_per_image": redraws / (step * batch),
                }
            )
    return {"machine": platform.processor() or platform.machine(), "numpy": np.__version__, "rows": rows}


def print_masks_table(result: dict) -> None:
    """Prints what `bench_masks` returned, one line for each setting and batch."""
    print(f"block masks, 14×14 patches, one thread, {result['machine']}, numpy {result['numpy']}")
    print(f"{'setting':<12} {'batch':>5} {'images/s':>10} {'redraws':>8}")
    for row in result["rows"]:
        redraws = f"{row['redraws_per_image']:.2%}"
        print(f"{row['setting']:<12} {row['batch']:>5} {row['images_per_second']:>10,.0f} {redraws:>8}")
