"""What the commands that train have in common: their arguments, supervision, and exit statuses."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, first_of_machine, print_error

if TYPE_CHECKING:
    from .config import Config
    from .run import Result


def add_run_command(commands: Any, name: str, text: str, measures: str = "") -> argparse.ArgumentParser:
    """A command that trains a recipe; with `measures`, what it measures, it can do that alone."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("recipe", help="a packaged recipe (see `elsewhere configs`) or a YAML file")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. optim.lr=1e-3")
    command.add_argument("--fresh", action="store_true", help="refuse to continue a run that is there already")
    command.add_argument(
        "--allow-config-change", action="store_true", help="continue although settings that change the result differ"
    )
    if measures:
        command.add_argument(
            "--evaluate",
            action="store_true",
            help=f"only {measures} of the run that is there, from its newest checkpoint",
        )
    many = command.add_argument_group(
        "several machines, and failures", "Start the same command on each machine; without --supervise, by a launcher."
    )
    many.add_argument(
        "--supervise", type=count, metavar="N", help="start a process per GPU here, and all anew up to N times"
    )
    many.add_argument("--nodes", type=positive, help="machines (1, or as the hostfile or SLURM say)")
    many.add_argument("--node-rank", type=count, metavar="I", help="which of them this one is, from 0")
    many.add_argument("--master", metavar="HOST[:PORT]", help="where the first one listens (port 29400)")
    many.add_argument("--processes", type=positive, metavar="P", help="processes here (its GPUs, or 1)")
    many.add_argument(
        "--hostfile", type=Path, help="in their place: a file with a line `HOST slots=P` for each machine"
    )
    many.add_argument("--wait", type=positive, metavar="SECONDS", help="for a machine to come, or come back (300)")
    return command


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def listed(text: str) -> list[str]:
    """The words between commas."""
    return [item for item in text.split(",") if item]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def run_recipe(
    arguments: argparse.Namespace, configure: Callable[[], Config], train: Callable[[Config], Callable[[], Result]]
) -> int:
    """Configure a run and train it, or supervise processes that do; gives the exit status.

    `train(config)` gives the function that trains: what it imports takes seconds, and a misspelt setting should not
    wait for that.
    """
    try:
        config = configure()
    except UserError as error:
        from .nodes.announce import announce

        announce(error)
        raise
    if arguments.supervise is not None:
        return _supervise(arguments, config)
    given = [
        name for name in ("nodes", "node_rank", "master", "processes", "hostfile") if vars(arguments)[name] is not None
    ]
    given += ["wait"] if arguments.wait is not None else []
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} belongs to --supervise N: add that, or use a launcher's own.")
    return exit_status(train(config))


def exit_status(train: Callable[[], Result]) -> int:
    """The exit status of a training: 0, 128 + a signal, 3 for one that diverged; raises UserError for the rest."""
    from ..data.images import DataError
    from .engine.precision import LossScaleTooSmall
    from .monitor import NonFiniteLoss
    from .nodes.guard import RankFailed

    try:
        result = train()
    except DataError as error:
        raise UserError(str(error), said=getattr(error, "said", False)) from error
    except (NonFiniteLoss, LossScaleTooSmall) as error:
        if first_of_machine():
            print_error(error)
        return error.status
    except RankFailed as error:
        return error.status
    except Exception as error:
        if getattr(error, "said", False):
            return 1
        raise
    return 128 + result.signal if result.signal else 0


def _supervise(arguments: argparse.Namespace, config: Config) -> int:
    import torch

    from .nodes.hostfile import find_machines
    from .nodes.supervise import Terms, supervise

    devices = 0 if config.engine.device == "cpu" else torch.cuda.device_count()
    if not devices and config.engine.device == "cuda":
        raise UserError("engine.device=cuda, but no NVIDIA GPU is visible; use engine.device=cpu or auto.")
    machines = find_machines(
        hostfile=arguments.hostfile, nodes=arguments.nodes, node_rank=arguments.node_rank, master=arguments.master,
        processes=arguments.processes, devices=devices,
    )  # fmt: skip
    flags = ["--fresh"] * arguments.fresh + ["--allow-config-change"] * arguments.allow_config_change
    flags += ["--evaluate"] * getattr(arguments, "evaluate", False)
    command = [arguments.command, arguments.recipe, *arguments.overrides, *flags]
    return supervise(
        machines, Terms(arguments.supervise, arguments.wait or 300, config.engine.silence_seconds), command
    )
