"""`elsewhere doctor`: what this machine can run, and what would mend it."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..new_file import check_new, write_json
from . import building, devices, machine, packages
from .findings import Finding, guarded

Probe = Callable[[], "Finding | Iterable[Finding]"]


def add_doctor_command(commands: Any) -> None:
    """Add `doctor` to `commands`, what `add_subparsers` returned."""
    text = "Say what this machine can run, what is missing or slow, and what mends it."
    more = (
        "Each line is ok, a note (missing or slow) or a problem (fails or misleads). The exit status is 2 where "
        "`elsewhere pretrain demo` would not run, else 0."
    )
    command = commands.add_parser("doctor", help=text, description=f"{text} {more}")
    command.add_argument(
        "--disk", type=Path, metavar="PATH", help="the folder whose disk is measured, e.g. that of the images (here)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write what was found there as well")


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run `elsewhere doctor`; the exit status, 2 where `elsewhere pretrain demo` lacks something."""
    check_new(arguments.json, "--json")
    if arguments.disk is not None and not arguments.disk.is_dir():
        raise UserError(f"--disk {arguments.disk} is no folder on this machine; give one that is there.")
    print(f"elsewhere {version('elsewhere')} on {platform.platform()}")
    found: dict[str, list[Finding]] = {}
    for room, one in examine(arguments.disk):
        if room not in found:
            print(f"\n{room}", flush=True)
        found.setdefault(room, []).append(one)
        _show(one)
    every = [one for findings in found.values() for one in findings]
    missing = [one.name for one in every if one.needed and one.state == "problem"]
    _sum_up(every, missing)
    if arguments.json:
        rooms = {room: [asdict(one) for one in findings] for room, findings in found.items()}
        summary = {"ok": not missing, "missing": missing, **rooms}
        write_json(arguments.json, summary)
    return 2 if missing else 0


def examine(disk: Path | None = None) -> Iterator[tuple[str, Finding]]:
    """All findings with the heading of each, as they come; `disk` is the folder to measure (the current one)."""
    ranks = 1
    for room, name, probe in (
        ("packages", "python", packages.python),
        ("packages", "packages", packages.required),
        ("devices", "GPUs", devices.gpus),
        ("devices", "two processes", building.processes),
    ):
        for one in guarded(name, probe):
            ranks = ranks + 1 if one.name.startswith("GPU ") and one.name != "GPU 0" else ranks
            yield room, one
    place, is_here = (disk, False) if disk is not None else (Path("."), True)
    rest: list[tuple[str, str, Probe]] = [
        ("machine", "cores", lambda: machine.cores(ranks)),
        ("machine", "memory", machine.memory),
        ("machine", "shared memory", lambda: machine.shared_memory(ranks)),
        ("machine", "open files", machine.open_files),
        ("machine", f"disk {place}", lambda: machine.disk(place, is_here)),
        ("machine", "environment", packages.environment),
        ("compilers", "compilers", building.compilers),
        ("optional packages", "optional packages", packages.optional),
    ]
    for room, name, probe in rest:
        for one in guarded(name, probe):
            yield room, one


def _show(one: Finding) -> None:
    print(f"  {one.state:8} {one.name:14} {one.found}")
    if one.fix:
        print(f"  {'':8} {'':14} -> {one.fix}", flush=True)


def _sum_up(every: list[Finding], missing: list[str]) -> None:
    count = {state: sum(one.state == state for one in every) for state in ("ok", "note", "problem")}
    print(f"\n{count['ok']} ok, {count['note']} notes, {count['problem']} problems.", end=" ")
    if missing:
        print(f"`elsewhere pretrain demo` cannot run here: {', '.join(missing)}.")
    else:
        print("Nothing that `elsewhere pretrain demo` needs is missing.")
