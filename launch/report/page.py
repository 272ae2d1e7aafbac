"""The page of a report: one HTML file that holds its figures, pictures, style and script, and fetches nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from datetime import date
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..evaluate.results import KEY
from .figure import figure, short
from .panels import Panel, Section, sections
from .read import Run
from .summary import NOTE, table

_HERE = Path(__file__).resolve().parent
# The browser itself refuses to fetch anything for such a page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_COLOURS, _DASHES = 10, ("none", "7 3", "2 3")
_FACTS = ("hardware", "versions", "engine", "precision", "kernels", "model", "data", "batch", "start", "time")


def page(runs: Sequence[Run], over: str = "step", evaluations: Sequence[list[dict[str, Any]]] = ()) -> str:
    """The report of runs as HTML; `over` is `step` or `epoch`, `evaluations` the entries of each run's results.json."""
    title = f"elsewhere: {', '.join(run.name for run in runs[:4])}" + (" and others" if len(runs) > 4 else "")
    points: dict[str, Any] = {}
    body = [_summary(runs), _evaluations(runs, evaluations)]
    body += [_section(section, panels, runs, over, points) for section, panels in sections(runs)]
    body += [_by_class(runs), _pictures(runs), _configurations(runs), _environments(runs)]
    style = (_HERE / "page.css").read_text(encoding="utf-8") + _colours(len(runs))
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    buttons = "".join(f'<button aria-pressed="true">{_key(i)}{escape(run.name)}</button>' for i, run in enumerate(runs))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body>'
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="quiet">Made {date.today().isoformat()} by elsewhere {version("elsewhere")} from metrics.jsonl and '
        "the event files. A line is the mean of neighbouring steps, its shade their smallest and largest; bars are the "
        "spread that was measured. Point at a figure for its values; click a run to hide it.</p></header>"
        f"<nav><div>{buttons}</div></nav><main>{''.join(body)}</main>"
        f'<script type="application/json" id="points">{_json(points)}</script>'
        f'<script type="application/json" id="names">{_json([run.name for run in runs])}</script>'
        f"<script>{script}</script></body></html>\n"
    )


def _json(value: Any) -> str:
    """JSON that ends no script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _colours(count: int) -> str:
    """The colour of each run, and beyond ten also its dash."""
    return "".join(
        f".r{i} {{ --run: var(--c{i % _COLOURS}); --dash: {_DASHES[i // _COLOURS % len(_DASHES)]}; }}\n"
        for i in range(count)
    )


def _key(i: int) -> str:
    return f'<span class="key" style="background: var(--c{i % _COLOURS})"></span>'


def _rows(
    titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True, marked: Sequence[bool] = ()
) -> str:
    """An HTML table, whose first cells are HTML already."""
    kind = ' class="number"' if numbers else ""
    head = "".join(f"<th{kind if i else ''}>{escape(title)}</th>" for i, title in enumerate(titles))
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest)
        differs = ' class="differs"' if marked and marked[number] else ""
        lines.append(f'<tr{differs}><td class="name">{first}</td>{cells}</tr>')
    return f'<div class="scroll"><table class="data"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _folded(title: str, body: str, opened: bool = False) -> str:
    """A part that opens and closes; `title` is HTML already."""
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{body}</details>"


def _summary(runs: Sequence[Run]) -> str:
    titles, rows = table(runs)
    named = [[_key(i) + escape(run.name), *row] for i, (run, row) in enumerate(zip(runs, rows, strict=True))]
    return "<h2>Final numbers</h2>" + _rows(["run", *titles], named) + f'<p class="quiet">{NOTE}</p>'


def _evaluations(runs: Sequence[Run], evaluations: Sequence[list[dict[str, Any]]]) -> str:
    """The best figure of every probe that `elsewhere evaluate` or `probe` left in a run's results.json."""
    rows = []
    for i, (run, entries) in enumerate(zip(runs, evaluations, strict=False)):
        for entry in entries:
            for row in entry.get("best", []):
                interval = row.get("interval")
                spread = f"{100 * interval[0]:.2f} to {100 * interval[1]:.2f}" if interval else ""
                spread = spread or (f"± {100 * row['std']:.2f} over draws" if "std" in row else "")
                rows.append([
                    _key(i) + escape(run.name), str(entry.get("probe")), str(row.get("setting")),
                    f"{100 * row['top1']:.2f}" if "top1" in row else "", spread,
                    f"{100 * row['top5']:.2f}" if "top5" in row else "", str(entry.get("encoder", "")),
                    str(entry.get("date", "")),
                ])  # fmt: skip
    if not rows:
        return ""
    titles = ["run", "probe", "setting", "top-1, %", "95 % interval", "top-5, %", "encoder", "date"]
    return "<h2>Evaluations</h2>" + _rows(titles, rows, numbers=False)


def _section(section: Section, panels: Sequence[Panel], runs: Sequence[Run], over: str, points: dict[str, Any]) -> str:
    if not panels:
        return f'<h2>{section.title}</h2><p class="quiet">{escape(section.absent)}</p>' if section.absent else ""
    per_step = [1.0 if over == "step" else run.epochs_per_step or float("nan") for run in runs]
    once = [panel for panel in panels if all(_count(run, panel.key) < 2 for run in runs)]
    said = f"Measured once in a run: {'; '.join(_once(panel, runs) for panel in once)}." if once else ""
    figures = []
    for panel in [panel for panel in panels if panel not in once]:
        name, wide = f"plot{len(points)}", panel.key == "loss"
        svg, points[name] = figure(panel, runs, name, _over(over), per_step, wide)
        without = [run.name for i, run in enumerate(runs) if i not in points[name]["runs"]]
        note = f"not in {', '.join(without)}" if without else ""
        if panel.key == "loss" and any(run.resumed for run in runs):
            note = "dotted: where a run went on from a checkpoint"
        if panel.key == "loss_scale" and any(run.skipped for run in runs):
            note = "crosses: skipped steps" + (f"; {note}" if note else "")
        title = escape(panel.title + (f", {panel.unit}" if panel.unit else ""))
        kind = ' class="wide"' if wide else ""
        figures.append(f"<figure{kind}><h3>{title}</h3>{svg}<figcaption>{escape(note)}</figcaption></figure>")
    note = f'<p class="quiet">{escape(said)}</p>' if said else ""
    return f'<h2>{section.title}</h2>{note}<div class="grid">{"".join(figures)}</div>'


def _count(run: Run, key: str) -> int:
    return len(run.curves[key].x) if key in run.curves else 0


def _once(panel: Panel, runs: Sequence[Run]) -> str:
    """The figure of each run that has it, where none has a second one to draw a line to."""
    found = [(run.name, panel.factor * float(run.curves[panel.key].y[-1])) for run in runs if _count(run, panel.key)]
    unit = f" {panel.unit}" if panel.unit else ""
    return f"{panel.title} {', '.join(f'{short(value)}{unit} ({name})' for name, value in found)}"


def _over(over: str) -> str:
    return "finished steps" if over == "step" else "epochs"


def _by_class(runs: Sequence[Run]) -> str:
    parts = []
    for i, run in enumerate(runs):
        if run.by_class:
            titles = list(dict.fromkeys(key for figures in run.by_class.values() for key in figures))
            rows = [
                [escape(name), *(_hundredths(figures.get(title)) for title in titles)]
                for name, figures in run.by_class.items()
            ]
            shown = _rows(["class", *(f"{title}, %" for title in titles)], rows)
            parts.append(_folded(f"{_key(i)}{escape(run.name)}, {len(rows)} classes", shown))
    return "<h2>Held-out images by class</h2>" + "".join(parts) if parts else ""


def _hundredths(value: Any) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else ""


def _pictures(runs: Sequence[Run]) -> str:
    tags = list(dict.fromkeys(tag for run in runs for tag in run.pictures))
    if not tags:
        return (
            '<h2>Pictures</h2><p class="quiet">There are none in the event files (monitor.tensorboard, '
            "monitor.pictures_every).</p>"
        )
    parts = []
    for tag in tags:
        figures = [
            f'<figure class="r{i}"><img alt="{escape(tag)} of {escape(run.name)} after {step} steps" '
            f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            f"<figcaption>{_key(i)}{escape(run.name)}, after {step:,} steps</figcaption></figure>"
            for i, run in enumerate(runs)
            for step, png in run.pictures.get(tag, {}).items()
        ]
        parts.append(_folded(f"<b>{escape(tag)}</b>", f'<div class="pictures">{"".join(figures)}</div>', True))
    return f"<h2>Pictures</h2>{''.join(parts)}"


def _configurations(runs: Sequence[Run]) -> str:
    parts = ["<h2>Configuration</h2>"]
    if len(runs) > 1 and all(run.config for run in runs):
        settings = [run.settings for run in runs]
        keys = list(dict.fromkeys(key for each in settings for key in each))
        differing = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
        rows = [[escape(key), *(_value(each, key) for each in settings)] for key in differing]
        titles = ["setting", *(run.name for run in runs)]
        differ = _folded(f"{len(rows)} settings differ", _rows(titles, rows, numbers=False), True)
        parts.append(differ if rows else "<p>All runs have the same settings.</p>")
    for i, run in enumerate(runs):
        if run.config:
            text = escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
            parts.append(_folded(f"{_key(i)}{escape(run.name)}, all settings", f"<pre>{text}</pre>"))
        else:
            parts.append(f'<p class="quiet">{escape(run.name)} has no config.yaml beside its metrics.</p>')
    return "".join(parts)


def _value(settings: dict[str, Any], key: str) -> str:
    if key not in settings:
        return ""
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _environments(runs: Sequence[Run]) -> str:
    """What each run said of itself when it started last; what differs first."""
    last = [run.starts[-1] if run.starts else {} for run in runs]
    facts = [key for key in _FACTS if any(key in each for each in last)]
    if not facts:
        return (
            '<h2>Environment</h2><p class="quiet">The metrics do not say where these runs trained: they were written '
            "before starts were noted there.</p>"
        )
    differs = {key: len({str(each.get(key)) for each in last}) > 1 for key in facts}
    facts.sort(key=lambda key: not differs[key])
    rows = [[escape(key), *(str(each.get(key, "")) for each in last)] for key in facts]
    titles = ["at the last start", *(run.name for run in runs)]
    parts = [_rows(titles, rows, numbers=False, marked=[differs[key] for key in facts])]
    for i, run in enumerate(runs):
        if len(run.starts) > 1:
            known = [[escape(str(each.get("time", ""))), *(str(each.get(key, "")) for key in _FACTS[:-1])]
                     for each in run.starts]  # fmt: skip
            shown = _rows(["time", *_FACTS[:-1]], known, numbers=False)
            parts.append(_folded(f"{_key(i)}{escape(run.name)}, all {len(known)} starts", shown))
    return f"<h2>Environment</h2>{_folded('machines, versions, sizes', ''.join(parts), True)}"


def evaluations_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a results.json that have figures."""
    return [entry for entry in found.get(KEY, []) if isinstance(entry, dict) and isinstance(entry.get("best"), list)]
