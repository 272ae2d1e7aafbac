"""The steps of StoP and AdPE in the form that their released code gives them, for `elsewhere bench released` alone.

Written from what that code does (docs/methods.md), not from its text, and without any of what makes ours quicker. Names
of weights are ours, so that one state serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..models.jepa import Jepa
from ..models.mae import Mae
from ..models.relative import piecewise
from ..models.vit import Encoder, Size

_RATIO, _RADIUS = 1.9, 3  # of AdPE's product buckets, 7 × 7 and one for the class token


def _run(what: Callable[..., Tensor], checkpointed: bool, *inputs: Any) -> Tensor:
    # The re-entrant kind, which is what torch had then; it computes all again, today's stops at what is needed.
    return checkpoint(what, *inputs, use_reentrant=True) if checkpointed else what(*inputs)  # pyright: ignore


class _Table(nn.Module):
    """AdPE's coordinate attack on relative positions: `grid_sample` of the table at the offset of every pair."""

    def __init__(self, depth: int, grid: tuple[int, int]):
        super().__init__()
        self.grid, self.table = grid, nn.Parameter(torch.zeros(1, depth, (2 * _RADIUS + 1) ** 2 + 1))

    def _looked_up(self, shift: Tensor | float) -> Tensor:
        """The table at all pairs, `[d, L, L]`; a row offset reads the table's column, as released."""
        table = self.table[0]
        axes = (torch.arange(size, dtype=table.dtype, device=table.device) for size in self.grid)
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        offsets = piecewise(places[:, None] - places[None] + shift, _RATIO) / (2 * _RATIO)
        image = table[None, :, :-1].unflatten(2, (2 * _RADIUS + 1, 2 * _RADIUS + 1))
        inner = F.grid_sample(image, offsets[None], align_corners=False)[0]  # [d, N, N]
        first = table[:, -1:, None]
        rows = torch.cat([first.expand(-1, inner.shape[1], -1), inner], dim=2)
        return torch.cat([first.expand(-1, -1, rows.shape[2]), rows], dim=1)

    def forward(self, q: Tensor, masked: Tensor, shift: Tensor) -> Tensor:
        """Logits `[B, H, L, L]` of scaled queries; the rows of `masked` `[B, L]` tokens see moved offsets."""
        still, moved = (torch.einsum("bhid,dij->bhij", q, self._looked_up(by)) for by in (0.0, shift))
        return torch.where(masked[:, None, :, None], moved, still)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, grid: tuple[int, int] | None):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_k = _Table(width // heads, grid) if grid else None

    def forward(self, x: Tensor, *attack: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = q * self.scale
        logits = q @ k.transpose(-2, -1)
        if self.relative_k is not None:
            logits = logits + self.relative_k(q, *attack)
        return self.proj((logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, width))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    """A pre-norm block; `checkpointed` computes attention and MLP again in the backward, as StoP always does."""

    def __init__(self, size: Size, grid: tuple[int, int] | None, checkpointed: bool):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, eps=1e-6) for _ in range(2))
        self.attn = _Attention(size.width, size.heads, grid)
        self.mlp = _Mlp(size.width, int(size.width * size.mlp_ratio))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, *attack: Tensor) -> Tensor:
        again = self.checkpointed and torch.is_grad_enabled()
        x = x + _run(self.attn, again, self.norm1(x), *attack)
        return x + _run(self.mlp, again, self.norm2(x))


def gather(tokens: Tensor, masks: Tensor) -> Tensor:
    """The tokens of each mask `[M, B, K]`, one gather a mask: `[M·B, K, D]`."""
    return torch.cat([torch.gather(tokens, 1, mask[..., None].repeat(1, 1, tokens.shape[2])) for mask in masks])


class _Stack(nn.Module):
    """Blocks and a norm, and positions that are no weights."""

    places: Tensor

    def __init__(self, size: Size, positions: Tensor, grid: tuple[int, int] | None, checkpointed: bool):
        super().__init__()
        self.register_buffer("places", positions.detach().clone(), persistent=False)
        self.blocks = nn.ModuleList(_Block(size, grid, checkpointed) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def run(self, x: Tensor, masked: Tensor | None = None, shifts: Tensor | None = None) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x) if shifts is None else block(x, masked, shifts[number])
        return self.norm(x)


class _Encoder(_Stack):
    def __init__(self, of: Encoder, grid: tuple[int, int] | None = None, checkpointed: bool = False):
        super().__init__(of.size, of.positions(), grid, checkpointed)
        patches = nn.Conv2d(of.channels, of.size.width, of.patch_size, of.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patches})
        self.cls_token = nn.Parameter(torch.empty(1, 1, of.size.width)) if of.cls_token is not None else None

    def embed(self, images: Tensor) -> Tensor:
        return self.patch_embed["proj"](images).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        x = self.embed(images) + self.places
        return self.run(x if masks is None else gather(x, masks))


class _Predictor(_Stack):
    def __init__(self, of: Any, checkpointed: bool):
        super().__init__(of.size, of.positions(), None, checkpointed)
        self.embed, self.proj = (
            nn.Linear(of.embed.in_features, of.size.width),
            nn.Linear(of.size.width, of.embed.in_features),
        )

    def forward(self, tokens: Tensor, context: Tensor, targets: Tensor, noise: Tensor) -> Tensor:
        places = self.places.repeat(context.shape[1], 1, 1)
        x = self.embed(tokens) + gather(places, context)
        wanted = gather(places, targets) + self.embed(noise.flatten(0, 1))
        x = torch.cat([x.repeat(len(targets), 1, 1), wanted], dim=1)
        return self.proj(self.run(x)[:, context.shape[2] :])


class ReleasedStop(nn.Module):
    """StoP's step around the weights of a published-setting `method`; one context block."""

    def __init__(self, method: Jepa, checkpointed: bool):
        super().__init__()
        self.encoder, self.predictor = (
            _Encoder(method.encoder, None, checkpointed),
            _Predictor(method.predictor, checkpointed),
        )
        self.teacher = _Encoder(method.teacher).requires_grad_(False)
        self.std = method.predictor.stop.std
        self.load_state_dict(method.state_dict())

    def forward(self, images: Tensor, context: Tensor, targets: Tensor, noise: Tensor | None = None) -> Tensor:
        """Loss of normalised images; `noise` `[T, B, Nt, D]` stands for what is drawn otherwise."""
        with torch.no_grad():
            features = self.teacher(images)
            wanted = gather(F.layer_norm(features, features.shape[-1:]), targets)
        tokens = self.encoder(images, context)
        if noise is None:
            shape = (*targets.shape, tokens.shape[2])
            noise = torch.normal(torch.zeros(shape, device=images.device), self.std)
        return F.smooth_l1_loss(self.predictor(tokens, context, targets, noise), wanted)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """The teacher's moving average, a parameter after the other."""
        for theirs, ours in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            theirs.mul_(momentum).add_((1.0 - momentum) * ours.detach())


class _Decoder(_Stack):
    def __init__(self, of: Any):
        super().__init__(of.size, of.positions(), of.grid, False)
        self.embed, self.proj = (
            nn.Linear(of.embed.in_features, of.size.width),
            nn.Linear(of.size.width, of.proj.out_features),
        )


class ReleasedAdpe(nn.Module):
    """AdPE's step with relative positions under the coordinate attack, around the weights of a published `method`."""

    def __init__(self, method: Mae, shifts: dict[str, Tensor]):
        super().__init__()
        self.encoder, self.decoder = _Encoder(method.encoder, method.encoder.grid), _Decoder(method.decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, method.encoder.size.width))
        self.patches = method.patches
        self.load_state_dict(method.state_dict())
        self.shifts = nn.ParameterDict({name: nn.Parameter(shift.detach().clone()) for name, shift in shifts.items()})

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """Loss of normalised crops `[B, C, H, W]`, of which the patches `visible` `[B, K]` are seen."""
        encoder, decoder = self.encoder, self.decoder
        masked = torch.ones(len(images), len(encoder.places), dtype=torch.bool, device=images.device)
        masked = masked.scatter(1, visible, False)
        # Patches are taken apart into kept and masked ones, and put back in order with a token for each masked one.
        order = torch.cat([visible, masked.nonzero()[:, 1].view(len(images), -1)], dim=1)
        kept = gather(encoder.embed(images), visible[None])
        shuffled = torch.cat([kept, self.mask_token.repeat(len(images), masked.shape[1] - visible.shape[1], 1)], dim=1)
        x = gather(shuffled, order.argsort(dim=1)[None]) + encoder.places
        assert encoder.cls_token is not None
        x = torch.cat([encoder.cls_token.expand(len(images), -1, -1), x], dim=1)
        rows = F.pad(masked, (1, 0))
        x = decoder.embed(encoder.run(x, rows, self.shifts["encoder"]))
        x = x + F.pad(decoder.places, (0, 0, 1, 0))
        predictions = decoder.proj(decoder.run(x, rows, self.shifts["decoder"]))[:, 1:]
        target = self.patches(images)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        error = ((predictions - target) ** 2).mean(dim=-1)
        return (error * masked).sum() / masked.sum()
