"""Weights of other projects, by name: the released StoP and I-JEPA checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

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
