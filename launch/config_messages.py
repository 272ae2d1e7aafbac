"""What is wrong with a configuration, in a sentence with the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pydantic import ValidationError


def explain(error: ValidationError, names: Sequence[str]) -> str:
    """One sentence for the first complaint, and how many more there are; `names` are all dotted settings."""
    complaints: dict[str, list] = {}
    # An unknown name first, because a setting that is missing is often the one it was meant for.
    # Then the deepest: of a choice of types, the one that was meant fits furthest.
    for complaint in sorted(error.errors(), key=lambda c: (c["type"] != "extra_forbidden", -len(c["loc"]))):
        # A choice of types adds their names.
        path = [str(part) for part in complaint["loc"] if not re.search(r"\[|^str$|^WeightedPath$", str(part))]
        if complaint["type"] != "extra_forbidden":
            while len(path) > 1 and ".".join(path) not in names and not any(map(str.isdigit, path)):
                path.pop()
        complaints.setdefault(".".join(path), []).append(complaint)
    where, same = next(iter(complaints.items()))
    first = same[0]
    if first["type"] == "extra_forbidden":
        near = _nearest(where, names)
        group = where.rpartition(".")[0]
        known = [name.rpartition(".")[2] for name in names if group and name.rpartition(".")[0] == group]
        listed = f"{group} has {', '.join(known)}." if known else "`elsewhere show` lists them."
        text = f"There is no setting {where}; " + (f"did you mean {near}?" if near else listed)
    elif first["type"] == "literal_error":
        text = f"{where}={first['input']} is not possible; choose {first.get('ctx', {})['expected']}."
    elif first["type"] in ("model_type", "model_attributes_type"):
        text = f"{where} is a group of settings; set one of them, e.g. {_example(where, names)}=…."
    elif first["type"] == "value_error":
        text = str(first["ctx"]["error"]).rstrip(".") + "."
        text = text[0].upper() + text[1:] if text.startswith("there") else text
    elif first["type"] == "missing":
        text = f"{where} must be set as well."
    else:
        or_else = "".join(f", or {c['ctx']['expected']}" for c in same[1:] if c["type"] == "literal_error")
        text = f"{where}={first['input']!r} is not possible: {first['msg'][0].lower()}{first['msg'][1:]}{or_else}."
    more = len(complaints) - 1
    return text + (f" ({more} more like it.)" if more else "")


def _nearest(where: str, names: Sequence[str]) -> str | None:
    """The setting that was meant by an unknown one: its neighbour in spelling, its abbreviation, or its namesake."""
    head, _, leaf = where.rpartition(".")
    siblings = {name.rsplit(".", 1)[-1]: name for name in names if name.rpartition(".")[0] == head}
    for sibling, name in siblings.items():
        if _initials(leaf) == sibling or leaf == _initials(sibling):
            return name
    near = difflib.get_close_matches(leaf, siblings, 1, 0.6)
    if near:
        return siblings[near[0]]
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    return leaves.get(next(iter(difflib.get_close_matches(leaf, leaves, 1, 0.7)), ""))


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def _example(where: str, names: Sequence[str]) -> str:
    return next((name for name in names if name.startswith(where + ".")), where)
