"""Checkpoints that are complete or absent: written aside, synced, renamed; verified before they are loaded."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import UserError

FORMAT = 1
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk: its folder, its step, and its description (`about.json`)."""

    path: Path
    step: int
    about: dict[str, Any]

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The saved state, tensors on `device`."""
        return torch.load(self.path / "state.pt", map_location=device, weights_only=True)


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
    """The checkpoints of one run, in `run/checkpoints/step-00000123`."""

    def __init__(self, run: Path, keep: int = 2):
        self.folder, self.keep = run / "checkpoints", keep

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

    def save(self, state: dict[str, Any], about: dict[str, Any], permanent: bool = False) -> Path:
        """Write a checkpoint of `about["step"]`, then drop those beyond the last `keep` that are not permanent.

        A folder of that name that stands there already was found damaged: it is set aside, not overwritten.
        Raises UserError if the disk does not take it; the earlier checkpoints stay.
        """
        final = self.folder / f"step-{about['step']:08d}"
        aside = self.folder / f".writing-{final.name}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            file = aside / "state.pt"
            torch.save(state, file)
            _sync(file)
            facts = {"state.pt": {"bytes": file.stat().st_size, "crc32": _crc32(file)}}
            text = json.dumps({**about, "format": FORMAT, "permanent": permanent, "files": facts}, indent=1)
            (aside / "about.json").write_text(text)
            _sync(aside / "about.json")
            _sync(aside)
            if final.exists():
                final.rename(_free_name(self.folder / f"damaged-{final.name}"))
            aside.rename(final)
            _sync(self.folder)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(
                f"The checkpoint of step {about['step']} could not be written to {self.folder} ({error}); "
                "make room and start the same command again: it continues from the checkpoint before."
            ) from error
        self._prune()
        return final

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
