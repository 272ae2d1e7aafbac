"""Relative positions on a patch grid: buckets, interpolated lookups, tables and the attacks on them.

Buckets and tables are those of iRPE (Wu et al., ICCV 2021), the attacks those of AdPE. An offset is the query's
coordinate minus the key's, in patches. With prefix tokens the last bucket is for pairs that have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.relative_lookup import Lookup, make_lookup
from ..kernels.relative_reference import choose_form, relative_bias, relative_values

METHODS = ("product", "cross", "euclidean", "quantised")
LOOKUPS = ("hard", "interpolated", "published")


@dataclass(frozen=True)
class Relative:
    """What is relative in attention, and how an offset finds its bucket.

    `terms` names what is looked up against: queries' tables (`k`), keys' tables (`q`), values (`v`). Raises
    ValueError for what is not known and for combinations that iRPE does not define.
    """

    terms: str = "k"
    shared: bool = True
    method: str = "product"
    mode: str = "contextual"
    lookup: str = "hard"
    ratio: float = 1.9
    scaled_queries: bool = True

    def __post_init__(self):
        terms = "".join(term for term in "qkv" if term in self.terms)
        if not terms or sorted(terms) != sorted(self.terms):
            raise ValueError(f"relative terms {self.terms!r} are not known; choose some of q, k and v, each once.")
        object.__setattr__(self, "terms", terms)
        for name, value, known in (
            ("method", self.method, METHODS),
            ("mode", self.mode, ("contextual", "bias")),
            ("lookup", self.lookup, LOOKUPS),
        ):
            if value not in known:
                raise ValueError(f"relative {name} {value!r} is not known; choose one of {', '.join(known)}.")
        if self.mode == "bias" and "v" in self.terms:
            raise ValueError("A relative bias has no meaning on values: use mode=contextual or take v from the terms.")
        if self.lookup != "hard" and (self.method, self.mode) != ("product", "contextual"):
            raise ValueError(f"lookup={self.lookup} needs method=product and mode=contextual.")
        if self.ratio < 0.5:
            raise ValueError(f"relative ratio {self.ratio} leaves a single bucket; use 0.5 or more.")

    @property
    def radius(self) -> int:
        """Largest bucket on either side of an offset of zero."""
        return int(2 * self.ratio)

    def buckets(self, prefix: int) -> int:
        """Number of buckets of the whole table, one more where there are prefix tokens."""
        side = 2 * self.radius + 1
        return (side**2 if self.method in ("product", "cross") else side) + (prefix > 0)


@dataclass(frozen=True, eq=False)
class RelativeAttack:
    """What an adversary does to the relative terms of one attention layer (AdPE).

    `masked` `[B, L]` is 1 at masked patches and 0 at prefix tokens. `shift` `[2]` moves the offsets of masked tokens,
    (row, column) in patches, in every table of the layer. `embedding` is added to the k-table: G · d numbers for all
    buckets alike (`per="table"`) or G · d · NB (`per="bucket"`), where masked tokens are keys or queries. On queries
    and per table it is constant along a row of logits, and softmax cancels it: the released attack does nothing.
    """

    masked: Tensor
    shift: Tensor | None = None
    embedding: Tensor | None = None
    where: str = "keys"
    per: str = "table"

    @property
    def mode(self) -> str:
        """What the kernels tell apart: `shift`, `bucket` (an embedding each), `keys`, `queries`, or `none`."""
        if self.embedding is None:
            return "none" if self.shift is None else "shift"
        return "bucket" if self.per == "bucket" else self.where

    def check(self, relative: Relative) -> None:
        """Raises ValueError for an attack that `relative` has no use for."""
        if self.where not in ("keys", "queries") or self.per not in ("table", "bucket"):
            raise ValueError(
                f"An attack where={self.where!r}, per={self.per!r} is not known; "
                "choose keys or queries, and table or bucket."
            )
        if self.shift is not None and self.embedding is not None:
            raise ValueError("An attack moves coordinates or adds an embedding, not both at once.")
        if self.shift is not None and relative.lookup == "hard":
            raise ValueError(
                "A shift of coordinates has no gradient through hard buckets; use lookup=interpolated or published."
            )
        if self.embedding is not None and ("k" not in relative.terms or relative.mode != "contextual"):
            raise ValueError("An embedding attack acts on the contextual k-table: add k to the terms.")


def piecewise(x: Tensor, ratio: float) -> Tensor:
    """iRPE's index function without rounding: identity up to `ratio`, then logarithmic, cut at ±2 · `ratio`.

    Finite gradients everywhere; at the ends of the identity and at the cut they are those from inside.
    """
    size = x.abs()
    # The logarithm is taken of something harmless where the identity is chosen: 0 · inf would poison its gradient.
    far = ratio * (1 + torch.log(size.clamp(min=ratio) / ratio) / math.log(8.0))
    return torch.where(size <= ratio, x, torch.sign(x) * far).clamp(-2 * ratio, 2 * ratio)


def bucket(x: Tensor, ratio: float) -> Tensor:
    """The bucket of offsets or distances `x`, int64 from -int(2 · ratio) to int(2 · ratio)."""
    rounded = piecewise(x.double(), ratio).round()
    return rounded.clamp(-2 * ratio, 2 * ratio).long()  # iRPE cuts after rounding, then drops the fraction


def _axis_offsets(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column offsets of all pairs of patches, each `[N, N]` int64."""
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    return tuple(axis.flatten()[:, None] - axis.flatten()[None, :] for axis in (rows, columns))  # pyright: ignore


def _with_prefix(index: Tensor, prefix: int, last: int) -> Tensor:
    """`index` `[N, N]` with `prefix` rows and columns of `last` before it."""
    return F.pad(index, (prefix, 0, prefix, 0), value=last)


def bucket_ids(grid: tuple[int, int], prefix: int = 1, method: str = "product", ratio: float = 1.9) -> Tensor:
    """The bucket of every pair of query and key, `[L, L]` int64, for L = prefix + rows · columns.

    `rows` and `columns` give the two parts of `cross`, whose own buckets are those of `product`.
    """
    radius, (rows, columns) = int(2 * ratio), _axis_offsets(grid)
    side = 2 * radius + 1
    if method in ("product", "cross"):
        ids, last = side * (bucket(rows, ratio) + radius) + bucket(columns, ratio) + radius, side**2
    elif method in ("rows", "columns"):
        ids, last = bucket(rows if method == "rows" else columns, ratio) + radius, side
    elif method in ("euclidean", "quantised"):
        squares = (rows**2 + columns**2).double()
        ids, last = bucket(squares.sqrt().round() if method == "euclidean" else squares, ratio) + radius, side
    else:
        raise ValueError(f"relative method {method!r} is not known; choose one of {', '.join(METHODS)}.")
    return _with_prefix(ids, prefix, last)


def offset_ids(grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """The offset of every pair, `[L, L]` int64: (2 · columns - 1) · row + column, both counted from the smallest."""
    rows, columns = _axis_offsets(grid)
    across = 2 * grid[1] - 1
    ids = (rows + grid[0] - 1) * across + columns + grid[1] - 1
    return _with_prefix(ids, prefix, (2 * grid[0] - 1) * across)


@lru_cache(maxsize=16)
def _index(grid: tuple[int, int], prefix: int, method: str, ratio: float, device: torch.device) -> Tensor:
    """`bucket_ids`, or `offset_ids` for the method `offset`, shared by all layers."""
    with torch.inference_mode(False):  # a tensor made under inference mode could not serve training later
        ids = offset_ids(grid, prefix) if method == "offset" else bucket_ids(grid, prefix, method, ratio)
        return ids.to(device)


@lru_cache(maxsize=16)
def _lookup(
    grid: tuple[int, int], prefix: int, method: str, ratio: float, columns: int, device: torch.device
) -> Lookup:
    """The lookup in a table of `columns`, shared by all layers."""
    with torch.inference_mode(False):
        return make_lookup(_index(grid, prefix, method, ratio, device), columns, grid, prefix)


# The compiler looks through what is remembered, and would make these anew in every layer at every step.
@torch.compiler.assume_constant_result
def _constant_lookup(*of: Any) -> Lookup:
    return _lookup(*of)


@torch.compiler.assume_constant_result
def _constant_index(*of: Any) -> Tensor:
    return _index(*of)


@torch.compiler.assume_constant_result
def _constant_offsets(*of: Any) -> tuple[Tensor, Tensor]:
    return _offsets(*of)


@torch.compiler.assume_constant_result
def _constant_unshifted(*of: Any) -> Tensor:
    return _unshifted(*of)


def interpolation_weights(offsets: Tensor, ratio: float, lookup: str) -> Tensor:
    """Weights `[n, NB]` of one axis' buckets for offsets `[n]` in patches, whole or not.

    `interpolated`: one table step per bucket, the last bucket beyond the ends. `published`: as
    `grid_sample(align_corners=False)` with zero padding, over coordinates in units of 2 · ratio. At a bucket both
    have the gradient towards the next one, as `grid_sample` has.
    """
    radius, coordinate = int(2 * ratio), piecewise(offsets, ratio)
    if lookup == "published":
        place = ((coordinate / (2 * ratio) + 1) * (2 * radius + 1) - 1) / 2
        lower = place.detach().floor()
    else:
        place = coordinate.clamp(-radius, radius) + radius
        # The last bucket is the upper neighbour of the one before: it has none of its own to move to.
        lower = place.detach().floor().clamp(max=2 * radius - 1)
    upper_share = (place - lower)[:, None]
    above = torch.arange(2 * radius + 1, dtype=offsets.dtype, device=offsets.device) - lower[:, None]
    return (above == 0) * (1 - upper_share) + (above == 1) * upper_share


@lru_cache(maxsize=64)
def _offsets(grid: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """All row offsets, then all column offsets, and the axis (0, 1) of each."""
    with torch.inference_mode(False):
        offsets = [torch.arange(1 - size, size, dtype=dtype, device=device) for size in grid]
        return torch.cat(offsets), torch.cat([torch.full((len(o),), i, device=device) for i, o in enumerate(offsets)])


def _pairs(weights: Tensor, grid: tuple[int, int], lookup: str) -> Tensor:
    """Weights `[C, NB · NB]` of a product table's buckets, from those of all row and then all column offsets."""
    for_rows, for_columns = weights.split([2 * size - 1 for size in grid])
    # Published: a row offset looks up the table's column.
    order = "ra,cb->rcba" if lookup == "published" else "ra,cb->rcab"
    return torch.einsum(order, for_rows, for_columns).reshape(-1, weights.shape[1] ** 2)


@lru_cache(maxsize=64)
def _unshifted(grid: tuple[int, int], ratio: float, lookup: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _pairs(interpolation_weights(_offsets(grid, dtype, device)[0], ratio, lookup), grid, lookup)


def spread(
    table: Tensor, grid: tuple[int, int], prefix: int, ratio: float, lookup: str, shift: Tensor | None = None
) -> Tensor:
    """A product table `[G, d, NB]` interpolated at all offsets, `[G, d, C]`, in the order of `offset_ids`.

    C = (2 · rows - 1)(2 · columns - 1), and one more column for the prefix bucket, which no shift moves. Gradients
    reach `table` and `shift` `[2]` (row, column), which is added to the offsets. `published` reads the row offset as
    the table's column. The released `adv_shift` is (row, column) as well: it is added before they are swapped.
    """
    if shift is None:
        pairs = _constant_unshifted(grid, ratio, lookup, table.dtype, table.device)
    else:
        offsets, axis = _constant_offsets(grid, table.dtype, table.device)
        pairs = _pairs(interpolation_weights(offsets + shift[axis], ratio, lookup), grid, lookup)
    looked_up = table[:, :, : pairs.shape[1]] @ pairs.T
    return torch.cat([looked_up, table[:, :, -1:]], dim=2) if prefix else looked_up


class RelativeTable(nn.Module):
    """The learned table of one relative term, zero at first, and its lookups.

    `table` is `[G, d, NB]` for logits, `[G, NB, d]` for values, `[G, NB]` for mode `bias`, with G = 1 or `heads`;
    method `cross` has `rows_table` and `columns_table` of 2 · radius + 1 (+ 1) buckets instead. `form` overrides
    the measured choice between the kernels' forms.
    """

    def __init__(self, relative: Relative, term: str, heads: int, head_dim: int, prefix: int = 1):
        super().__init__()
        self.relative, self.term, self.prefix = relative, term, prefix
        self.form: str | None = None
        groups = 1 if relative.shared else heads

        def zeros(buckets: int) -> nn.Parameter:
            depth = (buckets, head_dim) if term == "v" else (head_dim, buckets)
            return nn.Parameter(torch.zeros(groups, *(depth if relative.mode == "contextual" else (buckets,))))

        if relative.method == "cross":
            side = 2 * relative.radius + 1 + (prefix > 0)
            self.rows_table, self.columns_table = zeros(side), zeros(side)
        else:
            self.table = zeros(relative.buckets(prefix))

    def whole(self) -> Tensor:
        """The table over all buckets, `[G, d, NB]` (`[G, NB]` for mode `bias`); for `cross` the sum of its parts."""
        if self.relative.method != "cross":
            return self.table.transpose(1, 2) if self.term == "v" else self.table
        rows, columns = self.rows_table, self.columns_table
        if self.term == "v":
            rows, columns = rows.transpose(1, 2), columns.transpose(1, 2)
        side = 2 * self.relative.radius + 1
        product = (rows[..., :side, None] + columns[..., None, :side]).flatten(-2)
        return torch.cat([product, rows[..., side:] + columns[..., side:]], dim=-1)

    def index(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The column of the looked-up table for every pair, `[L, L]` int64."""
        method = self.relative.method if self.relative.lookup == "hard" else "offset"
        return _constant_index(grid, self.prefix, method, self.relative.ratio, device)

    def lookup(self, grid: tuple[int, int], device: torch.device) -> Lookup:
        """What the kernels know of the lookups in the tables of `tables`."""
        spec, hard = self.relative, self.relative.lookup == "hard"
        columns = spec.buckets(self.prefix) if hard else (2 * grid[0] - 1) * (2 * grid[1] - 1) + (self.prefix > 0)
        return _constant_lookup(grid, self.prefix, spec.method if hard else "offset", spec.ratio, columns, device)

    def tables(
        self, grid: tuple[int, int], attack: RelativeAttack | None, scale: float
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """For `scale · q·R` the table over the columns of `index` `[G, d, C]`, that of masked rows, and what is added
        to masked keys `[G, d]`.

        Of an embedding on queries and per table nothing is left, and its gradient is exactly zero.
        """
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            whole = self.whole() * scale
            table, added = self._looked_up(whole, grid), self._embedding(attack, scale)
            if attack is None or (attack.shift is None and attack.where == "queries"):
                return table, None, None
            if attack.shift is not None:
                return table, self._looked_up(whole, grid, attack.shift), None
        return table, None, None if added is None else added.squeeze(2)

    def _looked_up(self, table: Tensor, grid: tuple[int, int], shift: Tensor | None = None) -> Tensor:
        """`table` `[G, d, NB]` over the columns of `index`, `[G, d, C]`."""
        spec = self.relative
        if spec.lookup == "hard":
            return table
        return spread(table, grid, self.prefix, spec.ratio, spec.lookup, shift)

    def _choose(self, table: Tensor, index: Tensor) -> str:
        return self.form or choose_form(index.device, index.shape[0], table.shape[2], table.shape[0])

    def logits(
        self, x: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None, scale: float = 1.0
    ) -> Tensor:
        """`scale · x[b, h, i] · table[:, bucket(i, j)]`, `[B, H, L, L]`; for mode `bias` the table, `[1, G, L, L]`.

        `x` `[B, H, L, d]` are the queries for the k-table, the keys for the q-table (transpose the result). An
        embedding attack on keys and per table is not in here but in `attacked_keys`, which costs less.
        """
        index = self.index(grid, x.device)
        if self.relative.mode == "bias":
            return F.embedding(index, self.whole().T).permute(2, 0, 1)[None]
        attacked = None
        # Tables stay in float32 under autocast: a gradient sums over all pairs, a coordinate has to be exact.
        with torch.autocast(x.device.type, enabled=False):
            whole = self.whole() * scale
            table = self._looked_up(whole, grid)
            added = self._embedding(attack, scale)
            if attack is not None and attack.shift is not None:
                attacked = self._looked_up(whole, grid, attack.shift)
            elif attack is not None and added is not None:
                added = self._looked_up(added, grid) if attack.per == "bucket" else added
                attacked = table + added if attack.where == "queries" else None
        form = self._choose(table, index)
        if attack is None or attacked is not None:
            return relative_bias(x, table, index, form, attacked, None if attack is None else attack.masked)
        bias = relative_bias(x, table, index, form)
        if added is not None and attack.per == "bucket":
            bias = bias + relative_bias(x, added, index, form) * attack.masked.to(x.dtype)[:, None, None, :]
        return bias

    def attacked_keys(self, k: Tensor, attack: RelativeAttack | None, scale: float = 1.0) -> Tensor:
        """Keys `[B, H, L, d]` for `q · k`, moved by `scale · embedding` where masked if the attack says so."""
        added = self._embedding(attack, scale)
        if attack is None or added is None or (attack.where, attack.per) != ("keys", "table"):
            return k
        return k + attack.masked.to(k.dtype)[:, None, :, None] * added.to(k.dtype).transpose(1, 2)

    def _embedding(self, attack: RelativeAttack | None, scale: float) -> Tensor | None:
        """The attack's embedding as a table, `[G, d, NB]` or `[G, d, 1]`; only the k-table has one."""
        if attack is None or attack.embedding is None or self.term != "k":
            return None
        groups, depth = (self.rows_table if self.relative.method == "cross" else self.table).shape[:2]
        buckets = self.relative.buckets(self.prefix) if attack.per == "bucket" else 1
        if attack.embedding.numel() != groups * depth * buckets:
            raise ValueError(
                f"This embedding attack takes {groups} x {depth} x {buckets} numbers, not {attack.embedding.numel()}."
            )
        return attack.embedding.reshape(groups, depth, buckets) * scale

    def values(self, p: Tensor, grid: tuple[int, int], attack: RelativeAttack | None = None) -> Tensor:
        """`Σ_j p[b, h, i, j] · table[bucket(i, j)]`, `[B, H, L, d]`, for probabilities `p` `[B, H, L, L]`."""
        attacked = rows = None
        with torch.autocast(p.device.type, enabled=False):
            table = self.whole()
            looked_up = self._looked_up(table, grid).transpose(1, 2)
            if attack is not None and attack.shift is not None:
                attacked, rows = self._looked_up(table, grid, attack.shift).transpose(1, 2), attack.masked
        index = self.index(grid, p.device)
        return relative_values(p, looked_up, index, self._choose(looked_up.transpose(1, 2), index), attacked, rows)
