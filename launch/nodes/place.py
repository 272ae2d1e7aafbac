"""Which process of a run this is, as torchrun, deepspeed's launcher, srun or our supervisor say."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError
from . import slurm


@dataclass(frozen=True)
class Place:
    """This process among all: `master` and `port` are where they meet, None for a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    master: str | None = None
    port: int = 0
    life: str = "0"  # which start of these processes it is, where they meet at one place again
    hosted: bool = False  # a launcher's own process keeps the meeting place
    host: str = socket.gethostname()


def find_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place that the environment gives; raises UserError where it contradicts itself."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        step = slurm.step(environ)
        if step is None or step.tasks == 1:
            return Place()
        return Place(
            step.task, step.tasks, step.local_task, step.local_tasks, step.node, step.first_host, step.port,
            environ.get("SLURM_RESTART_COUNT", "0"),
        )  # fmt: skip

    def number(*names: str, default: int | None = None) -> int:
        text = next((environ[name] for name in names if environ.get(name)), None)
        if text is None and default is not None:
            return default
        if text is None or not text.isdecimal():
            said = f"{names[0]}={text}" if text else f"no {names[0]}"
            raise UserError(f"The environment has {said}, where torchrun sets a number; start this with a launcher.")
        return int(text)

    rank, size = number("RANK", default=0), number("WORLD_SIZE", default=1)
    local_rank = number("LOCAL_RANK", default=0)
    local_size = number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=size)
    if not (rank < size and local_rank < local_size <= size):
        raise UserError(
            f"The environment contradicts itself: RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of "
            f"{local_size} on this machine; start this with a launcher, or take these variables out."
        )
    node = number("GROUP_RANK", "CROSS_RANK", default=0)
    if size == 1:
        return Place(node=node)
    master = environ.get("MASTER_ADDR")
    if not master:
        raise UserError("The environment has RANK and no MASTER_ADDR; start this with torchrun, deepspeed or srun.")
    return Place(
        rank, size, local_rank, local_size, node, master, number("MASTER_PORT"),
        environ.get("TORCHELASTIC_RESTART_COUNT", "0"), environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )  # fmt: skip
