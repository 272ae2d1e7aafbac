"""A few steps under torch's profiler: a trace for Perfetto, and the operators that take the most time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from .bench_ranges import PARTS, ProfiledRanges
from .bench_training import Training
from .errors import UserError
from .new_file import check_new

STEPS = 3
_TOP = 12
_STEP = "step"


def new_trace(path: Path) -> Path:
    """A trace that may be written; UserError for what is there already, or a name that Perfetto does not know."""
    if not path.name.endswith((".json", ".json.gz")):
        raise UserError(f"--profile {path}: call it FILE.json.gz or FILE.json, as viewers of traces expect.")
    check_new(path, "--profile")
    return path


def profile_steps(training: Training, path: Path) -> dict[str, Any]:
    """Write a trace of `STEPS` steps with their parts as ranges to `path`, a `.json` or `.json.gz`.

    Returns `trace`, `steps` and `operators`: those with the most time of their own on the device, each with `calls` and
    `milliseconds` of a step and its `share`.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if training.gpu else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports the absence of a GPU as an error
    ranges = ProfiledRanges()
    with profile(activities=activities):  # the first start of the profiler takes long
        training.take(1)
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with record_function(_STEP):
                training.under(ranges, 1)
    profiler.export_chrome_trace(str(path))
    return {"trace": str(path), "steps": STEPS, "operators": _operators(profiler, training.gpu)}


def _operators(profiler: profile, gpu: bool) -> list[dict[str, Any]]:
    spent = {}
    for event in profiler.key_averages():
        # A kernel's time is also that of the operator which launched it.
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if event.device_type.name == "CPU" and event.key not in (*PARTS, _STEP) and own > 0:
            spent[event.key] = (event.count, own)
    total = sum(own for _, own in spent.values())
    top = sorted(spent.items(), key=lambda item: -item[1][1])[:_TOP]
    return [
        {"name": name, "calls": count / STEPS, "milliseconds": own / STEPS / 1e3, "share": own / total}
        for name, (count, own) in top
    ]


def print_profile(found: dict[str, Any]) -> None:
    """Print what `profile_steps` returned."""
    print(f"\nTrace of {found['steps']} steps: {found['trace']}; open it at https://ui.perfetto.dev (it stays local).")
    width = max(len(_short(one["name"])) for one in found["operators"])
    print(f"{'operator':{width}} {'calls':>7} {'own ms':>8} {'share':>6}   of a step")
    for one in found["operators"]:
        print(f"{_short(one['name']):{width}} {one['calls']:>7,.0f} {one['milliseconds']:>8.2f} {one['share']:>6.1%}")


def _short(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."
