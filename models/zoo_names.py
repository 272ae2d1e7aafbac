"""The names that other projects give to the tensors of a ViT encoder, as pairs of patterns: theirs, and ours.

`{n}` stands for a number; a pair holds in both directions. A name without a pair is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Pairs = tuple[tuple[str, str], ...]

# Hugging Face's ViT, I-JEPA and ViT-MAE, as files have them (transformers 4.45 to 5.24).
HUGGING_FACE: Pairs = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.{n}.attention.attention.query.", "blocks.{n}.attn.q."),
    ("encoder.layer.{n}.attention.attention.key.", "blocks.{n}.attn.k."),
    ("encoder.layer.{n}.attention.attention.value.", "blocks.{n}.attn.v."),
    ("encoder.layer.{n}.attention.output.dense.", "blocks.{n}.attn.proj."),
    ("encoder.layer.{n}.layernorm_before.", "blocks.{n}.norm1."),
    ("encoder.layer.{n}.layernorm_after.", "blocks.{n}.norm2."),
    ("encoder.layer.{n}.intermediate.dense.", "blocks.{n}.mlp.fc1."),
    ("encoder.layer.{n}.output.dense.", "blocks.{n}.mlp.fc2."),
    ("layernorm.", "norm."),
)
# The same models in memory, since transformers 5: their state_dict has these.
HUGGING_FACE_5: Pairs = (
    *HUGGING_FACE[:3],
    ("layers.{n}.attention.q_proj.", "blocks.{n}.attn.q."),
    ("layers.{n}.attention.k_proj.", "blocks.{n}.attn.k."),
    ("layers.{n}.attention.v_proj.", "blocks.{n}.attn.v."),
    ("layers.{n}.attention.o_proj.", "blocks.{n}.attn.proj."),
    ("layers.{n}.layernorm_before.", "blocks.{n}.norm1."),
    ("layers.{n}.layernorm_after.", "blocks.{n}.norm2."),
    ("layers.{n}.mlp.fc1.", "blocks.{n}.mlp.fc1."),
    ("layers.{n}.mlp.fc2.", "blocks.{n}.mlp.fc2."),
    ("layernorm.", "norm."),
)
# mmsegmentation's VisionTransformer.
MMSEG: Pairs = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("layers.{n}.ln1.", "blocks.{n}.norm1."),
    ("layers.{n}.ln2.", "blocks.{n}.norm2."),
    ("layers.{n}.attn.attn.in_proj_", "blocks.{n}.attn.qkv."),
    ("layers.{n}.attn.attn.out_proj.", "blocks.{n}.attn.proj."),
    ("layers.{n}.ffn.layers.0.0.", "blocks.{n}.mlp.fc1."),
    ("layers.{n}.ffn.layers.1.", "blocks.{n}.mlp.fc2."),
    ("ln1.", "norm."),
)
# VISSL's vision_transformer trunk.
VISSL: Pairs = (("class_token", "cls_token"), ("pos_embedding", "pos_embed"))
# The relative tables of the released AdPE; `bias` where a table holds numbers, not vectors.
ADPE: Pairs = tuple(
    (f"blocks.{{n}}.attn.rpe_{term}.{inside}lookup_table_{kind}", f"blocks.{{n}}.attn.relative_{term}.{table}")
    for term in "qkv"
    for kind in ("weight", "bias")
    for table, inside in (("table", ""), ("rows_table", "rp_rows."), ("columns_table", "rp_cols."))
)


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """`name` with the first pattern that it starts with exchanged for its partner; as it is without one."""
    for old, new in pairs:
        found = re.match(re.escape(old).replace(r"\{n\}", r"(\d+)"), name)
        if found:
            number = found.group(1) if found.groups() else ""
            return new.replace("{n}", number) + name[found.end() :]
    return name


def reversed_pairs(pairs: Pairs) -> Pairs:
    """The pairs from ours to theirs."""
    return tuple((ours, theirs) for theirs, ours in pairs)


# What the tensors of other architectures are.
_MEANING = {
    "reg_token": "register tokens", "dist_token": "a distillation token", "ls1.gamma": "LayerScale",
    "ls2.gamma": "LayerScale", "gamma_1": "LayerScale", "gamma_2": "LayerScale", "q_norm": "norms of queries",
    "k_norm": "norms of keys", "norm_pre": "a norm before the blocks", "attn_pool": "attention pooling",
    "fc_norm": "a second norm after pooling", "rel_pos": "relative positions of another kind",
    "relative_position_bias": "relative positions of another kind", "mlp.norm": "norms inside the MLP",
    "attn.norm": "norms inside the attention", "w12": "a gated MLP", "fc1_g": "a gated MLP",
}  # fmt: skip


def grouped(names: Iterable[str]) -> str:
    """All names for a sentence, those that differ in numbers alone as one pattern with their count."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    out = []
    for name, count in counts.items():
        notes = [f"{count} tensors"] if "*" in name else []
        notes += [meaning for part, meaning in _MEANING.items() if part in name][:1]
        out.append(f"{name} ({', '.join(notes)})" if notes else name)
    return ", ".join(out)
