"""`elsewhere segment` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..run_command import add_run_command, run_recipe

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Result


def add_segment_command(commands: Any) -> None:
    text = "Train UperNet on a pre-trained encoder (init.from=CHECKPOINT) on images with masks, or go on with it."
    command = add_run_command(commands, "segment", text, "the IoU of each class")
    command.add_argument(
        "--draw", type=Path, metavar="FOLDER", help="with --evaluate: image, mask and prediction of the first 16 images"
    )


def run_segment(arguments: argparse.Namespace) -> int:
    from .task_config import task_config

    def configure() -> Config:
        return task_config(arguments.recipe, arguments.overrides, "segment", "segment")

    if arguments.draw is not None and (not arguments.evaluate or arguments.supervise is not None):
        raise UserError("--draw goes with --evaluate (and not with --supervise): train first, then draw what it finds.")

    def train(config: Config) -> Callable[[], Result]:
        from .segment import segment

        return lambda: segment(
            config, fresh=arguments.fresh, allow_config_change=arguments.allow_config_change,
            measure_only=arguments.evaluate, draw=arguments.draw,
        )  # fmt: skip

    return run_recipe(arguments, configure, train)
