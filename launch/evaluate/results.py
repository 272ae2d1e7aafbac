"""`results.json` of a run and the table of an evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError

KEY = "evaluations"
_SAME = ("probe", "protocol", "encoder", "data", "val_data", "train_images", "val_images", "image_size", "seed")


def read(folder: Path) -> dict[str, Any]:
    """What `folder/results.json` holds, nothing where it is not there; UserError where it is no such file."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): move it, or choose -o FOLDER.") from error
    if not isinstance(known, dict) or not isinstance(known.get(KEY, []), list):
        raise UserError(f"{path} holds something else than results: move it, or choose -o FOLDER.")
    return known


def merge(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Add entries to `folder/results.json`, where one takes the place of its like: same probe, encoder, data, protocol.

    What else the file holds stays. Raises UserError where it is no such file.
    """
    path = folder / "results.json"
    known = read(folder)

    def identity(entry: dict[str, Any]) -> str:
        return json.dumps({key: entry.get(key) for key in _SAME}, sort_keys=True)

    new = {identity(entry) for entry in entries}
    kept = [entry for entry in known.get(KEY, []) if identity(entry) not in new]
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps({**known, KEY: kept + entries}, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(aside, path)
    return path


def _percent(row: dict[str, Any]) -> str:
    text = f"{100 * row['top1']:6.2f} %"
    if "interval" in row:
        text += f"  {100 * row['interval'][0]:.2f}–{100 * row['interval'][1]:.2f}"
    elif "std" in row:
        text += f"  ± {100 * row['std']:.2f} over {len(row['draws'])} draws"
    return f"{text:<34}" + (f"{100 * row['top5']:6.2f} %" if "top5" in row else "")


def table(entries: list[dict[str, Any]], best_only: bool = False) -> str:
    """The figures of entries, a line each: probe, setting, top-1 with its 95 % interval, top-5."""
    lines = [f"{'probe':<10} {'setting':<42} {'top-1':>7}  {'95 % interval':<24} {'top-5':>7}"]
    for entry in entries:
        rows = entry["best"] if best_only else entry["figures"]
        for row in rows:
            chosen = (
                "" if best_only or row not in entry["best"] or len(entry["figures"]) == len(entry["best"]) else " *"
            )
            lines.append(f"{entry['probe']:<10} {row['setting'] + chosen:<42} {_percent(row)}".rstrip())
    return "\n".join(lines)
