"""Weights of other projects, by name: the released StoP, I-JEPA and AdPE (MAE+) checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .jepa import Predictor
from .mae import Mae

_PREDICTOR = {
    "predictor_embed.": "embed.",
    "predictor_blocks.": "blocks.",
    "predictor_norm.": "norm.",
    "predictor_proj.": "proj.",
}


def from_released_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of `Encoder` for a released (StoP, I-JEPA) encoder's state; the fixed position table is left out.

    `module.` prefixes of DistributedDataParallel are dropped.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


def from_released_predictor(state: Mapping[str, Tensor], learned_mask_token: bool = False) -> dict[str, Tensor]:
    """Names of `Predictor` for a released predictor's state; its fixed position table is left out.

    The released StoP creates a mask token and never uses it, so it is taken only with `learned_mask_token`
    (I-JEPA's own checkpoints).
    """
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name == "mask_token":
            if learned_mask_token:
                out[name] = tensor.flatten()
        elif name != "predictor_pos_embed":
            prefix = next((p for p in _PREDICTOR if name.startswith(p)), "")
            out[_PREDICTOR.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return out


def to_released_predictor(predictor: Predictor) -> dict[str, Tensor]:
    """The state of the released predictor; see `from_released_predictor`."""
    out: dict[str, Tensor] = {"predictor_pos_embed": predictor.positions().detach()[None]}
    for name, tensor in predictor.state_dict().items():
        if name == "mask_token":
            out[name] = tensor.reshape(1, 1, -1)
        elif name != "positions.table":
            theirs = next((theirs for theirs, ours in _PREDICTOR.items() if name.startswith(ours)), None)
            out[name if theirs is None else theirs + name.removeprefix(_PREDICTOR[theirs])] = tensor
    return out


def from_released(
    checkpoint: Mapping[str, Mapping[str, Tensor]], learned_mask_token: bool = False
) -> dict[str, Tensor]:
    """State of `Jepa` for a released checkpoint `{encoder, predictor, target_encoder, …}`."""
    parts = {
        "encoder": from_released_encoder(checkpoint["encoder"]),
        "predictor": from_released_predictor(checkpoint["predictor"], learned_mask_token),
        "teacher": from_released_encoder(checkpoint["target_encoder"]),
    }
    return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


_MAE_DECODER = {
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.proj.",
}
_TABLES = {"table": "", "rows_table": "rp_rows.", "columns_table": "rp_cols."}


def _ours(name: str) -> str:
    """Our name in `Mae` for a released AdPE or MAE parameter."""
    for theirs, ours in _MAE_DECODER.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    if not name.startswith("decoder.") and name != "mask_token":
        name = f"encoder.{name}"
    for table, inside in _TABLES.items():
        name = re.sub(rf"rpe_([qkv])\.{inside}lookup_table_(weight|bias)$", rf"relative_\1.{table}", name)
    return name


def _theirs(name: str, tensor: Tensor) -> str:
    """The released name of a parameter of `Mae`."""
    for theirs, ours in _MAE_DECODER.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    kind = "bias" if tensor.dim() == 2 else "weight"  # a table holds one number a bucket, or a vector
    for table, inside in _TABLES.items():
        name = re.sub(rf"relative_([qkv])\.{table}$", rf"rpe_\1.{inside}lookup_table_{kind}", name)
    return name.removeprefix("encoder.")


def from_released_mae(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State of `Mae` and tensors of its adversary (empty without one) for a released AdPE pre-training state.

    The released code keeps the adversary among the parameters; its fixed position tables are left out, and so is the
    constant zero shift. Its absolute shift has the column first, ours the row (as its relative ones do).
    """
    method: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {"encoder": {}, "decoder": {}}
    adversary: dict[str, Tensor] = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if name == "adv_token":
            absolute = {"shift": tensor.flip(0)[None]} if tensor.dim() == 1 else {"mask_token": tensor[0]}
            adversary |= absolute
        elif name.endswith((".adv_shift", ".adv_token")):
            part = "decoder" if name.startswith("decoder_") else "encoder"
            rows[part][int(name.split(".")[1])] = tensor.flatten()
        elif not name.endswith(("pos_embed", ".no_shift")):
            method[_ours(name)] = tensor
    for part, found in rows.items():
        if found:
            adversary[part] = torch.stack([found[layer] for layer in sorted(found)])
    return method, adversary


def to_released_mae(method: Mae, adversary: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state that the released AdPE code would save for `method` and its adversary; see `from_released_mae`.

    Raises ValueError for adversaries that the released code does not have.
    """
    adversary = adversary or {}
    if "positions" in adversary or (method.attack.mode == "embedding" and method.attack.per == "bucket"):
        raise ValueError("The released code has no adversary per patch or per bucket; save the method without it.")
    state = method.state_dict()
    out = {_theirs(name, tensor): tensor for name, tensor in state.items()}
    for prefix, part in (("", method.encoder), ("decoder_", method.decoder)):
        table = part.positions().detach()
        out[f"{prefix}pos_embed"] = torch.cat([torch.zeros_like(table[:1]), table])[None]
    if "shift" in adversary:
        out["adv_token"] = adversary["shift"][0].flip(0)
    if "mask_token" in adversary:
        out["adv_token"] = adversary["mask_token"][None]
    for part, prefix in (("encoder", ""), ("decoder", "decoder_")):
        for layer, row in enumerate(adversary.get(part, ())):
            head = f"{prefix}blocks.{layer}.attn.rpe_k."
            if method.attack.mode == "coordinate":
                out[head + "adv_shift"], out[head + "no_shift"] = row, torch.zeros_like(row)
            else:
                table = state[f"{part}.blocks.{layer}.attn.relative_k.table"]
                out[head + "adv_token"] = row.reshape(len(table), table.shape[1], 1)
    return {name: tensor.detach().clone() for name, tensor in out.items()}
