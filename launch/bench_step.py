"""What a whole training step costs: recipes and their variants, interleaved in one run."""

from __future__ import annotations

import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Sequence
from datetime import date
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .config import load_config, refuse_task
from .errors import UserError


def variants(recipes: Sequence[str], overrides: Sequence[str], vary: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Recipe and overrides of every case: each recipe with every combination of the `key=a,b` in `vary`.

    Raises UserError for a `vary` without a key or with a single value.
    """
    axes = []
    for item in vary:
        key, _, values = item.partition("=")
        choices = re.split(r",(?![^\[]*\])", values)  # commas of a list part nothing
        if not key or len(choices) < 2:
            raise UserError(f"--vary {item} compares nothing; write key=a,b, e.g. --vary model.relative.terms=none,k.")
        axes.append([f"{key}={choice}" for choice in choices])
    return [(recipe, [*overrides, *combination]) for recipe in recipes for combination in product(*axes)]


def bench_step(
    cases: Sequence[tuple[str, list[str]]], batch: int | None = None, steps: int = 3, rounds: int = 5
) -> dict[str, Any]:
    """Time whole steps (forward, backward, optimiser, teacher or adversary) of `(recipe, overrides)` cases in turn.

    Each case is a process of its own that waits while the others run; `batch` is images per step, `steps` those of
    one turn. Returns machine, versions, date and `rows` with images per second (median, least and most of the rounds)
    and peak memory in bytes: allocated on a GPU, else what the process grew by. Raises UserError for a case that
    cannot be built.
    """
    for recipe, overrides in cases:  # before the first is built: that takes seconds
        config = load_config(recipe, overrides)
        if config.method.kind != "classify":
            refuse_task(config, "`elsewhere bench step`")
    context = multiprocessing.get_context("spawn")
    children, rows = [], []
    try:
        for recipe, overrides in cases:
            ours, theirs = context.Pipe()
            child = context.Process(target=_run, args=(theirs, recipe, overrides, batch), daemon=True)
            child.start()
            children.append((child, ours))
            theirs.close()
            about = _ask(ours)  # one after the other, so that none is built while another is measured
            rows.append({"recipe": recipe, "overrides": overrides, **about, "rates": []})
        for _ in range(rounds):
            for row, (_, pipe) in zip(rows, children, strict=True):
                row["rates"].append(row["batch"] * steps / _ask(pipe, steps))
        for row, (_, pipe) in zip(rows, children, strict=True):
            rates = row.pop("rates")
            row |= {"images_per_second": statistics.median(rates), "least": min(rates), "most": max(rates)}
            row["peak_bytes"] = _ask(pipe, 0)
    finally:
        for child, pipe in children:
            pipe.close()
            child.join(10)
            child.kill()
    import torch

    hardware = rows[0]["hardware"]
    return {"hardware": hardware, "torch": torch.__version__, "python": platform.python_version(),
            "date": date.today().isoformat(), "steps": steps, "rounds": rounds, "rows": rows}  # fmt: skip


def _ask(pipe: Connection, steps: int | None = None) -> Any:
    """Send a child a number of steps (0: for its memory) and wait for its answer."""
    try:
        if steps is not None:
            pipe.send(steps)
        answer = pipe.recv()
    except (EOFError, ConnectionError) as error:  # a broken pipe, too: the command line would end with status 0
        raise UserError("A measured process ended early, likely for want of memory; lower --batch.") from error
    if isinstance(answer, UserError):
        raise answer
    return answer


def _run(pipe: Connection, recipe: str, overrides: list[str], batch: int | None) -> None:
    """The child: build the case, then take as many steps as it is asked for and say how long they took."""
    try:
        step, about, memory = _build(recipe, overrides, batch)
    except UserError as error:
        pipe.send(error)
        return
    pipe.send(about)
    while True:
        try:
            steps = pipe.recv()
        except EOFError:
            return
        pipe.send(step(steps) if steps else memory())


def _build(recipe: str, overrides: list[str], batch: int | None):
    """The function that takes n steps and returns their seconds, what is to say about it, and its peak memory."""
    import numpy as np
    import torch

    from ..data.batch import Batch
    from .build import build_masks, build_method, choose_kernels
    from .engine.choose import build_engine
    from .engine.precision import choose_precision
    from .monitor import hardware
    from .world import join

    config = load_config(recipe, overrides)
    world = join(config.engine.device, group=config.engine.kind != "ddp")
    cuda = world.device.type == "cuda"
    batch = batch or config.loader.micro_batch or (128 if cuda else 8)
    before = _resident("VmRSS")
    method = build_method(config)
    choose_kernels(method, world.device)  # which says what cannot be had
    masks = build_masks(config, method.encoder.grid)
    method.compute_dtype, _ = choose_precision(config.engine.precision, world.device)
    # Batches here are of one micro-batch, whatever the recipe's.
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"batch_size": batch})})
    engine = build_engine(config, method, world, batch, 1)
    for group in engine.optimizer.param_groups:  # a rate at which nothing runs away, whatever the recipe's
        group["lr"] = 1e-6
    ids = np.arange(batch)
    views = (config.data.views,) if config.data.views > 1 else ()
    shape = (batch, *views, config.model.channels, *config.model.image_size)
    made = masks(config.seed, 0, 0, ids) if masks else None
    drawn = {name: getattr(made, name, None) for name in ("context", "targets", "visible")}
    parts: dict[str, Any] = {name: torch.from_numpy(part) for name, part in drawn.items() if part is not None}
    data = Batch(
        images=torch.randint(0, 256, shape, dtype=torch.uint8), sample_ids=torch.from_numpy(ids),
        labels=torch.zeros(batch, dtype=torch.int64), epochs=torch.zeros(batch, dtype=torch.int64), step=0, **parts,
    ).to(world.device)  # fmt: skip

    def take(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            engine.forward_backward(data, 0)
            if engine.step(1e-6):
                engine.after_step(0.99)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def memory() -> int:
        if cuda:
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - before

    take(2)  # the first steps pay for caches and the optimiser's state
    dtype = str(method.compute_dtype).removeprefix("torch.")
    return take, {"batch": batch, "precision": dtype, "hardware": hardware(world)}, memory


def _resident(field: str) -> int:
    """Bytes in memory of this process: `VmRSS` now, `VmHWM` at most (getrusage's counts the parent's before exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def print_step_table(result: dict[str, Any]) -> None:
    """Print what `bench_step` returned, a line for each case, with the ratio to the first."""
    rows = result["rows"]
    print(f"{result['hardware']}, torch {result['torch']}, Python {result['python']}, {result['date']}")
    names = [" ".join([row["recipe"], *row["overrides"]]) for row in rows]
    width = max(map(len, names))
    print(f"{'case':{width}} {'batch':>5} {'images/s':>9} {'least–most':>17} {'ratio':>6} {'peak GB':>8}  precision")
    for name, row in zip(names, rows, strict=True):
        spread = f"{row['least']:,.1f}–{row['most']:,.1f}"
        ratio = row["images_per_second"] / rows[0]["images_per_second"]
        print(
            f"{name:{width}} {row['batch']:>5} {row['images_per_second']:>9,.1f} {spread:>17} {ratio:>6.2f} "
            f"{row['peak_bytes'] / 1e9:>8.2f}  {row['precision']}"
        )
