"""`elsewhere probe`: how good a frozen encoder's features are, by four protocols."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .probes import Settings
    from .session import Options

KINDS = ("knn", "low-shot", "linear", "attentive")


def add_probe_command(commands: Any) -> None:
    """Add `probe` to `commands`, what `add_subparsers` returned."""
    text = "Measure a frozen encoder: k-NN, low-shot, linear and attentive probes, with confidence intervals."
    more = "Alone or under torchrun, with the same figures. Results are merged into results.json of the run."
    command = commands.add_parser("probe", help=text, description=f"{text} {more}")
    add_encoder_arguments(command)
    command.add_argument(
        "--kind", type=_kinds, default=["knn"], metavar="A,B", help=f"of {', '.join(KINDS)} (default: knn)"
    )
    add_probe_arguments(command)


def add_encoder_arguments(command: argparse.ArgumentParser) -> None:
    """What says which encoder, which images, and where results go."""
    command.add_argument("checkpoint", type=Path, help="a run, a checkpoint folder, or a file of weights")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value",
        help="settings of data, loader and engine, e.g. data.path=FOLDER, and model.image_size, seed",
    )  # fmt: skip
    command.add_argument("--which", choices=("teacher", "student"), default="teacher", help="(%(default)s)")
    command.add_argument("--recipe", help="that describes the encoder, where a file of weights does not")
    command.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER",
        help="for results.json (the run's folder, or results/NAME of a file)",
    )  # fmt: skip
    command.add_argument("--cache", type=Path, metavar="FOLDER", help="keep features there, for other probes and times")


def add_probe_arguments(command: argparse.ArgumentParser) -> None:
    """Settings of the probes."""
    command.add_argument("--pool", choices=("patch", "class", "both"), default="patch",
                         help="mean of patch tokens, class token, or both (%(default)s)")  # fmt: skip
    command.add_argument("--train-images", type=_count, metavar="N", help="some of them, at random (all)")
    command.add_argument("--val-images", type=_count, metavar="N", help="some of them, at random (all)")
    group = command.add_argument_group("knn")
    group.add_argument("--neighbours", type=_counts, metavar="K,K", help="(10,20,100,200)")
    group = command.add_argument_group("low-shot")
    group.add_argument("--shots", type=_listed, metavar="A,B", help="images per class, or a share of each (1%%)")
    group.add_argument("--draws", type=_count, default=3, metavar="N", help="repetitions (%(default)s)")
    group.add_argument("--list", type=Path, action="append", default=[], metavar="FILE", dest="lists",
                       help="instead: a file with the name of an image a line; may be given again")  # fmt: skip
    group.add_argument("--lambda", type=_positive, metavar="L", dest="strength", help="of the l2 penalty (0.0025)")
    group = command.add_argument_group("linear")
    group.add_argument("--layers", choices=("last", "last4", "both"), help="inputs (both; last in a quick suite)")
    group.add_argument("--rates", type=_numbers, metavar="A,B", help="for a batch of 256 (0.003 to 1)")
    group.add_argument("--decays", type=_numbers, metavar="A,B", help="weight decays (0,5e-4)")
    group.add_argument("--epochs", type=_count, metavar="N", help="(28)")
    group.add_argument("--augment", action="store_true",
                       help="random crops and flips, extracted anew each epoch, as published")  # fmt: skip
    group.add_argument("--select", choices=("val", "held-out"), default="val",
                       help="the best rate: on val, as published, or on a tenth of train (%(default)s)")  # fmt: skip
    group = command.add_argument_group("attentive")
    group.add_argument("--attentive-rates", type=_numbers, metavar="A,B", help="(3e-4,1e-3,3e-3)")
    group.add_argument("--attentive-epochs", type=_count, metavar="N", help="(20)")


def options_of(arguments: argparse.Namespace, layers: int) -> Options:
    """The session's options of parsed arguments."""
    from .session import Options

    return Options(
        arguments.checkpoint, arguments.overrides, arguments.which, arguments.recipe, arguments.output, arguments.cache,
        arguments.train_images, arguments.val_images, layers,
    )  # fmt: skip


def settings_of(arguments: argparse.Namespace, layers: str = "both") -> Settings:
    """The probes' settings of parsed arguments; UserError for those that contradict each other."""
    from .low_shot import Shots
    from .probes import Settings

    if arguments.lists and arguments.shots:
        raise UserError("--list says which images are labelled, and so does --shots: leave one out.")
    if arguments.lists and arguments.train_images:
        raise UserError(
            "--list says which images are labelled, and --train-images takes some at random: leave one out."
        )
    given: dict[str, Any] = {
        name: value
        for name in ("neighbours", "rates", "decays", "epochs", "attentive_rates", "attentive_epochs", "strength")
        if (value := getattr(arguments, name)) is not None
    }
    layers = arguments.layers or layers
    if arguments.shots:
        given["shots"] = tuple(map(Shots, arguments.shots))
    return Settings(
        pool=arguments.pool, layers=("last", "last4") if layers == "both" else (layers,), augment=arguments.augment,
        select=arguments.select, lists=tuple(arguments.lists), draws=arguments.draws, **given,
    )  # fmt: skip


def run_probe(arguments: argparse.Namespace) -> int:
    """Run `elsewhere probe`; the exit status. Raises UserError for something to mend."""
    measure(arguments, arguments.kind, settings_of(arguments))
    return 0


def measure(arguments: argparse.Namespace, kinds: list[str], settings: Settings, best_only: bool = False) -> None:
    """Run probes, print their table, and merge their results."""
    from .probes import needed_layers, run
    from .results import merge, table
    from .session import open_session

    with open_session(options_of(arguments, needed_layers(kinds, settings))) as session:
        entries = run(session, kinds, settings)
        path = session.world.first_decides(lambda: merge(session.folder, entries))
        if session.world.first:
            facts = entries[0]
            print(f"{facts['encoder']}: {facts['train_images']:,} images to learn from, {facts['val_images']:,} to "
                  f"measure on ({facts['measured_on']}), {facts['classes']} classes")  # fmt: skip
            print(table(entries, best_only))
            if not best_only and any(len(entry["figures"]) > len(entry["best"]) for entry in entries):
                print(
                    "* "
                    + "; ".join(f"{e['probe']}: {e['protocol']['best']}" for e in entries if "best" in e["protocol"])
                )
            print(f"merged into {path}")


def _kinds(text: str) -> list[str]:
    found = _listed(text)
    unknown = [kind for kind in found if kind not in KINDS]
    if unknown or not found:
        raise argparse.ArgumentTypeError(f"{text!r}: choose of {', '.join(KINDS)}")
    return found


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(item) for item in _listed(text)]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _numbers(text: str) -> list[float]:
    try:
        found = [float(item) for item in _listed(text)]
    except ValueError:
        found = []
    if not found or any(not 0 <= value < float("inf") for value in found):
        raise argparse.ArgumentTypeError("must be numbers, 0 or more")
    return found
