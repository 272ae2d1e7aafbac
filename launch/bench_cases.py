"""What `elsewhere bench kernels` runs: shapes, random inputs, variants of each hot path, and the least they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.relative_attention import relative_attention, unsupported
from ..kernels.relative_lookup import make_lookup
from ..kernels.stochastic_positions import position_noise, stochastic_positions
from ..models.relative import bucket_ids, offset_ids

# Images, heads, tokens, head dimension: encoders at 112 and 224 pixels and decoders, and the head dimension of
# I-JEPA's predictors. A square number of tokens has no class token.
ATTENTION = (
    (512, 12, 50, 64),
    (256, 16, 65, 80),
    (512, 16, 50, 32),
    (128, 12, 197, 64),
    (128, 16, 257, 80),
    (64, 16, 785, 64),
    (128, 16, 196, 24),
)
# The same with few images.
ATTENTION_CPU = tuple((2 if length < 100 else 1, heads, length, depth) for _, heads, length, depth in ATTENTION)
VARIANTS = ("triton", "dense", "gather", "flex", "sdpa", "reference", "randn")
SETTINGS = ("hard", "key attack", "two tables")
# Tokens and columns: those of ViT-H and ViT-B.
NOISE = ((32768, 1280), (32768, 768))
NOISE_CPU = ((1024, 1280), (1024, 768))
# Tokens, columns and the predictor's width.
POSITIONS = ((32768, 1280, 384),)
POSITIONS_CPU = ((1024, 1280, 384),)
_ROW = 64  # patches of a target block or context
_GRID = 196  # positions of a table
_SMALL = 2  # images that a variant's numbers are checked on
_SEED = 7


@dataclass
class Inputs:
    """What a variant is called with, and the gradient of its output."""

    given: dict[str, Any]
    gradient: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that have a gradient."""
        return [each for each in self.given.values() if isinstance(each, Tensor) and each.requires_grad]

    @property
    def bytes(self) -> int:
        """Their size in memory."""
        tensors = [each for each in self.given.values() if isinstance(each, Tensor)]
        return sum(each.nbytes for each in [*tensors, self.gradient])

    def exact(self) -> Inputs:
        """The same numbers in float32."""

        def widen(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x.detach().float().requires_grad_(x.requires_grad)

        return Inputs({name: widen(each) for name, each in self.given.items()}, self.gradient.float())


@dataclass(frozen=True)
class Floor:
    """What the best implementation has to do: bytes read and written once, and operations of its matrix products."""

    bytes: int
    flops: int = 0

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The longer of moving the bytes at `bandwidth` (bytes/s) and of the operations at `rate` (flop/s)."""
        return max(self.bytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Case:
    """A hot path at a shape: `draw(small)` makes new inputs, `variants` are called with them.

    `expected` is what their float32 numbers are compared with, except those of `unlike`, which compute something else.
    `floors` has what is measured, `forward` and perhaps `backward`.
    """

    path: str
    shape: tuple[int, ...]
    setting: str
    draw: Callable[[bool], Inputs]
    variants: dict[str, Callable[..., Tensor]]
    expected: Callable[..., Tensor]
    floors: dict[str, Floor]
    unlike: tuple[str, ...]


def attention_floors(shape: tuple[int, int, int, int], size: int) -> dict[str, Floor]:
    """Floors of attention on numbers of `size` bytes: q, k, v and the output once, or q, k, v, their gradients and the
    output's. Two products of L × L × d forward and four backward; neither the table nor anything computed again."""
    batch, heads, length, depth = shape
    numbers, product = batch * length * heads * depth, 2 * batch * heads * length**2 * depth
    return {"forward": Floor(4 * numbers * size, 2 * product), "backward": Floor(7 * numbers * size, 4 * product)}


def noise_floors(tokens: int, columns: int, size: int) -> dict[str, Floor]:
    """The floor of noise: written once."""
    return {"forward": Floor(tokens * columns * size)}


def position_floors(tokens: int, columns: int, width: int, size: int) -> dict[str, Floor]:
    """Floors of noised positions: the output written, or its gradient read, and one product with the weight's shape.

    Neither drawing nor writing the noise is in them: a kernel could do without the latter.
    """
    once = Floor(tokens * width * size, 2 * tokens * columns * width)
    return {"forward": once, "backward": once}


def sequence(length: int) -> tuple[int, int]:
    """Patches on a side and prefix tokens of a sequence; ValueError for one that is not of a square grid."""
    for prefix in (0, 1):
        side = math.isqrt(length - prefix)
        if side**2 == length - prefix:
            return side, prefix
    raise ValueError(f"{length} tokens are not a square grid, with or without a class token.")


def attention_case(
    shape: tuple[int, int, int, int], setting: str, dtype: torch.dtype, device: torch.device
) -> Case | None:
    """Relative attention with one of `SETTINGS`; None for `two tables` where the Triton kernels do not take them."""
    batch, heads, length, depth = shape
    side, prefix = sequence(length)
    grid, scale, two = (side, side), depth**-0.5, setting == "two tables"
    if two:
        columns, index = (2 * side - 1) ** 2 + prefix, offset_ids(grid, prefix)
    else:
        columns, index = 49 + prefix, bucket_ids(grid, prefix)
    lookup = make_lookup(index.to(device), columns, grid, prefix)
    if two and unsupported(lookup, depth, dtype, attacked=True) is not None:
        return None

    def draw(small: bool) -> Inputs:
        images = min(batch, _SMALL) if small else batch

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device)

        qkv = normal(images, length, 3, heads, depth).to(dtype)
        given: dict[str, Any] = {"qkv": qkv, "table": normal(1, depth, columns) * scale}
        if setting == "key attack":
            given["added"] = normal(1, depth) * 0.5
        elif two:
            given["attacked"] = normal(1, depth, columns) * scale
        for each in given.values():
            each.requires_grad_()
        if setting != "hard":
            given["masked"] = (torch.rand(images, length, device=device) < 0.75).to(dtype)
            given["masked"][:, :prefix] = 0
        return Inputs(given, normal(images, length, heads, depth).to(dtype))

    def reference(form: str) -> Callable[..., Tensor]:
        def plain_torch(qkv: Tensor, table: Tensor, **attack: Any) -> Tensor:
            return relative_attention(qkv, table, lookup, scale, form=form, **attack)

        return plain_torch

    def triton(qkv: Tensor, table: Tensor, **attack: Any) -> Tensor:
        return relative_attention(qkv, table, lookup, scale, operator="triton", **attack)

    compiled = torch.compile(flex, dynamic=False) if device.type == "cuda" else flex
    short = lookup.index.to(torch.int32)
    variants = {
        "triton": triton,
        "dense": reference("dense"),
        "gather": reference("gather"),
        "flex": lambda qkv, table, **attack: compiled(qkv, table, short, scale, **attack),
        "sdpa": lambda qkv, table, **attack: plain(qkv, scale),
    }
    floors = attention_floors(shape, dtype.itemsize)
    return Case("attention", shape, setting, draw, variants, reference("gather"), floors, ("sdpa",))


def plain(qkv: Tensor, scale: float) -> Tensor:
    """Attention without any relative term, `[B, L, H, d]`: what no variant is expected to beat."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def looked_up(products: Tensor, index: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod` that adds, of `products` `[B, H, L, C]`, a query's with the column of each key."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + products[batch, head, query, index[query, key]]

    return score_mod


def flex(
    qkv: Tensor,
    table: Tensor,
    index: Tensor,
    scale: float,
    masked: Tensor | None = None,
    attacked: Tensor | None = None,
    added: Tensor | None = None,
) -> Tensor:
    """`relative_attention` by FlexAttention, which takes the gradient of the captured products; one shared table."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    products = q @ table.to(q.dtype)
    if masked is not None:
        rows = masked.to(q.dtype)[:, None, :, None]
        if attacked is not None:
            products = torch.where(rows > 0, q @ attacked.to(q.dtype), products)
        if added is not None:
            k = k + rows * added.to(k.dtype)[:, None]
    found = flex_attention(q, k, v, score_mod=looked_up(products, index), scale=scale)
    assert isinstance(found, Tensor)
    return found.transpose(1, 2)


def _keys(rows: int, device: torch.device) -> dict[str, Any]:
    """Epochs, ids and blocks of `rows` target blocks, and their patches."""
    ids = torch.randint(0, 1 << 40, (rows,), device=device)
    small = [torch.randint(0, 1 << 10, (rows,), device=device) for _ in range(2)]
    patches = torch.randint(0, _GRID, (rows, _ROW), device=device)
    return {"epochs": small[0], "sample_ids": ids, "blocks": small[1], "patches": patches}


def _draws(columns: int, dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """The ways to draw noise: ours by both operators, and torch's generator, whose numbers are others."""

    def keyed(kernels: str) -> Callable[..., Tensor]:
        def draw(epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor) -> Tensor:
            return position_noise(
                _SEED, epochs, sample_ids, blocks, patches, columns, scale=0.25, dtype=dtype, kernels=kernels
            )

        return draw

    def library(epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor) -> Tensor:
        return torch.empty(*patches.shape, columns, dtype=dtype, device=patches.device).normal_(std=0.25)

    return {"triton": keyed("triton"), "reference": keyed("reference"), "randn": library}


def noise_case(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """The keyed noise alone, written in `dtype`; `shape` is tokens (a multiple of 64) and columns."""
    tokens, columns = shape

    def draw(small: bool) -> Inputs:
        rows = _SMALL if small else tokens // _ROW
        return Inputs(_keys(rows, device), torch.empty(0, device=device))

    expected = _draws(columns, torch.float32)["reference"]
    floors = noise_floors(tokens, columns, dtype.itemsize)
    return Case("noise", shape, "-", draw, _draws(columns, dtype), expected, floors, ("randn",))


def positions_case(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Noise, its projection and the positions; `shape` is tokens (a multiple of 64), columns, predictor's width."""
    tokens, columns, width = shape

    def draw(small: bool) -> Inputs:
        rows = _SMALL if small else tokens // _ROW

        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device).to(dtype)

        given = {"table": normal(_GRID, width), "weight": normal(width, columns) * 0.02, "bias": normal(width)}
        for each in given.values():
            each.requires_grad_()
        return Inputs({**given, **_keys(rows, device)}, normal(rows, _ROW, width))

    def whole(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def positions(table: Tensor, weight: Tensor, bias: Tensor, patches: Tensor, **keys: Tensor) -> Tensor:
            return stochastic_positions(table, patches, noise(patches=patches, **keys), weight, bias)

        return positions

    variants = {name: whole(noise) for name, noise in _draws(columns, dtype).items()}
    expected = whole(_draws(columns, torch.float32)["reference"])
    floors = position_floors(tokens, columns, width, dtype.itemsize)
    return Case("positions", shape, "-", draw, variants, expected, floors, ("randn",))


def cases(only: Sequence[str] | None, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """All cases of a kind of device, or those of `only`: numbers of tokens of attention, `noise` and `positions`."""
    cpu = device.type == "cpu"
    attention = [
        attention_case(shape, setting, dtype, device)
        for shape in (ATTENTION_CPU if cpu else ATTENTION)
        for setting in SETTINGS
        if only is None or str(shape[2]) in only
    ]
    found = [case for case in attention if case is not None]
    if only is None or "noise" in only:
        found += [noise_case(shape, dtype, device) for shape in (NOISE_CPU if cpu else NOISE)]
    if only is None or "positions" in only:
        found += [positions_case(shape, dtype, device) for shape in (POSITIONS_CPU if cpu else POSITIONS)]
    return found


def known() -> list[str]:
    """What `cases` can be restricted to."""
    return [*dict.fromkeys(str(shape[2]) for shape in ATTENTION), "noise", "positions"]
