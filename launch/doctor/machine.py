"""Cores, memory, shared memory, open files and the disk of this machine, against what a run asks of them."""

from __future__ import annotations

import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..host import cores as usable_cores
from ..host import processor
from ..nodes.open_files import FEWEST_FILES
from .findings import Finding, size

# A batch of 256 images of 224 pixels, or of four crops of 112 each, as bytes in which loader workers hand it over.
BATCH_BYTES = 256 * 3 * 224 * 224
PREFETCH = 2  # batches that each worker holds ready, by default
MOST_WORKERS = 16  # that loader.workers=auto starts for a rank
PHOTO_BYTES = 110e3  # a photo of ImageNet, about
# Of a rank: 32 batches of some tensors in shared memory, 256 open shards, its libraries.
LEAST_FILES, GOOD_FILES = 1024, 4096
DEMO_MEMORY = 1.5e9
_TRIAL, _BLOCK, _PATIENCE = 128 * 2**20, 4 * 2**20, 5.0


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> tuple[float | None, int | None]:
    """Cores and bytes of memory that control groups (version 1 or 2) leave this process; None: no limit."""
    cores: list[float] = []
    memory: list[int] = []
    for line in own.read_text(encoding="utf-8").splitlines():
        _, kinds, path = line.split(":", 2)
        for folder in _and_above(root, kinds, path):
            quota, period = (_number(folder / name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
            if (folder / "cpu.max").is_file():
                quota, period = (_as_number(word) for word in (folder / "cpu.max").read_text().split()[:2])
            if quota and period and quota > 0:
                cores.append(quota / period)
            for name in ("memory.max", "memory.limit_in_bytes"):
                limit = _number(folder / name)
                if limit is not None and limit < 2**60:  # version 1 writes "none" as a very large number
                    memory.append(limit)
    return min(cores, default=None), min(memory, default=None)


def _and_above(root: Path, kinds: str, path: str) -> Iterator[Path]:
    """A control group's folder and those above it; in a container often only the uppermost is to be seen."""
    mounts = [root / kinds, *(root / kind for kind in kinds.split(","))] if kinds else [root, root / "unified"]
    for mount in mounts:
        inner = mount / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == mount or mount in folder.parents)


def _number(path: Path) -> int | None:
    try:
        return _as_number(path.read_text(encoding="utf-8").strip())
    except OSError:
        return None


def _as_number(word: str) -> int | None:
    return int(word) if word.lstrip("-").isdecimal() else None


def cores(ranks: int) -> Finding:
    """Cores of this machine, and how many of them this process may use."""
    found, (quota, _) = usable_cores(), cgroup_limits()
    usable = found if quota is None else min(found, quota)
    load = os.getloadavg()[0]
    facts = {"machine": os.cpu_count(), "affinity": found, "cgroup": quota, "load": load}
    text = f"{found} of {os.cpu_count()} ({processor()}, {platform.machine()}), load {load:.1f}"
    if quota is not None and quota < found:
        workers = max(0, min(MOST_WORKERS, int(quota) // ranks - 1))
        return Finding(
            "cores", "note", f"{text}; a control group allows {quota:g}, which loader.workers=auto does not see",
            f"loader.workers={workers} OMP_NUM_THREADS=1, or give the container more cores", facts=facts,
        )  # fmt: skip
    if usable < 2 * ranks:
        return Finding(
            "cores", "note", f"{text}: training and decoding share {usable:g} among {ranks} rank{'s' * (ranks > 1)}",
            "8 or more cores for each GPU; smaller images: elsewhere shards write --max-side 256", facts=facts,
        )  # fmt: skip
    if load > 1.5 * usable:
        return Finding(
            "cores", "note", f"{text}: other jobs are on them", "wait for them before measuring", facts=facts
        )
    return Finding("cores", "ok", text, facts=facts)


def memory() -> Finding:
    """Memory of this machine, and what of it is free to this process."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    known = {name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    total, free, (_, limit) = known["MemTotal"], known["MemAvailable"], cgroup_limits()
    facts = {"total": total, "available": free, "cgroup": limit}
    text = f"{size(free)} of {size(total)} free"
    if limit is not None and limit < total:
        text, free = f"{text}; a control group allows {size(limit)}", min(free, limit)
    if free < DEMO_MEMORY:
        return Finding("memory", "problem", text, "end other programs, or give the container more", True, facts)
    if free < 8e9:
        fix = "fewer loader.workers (each takes about 0.5 GB) and a smaller loader.micro_batch"
        return Finding("memory", "note", text, fix, facts=facts)
    return Finding("memory", "ok", text, facts=facts)


def shared_memory(ranks: int, folder: str = "/dev/shm") -> Finding:
    """Shared memory, through which loader workers hand batches over."""
    workers = max(0, min(MOST_WORKERS, usable_cores() // ranks - 1))
    wanted = ranks * workers * PREFETCH * BATCH_BYTES
    name, fix = "shared memory", "docker run --shm-size=16g (or --ipc=host); mount -o remount,size=16G /dev/shm"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, 2**20)
    except OSError as error:
        found = f"{folder} cannot be written to ({error.strerror}): loader workers cannot hand over a batch"
        return Finding(name, "problem", found, f"{fix}; or loader.workers=0", workers > 0)
    state = os.statvfs(folder)
    total, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
    facts = {"total": total, "free": free, "wanted": wanted, "workers": workers, "ranks": ranks}
    text = (
        f"{size(free)} of {size(total)} free in {folder}; {ranks} × {workers} workers × {PREFETCH} batches of 256 "
        f"images of 224 pixels take {size(wanted)}"
    )
    if free < wanted:
        return Finding(name, "problem", text, f"{fix}; or fewer loader.workers, a smaller batch", facts=facts)
    return Finding(name, "ok", text, facts=facts)


def open_files() -> Finding:
    """How many files a process may have open: batches in shared memory, shards, connections to other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = ["unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}" for limit in (soft, hard)]
    name, facts = "open files", {"soft": soft, "hard": hard}
    text = f"{shown[1]} at once" + (f" ({shown[0]} now, which a run raises)" if soft != hard else "")
    if hard == resource.RLIM_INFINITY or hard >= GOOD_FILES:
        return Finding(name, "ok", text, facts=facts)
    fix = "raise the hard limit: docker run --ulimit nofile=65536, or /etc/security/limits.conf"
    if hard < LEAST_FILES:
        why = "a rank with 16 workers and shards needs about 1,024"
        return Finding(name, "problem", f"{text}; {why}", fix, hard < FEWEST_FILES, facts)
    return Finding(name, "note", f"{text}; enough for one machine, not for hundreds of ranks", fix, facts=facts)


def disk(folder: Path, is_here: bool) -> Finding:
    """Free space and speed of a folder, by a file that has no name and so is gone with this process.

    `is_here` says that runs are written there unless told otherwise.
    """
    name = f"disk {folder}"
    try:
        written, writing, reading = _measure(folder)
    except OSError as error:
        fix = "run elsewhere in a folder of your own, or set run.dir" if is_here else "check owner, quota and mount"
        return Finding(name, "problem", f"cannot be written to ({error.strerror})", fix, is_here)
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    write, read = written / writing, written / reading
    kind = _file_system(folder)
    facts = {"free": free, "write": write, "read": read, "trial": written, "file_system": kind}
    text = (
        f"{size(free)} free, {kind}; {size(written)} written and synced at {size(write)}/s, read at {size(read)}/s "
        f"(about {read / PHOTO_BYTES:,.0f} photos a second, in one piece)"
    )
    if free < 5e9:
        fix = "checkpoint.keep=1, or run.dir on another disk: a ViT-B checkpoint with its moments takes about 1.5 GB"
        return Finding(name, "note", text, fix, facts=facts)
    if read < 100e6 or write < 50e6:
        fix = "images and runs on a local disk; many small files as shards: elsewhere shards write"
        return Finding(name, "note", text, fix, facts=facts)
    return Finding(name, "ok", text, facts=facts)


def _measure(folder: Path) -> tuple[int, float, float]:
    """Bytes written, seconds to write and sync them, seconds to read them, from the disk where the system obeys."""
    block, written = os.urandom(_BLOCK), 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        while written < _TRIAL and (time.perf_counter() - start < _PATIENCE or not written):
            written += file.write(block)
        os.fsync(file.fileno())
        writing = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(_BLOCK):
            pass
        return written, writing, time.perf_counter() - start


def _file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    place, best = str(folder.resolve()), ("", "unknown file system")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind = line.split()[:3]
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]
