"""Whether the machines of a run are fit to train together: versions, recipe, devices, and one folder for all."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..config import MAY_MOVE, Config, flatten
from ..errors import UserError
from ..world import World
from .guard import ranks

_PACKAGES = ("torch", "timm", "deepspeed", "triton", "numpy", "pillow", "ffcv")
# What a machine may have of its own, since the pixels are the same.
_OWN = {*MAY_MOVE, "loader.workers"}
_SEEN_AFTER = 10.0  # seconds in which a shared file system may show a new file


def _source() -> str:
    """A checksum of this package's code, which two checkouts of one version may differ in."""
    root, found = Path(__file__).resolve().parents[2], hashlib.sha256()
    for room in ("launch", "models", "kernels", "data"):
        for path in sorted((root / room).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _versions(config: Config) -> dict[str, str]:
    wanted = [name for name in _PACKAGES if name != "deepspeed" or config.engine.kind == "deepspeed"]
    found = {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "elsewhere": f"{version('elsewhere')} (code {_source()})",
    }
    for name in wanted:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
    return found


def _facts(config: Config, world: World) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if cuda else None
    return {
        "host": world.guard.place.host,
        "node": world.guard.place.node,
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "card": str(getattr(properties, "uuid", world.local_rank)) if properties else None,
        "versions": _versions(config) if world.local_rank == 0 else None,
        "settings": {key: value for key, value in flatten(config.to_dict()) if key not in _OWN},
    }


def check_hosts(config: Config, world: World) -> list[str]:
    """A line for each machine of the run: its name, devices and ranks; every rank calls this.

    Raises UserError on all ranks where versions or settings differ between machines, or two ranks share a GPU.
    """
    found = world.gather_host(_facts(config, world))
    complaint = _different_settings(found) or _different_versions(found) or _shared_cards(found)
    if complaint:
        raise UserError(complaint, shared=True)
    lines = []
    for host, here in _by_host(found).items():
        devices = {found[rank]["device"]: 0 for rank in here}
        for rank in here:
            devices[found[rank]["device"]] += 1
        lines.append(f"{host}: {', '.join(f'{n} × {name}' for name, n in devices.items())} ({ranks(here)})")
    return lines


def versions_line(config: Config) -> str:
    """The versions that all machines have."""
    return ", ".join(f"{name} {found}" for name, found in _versions(config).items() if found != "none")


def _by_host(found: list[dict[str, Any]]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for rank, facts in enumerate(found):
        out.setdefault(facts["host"], []).append(rank)
    return out


def _different_settings(found: list[dict[str, Any]]) -> str | None:
    first = found[0]
    for rank, facts in enumerate(found):
        differing = _differing(first["settings"], facts["settings"])
        if differing:
            key, more = differing[0], len(differing) - 1
            return (
                f"Two machines were given different recipes: {key}={first['settings'].get(key)} on {first['host']} "
                f"(rank 0) and {facts['settings'].get(key)} on {facts['host']} (rank {rank})"
                + (f", and {more} more like it" if more else "")
                + "; start the same command on all of them."
            )
    return None


def _different_versions(found: list[dict[str, Any]]) -> str | None:
    first = found[0]
    for facts in found:
        if facts["versions"] is None:
            continue
        for name in _differing(first["versions"], facts["versions"]):
            return (
                f"{facts['host']} has {name} {facts['versions'].get(name, 'none')} and {first['host']} has "
                f"{first['versions'].get(name, 'none')}: install the same on all machines."
            )
    return None


def _shared_cards(found: list[dict[str, Any]]) -> str | None:
    taken: dict[tuple[str, str], int] = {}
    for rank, facts in enumerate(found):
        if facts["card"] is None:
            continue
        other = taken.setdefault((facts["host"], facts["card"]), rank)
        if other != rank:
            return (
                f"Ranks {other} and {rank} share one GPU of {facts['host']}: start one process per GPU, and let each "
                "see its own."
            )
    return None


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in {**first, **other} if first.get(key) != other.get(key)]


def check_shared_folder(run: Path, world: World) -> None:
    """Raise UserError on all ranks unless all machines see, and may write to, the folder of the run.

    Rank 0 has made it; every rank calls this.
    """
    if world.size == world.local_size:
        return
    name = world.first_decides(lambda: _mark(run))
    try:
        blind = world.guard.place.host if world.local_rank == 0 and not _appears(run, name) else None
        blind = list(dict.fromkeys(host for host in world.gather_host(blind) if host))
    finally:
        if world.first:
            (run / name).unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{', '.join(blind)} {'do' if len(blind) > 1 else 'does'} not see what rank 0 writes to run.dir={run}, or "
            "may not write there: choose a folder that all machines share, by its absolute path.",
            shared=True,
        )


def _mark(run: Path) -> str:
    name = f".seen-{secrets.token_hex(4)}"
    try:
        (run / name).touch()
    except OSError as error:
        raise UserError(f"run.dir={run} cannot be written to ({error.strerror}); choose another.") from error
    return name


def _appears(run: Path, name: str) -> bool:
    end = time.monotonic() + _SEEN_AFTER
    while True:
        # Listed, because a network file system may remember for a while that a name was not there.
        try:
            if name in os.listdir(run):
                return os.access(run, os.W_OK)
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
