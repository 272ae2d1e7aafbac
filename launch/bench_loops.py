"""Our loop against a bare one: the same training written with torch or DeepSpeed alone, step for step."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..data.batch import Batch
from ..models.jepa import Jepa
from ..models.method import Method
from .bench_batches import fixed_batches
from .build import build_adversary, build_method, build_optimizer, build_schedules
from .checkpoint import Checkpoints
from .config import Config
from .engine.choose import build_engine, few_shapes
from .engine.ds_settings import load_settings
from .engine.parallelise import parallelise
from .engine.precision import choose_precision
from .loop import train
from .monitor import Monitor
from .optim import Schedules
from .upkeep import Upkeep
from .world import World

LR, ADVERSARY_LR = 1e-4, 1e-3  # of every step, so that a bare loop has nothing to schedule
_AGREE = 1e-5


def deepspeed_settings(config: Config, world: World, batch: int) -> dict[str, Any]:
    return load_settings(
        config.engine.deepspeed, batch_size=config.optim.batch_size, micro_batch=batch, accumulation=1,
        clip_grad=config.optim.clip_grad, world=world.size, device_type=world.device.type,
    )  # fmt: skip


def fresh_method(config: Config, world: World) -> Method:
    """The recipe's method with its first weights, in the type that it computes in."""
    method = build_method(config)
    method.compute_dtype, _ = choose_precision(config.engine.precision, world.device)
    return method


def constant_schedules(config: Config, rate: float = LR) -> Schedules:
    """Schedules that stand still, at a rate that suits every recipe."""
    decay, momentum = config.optim.weight_decay, config.method.teacher.momentum
    return replace(
        build_schedules(config, 1000.0), lr=rate, start_lr=rate, final_lr=rate, warmup_epochs=0, weight_decay=decay,
        final_weight_decay=decay, momentum=momentum, final_momentum=momentum, freeze_lr=None, freeze_weight_decay=None,
    )  # fmt: skip


def _set_rates(optimizer: Optimizer, config: Config) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = LR, config.optim.weight_decay if group["decayed"] else 0.0
    return optimizer


class Bare:
    """The training of a recipe as one writes it with torch or DeepSpeed alone; `step` takes a batch to its loss."""

    def __init__(self, config: Config, world: World, batch: int):
        method = fresh_method(config, world)
        adversary = build_adversary(config, method)
        self.world, self.method, self.section, self.clip = world, method, config.method.adversary, config.optim
        self.leaves = {
            name: tensor.detach().to(world.device).clone().requires_grad_()
            for name, tensor in (adversary.tensors if adversary else {}).items()
        }
        if self.leaves:
            self.attacker = torch.optim.AdamW(
                list(self.leaves.values()), lr=ADVERSARY_LR, betas=config.optim.betas, eps=config.optim.eps,
                weight_decay=self.section.weight_decay, maximize=True, fused=True,
            )  # fmt: skip
        self.momentum = config.method.teacher.momentum
        self.deepspeed: Any = None
        if config.engine.kind != "fsdp":
            method.to(world.device)
        parallelise(
            method, config.engine.activation_checkpointing, config.engine.compile, few_shapes=few_shapes(config)
        )
        self.model: Any = method
        if config.engine.kind == "deepspeed":
            self._begin_deepspeed(config, batch)
            return
        if config.engine.kind == "fsdp":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for stack in method.stacks().values():
                for block in stack:
                    fully_shard(block, mesh=mesh)
            fully_shard(method, mesh=mesh)
        elif world.size > 1:
            ids = [world.device.index] if world.device.type == "cuda" else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of another name for broadcast_buffers, from 2.15 on
                self.model = DistributedDataParallel(
                    method, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.optimizer = _set_rates(build_optimizer(config, method), config)

    def _begin_deepspeed(self, config: Config, batch: int) -> None:
        from .engine.zero import import_deepspeed

        deepspeed, settings = import_deepspeed(self.world), deepspeed_settings(config, self.world, batch)
        optimizer = _set_rates(build_optimizer(config, self.method), config)
        with contextlib.redirect_stdout(io.StringIO()):
            self.deepspeed, *_ = deepspeed.initialize(
                model=self.method, optimizer=optimizer, config=settings, dist_init_required=False
            )
        self.model = self.deepspeed

    def step(self, batch: Batch) -> Tensor:
        # A dictionary of its own, because ZeRO 3 puts other tensors into it.
        loss, _ = self.model(batch, dict(self.leaves)) if self.leaves else self.model(batch)
        if self.deepspeed:
            self.deepspeed.backward(loss)
            self._average_attack()
            self.deepspeed.step()
        else:
            loss.backward()
            self._average_attack()
            if self.clip.clip_grad:
                clipped = self.method.encoder if self.clip.clip_scope == "encoder" else self.method
                torch.nn.utils.clip_grad_norm_(clipped.parameters(), self.clip.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.leaves:
            self._attack()
        if isinstance(self.method, Jepa):
            self._follow(self.method)
        return loss.detach()

    def _average_attack(self) -> None:
        for leaf in self.leaves.values() if self.world.size > 1 else ():
            assert leaf.grad is not None
            dist.all_reduce(leaf.grad)
            leaf.grad /= self.world.size

    @torch.no_grad()
    def _attack(self) -> None:
        self.attacker.step()
        self.attacker.zero_grad()
        epsilon = self.section.epsilon
        for leaf in self.leaves.values():
            if epsilon is None:
                continue
            if self.section.norm == "linf":
                leaf.clamp_(-epsilon, epsilon)
            else:
                norms = leaf.flatten(1).norm(dim=1).clamp(min=epsilon)
                leaf.mul_((epsilon / norms).view(-1, *[1] * (leaf.ndim - 1)))

    @torch.no_grad()
    def _follow(self, method: Jepa) -> None:
        """The teacher's moving average, on what this rank keeps."""
        pairs: list[tuple[Any, Any]] = list(zip(method.teacher.parameters(), method.encoder.parameters(), strict=True))
        if hasattr(pairs[0][0], "ds_tensor"):
            kept = [pair for pair in pairs if pair[0].ds_persist] if self.world.size > 1 else []
            pairs = [(a.ds_tensor.data, b.ds_tensor.data) for a, b in pairs] + [(a.data, b.data) for a, b in kept]
        elif hasattr(pairs[0][0], "to_local"):
            pairs = [(a.to_local(), b.to_local()) for a, b in pairs]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - self.momentum)  # pyright: ignore


class Ours:
    """The loop of `elsewhere pretrain` from a loader's batch on: monitor, upkeep and all, with nothing to save."""

    def __init__(self, config: Config, world: World, batch: int, run: Path):
        off = {"every_steps": 0, "every_minutes": 0.0, "keep_every_epochs": 0}
        config = config.model_copy(update={
            "checkpoint": config.checkpoint.model_copy(update=off),
            "probe": config.probe.model_copy(update={"every_epochs": 0}),
        })  # fmt: skip
        self.engine = build_engine(config, fresh_method(config, world), world, batch, 1)
        self.schedules = constant_schedules(config)
        self.attack = self.schedules.with_lr(ADVERSARY_LR, constant=True)
        if world.first:
            run.mkdir(parents=True)
        self.run = run
        self.monitor = Monitor(
            run, world, Console(file=io.StringIO()), first_step=0, last_step=1 << 30,
            images_per_step=batch * world.size, flops_per_image=0.0, peak=None, every=config.monitor.log_every,
            tensorboard=config.monitor.tensorboard, progress=False,
        )  # fmt: skip
        self.upkeep = Upkeep(
            config,
            world,
            self.engine,
            self.monitor,
            Checkpoints(run, world=world),
            1000.0,
            lambda _: {},
            lambda _: None,
        )

    def steps(self, batches: Iterator[Batch], first: int, last: int, mark: Callable[[], object]) -> None:
        """Take steps `first` … `last - 1` and call `mark` after each."""

        def after(step: int, batch: Batch, _: int) -> bool:
            ends = self.upkeep(step, batch, 1 << 30)  # the end of a turn is not that of training
            mark()
            return ends

        train(self.engine, batches, self.schedules, self.attack, self.monitor, after, first, last)

    def losses(self) -> list[float]:
        """Of every step so far, rank 0 only."""
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "group" not in row]

    def close(self) -> None:
        self.upkeep.signals.finish()
        self.monitor.close()


def overhead(config: Config, world: World, batch: int, steps: int, turn: int, run: Path) -> dict[str, Any]:
    """Steps of our loop and of a bare one in turns, the first of each turn alternating; the first turn is compared."""
    batches = fixed_batches(config, world, batch)
    numbered = (replace(batches[step % len(batches)], step=step) for step in itertools.count())
    ours, bare = Ours(config, world, batch, run), Bare(config, world, batch)
    bare_losses: list[Tensor] = []

    def take_ours(at: int, mark: Callable[[], object]) -> None:
        ours.steps(numbered, at, at + turn, mark)

    def take_bare(at: int, mark: Callable[[], object]) -> None:
        for step in range(at, at + turn):
            loss = bare.step(batches[step % len(batches)])
            if not at:
                bare_losses.append(loss)
            mark()

    totals: dict[str, list[float]] = {"ours": [], "bare": []}
    worked: dict[str, list[float]] = {"ours": [], "bare": []}
    each: dict[str, list[float]] = {"ours": [], "bare": []}
    kinds = [("ours", take_ours), ("bare", take_bare)]
    for number in range(-(-steps // turn) + 1):
        for name, take in kinds if number % 2 else reversed(kinds):
            world.gather_host(None)  # ranks begin a turn together
            marks, working = [time.perf_counter()], time.process_time()
            take(number * turn, lambda marks=marks: marks.append(time.perf_counter()))
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first turn pays for caches and compilers
                totals[name].append(time.perf_counter() - marks[0])
                worked[name].append(time.process_time() - working)  # which other jobs on the machine hardly change
                each[name] += [after - before for before, after in itertools.pairwise(marks)]
    ours.monitor.flush()
    means = world.gather(torch.stack(bare_losses)).mean(dim=0).tolist()
    ours.close()
    ours_losses = world.gather_host(ours.losses() if world.first else None)[0][:turn]
    difference = max(abs(a - b) for a, b in zip(ours_losses, means, strict=True))
    assert difference <= _AGREE, f"the two loops differ by {difference:.1e}: {ours_losses} and {means}"
    low, middle, high = _ratios(totals)
    low_cpu, middle_cpu, high_cpu = _ratios(worked)
    return {
        "steps": len(each["ours"]), "ours": statistics.median(each["ours"]), "bare": statistics.median(each["bare"]),
        "ratio": middle, "ratio_quartiles": [low, high], "cpu_ratio": middle_cpu,
        "cpu_ratio_quartiles": [low_cpu, high_cpu], "losses_differ_by": difference,
    }  # fmt: skip


def _ratios(turns: dict[str, list[float]]) -> list[float]:
    """Quartiles of the ratios of neighbouring turns."""
    found = [a / b for a, b in zip(turns["ours"], turns["bare"], strict=True)]
    return statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
