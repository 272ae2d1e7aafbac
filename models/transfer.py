"""A pre-trained encoder's state for an encoder of another grid, without class token, or with learned positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from .positions import grid_coordinates, interpolate_table, sincos
from .vit import Encoder

Resample = Literal["exact", "bicubic"]


def resampled_table(
    state: Mapping[str, Tensor], source: Encoder, grid: tuple[int, int], resample: Resample = "exact"
) -> Tensor:
    """The position table `[N, D]` float32 on `grid` of the encoder that `source` describes and `state` fills.

    A learned table is interpolated (bicubic). A sin-cos one is evaluated where the patches of `grid` lie in the picture
    (`exact`), or interpolated as well (`bicubic`, as the released fine-tuning does).
    """
    if source.positions.kind == "learned":
        return interpolate_table(state["positions.table"].float(), source.grid, grid)
    if resample == "exact" or grid == source.grid:
        return sincos(source.size.width, *grid_coordinates(grid, source.grid)).float()
    table = sincos(source.size.width, *grid_coordinates(source.grid)).float()
    return interpolate_table(table, source.grid, grid)


def transfer(
    state: Mapping[str, Tensor], source: Encoder, encoder: Encoder, resample: Resample = "exact"
) -> dict[str, Tensor]:
    """`state` of the encoder that `source` describes (its tensors may be on `meta`), as far as it fits `encoder`.

    Learned positions start from those of `source`, see `resampled_table`. Without a class token in `encoder`, that of
    `state` is left out, with its position and the prefix bucket of relative tables.
    """
    out = dict(state)
    if source.num_prefix_tokens and not encoder.num_prefix_tokens:
        out = {name: _without_prefix(name, tensor) for name, tensor in out.items() if not name.startswith("cls_")}
    if encoder.positions.kind == "learned":
        out["positions.table"] = resampled_table(state, source, encoder.grid, resample)
        if encoder.cls_position is not None and "cls_token" in out:
            out.setdefault("cls_position", torch.zeros(1, 1, source.size.width))  # sin-cos positions have none
    return out


def _without_prefix(name: str, tensor: Tensor) -> Tensor:
    """A relative table without its last bucket, that of pairs with a prefix token; other tensors as they are."""
    if ".relative_" not in name:
        return tensor
    of_values = ".relative_v." in name and tensor.dim() == 3  # [G, NB, d], where logits have [G, d, NB]
    return tensor[:, :-1] if of_values else tensor[..., :-1]


def disagreement(source: Encoder, encoder: Encoder) -> str | None:
    """The first setting that shapes do not show and that differs, as `source` has it; None where there is none."""
    if source.size.width == encoder.size.width and source.size.heads != encoder.size.heads:
        return f"model.heads={source.size.heads}"
    eps = [one.blocks[0].norm1.eps for one in (source, encoder)]  # pyright: ignore
    if eps[0] != eps[1]:
        return f"model.norm_eps={eps[0]:g}"
    theirs, ours = source.relative, encoder.relative
    if theirs is None or ours is None:
        return None
    for name in ("method", "mode", "ratio"):
        if getattr(theirs, name) != getattr(ours, name) and theirs.terms == ours.terms:
            return f"model.relative.{name}={getattr(theirs, name)}"
    # Hard buckets and the interpolated ones share a table; the published interpolation reads it transposed.
    if (theirs.lookup == "published") != (ours.lookup == "published"):
        return f"model.relative.lookup={theirs.lookup}"
    return None
