"""The figures that a run came to, for the table at a report's top."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .figure import short
from .panels import SECTIONS
from .read import Run, finite, planned

NOTE = (
    "Final loss: the mean of the last tenth of the steps, of 100 at most. On held-out images: the first figure → the "
    "last, ± half of the spread that was measured with it. Medians are over readings, one in monitor.log_every steps."
)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Titles and a row a run: steps, loss, every figure on held-out images (first to last), speed, features, trouble.

    A column that no run has is left out; a figure that this one lacks is an empty cell.
    """
    columns: list[tuple[str, list[str]]] = [
        ("steps", [_steps(run) for run in runs]),
        ("epochs", [short(run.steps * run.epochs_per_step, 3) if run.epochs_per_step else "" for run in runs]),
        ("final loss", [_loss(run) for run in runs]),
    ]
    held_out = next(section for section in SECTIONS if section.title == "Held-out images")
    for panel in held_out.panels:
        if panel.key.removeprefix("probe/") not in (
            "box_APs",
            "box_APm",
            "box_APl",
            "mask_APs",
            "mask_APm",
            "mask_APl",
        ):
            title = panel.title + (f", {panel.unit}" if panel.unit else "")
            columns.append((title, [_first_to_last(run, panel.key, panel.factor) for run in runs]))
    columns += [
        ("effective rank", [_last(run, "collapse/rank_me") for run in runs]),
        ("attack adds to loss", [_last(run, "adversary/loss_gain") for run in runs]),
        ("images/s, median", [_median(run, "images_per_s") for run in runs]),
        ("waiting for data, %", [_median(run, "data_wait", 100) for run in runs]),
        ("MFU, %", [_median(run, "mfu", 100) for run in runs]),
        ("peak memory, GB", [_largest(run, "memory_gb") for run in runs]),
        ("skipped steps", [f"{len(run.skipped):,}" if run.skipped else "" for run in runs]),
        ("unreadable images", [_sum(run, "skipped_images") for run in runs]),
        ("went on after step", [_some(run.resumed) for run in runs]),
        ("trouble", [_trouble(run) for run in runs]),
    ]
    kept = [(title, cells) for title, cells in columns if any(cells)]
    return [title for title, _ in kept], [[cells[i] for _, cells in kept] for i in range(len(runs))]


def _steps(run: Run) -> str:
    of = planned(run)
    return f"{run.steps:,} of {of:,}" if of and run.steps < of else f"{run.steps:,}"


def _loss(run: Run) -> str:
    curve = run.curves.get("loss")
    if curve is None:
        return ""
    return short(float(curve.y[-min(100, max(1, len(curve.y) // 10)) :].mean()))


def _values(run: Run, key: str) -> np.ndarray:
    return finite(run.curves[key].y) if key in run.curves else np.empty(0)


def _first_to_last(run: Run, key: str, factor: float) -> str:
    values = factor * _values(run, key)
    if not values.size:
        return ""
    before = f"{short(float(values[0]), 3)} → " if values.size > 1 else ""
    curve = run.curves[key]
    if curve.low is None or curve.high is None:
        return before + short(float(values[-1]))
    half = factor * float(curve.high[-1] - curve.low[-1]) / 2
    return f"{before}{short(float(values[-1]))} ± {short(half, 2)}"


def _last(run: Run, key: str) -> str:
    values = _values(run, key)
    return short(float(values[-1])) if values.size else ""


def _median(run: Run, key: str, factor: float = 1.0) -> str:
    values = _values(run, key)
    return short(factor * float(np.median(values)), 3) if values.size else ""


def _largest(run: Run, key: str) -> str:
    values = _values(run, key)
    return short(float(values.max())) if values.size else ""


def _sum(run: Run, key: str) -> str:
    total = float(_values(run, key).sum())
    return f"{total:,.0f}" if total else ""


def _some(steps: Sequence[int]) -> str:
    text = ", ".join(f"{step:,}" for step in steps[:5])
    return text + (f" and {len(steps) - 5} more" if len(steps) > 5 else "")


def _trouble(run: Run) -> str:
    found = []
    if run.diverged is not None:
        found.append(f"loss not finite at step {run.diverged:,}")
    if run.unreadable:
        found.append(f"{run.unreadable:,} unreadable line{'s' * (run.unreadable != 1)} of metrics.jsonl left out")
    return "; ".join(found)
