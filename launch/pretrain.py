"""`elsewhere pretrain`: put a run together, take it up where it stopped, train, measure."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.loader import dead_worker
from ..data.order import Plan
from ..data.prefetch import OnDevice
from ..data.readers import open_reader
from ..data.webdataset import Stream
from .banner import accuracy, banner, summary
from .checkpoint import Checkpoints
from .config import Config, load_config
from .engine.base import Engine
from .engine.choose import build_engine, check_engine
from .load import start_from
from .loop import train
from .monitor import Monitor, peak_tflops, say
from .nodes.hosts import check_hosts, check_shared_folder
from .parts import Parts, assemble
from .quality import probe
from .resume import check_same, describe, open_run, restore
from .upkeep import Upkeep
from .world import World, join


@dataclass
class Result:
    """What a run came to: its folder, the finished steps, and the probe before and after (None where not measured)."""

    run: Path
    steps: int
    complete: bool
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    signal: int | None = None


def pretrain(
    recipe: str | Config,
    dataset: Any = None,
    *,
    val_dataset: Any = None,
    fresh: bool = False,
    allow_config_change: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> Result:
    """Pre-train a recipe, or continue it where its run stopped.

    `dataset` (any torch map-style data set) takes the place of `data.path`, and `val_dataset` of its held-out part;
    overrides are dotted settings (`**{"optim.lr": 1e-3}`), groups (`optim={"lr": 1e-3}`) or `optim__lr=1e-3`.
    Raises UserError or DataError for anything that a user can mend, NonFiniteLoss for a run that diverged.
    """
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    engine = config.engine
    world = join(engine.device, engine.kind != "ddp", 60 * engine.wait_minutes, engine.silence_seconds)
    held: list[int] = []
    checkpoints: Checkpoints | None = None
    try:
        run = Path(str(config.run.dir))
        checkpoints = Checkpoints(run, config.checkpoint.keep, world)
        hosts = check_hosts(config, world)
        saved, complaints = world.first_decides(lambda: open_run(run, checkpoints, fresh, held))
        check_shared_folder(run, world)
        parts = world.agree(lambda: assemble(config, world, dataset, val_dataset))
        world.agree(lambda: check_engine(config, world, parts.micro_batch, parts.accumulation))
        notes = world.agree(lambda: check_same(config, parts, saved, allow_config_change) if saved else [])
        start = "fresh weights"
        if saved:
            start = f"step {saved.step}, {saved.path}"
        elif config.init.from_:
            path = config.init.from_
            start = f"encoder weights from {world.agree(lambda: start_from(parts.method, path))}"
        console = console or Console()
        if world.first and config.engine.kind == "deepspeed":
            say(console, "DeepSpeed starts; the first time it compiles a part of itself, which takes a minute or two.")
        engine = world.agree(lambda: build_engine(config, parts.method, world, parts.micro_batch, parts.accumulation))
        if saved:
            world.agree(lambda: restore(engine, saved))
        if world.first:
            (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            for complaint in complaints:
                say(console, f"{complaint} Falling back to the one before it.")
            banner(console, config, world, parts, start, notes, hosts)
        before = saved.about.get("before") if saved else None
        result = Result(run, saved.step if saved else 0, False, before)
        _train(config, world, parts, engine, checkpoints, console, result, resumed=saved is not None)
        if world.first and result.complete:
            summary(console, run, result.steps, result.before, result.after)
        return result
    except BaseException as error:
        world.guard.failed(error)
        raise
    finally:
        if checkpoints:
            checkpoints.close()
        world.close()
        for descriptor in held:
            os.close(descriptor)


def _train(
    config: Config,
    world: World,
    parts: Parts,
    engine: Engine,
    checkpoints: Checkpoints,
    console: Console,
    result: Result,
    resumed: bool,
) -> None:
    """Probe, train, probe; fills `result`."""
    first, last = result.steps, parts.steps
    monitor = Monitor(
        result.run, world, console, first_step=first, last_step=last, images_per_step=config.optim.batch_size,
        flops_per_image=1e9 * parts.gflops_per_image,
        peak=config.monitor.peak_tflops or peak_tflops(world.device, parts.method.compute_dtype),
        every=config.monitor.log_every, max_corrupt=config.data.max_corrupt, tensorboard=config.monitor.tensorboard,
        progress=config.monitor.progress and console.is_terminal,
    )  # fmt: skip

    def measure(step: int) -> dict[str, Any] | None:
        if parts.val is None or isinstance(parts.train, Stream):
            return None
        found = probe(
            engine, parts.train, parts.val, config.probe, config.data.interpolation, config.seed, parts.workers
        )
        if found is None:
            monitor.say("No probe: the images have no labels of two classes or more.")
        elif world.first:
            monitor.note(found, "probe")
            monitor.say(accuracy(f"after {step} of {last} steps" if step else "before training", found))
        return found

    try:
        if not resumed and config.probe.before:
            result.before = measure(0)
        plan = Plan(
            seed=config.seed, global_batch=config.optim.batch_size, micro_batch=parts.micro_batch, rank=world.rank,
            world=world.size, start_step=first, stop_step=last, workers=parts.workers,
            prefetch=config.loader.prefetch, pin_memory=world.device.type == "cuda", on_error=config.data.on_error,
        )  # fmt: skip
        reader = open_reader(parts.train, parts.augment, parts.masks, parts.order, plan, parts.reader)
        batches = OnDevice(reader, parts.augment, world.device)
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
                raise dead_worker(error) or error from None
            upkeep.signals.finish()
        result.complete = result.steps == last
        monitor.flush()
        if result.complete:
            result.after = _finish(config, world, result, measure)
        else:
            result.signal = upkeep.received or signal.SIGTERM  # another rank's
    finally:
        monitor.close()


def _finish(config: Config, world: World, result: Result, measure) -> dict[str, Any] | None:
    """The final probe, once: `results.json` keeps it for a start of a run that is complete."""
    path = result.run / "results.json"
    known = world.first_decides(lambda: json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    if known.get("steps") == result.steps:
        return known.get("after")
    after = measure(result.steps) if config.probe.after else None
    if world.first:
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps({"steps": result.steps, "before": result.before, "after": after}, indent=1))
        os.replace(aside, path)
    return after
