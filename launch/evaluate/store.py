"""Where features lie: in memory, in a file that all ranks share, or in a cache under what they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.images import Source
from ..errors import UserError
from ..world import World


@dataclass
class Features:
    """Numbers of images, in the order asked for: `values` `[n, …]`, `labels` `[n]`, `indices` `[n]` in the source."""

    values: np.ndarray  # mapped from a file where they are large
    labels: np.ndarray
    indices: np.ndarray
    unreadable: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Features:
        """Those of the images `indices` that were read, in that order."""
        order = np.argsort(self.indices)
        places = np.searchsorted(self.indices, indices, sorter=order).clip(max=len(order) - 1)
        rows = order[places]
        rows = rows[self.indices[rows] == indices]
        return Features(self.values[rows], self.labels[rows], self.indices[rows], self.unreadable)

    def pooled(self, layers: str = "last", pool: str = "patch") -> np.ndarray:
        """`[n, D]` of `values` `[n, layers, 1 or 2, D]`: of the last layer, or of all layers side by side.

        `pool` is patch (mean of the patch tokens), class (the class token) or both, side by side.
        """
        chosen = self.values[:, -1:] if layers == "last" else self.values
        kinds = {"patch": slice(0, 1), "class": slice(1, 2), "both": slice(0, 2)}[pool]
        chosen = chosen[:, :, kinds]
        return chosen.reshape(len(chosen), int(np.prod(chosen.shape[1:])))


class Store:
    """Rows of an array, kept in memory, or in a file that all ranks write and read.

    A file is needed with several ranks, and taken where memory would not hold the rows. Raises UserError where the disk
    does not, either.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: Any, world: World, folder: Path, name: str):
        self.shape, self.dtype, self.world, self.path = (rows, *shape), np.dtype(dtype), world, None
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        if world.size == 1 and size < _free_memory() / 2:
            self.array = np.empty(self.shape, self.dtype)
            return
        self.path = folder / f"{name}.npy.part"
        self.path = Path(world.first_decides(lambda: self._create(self.path, size)))  # pyright: ignore
        self.offset = np.load(self.path, mmap_mode="r").offset
        self.file = os.open(self.path, os.O_WRONLY)

    def _create(self, path: Path, size: int) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise UserError(
                f"{path.parent} has {free / 1e9:.1f} GB free and the features need {size / 1e9:.1f} GB: set --cache to "
                "a folder with more, or take fewer images with --train-images."
            )
        np.lib.format.open_memmap(path, "w+", self.dtype, self.shape)
        return str(path)

    def write(self, first: int, values: np.ndarray) -> None:
        """Put rows there; not through a mapping, whose pages two machines would write whole."""
        values = np.ascontiguousarray(values, self.dtype)
        if self.path is None:
            self.array[first : first + len(values)] = values
            return
        view, offset = memoryview(values.tobytes()), self.offset + first * (values.nbytes // max(1, len(values)))
        while len(view):
            written = os.pwrite(self.file, view, offset)
            view, offset = view[written:], offset + written

    def finish(self) -> np.ndarray:
        """The whole array, once every rank is here."""
        if self.path is None:
            return self.array
        os.fsync(self.file)
        os.close(self.file)
        self.world.gather_host(None)
        return np.load(self.path, mmap_mode="r")

    def discard(self) -> None:
        """Remove the file; what is mapped stays readable on the machine that mapped it."""
        if self.path is not None and self.world.first:
            self.path.unlink(missing_ok=True)


def _free_memory() -> float:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 4e9


def weights_checksum(encoder: torch.nn.Module) -> str:
    """SHA-256 of an encoder's names, shapes and numbers, wherever they were read from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def listing_checksum(source: Source, indices: np.ndarray) -> str:
    """SHA-256 of the names of images, in their order, and of the sizes of those that are files."""
    digest = hashlib.sha256()
    for i in np.asarray(indices).tolist():
        name = source.name(i)
        size = os.path.getsize(name) if os.path.isfile(name) else -1
        digest.update(f"{name} {size} {source.label(i)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """Features kept in a folder, under a checksum of all that they depend on; `folder` None keeps nothing."""

    folder: Path | None

    def path(self, facts: dict[str, Any]) -> Path | None:
        """The file of features that depend on `facts`."""
        if self.folder is None:
            return None
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"features-{key}.npy"

    def read(self, path: Path | None) -> Features | None:
        """What was kept there; None where there is nothing."""
        about = path.with_suffix(".npz") if path else None
        if path is None or about is None or not path.is_file() or not about.is_file():
            return None
        with np.load(about) as kept:
            return Features(np.load(path, mmap_mode="r"), kept["labels"], kept["indices"], list(kept["unreadable"]))

    def keep(self, path: Path, features: Features) -> None:
        """Write features there, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside.npy")
        np.save(aside, features.values)
        about = path.with_suffix(".aside.npz")
        np.savez(about, labels=features.labels, indices=features.indices, unreadable=np.array(features.unreadable, str))
        os.replace(about, path.with_suffix(".npz"))
        os.replace(aside, path)
