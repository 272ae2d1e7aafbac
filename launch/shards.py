"""`elsewhere shards write | verify | repair | stats`: training shards from the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import UserError
from .host import cores

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SHOWN = 20  # lines of a long list


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 500MB, 1GB or 200MiB")
    return max(1, round(float(found[1]) * _UNITS[found[2]]))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _count(text)


def add_shards_command(commands: Any) -> None:
    """Add `shards` and its parts to `commands`, what `add_subparsers` returned."""
    text = "Write, verify, repair and describe training shards (WebDataset tars with an index)."
    parts = commands.add_parser("shards", help=text, description=text).add_subparsers(
        dest="part", required=True, metavar="PART"
    )
    text = "Write images to shards, or go on where the same command was cut off."
    write = parts.add_parser("write", help=text, description=text)
    write.add_argument("source", help="a folder of images, `digits`, <torchvision set>:DIR as cifar10:DIR, or shards")
    write.add_argument("dest", help="a new or empty folder; for train and val: DEST/train and DEST/val, two commands")
    write.add_argument("--split", choices=("train", "val"), help="one split (default: train, or all there is)")
    write.add_argument("--holdout", type=float, default=0.1, metavar="SHARE",
                       help="with --split, where the source has no val split: its share (%(default)s)")  # fmt: skip
    size = write.add_mutually_exclusive_group()
    size.add_argument("--shard-size", type=_bytes, default=500_000_000, metavar="SIZE", help="bytes (500MB)")
    size.add_argument("--samples-per-shard", type=_count, metavar="N", help="images of a shard, instead of its size")
    write.add_argument("--seed", type=int, default=0, help="of the order in which images are written (%(default)s)")
    write.add_argument("--max-side", type=int, metavar="PX", help="shrink images whose longer side is more than this")
    write.add_argument("--quality", type=int, metavar="Q", help="encode grey and RGB images as JPEG of this quality")
    write.add_argument("--processes", type=_count, metavar="N", help="writer processes (default: one for each core)")
    write.add_argument("--format", choices=("shards", "ffcv"), default="shards",
                       help="shards, or one .beton file at DEST through FFCV (%(default)s)")  # fmt: skip
    write.add_argument("--mode", choices=("jpg", "raw", "smart"), help="with --format ffcv: how pixels stand (jpg)")
    write.add_argument("--skip-unreadable", action="store_true", help="exit with 0 although images were left out")
    text = "Look for damage; exit status 0: none, 1: warnings, 2: damage."
    verify = parts.add_parser("verify", help=text, description=text)
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    text = "Make indexes and manifests anew, and with --out a copy of what is readable."
    repair = parts.add_parser("repair", help=text, description=text)
    repair.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the clean copy")
    text = "Counts, sizes, classes, mean and std per channel."
    stats = parts.add_parser("stats", help=text, description=text)
    stats.add_argument("--split", choices=("train", "val"), help="of a folder with both (default: both)")
    stats.add_argument("--sample", type=_count_or_all, default=2000, metavar="N|all", help="images measured (2000)")
    stats.add_argument("--sheet", type=Path, metavar="FILE", help="save a contact sheet as PNG (of both: of train)")
    stats.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    for command in (verify, repair, stats):
        command.add_argument("dest", nargs="+", help="a folder of shards, tars, or patterns with braces or wildcards")
        command.add_argument("--threads", type=_count, default=cores(), metavar="N", help="(default: the cores)")
    for command in (verify, repair):
        command.add_argument("--deep", action="store_true", help="also decode every image")


def run_shards(arguments: argparse.Namespace) -> int:
    """Run a part of `elsewhere shards`; the exit status. Raises UserError for something to mend."""
    # Only now: the room of the data loads torch, which takes seconds.
    from ..data.images import DataError

    try:
        return _PARTS[arguments.part](arguments)
    except DataError as error:
        # The room of the data speaks of a recipe's settings, which here are arguments.
        text = str(error).replace("data.path=", "").replace("check data.path", "check SOURCE")
        raise UserError(text.replace("data.holdout=", "--holdout ")) from error


@contextmanager
def _bar(text: str, unit: str) -> Iterator[Callable[..., None]]:
    """A function of (done, of, bytes) that moves a bar on the terminal; no bar where stderr is none."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[size]}"),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None, size="")

        def move(done: int, total: int, size: int = 0) -> None:
            progress.update(task, completed=done, total=total, size=decimal(size) if size else "")

        yield move


def _list(lines: Sequence[object], more: str = "") -> None:
    for line in lines[:_SHOWN]:
        print(f"  {line}")
    if len(lines) > _SHOWN:
        print(f"  … and {len(lines) - _SHOWN:,} more{more}")


def _save_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}): choose another file.") from error


def _dest(arguments: argparse.Namespace) -> Any:
    return arguments.dest[0] if len(arguments.dest) == 1 else arguments.dest


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _write(arguments: argparse.Namespace) -> int:
    if arguments.format == "ffcv":
        return _write_beton(arguments)
    if arguments.mode:
        raise UserError(f"--mode {arguments.mode} belongs to --format ffcv: add that, or leave it out.")
    from ..data.shard_writer import WriteOptions, write_shards

    options = WriteOptions(
        seed=arguments.seed, shard_bytes=arguments.shard_size, samples_per_shard=arguments.samples_per_shard,
        max_side=arguments.max_side, quality=arguments.quality,
    )  # fmt: skip
    with _bar("Writing", "images") as progress:
        written = write_shards(
            arguments.source, arguments.dest, split=arguments.split, holdout=arguments.holdout, options=options,
            processes=arguments.processes, progress=progress,
        )  # fmt: skip
    manifest = written.manifest
    kept = f", {written.kept} of them written before" if written.kept else ""
    total = f"{manifest['samples']:,} images in {_shards(len(manifest['shards']))}, {_size(manifest['bytes'])}"
    print(f"{arguments.dest}: {total}{kept}.")
    return _left_out(manifest["unreadable"], f"{arguments.dest}/manifest.json", arguments.skip_unreadable)


def _left_out(unreadable: list[dict[str, Any]], where: str, expected: bool) -> int:
    """Tell which images were not written; the exit status."""
    if not unreadable:
        return 0
    print(f"Left out {len(unreadable):,} that cannot be read (all in {where}):")
    _list([f"{one['path']}: {one['reason']}" for one in unreadable])
    return 0 if expected else 1


def _write_beton(arguments: argparse.Namespace) -> int:
    from ..data.ffcv_writer import write_beton

    if arguments.samples_per_shard:
        raise UserError("--samples-per-shard is for shards, and --format ffcv writes one file: leave it out.")
    given = {"mode": arguments.mode, "quality": arguments.quality}
    with _bar("Writing", "images") as progress:
        manifest = write_beton(
            arguments.source, arguments.dest, split=arguments.split, holdout=arguments.holdout, seed=arguments.seed,
            max_side=arguments.max_side, processes=arguments.processes, progress=progress,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip
    print(f"{arguments.dest}: {manifest['samples']:,} images, {_size(os.path.getsize(arguments.dest))}.")
    return _left_out(manifest["unreadable"], f"{arguments.dest}.json", arguments.skip_unreadable)


def _verify(arguments: argparse.Namespace) -> int:
    from ..data.shard_check import verify

    with _bar("Verifying", "shards") as progress:
        report = verify(_dest(arguments), deep=arguments.deep, threads=arguments.threads, progress=progress)
    findings = sorted(report.findings, key=lambda finding: -finding.severity)
    _list([f"{'damage ' if one.severity == 2 else 'warning'}  {one}" for one in findings], "; --json FILE has all")
    damage = sum(finding.severity == 2 for finding in findings)
    total = f"{_shards(report.shards)}, {report.samples:,} images, {_size(report.bytes)}"
    print(f"{total}: {damage} damaged place(s), {len(findings) - damage} warning(s).")
    if damage:
        print(f"A copy of what is readable: {_repair_command(arguments)} --out DIR")
    elif report.mended_in_place:
        print(f"To make indexes and manifest anew: {_repair_command(arguments)}")
    _save_json(arguments.json, report.to_json())
    return report.severity


def _repair_command(arguments: argparse.Namespace) -> str:
    # Without --deep, a repair takes images for whole that cannot be decoded but were never changed.
    return shlex.join(["elsewhere", "shards", "repair", *arguments.dest, *["--deep"] * arguments.deep])


def _repair(arguments: argparse.Namespace) -> int:
    from ..data.shard_repair import repair

    with _bar("Repairing", "shards") as progress:
        done = repair(
            _dest(arguments), arguments.out, deep=arguments.deep, threads=arguments.threads, progress=progress
        )
    for title, lines in (
        ("Made anew", [*done.indexes, *done.manifests]), ("Clean copy in", done.copies), ("Lost", done.lost),
        ("Still damaged", done.left),
    ):  # fmt: skip
        if lines:
            print(f"{title} ({len(lines):,}):")
            _list(lines)
    if done.left:
        print(f"A copy of what is readable: {_repair_command(arguments)} --out DIR")
    elif not any((done.indexes, done.manifests, done.copies)):
        print("Nothing to mend.")
    return 2 if done.left else 1 if done.lost else 0


def _stats(arguments: argparse.Namespace) -> int:
    from ..data.shard_stats import contact_sheet
    from ..data.shards import shard_splits

    splits = [arguments.split] if arguments.split else list(shard_splits(_dest(arguments))) or [None]
    numbers = {}
    for split in splits:
        if len(splits) > 1:
            print(f"{split}:")
        numbers[split] = _stats_of(arguments, split)
    _save_json(arguments.json, numbers if len(splits) > 1 else numbers[splits[0]])
    if arguments.sheet:
        try:
            contact_sheet(_dest(arguments), splits[0]).save(arguments.sheet, "PNG")
        except OSError as error:
            raise UserError(f"--sheet {arguments.sheet} cannot be written ({error.strerror}).") from error
    return 0


def _stats_of(arguments: argparse.Namespace, split: str | None) -> dict[str, Any]:
    """Measure and print one split; the numbers as a dictionary."""
    from ..data.shard_stats import measure

    with _bar("Measuring", "images") as progress:
        stats = measure(_dest(arguments), split, sample=arguments.sample, threads=arguments.threads, progress=progress)
    least, median, most = stats.image_bytes
    print(f"shards    {stats.shards:,}, {_size(stats.bytes)}")
    print(f"images    {stats.samples:,} of {stats.channels} channel(s)")
    print(f"bytes     {least:,} … {most:,}, median {median:,}")
    for side, (least, median, most) in stats.sides.items():
        print(f"{side:<9} {least} … {most}, median {median} (of {stats.measured:,} images)")
    print(f"mean      {', '.join(f'{value:.4f}' for value in stats.mean)} (in 0…1, of {stats.measured:,} images)")
    print(f"std       {', '.join(f'{value:.4f}' for value in stats.std)}")
    print(f"classes   {len(stats.labels)}, of {min(stats.labels.values()):,} … {max(stats.labels.values()):,} images")
    _list([f"{count:>9,}  {name}" for name, count in stats.labels.items()], "; --json FILE has all")
    if stats.unreadable:
        print(f"Unreadable ({len(stats.unreadable):,}):")
        _list(stats.unreadable)
    return asdict(stats)


_PARTS = {"write": _write, "verify": _verify, "repair": _repair, "stats": _stats}
