"""Time and memory of a step on a device, and what the device itself reaches: the only part that differs by device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Cycles that a GPU waits before a step, about a millisecond: the host gets ahead, and its launches are not timed.
_HEAD_START = 2_000_000
_ROUNDS = 20


class Clock:
    """Events of a GPU's stream, or CPU time of this process, which others on a shared machine do not count into.

    With `wall` the time that passes, in place of CPU time: for what is compared with whole steps.
    """

    def __init__(self, device: torch.device, wall: bool = False):
        self.device, self.gpu = device, device.type == "cuda"
        self._host = time.perf_counter if wall else time.process_time
        properties = torch.cuda.get_device_properties(device) if self.gpu else None
        # Bytes that inputs have to exceed to come from memory; unknown of a CPU.
        self.cache = getattr(properties, "L2_cache_size", 64 << 20) if self.gpu else 0

    def milliseconds(self, step: Callable[[], Any]) -> float:
        """Time of one call of `step`."""
        if not self.gpu:
            start = self._host()
            step()
            return (self._host() - start) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def peak(self, step: Callable[[], Any]) -> int | None:
        """The most bytes that one call of `step` had beyond what was there; None on a CPU."""
        if not self.gpu:
            step()
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def forget(self) -> None:
        """Give back memory and compiled code of what was measured."""
        if self.gpu:
            torch.compiler.reset()
            torch.cuda.empty_cache()

    def bandwidth(self) -> float:
        """Bytes per second of a large copy, read and written."""
        source = torch.rand((1 << 30 if self.gpu else 1 << 26) // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._typical(lambda: target.copy_(source))

    def rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a large matrix product in `dtype`."""
        size = 8192 if self.gpu else 512
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self._typical(lambda: a @ b)

    def _typical(self, step: Callable[[], Any]) -> float:
        """Median seconds of a step after some that warm up."""
        return statistics.median([self.milliseconds(step) for _ in range(_ROUNDS)][3:]) / 1e3


def resident(field: str) -> int:
    """Bytes in memory of this process: `VmRSS` now, `VmHWM` at most (getrusage's counts the parent's before exec)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field))
