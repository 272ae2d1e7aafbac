"""Weights out of a run: `elsewhere.load(path)` and the start of another run."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..models.jepa import Jepa
from ..models.method import Method
from ..models.transfer import Resample, disagreement, transfer
from ..models.vit import Encoder
from ..models.zoo import from_released_encoder, from_released_mae
from .build import build_encoder, pixel_statistics
from .checkpoint import Checkpoints, Saved, inspect
from .config import Config, load_config
from .errors import UserError
from .tensor_files import TensorFiles


def find_checkpoint(path: Path) -> Saved | None:
    """The checkpoint at `path`: a run (its newest), or a checkpoint folder; None if it is neither.

    Raises UserError where there are only damaged ones.
    """
    if (path / "checkpoints").is_dir():
        saved, complaints = Checkpoints(path).newest()
        if saved is None:
            raise UserError(complaints[0] if complaints else f"{path} has no checkpoint yet.")
        return saved
    if (path / "about.json").is_file():
        try:
            return inspect(path)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}; take another checkpoint of the run.") from error
    return None


def encoder_state(path: Path, which: str = "teacher") -> tuple[dict[str, Tensor], str, Config | None]:
    """An encoder's state, what it is, and its configuration where it is known.

    `path` is a run, a checkpoint folder, a file by `elsewhere consolidate` or a released `.pth` file; `which` is
    teacher or student, where there are two. Raises UserError if there is nothing that can be read.
    """
    if path.is_dir():
        saved = find_checkpoint(path)
        if saved is None:
            raise UserError(f"{path} holds neither a run nor a checkpoint.")
        files = TensorFiles(saved.path)
        prefix, what = _encoder_prefix({name.removeprefix("method.") for name in files.described}, which)
        prefix = f"method.{prefix}"
        state = dict(files.items(lambda name: name.startswith(prefix)))
        return _part(state, prefix), f"the {what} of {saved.path}", Config.model_validate(saved.about["config"])
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run, a checkpoint folder, or a file of weights.")
    if path.suffix == ".safetensors":
        return _consolidated_state(path, which)
    state = released_content(path)
    key = "target_encoder" if which == "teacher" else "encoder"
    if isinstance(state.get("model"), dict):
        return _part(from_released_mae(state["model"])[0], "encoder."), f"the encoder of {path}", None
    if key not in state:
        raise UserError(f"{path} is not a released StoP, I-JEPA or AdPE checkpoint: it has no {key} and no model.")
    return from_released_encoder(state[key]), f"the {key} of {path}", None


def _encoder_prefix(names: Iterable[str], which: str) -> tuple[str, str]:
    """The prefix of the wanted encoder's tensors in a method's, and what it is: there may be no teacher."""
    taught = any(name.startswith("teacher.") for name in names)
    return ("teacher.", "teacher") if taught and which == "teacher" else ("encoder.", "encoder")


def _consolidated_state(path: Path, which: str) -> tuple[dict[str, Tensor], str, Config | None]:
    """As `encoder_state`, from a `.safetensors` file; one without metadata holds an encoder under its own names."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            part, config = metadata.get("elsewhere.part", "student"), metadata.get("elsewhere.config")
            names = list(file.keys())
            prefix, what = _encoder_prefix(names, which) if part == "all" else ("", part)
            if part not in ("all", "teacher", "student"):
                raise UserError(f"{path} holds the {part}, which is no encoder; consolidate its run with --part "
                                "teacher or student.")  # fmt: skip
            if part == "teacher" and which == "student":
                raise UserError(f"{path} holds the teacher alone; consolidate its run with --part student, or leave "
                                "out which.")  # fmt: skip
            state = {name: file.get_tensor(name) for name in names if name.startswith(prefix)}
        described = Config.model_validate(json.loads(config)) if config else None
    except (OSError, SafetensorError, ValueError) as error:  # a ValidationError of pydantic is a ValueError
        raise UserError(f"{path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    return _part(state, prefix), f"the {what} of {path}", described


def released_content(path: Path) -> dict[str, Any]:
    """What a released `.pth` file holds; UserError if it cannot be read, or holds more than tensors and arguments."""
    try:
        # The released AdPE saves its arguments, too: a plain namespace, and nothing else beside tensors is allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as weights: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    return content if isinstance(content, dict) else {}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _take_up(encoder: Encoder, state: dict[str, Tensor], what: str, allow: Sequence[str] = ()) -> None:
    """Load an encoder's state; UserError that says in which respect `what` is of another encoder.

    Names that a pattern of `allow` matches may be missing, and keep their first values, or be left out.
    """

    def terms(names):
        found = {name.split("relative_")[1][0] for name in names if "relative_" in name}
        return f"relative positions on {''.join(sorted(found))}" if found else "absolute positions alone"

    def allowed(name):
        return any(fnmatchcase(name, pattern) for pattern in allow)

    mine = encoder.state_dict()
    differ = {name for name in mine.keys() ^ state.keys() if not allowed(name)}
    if terms(state) != terms(mine) and any("relative_" in name for name in differ):
        raise UserError(
            f"{what} has {terms(state)} and this recipe's encoder {terms(mine)}; set model.relative.terms to match."
        )
    if "cls_token" in differ:
        there, here = ("a", "none") if "cls_token" in state else ("no", "one")
        raise UserError(f"{what} has {there} class token and this recipe's encoder {here}; set method.kind to match.")
    if "positions.table" in differ:
        there, here = ("learned", "sin-cos") if "positions.table" in state else ("sin-cos", "learned")
        raise UserError(f"{what} has {there} positions and this recipe's encoder {here} ones; set "
                        f"model.positions={there.replace('-', '')}.")  # fmt: skip
    for name in sorted(mine.keys() & state.keys()):
        if mine[name].shape != state[name].shape:
            raise UserError(
                f"{what} does not fit this recipe's encoder: {name} is {tuple(state[name].shape)} there and "
                f"{tuple(mine[name].shape)} here; set model as it was trained."
            )
    for side, names in (("lacks", differ & mine.keys()), ("has beyond this recipe's encoder", differ & state.keys())):
        if names:
            raise UserError(f"{what} {side} {', '.join(sorted(names))}; set model as it was trained.")
    encoder.load_state_dict({name: tensor for name, tensor in state.items() if name in mine}, strict=False)


def load(path: str | Path, which: str = "teacher", recipe: str | None = None) -> Encoder:
    """The pre-trained encoder of a run or checkpoint, in evaluation mode, with timm's feature interface.

    `path` may also be a file by `elsewhere consolidate`. `which` is teacher or student (a masked autoencoder has but
    one encoder); a released checkpoint file, or a bare safetensors file, needs the `recipe` that describes its
    encoder, e.g. `published/stop_vit_b16`. The normalisation that it was trained with is in `encoder.pixel_mean` and
    `pixel_std`.
    Raises UserError if it cannot be read.
    """
    if which not in ("teacher", "student"):
        raise UserError(f"which={which!r} is not possible; choose teacher or student.")
    path = Path(path)
    state, _, config = encoder_state(path, which)
    if recipe is not None:
        config = load_config(recipe)
    if config is None:
        raise UserError(f"{path} does not describe its encoder; name a recipe: load(path, recipe=…).")
    encoder = build_encoder(config)
    _take_up(encoder, state, str(path))
    encoder.pixel_mean, encoder.pixel_std = pixel_statistics(config.data, config.model.channels)  # pyright: ignore
    return encoder.eval()


def start_task_encoder(
    encoder: Encoder,
    path: str | Path,
    which: str = "teacher",
    allow: Sequence[str] = (),
    resample: Resample = "exact",
) -> str:
    """Give a task's encoder the weights at `path` (see `encoder_state`), at its own image size; says what it took.

    `encoder` has `positions="learned"`: its table starts from the pre-trained one on the encoder's grid. A fixed
    sin-cos table is evaluated there (`exact`), or interpolated as published (`bicubic`), as learned tables always are.
    An encoder without class token does without that of the weights, its position and the prefix bucket of relative
    tables. `allow` has patterns of names that may be missing or left out. Raises UserError for what does not fit.
    """
    state, what, config = encoder_state(Path(path), which)
    if config is None:
        raise UserError(
            f"{path} does not describe its encoder; start from a run, a checkpoint, or consolidated weights."
        )
    with torch.device("meta"):
        source = build_encoder(config)
    setting = disagreement(source, encoder)
    if setting is not None:
        raise UserError(f"{path} was trained with {setting}, and this encoder has another; set it to match.")
    if encoder.num_prefix_tokens and not source.num_prefix_tokens:
        raise UserError(f"{path} has no class token and this encoder one; set model.class_token=false.")
    _take_up(encoder, transfer(state, source, encoder, resample), str(path), allow)
    if encoder.grid != source.grid:
        what += f", its positions {source.grid[0]}x{source.grid[1]} resampled to {encoder.grid[0]}x{encoder.grid[1]}"
    return what


def start_from(method: Method, path: str) -> str:
    """Give the encoder (and teacher) the weights at `path` (see `encoder_state`); says what it took.

    Raises UserError if the file cannot be read or holds another encoder's weights.
    """
    try:
        state, what, _ = encoder_state(Path(path))
        for module in (method.encoder, method.teacher) if isinstance(method, Jepa) else (method.encoder,):
            _take_up(module, state, path)
    except UserError as error:
        raise UserError(f"init.from: {error}") from error
    return what
