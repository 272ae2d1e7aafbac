"""What an engine costs: our loop against a bare one, steps beside a checkpoint, and the bytes that each rank holds."""

from __future__ import annotations

import gc
import itertools
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..data.batch import Batch
from .bench_batches import fixed_batches
from .bench_bytes import STATES, bytes_held
from .bench_loops import ADVERSARY_LR, LR, deepspeed_settings, fresh_method, overhead
from .checkpoint import Checkpoints
from .config import Config, load_config, refuse_task
from .engine.base import Engine
from .engine.choose import build_engine, check_engine
from .engine.ds_settings import offloads_optimizer
from .errors import UserError
from .monitor import hardware
from .world import World, join

MEASURES = ("overhead", "saving", "bytes")


def engine_settings(name: str) -> list[str]:
    """Overrides for an engine by its name: `ddp`, `fsdp`, a DeepSpeed setting such as `zero2`, or a JSON file."""
    if name in ("ddp", "fsdp"):
        return [f"engine.kind={name}"]
    return ["engine.kind=deepspeed", f"engine.deepspeed={name}"]


def bench_engines(
    recipe: str,
    overrides: Sequence[str],
    engines: Sequence[str],
    measures: Sequence[str] = MEASURES,
    batch: int | None = None,
    steps: int = 200,
    turn: int = 10,
) -> dict[str, Any]:
    """Measure `engines` one after the other on batches in memory, `batch` images per step and rank; every rank calls.

    `steps` are taken of each kind that is compared, in turns of `turn`. Returns machine, versions, date and, for each
    of `measures`, a list of rows, one an engine. Raises UserError for what cannot be measured.
    """
    unknown = [measure for measure in measures if measure not in MEASURES]
    if unknown:
        raise UserError(f"--measure {unknown[0]} is not known; choose among {', '.join(MEASURES)}.")
    configs = {name: load_config(recipe, [*overrides, *engine_settings(name)]) for name in engines}
    for config in configs.values():
        refuse_task(config, "`elsewhere bench engines`")
    first = next(iter(configs.values()))
    world = join(first.engine.device, group=True)
    batch = batch or first.loader.micro_batch or (128 if world.device.type == "cuda" else 8)
    out: dict[str, Any] = {
        "hardware": hardware(world), "torch": torch.__version__, "python": platform.python_version(),
        "date": date.today().isoformat(), "recipe": recipe, "overrides": list(overrides), "ranks": world.size,
        "batch": batch, "steps": steps, "turn": turn,
    }  # fmt: skip
    folder = None
    try:
        for name, config in configs.items():
            size = {"batch_size": batch * world.size}
            configs[name] = config = config.model_copy(update={"optim": config.optim.model_copy(update=size)})
            world.agree(lambda config=config: _check(config, world, batch))
        if any(config.engine.kind == "deepspeed" for config in configs.values()):
            from .engine.zero import import_deepspeed

            out["deepspeed"] = import_deepspeed(world).__version__
        folder = Path(world.first_decides(lambda: tempfile.mkdtemp(prefix="bench-engines-")))
        for measure in measures:
            out[measure] = []
            for number, (name, config) in enumerate(configs.items()):
                if measure == "overhead":
                    row = overhead(config, world, batch, steps, turn, folder / f"overhead-{number}")
                elif measure == "saving":
                    row = _saving(config, world, batch, steps, folder / f"saving-{number}")
                else:
                    row = bytes_held(config, world, batch)
                out[measure].append({"engine": name, **row})
                gc.collect()
    finally:
        if folder is not None and world.first:
            shutil.rmtree(folder, ignore_errors=True)
        world.close()
    return out


def _check(config: Config, world: World, batch: int) -> None:
    section = config.engine
    if section.precision == "float16":
        raise UserError("A bare loop has no loss scaler: measure with engine.precision=float32 or bfloat16.")
    if section.offload or section.replicas > 1:
        raise UserError("Only plain FSDP2 is measured: leave engine.offload and engine.replicas out.")
    check_engine(config, world, batch, 1)
    if section.kind == "deepspeed" and offloads_optimizer(deepspeed_settings(config, world, batch)):
        raise UserError("Offloaded optimisers are not measured: choose --engines without them, e.g. zero2,zero3.")


def _stepper(engine: Engine, batches: Iterable[Batch], momentum: float) -> Callable[[], float]:
    """A function that takes a step and returns its seconds."""
    endless = itertools.cycle(batches)
    for group in engine.optimizer.param_groups:
        group["lr"] = LR

    def take() -> float:
        start = time.perf_counter()
        engine.forward_backward(next(endless), 0)
        if engine.step(ADVERSARY_LR):
            engine.after_step(momentum)
        if engine.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return take


def _saving(config: Config, world: World, batch: int, steps: int, run: Path) -> dict[str, Any]:
    """Steps beside a checkpoint that is being written and as many without one, in turns."""
    engine = build_engine(config, fresh_method(config, world), world, batch, 1)
    take = _stepper(engine, fixed_batches(config, world, batch), config.method.teacher.momentum)
    checkpoints = Checkpoints(run, keep=1, world=world)
    for _ in range(3):
        take()
    beside: list[float] = []
    without: list[float] = []
    stalls: list[float] = []
    writes: list[float] = []
    saves = 0
    while len(beside) < steps:
        saves += 1
        world.gather_host(None)
        start = time.perf_counter()
        checkpoints.save(engine.pieces(), {"step": saves})
        begun = time.perf_counter()
        stalls.append(begun - start)
        count = 0
        while True:
            seconds = take()
            # Rank 0 looks, outside of what is timed; a step that outlasts the writing is not counted.
            if world.gather_host((run / "checkpoints" / f"step-{saves:08d}").exists())[0]:
                break
            beside.append(seconds)
            count += 1
        writes.append(time.perf_counter() - begun)
        checkpoints.finish()
        if saves == 3 and not beside:
            raise UserError("A checkpoint is written within one step; choose a larger model, e.g. model.size=small.")
        without += [take() for _ in range(max(count, 1))]
    start = time.perf_counter()
    checkpoints.save(engine.pieces(), {"step": saves + 1})
    checkpoints.finish()
    alone = time.perf_counter() - start
    checkpoints.close()
    written = checkpoints.folders()[-1]
    fast, slow = statistics.median(without), statistics.median(beside)
    return {
        "without": fast, "beside": slow, "ratio": slow / fast, "steps": [len(without), len(beside)], "saves": saves,
        "without_quartiles": _quartiles(without), "beside_quartiles": _quartiles(beside),
        "stall": statistics.median(stalls), "write": statistics.median(writes), "write_alone": alone,
        "bytes": sum(path.stat().st_size for path in written.iterdir()),
    }  # fmt: skip


def _quartiles(values: Sequence[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
    return [low, high]


def print_engines_tables(result: dict[str, Any]) -> None:
    """Print what `bench_engines` returned, a table for each measurement."""
    versions = f"torch {result['torch']}, " + (f"DeepSpeed {result['deepspeed']}, " if "deepspeed" in result else "")
    print(f"{result['hardware']}, {versions}Python {result['python']}, {result['date']}")
    print(" ".join([result["recipe"], *result["overrides"]]) + f", {result['batch']} images per step and rank")
    rows = result.get("overhead", ())
    if rows:
        print(
            f"\n{'overhead':12} {'steps':>6} {'ours ms':>8} {'bare ms':>8} {'ratio':>6} {'quartiles':>13} "
            f"{'CPU':>6} {'quartiles':>13}  "
            "losses differ by"
        )
    for row in rows:
        print(
            f"{Path(row['engine']).stem:12} {row['steps']:>6} {1e3 * row['ours']:>8.1f} {1e3 * row['bare']:>8.1f} "
            f"{row['ratio']:>6.3f} {_span(row['ratio_quartiles']):>13} "
            f"{row['cpu_ratio']:>6.3f} {_span(row['cpu_ratio_quartiles']):>13}  {row['losses_differ_by']:.0e}"
        )
    rows = result.get("saving", ())
    if rows:
        print(
            f"\n{'saving':12} {'steps':>6} {'without s':>9} {'beside s':>9} {'ratio':>6} {'stall s':>8} {'write s':>8} "
            f"{'alone s':>8} {'MB':>6}"
        )
    for row in rows:
        print(
            f"{Path(row['engine']).stem:12} {row['steps'][1]:>6} {row['without']:>9.3f} {row['beside']:>9.3f} "
            f"{row['ratio']:>6.2f} {row['stall']:>8.3f} {row['write']:>8.2f} {row['write_alone']:>8.2f} "
            f"{row['bytes'] / 1e6:>6.0f}"
        )
    rows = result.get("bytes", ())
    if rows:
        names = (*STATES, "states", "share", "gathered", "buckets", "rest", "grown_before_gradients")
        print("\n" + f"{'MB a rank':12}" + "".join(f" {name.partition('_')[0]:>9}" for name in names) + "  ratio")
    for row in rows:
        print(
            f"{Path(row['engine']).stem:12}"
            + "".join(f" {row[name] / 1e6:>9.1f}" for name in names)
            + f"  {row['ratio']:.3f}"
        )


def _span(quartiles: Sequence[float]) -> str:
    return "–".join(f"{value:.3f}" for value in quartiles)
