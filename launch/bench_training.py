"""A recipe's training as a benchmark takes it: the loop of a run on one process, built, warm, and asked for steps."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..data.batch import Batch
from ..data.order import Plan
from ..data.prefetch import OnDevice
from ..models.method import Method
from .bench_batches import fixed_batches
from .bench_clock import Clock, resident
from .bench_flops import flops_counted
from .bench_loops import constant_schedules, fresh_method
from .bench_ranges import PARTS, PartTimes, Ranges, told
from .build import choose_kernels
from .config import Config
from .engine.choose import build_engine, check_engine
from .evaluate.task_config import any_config
from .loop import train
from .monitor import Monitor, hardware
from .parts import flops_per_image
from .run import Task
from .world import World, join

_RATE = 1e-6  # at which nothing runs away, whatever the recipe's
_KEPT = 2  # batches in memory, which differ in the lengths of their masks where those vary
_SETTLE = 10.0  # seconds at most that loader processes get to fill their queues
_ENDLESS = 1 << 40


def task_of(config: Config) -> Task:
    """What a run of this configuration trains."""
    kind = config.method.kind
    if kind == "classify":
        from .evaluate.finetune import Finetuning

        return Finetuning()
    if kind == "segment":
        from .evaluate.segment import Segmentation

        return Segmentation()
    if kind == "detect":
        from .evaluate.detect import Detection

        return Detection()
    from .pretrain import Pretraining

    return Pretraining()


class Training:
    """Steps of `recipe` on one process: on random batches in memory, or with `real` on those of its data's loader.

    It has taken the steps that pay for caches, compilers and the optimiser's state. `folder` is for what a run writes.
    Raises UserError or DataError for what cannot be built here.
    """

    def __init__(self, recipe: str, overrides: list[str], batch: int | None, real: bool, folder: Path):
        config = any_config(recipe, overrides)
        self.world = world = join(config.engine.device, group=config.engine.kind != "ddp")
        self.gpu = world.device.type == "cuda"
        self.batch = batch = batch or config.loader.micro_batch or (128 if self.gpu else 8)
        # Batches here are of one micro-batch, whatever the recipe's, and pictures are no part of a steady state.
        self.config = config = config.model_copy(update={
            "optim": config.optim.model_copy(update={"batch_size": batch}),
            "loader": config.loader.model_copy(update={"micro_batch": batch}),
        })  # fmt: skip
        check_engine(config, world, batch, 1)
        self._before = resident("VmRSS")
        self._peak = 0
        method, self._batches, self._ahead = _loaded(config, world) if real else _in_memory(config, world)
        choose_kernels(method, world.device)  # which says what cannot be had
        self.engine = build_engine(config, method, world, batch, 1)
        self._schedules = constant_schedules(config, _RATE)
        self._adversary_schedules = self._schedules.with_lr(_RATE, constant=True)
        self._monitor = Monitor(
            folder, world, Console(file=io.StringIO()), first_step=0, last_step=_ENDLESS, images_per_step=batch,
            flops_per_image=0.0, peak=None, every=config.monitor.log_every, tensorboard=config.monitor.tensorboard,
            progress=False,
        )  # fmt: skip
        self._times, self._clock = PartTimes(world.device), Clock(world.device, wall=True)
        self._step = 0
        self._formulas: list[float] = []
        self.take((2 if config.engine.compile else 1) * _KEPT)
        self.settle()

    def about(self) -> dict[str, Any]:
        """What is to say of the case, and the steps of a turn unless they are given."""
        # As many steps as are logged at once, where a step is short.
        turn = self.config.monitor.log_every if self.gpu else 3
        return {
            "batch": self.batch, "precision": self._dtype, "engine": self.config.engine.kind, "turn": turn,
            "recomputes": self.config.engine.activation_checkpointing != "none",
            "hardware": hardware(self.world), "threads": torch.get_num_threads(),
        }  # fmt: skip

    @property
    def _dtype(self) -> str:
        return str(self.engine.method.compute_dtype).removeprefix("torch.")

    def turn(self, steps: int) -> dict[str, Any]:
        """Seconds of as many steps; the milliseconds of the parts of one, measured after that; and the matrix rate."""
        if self._ahead:
            self.take(self._ahead)  # on what the loader has got ready while it was not asked
        seconds = self.take(steps)
        parts = self.parts(steps)
        rate = self._clock.rate(self.engine.method.compute_dtype)
        self.settle()
        return {"seconds": seconds, "parts": parts, "matrix_rate": rate}

    def take(self, steps: int) -> float:
        """Take steps, with nothing between them, and say how many seconds they took."""
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self._run(steps, self._batches)
        if self.gpu:
            torch.cuda.synchronize()
            self._peak = max(self._peak, torch.cuda.max_memory_allocated())
        return time.perf_counter() - start

    def parts(self, steps: int) -> dict[str, float]:
        """Milliseconds of each part of a step, mean of `steps`."""
        self._times.start()
        self.under(self._times, steps)
        found = self._times.stop()
        return {name: found[name] / steps for name in PARTS if name in found}

    def under(self, ranges: Ranges, steps: int) -> None:
        """Take steps of which `ranges` hears."""
        with told(ranges, self.engine, self._monitor, self._batches) as batches:
            self._run(steps, batches)

    def _run(self, steps: int, batches: Iterator[Batch]) -> None:
        def after(_: int, batch: Batch, __: int) -> bool:
            self._formulas.append(flops_per_image(self.engine.method, batch))
            return False

        first, self._step = self._step, self._step + steps
        train(
            self.engine, batches, self._schedules, self._adversary_schedules, self._monitor, after, first, self._step
        )  # fmt: skip

    def flops(self) -> dict[str, float]:
        """Operations of a step for one image: the formula's of all steps, and of one counted beside the formula's.

        The teacher's are in all of them, and what activation checkpointing computes again is in the counted ones.
        """
        usual = statistics.fmean(self._formulas)
        counted = flops_counted(lambda: self.take(1)) / self.batch
        return {"flops_per_image": usual, "flops_counted": counted, "flops_by_formula": self._formulas[-1]}

    def memory(self) -> int:
        """Peak bytes: allocated on a GPU in steps, else what the process grew by."""
        return self._peak if self.gpu else resident("VmHWM") - self._before

    def settle(self) -> None:
        """Let loader processes fill their queues, so that they do not compute while something else is measured."""
        until, idle = time.monotonic() + _SETTLE, 0
        while self._ahead and idle < 2 and time.monotonic() < until:
            time.sleep(0.05)
            idle = idle + 1 if all(map(_sleeps, multiprocessing.active_children())) else 0

    def close(self) -> None:
        self._monitor.close()
        self.world.close()


def _sleeps(process: Any) -> bool:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0] in "SZ"
    except OSError:
        return True


def _in_memory(config: Config, world: World) -> tuple[Method, Iterator[Batch], int]:
    """The method, a few random batches over and over, and that none is made ahead."""
    batches = fixed_batches(config, world, config.optim.batch_size, _KEPT)
    numbered = (replace(batches[step % _KEPT], step=step) for step in itertools.count())
    return fresh_method(config, world), numbered, 0


def _loaded(config: Config, world: World) -> tuple[Method, Iterator[Batch], int]:
    """The method, the batches of the run that this configuration describes, and how many are made ahead."""
    parts = task_of(config).assemble(config, world, None, None)
    plan = Plan(
        seed=config.seed, global_batch=parts.micro_batch, micro_batch=parts.micro_batch, stop_step=1 << 24,
        workers=parts.workers, prefetch=config.loader.prefetch, pin_memory=world.device.type == "cuda",
        on_error=config.data.on_error,
    )  # fmt: skip
    batches = iter(OnDevice(parts.open(plan), parts.augment, world.device, parts.after))
    return parts.method, batches, parts.workers * config.loader.prefetch
