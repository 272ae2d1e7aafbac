"""What writing shards and writing FFCV files have in common: images in an order, encoded by several processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from .images import DataError, Source
from .shard_samples import Task, run_tasks, start_process
from .shards import Shards, names_shards
from .sources import open_source

T = TypeVar("T")
_CHUNK = 8  # images that a process takes at once


def open_to_write(source: str | Source, split: str | None, holdout: float) -> tuple[Source, str | None, dict[str, Any]]:
    """The source, the folder of its files where it has some, and what a manifest says of it; raises `DataError`.

    Without `split` it is all there is to train on.
    """
    if split is None:  # what is written is not to be split a second time
        holdout = 0.0
    root: str | None = None
    if not isinstance(source, str):
        opened, path = source, type(source).__name__
    elif names_shards(source):
        opened, path = Shards(source, split), source
    else:
        # Images keep their own channels; the digits have one.
        channels: Any = 1 if source == "digits" else None
        opened, path = open_source(source, split or "train", channels, holdout), source
        root = os.path.expanduser(source) if os.path.isdir(os.path.expanduser(source)) else None
    crc32 = 0
    for i in range(len(opened)):
        name = os.path.relpath(opened.name(i), root) if root else opened.name(i)
        crc32 = zlib.crc32(os.fsencode(f"{name}\0{opened.label(i) if root else ''}\n"), crc32)
    return opened, root, {"path": path, "split": split or "train", "holdout": holdout, "images": len(opened),
                          "crc32": crc32}  # fmt: skip


def tasks_of(source: Source, root: str | None, order: Iterator[int]) -> Iterator[Task]:
    """The images of `order`: files below `root`, or places in the source."""
    for i in order:
        name = source.name(i)
        if root:
            yield Task(f"{i:09d}", os.path.relpath(name, root), source.label(i), name)
        else:
            yield Task(f"{i:09d}", name, -1, i)


def in_order(
    tasks: Iterator[Task], encode: Callable[..., T], given: tuple[Any, ...], processes: int, advice: str = ""
) -> Generator[T, None, None]:
    """`encode(task, *given)` of each task in their order; raises `DataError` where a process dies, with `advice`."""
    if processes <= 1:
        yield from (encode(task, *given) for task in tasks)
        return
    # Spawned: torch, which the parent has loaded, keeps threads that a fork would cut off.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_process, (encode, given))
    waiting: deque[Any] = deque()
    try:
        while True:
            while len(waiting) < 2 * processes and (chunk := list(itertools.islice(tasks, _CHUNK))):
                waiting.append(pool.submit(run_tasks, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except (BrokenProcessPool, OSError):  # the latter where it dies while it is being started
        # One that was being started when another died is left to itself, and `shutdown` would wait for it.
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise DataError(
            "A writer process died, often for want of memory: run the same command again with fewer --processes"
            f"{advice}."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def processes_for(wanted: int | None, images: int, files: bool) -> int:
    """Writer processes. Those that read through a source load torch, which takes them seconds."""
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = cores if images >= (1000 if files else 20_000) else 1
    return min(wanted, -(-images // _CHUNK))
