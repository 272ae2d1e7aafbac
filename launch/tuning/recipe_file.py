"""A tuned recipe as a YAML file: a base, and every value with its rule in a comment."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import yaml

from ..config import recipe_names
from ..errors import UserError
from ..new_file import check_new, write_new
from .choices import Choice
from .tune import Tuned

_WIDTH = 110
_FIRST = ("about", "data.path")


def check_recipe(path: Path) -> None:
    """Raise UserError unless a recipe can be written at `path`, where nothing may be yet."""
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"-o {path} is no recipe's name: let it end in .yaml.")
    check_new(path, "-o")


def write_recipe(path: Path, tuned: Tuned, command: str) -> None:
    """Write the recipe; raises UserError where the file appeared meanwhile."""
    write_new(path, recipe_text(tuned, command, path.parent), "-o")


def recipe_text(tuned: Tuned, command: str, folder: Path) -> str:
    """The recipe's text, for a file in `folder`."""
    base = tuned.recipe if tuned.recipe in recipe_names() else os.path.relpath(tuned.recipe, folder)
    lines = [
        f"# {command}",
        "# Where a value comes from stands beside it; docs/choosing.md says how far to trust each.",
    ]
    first = sorted((one for one in tuned.choices if one.key in _FIRST), key=lambda one: _FIRST.index(one.key))
    rest = [one for one in tuned.choices if one.key not in _FIRST]
    lines += [f"about: {_scalar(one.value)}" for one in first if one.key == "about"]
    lines.append(f"base: {_scalar(base)}")
    tree: dict[str, Any] = {}
    for one in [*rest, *(one for one in first if one.key != "about")]:
        *groups, leaf = one.key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = one
    return "\n".join([*lines, *_lines(tree, 0)]) + "\n"


def _lines(tree: dict[str, Any], depth: int) -> list[str]:
    out, indent = [], "  " * depth
    for name, value in tree.items():
        if isinstance(value, Choice):
            text, comment = f"{indent}{name}: {_scalar(value.value)}", f"{value.kind}: {value.rule}"
            if len(text) + len(comment) + 4 <= _WIDTH:
                out.append(f"{text}  # {comment}")
            else:
                out += textwrap.wrap(comment, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
                out.append(text)
        else:
            out += [f"{indent}{name}:", *_lines(value, depth + 1)]
    return out


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()
