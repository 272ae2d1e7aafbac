"""What `--json FILE` of a command writes: refused before any work where it cannot be, and never over another file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def check_json(path: Path | None) -> None:
    """Raise UserError unless `path` (None: nothing is written) is a new file in a folder that can be written to."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"--json {path} is there already and is not overwritten: choose another name, or remove it.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: its folder is not there or not writable; choose another.")


def write_json(path: Path | None, found: Any) -> None:
    """Write `found`; nothing where `path` is None. Raises UserError where the file appeared meanwhile."""
    if path is None:
        return
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    except FileExistsError as error:
        raise UserError(f"--json {path} is there already and is not overwritten: choose another name.") from error
