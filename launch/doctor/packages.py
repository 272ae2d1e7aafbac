"""Installed packages against what this package asks for, whether they can be imported, and the optional ones."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions, requires, version
from pathlib import Path
from typing import Any

from .findings import Finding, Silent, ask, ask_each

OURS = "elsewhere"
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
# What `elsewhere pretrain demo` does without.
NOT_OF_DEMO = {
    "deepspeed": "engine.kind=deepspeed", "webdataset": "data.source=webdataset", "triton": "kernels on a GPU"
}  # fmt: skip
OPTIONAL = {
    "ffcv": ("reads and writes .beton files", "see docs/install.md, FFCV"),
    "pycocotools": ("elsewhere detect", "python3 -m pip install 'elsewhere[detect]'"),
    "tifffile": ("TIFFs of many channels", "python3 -m pip install 'elsewhere[tiff]'"),
    "matplotlib": ("elsewhere report --png", "python3 -m pip install 'elsewhere[report]'"),
    "wandb": ("monitor.wandb", "python3 -m pip install 'elsewhere[wandb]'"),
}
_NVIDIA_APEX = "https://github.com/NVIDIA/apex, built with the CUDA compiler: docs/install.md"


def python() -> Finding:
    """The interpreter; pip refuses to install this package for one that is too old."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.prefix == sys.base_prefix:
        text += ", in no virtual environment"
    return Finding("python", "ok", text, facts={"version": platform.python_version()})


def required() -> Iterator[Finding]:
    """A finding for each package that setup.py asks for: its version, and whether it can be imported."""
    try:
        wanted = _requirements()
    except PackageNotFoundError:
        yield Finding(
            OURS, "problem", "is not installed, so what it needs is not known", "python3 -m pip install -e .", True
        )
        return
    yield Finding(OURS, "ok", f"{version(OURS)} at {Path(__file__).resolve().parents[2]}")
    names = [name for name, _ in wanted]
    broken = _broken([MODULES.get(name, name) for name in names])
    for name, least in wanted:
        yield _one(name, least, broken.get(MODULES.get(name, name)))


def _one(name: str, least: str, broken: str | None) -> Finding:
    needed, install = name not in NOT_OF_DEMO, f"python3 -m pip install '{name}{least}'"
    used = f" ({NOT_OF_DEMO[name]} needs it)" if name in NOT_OF_DEMO else ""
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "problem", f"is not installed{used}; setup.py asks for {least}", install, needed)
    facts = {"version": found, "wanted": least}
    if older(found, least):
        text = f"{found}{used}; setup.py asks for {least}"
        return Finding(name, "problem", text, f"python3 -m pip install --upgrade '{name}{least}'", needed, facts)
    if broken:
        pair = "torch and torchvision must be a pair: install both from one place; " if "torch" in name else ""
        fix = f"{pair}python3 -m pip install --force-reinstall '{name}{least}'"
        return Finding(name, "problem", f"{found} cannot be imported{used}: {broken}", fix, needed, facts)
    return Finding(name, "ok", f"{found} ({least})", facts=facts)


def _requirements() -> list[tuple[str, str]]:
    """Names and version bounds of what is needed here, without extras."""
    found = []
    for line in requires(OURS) or ():
        text, _, marker = line.partition(";")
        if "extra" in marker or ("Linux" in marker and platform.system() != "Linux"):
            continue
        parts = re.fullmatch(r"\s*([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*\(?([^()]*)\)?\s*", text)
        if parts:
            found.append((parts[1].lower(), parts[2].replace(" ", "")))
    return found


def older(found: str, bounds: str) -> bool:
    """Whether a version lies below the `>=` among `bounds`."""
    least = [part[2:] for part in bounds.split(",") if part.startswith(">=")]
    return any(_release(found) < _release(one) for one in least)


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version before any suffix, without zeros at the end."""
    numbers = [int(part) for part in re.match(r"(?:\d+!)?((?:\d+\.)*\d+)", text)[1].split(".")]  # pyright: ignore
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _broken(modules: Sequence[str]) -> dict[str, str]:
    """Modules that cannot be imported, and why; one that ends the process does not keep the others from being tried."""
    out: dict[str, str] = {}
    left = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is not None]
    while left:
        try:
            answers, why = ask_each(import_all, left), None
        except Silent as error:
            answers, why = error.answers, str(error)
        out |= {name: text for name, text in answers if text}
        if why is None:
            break
        at = min(len(answers), len(left) - 1)
        out[left[at]] = why
        left = left[at + 1 :]
    return out


def import_all(names: Sequence[str]) -> Iterator[list[str | None]]:
    """Each name and what its import raised, None where it went well."""
    for name in names:
        try:
            importlib.import_module(name)
            yield [name, None]
        except Exception as error:
            yield [name, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"]


def optional() -> Iterator[Finding]:
    """A finding for each package that some setting needs, NVIDIA's Apex last."""
    for name, (purpose, install) in OPTIONAL.items():
        yield _optional(name, purpose, install)
    yield apex()


def _optional(name: str, purpose: str, install: str) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(name, "note", f"is not installed; for: {purpose}", install)
    try:
        found = version(name)
    except PackageNotFoundError:
        found = "of an unknown version"
    # FFCV's loader pulls in OpenCV and a compiler, which its bare import does not.
    broken = _broken([name, "ffcv.loader"] if name == "ffcv" else [name])
    if broken:
        return Finding(name, "problem", f"{found} cannot be imported: {next(iter(broken.values()))}", install)
    return Finding(name, "ok", f"{found}; for: {purpose}", facts={"version": found})


def apex() -> Finding:
    """NVIDIA's Apex, with or without what it compiles, or the package of that name on PyPI, a web toolkit."""
    found = importlib.util.find_spec("apex")
    if found is None:
        text = "NVIDIA's is not installed; for: model.norm=apex, optim.kind=apex_adamw (torch's own give the same)"
        return Finding("apex", "note", text, _NVIDIA_APEX)
    folders = [Path(place) for place in found.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        summary = _summary("apex") or "without a description"
        text = f"{folders[0] if folders else found.origin} is not NVIDIA's but another package of that name ({summary})"
        return Finding("apex", "problem", text, f"python3 -m pip uninstall apex; NVIDIA's: {_NVIDIA_APEX}")
    try:
        about = ask(nvidia_apex)
    except Silent as error:
        return Finding("apex", "problem", f"NVIDIA's cannot be imported: {error}", f"build it again: {_NVIDIA_APEX}")
    if about["lacks"]:
        text = f"NVIDIA's lacks what it compiles: {about['lacks']}"
        return Finding("apex", "problem", text, f"build it again: {_NVIDIA_APEX}", facts=about)
    if about["refused"]:
        return Finding("apex", "note", f"NVIDIA's, compiled; {about['refused']}", facts=about)
    return Finding("apex", "ok", "NVIDIA's, compiled; fused AdamW and LayerNorm can be made", facts=about)


def _summary(module: str) -> str | None:
    names = packages_distributions().get(module) or [module]
    try:
        return distribution(names[0]).metadata["Summary"]
    except PackageNotFoundError:
        return None


def nvidia_apex() -> dict[str, Any]:
    """Which compiled part of Apex cannot be imported, and why its optimiser or its norm is refused here."""
    import torch

    from ...models.vit import norm_layer
    from ..optim import make_optimizer

    lacks = [one for one in import_all(["apex.optimizers", "apex.normalization", "amp_C", "fused_layer_norm_cuda"])]
    why = "; ".join(text for _, text in lacks if text)
    if why:
        return {"lacks": why, "refused": None}
    try:
        make_optimizer(torch.nn.Linear(2, 2, device="cuda" if torch.cuda.is_available() else "cpu"), "apex_adamw")
        norm_layer("apex")(8)
    except Exception as error:
        return {"lacks": None, "refused": str(error)}
    return {"lacks": None, "refused": None}


def environment() -> Finding:
    """Variables that change how runs behave, where they are set."""
    named = re.compile(r"^(NCCL_|GLOO_|TORCH_|PYTORCH_|TRITON_|CUDA_|OMP_|DS_)")
    ours = ("OMP_WAIT_POLICY", "passive")  # set by launch/cli.py
    found = {name: value for name, value in sorted(os.environ.items()) if named.match(name) and (name, value) != ours}
    shown = " ".join(f"{name}={value}" for name, value in found.items())
    slow = [
        name for name in ("TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "NCCL_P2P_DISABLE") if found.get(name, "0") == "1"
    ]
    if slow:
        return Finding(
            "environment", "note", shown, f"unset {' '.join(slow)}, unless slow and for debugging", facts=found
        )
    return Finding("environment", "ok", shown or "no variable of torch, CUDA, NCCL or Triton is set", facts=found)
