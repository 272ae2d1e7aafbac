"""Checkpoints that are complete or absent: written aside, synced, renamed; verified before they are loaded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from . import portable
from .errors import UserError
from .portable import Piece
from .tensor_files import read_tensors
from .world import World

FORMAT = 2
_CHUNK = 1 << 24
T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: its folder, its step, and its description (`about.json`)."""

    path: Path
    step: int
    about: dict[str, Any]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The whole tensors whose names begin so, in host memory; of an I-JEPA `method.teacher.` are its teacher's."""
        return read_tensors(self.path, lambda name: name.startswith(prefix))

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """Read the pieces of a rank, in place; raises ValueError for one that is not there, or not with this shape."""
        portable.read(self.path, pieces)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inspect(path: Path) -> Saved:
    """The checkpoint in `path`, its bytes checked; raises ValueError that says what is damaged."""
    try:
        about = json.loads((path / "about.json").read_text())
        step, files = int(about["step"]), dict(about["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its about.json is missing or damaged ({error})") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"it has format {about.get('format')}; this version reads format {FORMAT}")
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != facts["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
        if _crc32(file) != facts["crc32"]:
            raise ValueError(f"the checksum of {name} is wrong")
    return Saved(path, step, about)


class Checkpoints:
    """The checkpoints of one run, in `run/checkpoints/step-00000123`, written beside the training that goes on."""

    def __init__(self, run: Path, keep: int = 2, world: World | None = None):
        self.folder, self.keep, self.world = run / "checkpoints", keep, world or World()
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future | None = None

    def folders(self) -> list[Path]:
        """Complete checkpoints, oldest first (incomplete ones never get such a name)."""
        return sorted(self.folder.glob("step-*"))

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest undamaged checkpoint, and a sentence for each damaged one that was passed over."""
        complaints = []
        for path in reversed(self.folders()):
            try:
                return inspect(path), complaints
            except ValueError as error:
                complaints.append(f"{path} is damaged: {error}.")
        return None, complaints

    def save(self, pieces: Mapping[str, Piece], about: dict[str, Any], permanent: bool = False) -> None:
        """Begin to write a checkpoint of `about["step"]` from every rank's pieces, which are copied first.

        When it is complete, those beyond the last `keep` that are not permanent are dropped. A folder of that name
        that stands there already was found damaged: it is set aside, not overwritten. One checkpoint is written at a
        time: this waits for the one before, and raises what that met (see `finish`). Every rank calls this.
        """
        self.finish()
        copies = portable.staged(pieces)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = self._thread.submit(self._write, copies, about, permanent)

    def failed(self) -> bool:
        """Whether this rank knows of a failure that `finish` will raise."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; every rank calls this.

        Raises UserError on every rank if a disk did not take it; the earlier checkpoints stay.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self.world.agree(writing.result)

    def close(self) -> None:
        """Let the thread go, after what it is doing."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _write(self, pieces: dict[str, Piece], about: dict[str, Any], permanent: bool) -> None:
        """What the thread does on every rank, over a process group of its own."""
        final = self.folder / f"step-{about['step']:08d}"
        aside = self.folder / f".writing-{final.name}"
        world = self.world
        with contextlib.suppress(AttributeError, OSError):  # Linux: threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)

        def begin() -> None:
            if world.first:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)

        def checksums() -> dict[str, Any]:
            paths = portable.files_of_rank(aside, world.rank)
            return {path.name: {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in paths}

        try:
            self._all(begin)
            portable.write(aside, pieces, world.writing_group)
            parts = self._all(checksums)
            if world.first:
                files = {name: facts for part in parts for name, facts in part.items()}
                text = json.dumps({**about, "format": FORMAT, "permanent": permanent, "files": files}, indent=1)
                (aside / "about.json").write_text(text)
                _sync(aside / "about.json")
                _sync(aside)
                if final.exists():
                    final.rename(_free_name(self.folder / f"damaged-{final.name}"))
                aside.rename(final)
                _sync(self.folder)
                self._prune()
        except OSError as error:
            if world.first:
                shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"The checkpoint of step {about['step']} could not be written to {self.folder} ({error}); "
                "make room and start the same command again: it continues from the checkpoint before."
            ) from error

    def _all(self, do: Callable[[], T]) -> list[T]:
        """What `do` gives on every rank; an OSError of one is raised on all, so that none waits for ever."""
        try:
            mine = do(), None
        except OSError as error:
            mine = None, str(error)
        found = self.world.gather_writing(mine)
        for _, failure in found:
            if failure is not None:
                raise OSError(failure)
        return [value for value, _ in found]

    def _prune(self) -> None:
        for path in self.folders()[: -self.keep]:
            try:
                permanent = json.loads((path / "about.json").read_text()).get("permanent", False)
            except (OSError, ValueError):
                permanent = True  # damaged: not ours to delete
            if not permanent:
                # Renamed first, so that a kill in between leaves no half checkpoint under a complete one's name.
                doomed = self.folder / f".deleting-{path.name}"
                path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def clean(self) -> None:
        """Remove what a killed run left half written or half deleted."""
        for pattern in (".writing-*", ".deleting-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _free_name(path: Path) -> Path:
    return next(p for p in _numbered(path) if not p.exists())


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def lock(run: Path) -> int:
    """Hold the run's folder for this process, until it ends; raises UserError if another run has it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"run.dir={run} cannot be written to ({error.strerror}); choose another.") from error
    try:
        # A record lock and not flock's, which loader workers inherit: after kill -9 they live on for seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise UserError(f"Another process trains in {run}; stop it, or choose another run.dir.") from error
    return descriptor
