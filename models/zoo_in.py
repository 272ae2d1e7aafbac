"""Encoders of other projects under the names of `Encoder`, and what their tensors tell of their architecture.

A format is known by its names. Whatever has no place in `Encoder` is listed, never dropped: see `ForeignEncoder`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .positions import grid_coordinates, sincos
from .vit import SIZES
from .zoo_names import ADPE, HUGGING_FACE, HUGGING_FACE_5, MMSEG, VISSL, Pairs, renamed

# What other code puts before all names of a model.
_WRAPPERS = ("module.", "_orig_mod.", "backbone.net.", "backbone.", "vit.", "ijepa.", "model.")
# Parts of a published model that are known and are no encoder: decoders, heads, adversaries.
_OTHER_PARTS = {
    "decoder": re.compile(r"^(decoder[_.]|mask_token$|embeddings\.mask_token$)"),
    "head": re.compile(r"^(head\.|classifier\.|pooler\.|pre_logits\.)"),
    "adversary": re.compile(r"(^|\.)(adv_token|adv_shift|no_shift)$"),
}
_HF, _HF_5 = (
    re.compile(pattern) for pattern in (r"encoder\.layer\.\d+\.layernorm_before", r"layers\.\d+\.layernorm_b")
)
_MMSEG = re.compile(r"layers\.\d+\.attn\.attn\.in_proj_weight")
_BLOCK = re.compile(r"blocks\.(\d+)\.")
# A fixed table may have drifted by averaging, or been rounded to half precision; a trained one is never that near.
_FIXED, _EXACT = 1e-3, 2e-6
_RELEASED_SIDE, _RELEASED_RATIO = 7, 1.9  # buckets of an axis in the released iRPE, and its ratio


@dataclass
class ForeignEncoder:
    """An encoder's tensors under our names, and the architecture that they show.

    `unread` names tensors that `Encoder` has no place for, `parts` other parts of the file that were left out, and
    `unknown` what the tensors do not say and a recipe has to. `pooled`: its last norm stands after pooling (`fc_norm`).
    """

    kind: str
    state: dict[str, Tensor]
    width: int
    depth: int
    hidden: int
    patch: int
    channels: int
    grid: tuple[int, int]
    class_token: bool
    positions: str
    heads: int | None = None
    pooled: bool = False
    relative: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    mean: list[float] | None = None
    std: list[float] | None = None
    classes: int | None = None
    parts: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def without_wrappers(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of `state` without a prefix that all encoder names share."""
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    found = True
    while found:
        found = False
        for prefix in _WRAPPERS:
            inside = [name for name in tensors if name.startswith(prefix)]
            patches = any("patch_embed" in name for name in inside)  # heads may stand beside, decoders too
            if inside and patches and not any("patch_embed" in name for name in tensors if name not in inside):
                tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
                found = True
    return tensors


def encoder_content(content: Mapping[str, Any], which: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of the encoder's model in a file's content, and how the file calls it.

    Released StoP and I-JEPA files hold two encoders, of which `which` (teacher or student) chooses. Raises ValueError
    if there is none.
    """
    key = "target_encoder" if which == "teacher" else "encoder"
    if isinstance(content.get(key), Mapping):
        return without_wrappers(content[key]), key
    if isinstance(content.get("encoder"), Mapping) or isinstance(content.get("target_encoder"), Mapping):
        raise ValueError(f"has no {key}; choose which={'student' if which == 'teacher' else 'teacher'}")
    nested: Any = content
    for path in (("classy_state_dict", "base_model", "model", "trunk"), ("model",), ("state_dict",), ("model_ema",)):
        nested = content
        for name in path:
            nested = nested.get(name) if isinstance(nested, Mapping) else None
        if isinstance(nested, Mapping):
            return without_wrappers(nested), "encoder"
    return without_wrappers(content), "encoder"


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether a bare state has the names of `Encoder` itself, which tell less: sin-cos positions are not stored."""
    return "patch_embed.proj.weight" in state and "pos_embed" not in state and "pos_embedding" not in state


def read_foreign(
    state: Mapping[str, Tensor], called: str, image_size: tuple[int, int] | None = None, heads: int | None = None
) -> ForeignEncoder:
    """The encoder in a state of another project (see `encoder_content`); `image_size` and `heads` where known.

    Raises ValueError for a state of no known format, and for one that is incomplete in a way that hides its
    architecture.
    """
    kind, pairs = _recognised(state, called)
    parts: dict[str, list[str]] = {}
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part = next((part for part, pattern in _OTHER_PARTS.items() if pattern.search(name)), None)
        if part is None:
            taken[renamed(renamed(name, pairs), ADPE)] = tensor
        else:
            parts.setdefault(part, []).append(name)
    _join_qkv(taken)
    weight = taken.get("patch_embed.proj.weight")
    if weight is None or weight.dim() != 4:
        raise ValueError("embeds patches by something else than a convolution, which is not known here")
    width, channels, patch, across = weight.shape
    if patch != across:
        raise ValueError(f"has patches of {patch}x{across} pixels; only square ones are known here")
    layers = {int(found.group(1)) for name in taken if (found := _BLOCK.match(name))}
    depth = max(layers, default=-1) + 1
    first = taken.get("blocks.0.mlp.fc1.weight")
    if not depth or first is None:
        raise ValueError("has no blocks of attention and MLP as a ViT has them")
    class_token = "cls_token" in taken
    fixed = called != "encoder" or (kind.startswith(("MAE", "AdPE")) and "decoder" in parts)
    grid, positions = _take_positions(taken, width, class_token, patch, image_size, _FIXED if fixed else _EXACT)
    out = ForeignEncoder(
        kind, {}, width, depth, len(first), patch, channels, grid, class_token, positions, parts=sorted(parts)
    )
    out.pooled = "fc_norm.weight" in taken and "norm.weight" not in taken
    out.relative = _relative(taken, out, "head" in parts or out.pooled, parts.get("adversary", []))
    out.heads = heads or _heads(taken, out)
    if out.heads is None:
        out.unknown.append("how many heads its attention has")
    if "head" in parts:
        weights = [state[name] for name in parts["head"] if name.endswith((".weight",)) and state[name].dim() == 2]
        out.classes = len(weights[-1]) if weights else None
    known = _known_names(out, taken)
    out.unread = [name for name in taken if not known(name)]
    out.state = {name: tensor for name, tensor in taken.items() if known(name)}
    return out


def _recognised(state: Mapping[str, Tensor], called: str) -> tuple[str, Pairs]:
    """What wrote a state, and the pairs of its names."""
    if any(_HF.match(name) for name in state) or any(_HF_5.match(name) for name in state):
        pairs = HUGGING_FACE if any(_HF.match(name) for name in state) else HUGGING_FACE_5
        kind = "ViT" if "embeddings.cls_token" in state else "I-JEPA"
        return f"Hugging Face {'ViT-MAE' if 'decoder.mask_token' in state else kind}", pairs
    if any(_MMSEG.match(name) for name in state):
        return "mmsegmentation ViT", MMSEG
    if "pos_embedding" in state and "patch_embed.proj.weight" in state:
        return "VISSL ViT", VISSL
    if "patch_embed.proj.weight" in state and "pos_embed" in state and any(_BLOCK.match(name) for name in state):
        if called != "encoder":
            return "I-JEPA", ()
        if any("lookup_table" in name or name.endswith("adv_token") for name in state):
            return "AdPE", ()
        return ("MAE" if "decoder_pos_embed" in state else "timm ViT"), ()
    shown = ", ".join(sorted(state)[:3]) or "nothing"
    raise ValueError(
        "is of no known format (StoP, I-JEPA, MAE, AdPE, or a ViT of timm, Hugging Face, mmsegmentation, VISSL or "
        f"detectron2): it holds {shown}"
    )


def _join_qkv(taken: dict[str, Tensor]) -> None:
    """Queries, keys and values that stand apart, as one matrix; a bias that no block has is zero."""
    for name in [name for name in taken if re.fullmatch(r"blocks\.\d+\.attn\.q\.(weight|bias)", name)]:
        head, tail = name.rsplit(".q.", 1)
        three = [f"{head}.{term}.{tail}" for term in "qkv"]
        if all(one in taken for one in three):
            taken[f"{head}.qkv.{tail}"] = torch.cat([taken.pop(one) for one in three])
    weights = [name for name in taken if re.fullmatch(r"blocks\.\d+\.attn\.qkv\.weight", name)]
    biases = [name.removesuffix("weight") + "bias" for name in weights]
    if not any("attn.q" in name and name.endswith("bias") for name in taken):
        for weight, bias in zip(weights, biases, strict=True):
            taken[bias] = torch.zeros(len(taken[weight]), dtype=taken[weight].dtype)


def _take_positions(
    taken: dict[str, Tensor],
    width: int,
    class_token: bool,
    patch: int,
    image_size: tuple[int, int] | None,
    tolerance: float,
) -> tuple[tuple[int, int], str]:
    """Put the position table under our names; its grid, and whether it is learned or that of sines and cosines."""
    table = taken.pop("pos_embed", None)
    if table is None or table.dim() != 3 or table.shape[0] != 1 or table.shape[2] != width:
        raise ValueError("has no table of absolute positions of its patches")
    table = table[0]
    wanted = None if image_size is None else (image_size[0] // patch, image_size[1] // patch)
    rows: int | None = None
    for prefix in (1, 0) if class_token else (0, 1):
        count = len(table) - prefix
        if wanted is not None and wanted[0] * wanted[1] == count:
            rows = wanted[0]
        elif count > 0 and math.isqrt(count) ** 2 == count:
            rows = math.isqrt(count)
        if rows is not None:
            break
    else:
        raise ValueError(f"has {len(table)} positions, which are no square grid, and does not say its image size")
    assert rows is not None
    first, table = table[:prefix], table[prefix:]
    grid = (rows, len(table) // rows)
    fixed = width % 4 == 0 and (not prefix or not class_token or first.abs().max() <= tolerance)
    if fixed and (sincos(width, *grid_coordinates(grid)) - table.double()).abs().max() <= tolerance:
        return grid, "sincos"
    taken["positions.table"] = table
    if class_token:
        taken["cls_position"] = first[None] if prefix else torch.zeros(1, 1, width, dtype=table.dtype)
    return grid, "learned"


def _relative(
    taken: Mapping[str, Tensor], found: ForeignEncoder, fine_tuned: bool, adversary: list[str]
) -> dict[str, Any] | None:
    """The relative positions of a released AdPE encoder as settings; what is not certain goes to `found.unknown`."""
    tables = {name.split(".attn.")[1]: tensor for name, tensor in taken.items() if name.startswith("blocks.0.attn.rel")}
    if not tables:
        return None
    terms = "".join(term for term in "qkv" if any(name.startswith(f"relative_{term}.") for name in tables))
    name, table = next(iter(tables.items()))
    contextual = table.dim() == 3
    buckets = table.shape[1] if contextual and name.startswith("relative_v") else table.shape[-1]
    buckets -= found.class_token
    cross = name.endswith(("rows_table", "columns_table"))
    side = buckets if cross else math.isqrt(buckets)
    out: dict[str, Any] = {
        "terms": terms, "mode": "contextual" if contextual else "bias", "shared": len(table) == 1,
        "method": "cross" if cross else "product", "scaled_queries": not fine_tuned,
    }  # fmt: skip
    if side == _RELEASED_SIDE and (cross or side**2 == buckets):
        out["ratio"] = _RELEASED_RATIO
    else:
        found.unknown.append(f"how an offset finds one of its {buckets} buckets (model.relative)")
    if any(one.endswith("adv_shift") for one in adversary):
        out["lookup"] = "published"
    elif fine_tuned and out["method"] == "product" and contextual:
        found.unknown.append("whether its table is read between the buckets (model.relative.lookup=published) or hard")
    return out


def _heads(taken: Mapping[str, Tensor], found: ForeignEncoder) -> int | None:
    """Heads as a relative table shows them, or as the standard size of this width and depth has them."""
    for term, axis in (("k", 1), ("q", 1), ("v", 2)):
        for name in ("table", "rows_table"):
            table = taken.get(f"blocks.0.attn.relative_{term}.{name}")
            if table is not None and table.dim() == 3:
                return found.width // table.shape[axis]
    for name, size in SIZES.items():
        mine = (size.width, size.depth, int(size.width * size.mlp_ratio))
        if name not in ("nano", "micro") and mine == (found.width, found.depth, found.hidden):
            return size.heads
    return None


def _known_names(found: ForeignEncoder, taken: Mapping[str, Tensor]):
    """Whether an encoder of this architecture has a tensor of a name."""
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
    block = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")}
    outside = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    outside |= {name for name in ("cls_token", "cls_position", "positions.table") if name in taken}
    outside |= {"fc_norm.weight", "fc_norm.bias"} if found.pooled else set()

    def known(name: str) -> bool:
        inside = _BLOCK.match(name)
        if inside is None:
            return name in outside
        rest = name[inside.end() :]
        return rest in block or rest.startswith("attn.relative_")

    return known
