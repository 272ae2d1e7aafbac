"""What the operators of the hot paths cost on this device, beside their references, FlexAttention and a ceiling."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import interpreted, said, triton_missing
from .bench_cases import VARIANTS, Case, Inputs, cases, known
from .bench_clock import Clock
from .errors import UserError

_WARM_UP, _LEAST = 2, 5  # rounds that do not count, and that do
# What a variant may be off by, relative to the reference's norm: above rounding, below what a wrong kernel gives.
_TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 2e-3}
_CPU_NOTE = (
    "This is a CPU, with one thread and few images: Triton's kernels are not timed here, and FlexAttention has no CPU "
    "backward."
)
_GPU_ONLY = ("triton", "flex")
_HEADER = ("path", "shape", "setting", "pass", "variant", "ms", "% floor", "ratio", "peak MiB", "error")
_WIDTHS = (9, 15, 10, 8, 9, 9, 7, 6, 8, 7)


def _gradients(out: Tensor, inputs: Inputs, all_used: bool = False) -> tuple[Tensor, ...]:
    """Gradients of the inputs that have one; without `all_used`, None of those that a variant makes no use of."""
    return torch.autograd.grad(out, inputs.leaves, inputs.gradient, allow_unused=not all_used)


def _run(function: Callable[..., Tensor], inputs: Inputs, all_used: bool = False) -> list[Tensor]:
    """The output of a variant and then the gradients of its inputs."""
    out = function(**inputs.given)
    return [out.detach(), *(_gradients(out, inputs, all_used) if inputs.leaves else ())]


def relative_norm(found: Tensor, expected: Tensor) -> float:
    """How far `found` is from `expected`, relative to the norm of the latter."""
    expected = expected.detach().float()
    return float((found.detach().float() - expected).norm() / expected.norm())


def compare(case: Case, name: str, small: Inputs, expected: Sequence[Tensor]) -> dict[str, float]:
    """Relative norms of a variant's errors: that of its output for `forward`, its gradients' worst for `backward`."""
    found = [relative_norm(*pair) for pair in zip(_run(case.variants[name], small, True), expected, strict=True)]
    errors = {"forward": found[0]}
    if found[1:]:
        # max() of a list with NaN depends on their order.
        errors["backward"] = max(found[1:], key=lambda error: float("inf") if error != error else error)
    return errors


def _check(case: Case, names: Sequence[str], dtype: torch.dtype) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Errors of the variants by pass, and the reasons of those that fail."""
    errors, failures = {}, {}
    small = case.draw(True)
    expected = _run(case.expected, small.exact(), True)
    for name in names:
        try:
            if name in case.unlike:
                _run(case.variants[name], small)
                continue
            errors[name] = compare(case, name, small, expected)
            for which, error in errors[name].items():
                if not error <= _TOLERANCE[dtype]:  # so that NaN fails
                    failures[name] = f"wrong {which}: off by {error:.2g} of the reference's norm"
        except Exception as error:  # whatever a compiler, a driver or an operator raises: it is what there is to say
            failures[name] = _reason(error)
    return errors, failures


def _reason(error: Exception) -> str:
    text = said(error)
    return text if len(text) <= 160 else text[:157] + "..."


def _measure(
    case: Case, names: Sequence[str], clock: Clock, seconds: float, failures: dict[str, str]
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], int | None]]:
    """Milliseconds of every round and peak bytes by variant and pass; adds to `failures`.

    A round runs the variants one after the other, the next one the other way round, each on the next inputs.
    """
    times: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int | None] = {}
    left = [name for name in names if name not in failures]
    if not left:
        return times, peaks
    inputs = [case.draw(False), case.draw(False)]
    while sum(each.bytes for each in inputs) < 2 * clock.cache:
        inputs.append(case.draw(False))
    turn = 0

    def following() -> Inputs:
        nonlocal turn
        turn += 1
        return inputs[turn % len(inputs)]

    def forward(name: str) -> float:
        given = following().given
        return clock.milliseconds(lambda: case.variants[name](**given))

    def backward(name: str) -> float:
        taken = following()
        out = case.variants[name](**taken.given)
        return clock.milliseconds(lambda: _gradients(out, taken))

    def attempt(name: str, step: Callable[[str], Any]) -> Any:
        try:
            return step(name)
        except Exception as error:  # out of memory, most of all
            failures[name] = _reason(error)
            left.remove(name)
            return None

    passes = {"forward": forward, "backward": backward}
    wholes: dict[str, Callable[[str], Any]] = {
        "forward": lambda name: case.variants[name](**inputs[0].given),
        "backward": lambda name: _run(case.variants[name], inputs[0]),
    }
    for name in tuple(left):  # the first call also pays for caches and compilers
        for which in case.floors:
            if name in left:
                attempt(name, wholes[which])
            if name in left:
                peaks[name, which] = attempt(name, lambda name, which=which: clock.peak(lambda: wholes[which](name)))
    rounds, start = -_WARM_UP, time.perf_counter()
    while left and (rounds < _LEAST or time.perf_counter() - start < seconds):
        for name in tuple(left) if rounds % 2 else tuple(left[::-1]):
            for which in case.floors:
                taken = attempt(name, passes[which]) if name in left else None
                if taken is not None and rounds >= 0:
                    times.setdefault((name, which), []).append(taken)
        rounds += 1
        if rounds == 0:
            start = time.perf_counter()
    return times, peaks


def measure_case(
    case: Case, names: Sequence[str], clock: Clock, dtype: torch.dtype, seconds: float, bandwidth: float, rate: float
) -> list[dict[str, Any]]:
    """The rows of one case, one of its variants `names` and a pass each: what fails has a reason in place of figures.

    `ratio` is the row's time to that of `triton`, or on a CPU, where it is not timed, to that of the reference that
    the variants are compared with.
    """
    failures: dict[str, str] = {}
    if "triton" in names and interpreted():
        failures["triton"] = "TRITON_INTERPRET is set, and an interpreter is not timed"
    elif "triton" in names and (missing := triton_missing(clock.device)):
        failures["triton"] = f"needs {missing}"
    errors: dict[str, dict[str, float]] = {}
    times, peaks = {}, {}
    try:
        errors, found = _check(case, [name for name in names if name not in failures], dtype)
        failures |= found
        times, peaks = _measure(case, names, clock, seconds, failures)
    except Exception as error:  # the inputs themselves, or what they are compared with, do not fit
        failures = {name: failures.get(name, _reason(error)) for name in names}
    clock.forget()
    medians = {key: statistics.median(taken) for key, taken in times.items() if key[0] not in failures}
    base = against(clock.gpu, case)
    rows = []
    for which, floor in case.floors.items():
        least, to = floor.seconds(bandwidth, rate) * 1e3, medians.get((base, which))
        for name in names:
            taken = medians.get((name, which))
            rows.append({
                "path": case.path, "shape": list(case.shape), "setting": case.setting, "pass": which, "variant": name,
                "milliseconds": taken, "runs": len(times.get((name, which), ())) if taken else 0,
                "floor_milliseconds": least, "floor_percent": 100 * least / taken if taken else None,
                "ratio": taken / to if taken and to else None,
                "peak_bytes": peaks.get((name, which)) if taken else None,
                "error": errors.get(name, {}).get(which), "failure": failures.get(name),
            })  # fmt: skip
    return rows


def against(gpu: bool, case: Case) -> str:
    """The variant whose time others are divided by."""
    if gpu:
        return "triton"
    return "gather" if case.path == "attention" else "reference"


def _driver(device: torch.device) -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    gpu = device.type == "cuda"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "machine": platform.machine(), "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": _driver(device) if gpu else None, "python": platform.python_version(), "torch": torch.__version__,
        "triton": triton, "cuda": torch.version.cuda, "date": date.today().isoformat(),
    }  # fmt: skip


def _hardware(result: dict[str, Any]) -> str:
    return result["gpu"] or f"{result['machine']} CPU, CPU time of one thread"


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of the inputs: bfloat16 on a GPU and float32 on a CPU, unless named."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def bench_kernels(
    dtype: str | None = None,
    seconds: float = 2.0,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Forward and backward of every variant of relative attention and keyed noise, shown as they are measured.

    `seconds` is spent on each shape and setting of `only` (`bench_cases.known`, None for all), for all variants but
    those of `without`. Uses a GPU where one is visible, otherwise one thread. Returns machine, versions, date,
    `bandwidth` (bytes/s), `rate` (flop/s), `note` and `rows` (`measure_case`). Raises UserError for something in
    `only` or `without` that is not measured.
    """
    for option, given, all_known in (("only", only or (), known()), ("without", without, VARIANTS)):
        for item in given:
            if item not in all_known:
                raise UserError(f"--{option} {item} is not measured; choose some of {', '.join(all_known)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, clock, threads = choose_dtype(dtype, device), Clock(device), torch.get_num_threads()
    if not clock.gpu:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = {
            **_machine(device), "dtype": str(chosen).removeprefix("torch."), "bandwidth": clock.bandwidth(),
            "rate": clock.rate(chosen), "note": None if clock.gpu else _CPU_NOTE, "rows": [],
        }  # fmt: skip
        for line in heading(result):
            show(line)
        show("  ".join(f"{name:{width}}" for name, width in zip(_HEADER, _WIDTHS, strict=True)).rstrip())
        for case in cases(only, chosen, device):
            names = [each for each in case.variants if each not in without and (clock.gpu or each not in _GPU_ONLY)]
            rows = measure_case(case, names, clock, chosen, seconds, result["bandwidth"], result["rate"])
            result["rows"] += rows
            for row in rows:
                show("  ".join(f"{cell:{width}}" for cell, width in zip(cells(row), _WIDTHS, strict=False)).rstrip())
    finally:
        torch.set_num_threads(threads)
    return result


def heading(result: dict[str, Any]) -> list[str]:
    """The lines before the table: where and when it was measured, and what it is relative to."""
    given = [f"{name} {result[name]}" for name in ("driver", "torch", "triton", "cuda") if result[name]]
    first = [_hardware(result), *given, f"Python {result['python']}", result["date"], f"{result['dtype']} inputs"]
    to = "triton" if result["gpu"] else "gather (attention) or reference"
    second = (
        f"floor: {result['bandwidth'] / 1e9:,.1f} GB/s of a copy, {result['rate'] / 1e12:,.3f} TFLOP/s of a product; "
        f"ratio: time to that of {to}; error: to float32, relative norm"
    )
    return [", ".join(first), *([result["note"]] if result["note"] else []), second]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text; what is not known is a dash, and a reason stands in the place of figures."""
    left = [row["path"], ",".join(map(str, row["shape"])), row["setting"], row["pass"], row["variant"]]
    if row["failure"]:
        return [*left, row["failure"]]
    peak = None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20
    figures = ((row["milliseconds"], ".3f"), (row["floor_percent"], ".1f"), (row["ratio"], ".2f"), (peak, ".0f"),
               (row["error"], ".0e"))  # fmt: skip
    return [*left, *("-" if figure is None else format(figure, form) for figure, form in figures)]


def page(result: dict[str, Any]) -> str:
    """The same table as a page in Markdown."""
    lines = [f"# Kernels on {result['gpu'] or 'a CPU'}, {result['date']}", "", "`elsewhere bench kernels`.", ""]
    for line in heading(result):
        lines += [line, ""]
    lines += ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    for row in result["rows"]:
        found = [cell.replace("|", "\\|") for cell in cells(row)]
        lines.append("| " + " | ".join(found + [""] * (len(_HEADER) - len(found))) + " |")
    return "\n".join(lines) + "\n"


def new_pages(folder: Path) -> tuple[Path, Path]:
    """Where `save` may write, `kernels_<gpu>_<date>` with .md and .json; UserError for what is there already."""
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--save {folder} is not there or not writable; choose another folder.")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    pages = tuple(folder / f"kernels_{name}_{date.today().isoformat()}{end}" for end in (".md", ".json"))
    for path in pages:
        if path.exists():
            raise UserError(f"{path} is there already and is not overwritten; move it or choose another folder.")
    return pages[0], pages[1]


def save(result: dict[str, Any], pages: tuple[Path, Path]) -> None:
    """Write the page and the JSON into new files."""
    for path, text in zip(pages, (page(result), json.dumps(result, indent=1)), strict=True):
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
