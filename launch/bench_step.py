"""What a whole training step costs: recipes and their variants, interleaved in one run."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import re
import signal
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from datetime import date
from itertools import product
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .errors import UserError
from .nodes.place import find_place

# What `--vary` calls some settings; `engine` is not one but several (`engine_settings`).
SHORT = {
    "compile": "engine.compile", "checkpointing": "engine.activation_checkpointing", "precision": "engine.precision",
}  # fmt: skip


def variants(recipes: Sequence[str], overrides: Sequence[str], vary: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Recipe and overrides of every case: each recipe with every combination of the `key=a,b` in `vary`.

    A key may be one of `SHORT`, or `engine`, whose values are ddp, fsdp and settings of DeepSpeed. Raises UserError for
    a `vary` without a key or with a single value, and for an engine that is not there.
    """
    axes = []
    for item in vary:
        key, _, values = item.partition("=")
        choices = re.split(r",(?![^\[]*\])", values)  # commas of a list part nothing
        if not key or len(choices) < 2:
            raise UserError(f"--vary {item} compares nothing; write key=a,b, e.g. --vary model.relative.terms=none,k.")
        axes.append([_settings(key, choice) for choice in choices])
    return [
        (recipe, [*overrides, *(setting for chosen in combination for setting in chosen)])
        for recipe in recipes
        for combination in product(*axes)
    ]


def _settings(key: str, value: str) -> list[str]:
    if key == "engine":
        from .bench_engines import engine_settings
        from .engine.ds_settings import find_settings

        if value not in ("ddp", "fsdp"):
            find_settings(value)  # one that is misspelt ends the comparison before it begins
        return engine_settings(value)
    return [f"{SHORT.get(key, key)}={value}"]


def bench_step(
    cases: Sequence[tuple[str, list[str]]],
    batch: int | None = None,
    steps: int | None = None,
    rounds: int = 5,
    real: bool = False,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Time whole steps of `(recipe, overrides)` cases in turns, and in turns of their own the parts of a step.

    Each case is a process of its own that waits while the others run; `batch` is images per step, `steps` those of one
    turn (3, on a GPU `monitor.log_every`). Batches are random ones in memory, or with `real` come from the loader of
    the case's data. The one case of a run with `trace` is also profiled into that file. Returns machine, versions,
    date, load and `rows`; of a case that cannot be built or ends early, `failure` says why in place of figures. Raises
    UserError for settings that are not possible, and where no case is left.
    """
    if find_place().size > 1:
        raise UserError(
            "`elsewhere bench step` measures one process: start it without a launcher, or measure ranks by `elsewhere "
            "bench scaling RECIPE --ranks 1,2,4`, which starts them itself."
        )
    if trace is not None and len(cases) > 1:
        raise UserError(f"--profile traces one case and these are {len(cases)}: name one recipe, without --vary.")
    from .evaluate.task_config import any_config

    configs = [any_config(*case) for case in cases]  # before the first is built: that takes seconds
    if real and any(not config.data.path for config in configs):
        raise UserError("--data without a path takes the recipe's own, which has none: write --data FOLDER.")
    load, rows = os.getloadavg(), [{"recipe": recipe, "overrides": overrides} for recipe, overrides in cases]
    children: list[_Case] = []
    try:
        for row, (recipe, overrides) in zip(rows, cases, strict=True):
            child = _Case(recipe, overrides, batch, real)
            children.append(child)
            row |= child.answer() or {}  # one after the other, so that none is built while another is measured
        turns: list[list[dict[str, Any]]] = [[] for _ in cases]
        for number in range(rounds):
            for i in range(len(cases)) if number % 2 == 0 else reversed(range(len(cases))):
                found = children[i].ask("turn", steps or rows[i].get("turn"))
                turns[i] += [found] if found else []
        for row, child, taken in zip(rows, children, turns, strict=True):
            found = child.ask("figures", trace)
            if found:
                row |= found | _summary(row, taken, steps or row["turn"], found["flops_per_image"])
            row["failure"] = child.failure
    finally:
        for child in children:
            child.close()
    if all(row["failure"] for row in rows):
        raise UserError(rows[0]["failure"])
    import torch

    from .host import processor

    measured = next(row for row in rows if not row["failure"])
    facts = {name: measured[name] for name in ("hardware", "threads")}
    for row in rows:
        for name in ("hardware", "threads", "turn"):
            row.pop(name, None)
    return {
        **facts, "processor": processor(), "torch": torch.__version__, "python": platform.python_version(),
        "date": date.today().isoformat(), "load": [load[0], os.getloadavg()[0]],
        "steps": steps or measured["steps"], "rounds": rounds,
        "real_data": real, "rows": rows,
    }  # fmt: skip


def _summary(row: dict[str, Any], turns: list[dict[str, Any]], steps: int, flops: float) -> dict[str, Any]:
    """The figures of a case of all its turns."""
    rates = [row["batch"] * steps / turn["seconds"] for turn in turns]
    by_whole = sorted(turns, key=lambda turn: sum(turn["parts"].values()))
    return {
        "steps": steps, "images_per_second": statistics.median(rates), "least": min(rates), "most": max(rates),
        "milliseconds": 1e3 * row["batch"] / statistics.median(rates),
        # Of one turn, the middle one: medians of parts would not add up.
        "parts": by_whole[(len(turns) - 1) // 2]["parts"],
        "matrix_rate": statistics.median(turn["matrix_rate"] for turn in turns),
        "mfu": statistics.median(
            rate * flops / turn["matrix_rate"] for rate, turn in zip(rates, turns, strict=True)
        ),
    }  # fmt: skip


class _Case:
    """A process that takes the steps of one case; after a failure it is asked no more, and answers None."""

    def __init__(self, recipe: str, overrides: list[str], batch: int | None, real: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # No daemon: those may have no loader processes. It ends when its pipe is closed.
        self._process = context.Process(target=_run, args=(theirs, recipe, overrides, batch, real))
        with _deaf():
            self._process.start()
        theirs.close()
        self.failure: str | None = None

    def ask(self, what: str, about: Any = None) -> dict[str, Any] | None:
        if self.failure is not None:
            return None
        with contextlib.suppress(ConnectionError):  # its end of the pipe says so again, after what it last wrote there
            self._pipe.send((what, about))
        return self.answer()

    def answer(self) -> dict[str, Any] | None:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"status {code}"
            killed = code == -signal.SIGKILL
            why = ", likely for want of memory; lower --batch." if killed else "; what it printed says why."
            answer = f"The measured process ended early with {how}{why}"
        if isinstance(answer, str):
            self.failure = answer
            return None
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that start here do not hear Ctrl-C, which a terminal sends to them as well: we end, and they then."""
    resource_tracker.ensure_running()  # which lets signals through again where it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # not ignored: one that comes meanwhile counts
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(pipe: Connection, recipe: str, overrides: list[str], batch: int | None, real: bool) -> None:
    """The child: build the case, then do what it is asked for; a sentence is why it cannot."""
    from ..data.images import DataError
    from ..kernels.dispatch import said
    from .bench_training import Training

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # of names that torch itself uses
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        training = None
        try:
            training = Training(recipe, overrides, batch, real, Path(folder))
            pipe.send(training.about())
            while True:
                what, about = pipe.recv()
                pipe.send(training.turn(about) if what == "turn" else _figures(training, about))
        except (EOFError, BrokenPipeError):
            pass  # all is measured, or nothing more is wanted
        except (UserError, DataError) as error:
            pipe.send(str(error))
        except Exception as error:  # a compiler's, a driver's, or memory's: the other cases go on
            pipe.send(said(error))
        finally:
            if training is not None:
                training.close()


def _figures(training: Any, trace: Path | None) -> dict[str, Any]:
    """What is measured once, after the turns, which it would disturb."""
    found = {"peak_bytes": training.memory(), **training.flops()}
    if trace is not None:
        from .bench_profile import profile_steps

        found["profile"] = profile_steps(training, trace)
    return found
