"""A classifier that attends to the tokens of a frozen encoder with one learned query."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AttentivePool(nn.Module):
    """A cross-attention block with one learned query, and a linear classifier (V-JEPA's attentive probe).

    The block is pre-norm with a residual MLP, as V-JEPA's. A single query needs no key and no value of every token: its
    product with a head's keys is one with the tokens themselves, and values are taken of the attended mean.
    """

    def __init__(self, width: int, heads: int, classes: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.classifier = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.query, std=0.02)

    def pool(self, tokens: Tensor) -> Tensor:
        """`[B, width]` of tokens `[B, N, width]`."""
        width, head = tokens.shape[-1], tokens.shape[-1] // self.heads
        key, value = self.kv.weight.view(2, self.heads, head, width)
        query = self.q(self.query)[0, 0].view(self.heads, head) * head**-0.5
        # A bias of the keys adds the same to every logit of a head, so that softmax cancels it.
        toward = torch.einsum("hd,hdw->hw", query, key)  # [heads, width]
        normed = self.norm1(tokens)
        attention = (normed @ toward.T).softmax(dim=1)  # [B, N, heads]
        attended = attention.transpose(1, 2) @ normed  # [B, heads, width]
        found = torch.einsum("bhw,hdw->bhd", attended, value).flatten(1) + self.kv.bias[width:]
        return self.query[:, 0] + self.proj(found)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, classes]` of tokens `[B, N, width]`."""
        pooled = self.pool(tokens)
        pooled = pooled + self.mlp(self.norm2(pooled))
        return self.classifier(pooled)


def loss_of(pools: list[AttentivePool], tokens: Tensor, labels: Tensor) -> Tensor:
    """The sum of the mean cross-entropies of several probes, whose gradients do not mix."""
    return torch.stack([F.cross_entropy(pool(tokens), labels) for pool in pools]).sum()
