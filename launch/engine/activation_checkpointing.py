"""Activation checkpointing: blocks that forget intermediate results and compute them again in the backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ...models.method import Method

_ATEN = torch.ops.aten
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = {_ATEN.mm.default, _ATEN.addmm.default}
_KEPT |= {getattr(_ATEN, name).default for name in _ATTENTION if hasattr(_ATEN, name)}  # not all in every version


def checkpoint_activations(method: Method, policy: str | int) -> None:
    """Let the trained blocks of `method` compute again in the backward what `policy` does not keep.

    `full` keeps a block's input alone, a number k does so in every k-th block of a stack and keeps all in the others,
    `selective` keeps the results of projections and attention, where nearly all operations are (Korthikanti et al.,
    2022), and `none` changes nothing. Modules, names and numbers stay as they are; without gradients nothing is
    computed twice.
    """
    if policy == "none":
        return
    forward = _FORWARD["selective" if policy == "selective" else "full"]
    every = policy if isinstance(policy, int) else 1
    for blocks in method.stacks().values():
        for number, block in enumerate(blocks, start=1):
            if number % every == 0 and any(parameter.requires_grad for parameter in block.parameters()):
                # Bound to the block, so that a copy of the block gets one bound to the copy.
                block.forward = MethodType(forward, block)


def _keep(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """What `selective` does with the result of `operation`."""
    kept = operation in _KEPT
    if operation is _ATEN.bmm.default:
        # Of [B, M, K] by [B, K, N]. Where N > K it is larger than what it is made of and cheap to make: attention's
        # logits, and positions looked up in relative tables. A product that writes into a buffer (`out=`) must not be
        # kept at all: its second run would leave the buffer empty.
        kept = inputs[0].shape[2] >= inputs[1].shape[2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputing(**how: Any) -> Callable[..., Tensor]:
    """A block's forward under `torch.utils.checkpoint`."""

    # Of this name, because a pickle of the block looks it up: what is unpickled runs without checkpointing.
    def forward(self: nn.Module, *inputs: Any, **options: Any) -> Tensor:
        plain = type(self).forward
        if not torch.is_grad_enabled():
            return plain(self, *inputs, **options)
        return checkpoint(plain, self, *inputs, use_reentrant=False, **how, **options)  # pyright: ignore

    return forward


_FORWARD = {
    "full": _recomputing(),
    "selective": _recomputing(context_fn=partial(create_selective_checkpoint_contexts, _keep)),
}
