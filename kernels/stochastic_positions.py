"""Stochastic positions in plain PyTorch: noise keyed by what it belongs to, and the noised position embedding.

The generator is Philox-4x32-10 (Salmon et al., SC 2011), so the same numbers come out on any device, under any
sharding of the batch, and when activations are recomputed.

    key      (seed, constant)
    counter  (column quad | block << 16, patch, sample id low 32 bits, sample id high 12 bits | epoch << 12)

Lane `l` of quad `c` gives column `l * Q + c`, with `Q = ceil(columns / 4)` quads.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_KEY = 0x53746F50  # keeps this stream apart from others under the same seed


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four 32-bit words (as int64) for each counter; the counters are int64 tensors of one broadcast shape.

    A 64-bit product wraps in int64, and its two's complement still holds both 32-bit halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def position_words(
    seed: int, epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor, columns: int
) -> list[Tensor]:
    """The raw words behind `position_noise`: four tensors `[R, N, ceil(columns / 4)]` of int64 in [0, 2**32)."""
    quads = -(-columns // 4)
    if quads >= 1 << 16:
        raise ValueError(f"{columns} columns of noise: at most 262,140 fit the counter.")
    ids = sample_ids.to(torch.int64)[:, None, None]
    column = torch.arange(quads, device=patches.device)
    first = column | (blocks.to(torch.int64)[:, None, None] << 16)
    shape = (*patches.shape, quads)
    counter = (
        first.expand(shape),
        patches.to(torch.int64)[..., None].expand(shape),
        (ids & _LOW).expand(shape),
        ((ids >> 32) | (epochs.to(torch.int64)[:, None, None] << 12)).expand(shape),
    )
    return philox(counter, (seed & _LOW, _KEY))


def position_noise(
    seed: int, epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor, columns: int
) -> Tensor:
    """Standard normal noise `[R, N, columns]` float32, a function of its arguments alone.

    `epochs`, `sample_ids` and `blocks` are `[R]`, `patches` is `[R, N]`; `seed` has 32 bits, epochs 20, ids 44,
    blocks 16.
    Box–Muller on 23-bit uniforms, which float32 holds exactly, so |noise| <= 5.77.
    """
    uniform = [
        ((word >> 9).float() + 0.5) * 2.0**-23
        for word in position_words(seed, epochs, sample_ids, blocks, patches, columns)
    ]
    lanes = []
    for radius, angle in (uniform[:2], uniform[2:]):
        length = torch.sqrt(-2.0 * torch.log(radius))
        turn = angle * (2.0 * torch.pi)
        lanes += [length * torch.cos(turn), length * torch.sin(turn)]
    return torch.cat(lanes, dim=-1)[..., :columns]


def stochastic_positions(
    table: Tensor, patches: Tensor, noise: Tensor, weight: Tensor | None, std: float, bias: Tensor | None = None
) -> Tensor:
    """Positions as random variables, `table[patches] + std * noise @ weight.T + bias` (StoP, Eq. 3–5).

    `table` is `[P, D]`, `patches` `[R, N]`, `noise` `[R, N, K]`, `weight` `[D, K]` or None for a fixed
    covariance (then `K = D`); the result is `[R, N, D]`. `std` multiplies the noise: it is a standard deviation.
    """
    scaled = noise * std
    moved = scaled if weight is None else torch.nn.functional.linear(scaled, weight, bias)
    return table[patches] + moved
