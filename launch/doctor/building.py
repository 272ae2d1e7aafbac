"""Compilers and headers, for DeepSpeed's extensions, torch.compile and Triton, and a group of two processes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .findings import Finding, Silent, ask

_FOR = "for: engine.kind=deepspeed, engine.compile=true, and Triton on a GPU"
_SOURCE = "#include <Python.h>\n#include <vector>\nint answer() { return std::vector<int>(PY_MAJOR_VERSION).size(); }\n"


def compilers() -> Iterator[Finding]:
    """A C++ compiler that builds an extension of this Python, ninja, and CUDA's compiler."""
    yield compiler()
    yield ninja()
    yield nvcc()


def compiler() -> Finding:
    """The C++ compiler, tried on a file that includes Python's headers."""
    name, command = "C++ compiler", shlex.split(os.environ.get("CXX", "")) or ["g++"]
    place = shutil.which(command[0])
    if place is None:
        return Finding(
            name, "note", f"{command[0]} is not on PATH; {_FOR}", "apt-get install build-essential python3-dev"
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        text = f"{place}, but Python.h is not in {headers}; {_FOR}"
        return Finding(name, "note", text, "apt-get install python3-dev, of the interpreter in use")
    about = _run([place, "--version"]).splitlines()
    version = about[0] if about else "of an unknown version"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "trial.cpp"
        source.write_text(_SOURCE, encoding="utf-8")
        made = subprocess.run(
            [place, *command[1:], "-shared", "-fPIC", "-std=c++17", f"-I{headers}", str(source), "-o", f"{source}.so"],
            capture_output=True, text=True, errors="replace", timeout=120,
        )  # fmt: skip
    if made.returncode:
        errors = (
            [line for line in made.stderr.splitlines() if "error" in line] or made.stderr.splitlines() or ["no word"]
        )
        text = f"{place} ({version}) cannot build an extension of Python: {errors[0][:200]}; {_FOR}"
        return Finding(name, "problem", text, "apt-get install --reinstall build-essential python3-dev")
    return Finding(name, "ok", f"{place}, {version}, built an extension of Python", facts={"version": version})


def ninja() -> Finding:
    """ninja, which builds DeepSpeed's extensions."""
    place = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if place is None:
        return Finding("ninja", "note", "is not there; for: engine.kind=deepspeed", "python3 -m pip install ninja")
    version = _run([place, "--version"]).strip()
    if not version:
        return Finding("ninja", "problem", f"{place} does not run", "python3 -m pip install --force-reinstall ninja")
    return Finding("ninja", "ok", f"{version} at {place}", facts={"version": version})


def nvcc() -> Finding:
    """CUDA's compiler, which must be of torch's CUDA."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    place = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    purpose = "for building NVIDIA Apex and DeepSpeed's CUDA extensions, which no recipe needs"
    if place is None:
        return Finding("nvcc", "note", f"is not there; {purpose}", "install the CUDA toolkit of torch's version")
    match = re.search(r"release ([\d.]+)", _run([place, "--version"]))
    if not match:
        return Finding("nvcc", "problem", f"{place} does not run; {purpose}", "install the CUDA toolkit again")
    wanted = ask(torch_cuda)
    if wanted and wanted.split(".")[0] != match[1].split(".")[0]:
        text = f"{match[1]} at {place}, and torch is built for CUDA {wanted}; {purpose}"
        return Finding(
            "nvcc", "note", text, f"the CUDA toolkit {wanted}, named by CUDA_HOME", facts={"version": match[1]}
        )
    return Finding("nvcc", "ok", f"{match[1]} at {place}; {purpose}", facts={"version": match[1]})


def torch_cuda() -> str | None:
    """The version of CUDA that torch is built for."""
    import torch

    return torch.version.cuda


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def processes() -> Finding:
    """Two processes that meet as ranks do, and add up a number over gloo."""
    name, fix = "two processes", "GLOO_SOCKET_IFNAME=lo, and this machine's name in /etc/hosts"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    around = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with ThreadPoolExecutor(2) as threads:
        ranks = [
            threads.submit(ask, rank_sum, timeout=45.0, environ={**around, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        complaints = [rank.exception() for rank in ranks]
    # Who waits for a rank that failed knows less than that.
    failed = min(filter(None, complaints), key=lambda error: str(error).startswith("no answer"), default=None)
    if failed is not None:
        silent = failed if isinstance(failed, Silent) else f"{type(failed).__name__}: {failed}"
        return Finding(name, "problem", f"do not meet over gloo: {silent}", fix)
    if [rank.result() for rank in ranks] != [3, 3]:
        return Finding(name, "problem", f"add 1 and 2 up to {[rank.result() for rank in ranks]} over gloo", fix)
    return Finding(name, "ok", f"met at 127.0.0.1 and added up a number over gloo ({socket.gethostname()})")


def rank_sum() -> int:
    """The sum over ranks of rank + 1, in the group that a run makes; the environment says which rank this is."""
    import torch

    from ..world import join

    world = join("cpu", wait=40.0)
    total = int(world.gather(torch.tensor(world.rank + 1)).sum())
    world.gather_host(total)
    return total
