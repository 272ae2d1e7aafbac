"""Attention with relative positions, and the transformer block around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from ..kernels.relative_attention import relative_attention
from .relative import Relative, RelativeAttack, RelativeTable


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative terms, `softmax(s q·k + s q·R_k + (s k·R_q)ᵀ) (v + R_v)` (iRPE, AdPE).

    s = head_dim^-½. With `relative.scaled_queries` off, the k-term is `q·R_k`, as in the released fine-tuning.
    `prefix` tokens stand before the patches.
    """

    def __init__(self, width: int, heads: int, relative: Relative, prefix: int = 1):
        super().__init__()
        self.heads, self.relative, self.prefix = heads, relative, prefix
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_q = self.relative_k = self.relative_v = None
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
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query_scale = self.scale if self.relative.scaled_queries else 1.0
        bias, keys = None, k
        if self.relative_k is not None:
            bias = self.relative_k.logits(q, grid, attack, query_scale)
            # The attack's embedding belongs to the table and takes its scale, whatever that of q·k is.
            keys = self.relative_k.attacked_keys(k, attack, query_scale / self.scale)
        if self.relative_q is not None:
            from_keys = self.relative_q.logits(k, grid, attack, self.scale).transpose(-2, -1)
            bias = from_keys if bias is None else bias + from_keys
        value_term = partial(self.relative_v.values, grid=grid, attack=attack) if self.relative_v is not None else None
        out = relative_attention(q, keys, v, self.scale, bias, value_term)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


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
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None) -> Tensor:
        """`[B, L, D]` to `[B, L, D]`; `grid` and `attack` as for `RelativeAttention`."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid, attack))
        return x + self.drop_path(self.mlp(self.norm2(x)))
