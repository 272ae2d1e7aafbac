"""An encoder's tensors under the names of other projects; what a project cannot express is refused.

Functions take an `Encoder` with its numbers and raise ValueError with a sentence that begins with a verb.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .relative import Relative
from .vit import SIZES, Encoder
from .zoo_names import ADPE, HUGGING_FACE, MMSEG, VISSL, Pairs, renamed, reversed_pairs

FORMATS = ("timm", "hf", "detectron2", "mmseg", "vissl", "ijepa", "mae")
_PROJECT = {
    "timm": "timm's ViT", "hf": "Hugging Face's ViT", "detectron2": "detectron2's ViT",
    "mmseg": "mmsegmentation's ViT", "vissl": "VISSL's ViT", "ijepa": "the released I-JEPA", "mae": "the released MAE",
}  # fmt: skip


def refusal(encoder: Encoder, target: str) -> str | None:
    """Why an encoder cannot go to `target`, a sentence; None if it can."""
    project, relative = _PROJECT[target], encoder.relative
    if relative is not None and target != "mae":
        nowhere = _relative_refusal(relative, pooled(encoder))
        if nowhere is not None:
            return f"{nowhere}, and {project} has no relative positions at all; it stays with this package"
        return (
            f"has relative positions on {relative.terms}, which {project} does not have; --to mae writes them under "
            "the released AdPE's names"
        )
    if relative is not None:
        return _relative_refusal(relative, pooled(encoder))
    if pooled(encoder) and target not in ("timm", "mae"):
        return f"was fine-tuned with its last norm after pooling, which {project} does not have; export what it was "\
               "fine-tuned from, or --to timm"  # fmt: skip
    if target == "mae" and not encoder.num_prefix_tokens:
        return "has no class token, which the released MAE has; --to ijepa has none either"
    if target == "ijepa" and encoder.num_prefix_tokens:
        return "has a class token, which the released I-JEPA has no place for; choose --to mae"
    eps = encoder.blocks[0].norm1.eps  # pyright: ignore
    if eps != 1e-6 and target != "hf":
        return f"has layer norms with model.norm_eps={eps:g}, and those of {project} have 1e-06; --to hf can say so"
    ratio = encoder.size.mlp_ratio
    if target == "vissl" and int(encoder.size.width * ratio) != 4 * encoder.size.width:
        return f"has MLPs of {ratio:.3g} times its width, and those of {project} are always of 4"
    return None


def _relative_refusal(relative: Relative, fine_tuned: bool) -> str | None:
    if relative.lookup == "interpolated":
        return (
            "reads its relative tables between the buckets (model.relative.lookup=interpolated), which the released "
            "AdPE does only in a way of its own (lookup=published); its features would be others there"
        )
    if relative.ratio != 1.9:
        return f"has model.relative.ratio={relative.ratio:g}, and the released AdPE 1.9"
    if relative.scaled_queries == fine_tuned and "k" in relative.terms:
        return (
            f"has model.relative.scaled_queries={str(relative.scaled_queries).lower()}, and the released AdPE's "
            f"{'fine-tuning' if fine_tuned else 'pre-training'} the other"
        )
    return None


def pooled(encoder: Encoder) -> bool:
    """Whether an encoder's last norm stands after pooling."""
    return isinstance(encoder.norm, nn.Identity)


def position_table(encoder: Encoder) -> Tensor:
    """Positions of class token (where there is one) and patches, `[1, prefix + N, D]`, as other projects keep them."""
    table = encoder.positions().detach()
    if not encoder.num_prefix_tokens:
        return table[None]
    first = torch.zeros_like(table[:1]) if encoder.cls_position is None else encoder.cls_position.detach()[0]
    return torch.cat([first, table])[None]


def released(encoder: Encoder) -> dict[str, Tensor]:
    """The state of the released I-JEPA, MAE or AdPE encoder, whose names timm and ours share."""
    state = {name: tensor.detach() for name, tensor in encoder.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if name not in ("positions.table", "cls_position")}
    out = {"pos_embed": position_table(encoder)}
    for name, tensor in state.items():
        kind = "bias" if ".relative_" in name and tensor.dim() == 2 else "weight"
        pairs = tuple(pair for pair in reversed_pairs(ADPE) if pair[1].endswith(f"_{kind}"))
        out[renamed(name, pairs)] = tensor
    return out


def hugging_face(encoder: Encoder) -> dict[str, Tensor]:
    """The state of Hugging Face's ViTModel, or IJepaModel without a class token; the pooler is not part of it."""
    state: dict[str, Tensor] = {}
    for name, tensor in released(encoder).items():
        head, found, kind = name.partition(".qkv.")
        if found:
            state |= {f"{head}.{term}.{kind}": part for term, part in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            state[name] = tensor
    return _as(state, HUGGING_FACE)


def mmsegmentation(encoder: Encoder) -> dict[str, Tensor]:
    """The state of mmsegmentation's VisionTransformer with `final_norm=True`.

    It always has a class token: for an encoder without one zeros, which `with_cls_token=False` leaves out.
    """
    state = released(encoder)
    if not encoder.num_prefix_tokens:
        state["cls_token"] = torch.zeros(1, 1, encoder.size.width)
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return _as(state, MMSEG)


def vissl(encoder: Encoder) -> dict[str, Tensor]:
    """The state of VISSL's vision_transformer trunk; without a class token, the names of StoP's own converter."""
    return _as(released(encoder), VISSL) if encoder.num_prefix_tokens else released(encoder)


def detectron2(encoder: Encoder) -> dict[str, Tensor]:
    """The state of the ViT inside detectron2's SimpleFeaturePyramid, which has neither class token nor last norm.

    The position of the class token stays: it is `pretrain_use_cls_token`.
    """
    state = released(encoder)
    return {f"backbone.net.{name}": tensor for name, tensor in state.items()
            if name != "cls_token" and not name.startswith("norm.")}  # fmt: skip


def _as(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    return {renamed(name, reversed_pairs(pairs)): tensor for name, tensor in state.items()}


def timm_settings(encoder: Encoder) -> tuple[str, dict[str, object]]:
    """A name of timm's registry and the arguments with which `timm.create_model` builds this encoder."""
    size = encoder.size
    named = next((name for name, one in SIZES.items() if (one.width, one.depth) == (size.width, size.depth)), "base")
    patch = {"huge": 14, "giant": 14}.get(named, 16)
    name = f"vit_{named if named not in ('nano', 'micro') else 'tiny'}_patch{patch}_224"
    after = pooled(encoder)
    return name, {
        "img_size": list(encoder.image_size), "patch_size": encoder.patch_size, "in_chans": encoder.channels,
        "embed_dim": size.width, "depth": size.depth, "num_heads": size.heads, "mlp_ratio": size.mlp_ratio,
        "class_token": bool(encoder.num_prefix_tokens), "fc_norm": after, "num_classes": 0,
        "global_pool": "token" if encoder.num_prefix_tokens and not after else "avg",
    }  # fmt: skip


def hugging_face_settings(encoder: Encoder) -> dict[str, object]:
    """The config.json with which transformers builds this encoder."""
    size, token = encoder.size, bool(encoder.num_prefix_tokens)
    rows, columns = encoder.image_size
    return {
        "architectures": ["ViTModel" if token else "IJepaModel"], "model_type": "vit" if token else "ijepa",
        "hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": size.heads,
        "intermediate_size": int(size.width * size.mlp_ratio), "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "qkv_bias": True, "num_channels": encoder.channels,
        "layer_norm_eps": encoder.blocks[0].norm1.eps,  # pyright: ignore
        "image_size": rows if rows == columns else [rows, columns], "patch_size": encoder.patch_size,
    }  # fmt: skip
