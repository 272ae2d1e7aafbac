"""What `elsewhere bench step` prints: figures of whole steps, and of their parts."""

from __future__ import annotations

from typing import Any

from .bench_flops import AGREE
from .bench_profile import print_profile
from .bench_ranges import PARTS
from .bench_step import SHORT

_LONG = {setting: short for short, setting in SHORT.items()}
_LONG |= {"engine.kind": "engine", "engine.deepspeed": "engine"}


def case_names(rows: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A short name for each row, its recipe and the settings that not all have; and those that all have."""
    shared = [one for one in rows[0]["overrides"] if all(one in row["overrides"] for row in rows)]
    names = []
    for row in rows:
        own = [item.partition("=") for item in row["overrides"] if item not in shared]
        if any(key == "engine.deepspeed" for key, _, _ in own):
            own = [one for one in own if one[0] != "engine.kind"]
        names.append(" ".join([row["recipe"], *(f"{_LONG.get(key, key)}={value}" for key, _, value in own)]))
    return names, shared


def print_step_table(result: dict[str, Any]) -> None:
    """Print what `bench_step` returned: a line for each case, with the ratio to the first, and its parts below."""
    rows = result["rows"]
    names, shared = case_names(rows)
    width = max(4, *map(len, names))
    threads, (before, after) = result["threads"], result["load"]
    print(
        f"{result['hardware']}, {result['processor']}, {threads} thread{'s' * (threads > 1)}, torch {result['torch']}, "
        f"Python {result['python']}, {result['date']}, load average {before:.1f} to {after:.1f}"
    )
    print(
        f"Rounds: {result['rounds']}, steps of each case in a turn: {result['steps']}, batches: "
        + ("of the loader" if result["real_data"] else "random ones in memory")
        + (f"; all with {' '.join(shared)}" if shared else "")
    )
    print(
        f"\n{'case':{width}} {'batch':>5} {'images/s':>9} {'least–most':>17} {'ratio':>6} {'ms/step':>9} {'MFU':>6} "
        f"{'GFLOP/image':>11} {'peak GB':>8}  precision"
    )
    measured = [(name, row) for name, row in zip(names, rows, strict=True) if not row["failure"]]
    for name, row in zip(names, rows, strict=True):
        if row["failure"]:
            print(f"{name:{width}} not measured: {row['failure']}")
            continue
        spread = f"{row['least']:,.1f}–{row['most']:,.1f}"
        ratio = row["images_per_second"] / measured[0][1]["images_per_second"]
        print(
            f"{name:{width}} {row['batch']:>5} {row['images_per_second']:>9,.1f} {spread:>17} {ratio:>6.2f} "
            f"{row['milliseconds']:>9,.1f} {row['mfu']:>6.1%} {row['flops_per_image'] / 1e9:>11.4g} "
            f"{row['peak_bytes'] / 1e9:>8.2f}  {row['precision']}"
        )
    _print_parts(result, measured, width)
    rates = {row["precision"]: row["matrix_rate"] for _, row in measured}
    listed = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {precision}" for precision, rate in rates.items())
    print(f"\nMFU: operations by the method's formula, of what a large matrix product reached in turn, {listed}.")
    if any(row["mfu"] > 1 for _, row in measured):
        print(
            "Over 100 %: this machine multiplies large matrices more slowly in that precision than what a step takes."
        )
    for name, row in measured:
        counted, formula = row["flops_counted"], row["flops_by_formula"]
        if abs(counted / formula - 1) > AGREE:
            why = " (activation checkpointing computes again)" if row["recomputes"] else ""
            print(f"{name}: {counted / 1e9:.4g} GFLOP/image counted in a step, {formula / 1e9:.4g} by formula{why}.")
    for _, row in measured:
        if "profile" in row:
            print_profile(row["profile"])


def _print_parts(result: dict[str, Any], measured: list[tuple[str, dict[str, Any]]], width: int) -> None:
    """Milliseconds of the parts of a step, with a column for each that some case has."""
    shown = [part for part in PARTS if any(part in row["parts"] for _, row in measured)]
    print("\nMilliseconds of a step and its parts, in turns of their own")
    print(f"{'case':{width}} {'whole':>9}" + "".join(f" {part:>9}" for part in shown))
    for name, row in measured:
        cells = [row["parts"].get(part) for part in shown]
        texts = ["–" if cell is None else f"{cell:,.2f}" for cell in cells]
        if not result["real_data"]:
            texts[shown.index("data wait")] = "in memory"
        print(f"{name:{width}} {sum(row['parts'].values()):>9,.1f}" + "".join(f" {text:>9}" for text in texts))
