"""What the relative kernels know of a lookup, once for all layers: columns by tile, and the maps of its adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 64  # queries and keys of a tile
NONE = 255
_ROWS = 8  # grid rows that a tile of keys may touch, and ranges of columns in one of them


@dataclass(frozen=True, eq=False)
class Lookup:
    """Which column of a table each pair of query and key looks up.

    `index` `[L, L]` int64 holds ids below `columns`; with a `prefix` token, the first, the last column is for pairs
    that have it. `tiles` of queries, and of keys, begin at token `first`: 1 where the class token would need a tile
    of its own and is folded in. `pairs` `[2, T, T]` uint8 are the ids of the tiles' slots, and transposed; `sums`
    uint8 maps for the sums over a query's keys by column, `[tiles, 4, T, 64]`, or `[4, 64, 64]` where a column has
    one key at most.
    `unsupported` says why there are no such maps.
    """

    index: Tensor
    columns: int
    prefix: int
    first: int = 0
    tiles: int = 0
    pairs: Tensor | None = None
    sums: Tensor | None = None
    unsupported: str | None = None


def make_lookup(index: Tensor, columns: int, grid: tuple[int, int], prefix: int) -> Lookup:
    """The lookup of `index` `[L, L]` for `prefix` tokens and the patches of `grid` (rows, columns).

    Raises ValueError for an index that is not square over these tokens, or that has an id outside the table.
    """
    length = prefix + grid[0] * grid[1]
    if index.shape != (length, length) or index.dtype != torch.int64:
        raise ValueError(
            f"index: expected [{length}, {length}] int64 for {prefix} prefix tokens and {grid[0]} x {grid[1]} patches, "
            f"given {list(index.shape)} {str(index.dtype).removeprefix('torch.')}."
        )
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= columns:
        raise ValueError(f"index: expected ids from 0 to {columns - 1}, the table's columns, given {low} to {high}.")
    first = int(prefix == 1 and length > BLOCK)
    tiles = -(-(length - first) // BLOCK)
    plain = Lookup(index, columns, prefix, first, tiles)
    if prefix > 1:
        return _without(plain, f"{prefix} prefix tokens, the kernels know none or one")
    if columns > 256 or (columns > 64 and tiles > 1):
        return _without(plain, f"{columns} columns for {length} tokens, the kernels hold 64, or 256 for one tile")
    ids = index.cpu()
    slots = torch.zeros(tiles * BLOCK, tiles * BLOCK, dtype=torch.uint8)
    slots[: length - first, : length - first] = ids[first:, first:].to(torch.uint8)
    sums = _one_key(plain, ids) if columns > 64 else _ranges(plain, ids, grid)
    if isinstance(sums, str):
        return _without(plain, sums)
    pairs = torch.stack([slots, slots.T])
    return replace(plain, pairs=pairs.to(index.device), sums=sums.to(index.device))


def _without(lookup: Lookup, why: str) -> Lookup:
    return replace(lookup, unsupported=why)


def _one_key(lookup: Lookup, ids: Tensor) -> Tensor | str:
    """The only key of each query and column, `[4, 64, 64]`, by 64 columns; not the prefix token."""
    first, prefix = lookup.first, lookup.prefix
    patches = ids[prefix:, prefix:]
    if any(len(row.unique()) < len(row) for row in patches):
        return "several keys in one column of a table of more than 64"
    keys = torch.full((BLOCK, 256), NONE, dtype=torch.uint8)
    slots = torch.arange(prefix - first, prefix - first + len(patches))
    keys[slots[:, None], patches] = slots.to(torch.uint8).expand_as(patches)
    return keys.unflatten(1, (4, 64)).transpose(0, 1).contiguous()


def _parts(ids: Tensor, axis: int) -> Tensor:
    """For each query, which run of equal columns (or rows, `axis` 1) of keys each belongs to: `[N, size]`.

    `ids` is `[N, rows, columns]`.
    """
    size = ids.shape[axis]
    changes = ids.narrow(axis, 1, size - 1) != ids.narrow(axis, 0, size - 1)
    runs = changes.any(dim=3 - axis).cumsum(dim=1)
    return torch.cat([torch.zeros_like(runs[:, :1]) if size > 1 else torch.zeros(len(ids), 1).long(), runs], dim=1)


def _extremes(cells: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The last place in each of `count` cells, and the one before the first: `[N, count]`, 0 and 0 where empty."""
    shape = (len(cells), count)
    last = torch.full(shape, -1).scatter_reduce(1, cells, places, "amax")
    first = torch.full(shape, NONE).scatter_reduce(1, cells, places, "amin")
    before = torch.where(first == 0, NONE, first - 1)
    return torch.where(last < 0, 0, last), torch.where(last < 0, 0, before)


def _ranges(lookup: Lookup, ids: Tensor, grid: tuple[int, int]) -> Tensor | str:
    """The maps `[tiles, 4, T, 64]` of two passes of running sums, for each tile of keys.

    The first pass goes along the keys: a cell is a grid row within the tile by a run of columns, cell 8 · run + row.
    The second goes along the cells, to the columns of the table.
    """
    first, prefix, tiles, across = lookup.first, lookup.prefix, lookup.tiles, grid[1]
    patches = ids[prefix:, prefix:]
    square = patches.unflatten(1, grid)
    by_row, by_column = _parts(square, 1), _parts(square, 2)
    runs = (by_row.amax(1) + 1) * (by_column.amax(1) + 1)
    if int(by_column.max()) >= _ROWS or any(
        len(row.unique()) != n for row, n in zip(patches, runs.tolist(), strict=True)
    ):
        return "columns whose keys are not a range of rows by a range of columns"
    maps = torch.zeros(tiles, 4, tiles * BLOCK, 64, dtype=torch.uint8)
    queries = slice(prefix - first, prefix - first + len(patches))
    for tile in range(tiles):
        # The patches of this tile, and their slots within it.
        start = max(0, tile * BLOCK + first - prefix)
        keys = torch.arange(start, min(len(patches), (tile + 1) * BLOCK + first - prefix))
        places = (keys + prefix - first - tile * BLOCK).expand(len(patches), -1)
        rows = keys // across - start // across
        if int(rows.max()) >= _ROWS:
            return f"{int(rows.max()) + 1} grid rows in {BLOCK} keys, the kernels know {_ROWS}"
        cells = by_column[:, keys % across] * _ROWS + rows
        upper, lower = _extremes(cells, places, 64)
        maps[tile, 0, queries], maps[tile, 1, queries] = upper.to(torch.uint8), lower.to(torch.uint8)
        upper, lower = _extremes(patches[:, keys], cells, 64)
        maps[tile, 2, queries], maps[tile, 3, queries] = upper.to(torch.uint8), lower.to(torch.uint8)
    return maps
