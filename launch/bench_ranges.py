"""The parts of a training step: which calls of loop and engine belong to them, their times, and ranges in a profile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.autograd.profiler import record_function

from ..data.batch import Batch
from .engine.base import Engine
from .monitor import Monitor

OTHER = "other"
PARTS = ("data wait", "forward", "teacher", "backward", "optimiser", "adversary", "EMA", "logging", OTHER)


class Ranges(Protocol):
    """What is told where a part of a step begins and ends; one may lie in another."""

    def enter(self, name: str) -> None: ...

    def leave(self) -> None: ...


class PartTimes:
    """Milliseconds of each part, without the parts in it, between `start` and `stop`; `OTHER` is what none claims.

    On a GPU they are those of events of the current stream, so that nothing waits for it; elsewhere those of the
    host's `clock`, in seconds. Whatever lies between two marks belongs to one part: together they are the whole.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._gpu, self._clock = device.type == "cuda", clock
        self._names: list[str] = []
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        self._names, self._marks = [OTHER], []
        self._mark()

    def enter(self, name: str) -> None:
        self._mark()
        self._names.append(name)

    def leave(self) -> None:
        self._mark()
        self._names.pop()

    def stop(self) -> dict[str, float]:
        """Milliseconds since `start` by part."""
        self._mark()
        if self._gpu:
            self._marks[-1][1].synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            spent = before.elapsed_time(after) if self._gpu else 1e3 * (after - before)
            found[name] = found.get(name, 0.0) + spent
        return found

    def _mark(self) -> None:
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self._names[-1], event))
        else:
            self._marks.append((self._names[-1], self._clock()))


class ProfiledRanges:
    """The parts as ranges of torch's profiler."""

    def __init__(self) -> None:
        self._open: list[record_function] = []

    def enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def leave(self) -> None:
        self._open.pop().__exit__(None, None, None)


@contextmanager
def told(ranges: Ranges, engine: Engine, monitor: Monitor, batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """The context in which `ranges` hears of the parts of the steps that the loop takes, on the batches that it gives.

    Logging begins where the teacher has moved: the scalars to be logged are made there. A teacher's own time is that of
    its forward; the normalising and gathering of its features stay with the method's. Nothing is slower afterwards.
    """
    logging = False

    def around(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def called(*inputs: Any, **options: Any) -> Any:
            ranges.enter(name)
            try:
                return function(*inputs, **options)
            finally:
                ranges.leave()

        return called

    def moved(momentum: float) -> None:
        nonlocal logging
        follow(momentum)
        ranges.enter("logging")
        logging = True

    def recorded(*inputs: Any) -> None:
        nonlocal logging
        if not logging:  # a skipped step moves no teacher
            ranges.enter("logging")
        try:
            record(*inputs)
        finally:
            ranges.leave()
            logging = False

    def turned(*_: Any) -> None:
        ranges.leave()
        ranges.enter("backward")

    def given() -> Iterator[Batch]:
        take = around(lambda: next(batches), "data wait")
        while True:
            yield take()

    teacher = getattr(engine.method, "teacher", None)
    follow, record = engine.after_step, monitor.record
    if isinstance(teacher, torch.nn.Module):
        follow = around(engine.after_step, "EMA")
    with ExitStack() as stack:
        replaced = [
            (engine, "forward_backward", around(engine.forward_backward, "forward")),
            (engine, "step", around(engine.step, "optimiser")),
            (engine, "after_step", moved),
            (monitor, "record", recorded),
        ]
        if engine.adversary:
            replaced.append((engine.adversary, "step", around(engine.adversary.step, "adversary")))
        for owner, name, function in replaced:
            setattr(owner, name, function)  # over the class's, until it is deleted
            stack.callback(delattr, owner, name)
        stack.callback(engine.method.register_forward_hook(turned).remove)
        if isinstance(teacher, torch.nn.Module):
            stack.callback(teacher.register_forward_pre_hook(lambda *_: ranges.enter("teacher")).remove)
            stack.callback(teacher.register_forward_hook(lambda *_: ranges.leave()).remove)
        yield given()
