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
        "quick: k-NN, low-shot (1 %% and 1, 2 and 5 images per class), and linear on the last layer. full: also linear "
        "on the last four layers, and attentive."
    )
    command = commands.add_parser("evaluate", help=text, description=f"{text} {more}")
    add_encoder_arguments(command)
    command.add_argument("--suite", choices=tuple(SUITES), default="quick", help="(%(default)s)")
    add_probe_arguments(command)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Run `elsewhere evaluate`; the exit status. Raises UserError for something to mend."""
    kinds, layers = SUITES[arguments.suite]
    if not arguments.shots and not arguments.lists:
        arguments.shots = ["1%", "1", "2", "5"]
    measure(arguments, kinds, settings_of(arguments, layers), best_only=True)
    return 0
