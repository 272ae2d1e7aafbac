"""What the forms of the relative term's reference cost on this machine, side by side in one run."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..kernels.relative_reference import FORMS, choose_form
from ..models.relative import Relative, RelativeAttack, RelativeTable
from .bench_clock import Clock

# Images, heads, patches on a side, head dimension: small batches, so that a CPU takes milliseconds.
SHAPES = (
    (8, 12, 7, 64),
    (8, 16, 7, 32),
    (4, 12, 8, 64),
    (4, 16, 8, 32),
    (2, 12, 14, 64),
    (2, 16, 14, 32),
    (8, 12, 14, 64),
)
_GPU_BATCHES = 32  # a GPU gets so many times these images
# Term, lookup, attack and whether heads share the table.
_SETTINGS = {
    "hard": ("k", "hard", False, True),
    "interpolated": ("k", "interpolated", False, True),
    "attack": ("k", "interpolated", True, True),
    "hard, per head": ("k", "hard", False, False),
    "attack, per head": ("k", "interpolated", True, False),
    "hard, values": ("v", "hard", False, True),
    "attack, values": ("v", "interpolated", True, True),
}


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, CPU time of one thread"


def _term(setting: str, shape: tuple[int, int, int, int], device: torch.device) -> tuple[RelativeTable, Callable]:
    """A table of a setting with random values, and its term's forward and backward as a function."""
    term, lookup, attacked, shared = _SETTINGS[setting]
    batch, heads, side, depth = shape
    grid, length = (side, side), 1 + side**2
    table = RelativeTable(Relative(terms=term, lookup=lookup, shared=shared), term, heads, depth).to(device)
    torch.nn.init.normal_(table.table, std=0.1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = torch.randn(batch, length, 3, heads, depth, device=device, dtype=dtype)
    queries = tokens[:, :, 0].transpose(1, 2).requires_grad_()  # as a packed projection gives them
    square = torch.randn(batch, heads, length, length, device=device, dtype=dtype)
    probabilities = square.softmax(dim=-1).requires_grad_()
    attack = None
    if attacked:
        masked = (torch.rand(batch, length, device=device) < 0.75).to(dtype)
        masked[:, 0] = 0
        attack = RelativeAttack(masked, shift=torch.tensor([0.3, -0.2], device=device, requires_grad=True))

    def step() -> None:
        if term == "v":
            table.values(probabilities, grid, attack).backward(queries.detach())
        else:
            table.logits(queries, grid, attack, depth**-0.5).backward(square)

    return table, step


def _measure(shape: tuple[int, int, int, int], setting: str, device: torch.device, seconds: float) -> dict:
    """One row of `bench_relative`."""
    table, step = _term(setting, shape, device)
    clock = Clock(device)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    memory: dict[str, float] = {}
    for form in FORMS:  # the first calls also pay for caches
        table.form = form
        step()
        memory[form] = (clock.peak(step) or 0) / 2**20
    rounds, start = 0, time.perf_counter()
    while rounds < 5 or time.perf_counter() - start < seconds:
        for form in FORMS if rounds % 2 else FORMS[::-1]:
            table.form = form
            times[form].append(clock.milliseconds(step))
        rounds += 1
    _, heads, side, _ = shape
    columns = 50 if table.relative.lookup == "hard" else (2 * side - 1) ** 2 + 1
    return {
        "shape": shape,
        "tokens": 1 + side**2,
        "setting": setting,
        "milliseconds": {form: statistics.median(times[form]) for form in FORMS},
        "peak_mib": memory if device.type == "cuda" else None,
        "chosen": choose_form(device, 1 + side**2, columns, 1 if table.relative.shared else heads),
    }


def bench_relative(shapes: Sequence[tuple[int, int, int, int]] | None = None, seconds: float = 2.0) -> dict:
    """Forward and backward of the relative term in both forms, for hard buckets and under the coordinate attack.

    `shapes` are (images, heads, patches on a side, head dimension); `seconds` is spent on each shape and setting, in
    rounds that run the forms one after the other and begin with another one each time. Uses a GPU where one is
    visible, otherwise one thread. Returns `machine`, `torch`, `date` and `rows`, each with `shape`, `tokens`,
    `setting`, medians in milliseconds and peak MiB (GPU only) by form, and the form `chosen` automatically.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if shapes is None:
        scale = _GPU_BATCHES if device.type == "cuda" else 1
        shapes = [(batch * scale, heads, side, depth) for batch, heads, side, depth in SHAPES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_measure(shape, setting, device, seconds) for shape in shapes for setting in _SETTINGS]
    finally:
        torch.set_num_threads(threads)
    date = datetime.date.today().isoformat()
    return {"machine": _machine(device), "torch": torch.__version__, "date": date, "rows": rows}


def print_relative_table(result: dict) -> None:
    """Prints what `bench_relative` returned, one line for each shape and setting."""
    print(f"relative term, forward + backward, {result['machine']}, torch {result['torch']}, {result['date']}")
    print(f"{'B,H,L,d':<14} {'setting':<17} {'gather ms':>10} {'dense ms':>10} {'ratio':>6}  chosen")
    for row in result["rows"]:
        batch, heads, _, depth = row["shape"]
        gather, dense = row["milliseconds"]["gather"], row["milliseconds"]["dense"]
        shape = f"{batch},{heads},{row['tokens']},{depth}"
        line = (
            f"{shape:<14} {row['setting']:<17} {gather:>10.2f} {dense:>10.2f} {gather / dense:>6.2f}  {row['chosen']}"
        )
        if row["peak_mib"]:
            line += f"  peak {row['peak_mib']['gather']:.0f} / {row['peak_mib']['dense']:.0f} MiB"
        print(line)
