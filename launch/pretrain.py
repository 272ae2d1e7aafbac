"""`elsewhere pretrain`: a method trained on images, its frozen encoder probed before and after."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..data.webdataset import Stream
from .banner import accuracy, summary
from .config import TASKS, Config, load_config
from .engine.base import Engine
from .errors import UserError
from .load import start_from
from .parts import Parts, assemble
from .quality import probe
from .run import Result, run
from .world import World


class Pretraining:
    """The `Task` of a pre-training method."""

    def assemble(self, config: Config, world: World, dataset: Any, val_dataset: Any) -> Parts:
        return assemble(config, world, dataset, val_dataset)

    def start(self, config: Config, parts: Parts) -> str:
        init = config.init
        if not init.from_:
            return "fresh weights"
        return f"encoder weights from {start_from(parts.method, init.from_, init.which, init.allow)}"

    def measure(self, config: Config, parts: Parts, engine: Engine) -> dict[str, Any] | None:
        if parts.val is None or isinstance(parts.train, Stream):
            return None
        return probe(
            engine, parts.train, parts.val, config.probe, config.data.interpolation, config.seed, parts.workers
        )

    def line(self, when: str, found: dict[str, Any]) -> str:
        return accuracy(when, found)

    def summary(self, console: Console, result: Result) -> None:
        summary(console, result.run, result.steps, result.before, result.after)


def pretrain(
    recipe: str | Config,
    dataset: Any = None,
    *,
    val_dataset: Any = None,
    fresh: bool = False,
    allow_config_change: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> Result:
    """Pre-train a recipe, or continue it where its run stopped.

    `dataset` (any torch map-style data set) takes the place of `data.path`, and `val_dataset` of its held-out part;
    overrides are dotted settings (`**{"optim.lr": 1e-3}`), groups (`optim={"lr": 1e-3}`) or `optim__lr=1e-3`.
    Raises UserError or DataError for anything that a user can mend, NonFiniteLoss for a run that diverged.
    """
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    if config.method.kind in TASKS:
        command = TASKS[config.method.kind]
        raise UserError(f"This recipe trains a task on labels, not a method: use `elsewhere {command}`.")
    return run(
        config, Pretraining(), dataset, val_dataset=val_dataset, fresh=fresh, allow_config_change=allow_config_change,
        console=console,
    )  # fmt: skip
