"""The command `elsewhere` and its subcommands."""

from __future__ import annotations

import sys
from pathlib import Path

# A checkout on sys.path would let its `kernels` and `data` stand in for other packages of these names.
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != _ROOT]

import os  # noqa: E402

# Threads that wait by spinning take the cores from the loader's workers: with one busy core of two, a training step
# of the demo took 5.4 s instead of 1.0 s. Set before torch loads its OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse  # noqa: E402
import difflib  # noqa: E402
import re  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from importlib.metadata import version  # noqa: E402
from typing import TYPE_CHECKING, Any, NoReturn  # noqa: E402

from .bench_commands import add_bench_all, add_bench_step, run_bench_all, run_bench_step  # noqa: E402
from .bench_released import add_released_command, run_released  # noqa: E402
from .consolidate import add_consolidate_command, run_consolidate  # noqa: E402
from .doctor.command import add_doctor_command, run_doctor  # noqa: E402
from .errors import UserError, first_of_machine, print_error  # noqa: E402
from .evaluate.detect_command import add_detect_command, run_detect  # noqa: E402
from .evaluate.finetune_command import add_finetune_command, run_finetune  # noqa: E402
from .evaluate.look import add_look_command, run_look  # noqa: E402
from .evaluate.probe import add_probe_command, run_probe  # noqa: E402
from .evaluate.reproduce import add_reproduce_command, run_reproduce  # noqa: E402
from .evaluate.segment_command import add_segment_command, run_segment  # noqa: E402
from .evaluate.suite import add_evaluate_command, run_evaluate  # noqa: E402
from .exchange.export import add_export_command, run_export  # noqa: E402
from .exchange.zoo_command import add_zoo_command, run_zoo  # noqa: E402
from .inspect_path import add_inspect_command, run_inspect  # noqa: E402
from .new_file import check_new, write_json  # noqa: E402
from .nodes.check_hosts import add_hosts_command, run_hosts  # noqa: E402
from .nodes.submit import add_submit_command, run_submit  # noqa: E402
from .planning.command import add_plan_command, run_plan  # noqa: E402
from .report.report_command import add_report_command, run_report  # noqa: E402
from .run_command import add_run_command, listed, positive, run_recipe  # noqa: E402
from .shards import add_shards_command, run_shards  # noqa: E402
from .tuning.command import add_tune_command, run_tune  # noqa: E402

if TYPE_CHECKING:
    from .config import Config
    from .run import Result


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, once on a machine, not in each of the processes that a launcher started."""

    def error(self, message: str) -> NoReturn:
        if first_of_machine():
            wrong = re.match(r"argument \S+: invalid choice: '(.*?)' \(choose from (.*)\)$", message)
            if wrong:
                near = difflib.get_close_matches(wrong[1], wrong[2].replace("'", "").split(", "), 1)
                message = (
                    f"there is no {wrong[1]}; {f'did you mean {near[0]}? There' if near else 'there'} are {wrong[2]}"
                )
            print(f"elsewhere: {message} (`{self.prog} --help` says what it takes).", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="elsewhere",
        description="Masked-image pre-training of vision transformers that are not told exactly where a patch is.",
    )
    parser.add_argument("--version", action="version", version=f"elsewhere {version('elsewhere')}")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def recipe_command(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", help="a packaged recipe (see `elsewhere configs`) or a YAML file")
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. optim.lr=1e-3"
        )
        return command

    add_run_command(commands, "pretrain", "Pre-train a recipe, or continue it where its run stopped.")
    add_finetune_command(commands)
    add_segment_command(commands)
    add_detect_command(commands)
    recipe_command("show", "Print a recipe with its bases and overrides merged.")
    commands.add_parser("configs", help="List the packaged recipes.", description="List the packaged recipes.")
    add_doctor_command(commands)
    add_plan_command(commands)
    add_tune_command(commands)
    add_submit_command(commands)
    add_hosts_command(commands)
    add_shards_command(commands)
    add_inspect_command(commands)
    add_consolidate_command(commands)
    add_export_command(commands)
    add_zoo_command(commands)
    add_probe_command(commands)
    add_evaluate_command(commands)
    add_reproduce_command(commands)
    add_look_command(commands)
    add_report_command(commands)
    bench = commands.add_parser("bench", help="Measure a part on this machine.").add_subparsers(
        dest="part", required=True, metavar="PART"
    )
    text = "Images per second of the mask samplers."
    bench.add_parser("masks", help=text, description=text)
    text = "The operators of relative attention and of keyed noise, forward and backward, interleaved in one run."
    more = "On a GPU also Triton's and compiled FlexAttention; on a CPU only the references and a ceiling, few images."
    kernels = bench.add_parser("kernels", help=text, description=f"{text} {more}")
    kernels.add_argument(
        "--forms", action="store_true", help="instead: the reference's forms of the relative term, by all lookups"
    )
    kernels.add_argument(
        "--only", type=listed, metavar="A,B", help="numbers of tokens of attention, noise, positions (default: all)"
    )
    kernels.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the inputs (bfloat16, on a CPU float32)"
    )
    kernels.add_argument(
        "--without", type=listed, metavar="A,B", help="leave variants out, e.g. flex, which compiles for long"
    )
    kernels.add_argument("--seconds", type=_seconds, default=2.0, help="for each shape and setting (2)")
    kernels.add_argument("--save", type=Path, metavar="DIR", help="write kernels_GPU_DATE.md and .json there")
    text = (
        "Reading, decoding and cropping a folder of images by each reader (files, shards, webdataset, FFCV where it is "
        "installed), against ImageFolder + Pillow."
    )
    bench.add_parser("data", help=text, description=text).add_argument("folder", help="a folder of classes of images")
    add_bench_step(bench)
    add_bench_all(bench)
    text = (
        "What engines cost: our loop against a bare one, steps beside a checkpoint being written, and bytes on each "
        "rank; alone or under torchrun."
    )
    engines = bench.add_parser("engines", help=text, description=text)
    engines.add_argument("recipe", help="a packaged recipe or a YAML file")
    engines.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. model.size=small"
    )
    engines.add_argument(
        "--engines", type=listed, default=["ddp", "fsdp", "zero2", "zero3"], metavar="A,B",
        help="ddp, fsdp, settings of DeepSpeed, or JSON files (default: ddp,fsdp,zero2,zero3)",
    )  # fmt: skip
    engines.add_argument(
        "--measure", type=listed, default=["overhead", "saving", "bytes"], metavar="A,B",
        help="overhead, saving, bytes (default: all)",
    )  # fmt: skip
    engines.add_argument("--batch", type=positive, help="images per step and rank (as for step)")
    engines.add_argument("--steps", type=positive, default=200, help="steps of each kind")
    engines.add_argument("--turn", type=positive, default=10, help="steps of one turn of the loops")
    text = "Steps at 1, 2, 4, … local ranks and the same batch on each, in turns: images per second and efficiency."
    scaling = bench.add_parser("scaling", help=text, description=text)
    scaling.add_argument("recipe", help="a packaged recipe or a YAML file")
    scaling.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. model.size=small"
    )
    scaling.add_argument(
        "--ranks", type=_numbers, default=[1, 2, 4], metavar="A,B", help="numbers of ranks (default: 1,2,4)"
    )
    scaling.add_argument("--engine", default="ddp", help="ddp, fsdp, or a setting of DeepSpeed (default: ddp)")
    scaling.add_argument("--batch", type=positive, help="images per step and rank (as for step)")
    scaling.add_argument("--steps", type=positive, default=5, help="steps of one turn")
    scaling.add_argument("--rounds", type=positive, default=5, help="turns of each number of ranks")
    scaling.add_argument("--network", action="store_true", help="also time collectives, against the planner's model")
    text = "Extracting features of a folder, decoding and all, against the encoder's forward alone, in turns."
    features = bench.add_parser("features", help=text, description=text)
    features.add_argument("checkpoint", type=Path, help="a run, a checkpoint folder, or a file of weights")
    features.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings, e.g. data.path=FOLDER"
    )
    features.add_argument("--recipe", help="that describes the encoder, where a file of weights does not")
    features.add_argument("--images", type=positive, default=2048, help="of one turn")
    features.add_argument("--rounds", type=positive, default=5, help="turns of each")
    features.add_argument("--layers", type=int, choices=(1, 4), default=1, help="last layers that are pooled")
    text = "Exact k-NN of random features: seconds and memory."
    nearest = bench.add_parser("nearest", help=text, description=text)
    for name, default in (("train", 50_000), ("val", 10_000), ("width", 768)):
        nearest.add_argument(f"--{name}", type=positive, default=default, help=f"({default})")
    add_released_command(bench)
    for command in bench.choices.values():
        command.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a command, where settings may also follow flags, which argparse alone would not have."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    late = next((vars(parsed)[name] for name in ("recipes", "overrides", "cases") if name in parsed), None)
    if late is None or any(item.startswith("-") or "=" not in item for item in rest):
        return parser.parse_args(arguments)  # which says what is wrong
    late.extend(rest)
    return parsed


def _numbers(text: str) -> list[int]:
    return [positive(item) for item in listed(text)]


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 2 for something to mend, 3 for a run that diverged, 128 + a signal."""
    try:
        parsed = _parse(arguments)
        return _COMMANDS[parsed.command](parsed)
    except UserError as error:
        if not error.said and first_of_machine():
            print_error(error)
        return 2
    except BrokenPipeError:  # `elsewhere configs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _pretrain(arguments: argparse.Namespace) -> int:
    from .config import load_config

    def train(config: Config) -> Callable[[], Result]:
        from .pretrain import pretrain

        flags = {"fresh": arguments.fresh, "allow_config_change": arguments.allow_config_change}
        return lambda: pretrain(config, **flags)

    return run_recipe(arguments, lambda: load_config(arguments.recipe, arguments.overrides), train)


def _show(arguments: argparse.Namespace) -> int:
    from .config import load_config

    print(load_config(arguments.recipe, arguments.overrides).to_yaml(), end="")
    return 0


def _configs(_: argparse.Namespace) -> int:
    from .config import load_config, recipe_names

    names = recipe_names()
    for name in names:
        print(f"{name:{max(map(len, names))}}  {load_config(name).about}")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from ..data.images import DataError

    check_new(arguments.json, "--json")  # before minutes of measuring
    try:
        result = _measured(arguments)
    except DataError as error:
        raise UserError(str(error)) from error
    if _first_rank():
        write_json(arguments.json, result)
    return 0


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.part == "masks":
        from .bench import bench_masks, print_masks_table

        result = bench_masks()
        print_masks_table(result)
    elif arguments.part == "kernels":
        result = _bench_kernels(arguments)
    elif arguments.part == "data":
        from .bench_data import bench_data, print_data_table

        result = bench_data(arguments.folder)
        print_data_table(result)
    elif arguments.part == "features":
        from .bench_features import bench_features, print_features_table

        result = bench_features(
            arguments.checkpoint, arguments.overrides, arguments.recipe, arguments.images, arguments.rounds,
            arguments.layers,
        )  # fmt: skip
        print_features_table(result)
    elif arguments.part == "released":
        result = run_released(arguments)
    elif arguments.part == "nearest":
        from .bench_features import bench_nearest, print_nearest_table

        result = bench_nearest(arguments.train, arguments.val, arguments.width)
        print_nearest_table(result)
    elif arguments.part == "scaling":
        from .bench_scaling import bench_scaling, print_scaling_table

        result = bench_scaling(
            arguments.recipe, arguments.overrides, arguments.ranks, arguments.engine, arguments.batch,
            arguments.steps, arguments.rounds, arguments.network,
        )  # fmt: skip
        print_scaling_table(result)
    elif arguments.part == "engines":
        from .bench_engines import bench_engines, print_engines_tables

        result = bench_engines(
            arguments.recipe, arguments.overrides, arguments.engines, arguments.measure, arguments.batch,
            arguments.steps, arguments.turn,
        )  # fmt: skip
        if _first_rank():
            print_engines_tables(result)
    elif arguments.part == "all":
        result = run_bench_all(arguments)
    else:
        result = run_bench_step(arguments)
    return result


def _bench_kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.forms:
        given = [name for name in ("only", "without", "dtype", "save") if vars(arguments)[name] is not None]
        if given:
            raise UserError(f"--{given[0]} does not go with --forms, whose table has fixed settings; leave one out.")
        from .bench_forms import bench_relative, print_relative_table

        result = bench_relative(seconds=arguments.seconds)
        print_relative_table(result)
        return result
    from .bench_kernels import bench_kernels, new_pages, save

    pages = new_pages(arguments.save) if arguments.save else None  # before minutes of measuring
    result = bench_kernels(arguments.dtype, arguments.seconds, arguments.only, arguments.without or ())
    if pages:
        save(result, pages)
    return result


_COMMANDS = {
    "pretrain": _pretrain, "finetune": run_finetune, "segment": run_segment, "detect": run_detect, "show": _show,
    "configs": _configs, "plan": run_plan, "submit": run_submit, "hosts": run_hosts, "bench": _bench,
    "doctor": run_doctor, "tune": run_tune,
    "shards": run_shards, "inspect": run_inspect, "consolidate": run_consolidate, "export": run_export,
    "zoo": run_zoo, "probe": run_probe, "evaluate": run_evaluate, "reproduce": run_reproduce, "look": run_look,
    "report": run_report,
}  # fmt: skip
