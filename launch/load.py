"""Weights out of a run: `elsewhere.load(path)` and the start of another run."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from ..models.jepa import Jepa
from ..models.vit import Encoder
from ..models.zoo import from_released_encoder
from .build import build_encoder, pixel_statistics
from .checkpoint import Checkpoints, Saved, inspect
from .config import Config, load_config
from .errors import UserError


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
            raise UserError(f"{path} is damaged: {error}.") from error
    return None


def encoder_state(path: Path, which: str = "teacher") -> tuple[dict[str, Tensor], str, Config | None]:
    """An encoder's state from a run, a checkpoint folder or a released `.pth` file, what it is, and its configuration.

    `which` is teacher or student. Raises UserError if there is nothing that can be read.
    """
    if path.is_dir():
        saved = find_checkpoint(path)
        if saved is None:
            raise UserError(f"{path} holds neither a run nor a checkpoint.")
        prefix = "teacher." if which == "teacher" else "encoder."
        state = saved.load()["engine"]["method"]
        found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        return found, f"the {which} of {saved.path}", Config.model_validate(saved.about["config"])
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a run, a checkpoint folder or a released checkpoint file.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as weights: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    key = "target_encoder" if which == "teacher" else "encoder"
    if not isinstance(state, dict) or key not in state:
        raise UserError(f"{path} is not a released StoP or I-JEPA checkpoint: it has no {key}.")
    return state[key], f"the {key} of {path}", None


def load(path: str | Path, which: str = "teacher", recipe: str | None = None) -> Encoder:
    """The pre-trained encoder of a run or checkpoint, in evaluation mode, with timm's feature interface.

    `which` is teacher or student; a released checkpoint file needs the `recipe` that describes its encoder, e.g.
    `published/stop_vit_b16`. The normalisation that it was trained with is in `encoder.pixel_mean` and `pixel_std`.
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
    encoder = build_encoder(config.model)
    try:
        encoder.load_state_dict(from_released_encoder(state))
    except RuntimeError as error:
        raise UserError(f"The weights in {path} are not those of the recipe's encoder: {error}") from error
    encoder.pixel_mean, encoder.pixel_std = pixel_statistics(config.data, config.model.channels)  # pyright: ignore
    return encoder.eval()


def start_from(method: Jepa, path: str) -> str:
    """Give encoder and teacher the encoder weights at `path` (a run, a checkpoint, a released file); says what it took.

    Raises UserError if the file cannot be read or its shapes are another encoder's.
    """
    try:
        state, what, _ = encoder_state(Path(path))
    except UserError as error:
        raise UserError(f"init.from: {error}") from error
    state = from_released_encoder(state)
    for module in (method.encoder, method.teacher):
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            first = str(error).split("\n\t")[1].strip() if "\n\t" in str(error) else str(error)
            raise UserError(f"init.from={path} does not fit this model: {first}") from error
    return what
