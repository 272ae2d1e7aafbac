"""A run of any method or task: put together, taken up where it stopped, trained, measured."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from ..data.images import TorchDataset
from ..data.loader import dead_worker
from ..data.order import Plan
from ..data.prefetch import OnDevice
from ..data.webdataset import Stream
from .banner import banner, facts
from .checkpoint import Checkpoints
from .config import Config
from .engine.base import Engine
from .engine.choose import build_engine, check_engine
from .errors import UserError, out_of_memory
from .loop import train
from .monitor import Monitor, peak_tflops, say
from .nodes.hosts import check_hosts, check_shared_folder
from .parts import Parts
from .resume import check_same, describe, open_run, restore
from .sinks import Sink, Wandb, load_wandb
from .upkeep import Upkeep
from .world import World, join


@dataclass
class Result:
    """What a run came to: its folder, the finished steps, and the figures before and after (None if not measured)."""

    run: Path
    steps: int
    complete: bool
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    signal: int | None = None


class Task(Protocol):
    """What a run trains, from which weights, and how it is measured; every rank calls every function."""

    def assemble(self, config: Config, world: World, dataset: Any, val_dataset: Any) -> Parts:
        """What the run is made of; raises UserError or DataError for what a user can mend."""
        ...

    def start(self, config: Config, parts: Parts) -> str:
        """Give the method its first weights, and say which; raises UserError where they cannot be had."""
        ...

    def measure(self, config: Config, parts: Parts, engine: Engine) -> dict[str, Any] | None:
        """Figures of the weights as they are, the same on every rank; None where nothing can be measured."""
        ...

    def line(self, when: str, found: dict[str, Any]) -> str:
        """The figures in one line."""
        ...

    def summary(self, console: Console, result: Result) -> None:
        """What the first rank says at the end of a finished run."""
        ...


def run(
    config: Config,
    task: Task,
    dataset: Any = None,
    *,
    val_dataset: Any = None,
    fresh: bool = False,
    allow_config_change: bool = False,
    measure_only: bool = False,
    console: Console | None = None,
    world: World | None = None,
) -> Result:
    """Train what `task` puts together, or continue where its run stopped; `measure_only` measures a run that is there.

    A `world` that was joined before stays joined. Raises UserError or DataError for anything that a user can mend,
    NonFiniteLoss for a run that diverged.
    """
    section, ours = config.engine, world is None
    if world is None:
        world = join(section.device, section.kind != "ddp", 60 * section.wait_minutes, section.silence_seconds)
    held: list[int] = []
    checkpoints: Checkpoints | None = None
    try:
        folder = Path(str(config.run.dir))
        checkpoints = Checkpoints(folder, config.checkpoint.keep, world)
        hosts = check_hosts(config, world)
        if config.monitor.wandb:
            world.agree(lambda: load_wandb() if world.first else None)
        if measure_only and not folder.is_dir():
            raise UserError(f"There is no run in {folder} to measure; train it first, or name its run.dir.")
        saved, complaints = world.first_decides(lambda: open_run(folder, checkpoints, fresh, held))
        if measure_only and saved is None:
            raise UserError(f"{folder} has no checkpoint yet; train it first, or name its run.dir.")
        check_shared_folder(folder, world)
        parts = world.agree(lambda: task.assemble(config, world, dataset, val_dataset))
        world.agree(lambda: check_engine(config, world, parts.micro_batch, parts.accumulation))
        notes = world.agree(lambda: check_same(config, parts, saved, allow_config_change) if saved else [])
        start = f"step {saved.step}, {saved.path}" if saved else world.agree(lambda: task.start(config, parts))
        console = console or Console()
        if world.first and section.kind == "deepspeed":
            say(console, "DeepSpeed starts; the first time it compiles a part of itself, which takes a minute or two.")
        engine = world.agree(lambda: build_engine(config, parts.method, world, parts.micro_batch, parts.accumulation))
        if saved:
            world.agree(lambda: restore(engine, saved))
        lines = facts(config, world, parts, start) if world.first else {}
        if world.first:
            if not measure_only:
                (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            for complaint in complaints:
                say(console, f"{complaint} Falling back to the one before it.")
            banner(console, lines, config, world, notes, hosts)
        before = saved.about.get("before") if saved else None
        result = Result(folder, saved.step if saved else 0, False, before)
        if measure_only:
            result.after = task.measure(config, parts, engine)
            if world.first and result.after:
                say(console, task.line(f"after {result.steps} of {parts.steps} steps", result.after))
            return result
        _train(config, task, world, parts, engine, checkpoints, console, result, lines, resumed=saved is not None)
        if world.first and result.complete:
            task.summary(console, result)
        return result
    except BaseException as error:
        if ours:
            world.guard.failed(error)
        raise
    finally:
        if checkpoints:
            checkpoints.close()
        if ours:
            world.close()
        for descriptor in held:
            os.close(descriptor)


def _train(
    config: Config,
    task: Task,
    world: World,
    parts: Parts,
    engine: Engine,
    checkpoints: Checkpoints,
    console: Console,
    result: Result,
    lines: dict[str, str],
    resumed: bool,
) -> None:
    """Measure, train, measure; fills `result`."""
    first, last = result.steps, parts.steps
    sinks = world.agree(lambda: _more_sinks(config, result.run) if world.first and first < last else [])
    monitor = Monitor(
        result.run, world, console, first_step=first, last_step=last, images_per_step=config.optim.batch_size,
        flops_per_image=1e9 * parts.gflops_per_image,
        peak=config.monitor.peak_tflops or peak_tflops(world.device, parts.method.compute_dtype),
        every=config.monitor.log_every, max_corrupt=config.data.max_corrupt, tensorboard=config.monitor.tensorboard,
        progress=config.monitor.progress and console.is_terminal, sinks=sinks,
    )  # fmt: skip

    def measure(step: int) -> dict[str, Any] | None:
        found = task.measure(config, parts, engine)
        if found is None:
            if isinstance(parts.train, TorchDataset) and parts.val is None:
                monitor.say("No probe: there are no images to measure on; give a second data set as val_dataset.")
            elif parts.val is not None and not isinstance(parts.train, Stream):
                monitor.say("No probe: the images have no labels of two classes or more.")
        elif world.first:
            monitor.note(found, "probe")
            monitor.say(task.line(f"after {step} of {last} steps" if step else "before training", found))
        return found

    try:
        if first < last:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            monitor.begin({"time": now, "steps": last, **lines})
        if not resumed and config.probe.before:
            result.before = measure(0)
        plan = Plan(
            seed=config.seed, global_batch=config.optim.batch_size, micro_batch=parts.micro_batch, rank=world.rank,
            world=world.size, start_step=first, stop_step=last, workers=parts.workers,
            prefetch=config.loader.prefetch, pin_memory=world.device.type == "cuda", on_error=config.data.on_error,
        )  # fmt: skip
        batches = OnDevice(parts.open(plan), parts.augment, world.device, parts.after)
        upkeep = Upkeep(
            config, world, engine, monitor, checkpoints, parts.steps_per_epoch,
            describe=lambda step: describe(config, parts, engine, step, result.before), probe=measure,
        )  # fmt: skip
        monitor.restart_clock()
        with upkeep:
            try:
                result.steps = train(
                    engine, batches, parts.schedules, parts.adversary_schedules, monitor, upkeep, first, last
                )
            except RuntimeError as error:
                raise dead_worker(error) or out_of_memory(error, parts.micro_batch) or error from None
            upkeep.signals.finish()
        result.complete = result.steps == last
        monitor.flush()
        if result.complete:
            result.after = _finish(config, world, result, measure)
        else:
            result.signal = upkeep.received or signal.SIGTERM  # another rank's
    finally:
        monitor.close()


def _more_sinks(config: Config, folder: Path) -> list[Sink]:
    """Where numbers go besides files of the run."""
    section = config.monitor
    return [Wandb(folder, section.wandb, section.wandb_name, config.to_dict())] if section.wandb else []


def _finish(config: Config, world: World, result: Result, measure) -> dict[str, Any] | None:
    """The final measurement, once: `results.json` keeps it for a start of a run that is complete."""
    path = result.run / "results.json"
    known = world.first_decides(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    if known.get("steps") == result.steps:
        return known.get("after")
    after = measure(result.steps) if config.probe.after else None
    if world.first:
        aside = path.with_suffix(".part")
        found = {**known, "steps": result.steps, "before": result.before, "after": after}  # probes may stand there, too
        aside.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(aside, path)
    return after
