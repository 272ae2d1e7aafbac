"""The configuration of a task: its recipe, and of the encoder what the pre-trained weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..config import TASKS, Config, flatten, load_config
from ..errors import UserError

# Settings of `model` that say how fresh weights are drawn: of no meaning to loaded ones.
_FRESH = ("init", "init_std", "depth_scaled_init")


def any_config(recipe: str, overrides: Sequence[str]) -> Config:
    """The configuration of a recipe of any kind; a task that names no init.from has fresh weights of its own sizes.

    Raises UserError for settings that are not possible.
    """
    config = load_config(recipe, overrides)
    kind = config.method.kind
    if kind not in TASKS:
        return config
    fresh = ["init.from=none"] if config.init.from_ is None else []
    return task_config(recipe, [*overrides, *fresh], kind, TASKS[kind])


def task_config(recipe: str, overrides: Sequence[str] | Mapping[str, Any], kind: str, command: str) -> Config:
    """A recipe of method.kind `kind`, whose `model` and pixel statistics are completed from `init.from`.

    What the recipe and the overrides name stays; positions are learned ones, that start from the encoder's own. Raises
    UserError for a recipe of another kind, without init.from, or whose weights cannot be read.
    """
    config = load_config(recipe, overrides)
    if config.method.kind != kind:
        raise UserError(
            f"{recipe} is a recipe of method.kind={config.method.kind}, and `elsewhere {command}` takes one of {kind}: "
            "`elsewhere configs` lists them."
        )
    if config.init.from_ is None:
        raise UserError(
            f"`elsewhere {command}` starts from pre-trained weights: name a run or a file by init.from=PATH "
            "(init.from=none for fresh ones)."
        )
    if config.init.from_ == "none":
        values = _named(config)
        values["init"]["from"] = None
        values.setdefault("model", {})["positions"] = "learned"
        return Config.model_validate(values)
    return _completed(config, _described(config))


def _described(config: Config) -> Config | None:
    """What is known of the encoder that the weights are of: by them, or by the run that started from them."""
    from ..load import encoder_state

    path = Path(str(config.init.from_))
    try:
        return encoder_state(path, config.init.which)[2]
    except UserError as error:
        known = Path(str(config.run.dir)) / "config.yaml"
        if known.is_file() and not path.exists():  # a run that goes on needs them no more
            before = Config.stored(yaml.safe_load(known.read_text(encoding="utf-8")))
            if before.init.from_ == config.init.from_:
                return before
        raise UserError(f"init.from: {error}") from error


def _completed(config: Config, found: Config | None) -> Config:
    values = _named(config)
    model = values.setdefault("model", {})
    if found is not None:
        given = dict(flatten(model))
        for key, value in flatten(found.model.model_dump(mode="json")):
            if key not in given and key not in _FRESH and key != "drop_path":
                _put(model, key, value)
        for name in ("mean", "std"):
            if getattr(config.data, name) is None:
                values.setdefault("data", {})[name] = getattr(found.data, name)
        if model.get("class_token") is None:
            model["class_token"] = found.method.kind != "jepa"
    model["positions"] = "learned"
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(
            f"The encoder of init.from does not go with this recipe: {error.errors()[0]['msg']}."
        ) from error


def _named(config: Config) -> dict[str, Any]:
    """What the recipe and the overrides named: some settings ask whether they were."""
    values = config.model_dump(mode="json", by_alias=True, exclude_unset=True)
    values.setdefault("run", {})["dir"] = config.run.dir  # by the recipe's name, where it was not named
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = value
