"""GPUs: what the driver, torch and Triton make of them, and how they are joined.

Not run on a GPU yet, but for what a machine without one says.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..planning.hardware import GPUS
from .findings import Finding, Silent, ask, size

_TRITON_FROM = (8, 0)


def gpu_facts() -> dict[str, Any]:
    """What torch knows of its CUDA and of every visible GPU; imports torch, and starts CUDA where there is a GPU."""
    import torch
    import torch.cuda.nccl

    facts: dict[str, Any] = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
        "available": torch.cuda.is_available(), "why": None, "gpus": [], "nccl": None, "peers": None,
    }  # fmt: skip
    if not facts["available"]:
        if torch.version.cuda:
            try:
                torch.cuda.init()
            except Exception as error:
                facts["why"] = str(error).strip().splitlines()[0]
        return facts
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts["gpus"].append(
            {
                "name": about.name, "capability": [about.major, about.minor], "memory": total, "free": free,
                "compiled": _compiled_for((about.major, about.minor), built), "works": _works(index),
                "kernels": _kernels(index),
            }
        )  # fmt: skip
    count = len(facts["gpus"])
    facts["peers"] = all(
        torch.cuda.can_device_access_peer(a, b) for a in range(count) for b in range(count) if a != b
    )  # fmt: skip
    return facts


def _compiled_for(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether torch has code for a GPU: for its generation, or for an earlier one that the driver compiles on."""
    for arch in built:
        kind, _, digits = arch.partition("_")
        number = re.match(r"\d+", digits)
        if not number:
            continue
        major, minor = divmod(int(number[0]), 10)
        exact = major == capability[0] and minor <= capability[1]
        if exact or (kind == "compute" and (major, minor) <= capability):
            return True
    return not built


def _works(index: int) -> str | None:
    """What goes wrong in a small matrix product in half precision and its sum; None where nothing does."""
    import torch

    half = torch.bfloat16 if torch.cuda.get_device_capability(index) >= (8, 0) else torch.float16
    try:
        ones = torch.ones(256, 256, device=f"cuda:{index}", dtype=half)
        total = float((ones @ ones).float().sum())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None if total == 256.0**3 else f"a sum of {256**3} came out as {total:g}"


def _kernels(index: int) -> str:
    """Which operator noise would get there, and why; compiles a kernel and compares it where Triton runs."""
    import torch

    from ...kernels.dispatch import choose_noise

    choice = choose_noise("auto", torch.device("cuda", index))
    return f"{choice.operator} ({choice.why})"


def gpus() -> Iterator[Finding]:
    """Driver, GPUs, NCCL and links; of a machine without a GPU why there is none."""
    driver = _driver()
    try:
        facts = ask(gpu_facts)
    except Silent as error:
        yield Finding("torch", "problem", f"cannot be asked for devices: {error}", "install torch again", True)
        return
    yield _driver_finding(driver, facts)
    if not facts["available"]:
        return
    for index, one in enumerate(facts["gpus"]):
        yield gpu(index, one, facts)
    yield links(facts)


def _driver() -> dict[str, str] | None:
    """The driver's version, and the newest CUDA that it runs; None where there is no driver."""
    found = {}
    about = Path("/proc/driver/nvidia/version")
    if about.is_file():
        version = re.search(r"Kernel Module\D*([\d.]+)", about.read_text(encoding="utf-8"))
        found["version"] = version[1] if version else "unknown"
    said = _nvidia_smi()
    for key, pattern in (("version", r"Driver Version:\s*([\d.]+)"), ("cuda", r"CUDA Version:\s*([\d.]+)")):
        match = re.search(pattern, said or "")
        if match:
            found.setdefault(key, match[1])
    return found or None


def _nvidia_smi(*arguments: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None


def _driver_finding(driver: dict[str, str] | None, facts: dict[str, Any]) -> Finding:
    about = {"driver": driver, **{key: facts[key] for key in ("torch", "cuda", "hip", "available", "why")}}
    has = f"driver {driver.get('version', 'unknown')}" if driver else "no NVIDIA driver"
    newest = f", which runs CUDA up to {driver['cuda']}" if driver and "cuda" in driver else ""
    built = f"torch is built for CUDA {facts['cuda']}" if facts["cuda"] else "torch is built without CUDA"
    text = f"{has}{newest}; {built}"
    if facts["available"]:
        return Finding("GPUs", "ok", f"{len(facts['gpus'])} visible; {text}", facts=about)
    if driver is None:
        return Finding("GPUs", "note", f"none: {text}; runs are computed on the CPU, in float32", facts=about)
    if not facts["cuda"]:
        fix = "install torch and torchvision for CUDA, as https://pytorch.org/get-started shows"
        return Finding("GPUs", "problem", f"none visible: {text}", fix, facts=about)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        text += f"; CUDA_VISIBLE_DEVICES={hidden!r} hides others"
        return Finding("GPUs", "note", f"none visible: {text}", "unset CUDA_VISIBLE_DEVICES", facts=about)
    fix = f"a driver for CUDA {facts['cuda']} or newer, or a torch for the driver's CUDA; in a container --gpus all"
    return Finding("GPUs", "problem", f"none visible: {text} ({facts['why'] or 'without a reason'})", fix, facts=about)


def gpu(index: int, one: dict[str, Any], facts: dict[str, Any]) -> Finding:
    """A GPU of `gpu_facts`: what its compute capability means for precision and for Triton."""
    major, minor = capability = tuple(one["capability"])
    table = next((key for key, known in GPUS.items() if known.name in one["name"]), None)
    half = "bfloat16" if capability >= (8, 0) else "float16 (no bfloat16)" if capability >= (7, 0) else "float32 alone"
    triton = "Triton" if capability >= _TRITON_FROM else f"no Triton kernels (from {_TRITON_FROM[0]}.{_TRITON_FROM[1]})"
    text = (
        f"{one['name']}, {size(one['memory'])} ({size(one['free'])} free), compute capability {major}.{minor}: {half}, "
        f"{triton}; noise: {one['kernels']}"
    )
    name = f"GPU {index}"
    if not one["compiled"]:
        return Finding(
            name, "problem", f"{text}; this torch {facts['torch']} has no code for it",
            "a torch that is built for it: https://pytorch.org/get-started", True, one,
        )  # fmt: skip
    if one["works"]:
        fix = "look for errors of the card in dmesg (Xid), or restart the machine"
        return Finding(name, "problem", f"{text}; a matrix product fails: {one['works']}", fix, True, one)
    if one["free"] < 0.8 * one["memory"]:
        return Finding(name, "note", f"{text}; others use it", "nvidia-smi names them", facts=one)
    if capability >= _TRITON_FROM and not one["kernels"].startswith("triton"):
        fix = "a C compiler and Python's headers (see below), or kernels=reference"
        return Finding(name, "note", text, fix, facts=one)
    if table is None:
        return Finding(name, "note", f"{text}; unknown to elsewhere plan", "monitor.peak_tflops=N for MFU", facts=one)
    return Finding(name, "ok", f"{text}; {table} for elsewhere plan", facts=one)


def links(facts: dict[str, Any]) -> Finding:
    """NCCL, and how GPUs and machines are joined, in so far as one machine can see."""
    cards = sorted(Path(path).name for path in glob.glob("/sys/class/infiniband/*"))
    rates = {card: _rate(card) for card in cards}
    kinds = topology(_nvidia_smi("topo", "-m") or "", len(facts["gpus"]))
    about = {"nccl": facts["nccl"], "peers": facts["peers"], "topology": kinds, "infiniband": rates}
    between = ", ".join(f"{n} pairs {kind}" for kind, n in kinds.items()) or "one GPU"
    networks = ", ".join(f"{card} {rate}" for card, rate in rates.items()) or "no InfiniBand, so TCP between machines"
    text = f"NCCL {facts['nccl']}; {between}; {networks}"
    if len(facts["gpus"]) > 1 and not facts["peers"]:
        fix = "in a container --ipc=host; else expect exchanges through host memory (elsewhere plan --nvlink pcie4)"
        return Finding("links", "note", f"{text}; not every GPU reaches every other directly", fix, facts=about)
    return Finding("links", "ok", text, facts=about)


def topology(matrix: str, gpus: int) -> dict[str, int]:
    """Pairs of GPUs by kind of link, from the table of `nvidia-smi topo -m`: NV12, PIX, NODE, SYS, …"""
    found: dict[str, int] = {}
    for line in re.sub(r"\x1b\[[\d;]*m", "", matrix).splitlines():
        row = re.match(r"GPU(\d+)\s+(.*)", line)
        cells = row[2].split() if row else []
        if row and "X" in cells[:gpus]:
            for kind in cells[int(row[1]) + 1 : gpus]:
                found[kind] = found.get(kind, 0) + 1
    return found


def _rate(card: str) -> str:
    for path in sorted(glob.glob(f"/sys/class/infiniband/{card}/ports/*/rate")):
        try:
            state = Path(path).with_name("state").read_text(encoding="utf-8").partition(":")[2].strip()
            return f"{Path(path).read_text(encoding='utf-8').strip()}, {state.lower()}"
        except OSError:
            continue
    return "without a port"
