"""`elsewhere plan`: what a recipe takes on GPUs that are not rented yet."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from ..config import refuse_task
from ..errors import UserError
from ..new_file import check_new, write_json


def add_plan_command(commands: Any) -> None:
    """Add `plan` to `commands`, what `add_subparsers` returned."""
    text = "Say what a recipe takes on so many GPUs: memory, the largest batch, exchanges, time; without a GPU."
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("recipe", help="a packaged recipe (see `elsewhere configs`) or a YAML file")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. model.size=large"
    )
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of all nodes together")
    command.add_argument("--gpu", required=True, metavar="NAME", help="e.g. h200-141g; another name lists all")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    command.add_argument(
        "--engine", metavar="NAME", help="ddp, fsdp, a DeepSpeed setting such as zero2, or a JSON file"
    )
    command.add_argument("--interconnect", default="ib-400g", metavar="NAME", help="between nodes (%(default)s)")
    command.add_argument("--nvlink", metavar="NAME", help="within a node (what the GPU has), e.g. pcie4")
    command.add_argument("--mfu", type=float, help="share of the GPU's peak that training reaches (assumed by size)")
    command.add_argument("--images", type=int, metavar="N", help="of an epoch (data.path's, else ImageNet's 1,281,167)")
    command.add_argument(
        "--images-per-core", type=float, metavar="N", help="that a loader's core decodes a second (our benchmark's)"
    )
    command.add_argument(
        "--check", action="store_true", help="compare with FSDP's and DeepSpeed's estimates and a step"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")


def run_plan(arguments: argparse.Namespace) -> int:
    """Run `elsewhere plan`; the exit status. Raises UserError for something to mend."""
    for name in ("images", "images_per_core"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be more than 0.")
    check_new(arguments.json, "--json")
    from .hardware import gpu, link

    gpu(arguments.gpu)
    link(arguments.interconnect, False)
    overrides = [*arguments.overrides, *_engine(arguments.engine)]
    # Only now: torch takes seconds to import.
    from ..evaluate.task_config import any_config
    from .plan import Place, plan

    config = any_config(arguments.recipe, overrides)
    if arguments.check:
        refuse_task(config, "--check")

    place = Place(
        arguments.gpus, arguments.gpu, arguments.gpus_per_node, arguments.interconnect, arguments.nvlink
    )  # fmt: skip
    result = plan(
        arguments.recipe, config, place, mfu=arguments.mfu, images=arguments.images,
        images_per_core=arguments.images_per_core,
    )  # fmt: skip
    print_plan(result)
    if arguments.check:
        from .check import check, print_check

        result["check"] = check(config, place)
        print_check(result["check"])
    write_json(arguments.json, result)
    return 0


def _engine(name: str | None) -> list[str]:
    if name is None:
        return []
    if name in ("ddp", "fsdp"):
        return [f"engine.kind={name}"]
    from ..engine.ds_settings import names

    if name == "hsdp":
        raise UserError("--engine hsdp is fsdp with replicas: write --engine fsdp engine.replicas=NODES.")
    known = ["ddp", "fsdp", *names()]
    if not name.endswith(".json") and name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {near[0]}? There" if near else "there"
        listed = ", ".join(known)
        raise UserError(f"There is no --engine {name}; {hint} are {listed}, or a file that ends in .json.")
    return ["engine.kind=deepspeed", f"engine.deepspeed={name}"]


def print_plan(result: dict[str, Any]) -> None:
    """Print what `plan` returned."""
    r = result
    nodes = f"{r['nodes']} node{'s' * (r['nodes'] > 1)} of {min(r['gpus_per_node'], r['gpus'])}"
    if r["nodes"] > 1 and r["gpus"] % r["gpus_per_node"]:
        nodes += f" (the last one of {r['gpus'] % r['gpus_per_node']})"
    between = f", {r['links'][1]} between them" if r["nodes"] > 1 else ""
    print(f"{r['recipe']} on {r['gpus']} × {r['gpu']}: {nodes}, {r['links'][0]} within{between}")
    frozen = f" and {r['frozen'] / 1e6:,.1f} M of the teacher" if r["frozen"] and not r["task"] else ""
    views = f" of {r['views']} crops" if r["views"] > 1 else ""
    print(
        f"{r['engine']}, {r['precision']}, engine.activation_checkpointing={r['activation_checkpointing']}; "
        f"{r['trained'] / 1e6:,.1f} M weights trained{frozen}; {r['gflop_per_image']:,.1f} GFLOP an image{views}"
    )
    print(
        f"Batch {r['batch']}: {r['batch'] // r['gpus']} images a GPU and step, {r['accumulation']} micro-batch"
        f"{'es' * (r['accumulation'] > 1)} of {r['micro_batch']}"
    )
    if r["compile"]:
        print("engine.compile=true is not modelled: compiled blocks keep less.")
    if r["task"]:
        print(f"For `elsewhere {r['task']}`; without init.from its encoder is of the recipe's own sizes.")
    if r["task"] == "detect":
        print("Heads are counted with all regions sampled; what matches them to boxes is not.")
    if r["apex"]:
        print("NVIDIA Apex is planned as torch's own: the same sizes.")
    print("\nMemory of a GPU, GB (10⁹ bytes)")
    for name, size in r["memory"].items():
        print(f"  {name:36} {size / 1e9:>9.3f}")
    print(
        f"  {'free of ' + format(r['gpu_memory'] / 1e9, 'g'):36} {(r['gpu_memory'] - r['memory']['total']) / 1e9:>9.3f}"
    )
    if r["host"]:
        listed = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in r["host"].items())
        print(f"  in host memory for each GPU: {listed}")
    print(
        "\nengine.activation_checkpointing   kept GB   total GB   fits   largest micro-batch (that divides the share)"
    )
    for row in r["policies"]:
        mark = "*" if row["policy"] == r["activation_checkpointing"] else " "
        print(
            f"{mark} {row['policy']!s:30} {row['kept'] / 1e9:>8.2f} {row['total'] / 1e9:>10.2f}   "
            f"{'yes' if row['fits'] else 'no':4}   {row['most']} ({row['usable']})"
        )
    print(_advice(r))
    print("\nExchanged in a step                      ranks   times   sent GB a GPU   seconds at full bandwidth")
    for one in r["exchanges"]:
        print(
            f"  {one['what'] + ', ' + one['kind']:38} {one['ranks']:>5} {one['times']:>7.0f} "
            f"{one['sent'] / 1e9:>13.3f} {one['seconds']:>15.4f}"
        )
    if not r["exchanges"]:
        print("  nothing")
    why = "assumed: a goal of ours or less, measured on no GPU; give --mfu" if r["mfu_assumed"] else "as given"
    print(f"\nMFU {r['mfu']:.2f} of the data sheet's peak ({why})")
    if r["memory"]["total"] > r["gpu_memory"]:
        print("With the micro-batch that does not fit (the table below takes the largest that does):")
    bound = "exchanges" if r["sending"] > r["computing"] else "computing"
    print(
        f"Step {r['seconds']:.4f} s, bound by {bound} (computing {r['computing']:.4f}, exchanges {r['sending']:.4f}; "
        f"{r['unhidden']:.4f} if none is hidden): {r['images_per_s']:,.0f} images/s"
    )
    print(
        f"{round(r['epochs'], 1):,} epochs of {r['images']:,} images, {r['steps']:,} steps: {r['days']:.2f} days, "
        f"{r['gpu_hours']:,.0f} GPU hours"
    )
    if r["unseen"]:
        print(f"{r['unseen']} is not on this machine: the number of images is assumed; give --images")
    if not r["decoded"]:
        print("Loader: the digits are in memory, nothing is decoded")
        _print_scales(r)
        return
    if r["task"] and not r["rate_given"]:
        print("Loader: what a core delivers to a task was not measured; give --images-per-core")
        _print_scales(r)
        return
    print(
        f"Loader: {r['loader_cores']:.1f} cores a GPU at {r['images_per_core']:.0f} images/s and core "
        "(docs/benchmarks/data.md: photos of 500×375; measure yours by `elsewhere bench data`, --images-per-core)"
    )
    _print_scales(r)


def _advice(r: dict[str, Any]) -> str:
    """Whether the micro-batch fits, and if not, what would let it."""
    chosen = next(row for row in r["policies"] if row["policy"] == r["activation_checkpointing"])
    if chosen["fits"]:
        return f"The micro-batch of {r['micro_batch']} fits; up to {chosen['most']} would."
    ways = []
    if chosen["usable"]:
        ways.append(f"set loader.micro_batch={chosen['usable']}")
    better = next((row["policy"] for row in r["policies"] if row["fits"]), None)
    if better is not None:
        ways.append(f"set engine.activation_checkpointing={better}")
    if not ways:
        usable = [row for row in r["policies"] if row["usable"]]
        ways = [
            f"set engine.activation_checkpointing={usable[0]['policy']} and loader.micro_batch={usable[0]['usable']}"
            if usable else "divide the weights (--engine fsdp or zero3), or take more or larger GPUs"
        ]  # fmt: skip
    return f"The micro-batch of {r['micro_batch']} does not fit: {', or '.join(ways)}."


def _print_scales(r: dict[str, Any]) -> None:
    print(
        "\n GPUs   batch each   micro   largest   memory GB   states GB   computing s   exchanges s   step s     days"
        "  bound by"
    )
    for row in r["scales"]:
        if not row["divides"]:
            print(f"{row['gpus']:>5}   a batch of {r['batch']} does not divide")
        elif "refused" in row:
            print(f"{row['gpus']:>5}   {row['refused']}")
        else:
            over = "!" if row["memory"] > r["gpu_memory"] else " "
            print(
                f"{row['gpus']:>5} {row['share']:>12} {row['micro_batch']:>7} {row['most']:>9} "
                f"{row['memory'] / 1e9:>10.2f}{over} {row['states'] / 1e9:>11.3f} {row['computing']:>13.4f} "
                f"{row['sending']:>13.4f} {row['seconds']:>8.4f} {row['days']:>8.2f}  "
                f"{'exchanges' if row['sending'] > row['computing'] else 'computing'}"
            )
    if any(row.get("memory", 0) > r["gpu_memory"] for row in r["scales"]):
        print("! more than the GPU has")
