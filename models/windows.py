"""Attention within windows of the patch grid (ViTDet, Li et al., ECCV 2022, section 3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import RelativeBlock
from .relative import RelativeAttack


def to_windows(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Tokens `[B, N, D]` of `grid` by windows, row by row: `[B · windows, window², D]`, zeros beyond the grid."""
    rows, columns = grid
    padded = F.pad(tokens.unflatten(1, grid), (0, 0, 0, -columns % window, 0, -rows % window))
    parts = padded.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # [B, down, window, across, window, D]
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(tokens: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The tokens `[B, N, D]` of `grid` from those of its windows; the inverse of `to_windows`."""
    down, across = (-(-size // window) for size in grid)
    parts = tokens.unflatten(1, (window, window)).unflatten(0, (-1, down, across)).transpose(2, 3)
    return parts.flatten(3, 4).flatten(1, 2)[:, : grid[0], : grid[1]].flatten(1, 2)


class WindowBlock(nn.Module):
    """A transformer block whose tokens attend to those of their own `window` × `window` patches alone.

    It takes over the parts of `block`, timm's or a `RelativeBlock`, with their names. As in ViTDet the windows at the
    lower and right edge are filled up with zeros, after the norm and without a mask. Raises ValueError for a block
    whose relative positions know prefix tokens, which have no place in a window.
    """

    def __init__(self, block: nn.Module, window: int):
        super().__init__()
        self.window, self.relative = window, isinstance(block, RelativeBlock)
        if isinstance(block, RelativeBlock) and block.attn.prefix:
            raise ValueError("Attention in windows has no place for a class token: set model.class_token=false.")
        self.norm1: nn.Module = block.norm1  # pyright: ignore
        self.attn: nn.Module = block.attn  # pyright: ignore
        self.drop_path1: nn.Module = block.drop_path1  # pyright: ignore
        self.norm2: nn.Module = block.norm2  # pyright: ignore
        self.mlp: nn.Module = block.mlp  # pyright: ignore
        self.drop_path2: nn.Module = block.drop_path2  # pyright: ignore

    def forward(self, x: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`, for the patches of `grid` (rows, columns); attacks are not for windows."""
        assert attack is None, "an adversary acts in pre-training, which has no windows"
        parts, window = to_windows(self.norm1(x), grid, self.window), (self.window, self.window)
        parts = self.attn(parts, window) if self.relative else self.attn(parts)
        x = x + self.drop_path1(from_windows(parts, grid, self.window))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def global_blocks(depth: int, count: int = 4) -> list[int]:
    """The blocks of `depth` that attend globally: the last of each of `count` parts, as even as can be (ViTDet)."""
    return sorted({-(-depth * part // count) - 1 for part in range(1, count + 1)})


def attend_in_windows(blocks: nn.ModuleList, window: int, count: int = 4) -> None:
    """Turn all `blocks` but `count` evenly spread ones into `WindowBlock`s, in place; 0 windows change nothing."""
    kept = global_blocks(len(blocks), count) if count else []
    for number, block in enumerate(blocks):
        if window and number not in kept:
            blocks[number] = WindowBlock(block, window)
