"""What a run wrote, read for a report: rows of `metrics.jsonl`, pictures of the event files, its configuration."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import flatten
from ..errors import UserError

# What a measurement was taken on, beside what it found.
COUNTS = {"train_images", "val_images", "images", "detections", "unreadable", "labels_per_class"}


@dataclass
class Curve:
    """Values `y` `[n]` after `x` `[n]` finished steps, rising; `low` and `high` bound them where a spread is known."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass
class Run:
    """A run as its files tell it; curves by `loss` for what every step says, by `probe/knn` for what was measured."""

    name: str
    folder: Path
    curves: dict[str, Curve]
    starts: list[dict[str, Any]] = field(default_factory=list)  # facts of each start, oldest first
    skipped: list[int] = field(default_factory=list)  # steps
    resumed: list[int] = field(default_factory=list)  # finished steps
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)  # of the last measurement
    steps: int = 0  # finished
    epochs_per_step: float | None = None
    diverged: int | None = None  # the first step without a finite loss
    unreadable: int = 0  # lines
    config: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, dict[int, bytes]] = field(default_factory=dict)  # PNG by tag and finished steps

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration by dotted names, without where the run lies."""
        return {key: value for key, value in flatten(self.config) if key != "run.dir"}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders that hold a `metrics.jsonl`: those named, or for a folder of runs (a sweep) those in it.

    Raises UserError where there is none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"There is no run in {path}, which is no folder; give the folder of a run (its run.dir).")
        here = [path] if (path / "metrics.jsonl").is_file() else sorted(p.parent for p in path.glob("*/metrics.jsonl"))
        if not here:
            raise UserError(f"{path} holds no metrics.jsonl, so no run trained there; give the folder of a run.")
        found += here
    distinct = {path.resolve(): path for path in found}
    return list(distinct.values())


def short_names(folders: Sequence[Path]) -> list[str]:
    """The ends of paths, as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str, pictures: int = 3) -> Run:
    """A run, with up to `pictures` of each kind (the first, the last, and some between).

    A last line that is cut short, as in a run that goes on, is left out. Raises UserError where no step is there.
    """
    training, notes, starts, resumed, unreadable = _rows(folder / "metrics.jsonl")
    if not training and not notes:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no step yet; make the report when the run has begun.")
    run = Run(name, folder, {}, starts=starts, resumed=resumed, unreadable=unreadable)
    _fill(run, "", training)
    for group, rows in notes.items():
        ordered = [rows[step] for step in sorted(rows)]
        if group == "skipped":
            run.skipped = [row["step"] for row in ordered]
        else:
            _fill(run, f"{group}/", ordered)
    if training:
        last = training[-1]
        run.steps = last["step"] + 1
        if last["step"] > 0 and _number(last.get("epoch")):
            run.epochs_per_step = last["epoch"] / last["step"]
    loss = run.curves.get("loss")
    if loss is not None and not np.isfinite(loss.y).all():
        run.diverged = int(loss.x[~np.isfinite(loss.y)][0]) - 1
    measured = notes.get("probe", {})
    if measured:
        nested = [value for value in measured[max(measured)].values() if isinstance(value, dict)]
        run.by_class = {k: v for value in nested for k, v in value.items() if isinstance(v, dict)}
    run.config = _config(folder / "config.yaml")
    if pictures:
        run.pictures = {tag: _some(found, pictures) for tag, found in read_pictures(folder / "tensorboard").items()}
    return run


def _rows(
    path: Path,
) -> tuple[list[dict[str, Any]], dict[str, dict[int, dict[str, Any]]], list[dict[str, Any]], list[int], int]:
    """Rows of steps in order, notes by group and step, facts of starts, where it went on, and unreadable lines."""
    training: list[dict[str, Any]] = []
    notes: dict[str, dict[int, dict[str, Any]]] = {}
    starts: list[dict[str, Any]] = []
    resumed: set[int] = set()
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step, group = int(row["step"]), row.get("group")
            except (ValueError, KeyError, TypeError, AttributeError):
                unreadable += line.endswith("\n")  # without it: the last line of a run that goes on
                continue
            if group is None:
                if training and step <= training[-1]["step"]:  # a later life took these steps again: it counts
                    resumed.add(step)
                    _cut(training, step)
                training.append(row)
            elif group == "start":
                starts.append(row)
                _cut(training, step + 1)
                for rows in notes.values():
                    for late in [at for at in rows if at > step]:
                        del rows[late]
                if step >= 0:
                    resumed.add(step + 1)
            else:
                notes.setdefault(group, {})[step] = row
    kept = {at for at in resumed if training and at <= training[-1]["step"] + 1}
    return training, notes, starts, sorted(kept), unreadable


def _cut(training: list[dict[str, Any]], step: int) -> None:
    while training and training[-1]["step"] >= step:
        training.pop()


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fill(run: Run, prefix: str, rows: list[dict[str, Any]]) -> None:
    """Curves of every number in the rows; `X_std` and `X_interval` become the spread of X."""
    columns, pairs = _columns(rows)
    for key, (steps, values) in columns.items():
        told = key.endswith("_std") and key.removesuffix("_std") in columns  # the spread of another
        if key in ("step", "epoch") or told or (prefix == "probe/" and key in COUNTS):
            continue
        curve = Curve(steps + 1, values)
        given, interval = columns.get(f"{key}_std"), pairs.get(f"{key}_interval")
        if interval is not None and np.array_equal(interval[0], steps):
            curve.low, curve.high = interval[1].T
        elif given is not None and np.array_equal(given[0], steps):
            curve.low, curve.high = values - given[1], values + given[1]
        run.curves[prefix + key] = curve


Columns = dict[str, tuple[np.ndarray, np.ndarray]]


def _columns(rows: list[dict[str, Any]]) -> tuple[Columns, Columns]:
    """Steps and values of every number in the rows, and of every pair of numbers."""
    alike: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}  # rows of the same keys: few kinds, many rows
    for row in rows:
        alike.setdefault(tuple(row), []).append(tuple(row.values()))
    found: tuple[dict[str, list], dict[str, list]] = {}, {}
    for keys, given in alike.items():
        columns = dict(zip(keys, zip(*given, strict=True), strict=True))
        steps = columns["step"]
        for key, values in columns.items():
            if set(map(type, values)) <= {int, float}:
                found[0].setdefault(key, []).append((steps, values))
                continue
            for place, fits in enumerate((_number, _pair)):  # among text, and figures that could not be taken
                kept = [i for i, value in enumerate(values) if fits(value)]
                if kept:
                    found[place].setdefault(key, []).append(([steps[i] for i in kept], [values[i] for i in kept]))
    return _joined(found[0]), _joined(found[1])


def _joined(parts: dict[str, list]) -> Columns:
    out = {}
    for key, pieces in parts.items():
        steps = np.concatenate([np.asarray(steps, dtype=np.int64) for steps, _ in pieces])
        order = np.argsort(steps, kind="stable")
        out[key] = steps[order], np.concatenate([np.asarray(v, dtype=np.float64) for _, v in pieces])[order]
    return out


def _pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _config(path: Path) -> dict[str, Any]:
    """The configuration beside the metrics, nothing where it is not there or is no YAML."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _some(pictures: dict[int, bytes], count: int) -> dict[int, bytes]:
    """`count` of them, evenly, with the first and the last."""
    steps = sorted(pictures)
    places = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    chosen = [steps[i] for i in places] if count > 1 else steps[-1:]
    return {step: pictures[step] for step in chosen}


def read_pictures(folder: Path) -> dict[str, dict[int, bytes]]:
    """PNG pictures of TensorBoard's event files by tag and finished steps; a later life's in place of an earlier's.

    The event is TensorBoard's own; its records are framed here, since its reader checks them in Python, byte by byte:
    140,000 events took it 4.8 s.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    found: dict[str, dict[int, bytes]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in _records(path):
            if b"\x89PNG" in record:
                event = Event.FromString(record)
                for value in event.summary.value:
                    picture = value.image.encoded_image_string
                    if not picture and value.tensor.string_val:  # as newer writers have it: width, height, pictures
                        picture = next((one for one in value.tensor.string_val if one[:4] == b"\x89PNG"), b"")
                    if picture:
                        found.setdefault(value.tag, {})[event.step] = picture
            elif b":\x02\x08\x01" in record:  # of a session log: a life starts, and takes steps again
                event = Event.FromString(record)
                if event.session_log.status == SessionLog.START:
                    for pictures in found.values():
                        for late in [step for step in pictures if step > event.step]:
                            del pictures[late]
    return {tag: pictures for tag, pictures in found.items() if pictures}


def _records(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file (length, checksum, data, checksum), up to one that is cut short."""
    if not path.stat().st_size:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        at = 0
        while at + 12 <= len(view):
            (length,) = struct.unpack_from("<Q", view, at)
            if at + 16 + length > len(view):
                return
            yield view[at + 12 : at + 12 + length]
            at += 16 + length


def finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def planned(run: Run) -> int | None:
    """The steps that the run was to take, where its last start says so."""
    steps = run.starts[-1].get("steps") if run.starts else None
    return steps if isinstance(steps, int) else None
