"""`elsewhere detect` on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..run_command import add_run_command, run_recipe

if TYPE_CHECKING:
    from ..config import Config
    from ..run import Result


def add_detect_command(commands: Any) -> None:
    text = (
        "Train a detector on a pre-trained encoder (init.from=CHECKPOINT) and COCO JSON, or continue where it stopped."
    )
    command = add_run_command(commands, "detect", text, "the average precision")
    command.add_argument(
        "--draw",
        type=Path,
        metavar="FOLDER",
        help="with --evaluate: held-out images with boxes and masks drawn on them",
    )


def run_detect(arguments: argparse.Namespace) -> int:
    def configure() -> Config:
        from .task_config import task_config

        return task_config(arguments.recipe, arguments.overrides, "detect", "detect")

    def train(config: Config) -> Callable[[], Result]:
        from .detect import detect

        return lambda: detect(
            config, fresh=arguments.fresh, allow_config_change=arguments.allow_config_change,
            measure_only=arguments.evaluate, drawings=arguments.draw,
        )  # fmt: skip

    return run_recipe(arguments, configure, train)
