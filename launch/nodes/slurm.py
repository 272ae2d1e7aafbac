"""What SLURM's srun says of this process: its task, its node, and the hosts of the step."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError

# Below Linux's ephemeral ports, which start at 32768 and belong to whoever connects first.
_FIRST_PORT, _PORTS, _PORTS_OF_A_STEP = 20000, 10000, 4
_MOST_HOSTS = 65536  # as many as SLURM has in one list

_BETWEEN = re.compile(r",(?![^\[]*\])")  # a comma outside of brackets
_ITEM = re.compile(r"[^\[\],\s]+|(?:[^\[\],\s]*\[[^\[\]\s]*\])+")  # SLURM's names end with their last bracket
_BRACKET = re.compile(r"([^\[]*)\[([^\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_TASKS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
_AGAIN = "start this process with srun, or take SLURM's variables out of its environment"


@dataclass(frozen=True)
class Step:
    """One process among those of an srun; `node` counts in `hosts`, whose first is the master.

    `port` to `port + 3` are the step's on all of its nodes: numbers made of the job's and the step's.
    """

    task: int
    tasks: int
    node: int
    nodes: int
    local_task: int
    local_tasks: int  # of this node
    first_host: str
    hosts: list[str]
    port: int


def step(environ: Mapping[str, str]) -> Step | None:
    """The step that srun started this process in; None in a batch script, in salloc's shell and outside of SLURM.

    Raises UserError where the variables are damaged or contradict one another.
    """
    # A batch script has SLURM_PROCID and the job's SLURM_NODELIST, too; only srun sets these two.
    if "SLURM_STEP_NODELIST" not in environ and "SLURM_STEP_NUM_TASKS" not in environ:
        return None
    hosts = expand_hosts(_value(environ, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST=")
    nodes = _number(environ, "SLURM_STEP_NUM_NODES")
    node = _number(environ, "SLURM_NODEID")
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS")
    task = _number(environ, "SLURM_PROCID")
    local_task = _number(environ, "SLURM_LOCALID")
    on_nodes = _tasks_on_nodes(_value(environ, "SLURM_STEP_TASKS_PER_NODE"))
    if not len(hosts) == len(on_nodes) == nodes or sum(on_nodes) != tasks:
        raise UserError(
            f"SLURM's variables contradict one another ({nodes} nodes and {tasks} tasks, but "
            f"SLURM_STEP_NODELIST has {len(hosts)} and SLURM_STEP_TASKS_PER_NODE {sum(on_nodes)} on {len(on_nodes)}); "
            f"{_AGAIN}."
        )
    if environ.get("SLURMD_NODENAME", "") not in ("", *hosts):
        return None  # a batch job that was submitted from within a step inherits that step's variables
    if node >= nodes or task >= tasks or local_task >= on_nodes[node]:
        raise UserError(
            f"SLURM's variables contradict one another (task {task} of {tasks}, node {node} of {nodes}, local task "
            f"{local_task}, counted from 0); {_AGAIN}."
        )
    if task == 0 and node != 0:
        raise UserError(
            f"SLURM put the first task on {hosts[node]}, not on the step's first host {hosts[0]}, where the others "
            "look for it; start srun without --distribution=arbitrary."
        )
    port = _port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"))
    return Step(task, tasks, node, nodes, local_task, on_nodes[node], hosts[0], hosts, port)


def expand_hosts(text: str, what: str = "The list of hosts ") -> list[str]:
    """The hosts of SLURM's compressed list, such as `gpu[001-003,7],rack[1-2]n[01-02]`, in SLURM's order.

    Raises UserError, which names the list by `what`, for one that is damaged.
    """
    hosts: list[str] = []
    for item in _BETWEEN.split(text):
        if not _ITEM.fullmatch(item):
            raise UserError(f"{what}{_short(text)} is no list of hosts such as gpu[001-003,7],login; {_AGAIN}.")
        brackets = _BRACKET.findall(item)
        ranges = [_ranges(inside, text, what) for _, inside in brackets]
        sizes = [sum(last - first + 1 for first, last, _ in of_one) for of_one in ranges]
        if len(hosts) + math.prod(sizes) > _MOST_HOSTS:
            raise UserError(f"{what}{_short(text)} has more than {_MOST_HOSTS:,} hosts; {_AGAIN}.")
        parts = [
            [f"{before}{number:0{width}}" for first, last, width in of_one for number in range(first, last + 1)]
            for (before, _), of_one in zip(brackets, ranges, strict=True)
        ]
        if not parts:
            hosts.append(item)
            continue
        # SLURM counts fastest in the last bracket, then in the first, the second and so on.
        for *slower, fastest in itertools.product(*reversed(parts[:-1]), parts[-1]):
            hosts.append("".join(reversed(slower)) + fastest)
    return hosts


def _ranges(inside: str, text: str, what: str) -> list[tuple[int, int, int]]:
    """First, last and width of the numbers of a bracket: `001-003,7` is (1, 3, 3) and (7, 7, 1)."""
    found = []
    for one in inside.split(","):
        match = _RANGE.fullmatch(one)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or first > last:
            raise UserError(f"{what}{_short(text)} holds [{_short(one)}], which is no range of numbers; {_AGAIN}.")
        found.append((first, last, len(match[1])))
    return found


def _tasks_on_nodes(text: str) -> list[int]:
    """`2(x3),1` means 2, 2, 2 and 1 tasks."""
    counts: list[int] = []
    for item in text.split(","):
        match = _TASKS.fullmatch(item)
        repeats = int(match[2] or 1) if match else 0
        if not match or not 1 <= repeats <= _MOST_HOSTS:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={_short(text)} is no list such as 2(x3),1; {_AGAIN}.")
        counts += [int(match[1])] * repeats
    return counts


def _port(job: int, number: int) -> int:
    """Another port for jobs that follow one another, and for the steps of one."""
    return _FIRST_PORT + (job + 101 * number) * _PORTS_OF_A_STEP % _PORTS


def _value(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise UserError(f"{name} is missing, though other variables say that srun started this process; {_AGAIN}.")
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _value(environ, name)
    if not re.fullmatch("[0-9]{1,18}", value):
        raise UserError(f"{name}={_short(value)} is no number; {_AGAIN}.")
    return int(value)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"
