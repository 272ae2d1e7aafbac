"""Who this process is among all that train together: rank, device, and the few collectives the loop needs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ..data.images import DataError
from .errors import UserError
from .nodes.guard import Guard, Judge
from .nodes.meet import meet
from .nodes.open_files import allow_open_files
from .nodes.place import Place, find_place

T = TypeVar("T")


@dataclass
class World:
    """One process of a run; `size` 1 needs no process group at all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    guard: Guard = field(default_factory=lambda: Guard(Place()))
    joined: bool = False  # a process group was made, and is ours to take down
    host_group: dist.ProcessGroup | None = None  # gloo, for small messages that must not wait for the GPU
    writing_group: dist.ProcessGroup | None = None  # gloo, of the thread that writes checkpoints

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """`values` of every rank, stacked in front: `[size, …]` on every rank."""
        if self.size == 1:
            return values[None]
        out = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(out, values.contiguous())
        return torch.stack(out)

    def gather_host(self, value: object) -> list:
        """A picklable object of every rank, on every rank, over the host group."""
        return self._gather_objects(value, self.host_group)

    def gather_writing(self, value: object) -> list:
        """As `gather_host`, for the thread that writes checkpoints."""
        return self._gather_objects(value, self.writing_group)

    def _gather_objects(self, value: object, group: dist.ProcessGroup | None) -> list:
        if self.size == 1:
            return [value]
        out: list = [None] * self.size
        dist.all_gather_object(out, value, group=group)
        return out

    def agree(self, build: Callable[[], T]) -> T:
        """`build()` on every rank; what a user did wrong on any rank is raised on all, so that none waits for ever."""
        value, failure = _attempt(build)
        self._raise_all(failure)
        return value  # pyright: ignore

    def first_decides(self, build: Callable[[], T]) -> T:
        """`build()` on rank 0, its (picklable) result or what the user did wrong on every rank."""
        value, failure = _attempt(build) if self.first else (None, None)
        self._raise_all(failure)
        return self.gather_host(value)[0]

    def _raise_all(self, failure: str | None) -> None:
        failures = list(dict.fromkeys(text for text in self.gather_host(failure) if text))
        if failures:
            raise UserError(" ".join(failures), shared=True)

    def close(self) -> None:
        # A group that something still holds keeps its threads, and gloo's abort a process that ends under them.
        self.host_group = self.writing_group = None
        if self.joined and dist.is_initialized():
            dist.destroy_process_group()
        self.guard.close()


def _attempt(build: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return build(), None
    except (UserError, DataError) as error:
        return None, str(error)


def pick_device(wanted: str, local_rank: int, local_size: int = 1) -> torch.device:
    """The device of this process; raises UserError where CUDA is asked for and there is none, or too little of it."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("engine.device=cuda, but no NVIDIA GPU is visible; use engine.device=cpu or auto.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:  # srun may show each task its own alone
        return torch.device("cuda", 0)
    if max(local_rank + 1, local_size) > visible:
        raise UserError(
            f"{max(local_rank + 1, local_size)} processes are started on a machine that shows {visible} "
            f"GPU{'s' * (visible != 1)}; start one per GPU, or use engine.device=cpu."
        )
    return torch.device("cuda", local_rank)


def join(device: str = "auto", group: bool = False, wait: float = 1800.0, silence: float = 22.0) -> World:
    """Find out which process this is and join the others, if any, within `wait` seconds.

    `group` makes a process group for a single process, too, as engines need that divide weights. A collective that not
    all ranks enter within `wait` seconds, or a rank not heard of for `silence` seconds, ends the run. Raises UserError
    where the others cannot be reached, or this process has no device.
    """
    place = find_place()
    allow_open_files(place.size)
    store, guard = None, Guard(place)
    if place.size > 1:
        # What each collective waits for is known to the flight recorder of torch, if that has room.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")
        judge = Judge(place.size, silence, wait)
        store, hub, member = meet(place, judge, wait, guard.facts())
        guard = Guard(place, silence, member, hub)
    try:
        where = pick_device(device, place.local_rank, place.local_size)
    except UserError as error:
        guard.failed(error, of_machine=True)
        guard.close()
        raise
    world = World(place.rank, place.size, place.local_rank, place.local_size, where, guard)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    # Beyond the guard's own, which names who is missing.
    patience = timedelta(seconds=wait + 60)
    if (place.size > 1 or group) and not dist.is_initialized():
        # gloo beside nccl: FSDP2's offloaded gradients and what a checkpoint says are on the host.
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store or HashStore(), rank=place.rank, world_size=place.size, timeout=patience
        )
        world.joined = True
    if place.size > 1:
        world.host_group = dist.new_group(backend="gloo", timeout=patience)  # pyright: ignore
        world.writing_group = dist.new_group(backend="gloo", timeout=patience)  # pyright: ignore
    return world


class Signals:
    """Flags that all ranks must see at the same step: any rank raises one, all act on it one step later.

    The exchange of step t is waited for at step t + 1, so no step stands still for it.
    """

    def __init__(self, world: World, count: int):
        self.world, self.count = world, count
        self._flags = torch.zeros(count, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._sent = torch.zeros(count, dtype=torch.int32)

    def raise_flag(self, index: int) -> None:
        self._flags[index] = 1

    def exchange(self) -> list[bool]:
        """Flags that some rank had raised by the previous call (by this one, alone); each is seen once."""
        if self.world.size == 1:
            seen = self._flags.bool().tolist()
            self._flags.zero_()
            return seen
        seen = [False] * self.count
        if self._pending is not None:
            self._pending.wait()
            seen = self._sent.bool().tolist()
        self._sent = self._flags.clone()
        self._flags.zero_()
        self._pending = dist.all_reduce(self._sent, dist.ReduceOp.MAX, group=self.world.host_group, async_op=True)
        return seen

    def finish(self) -> None:
        """Wait for the exchange that is still under way."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
