"""A small PNG of runs, for a README: loss, held-out figures, and what else was measured, up to four panels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .figure import scaled, short, thin
from .panels import Panel, is_log, sections
from .read import Run

_FIRST = ("loss", "probe/linear", "probe/top1", "probe/miou", "probe/box_AP", "probe/knn", "probe/mask_AP",
          "collapse/rank_me", "adversary/loss_gain", "images_per_s", "lr")  # fmt: skip


def chosen(runs: Sequence[Run], count: int = 4) -> list[Panel]:
    """The panels that say most of these runs."""
    there = {panel.key: panel for _, panels in sections(runs) for panel in panels}
    return [there[key] for key in _FIRST if key in there][:count]


def _colours() -> list[str]:
    """Those of the page's curves in a light room."""
    light = Path(__file__).with_name("page.css").read_text(encoding="utf-8").partition("prefers-color-scheme")[0]
    return re.findall(r"--c\d: (#[0-9a-f]{6})", light)


def load_matplotlib() -> tuple[Any, Any, Any]:
    """Matplotlib's ticker, its figure and the canvas for PNG; raises UserError where it is not there."""
    try:
        from matplotlib import ticker
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: python3 -m pip install matplotlib, or leave --png out.") from error
    return ticker, Figure, FigureCanvasAgg


def small_figure(runs: Sequence[Run], path: Path, over: str = "step") -> None:
    """Write the figure; needs matplotlib."""
    ticker, drawn_on, canvas = load_matplotlib()
    panels, colours = chosen(runs), _colours()
    drawn = drawn_on(figsize=(3.3 * len(panels), 2.9), dpi=150, layout="constrained")
    canvas(drawn)
    axes = drawn.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        lines = []
        for i, run in enumerate(runs):
            if panel.key not in run.curves:
                continue
            line = thin(scaled(run.curves[panel.key], panel, 1.0 if over == "step" else run.epochs_per_step or 1.0))
            lines.append(line)
            marker = "o" if len(line.x) <= 30 else None
            (drawn_line,) = axis.plot(
                line.x, line.y, color=colours[i % len(colours)], lw=1.4, marker=marker, ms=3, label=run.name
            )
            if line.averaged > 1 or line.whiskers:
                axis.fill_between(line.x, line.low, line.high, color=drawn_line.get_color(), alpha=0.16, lw=0)
        if is_log(panel.scale, [part for line in lines for part in (line.low, line.high)]):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set_title(panel.title + (f", {panel.unit}" if panel.unit else ""), fontsize=9)
        axis.set_xlabel("finished steps" if over == "step" else "epochs", fontsize=8)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(6, len(runs)), fontsize=8, frameon=False)
    drawn.savefig(path, format="png", facecolor="white")
