"""A figure of a report as SVG: axes, and a line a run with the envelope of what was averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from .panels import Panel, is_log
from .read import Curve, Run, finite

POINTS = 240  # of a line; more are averaged
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 230, 58, 14, 12, 40  # in units of the view box


@dataclass
class Line:
    """A curve as it is drawn: points `[n]`, and the bounds of each."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    averaged: int = 1  # values to a point
    whiskers: bool = False  # the bounds are a spread that was measured


def thin(curve: Curve, points: int = POINTS) -> Line:
    """At most `points` means of neighbours, each with the smallest and the largest of them; NaN where none is finite.

    Nothing is averaged where the curve has no more points than that.
    """
    count = len(curve.x)
    y = np.where(np.isfinite(curve.y), curve.y, np.nan)
    if count <= points:
        whiskers = curve.low is not None and curve.high is not None
        low, high = (curve.low, curve.high) if whiskers else (y, y)
        return Line(curve.x.astype(float), y, low, high, 1, whiskers)  # pyright: ignore[reportArgumentType]
    edges = np.linspace(0, count, points + 1).round().astype(int)
    starts = edges[:-1]
    known = np.isfinite(y)
    many = np.add.reduceat(known, starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, y, 0.0), starts) / np.where(many, many, np.nan)
    low = np.minimum.reduceat(np.where(known, y, np.inf), starts)
    high = np.maximum.reduceat(np.where(known, y, -np.inf), starts)
    low, high = (np.where(many > 0, bound, np.nan) for bound in (low, high))
    x = np.add.reduceat(curve.x.astype(float), starts) / np.diff(edges)
    return Line(x, mean, low, high, math.ceil(count / points))


class Axis:
    """A range of values on a range of the view box, with round ticks; logarithmic where `log`."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False, twos: bool = False):
        self.log, self.twos = log, twos
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            room = abs(high) * 0.1 or 1.0
            low, high = low - (0.5 if log else room), high + (0.5 if log else room)
        self.low, self.high, self.start, self.end = low, high, start, end

    def padded(self, share: float) -> Axis:
        room = (self.high - self.low) * share
        self.low, self.high = self.low - room, self.high + room
        return self

    def at(self, values: np.ndarray) -> np.ndarray:
        values = np.asarray(values, dtype=float)
        if self.log:
            with np.errstate(invalid="ignore", divide="ignore"):
                values = np.log10(values)
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within the range, or powers of two."""
        if self.log and self.twos:
            powers = range(math.ceil(self.low / math.log10(2)), math.floor(self.high / math.log10(2)) + 1)
            return [2.0**power for power in powers[:: math.ceil(len(powers) / about) or 1]]
        if self.log:
            for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [f * 10.0**e for e in range(math.floor(self.low), math.ceil(self.high) + 1) for f in factors]
                found = [value for value in found if self.low <= math.log10(value) <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / (about + 2))]
            return _round_values(10.0**self.low, 10.0**self.high, about)
        return _round_values(self.low, self.high, about)


def _round_values(low: float, high: float, about: int) -> list[float]:
    """About so many multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * f for f in (1, 2, 2.5, 5, 10) if unit * f >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float, digits: int = 4) -> str:
    """A number as axes and tables have it: 1.5e-4, 0.2635, 12.3, 1,234."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e7):
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.0f}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Points as an SVG path that is broken where a value is not finite."""
    parts, pen = [], "M"
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(b):
            parts.append(f"{pen}{a:.1f} {b:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def scaled(curve: Curve, panel: Panel, per_step: float = 1.0) -> Curve:
    """The curve in the panel's unit, over steps times `per_step`."""
    bounds = (None if bound is None else bound * panel.factor for bound in (curve.low, curve.high))
    return Curve(curve.x * per_step, curve.y * panel.factor, *bounds)


def figure(
    panel: Panel, runs: Sequence[Run], name: str, over: str, per_step: Sequence[float], wide: bool = False
) -> tuple[str, dict[str, Any]]:
    """The SVG of a panel over all runs, and the points that its pointer shows.

    `over` is the x axis's title, `per_step` what a step of each run is on it.
    """
    width = 940 if wide else 460
    lines = {
        i: thin(scaled(run.curves[panel.key], panel, per_step[i]))
        for i, run in enumerate(runs)
        if panel.key in run.curves and finite(run.curves[panel.key].y).size
    }
    log = is_log(panel.scale, [line.low for line in lines.values()] + [line.high for line in lines.values()])
    values = finite(np.concatenate([part for line in lines.values() for part in (line.low, line.y, line.high)]))
    last = max(float(line.x[-1]) for line in lines.values())
    across = Axis(min(0.0, min(float(line.x[0]) for line in lines.values())), max(last, 1e-9), LEFT, width - RIGHT)
    up = Axis(float(values.min()), float(values.max()), HEIGHT - BOTTOM, TOP, log, panel.scale == "powers of two")
    up.padded(0.04)
    parts = [*_axes(across, up, over, width)]
    for i, line in lines.items():
        parts.append(_line(i, line, across, up))
        if panel.key in ("loss", "loss_scale"):
            parts += _marks(i, runs[i], across, up, per_step[i], panel.key)
    title = f"{panel.title}{f', {panel.unit}' if panel.unit else ''}"
    svg = (
        f'<svg id="{name}" class="plot" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)} of '
        f'{escape(", ".join(runs[i].name for i in lines))}">{"".join(parts)}<line class="pointer" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/></svg>'
    )
    points = {
        "x": [float(f"{value:.8g}") for value in (across.low, across.high, across.start / width, across.end / width)],
        "runs": {i: _points(line) for i, line in lines.items()},
    }
    return svg, points


def _axes(across: Axis, up: Axis, over: str, width: int) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = []
    for value in up.ticks():
        y = float(up.at(np.array(value)))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(value)}</text>')
    for value in across.ticks(8 if width > 500 else 5):
        x = float(across.at(np.array(value)))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{floor}" y2="{floor}"/>')
    parts.append(
        f'<text class="tick" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{over}</text>'
    )
    return parts


def _line(i: int, line: Line, across: Axis, up: Axis) -> str:
    x, y = across.at(line.x), up.at(line.y)
    parts = []
    if line.averaged > 1:
        low, high = up.at(line.low), up.at(line.high)
        good = np.isfinite(low) & np.isfinite(high)
        if good.any():
            round_trip = _path(np.concatenate([x[good], x[good][::-1]]), np.concatenate([high[good], low[good][::-1]]))
            parts.append(f'<path class="band" d="{round_trip}Z"/>')
    elif line.whiskers:
        low, high = up.at(np.maximum(line.low, 10.0**up.low) if up.log else line.low), up.at(line.high)
        bars = (f"M{a:.1f} {b:.1f}V{c:.1f}" for a, b, c in zip(x, low, high, strict=True) if np.isfinite(b + c))
        parts.append(f'<path class="whisker" d="{"".join(bars)}"/>')
    parts.append(f'<path class="line" d="{_path(x, y)}"/>')
    if len(x) <= 30:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>' for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    return f'<g class="run r{i}">{"".join(parts)}</g>'


def _marks(i: int, run: Run, across: Axis, up: Axis, per_step: float, key: str) -> list[str]:
    """Where a run went on, as dotted lines on the loss, or where it skipped a step, as crosses on the loss scale."""
    floor = up.start
    if key == "loss":
        places = across.at(np.asarray(run.resumed, dtype=float) * per_step)
        return [
            f'<line class="resumed r{i}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{floor}"><title>{escape(run.name)} '
            f"went on after step {step:,}</title></line>"
            for x, step in zip(places.tolist(), run.resumed, strict=True)
        ]
    places = sorted({round(x) for x in across.at((np.asarray(run.skipped, dtype=float) + 1) * per_step).tolist()})
    return [f'<path class="skipped r{i}" d="M{x - 3} {floor - 7}l6 6m0 -6l-6 6"/>' for x in places]


def _points(line: Line) -> list[Any]:
    """x, y, and the bounds where there are some, shortened; null for what is not finite."""

    def listed(values: np.ndarray, digits: int) -> list[float | None]:
        return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in values.tolist()]

    points: list[Any] = [listed(line.x, 8), listed(line.y, 5)]
    if line.averaged > 1 or line.whiskers:
        points += [listed(line.low, 4), listed(line.high, 4)]
    return points
