"""Encoders filled with weights: `elsewhere.load(path)`, and the start of another run or of a task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.jepa import Jepa
from ..models.method import Method
from ..models.transfer import Resample, disagreement, transfer
from ..models.vit import Encoder, norm_layer
from ..models.zoo_names import grouped
from .build import build_encoder, pixel_statistics
from .config import Config, load_config
from .encoder_weights import EncoderWeights, allowed, encoder_weights
from .errors import UserError


def encoder_state(path: str | Path, which: str = "teacher") -> tuple[dict[str, Tensor], str, Config | None]:
    """An encoder's state, what it is, and its configuration where it is known; see `encoder_weights`."""
    weights = encoder_weights(path, which)
    return weights.state, weights.what, weights.config


def load(path: str | Path, which: str = "teacher", recipe: str | None = None, allow: Sequence[str] = ()) -> Encoder:
    """The pre-trained encoder of a run or checkpoint, in evaluation mode, with timm's feature interface.

    `path` may also be a file by `elsewhere consolidate`, or weights of another project (see `encoder_weights`). `which`
    is teacher or student (a masked autoencoder has but one encoder). Weights that do not describe their encoder need
    the `recipe` that does, e.g. `published/stop_vit_b16`. Tensors whose names match a pattern of `allow` may be missing
    or left over. The normalisation that it was trained with is in `encoder.pixel_mean` and `pixel_std`.
    Raises UserError if it cannot be read, and for anything that has no place in the encoder or is missing.
    """
    return load_described(path, which, recipe, allow)[0]


def load_described(
    path: str | Path, which: str = "teacher", recipe: str | None = None, allow: Sequence[str] = ()
) -> tuple[Encoder, Config, str]:
    """As `load`, with the configuration that describes the encoder, and what it is in words."""
    if which not in ("teacher", "student"):
        raise UserError(f"which={which!r} is not possible; choose teacher or student.")
    weights = encoder_weights(path, which)
    encoder, config = encoder_with(weights, str(path), recipe, allow)
    return encoder, config, weights.what


def encoder_with(
    weights: EncoderWeights, path: str, recipe: str | None = None, allow: Sequence[str] = ()
) -> tuple[Encoder, Config]:
    """The encoder that `weights`, read from `path`, fill, and its configuration; see `load`."""
    weights.check_read(allow)
    config = weights.config if recipe is None else load_config(recipe)
    if config is None:
        unknown = weights.foreign.unknown if weights.foreign else []
        why = f"does not say {' or '.join(unknown)}" if unknown else "does not describe its encoder"
        raise UserError(f"{path} {why}; name a recipe: load(path, recipe=…).")
    encoder = build_encoder(config)
    if weights.pooled:
        encoder.norm, encoder.fc_norm = nn.Identity(), norm_layer(eps=config.model.norm_eps)(encoder.num_features)
    source = _source(weights, encoder) if recipe is not None and weights.foreign is not None else None
    _take_up(encoder, weights.state, path, allow, source)
    encoder.pixel_mean, encoder.pixel_std = pixel_statistics(config.data, config.model.channels)  # pyright: ignore
    return encoder.eval(), config


def _take_up(
    encoder: Encoder, state: dict[str, Tensor], what: str, allow: Sequence[str] = (), source: Encoder | None = None
) -> None:
    """Load an encoder's state; UserError that says in which respect `what` is of another encoder.

    Names that a pattern of `allow` matches may be missing, and keep their first values, or be left out. `source` is the
    encoder that the state is of, where more is known of it than shapes.
    """

    def terms(names):
        found = {name.split("relative_")[1][0] for name in names if "relative_" in name}
        return f"relative positions on {''.join(sorted(found))}" if found else "absolute positions alone"

    mine = encoder.state_dict()
    differ = {name for name in mine.keys() ^ state.keys() if not allowed(name, allow)}
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
            raise UserError(f"{what} {side} {grouped(sorted(names))}; set model as it was trained.")
    setting = disagreement(source, encoder) if source else None
    if setting is not None:
        raise UserError(f"{what} was trained with {setting}, and this encoder has another; set it to match.")
    encoder.load_state_dict({name: tensor for name, tensor in state.items() if name in mine}, strict=False)


def _source(weights: EncoderWeights, encoder: Encoder) -> Encoder | None:
    """The encoder that `weights` are of, without numbers, what they do not say as in `encoder`; None if unknown."""
    config = weights.for_encoder(encoder)
    if config is None:
        return None
    with torch.device("meta"):
        return build_encoder(config)


def start_task_encoder(
    encoder: Encoder,
    path: str | Path,
    which: str = "teacher",
    allow: Sequence[str] = (),
    resample: Resample = "exact",
) -> str:
    """Give a task's encoder the weights at `path` (see `encoder_weights`), at its own image size; says what it took.

    `encoder` has `positions="learned"`: its table starts from the pre-trained one on the encoder's grid. A fixed
    sin-cos table is evaluated there (`exact`), or interpolated as published (`bicubic`), as learned tables always are.
    An encoder without class token does without that of the weights, its position and the prefix bucket of relative
    tables. `allow` has patterns of names that may be missing or left out. Raises UserError for what does not fit.
    """
    weights = encoder_weights(path, which)
    weights.check_read(allow)
    source = _source(weights, encoder)
    if source is None:
        raise UserError(
            f"{path} does not describe its encoder; start from a run, a checkpoint, or consolidated weights."
        )
    if encoder.num_prefix_tokens and not source.num_prefix_tokens:
        raise UserError(f"{path} has no class token and this encoder one; set model.class_token=false.")
    return _fill(encoder, weights, source, str(path), allow, resample)


def _fill(
    encoder: Encoder,
    weights: EncoderWeights,
    source: Encoder,
    path: str,
    allow: Sequence[str],
    resample: Resample = "exact",
) -> str:
    """Transfer `weights` of the encoder `source` to `encoder`; says what was taken, and what became of it."""
    state = transfer(weights.state, source, encoder, resample)
    what = weights.what
    if weights.pooled:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc_norm.")}
        allow = [*allow, "norm.*"]
        what += ", with a fresh last norm, for it was fine-tuned to one after pooling"
    _take_up(encoder, state, path, allow, source)
    if encoder.positions.kind == "learned" and encoder.grid != source.grid:
        what += f", its positions {source.grid[0]}x{source.grid[1]} resampled to {encoder.grid[0]}x{encoder.grid[1]}"
    return what


def start_from(method: Method, path: str, which: str = "teacher", allow: Sequence[str] = ()) -> str:
    """Give the encoder (and teacher) the weights at `path` (see `encoder_weights`); says what it took.

    A class token that the method has no place for is left out. Raises UserError if the file cannot be read or holds
    another encoder's weights.
    """
    try:
        weights = encoder_weights(path, which)
        weights.check_read(allow)
        what = weights.what
        for module in (method.encoder, method.teacher) if isinstance(method, Jepa) else (method.encoder,):
            source = _source(weights, module)
            if source is None:
                _take_up(module, weights.state, path, allow)
                continue
            what = _fill(module, weights, source, path, allow)
            if source.num_prefix_tokens > module.num_prefix_tokens:
                what += ", without its class token"
    except UserError as error:
        raise UserError(f"init.from: {error}") from error
    return what
