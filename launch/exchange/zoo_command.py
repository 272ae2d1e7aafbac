"""`elsewhere zoo`: the published checkpoints, and whether a local file is one of them."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from ..errors import UserError


def add_zoo_command(commands: Any) -> None:
    """Add `zoo` to `commands`, what `add_subparsers` returned."""
    text = "List the published checkpoints, or check that a local file is one."
    more = (
        "Nothing is downloaded: get a file from its source, then name it as zoo:NAME=PATH wherever weights are read "
        "(elsewhere.load, init.from, elsewhere export)."
    )
    command = commands.add_parser("zoo", help=text, description=f"{text} {more}")
    command.add_argument("name", nargs="?", help="a published checkpoint")
    command.add_argument("--file", type=Path, metavar="PATH", help="check that this is it")


def run_zoo(arguments: argparse.Namespace) -> int:
    """Run `elsewhere zoo`; the exit status. Raises UserError for an unknown name, or a file that is another."""
    from ...models.zoo_published import PUBLISHED
    from ..foreign import published

    if arguments.name is None:
        if arguments.file is not None:
            raise UserError("--file belongs to a name: elsewhere zoo NAME --file PATH.")
        _list(PUBLISHED.values())
        return 0
    entry = published(arguments.name)
    for name, text in (
        ("name", entry.name), ("method", entry.method), ("encoder", entry.architecture),
        ("size", f"{entry.megabytes:,.0f} MB in float32"), ("trained on", entry.data), ("file", entry.file),
        ("source", entry.source), ("licence", entry.licence), ("published", entry.result),
    ):  # fmt: skip
        if text:
            print(f"{name:<11}{text}")
    if arguments.file is not None:
        _check(entry, arguments.file)
    return 0


def _list(entries: Any) -> None:
    rows = [("name", "method", "encoder", "MB", "source", "licence")]
    rows += [
        (one.name, one.method, one.architecture, f"{one.megabytes:,.0f}", one.source, one.licence) for one in entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(width) if i == 3 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print(
        "MB are of the encoder in float32; files that also hold a predictor, a second encoder and an optimiser are "
        "several times as large."
    )


def _check(entry: Any, path: Path) -> None:
    from ..encoder_weights import encoder_weights

    weights = encoder_weights(f"zoo:{entry.name}={path}")
    weights.check_read(())
    count = sum(tensor.numel() for tensor in weights.state.values())
    if count != entry.numbers:
        raise UserError(
            f"{path} is not {entry.name}: its encoder has {count:,} numbers, and that one {entry.numbers:,}."
        )
    parts = weights.foreign.parts if weights.foreign else []
    more = f"; beside it {', '.join(f'a {part}' if part != 'adversary' else 'an adversary' for part in parts)}"
    print(f"{'checked':<11}{path}: the encoder of {entry.name} by names and shapes, {len(weights.state):,} tensors, "
          f"{count:,} numbers{more if parts else ''}")  # fmt: skip
    if entry.md5 is not None:
        found = _md5(path)
        if found.startswith(entry.md5):
            print(f"{'md5':<11}{found}, as published ({entry.md5}…)")
        else:
            print(f"{'md5':<11}{found}, and the published file has {entry.md5}…: it was saved anew, or damaged")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
