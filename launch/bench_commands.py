"""`elsewhere bench step` and `elsewhere bench all`: their arguments, and what they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import UserError
from .run_command import listed, positive


def add_bench_step(parts: Any) -> None:
    """Add `step` to `parts`, what `add_subparsers` of `bench` returned."""
    text = "Whole training steps of recipes and their variants, interleaved in one run, and what their parts take."
    more = (
        "Images/s; milliseconds of data wait, forward, teacher, backward, optimiser, adversary, EMA and logging; "
        "operations by formula and as counted; the share of a measured matrix rate (MFU); peak memory."
    )
    step = parts.add_parser("step", help=text, description=f"{text} {more}")
    step.add_argument(
        "recipes", nargs="*", metavar="RECIPE|key=value", help="recipes to compare, and settings for all of them"
    )
    step.add_argument(
        "--vary", action="extend", nargs="+", default=[], metavar="key=a,b",
        help="also compare these values, all combinations; short for some keys: compile, checkpointing, precision, and "
        "engine=ddp,fsdp,zero2",
    )  # fmt: skip
    step.add_argument("--batch", type=positive, help="images per step (8 on a CPU, 128 on a GPU, or micro_batch)")
    step.add_argument("--steps", type=positive, help="steps of one turn (3, on a GPU monitor.log_every)")
    step.add_argument("--rounds", type=positive, default=5, help="turns of each case (5)")
    step.add_argument(
        "--data", nargs="?", const="", metavar="PATH",
        help="take batches from the loader of this data, or without PATH of the recipe's, instead of random ones",
    )  # fmt: skip
    step.add_argument(
        "--profile", nargs="?", const="", metavar="FILE.json.gz",
        help="also write a trace of some steps for Perfetto (step_RECIPE.json.gz), and print the top operators",
    )  # fmt: skip


def run_bench_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `elsewhere bench step` and print its tables; raises UserError for something to mend."""
    vary, named = arguments.vary, arguments.recipes
    if not named:  # they may stand behind --vary, which takes all that follows it
        vary, named = [x for x in vary if "=" in x], [x for x in vary if "=" not in x]
    recipes = [item for item in named if "=" not in item]
    overrides = [item for item in named if "=" in item]
    if not recipes:
        raise UserError("Name a recipe to measure, e.g. elsewhere bench step cifar10_maeplus_rpe.")
    if arguments.data and "=" in arguments.data and not Path(arguments.data).exists():
        overrides.append(arguments.data)  # a setting that stands behind a --data without a path
    elif arguments.data:
        overrides.append(f"data.path={arguments.data}")
    trace = None
    if arguments.profile is not None:
        from .bench_profile import new_trace

        trace = new_trace(Path(arguments.profile or f"step_{Path(recipes[0]).stem}.json.gz"))
    from .bench_step import bench_step, variants

    result = bench_step(
        variants(recipes, overrides, vary), arguments.batch, arguments.steps, arguments.rounds,
        real=arguments.data is not None, trace=trace,
    )  # fmt: skip
    from .bench_step_table import print_step_table

    print_step_table(result)
    return result


def add_bench_all(parts: Any) -> None:
    """Add `all` to `parts`, what `add_subparsers` of `bench` returned."""
    text = "Masks, kernels, readers, whole steps and engines of this machine, one after the other, into one page."
    every = parts.add_parser("all", help=text, description=text)
    every.add_argument("--quick", action="store_true", help="a few minutes, for whether everything runs")
    every.add_argument("--data", metavar="FOLDER", help="a folder of classes for the readers (pictures are made up)")
    every.add_argument("--only", type=listed, metavar="A,B", help="some of masks, kernels, data, step, engines")
    every.add_argument(
        "-o", "--output", type=Path, metavar="PATH",
        help="the page, or its folder (MACHINE_DATE.md in docs/benchmarks where that is here, else in this folder)",
    )  # fmt: skip
    every.add_argument("--force", action="store_true", help="write over a page that is there")


def run_bench_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `elsewhere bench all` and say where its page is; raises UserError for something to mend."""
    from ..data.images import ImageFolder
    from .bench_all import bench_all, new_page

    path = new_page(arguments.output, arguments.force)  # before minutes of measuring
    if arguments.data:
        ImageFolder(arguments.data)
    result = bench_all(path, arguments.quick, arguments.data, arguments.only)
    print(f"Written to {path}.")
    return result
