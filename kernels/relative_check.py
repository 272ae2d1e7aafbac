"""Whether the Triton kernels of relative attention give on this GPU what the reference gives."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .dispatch import said
from .relative_attention import relative_attention
from .relative_lookup import make_lookup

# Relative to the reference's norm: far above rounding, far below what a wrong kernel gives.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Patches along an edge: one tile and several, which small GPUs have no shared memory for in float32.
_SIDES = {torch.float32: (4,), torch.bfloat16: (4, 9)}


@functools.cache
def fault(device: torch.device) -> str | None:
    """What is wrong with the kernels on `device`, to stand after "needs"; None where output and gradients agree."""
    with unset_fake_temporarily(), torch.enable_grad():
        for dtype, tolerance in _TOLERANCE.items():
            expected = _small(device, "reference", torch.float32, _SIDES[dtype])
            try:
                found = _small(device, "triton", dtype, _SIDES[dtype])
            except Exception as error:  # a compiler, linker or driver that is missing or old
                return f"kernels that run here ({said(error)})"
            for ours, theirs in zip(found, expected, strict=True):
                if not (ours - theirs).norm() <= tolerance * theirs.norm():  # so that NaN counts
                    return "kernels that agree with the reference, and on this GPU they do not"
    return None


def _small(device: torch.device, operator: str, dtype: torch.dtype, sides: tuple[int, ...]) -> list[torch.Tensor]:
    """Output and gradients, float32, of two images with two heads on square grids."""
    found = []
    for side in sides:
        random = torch.Generator().manual_seed(side)
        length = 1 + side**2
        index = torch.arange(side)[:, None] - torch.arange(side)[None, :]
        index = index.clamp(-1, 1) + 1  # three ranges of rows by three ranges of columns
        index = (index[:, None, :, None] * 3 + index[None, :, None, :]).reshape(side**2, side**2)
        index = torch.nn.functional.pad(index, (1, 0, 1, 0), value=9).to(device)
        lookup = make_lookup(index, 10, (side, side), 1)
        qkv, table, weight = (
            torch.randn(shape, generator=random).to(device)
            for shape in ((2, length, 3, 2, 64), (1, 64, 10), (2, length, 2, 64))
        )
        inputs: list[torch.Tensor] = [qkv.to(dtype).requires_grad_(), table.requires_grad_()]
        attack: dict[str, Any] = {}
        if lookup.tiles == 1:  # several take no second table
            attack = {"attacked": -table.detach(), "added": table.detach()[..., 0]}
            inputs += [each.requires_grad_() for each in attack.values()]
            attack["masked"] = (torch.arange(length, device=device) % 2).expand(2, -1)
        out = relative_attention(inputs[0], inputs[1], lookup, 0.125, operator=operator, **attack)
        gradients = torch.autograd.grad((out * weight).sum(), inputs)
        found += [each.detach().float() for each in (out, *gradients)]
    return found
