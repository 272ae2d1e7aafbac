"""`elsewhere reproduce`: the published figures of a published checkpoint beside ours, by the published protocol."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .published import PROTOCOLS, PUBLISHED, Published

if TYPE_CHECKING:
    from ..config import Config

_IMAGENET_VAL = 50_000


def add_reproduce_command(commands: Any) -> None:
    text = "Measure a published checkpoint by its published protocol, and set the published figure beside ours."
    command = commands.add_parser("reproduce", help=text, description=f"{text} {', '.join(PUBLISHED)}.")
    command.add_argument("name", help="a published checkpoint, e.g. stop_vit_b16")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value",
        help="settings, e.g. engine.precision=bfloat16; those of optim, data and checkpoint are the fine-tuning's",
    )  # fmt: skip
    command.add_argument("--weights", type=Path, required=True, metavar="FILE", help="the checkpoint's file")
    command.add_argument(
        "--imagenet", required=True, metavar="DIR", help="ImageNet: a folder with train/ and val/, shards, …"
    )
    command.add_argument(
        "--only", metavar="A,B", help=f"of {', '.join(PROTOCOLS)} (default: what was published)".replace("%", "%%")
    )
    command.add_argument(
        "--list", type=Path, metavar="FILE", help="the images of 1 %%, a name a line (default: three draws of 1 %%)"
    )
    command.add_argument(
        "--cached", action="store_true",
        help="linear probes on one centre crop of each image, not on 28 epochs of random crops",
    )  # fmt: skip
    command.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="for results (reproduce/NAME)")


def run_reproduce(arguments: argparse.Namespace) -> int:
    """Run `elsewhere reproduce`; the exit status. Raises UserError for something to mend."""
    from ...models import zoo_published
    from .session import SETTINGS

    published = _find(arguments.name)
    wanted = _wanted(arguments.only, published)
    model = [item for item in arguments.overrides if item.startswith("model.")]
    common = [item for item in arguments.overrides if item.partition("=")[0] in SETTINGS and item not in model]
    tuning = [item for item in arguments.overrides if item not in model and item not in common]
    if tuning and "finetune" not in wanted:
        raise UserError(f"{tuning[0]} is a setting of fine-tuning, which is not measured here; leave it out.")
    if arguments.name in zoo_published.PUBLISHED and not model and arguments.weights.is_file():
        # By that name it is checked to be this checkpoint, and what its tensors leave open is known.
        arguments.weights = Path(f"zoo:{arguments.name}={arguments.weights}")
    check_architecture(arguments.weights, arguments.name, published, model)
    folder = arguments.output or Path("reproduce") / arguments.name
    rows: list[dict[str, Any]] = []
    data = f"data.path={arguments.imagenet}"
    if any(name != "finetune" for name in wanted):
        rows += _probed(arguments, wanted, [data, *common], folder)
    status = 0
    if "finetune" in wanted:
        row, status = _tuned(arguments, published, [data, *common, *model, *tuning], folder)
        rows += [row] if row else []
    if os.environ.get("RANK", "0") == "0" and rows:
        _report(arguments, published, rows, folder)
    return status


def _find(name: str) -> Published:
    if name in PUBLISHED:
        return PUBLISHED[name]
    near = difflib.get_close_matches(name.rpartition("/")[2], PUBLISHED, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PUBLISHED)}."
    raise UserError(f"Nothing published is known of {name}; {hint}")


def _wanted(only: str | None, published: Published) -> list[str]:
    chosen = list(published.figures) if only is None else [part for part in only.split(",") if part]
    unknown = [name for name in chosen if name not in PROTOCOLS]
    if unknown or not chosen:
        raise UserError(f"--only {only}: choose of {', '.join(PROTOCOLS)}.")
    if "finetune" in chosen and published.finetune is None:
        raise UserError("Fine-tuning of this checkpoint was not published, and no protocol is known: leave it out.")
    return chosen


def check_architecture(weights: Path, name: str, published: Published, overrides: Sequence[str]) -> None:
    """Raise UserError where a file's encoder is not that of the published checkpoint."""
    import torch

    from ..build import build_encoder, encoder_size
    from ..config import load_config
    from ..encoder_weights import encoder_weights

    expected = load_config(published.recipe, overrides)
    read = encoder_weights(weights)
    with torch.device("meta"):
        found = read.for_encoder(build_encoder(expected))
    if found is None:
        raise UserError(f"{read.what} does not say what encoder it is of; give the published file.")

    def facts(config: Config) -> dict[str, Any]:
        size, model = encoder_size(config), config.model
        grid = [side // model.patch_size for side in model.image_size]
        return {
            "width": size.width, "depth": size.depth, "heads": size.heads, "patch": model.patch_size, "grid": grid,
            "relative positions": model.relative.terms,
        }  # fmt: skip

    theirs, ours = facts(found), facts(expected)
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(f"{read.what} is not {name}: its {key} is {theirs[key]}, and that of {name} {value}.")


def _probed(
    arguments: argparse.Namespace, wanted: Sequence[str], overrides: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Rows of the frozen encoder's protocols, whose features are extracted once."""
    from . import probes
    from .results import merge
    from .session import Options, open_session

    kinds = ["low-shot"] * ("1%" in wanted) + ["linear"] * any(name.startswith("linear") for name in wanted)
    layers = tuple(layer for layer, name in (("last", "linear"), ("last4", "linear-last4")) if name in wanted)
    settings = probes.Settings(
        layers=layers or ("last",), augment=not arguments.cached, lists=(arguments.list,) if arguments.list else ()
    )
    options = Options(arguments.weights, overrides, output=folder, layers=probes.needed_layers(kinds, settings))
    with open_session(options) as session:
        entries = probes.run(session, kinds, settings)
        session.world.first_decides(lambda: merge(session.folder, entries))
    found = {}
    for entry in entries:
        for row in entry["best"]:
            key = "1%" if entry["probe"] == "low-shot" else "linear-last4" if row.get("input") == "last4" else "linear"
            found[key] = {**row, "protocol": entry["protocol"], "images": entry["val_images"]}
    return [{"measured": name, **found[name]} for name in wanted if name in found]


def _tuned(
    arguments: argparse.Namespace, published: Published, overrides: Sequence[str], folder: Path
) -> tuple[dict[str, Any] | None, int]:
    """The row of fine-tuning, and the exit status; no row where it was told to stop."""
    from ..run import Result
    from ..run_command import exit_status
    from .finetune import finetune
    from .task_config import task_config

    assert published.finetune is not None
    given = [f"init.from={arguments.weights}", f"run.dir={folder / 'finetune'}", *overrides]
    config = task_config(published.finetune, given, "classify", "reproduce")
    results: list[Result] = []
    status = exit_status(lambda: results.append(finetune(config)) or results[0])
    figures = results[0].after if results else None
    if status or not figures:
        return None, status
    row = {"top1": figures["top1"], "interval": figures["top1_interval"], "protocol": {"recipe": published.finetune}}
    return {"measured": "finetune", **row, "images": figures["images"]}, 0


def _report(arguments: argparse.Namespace, published: Published, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    print(f"{arguments.name} ({published.source}), from {arguments.weights}, on {arguments.imagenet}")
    print(f"{'protocol':14} {'published':>9} {'here':>8}   95 % interval")
    for row in rows:
        reported = published.figures.get(row["measured"])
        text = "        –" if reported is None else f"{reported:7.1f} %"
        interval = row.get("interval")
        spread = f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}" if interval else ""
        if not interval and "std" in row:
            spread = f"± {100 * row['std']:.2f} over {len(row['draws'])} draws"
        print(f"{row['measured']:14} {text:>9} {100 * row['top1']:6.2f} %   {spread}")
    for row in rows:
        print(f"{row['measured']}: {PROTOCOLS[row['measured']]}")
    if not arguments.list and any(row["measured"] == "1%" for row in rows):
        print("1%: drawn at random; the published figure is of one list of images, which --list FILE takes.")
    if arguments.cached and any(row["measured"].startswith("linear") for row in rows):
        print("linear: on one centre crop of each image (--cached); published with random crops and flips.")
    measured = min(row["images"] for row in rows)
    if measured != _IMAGENET_VAL:
        print(f"measured on {measured:,} images and not on ImageNet's {_IMAGENET_VAL:,}: the figures do not compare.")
    path, aside = folder / "reproduce.json", folder / "reproduce.json.part"
    found = [{**row, "published": published.figures.get(row["measured"])} for row in rows]
    about = {
        "name": arguments.name, "weights": str(arguments.weights), "data": arguments.imagenet,
        "source": published.source, "date": date.today().isoformat(), "rows": found,
    }  # fmt: skip
    aside.write_text(json.dumps(about, indent=1), encoding="utf-8")
    os.replace(aside, path)
    print(f"written to {path}")
