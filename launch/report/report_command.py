"""`elsewhere report`: one page of what runs came to, from the files that they wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..new_file import check_new

if TYPE_CHECKING:
    from .read import Run


def add_report_command(commands: Any) -> None:
    """Add `report` to `commands`, what `add_subparsers` returned."""
    text = "Write one HTML page of runs: curves over one another, final numbers, pictures, settings, machines."
    more = (
        "Reads metrics.jsonl, the event files, config.yaml and results.json of each run, also of one that goes on. The "
        "page is a single file that fetches nothing from a network."
    )
    command = commands.add_parser("report", help=text, description=f"{text} {more}")
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run (run.dir), or a folder of runs (a sweep)"
    )
    command.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page (report.html)"
    )
    command.add_argument(
        "--png", type=Path, metavar="FILE", help="also a small figure, e.g. for a README (needs matplotlib)"
    )
    command.add_argument("--names", metavar="A,B", help="what to call the runs (their folders)")
    command.add_argument("--over", choices=("step", "epoch"), default="step", help="the x axis of every figure (step)")
    command.add_argument(
        "--pictures", type=_count, default=3, metavar="N", help="of each kind and run, evenly over training (3)"
    )
    command.add_argument("--force", action="store_true", help="write over files that are there")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def run_report(arguments: argparse.Namespace) -> int:
    """Run `elsewhere report`; the exit status. Raises UserError for what a user can mend."""
    from ..evaluate import results
    from .page import evaluations_of, page
    from .read import find_runs, read_run, short_names
    from .small_figure import load_matplotlib, small_figure

    check_new(arguments.output, "-o", arguments.force)
    check_new(arguments.png, "--png", arguments.force)
    if arguments.png:
        if arguments.png.suffix.lower() != ".png":
            raise UserError(f"--png {arguments.png} does not end in .png, which is what is written; rename it.")
        if arguments.png.resolve() == arguments.output.resolve():
            raise UserError(f"-o and --png both name {arguments.png}: give the page and the figure a file each.")
        load_matplotlib()
    folders = find_runs(arguments.runs)
    names = arguments.names.split(",") if arguments.names else short_names(folders)
    if len(names) != len(folders) or not all(names):
        raise UserError(f"--names has {len(names)} names for {len(folders)} runs; give one for each, with commas.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"--names calls two runs {twice}; give each a name of its own.")
    runs = [read_run(folder, name, arguments.pictures) for folder, name in zip(folders, names, strict=True)]
    if arguments.over == "epoch":
        _have_epochs(runs)
    evaluations = []
    for folder in folders:
        try:
            evaluations.append(evaluations_of(results.read(folder)))
        except UserError:
            evaluations.append([])
            print(f"{folder / 'results.json'} holds no results that can be read; it is left out.")
    arguments.output.write_text(page(runs, arguments.over, evaluations), encoding="utf-8")
    said = [f"{arguments.output} ({arguments.output.stat().st_size / 1e6:.2g} MB)"]
    if arguments.png:
        small_figure(runs, arguments.png, arguments.over)
        said.append(str(arguments.png))
    steps = ", ".join(f"{run.name} {run.steps:,} steps" for run in runs)
    print(f"{' and '.join(said)}: {steps}")
    return 0


def _have_epochs(runs: list[Run]) -> None:
    without = [run.name for run in runs if not run.epochs_per_step]
    if without:
        raise UserError(f"--over epoch: {without[0]} has no two steps yet, which epochs are reckoned from; use step.")
