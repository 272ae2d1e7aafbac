"""Files that a command writes: refused before any work where they cannot be, and never over another one unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import UserError


def check_new(path: Path | None, option: str, force: bool | None = None) -> None:
    """Raise UserError unless the `path` of `option` (None: nothing is written) is a new file in a folder for it.

    `force` writes over a file that is there; None: the command has no --force.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file that is not there already.")
    if path.exists() and not force:
        way = "choose another name, or remove it" if force is None else "choose another name, or pass --force"
        raise UserError(f"{option} {path} is there already and is not overwritten: {way}.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"{option} {path}: its folder is not there or not writable; choose another.")


def write_new(path: Path, text: str, option: str) -> None:
    """Write a file; raises UserError where it appeared since it was checked."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{option} {path} is there already and is not overwritten: choose another name.") from error


def write_json(path: Path | None, found: Any) -> None:
    """Write what `--json` asks for; nothing where `path` is None."""
    if path is not None:
        write_new(path, json.dumps(found, indent=1), "--json")
