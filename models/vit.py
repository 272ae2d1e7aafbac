"""The vision transformer encoder, on timm's patch embedding and blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import RelativeBlock
from .drop_path import DropPath
from .positions import Positions
from .relative import Relative, RelativeAttack
from .windows import WindowBlock


@dataclass(frozen=True)
class Size:
    """Width, depth, heads and MLP ratio of an encoder."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "nano": Size(96, 4, 3),
    "micro": Size(128, 6, 4),
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "huge": Size(1280, 32, 16),
    "giant": Size(1408, 40, 16, 48 / 11),
}


def norm_layer(kind: str = "torch", eps: float = 1e-6) -> Callable[[int], nn.Module]:
    """LayerNorm of PyTorch, or NVIDIA Apex's fused one.

    Raises ValueError where Apex's is asked for and its package or a GPU is missing.
    """
    if kind == "torch":
        return partial(nn.LayerNorm, eps=eps)
    if kind != "apex":
        raise ValueError(f"model.norm={kind!r} is not known; choose torch or apex.")
    if not torch.cuda.is_available():
        raise ValueError("model.norm=apex needs an NVIDIA GPU and none is visible; use model.norm=torch.")
    try:
        from apex.normalization import FusedLayerNorm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "model.norm=apex needs NVIDIA Apex, built from its own repository (the package called apex on PyPI is "
            "something else); install it or use model.norm=torch."
        ) from error
    return partial(FusedLayerNorm, eps=eps)


def initialise(module: nn.Module, blocks: nn.ModuleList, std: float | None = 0.02, depth_scaled: bool = True) -> None:
    """Linear weights normal with `std` (cut at ±2), biases zero, LayerNorms one.

    `std=None` takes Xavier's uniform weights instead, for the patch embedding, too (MAE). `depth_scaled` divides the
    last weight of each residual branch by sqrt(2 · layer), so that depth does not inflate the residual. A patch
    embedding has std 0.02 at 16 × 16 × 3 inputs, as released, and for other patches what keeps its output as large
    beside the positions: at 0.02, tokens of small patches would hardly differ between images.
    """
    for part in module.modules():
        if std is None and isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1))
        elif isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std or 0.02)
        elif isinstance(part, nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02 * math.sqrt(768 / part.weight[0].numel()))
        if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)
    if depth_scaled:
        for layer, block in enumerate(blocks, start=1):
            for linear in (block.attn.proj, block.mlp.fc2):  # pyright: ignore
                linear.weight.data.div_(math.sqrt(2.0 * layer))  # pyright: ignore


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Of tokens `[B, N, D]` those at `index` `[..., B, K]`: `[..., B, K, D]`."""
    starts = torch.arange(0, tokens[..., 0].numel(), tokens.shape[1], device=index.device)
    return tokens.flatten(0, 1).index_select(0, (index + starts[:, None]).flatten()).unflatten(0, index.shape)


class LastBlock(Block):
    """A `Block` that gives its last `kept` tokens alone; the others are keys and values to them, and go no further."""

    def forward(self, x: Tensor, kept: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`[B, L, D]` to `[B, kept, D]`."""
        batch, length, width = x.shape
        attention: Any = self.attn
        mlp: Any = self.mlp
        q, k, v = attention.qkv(self.norm1(x)).view(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q[:, :, -kept:], k, v)
        x = x[:, -kept:] + attention.proj(attended.transpose(1, 2).reshape(batch, kept, width))
        return x + mlp(self.norm2(x))


def encoder_flops(size: Size, tokens: int, relative: Relative | None = None) -> float:
    """Floating-point operations of a forward through the blocks for one sequence of `tokens`.

    A contextual relative term multiplies every token by the columns of a table.
    """
    linear = 2 * tokens * size.width**2 * (4 + 2 * size.mlp_ratio)
    columns = len(relative.terms) * relative.buckets(0) if relative and relative.mode == "contextual" else 0
    return size.depth * (linear + (4 * tokens + 2 * columns) * tokens * size.width)


def transformer_blocks(
    size: Size,
    norm: str,
    relative: Relative | None = None,
    prefix: int = 0,
    drop_path: float = 0.0,
    norm_eps: float = 1e-6,
    last: type[Block] = Block,
) -> nn.ModuleList:
    """`size.depth` pre-norm transformer blocks with biased qkv and exact GELU, the last of them a `last`.

    With `relative` positions they are `RelativeBlock`s, whose first `prefix` tokens are no patches. The share of
    samples whose residual branches are dropped in training rises from 0 in the first block to `drop_path` in the last
    (see `draw_paths`).
    """
    layer = norm_layer(norm, norm_eps)
    rates = [drop_path * i / max(1, size.depth - 1) for i in range(size.depth)]
    if relative is not None:
        return nn.ModuleList(
            RelativeBlock(size.width, size.heads, size.mlp_ratio, relative, layer, prefix, rate) for rate in rates
        )
    blocks = [
        kind(size.width, size.heads, size.mlp_ratio, qkv_bias=True, norm_layer=layer)  # pyright: ignore
        for kind in [Block] * (size.depth - 1) + [last]
    ]
    for block, rate in zip(blocks, rates, strict=True):
        if rate:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)  # pyright: ignore
    return nn.ModuleList(blocks)


def run_blocks(
    blocks: nn.ModuleList, tokens: Tensor, grid: tuple[int, int], attacks: Sequence[RelativeAttack | None] | None = None
) -> Iterator[Tensor]:
    """The tokens after each block; `grid` and `attacks` (one a block) matter to relative positions alone."""
    for i, block in enumerate(blocks):
        if isinstance(block, RelativeBlock | WindowBlock):
            tokens = block(tokens, grid, attacks[i] if attacks else None)
        else:
            tokens = block(tokens)
        yield tokens


class Encoder(nn.Module):
    """A vision transformer with timm's feature interface, with or without class token and relative positions.

    `forward` serves pre-training: `images` `[B, C, H, W]` and, optionally, the patches to keep. A class token (I-JEPA
    has none, MAE has one) stands first; it has a position, zero at first, only where positions are learned. Raises
    ValueError for a size that the patch does not divide.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch_size: int,
        channels: int,
        size: Size,
        positions: str = "sincos",
        norm: str = "torch",
        depth_scaled_init: bool = True,
        init_std: float | None = 0.02,
        class_token: bool = False,
        relative: Relative | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.image_size, self.patch_size, self.channels, self.size = image_size, patch_size, channels, size
        self.relative, self.num_prefix_tokens = relative, int(class_token)
        self.grid = self.grid_of(*image_size)
        self.num_features = self.embed_dim = self.head_hidden_size = size.width
        self.patch_embed = PatchEmbed(
            image_size,
            patch_size,
            channels,
            size.width,
            strict_img_size=False,  # pyright: ignore
        )
        self.positions = Positions(size.width, self.grid, positions)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width)) if class_token else None
        placed = class_token and positions == "learned"
        self.cls_position = nn.Parameter(torch.zeros(1, 1, size.width)) if placed else None
        self.blocks = transformer_blocks(size, norm, relative, self.num_prefix_tokens, drop_path, norm_eps)
        self.norm = norm_layer(norm, norm_eps)(size.width)
        self.fc_norm: nn.Module = nn.Identity()  # of pooled tokens, in encoders that were fine-tuned so
        initialise(self, self.blocks, init_std, depth_scaled_init)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` × `width` pixels."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"model.image_size {height}x{width} is not divisible by model.patch_size={self.patch_size}; "
                f"use {max(1, round(height / self.patch_size)) * self.patch_size}x"
                f"{max(1, round(width / self.patch_size)) * self.patch_size}, or another patch."
            )
        return height // self.patch_size, width // self.patch_size

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens with their positions, `[B, N, D]`, at any size that the patch divides.

        Of those to `keep` `[B, K]` or `[E, B, K]` alone `[B, K, D]` or `[E·B, K, D]`; the other pixels are not read.
        """
        grid = self.grid_of(*images.shape[-2:])
        if keep is None:
            return self.patch_embed(images) + self.positions(grid)
        size, projection = self.patch_size, self.patch_embed.proj
        parts = (
            images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        )  # [B, rows, columns, …]
        image = torch.arange(len(images), device=keep.device)[:, None]
        pixels = parts[image, keep // grid[1], keep % grid[1]].flatten(0, -5).flatten(2)
        tokens = F.linear(pixels, projection.weight.flatten(1), projection.bias)
        return tokens + self.positions(grid)[keep.flatten(0, -2)]

    def with_prefix(self, tokens: Tensor) -> Tensor:
        """Patch tokens `[B, N, D]` with the class token in front, where there is one."""
        if self.cls_token is None:
            return tokens
        first = self.cls_token if self.cls_position is None else self.cls_token + self.cls_position
        return torch.cat([first.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)

    def forward(self, images: Tensor, keep: Tensor | None = None, last: int = 1) -> Tensor:
        """Normalised tokens `[B, prefix + K, D]`; several selections `keep` `[E, B, K]` give `[E·B, prefix + K, D]`.

        `last` > 1 averages the normalised outputs of the last blocks.
        """
        return self.encode(self.embed(images, keep), self.grid_of(*images.shape[-2:]), last=last)

    def encode(
        self,
        tokens: Tensor,
        grid: tuple[int, int],
        attacks: Sequence[RelativeAttack | None] | None = None,
        last: int = 1,
    ) -> Tensor:
        """Normalised tokens `[B, prefix + K, D]` of positioned patch tokens `[B, K, D]`; see `forward`."""
        outputs = []
        for i, output in enumerate(run_blocks(self.blocks, self.with_prefix(tokens), grid, attacks)):
            if len(self.blocks) - i <= last:
                outputs.append(self.norm(output))
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).mean(dim=0)

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalised tokens of whole images, `[B, prefix + N, D]` (timm's interface)."""
        return self(images)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean of the patch tokens, `[B, D]` (timm's interface; without classifier, `pre_logits` changes nothing)."""
        return self.fc_norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen blocks (timm's interface): `[B, D, rows, columns]`, or `[B, N, D]` for `NLC`.

        `indices` is a number of last blocks, a list of blocks, or None for all; raises ValueError for others.
        `return_prefix_tokens` pairs each output with its class token, `[B, prefix, D]`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not known; choose NCHW or NLC.")
        depth = len(self.blocks)
        chosen = range(depth) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        wanted = [i % depth if -depth <= i < depth else i for i in chosen]
        if not wanted or any(not 0 <= i < depth for i in wanted):
            raise ValueError(f"indices={indices}: this encoder has blocks 0 … {depth - 1}.")
        grid = self.grid_of(*images.shape[-2:])
        prefix = self.num_prefix_tokens
        found: list[Tensor] = []
        prefixes: list[Tensor] = []
        last = max(wanted) if stop_early else depth - 1
        first = tokens = self.with_prefix(self.embed(images))
        for i, tokens in enumerate(run_blocks(self.blocks[: last + 1], first, grid)):
            if i in wanted:
                output = self.norm(tokens) if norm else tokens
                prefixes.append(output[:, :prefix])
                output = output[:, prefix:]
                if output_fmt == "NCHW":
                    output = output.transpose(1, 2).unflatten(2, grid)
                found.append(output)
        if return_prefix_tokens:
            found = list(zip(found, prefixes, strict=True))  # pyright: ignore
        return found if intermediates_only else (self.norm(tokens), found)
