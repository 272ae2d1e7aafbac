"""The loop: batch, loss, backward, step (method down, adversary up), teacher, log, upkeep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from ..data.batch import Batch
from ..models.jepa import Jepa
from .engine.base import Engine
from .monitor import Monitor
from .optim import Schedules, set_step


def train(
    engine: Engine,
    loader: Iterable[Batch],
    schedules: Schedules,
    adversary_schedules: Schedules,
    monitor: Monitor,
    upkeep: Callable[[int, Batch, int], bool],
    first: int,
    last: int,
) -> int:
    """Take optimiser steps `first` … `last - 1`, and return how many are finished (fewer, if a signal came)."""
    batches = iter(loader)
    device, at = engine.world.device, engine.world.guard.at
    for step in range(first, last):
        set_step(engine.optimizer, schedules, step)
        total, scalars, wait, redraws, skipped, images = torch.zeros((), device=device), {}, 0.0, 0, [], 0
        for micro in range(engine.accumulation):
            at(step, "waiting for data")
            asked = time.perf_counter()
            batch = next(batches)
            wait += time.perf_counter() - asked
            assert batch.step == step, "the loader and the loop count the same steps"
            at(step, "in forward and backward")
            loss, values = engine.forward_backward(batch, micro)
            total += loss / engine.accumulation
            scalars = {name: scalars.get(name, 0.0) + value / engine.accumulation for name, value in values.items()}
            redraws, skipped, images = redraws + batch.redraws, skipped + batch.skipped, images + len(batch)
        at(step, "in the optimiser's step")
        applied = engine.step(adversary_schedules.lr_at(step))
        if applied:  # a skipped step leaves the teacher where it is
            engine.after_step(schedules.momentum_at(step))
        if engine.clipped_norm is not None:
            scalars["gradient_norm"] = engine.clipped_norm.float()
        if batch.targets is not None:
            scalars["redraw_rate"] = torch.full((), redraws / images, device=device)
        # The monitor takes means over ranks; this one is a sum.
        scalars["skipped_images"] = torch.full((), float(len(skipped) * engine.world.size), device=device)
        monitor.name_skipped(skipped)
        facts = {
            "epoch": step / schedules.steps_per_epoch,
            "lr": schedules.lr_at(step),
            "weight_decay": schedules.weight_decay_at(step),
        }
        if isinstance(engine.method, Jepa):
            facts["momentum"] = schedules.momentum_at(step)
        if engine.adversary:
            scalars |= {f"adversary_{name}": norm for name, norm in engine.adversary.norms().items()}
            facts["adversary_lr"] = adversary_schedules.lr_at(step)
        if engine.scaler.enabled:
            facts |= {"loss_scale": engine.scaler.value, "skipped_steps": float(engine.scaler.skipped)}
        at(step, "after it")
        monitor.record(total, scalars, facts, wait)
        if not applied:
            monitor.say_skip(engine.overflow_in, engine.scaler.value if engine.scaler.enabled else None)
        if upkeep(step + 1, batch, last):
            return step + 1
    return last
