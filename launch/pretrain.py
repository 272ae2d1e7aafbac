"""`elsewhere pretrain`: put a run together, take it up where it stopped, train, measure."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from ..data.images import DataError, Source, TorchDataset, open_source
from ..data.loader import Loader
from ..models.jepa import Jepa
from .build import build_augment, build_masks, build_method, build_optimizer, build_schedules
from .checkpoint import Checkpoints, Saved, lock
from .config import Config, differences, load_config, result_settings
from .engine.ddp import DdpEngine
from .engine.precision import LossScaler, choose_precision
from .errors import UserError
from .load import start_from
from .loop import train
from .monitor import Monitor, hardware, peak_tflops
from .optim import Schedules
from .quality import probe
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


@dataclass
class Parts:
    """Everything that a run is made of, built without a word to the other ranks."""

    method: Jepa
    train: Source
    val: Source | None
    schedules: Schedules
    engine_settings: dict[str, Any]
    micro_batch: int
    steps_per_epoch: int
    steps: int
    workers: int
    precision_reason: str
    started_from: str = "fresh weights"
    notes: list[str] = field(default_factory=list)


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
    Raises UserError for anything that a user can mend.
    """
    config = recipe if isinstance(recipe, Config) else load_config(recipe, overrides)
    world = join(config.engine.device)
    console = console or Console(stderr=False)
    held: list[int] = []
    try:
        return _pretrain(config, world, console, dataset, val_dataset, fresh, allow_config_change, held)
    finally:
        world.close()
        for descriptor in held:
            os.close(descriptor)


def _pretrain(
    config: Config,
    world: World,
    console: Console,
    dataset: Any,
    val_dataset: Any,
    fresh: bool,
    allow_change: bool,
    held: list[int],
) -> Result:
    run = Path(str(config.run.dir))
    checkpoints = Checkpoints(run, config.checkpoint.keep)
    saved, complaints = _agree(world, lambda: _open_run(run, checkpoints, fresh, held), only_first=True)
    if world.first:
        for complaint in complaints:
            console.print(f"{escape(complaint)} Falling back to the one before it.", highlight=False, soft_wrap=True)
    parts = _agree(world, lambda: _parts(config, world, dataset, val_dataset, saved, allow_change))
    method = parts.method.to(world.device)
    first = saved.step if saved else 0
    optimizer = _agree(world, lambda: build_optimizer(config, method))
    engine = DdpEngine(method, optimizer, world, **parts.engine_settings)
    if saved:
        _agree(world, lambda: _restore(engine, saved))
    if world.first:
        (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        _banner(console, config, world, parts, saved, engine)
    keep = parts.train.read(0).nbytes  # one image read here finds a wrong channel count before any step
    assert keep
    result = Result(run, first, first >= parts.steps, before=(saved.about.get("before") if saved else None))
    monitor = Monitor(
        run, world, console, first_step=first, last_step=parts.steps, images_per_step=config.optim.batch_size,
        flops_per_image=method.flops_per_image(*_mask_sizes(config, method)),
        peak=config.monitor.peak_tflops or peak_tflops(world.device, method.compute_dtype),
        every=config.monitor.log_every, tensorboard=config.monitor.tensorboard,
        progress=config.monitor.progress and console.is_terminal,
    )  # fmt: skip

    def measure(step: int, name: str = "probe") -> dict[str, Any] | None:
        if parts.val is None:
            return None
        found = probe(
            method, parts.train, parts.val, config.probe, config.data.interpolation, config.seed, world, parts.workers
        )
        if found and world.first:
            monitor.note(found, name)
            monitor.say(_accuracy(f"after {step} of {parts.steps} steps" if step else "before training", found))
        return found

    def describe(step: int) -> dict[str, Any]:
        return {
            "step": step, "epoch": step / parts.steps_per_epoch, "samples": len(parts.train),
            "before": result.before, "config": config.to_dict(), "result_settings": result_settings(config),
            "precision": str(method.compute_dtype).removeprefix("torch."), "ranks": world.size,
            "torch": torch.__version__,
        }  # fmt: skip

    try:
        if not saved and config.probe.before:
            result.before = measure(0)
        loader = Loader(
            parts.train, build_augment(config), build_masks(config, method.encoder.grid), seed=config.seed,
            global_batch=config.optim.batch_size, micro_batch=parts.micro_batch, rank=world.rank, world=world.size,
            workers=parts.workers, start_step=first, stop_step=parts.steps, on_error=config.data.on_error,
            pin_memory=world.device.type == "cuda", prefetch=config.loader.prefetch,
        )  # fmt: skip
        monitor.restart_clock()
        with Upkeep(
            config,
            world,
            engine,
            monitor,
            checkpoints,
            parts.steps_per_epoch,
            describe,
            lambda step: _drop(measure(step)),
        ) as upkeep:
            result.steps = train(engine, loader, parts.schedules, monitor, upkeep, first, parts.steps)
            result.signal = upkeep.received if result.steps < parts.steps else None
            upkeep.signals.finish()
        result.complete = result.steps == parts.steps
        monitor.flush()
        if result.complete:
            result.after = _finish(run, config, world, result, measure)
    finally:
        monitor.close()
    if world.first:
        _summary(console, result)
    return result


def _drop(_: object) -> None:
    return None


def _agree(world: World, build, only_first: bool = False):
    """Run `build` on every rank (or the first), and raise everyone's errors everywhere, so that no rank waits."""
    value = failure = None
    if world.first or not only_first:
        try:
            value = build()
        except (UserError, DataError) as error:
            failure = str(error)
    failures = list(dict.fromkeys(f for f in world.gather_host(failure) if f))
    if failures:
        error = UserError(" ".join(failures))
        error.shared = True  # pyright: ignore  # the first rank prints it for all
        raise error
    return world.gather_host(value)[0] if only_first else value


def _open_run(run: Path, checkpoints: Checkpoints, fresh: bool, held: list[int]) -> tuple[Saved | None, list[str]]:
    """Lock the run's folder and find where to go on; UserError if `--fresh` would overwrite or all is damaged."""
    held.append(lock(run))
    if fresh and ((run / "metrics.jsonl").exists() or checkpoints.folders()):
        raise UserError(f"--fresh: {run} holds a run already; remove it yourself, or choose another run.dir.")
    checkpoints.clean()
    saved, complaints = checkpoints.newest()
    if saved is None and complaints:
        raise UserError(
            f"No checkpoint in {checkpoints.folder} can be used ({complaints[0]} {len(complaints)} in all); restore "
            "one, or start anew with another run.dir."
        )
    return saved, complaints


def _parts(
    config: Config, world: World, dataset: Any, val_dataset: Any, saved: Saved | None, allow_change: bool
) -> Parts:
    method = build_method(config)
    masks = build_masks(config, method.encoder.grid)
    build_augment(config)
    channels = config.model.channels
    if dataset is not None:
        source: Source = TorchDataset(dataset, channels)
        val: Source | None = TorchDataset(val_dataset, channels) if val_dataset is not None else None
    elif config.data.path is None:
        raise UserError("Say where the images are: data.path=FOLDER, data.path=cifar10:FOLDER, or data.path=digits.")
    else:
        source = open_source(config.data.path, "train", channels, config.data.holdout)
        val = open_source(config.data.val_path or config.data.path, "val", channels, config.data.holdout)
    del masks
    batch = config.optim.batch_size
    if len(source) < batch:
        raise UserError(
            f"The data set has {len(source)} images, less than one optim.batch_size={batch}; set optim.batch_size to "
            f"{len(source)} or less."
        )
    if batch % world.size:
        raise UserError(f"optim.batch_size={batch} does not divide among {world.size} processes; make it a multiple.")
    micro = config.loader.micro_batch or batch // world.size
    if (batch // world.size) % micro:
        raise UserError(
            f"loader.micro_batch={micro} does not divide the {batch // world.size} images of each process; choose a "
            "divisor."
        )
    per_epoch = len(source) // batch
    device = world.device
    method.compute_dtype, reason = choose_precision(config.engine.precision, device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = config.loader.workers
    workers = min(16, max(0, cores // world.local_size - 1)) if workers == "auto" else workers
    parts = Parts(
        method, source, val, build_schedules(config, per_epoch),
        {
            "scaler": LossScaler(method.compute_dtype == torch.float16),
            "accumulation": batch // world.size // micro,
            "clip_grad": config.optim.clip_grad, "clip_scope": config.optim.clip_scope,
        },
        micro, per_epoch, per_epoch * config.optim.epochs, workers, reason,
    )  # fmt: skip
    if saved:
        parts.notes = _check_same(config, saved, len(source), allow_change, method.compute_dtype)
        parts.started_from = f"{saved.path.name}"
    elif config.init.from_:
        parts.started_from = start_from(method, config.init.from_)
    return parts


def _check_same(config: Config, saved: Saved, samples: int, allow_change: bool, dtype: torch.dtype) -> list[str]:
    """Notes on what differs harmlessly; UserError where a setting that changes the result is another than before."""
    changed = differences(saved.about["result_settings"], result_settings(config))
    if samples != saved.about["samples"]:
        changed.append(f"images in the data set: {saved.about['samples']} -> {samples}")
    if changed and not allow_change:
        raise UserError(
            f"The run in {config.run.dir} was started with other settings ({'; '.join(changed)}): set them back, "
            "choose another run.dir, or pass --allow-config-change."
        )
    notes = [f"Changed on the way: {line}." for line in changed]
    precision = str(dtype).removeprefix("torch.")
    if precision != saved.about["precision"]:
        notes.append(
            f"Precision was {saved.about['precision']} and is now {precision}: the losses will differ slightly."
        )
    return notes


def _restore(engine: DdpEngine, saved: Saved) -> None:
    try:
        engine.load_state_dict(saved.load(engine.world.device)["engine"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{saved.path} does not fit this recipe ({str(error).splitlines()[0]}); set model, method and optim back, "
            "or choose another run.dir."
        ) from error


def _mask_sizes(config: Config, method: Jepa) -> tuple[int, int, int, int]:
    """Context blocks, their tokens, target blocks, their tokens in the first step, for counting FLOPs."""
    masks = build_masks(config, method.encoder.grid)(config.seed, 0, 0, np.arange(64))
    return masks.context.shape[0], masks.context.shape[2], masks.targets.shape[0], masks.targets.shape[2]


def _banner(
    console: Console, config: Config, world: World, parts: Parts, saved: Saved | None, engine: DdpEngine
) -> None:
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    method, optim = parts.method, config.optim
    dtype = str(method.compute_dtype).removeprefix("torch.")
    micro = f" × {engine.accumulation} micro-batches" if engine.accumulation > 1 else ""
    lines = [
        f"run        {config.run.dir}  ({config.about})" if config.about else f"run        {config.run.dir}",
        f"hardware   {hardware(world)}, torch {torch.__version__}",
        f"precision  {dtype} ({parts.precision_reason}); parameters and teacher float32",
        f"model      encoder {count(method.encoder):.2f} M, predictor {count(method.predictor):.2f} M parameters, "
        f"{method.encoder.grid[0]}×{method.encoder.grid[1]} patches, StoP on {config.method.stop.where}",
        f"data       {len(parts.train):,} images to train, {len(parts.val) if parts.val else 0:,} held out, "
        f"{parts.workers} workers",
        f"batch      {optim.batch_size} = {world.size} ranks × {parts.micro_batch}{micro}; "
        f"{parts.steps_per_epoch} steps an epoch, {parts.steps} in all",
        f"start      {'step ' + str(saved.step) + ', ' if saved else ''}{parts.started_from}",
        *parts.notes,
    ]
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


def _accuracy(when: str, found: dict[str, Any]) -> str:
    few = f", {found['labels_per_class']} labels per class" if "labels_per_class" in found else ""
    spread = {k: f" ± {100 * found[k + '_std']:.1f}" if k + "_std" in found else "" for k in ("knn", "linear")}
    return (
        f"probe {when}{few}: k-NN {100 * found['knn']:.1f}{spread['knn']} %, "
        f"linear {100 * found['linear']:.1f}{spread['linear']} %"
    )


def _finish(run: Path, config: Config, world: World, result: Result, measure) -> dict[str, Any] | None:
    """The final probe, once: `results.json` keeps it."""
    path = run / "results.json"
    known = None
    if world.first and path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    known = world.gather_host(known)[0]
    if known is not None and known.get("steps") == result.steps:
        return known.get("after")
    after = measure(result.steps) if config.probe.after else None
    if world.first:
        text = json.dumps({"steps": result.steps, "before": result.before, "after": after}, indent=1)
        aside = path.with_suffix(".part")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    return after


def _summary(console: Console, result: Result) -> None:
    if result.before and result.after:
        for key in ("knn", "linear"):
            gain = 100 * (result.after[key] - result.before[key])
            name = "k-NN" if key == "knn" else "linear"
            console.print(
                f"{name:7}{100 * result.before[key]:.1f} % before -> {100 * result.after[key]:.1f} % after "
                f"({gain:+.1f} points)",
                highlight=False,
            )
    if result.complete:
        console.print(f"Finished: {result.steps} steps in {result.run}; elsewhere.load({str(result.run)!r}) gives the "
                      "encoder.", highlight=False, soft_wrap=True)  # fmt: skip
    elif result.signal:
        console.print(f"Saved on {signal.Signals(result.signal).name}.", highlight=False)
