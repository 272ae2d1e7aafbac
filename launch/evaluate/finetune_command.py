"""`elsewhere finetune` on the command line, and its sweeps."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_command import add_run_command, exit_status, run_recipe

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Result


def add_finetune_command(commands: Any) -> None:
    text = "Fine-tune a pre-trained encoder (init.from=CHECKPOINT) on labelled images, or continue where it stopped."
    command = add_run_command(commands, "finetune", text, "the accuracy")
    command.add_argument(
        "--sweep", metavar="key=a,b,c", help="a run for each of these values, e.g. optim.blr=1e-4,5e-4,1e-3"
    )


def run_finetune(arguments: argparse.Namespace) -> int:
    from .task_config import task_config

    def configure(*more: str) -> Config:
        return task_config(arguments.recipe, [*arguments.overrides, *more], "classify", "finetune")

    flags = {
        "fresh": arguments.fresh, "allow_config_change": arguments.allow_config_change,
        "measure_only": arguments.evaluate,
    }  # fmt: skip

    def train(config: Config) -> Callable[[], Result]:
        from .finetune import finetune

        return lambda: finetune(config, **flags)

    if not arguments.sweep:
        return run_recipe(arguments, configure, train)
    if arguments.supervise is not None or arguments.evaluate:
        raise UserError("--sweep goes neither with --supervise nor with --evaluate; leave one out.")
    from .sweep import sweep

    return exit_status(lambda: sweep(arguments.sweep, configure, flags))
