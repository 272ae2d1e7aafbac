"""What was decided for a recipe, setting by setting, and where each rule comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import SHORT_NAMES, Config, flatten, overridden

Kind = Literal["given", "measured", "published", "planned", "rule of thumb"]


@dataclass(frozen=True)
class Choice:
    """A setting: its value, the recipe's, where the rule comes from, and the rule."""

    key: str
    value: Any
    before: Any
    kind: Kind
    rule: str


@dataclass
class Tuning:
    """A recipe on its way: what the user set stays, what is decided is remembered with its rule."""

    recipe: str
    base: Config
    config: Config
    given: list[str]
    choices: list[Choice] = field(default_factory=list)
    cautions: list[str] = field(default_factory=list)
    measured_side: str | None = None  # what was found of the images' sides, where the size follows from it

    def is_given(self, key: str) -> bool:
        return any(key == one or key.startswith(one + ".") or one.startswith(key + ".") for one in self.given)

    def decide(self, kind: Kind, rule: str, **values: Any) -> None:
        """Set `values` (`optim__lr=…`), unless the user did."""
        for name, value in values.items():
            key = name.replace("__", ".")
            before = at(self.base, key)
            if self.is_given(key):
                self.choices.append(Choice(key, at(self.config, key), before, "given", "as you set it"))
                continue
            self.config = overridden(self.config.to_dict(), {key: value}, f"of {self.recipe}", Config.model_validate)
            self.choices.append(Choice(key, value, before, kind, rule))


def at(config: Config, key: str) -> Any:
    """The value of a dotted setting."""
    found: Any = config.to_dict()
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def named(base: Config, config: Config, overrides: Sequence[str]) -> list[str]:
    """The settings that `overrides` name; of a group that was set whole, those that it changes."""
    keys = [SHORT_NAMES.get(key, key) for key in (item.partition("=")[0] for item in overrides)]
    before, after = dict(flatten(base.to_dict())), dict(flatten(config.to_dict()))
    changed = [key for key, value in after.items() if key not in before or before[key] != value]
    alone = [key for key in keys if not isinstance(at(base, key), dict)]
    return list(dict.fromkeys([*alone, *(key for key in changed if any(key.startswith(one + ".") for one in keys))]))
