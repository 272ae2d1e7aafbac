"""`elsewhere tune`: a recipe for one's own images and GPUs, each value with the rule it comes from."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..new_file import check_new, write_json

if TYPE_CHECKING:
    from .tune import Tuned


def add_tune_command(commands: Any) -> None:
    """Add `tune` to `commands`, what `add_subparsers` returned."""
    text = "Fit a recipe to your images and GPUs: epochs, batch, rates, teacher, warm-up, patches, each with its rule."
    more = "Settings that you give stay, and the others are fitted to them. Needs no GPU."
    command = commands.add_parser("tune", help=text, description=f"{text} {more}")
    command.add_argument("recipe", help="a packaged recipe (see `elsewhere configs`) or a YAML file")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. model.size=base")
    command.add_argument("--images", type=int, metavar="N", help="that there are to train on (those of --data)")
    command.add_argument(
        "--data", metavar="PATH", help="where they are: counted, their pixels measured, and written down"
    )
    command.add_argument("--size", type=int, metavar="PX", help="side of the images in pixels (the recipe's)")
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of all nodes together")
    command.add_argument("--gpu", default="h100-80g", metavar="NAME", help="(%(default)s); another name lists all")
    command.add_argument(
        "--length", choices=("between", "samples", "epochs"), default="between",
        help="as many epochs as the recipe, as many samples seen, or between the two (%(default)s)",
    )  # fmt: skip
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new .yaml for the recipe")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the choices there as well")


def run_tune(arguments: argparse.Namespace) -> int:
    """Run `elsewhere tune`; the exit status. Raises UserError for something to mend."""
    check_new(arguments.json, "--json")
    from ..config import load_config
    from ..planning.hardware import gpu

    gpu(arguments.gpu)
    load_config(arguments.recipe, arguments.overrides)
    # Only now: torch takes seconds to import.
    from .recipe_file import check_recipe, write_recipe
    from .tune import tune

    if arguments.output:
        check_recipe(arguments.output)
    tuned = tune(
        arguments.recipe, arguments.overrides, gpus=arguments.gpus, gpu=arguments.gpu, images=arguments.images,
        size=arguments.size, data=arguments.data, length=arguments.length,
    )  # fmt: skip
    print_choices(tuned)
    if arguments.output:
        write_recipe(arguments.output, tuned, shlex.join(["elsewhere", *sys.argv[1:]]))
        print(f"\nWritten to {arguments.output}: elsewhere plan, show and pretrain {arguments.output}.")
    else:
        print("\n-o FILE.yaml writes it as a recipe.")
    found = {"choices": [asdict(one) for one in tuned.choices], "plan": tuned.plan, "cautions": tuned.cautions}
    write_json(arguments.json, {"images": tuned.images, "size": tuned.size, **found})
    return 0


def print_choices(tuned: Tuned) -> None:
    """Print what `tune` returned: a setting, its value and the recipe's, and below it the rule."""
    r = tuned.plan
    print(f"{tuned.recipe} for {tuned.images:,} images of {tuned.size} pixels on {r['gpus']} × {r['gpu']}\n")
    for one in tuned.choices:
        if one.key == "about":
            continue
        was = "" if one.before == one.value else f"  (recipe: {_short(one.before)})"
        print(f"{one.key:30} {_short(one.value)}{was}\n    {one.kind}: {one.rule}")
    for caution in tuned.cautions:
        print(f"caution: {caution}")
    total, days = r["memory"]["total"] / 1e9, r["days"]
    time = (
        f"{days:.1f} days"
        if days >= 1
        else f"{24 * days:.1f} hours"
        if 24 * days >= 1
        else f"{1440 * days:.1f} minutes"
    )
    print(
        f"\n{r['steps']:,} steps of {r['batch']} images, {total:.1f} of {r['gpu_memory'] / 1e9:g} GB a GPU, "
        f"about {time} at an assumed MFU of {r['mfu']:.2f}, if reading images keeps up "
        "(elsewhere plan and bench data say more)"
    )
    print("As in the recipe: noise and attack, shares that are masked, weight decay, augmentation not named above.")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return "none" if value is None else str(value)
