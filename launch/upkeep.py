"""What happens between steps: checkpoints, stop signals, probes, and a look at what trains."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from ..data.batch import Batch
from .checkpoint import Checkpoints
from .config import Config
from .engine.base import Engine
from .monitor import Monitor, NonFiniteLoss
from .watch import Watch
from .world import Signals, World

_STOP, _SAVE, _FAILED = range(3)
# Seconds: SLURM, launchers and a terminal may each send a process the same signal, SLURM even twice.
_ECHO = 5.0


class Upkeep:
    """Called after every step with the number of finished steps; True ends the run early.

    `describe(step)` is what a checkpoint's `about.json` says; `probe(step)` measures the frozen teacher.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        monitor: Monitor,
        checkpoints: Checkpoints,
        steps_per_epoch: float,
        describe: Callable[[int], dict[str, Any]],
        probe: Callable[[int], object],
    ):
        self.config, self.world, self.engine, self.monitor = config, world, engine, monitor
        self.checkpoints, self.steps_per_epoch = checkpoints, steps_per_epoch
        self.describe, self.probe = describe, probe
        self.watch = Watch(config, world, engine, monitor)
        self.signals = Signals(world, 3)
        self.received: int | None = None
        self._received_when = 0.0
        self._saved_at: int | None = None
        self._saved_when = time.monotonic()
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Upkeep:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread, as in a notebook's worker: then nobody signals us
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        """Remember the signal; a second one acts at once, unless it is the first's echo."""
        if self.received is None:
            self.received, self._received_when = number, time.monotonic()
            self.monitor.say("Stopping after this step, with a checkpoint; a signal in 5 s or later stops without one.")
            self.signals.raise_flag(_STOP)
        elif time.monotonic() - self._received_when > _ECHO:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)

    def __call__(self, step: int, batch: Batch, last: int) -> bool:
        epoch = int(step / self.steps_per_epoch + 1e-9)
        epoch_ends = epoch > int((step - 1) / self.steps_per_epoch + 1e-9)  # in this step, or with it
        checkpoint = self.config.checkpoint
        self.watch(step, batch)
        every = self.config.probe.every_epochs
        if every and epoch_ends and epoch % every == 0 and step < last:
            self.monitor.flush()
            self.probe(step)
            self.monitor.restart_clock()
        due = checkpoint.every_minutes and time.monotonic() - self._saved_when >= 60 * checkpoint.every_minutes
        if due and self.world.first and not self._asked:  # one clock decides; the others hear of it a step later
            self._asked = True
            self.signals.raise_flag(_SAVE)
        if self.checkpoints.failed():
            self.signals.raise_flag(_FAILED)
        stop, save, failed = self.signals.exchange()
        if failed:
            self.checkpoints.finish()
        permanent = bool(checkpoint.keep_every_epochs and epoch_ends and epoch % checkpoint.keep_every_epochs == 0)
        regular = bool(checkpoint.every_steps and step % checkpoint.every_steps == 0)
        if stop or save or permanent or regular or step == last:
            self.save(step, permanent)
        if stop or step == last:
            self.checkpoints.finish()
        if stop:
            self.monitor.say(f"Stopped after step {step}; the same command continues from there.")
        return stop

    def save(self, step: int, permanent: bool = False) -> None:
        """Begin to write a checkpoint of `step` finished steps, after a look that its numbers are finite."""
        if self._saved_at == step:
            return
        self.monitor.flush()
        adversary = self.engine.adversary.tensors.values() if self.engine.adversary else ()
        finite = [values.isfinite().all().to(self.world.device) for values in [*self.engine.stored(), *adversary]]
        bad = (~self.world.gather(torch.stack(finite).all())).nonzero()
        if len(bad):
            raise NonFiniteLoss(
                f"Weights are not finite after step {step - 1} (rank {int(bad[0, 0])}); the last checkpoint is from "
                "before it. Lower optim.lr, or use engine.precision=float32."
            )
        self.checkpoints.save(self.engine.pieces(), self.describe(step), permanent)
        self._saved_at, self._saved_when, self._asked = step, time.monotonic(), False
        self.monitor.restart_clock()
