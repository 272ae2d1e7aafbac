"""What a run shows: banner, progress bar, `metrics.jsonl`, TensorBoard or others, collapse and non-finite watch."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .errors import UserError
from .host import cores
from .planning.hardware import peaks
from .sinks import Sink, TensorBoard
from .world import World

PEAKS = peaks()  # dense half-precision TFLOP/s, by a part of the name


class NonFiniteLoss(Exception):
    """A loss is not a number; the message names rank and step. All ranks raise it at once."""

    shared, status = True, 3


def say(console: Console, text: str) -> None:
    """A line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's dense peak for `dtype`, where it is known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def hardware(world: World) -> str:
    """The devices of this run in a few words."""
    if world.device.type == "cuda":
        return f"{world.size} × {torch.cuda.get_device_name(world.device)}"
    return f"{world.size} × CPU ({platform.machine()}, {cores()} cores on this machine)"


def rank_me(features: Tensor) -> float:
    """Effective rank of features `[B, D]`: exp of the entropy of the singular values (RankMe, Garrido et al. 2023)."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


class Monitor:
    """Collects each step's values on the device and reads them every `every` steps, so that no step waits for them.

    Only rank 0 writes; a loss that is not finite raises `NonFiniteLoss` on every rank, and more than
    `max_corrupt` unreadable images in an epoch raise `UserError`. A resumed run drops the rows that an earlier life
    wrote beyond the checkpoint, since those steps are taken again.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        console: Console,
        *,
        first_step: int,
        last_step: int,
        images_per_step: int,
        flops_per_image: float,
        peak: float | None,
        every: int,
        max_corrupt: int | None = None,
        tensorboard: bool = True,
        progress: bool = True,
        sinks: Sequence[Sink] = (),
    ):
        self.world, self.console, self.every = world, console, every
        self.images_per_step, self.flops_per_image, self.peak = images_per_step, flops_per_image, peak
        self.step, self._pending, self._wait = first_step, [], 0.0
        self._since = self._said = time.perf_counter()
        self.last_step, self.max_corrupt = last_step, max_corrupt
        self._epoch, self._corrupt = -1, 0
        self._named: set[str] = set()
        self._file = self._progress = None
        self._sinks: list[Sink] = list(sinks) if world.first else []
        if world.first:
            path = run / "metrics.jsonl"
            keep_rows_before(path, first_step)
            self._file = path.open("a", encoding="utf-8")
            if tensorboard:
                self._sinks.append(TensorBoard(run / "tensorboard", first_step))
            if progress:
                self._progress = Progress(
                    TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                    TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console,
                )  # fmt: skip
                self._progress.start()
                self._task = self._progress.add_task("steps", total=last_step, completed=first_step, text="")

    def record(self, loss: Tensor, scalars: dict[str, Tensor], facts: dict[str, float], wait: float) -> None:
        """Take one step's device tensors and host numbers; `wait` is the time in seconds it waited for data."""
        self._pending.append((self.step, loss, scalars, facts))
        self._wait += wait
        self.step += 1
        if self.step % self.every == 0:
            self.flush()

    def say_skip(self, where: str, scale: float | None) -> None:
        """Note that the last step was skipped and what the loss scale is now; every rank calls this.

        Raises NonFiniteLoss where there is no scale to lower: outside float16 no step may be skipped.
        """
        step = self.step - 1
        if scale is None:
            self.flush()  # which names the rank whose loss is not finite
            raise NonFiniteLoss(
                f"The gradients of step {step} are not finite although the losses of all ranks (0 to "
                f"{self.world.size - 1}) are; the last checkpoint is from before it. Lower optim.lr, or use "
                "engine.precision=float32."
            )
        self.note({"reason": f"gradients of the {where} overflowed in float16", "loss_scale": scale}, "skipped")

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write where and with what the run starts or goes on, beside the training rows."""
        self._write({"step": self.step - 1, "group": "start", **facts})

    def flush(self) -> None:
        """Read and write what is pending; raises NonFiniteLoss."""
        if not self._pending:
            return
        names = sorted({name for _, _, scalars, _ in self._pending for name in scalars})
        # Not every step has them all: a gradient's norm is there from the first step that was not skipped.
        values = torch.stack(
            [torch.stack([loss, *(s.get(n, torch.zeros_like(loss)) for n in names)]) for _, loss, s, _ in self._pending]
        ).float()
        ranks = self.world.gather(values).cpu()  # [ranks, steps, 1 + names]
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        steps = [step for step, *_ in self._pending]
        bad = (~ranks[..., 0].isfinite()).nonzero()
        means = ranks.double().mean(dim=0).tolist()
        rate = self.images_per_step * len(steps) / seconds
        speed = {"images_per_s": round(rate, 2), "data_wait": round(self._wait / seconds, 4)}
        if self.peak:
            speed["mfu"] = round(rate * self.flops_per_image / (self.peak * 1e12 * self.world.size), 4)
        if self.world.device.type == "cuda":
            speed["memory_gb"] = round(torch.cuda.max_memory_allocated(self.world.device) / 1e9, 3)
        for (step, _, scalars, facts), (loss, *rest) in zip(self._pending, means, strict=True):
            known = {name: value for name, value in zip(names, rest, strict=True) if name in scalars}
            row = {"step": step, "loss": loss, **facts, **known}
            self._write({**row, **(speed if step == steps[-1] else {})})
            last = row
            self._count(row)
        self._pending, self._wait = [], 0.0
        numbers = {f"train/{name}": value for name, value in {**last, **speed}.items() if name != "step"}
        for sink in self._sinks:
            sink.scalars(numbers, last["step"])
        fast = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        if self.world.first:
            self._report(
                steps[-1] + 1,
                f"loss {last['loss']:.4f}  lr {last['lr']:.2e}  {fast} images/s",
                rate,
            )
        if len(bad):
            rank, at = bad[torch.argmin(bad[:, 1])].tolist()
            raise NonFiniteLoss(
                f"The loss of rank {rank} at step {steps[at]} is not finite; a checkpoint, if any, is from before it. "
                "Lower optim.lr, use engine.precision=float32 or bfloat16, or look at the images of that step."
            )

    def _count(self, row: dict[str, Any]) -> None:
        """Count the unreadable images of an epoch; every rank has the same row, so all stop together."""
        if int(row["epoch"]) != self._epoch:
            self._epoch, self._corrupt = int(row["epoch"]), 0
        self._corrupt += round(row.get("skipped_images", 0))
        if self.max_corrupt is not None and self._corrupt > self.max_corrupt:
            named = "; ".join(sorted(self._named)[:3])
            raise UserError(
                f"{self._corrupt} images of epoch {self._epoch} cannot be read, more than data.max_corrupt="
                f"{self.max_corrupt} (rank {self.world.rank} met {named or 'none of them'}); repair them, or raise it.",
                shared=True,
            )

    def _report(self, done: int, text: str, rate: float) -> None:
        """Move the bar on, or where there is none (a log file) print a line every half minute."""
        if self._progress:
            self._progress.update(self._task, completed=done, text=text)
        elif time.perf_counter() - self._said >= 30:
            self._said = time.perf_counter()
            left = (self.last_step - done) * self.images_per_step / rate
            self.say(f"step {done} of {self.last_step}  {text}  {timedelta(seconds=round(left))} left")

    def note(self, values: dict[str, Any], group: str) -> None:
        """Write numbers that belong to the step just finished, beside the training rows."""
        step = self.step - 1
        self._write({"step": step, "group": group, **values})
        numbers = {
            f"{group}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        for sink in self._sinks:
            sink.scalars(numbers, step)

    def picture(self, name: str, image: Tensor) -> None:
        """Show a picture, uint8 `[3, H, W]`, in TensorBoard and wherever else numbers go."""
        for sink in self._sinks:
            sink.picture(name, image, self.step)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.world.first:
            say(self.console, text)

    def name_skipped(self, lines: list[str]) -> None:
        """Name the images that this rank could not read in a step, each once."""
        for line in lines:
            if line in self._named:
                continue
            self._named.add(line)
            say(self.console, f"Skipped an unreadable image (rank {self.world.rank}): {line}")

    def _write(self, row: dict[str, Any]) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def restart_clock(self) -> None:
        """Leave the time since the last reading out of the speed (after a probe or a checkpoint)."""
        self._since = time.perf_counter()

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
        for sink in self._sinks:
            sink.close()
        if self._file:
            self._file.close()


def keep_rows_before(path: Path, step: int) -> None:
    """Drop rows of `step` and later, and a last line cut short by a kill, from a metrics file."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = []
    for line in lines:
        try:
            if line.endswith("\n") and json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    if len(kept) < len(lines):
        aside = path.with_suffix(".jsonl.part")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, path)
