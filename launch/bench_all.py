"""All benchmarks of this machine in one page: masks, kernels, readers, whole steps, and what engines cost."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.images import DataError
from ..data.streams import generator
from ..kernels.dispatch import said
from .bench import bench_masks, print_masks_table
from .bench_data import bench_data, print_data_table
from .bench_engines import bench_engines, print_engines_tables
from .bench_kernels import bench_kernels
from .bench_step import bench_step, variants
from .bench_step_table import print_step_table
from .errors import UserError
from .host import cores, processor
from .new_file import check_new

SECTIONS = ("masks", "kernels", "data", "step", "engines")
_FOLDER = Path("docs") / "benchmarks"
_PACKAGES = (
    "elsewhere", "torch", "torchvision", "triton", "timm", "numpy", "pillow", "deepspeed", "ffcv", "webdataset",
)  # fmt: skip
_PHOTO = (375, 500)  # rows and columns, as a usual one of ImageNet


@dataclass(frozen=True)
class Section:
    """A benchmark of the page: its title, the command that measures it alone, and how it is run and printed."""

    title: str
    command: str
    run: Callable[[], dict[str, Any]]
    show: Callable[[dict[str, Any]], None] = lambda _: None


def machine() -> str:
    """What the figures belong to: the GPU where there is one, else the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def slug(name: str) -> str:
    """A name as a part of a file's: small letters and numbers, without trade marks, clock rates and filling words."""
    name = re.sub(r"\((r|tm|c)\)|@.*|\b(cpu|processor|with)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "machine"


def new_page(output: Path | None, force: bool) -> Path:
    """Where the page goes: a file, one named by machine and date in a folder, or that in docs/benchmarks or here.

    Raises UserError for what is there already, unless `force`, and for a folder that is not there.
    """
    folder = output or (_FOLDER if _FOLDER.is_dir() else Path())
    path = folder / f"{slug(machine())}_{date.today().isoformat()}.md" if folder.is_dir() else folder
    check_new(path, "-o", force)
    return path


def bench_all(
    path: Path, quick: bool = False, images: str | None = None, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measure the sections of `only`, print each, and write the page to `path`; the results by section.

    `images` is a folder of classes; without one, pictures are made up. `quick` takes a few minutes and says little
    beyond whether everything runs. A section that fails has the reason in its place. Raises UserError for one that
    is not known, and where none could be measured.
    """
    for name in only or ():
        if name not in SECTIONS:
            raise UserError(f"--only {name} is not known; choose some of {', '.join(SECTIONS)}.")
    chosen, parts, results = only or SECTIONS, [], {}
    before, threads = os.getloadavg(), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="bench-all-") as aside:
        if images is None and "data" in chosen:
            make_photos(Path(aside), 48 if quick else 200)
        for name, section in _sections(quick, images, aside).items():
            if name not in chosen:
                continue
            print(f"{section.title}: {section.command}", file=sys.stderr, flush=True)
            text = io.StringIO()
            load = os.getloadavg()[0]
            try:
                with contextlib.redirect_stdout(text):
                    results[name] = section.run()
                    section.show(results[name])
            except (UserError, DataError) as error:
                text = io.StringIO(f"Not measured: {error}")
            except Exception as error:  # minutes of other figures are not lost for it
                text = io.StringIO(f"Not measured: {said(error)}")
            finally:
                torch.set_num_threads(threads)
            found = text.getvalue().strip()
            print(f"{found}\n", flush=True)
            parts += [f"## {section.title}", "", f"`{section.command}`, load average {load:.1f}:", ""]
            parts += ["```text", found, "```", ""]
    if not results:
        raise UserError("Nothing could be measured; the reasons are printed above.")
    loads = [before[0], os.getloadavg()[0]]
    path.write_text("\n".join([*_head(quick, images, only, loads), *parts]), encoding="utf-8")
    return {"machine": machine(), "date": date.today().isoformat(), "load": loads, "page": str(path), **results}


def _head(quick: bool, images: str | None, only: Sequence[str] | None, loads: list[float]) -> list[str]:
    command = "elsewhere bench all" + " --quick" * quick + (f" --only {','.join(only)}" if only else "")
    command += " --data FOLDER" * (images is not None)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    lines = [
        f"# {machine()}, {date.today().isoformat()}", "",
        f"`{command}`; `docs/benchmarks/steps.md` explains whole steps.", "",
        "| | |", "|---|---|", f"| GPU | {gpu} |", f"| processor | {processor()}, {cores()} cores, {memory:.0f} GB |",
        f"| load average | {loads[0]:.1f} before, {loads[1]:.1f} after |",
        f"| images of the readers | {'made up' if images is None else 'a folder of photos'} |",
        f"| Python | {platform.python_version()} |",
    ]  # fmt: skip
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            lines.append(f"| {name} | {version(name)} |")
    if quick:
        lines += ["", "Measured quickly, to see that everything runs: of few rounds, so that a figure says little."]
    return [*lines, ""]


def _sections(quick: bool, images: str | None, aside: str) -> dict[str, Section]:
    """What is measured on this kind of device, in its order."""
    gpu = torch.cuda.is_available()
    lengths, seconds = (["50", "noise"], 0.2) if quick else (None, 1.0)
    photos, turns = (48, 2) if quick else (200, 5)
    recipes, overrides, vary, batch, rounds = _steps(gpu, quick)
    engines = ["ddp", *(["fsdp"] if not quick else [])]
    engines += ["zero2", "zero3"] if not quick and find_spec("deepspeed") else []
    measures = ["overhead"] if quick else ["overhead", "saving", "bytes"]
    trained, settings = ("stop_vit_b16", []) if gpu else ("demo", [] if quick else ["model.size=small"])
    count, each = (20 if quick else 40), (None if gpu else 8)
    words = [*recipes, *overrides, *(["--vary", *vary] if vary else []), *(["--batch", str(batch)] if batch else [])]
    return {
        "masks": Section(
            "Mask samplers", "elsewhere bench masks", lambda: bench_masks(0.3 if quick else 2.0), print_masks_table
        ),
        "kernels": Section(
            "Kernels",
            f"elsewhere bench kernels --seconds {seconds:g}" + (f" --only {','.join(lengths)}" if lengths else ""),
            lambda: bench_kernels(None, seconds, lengths),
        ),
        "data": Section(
            "Readers", "elsewhere bench data FOLDER", lambda: bench_data(images or aside, photos, turns),
            print_data_table,
        ),
        "step": Section(
            "Whole steps", " ".join(["elsewhere bench step", *words, "--rounds", str(rounds)]),
            lambda: bench_step(variants(recipes, overrides, vary), batch, rounds=rounds), print_step_table,
        ),
        "engines": Section(
            "Engines", " ".join([
                "elsewhere bench engines", trained, *settings, "--engines", ",".join(engines), "--measure",
                ",".join(measures), "--steps", str(count), *(["--batch", str(each)] if each else []),
            ]),
            lambda: bench_engines(trained, settings, engines, measures, each, count), print_engines_tables,
        ),
    }  # fmt: skip


def _steps(gpu: bool, quick: bool) -> tuple[list[str], list[str], list[str], int | None, int]:
    """Recipes, settings, what is varied, images a step, and rounds that suit the device."""
    if gpu and quick:
        return ["stop_vit_b16", "maeplus_ape_vit_b16"], [], [], None, 3
    if gpu:
        large = ["stop_vit_b16", "stop_vit_l16", "maeplus_ape_vit_b16", "adpe_rpe_coord_vit_b16", "mae_vit_b16"]
        return large, [], ["compile=false,true"], 64, 5
    if quick:
        return ["demo", "demo_adpe"], [], [], 16, 3
    small = ["cifar10_stop", "cifar10_ijepa", "cifar10_mae", "cifar10_maeplus_ape", "cifar10_adpe_rpe_coord"]
    return small, [], [], 16, 5


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of 500×375 in two classes, with coarse and fine structure as photos have it, made up by number."""
    rows, columns = _PHOTO
    for number in range(count):
        draw = generator(0, "bench all", number)
        picture = np.zeros((rows, columns, 3), dtype=np.float32)
        for grid, strength in (((4, 5), 70.0), ((24, 32), 40.0), ((188, 250), 12.0)):
            coarse = draw.normal(0, strength, (*grid, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(coarse[..., channel]).resize((columns, rows), Image.Resampling.BICUBIC)
                picture[..., channel] += np.asarray(layer)
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(picture + 128, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{number:04d}.jpg", quality=90)
