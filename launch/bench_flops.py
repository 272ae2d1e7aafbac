"""Operations of a training step: by the methods' formulas, and as torch counts them while a step is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..kernels import relative_attention  # noqa: F401  registers its operators

AGREE = 0.02  # share by which formula and count may differ without a word


def flops_counted(step: Callable[[], Any]) -> float:
    """Operations of matrix products and convolutions in one call of `step`, with compiled code run as it was written.

    What activation checkpointing computes again counts; what a fused attention computes again in its backward does not.
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        step()
    return float(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products of `[B, H, L, d]`: queries by keys, and weights by values."""
    batch, heads, length, depth = query
    return 2 * batch * heads * length * key[2] * (depth + value[3])


def _attention_backward(gradient: Any, *inputs: Any, **options: Any) -> int:
    return 2 * _attention(*inputs[:3])


def _relative(qkv: Any, table: Any, pairs: Any, sums: Any, masked: Any, attacked: Any, *_: Any, **__: Any) -> int:
    """Attention of `[B, L, 3, H, d]`, and queries by the columns of one table or two."""
    batch, length, _, heads, depth = qkv
    columns = table[2] * (1 if attacked is None else 2)
    return 2 * batch * heads * length * depth * (2 * length + columns)


def _relative_backward(gradient: Any, *inputs: Any, **options: Any) -> int:
    return 2 * _relative(*inputs)


_FORMULAS: dict[Any, Any] = {
    torch.ops.elsewhere.relative_attention: _relative,
    torch.ops.elsewhere.relative_attention_backward: _relative_backward,
}
for _name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    for _end, _formula in (("", _attention), ("_backward", _attention_backward)):
        _operator = getattr(torch.ops.aten, f"_scaled_dot_product_{_name}{_end}", None)
        if _operator is not None:  # not all are in every version
            _FORMULAS[_operator] = _formula
