"""Attention with relative positions, and the transformer block around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from ..kernels import dispatch
from ..kernels.relative_attention import relative_attention, unsupported
from ..kernels.relative_reference import attention
from .drop_path import DropPath
from .relative import Relative, RelativeAttack, RelativeTable


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative terms, `softmax(s q·k + s q·R_k + (s k·R_q)ᵀ) (v + R_v)` (iRPE, AdPE).

    s = head_dim^-½. With `relative.scaled_queries` off, the k-term is `q·R_k`, as in the released fine-tuning.
    `prefix` tokens stand before the patches. `kernels` (auto, reference or triton) is what computes it.
    """

    def __init__(self, width: int, heads: int, relative: Relative, prefix: int = 1):
        super().__init__()
        self.heads, self.relative, self.prefix = heads, relative, prefix
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.kernels = "auto"
        self.relative_q: RelativeTable | None = None
        self.relative_k: RelativeTable | None = None
        self.relative_v: RelativeTable | None = None
        for term in relative.terms:
            setattr(self, f"relative_{term}", RelativeTable(relative, term, heads, width // heads, prefix))

    def forward(self, x: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`, for `prefix` tokens and the patches of `grid` (rows, columns).

        Raises ValueError for a grid that does not match L, and for an attack that the relative terms do not know.
        """
        batch, length, width = x.shape
        if length != self.prefix + grid[0] * grid[1]:
            raise ValueError(
                f"{length} tokens are not {self.prefix} and a grid of {grid[0]} x {grid[1]} patches; "
                "give the grid of these tokens."
            )
        if attack is not None:
            attack.check(self.relative)
        qkv = self.qkv(x).view(batch, length, 3, self.heads, -1)
        query_scale = self.scale if self.relative.scaled_queries else 1.0
        mode = "none" if attack is None else attack.mode
        if self.relative_k is not None and self.choose(grid, qkv.device, qkv.dtype, mode).operator == "triton":
            table, attacked, added = self.relative_k.tables(grid, attack, query_scale)
            # The attack's embedding belongs to the table and takes its scale, whatever that of q·k is.
            added = None if added is None else added / self.scale
            masked = attack.masked if attack is not None and (attacked is not None or added is not None) else None
            lookup = self.relative_k.lookup(grid, qkv.device)
            out = relative_attention(
                qkv, table, lookup, self.scale, masked=masked, attacked=attacked, added=added, operator="triton"
            )
            return self.proj(out.reshape(batch, length, width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias, keys = None, k
        if self.relative_k is not None:
            bias = self.relative_k.logits(q, grid, attack, query_scale)
            keys = self.relative_k.attacked_keys(k, attack, query_scale / self.scale)
        if self.relative_q is not None:
            from_keys = self.relative_q.logits(k, grid, attack, self.scale).transpose(-2, -1)
            bias = from_keys if bias is None else bias + from_keys
        value_term = partial(self.relative_v.values, grid=grid, attack=attack) if self.relative_v is not None else None
        out = attention(q, keys, v, self.scale, bias, value_term)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))

    def choose(self, grid: tuple[int, int], device: torch.device, dtype: torch.dtype, mode: str) -> dispatch.Choice:
        """What computes the attention of tokens of `dtype` on `device` under an attack of `mode`.

        Raises ValueError for `kernels` that cannot be had on the device.
        """
        choice, spec = dispatch.choose_attention(self.kernels, device), self.relative
        if choice.operator == "reference":
            return choice
        if mode == "bucket":
            return dispatch.Choice("reference", "an embedding for each bucket")
        if spec.terms != "k" or spec.mode != "contextual" or self.relative_k is None:
            return dispatch.Choice("reference", f"terms {spec.terms} of mode {spec.mode}")
        lookup = self.relative_k.lookup(grid, device)
        why = unsupported(lookup, self.qkv.in_features // self.heads, dtype, attacked=mode == "shift")
        if why is not None:
            return dispatch.Choice("reference", why)
        case = "several tiles" if lookup.tiles > 1 else "two tables" if mode == "shift" else "one tile"
        return dispatch.choose_attention(self.kernels, device, case)


class RelativeBlock(nn.Module):
    """A pre-norm transformer block with relative attention and exact GELU, named as timm's `Block`."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        relative: Relative,
        norm_layer: Callable[[int], nn.Module],
        prefix: int = 1,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = RelativeAttention(width, heads, relative, prefix)
        self.norm2 = norm_layer(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`; `grid` and `attack` as for `RelativeAttention`."""
        x = x + self.drop_path1(self.attn(self.norm1(x), grid, attack))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
