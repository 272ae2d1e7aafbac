"""Stochastic depth whose draws are keyed by sample, so that ranks, restarts and recomputation change nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..kernels.stochastic_positions import position_noise

BLOCK = 1 << 14  # the block number of these draws, apart from those of target and context blocks


class DropPath(nn.Module):
    """Drops a residual branch `[B, …]` of a share `rate` of the samples in training, and enlarges the others'.

    Which ones says `uniforms` `[B]` (see `draw_paths`); rows that several windows of a sample give stand together.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.uniforms: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        assert self.uniforms is not None, "paths are drawn before each forward pass in training"
        kept = (self.uniforms >= self.rate).to(x.dtype) / (1.0 - self.rate)
        kept = kept.repeat_interleave(x.shape[0] // kept.shape[0])
        return x * kept.view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def draw_paths(blocks: Iterable[nn.Module], seed: int, epochs: Tensor, sample_ids: Tensor) -> None:
    """Draw for every `DropPath` of the blocks which samples (epochs and ids `[B]`) it drops in the next forward."""
    paths = [part for block in blocks for part in block.modules() if isinstance(part, DropPath) and part.rate]
    if not paths:
        return
    places = torch.arange(len(paths), device=sample_ids.device).expand(len(sample_ids), -1)
    rows = torch.full_like(sample_ids, BLOCK)
    normal = position_noise(seed, epochs, sample_ids, rows, places, 1)[..., 0]
    for part, uniforms in zip(paths, torch.special.ndtr(normal).unbind(1), strict=True):
        part.uniforms = uniforms
