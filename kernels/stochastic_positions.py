"""Stochastic positions: noise keyed by what it belongs to, in plain PyTorch or Triton, and the noised embedding.

The generator is Philox-4x32-10 (Salmon et al., SC 2011), so the same numbers come out on any device, under any
sharding of the batch, and when activations are recomputed.

    key      (seed, constant)
    counter  (column quad | block << 16, patch, sample id low 32 bits, sample id high 12 bits | epoch << 12)

Lane `l` of quad `c` gives column `l * Q + c`, with `Q = ceil(columns / 4)` quads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import choose_noise

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
KEY = 0x53746F50  # keeps this stream apart from others under the same seed
_MOST_COLUMNS = 4 * (2**16 - 1)
_INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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
    return philox(counter, (seed & _LOW, KEY))


def position_noise(
    seed: int,
    epochs: Tensor,
    sample_ids: Tensor,
    blocks: Tensor,
    patches: Tensor,
    columns: int,
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    kernels: str = "reference",
) -> Tensor:
    """Normal noise `[R, N, columns]` of standard deviation `scale`, a function of its arguments alone.

    `epochs`, `sample_ids` and `blocks` are `[R]`, `patches` is `[R, N]`, of integers; `seed` has 32 bits, epochs 20,
    ids 44, blocks 16, patches 32. Computed in float32 and rounded once to `dtype` (float32, float16 or bfloat16).
    `kernels` is auto, reference or triton (`dispatch.choose_noise`): the words are the same, the numbers within 1e-5
    times `scale`. Raises ValueError for arguments that do not fit together.
    """
    _check(seed, epochs, sample_ids, blocks, patches, columns, dtype)
    if choose_noise(kernels, patches.device).operator == "triton":
        return _triton_noise(epochs, sample_ids, blocks, patches, seed, columns, scale, dtype)
    noise = _reference_noise(seed, epochs, sample_ids, blocks, patches, columns)
    return (noise if scale == 1.0 else noise * scale).to(dtype)


def _check(
    seed: int, epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor, columns: int, dtype: torch.dtype
) -> None:
    if patches.dim() != 2:
        raise ValueError(f"patches has to be [R, N], and is {list(patches.shape)}.")
    keys = {"epochs": epochs, "sample_ids": sample_ids, "blocks": blocks, "patches": patches}
    for name, tensor in keys.items():
        if tensor.dtype not in _INTEGERS:
            raise ValueError(f"{name} has to hold integers, and is {tensor.dtype}.")
        if tensor.device != patches.device:
            raise ValueError(f"{name} is on {tensor.device} and patches on {patches.device}; move one of them.")
        if tensor is not patches and tensor.shape != patches.shape[:1]:
            raise ValueError(
                f"{name} has to be [R], and is {list(tensor.shape)} where patches is {list(patches.shape)}."
            )
    if not 0 <= seed <= _LOW:
        raise ValueError(f"seed={seed} has more than 32 bits or is negative.")
    if not 0 < columns <= _MOST_COLUMNS:
        raise ValueError(f"{columns} columns of noise: at least 1 and at most {_MOST_COLUMNS:,} fit the counter.")
    if dtype not in _FLOATS:
        raise ValueError(f"dtype={dtype} is not for noise; choose torch.float32, torch.float16 or torch.bfloat16.")


def _reference_noise(
    seed: int, epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor, columns: int
) -> Tensor:
    """Standard normal noise `[R, N, columns]` float32.

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


@torch.library.custom_op("elsewhere::position_noise", mutates_args=())
def _triton_noise(
    epochs: Tensor,
    sample_ids: Tensor,
    blocks: Tensor,
    patches: Tensor,
    seed: int,
    columns: int,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """`position_noise` by Triton's kernel, of arguments that were checked; integers have no gradient."""
    from .triton_noise import MOST_TOKENS, draw  # needs triton, which a CPU does without

    if patches.numel() > MOST_TOKENS:
        raise ValueError(f"patches has {patches.numel():,} tokens, and the kernel counts to {MOST_TOKENS:,}.")
    out = torch.empty(*patches.shape, columns, dtype=dtype, device=patches.device)
    return draw(out, epochs, sample_ids, blocks, patches, seed, scale)


@_triton_noise.register_fake
def _(epochs, sample_ids, blocks, patches, seed, columns, scale, dtype):
    return patches.new_empty(*patches.shape, columns, dtype=dtype)


def stochastic_positions(
    table: Tensor, patches: Tensor, noise: Tensor, weight: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """Positions as random variables, `table[patches] + noise @ weight.T + bias` (StoP, Eq. 3–5).

    `table` is `[P, D]`, `patches` `[R, N]`, `noise` `[R, N, K]` of the standard deviation wanted, `weight` `[D, K]`
    or None for a fixed covariance (then `K = D`); the result is `[R, N, D]`.
    """
    moved = noise if weight is None else torch.nn.functional.linear(noise, weight, bias)
    return table[patches] + moved
