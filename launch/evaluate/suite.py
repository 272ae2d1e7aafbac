"""`elsewhere evaluate`: a whole suite of probes on one checkpoint, its features extracted once."""

from __future__ import annotations

import argparse
from typing import Any

from .probe import add_encoder_arguments, add_probe_arguments, measure, settings_of

SUITES = {
    "quick": (["knn", "low-shot", "linear"], "last"),
    "full": (["knn", "low-shot", "linear", "attentive"], "both"),
}


def add_evaluate_command(commands: Any) -> None:
    """Add `evaluate` to `commands`, what `add_subparsers` returned."""
    text = "Run a suite of probes on one checkpoint; features are extracted once for all of them."
    more = (
        "quick: k-NN, low-shot (1 % and 1, 2 and 5 images per class), and linear on the last layer. full: also linear "
        "on the last four layers, and attentive."
    )
    command = commands.add_parser("evaluate", help=text, description=f"{text} {more}")
    add_encoder_arguments(command)
    command.add_argument("--suite", choices=tuple(SUITES), default="quick", help="(%(default)s)")
    command.add_argument(
        "--finetune", nargs="+", metavar=("RECIPE", "key=value"),
        help="then fine-tune, too, by a recipe and settings of its own, e.g. finetune optim.epochs=30",
    )  # fmt: skip
    add_probe_arguments(command)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run `elsewhere evaluate`; the exit status. Raises UserError for something to mend."""
    kinds, layers = SUITES[arguments.suite]
    if not arguments.shots and not arguments.lists:
        arguments.shots = ["1%", "1", "2", "5"]
    measure(arguments, kinds, settings_of(arguments, layers), best_only=True)
    return _finetuned(arguments) if arguments.finetune else 0


def _finetuned(arguments: argparse.Namespace) -> int:
    """Fine-tune the same checkpoint on the same images, in the folder `finetune` beside the results."""
    from ..run_command import exit_status
    from .finetune import finetune
    from .session import results_folder
    from .task_config import task_config

    recipe, *own = arguments.finetune
    folder = results_folder(arguments.checkpoint, arguments.output) / "finetune"
    given = [f"init.from={arguments.checkpoint}", f"init.which={arguments.which}", f"run.dir={folder}"]
    config = task_config(recipe, [*given, *arguments.overrides, *own], "classify", "evaluate --finetune")
    return exit_status(lambda: finetune(config))
