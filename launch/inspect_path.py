"""`elsewhere inspect`: what a run, a checkpoint or a file of weights holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from .tensor_files import Described
    from .weights import Weights


def add_inspect_command(commands: Any) -> None:
    """Add `inspect` to `commands`, what `add_subparsers` returned."""
    text = "Tell what a run, a checkpoint or a file of weights holds, and whether it is whole."
    more = "Reads runs, checkpoint folders, folders by deepspeed, .safetensors files and released .pth files."
    command = commands.add_parser("inspect", help=text, description=f"{text} {more}")
    command.add_argument("path", type=Path, help="a run, a checkpoint folder, a folder by deepspeed, or a file")
    command.add_argument("--tensors", action="store_true", help="also list every tensor with its shape and type")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Run `elsewhere inspect`; the exit status. Raises UserError for what is damaged or of no known kind."""
    path = arguments.path
    if path.is_dir():
        _show_folder(path, arguments.tensors)
    elif path.suffix == ".safetensors":
        _show_safetensors(path, arguments.tensors)
    elif path.is_file():
        _show_released(path, arguments.tensors)
    else:
        raise UserError(f"{path} does not exist; give a run, a checkpoint folder, or a file of weights.")
    return 0


def _line(name: str, text: object) -> None:
    print(f"{name:<11}{text}")


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _sum(described: Iterable[Described]) -> str:
    tensors = list(described)
    count = sum(one.count for one in tensors)
    return f"{len(tensors):>5,} tensors {count:>15,} numbers {_size(sum(one.bytes for one in tensors)):>10}"


def _list(tensors: Mapping[str, Described]) -> None:
    width = max(map(len, tensors), default=0)
    for name, one in tensors.items():
        print(f"{name:<{width}}  {str(one.dtype).removeprefix('torch.'):<8}  {list(one.shape)}")


def _show_folder(path: Path, tensors: bool) -> None:
    from .checkpoint import Checkpoints, inspect
    from .weights import open_weights, saved_weights

    saved = None
    if (path / "checkpoints").is_dir():
        checkpoints = Checkpoints(path)
        _line("run", f"{path}, with {', '.join(one.name for one in checkpoints.folders()) or 'no checkpoint'}")
        saved, complaints = checkpoints.newest()
        for complaint in complaints:
            _line("damaged", complaint)
        if saved is None:
            raise UserError(complaints[0] if complaints else f"{path} has no checkpoint yet.")
    elif (path / "about.json").is_file():
        try:
            saved = inspect(path)
        except ValueError as error:
            _show_about(_about(path))
            _show_files(path, _about(path))
            raise UserError(f"{path} is damaged: {error}; take another checkpoint of the run.") from error
    weights = saved_weights(saved) if saved is not None else open_weights(path)
    _line("checkpoint", weights.path)
    if weights.about:
        _show_about(weights.about)
    else:
        _show_zero(weights)
    _show_parts(weights)
    if weights.about:
        _show_files(weights.path, weights.about)
        _line("files", "all there, checksums right")
    if tensors:
        _list(weights.files.described)


def _about(path: Path) -> dict[str, Any]:
    """What about.json says, as far as it can be read."""
    try:
        about = json.loads((path / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _show_about(about: Mapping[str, Any]) -> None:
    """What a checkpoint says of itself; an older one may say less."""
    config = about.get("config") or {}
    if "step" in about:
        _line("step", f"{about['step']:,}" + (f", epoch {about['epoch']:.4g}" if "epoch" in about else ""))
    if config.get("about"):
        _line("recipe", config["about"])
    engine = (about.get("engine") or config.get("engine") or {}).get("kind")
    written = [
        f"by {about['ranks']} rank{'s' * (about['ranks'] != 1)}" if "ranks" in about else "",
        f"of {engine}" if engine else "",
        f"in {about['precision']}" if "precision" in about else "",
        f"with torch {about['torch']}" if "torch" in about else "",
    ]
    if any(written):
        _line("written", " ".join(filter(None, written)))


def _show_zero(weights: Weights) -> None:
    from .zero_files import ZeroFiles

    files = weights.files
    assert isinstance(files, ZeroFiles)
    if weights.step is not None:
        _line("step", f"{weights.step:,}")
    stage = f"ZeRO stage {files.stage}, {files.ranks} rank{'s' * (files.ranks != 1)}"
    _line("written", f"by deepspeed {files.version or 'of an unknown version'}, {stage}")
    for index, count in enumerate(files.groups):
        _line("group", f"{index}: {count:,} numbers that train")
    _line("files", f"{len(files.files)}, all there, checksums right")


def _show_parts(weights: Weights) -> None:
    for part in weights.parts():
        _line(part, _sum(weights.described(part).values()))
    files = weights.files.described
    for title, prefixes in (("optimiser", ("exp_avg.", "exp_avg_sq.")), ("adversary", ("adversary.",))):
        found = [one for name, one in files.items() if name.startswith(prefixes)]
        if found:
            _line(title, _sum(found))


def _show_files(path: Path, about: Mapping[str, Any]) -> None:
    """The files of a checkpoint, and which are not as long as they were."""
    files = about.get("files")
    for name, facts in files.items() if isinstance(files, dict) else ():
        file, expected = path / name, facts.get("bytes") if isinstance(facts, dict) else None
        size = file.stat().st_size if file.is_file() else None
        state = "missing" if size is None else _size(size)
        _line("file", f"{name}: {state}" + (f", should be {expected:,} bytes" if size not in (None, expected) else ""))


def _show_safetensors(path: Path, tensors: bool) -> None:
    from .safetensors_file import read_header

    metadata, described = read_header(path)
    _line("file", f"{path}, {_size(path.stat().st_size)}")
    for name, text in sorted(metadata.items()):
        if name == "elsewhere.config":
            try:
                _line("recipe", json.loads(text).get("about") or "of the run, without a description of its own")
            except (ValueError, AttributeError):
                _line("recipe", "unreadable")
        else:
            _line(name.removeprefix("elsewhere."), text)
    _line("tensors", _sum(described.values()))
    for dtype in sorted({str(one.dtype).removeprefix("torch.") for one in described.values()}):
        _line("type", dtype)
    if tensors:
        _list(described)


def _show_released(path: Path, tensors: bool) -> None:
    from torch import Tensor

    from .foreign import read_pickle
    from .tensor_files import Described

    content = read_pickle(path)
    found: dict[str, Described] = {}
    _line("file", f"{path}, {_size(path.stat().st_size)}")
    for key, value in content.items():
        if isinstance(value, dict):
            inner = {name: Described(tuple(one.shape), one.dtype) for name, one in value.items()
                     if isinstance(one, Tensor)}  # fmt: skip
            _line(key, _sum(inner.values()) if inner else f"{len(value)} entries without tensors of its own")
            found |= {f"{key}.{name}": one for name, one in inner.items()}
        elif isinstance(value, Tensor):
            found[str(key)] = Described(tuple(value.shape), value.dtype)
        else:
            _line(key, str(value)[:100])
    if not found:
        raise UserError(f"{path} holds no weights; give a released StoP, I-JEPA or AdPE checkpoint.")
    if tensors:
        _list(found)
