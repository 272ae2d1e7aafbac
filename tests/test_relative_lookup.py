"""What the kernels know of a lookup, its maps against direct sums; and what they and the operator do not take."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from elsewhere.kernels.relative_attention import relative_attention
from elsewhere.kernels.relative_lookup import BLOCK, NONE, Lookup, make_lookup
from elsewhere.models.relative import bucket_ids, offset_ids

GRIDS = [(7, 7), (8, 8), (3, 5), (9, 9), (14, 14), (16, 16), (1, 64), (1, 100), (5, 1), (4, 16), (2, 32), (6, 11)]
OFFSET_GRIDS = [(7, 7), (8, 8), (3, 5), (64, 1), (1, 64), (4, 16)]


@dataclass
class Direct:
    """A lookup, its ids `[L, L]`, and which of the tiles' slots are patches: tokens from `prefix` on."""

    lookup: Lookup
    ids: torch.Tensor

    @property
    def slots(self) -> int:
        return self.lookup.tiles * BLOCK

    @property
    def sums(self) -> torch.Tensor:
        assert self.lookup.sums is not None
        return self.lookup.sums.long()

    @property
    def patches(self) -> slice:
        return slice(self.lookup.prefix - self.lookup.first, len(self.ids) - self.lookup.first)


def buckets(grid, prefix):
    ids = bucket_ids(grid, prefix)
    return Direct(make_lookup(ids, 49 + prefix, grid, prefix), ids)


def offsets(grid, prefix):
    ids = offset_ids(grid, prefix)
    return Direct(make_lookup(ids, (2 * grid[0] - 1) * (2 * grid[1] - 1) + prefix, grid, prefix), ids)


def direct_sums(case: Direct, gradients: torch.Tensor, columns: int) -> torch.Tensor:
    """Sums over the keys that are patches, by column, for the queries that are: `[queries, columns]`."""
    prefix = case.lookup.prefix
    given = gradients[case.patches, case.patches]
    return torch.zeros(len(given), columns).double().scatter_add(1, case.ids[prefix:, prefix:], given)


def range_sums(running: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """As the kernels take them: what has run up by one place less what has by another, if there is one."""
    before = torch.where(lower == NONE, 0.0, running.gather(1, torch.where(lower == NONE, 0, lower)))
    return running.gather(1, upper) - before


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_passes_of_running_sums_are_the_sums_by_column(grid, prefix):
    """Whatever stands in the slots of no patch."""
    case = buckets(grid, prefix)
    gradients = torch.randn(case.slots, case.slots, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.zeros(case.slots, 64, dtype=torch.float64)
    for tile, maps in enumerate(case.sums):
        keys = gradients[:, tile * BLOCK : (tile + 1) * BLOCK]
        by_row = range_sums(keys.cumsum(1), maps[0], maps[1])
        found += range_sums(by_row.cumsum(1), maps[2], maps[3])
    expected = direct_sums(case, gradients, 64)
    torch.testing.assert_close(found[case.patches], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid", OFFSET_GRIDS, ids=str)
def test_the_only_key_of_each_offset(grid, prefix):
    case = offsets(grid, prefix)
    gradients = torch.randn(BLOCK, BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if case.lookup.columns > 64:
        keys = case.sums.transpose(0, 1).flatten(1)
        found = torch.where(keys == NONE, 0.0, gradients.gather(1, torch.where(keys == NONE, 0, keys)))
    else:
        maps = case.sums[0]
        by_row = range_sums(gradients.cumsum(1), maps[0], maps[1])
        found = range_sums(by_row.cumsum(1), maps[2], maps[3])
    expected = direct_sums(case, gradients, found.shape[1])
    torch.testing.assert_close(found[case.patches], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("make", [buckets, offsets])
@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (3, 5)], ids=str)
def test_pairs_are_the_columns_of_the_slots_and_transposed(grid, make, prefix):
    case = make(grid, prefix)
    expected = torch.zeros(2, case.slots, case.slots, dtype=torch.uint8)
    for query in range(case.lookup.first, len(case.ids)):
        for key in range(case.lookup.first, len(case.ids)):
            slots = query - case.lookup.first, key - case.lookup.first
            expected[0][slots] = expected[1][slots[::-1]] = case.ids[query, key]
    assert torch.equal(case.lookup.pairs, expected)


@pytest.mark.parametrize(
    ("grid", "prefix", "first", "tiles"),
    [
        ((7, 7), 1, 0, 1),
        ((7, 7), 0, 0, 1),
        ((7, 9), 1, 0, 1),  # 64 tokens
        ((8, 8), 1, 1, 1),
        ((8, 8), 0, 0, 1),
        ((9, 9), 1, 1, 2),
        ((14, 14), 1, 1, 4),
        ((16, 16), 1, 1, 4),
        ((16, 16), 0, 0, 4),
        ((28, 28), 1, 1, 13),
        ((32, 32), 1, 1, 16),
    ],
    ids=str,
)
def test_the_class_token_is_folded_in_where_it_would_need_a_tile(grid, prefix, first, tiles):
    lookup = buckets(grid, prefix).lookup
    assert (lookup.first, lookup.tiles) == (first, tiles)


@pytest.mark.parametrize(
    ("grid", "prefix", "why"),
    [
        ((16, 4), 1, "16 grid rows in 64 keys, the kernels know 8"),
        ((32, 2), 0, "32 grid rows in 64 keys, the kernels know 8"),
        ((64, 1), 1, "64 grid rows in 64 keys, the kernels know 8"),
        ((11, 6), 1, "11 grid rows in 64 keys, the kernels know 8"),
        ((7, 7), 2, "2 prefix tokens, the kernels know none or one"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_said(grid, prefix, why):
    lookup = make_lookup(bucket_ids(grid, prefix), 49 + (prefix > 0), grid, prefix)
    assert (lookup.unsupported, lookup.pairs, lookup.sums) == (why, None, None)


def test_offsets_of_several_tiles_are_not_taken():
    expected = "290 columns for 82 tokens, the kernels hold 64, or 256 for one tile"
    assert offsets((9, 9), 1).lookup.unsupported == expected


def test_columns_of_scattered_keys_are_not_taken():
    """As those of distances: no running sum has them side by side."""
    lookup = make_lookup(bucket_ids((7, 7), 1, "euclidean"), 8, (7, 7), 1)
    assert lookup.unsupported == "columns whose keys are not a range of rows by a range of columns"


def test_a_large_table_with_several_keys_in_a_column_is_not_taken():
    lookup = make_lookup(bucket_ids((7, 7)), 170, (7, 7), 1)
    assert lookup.unsupported == "several keys in one column of a table of more than 64"


@pytest.mark.parametrize("found", [-1, 49], ids=["below", "above"])
def test_an_id_outside_the_table_is_refused(found):
    ids = bucket_ids((3, 5), 0)
    low, high = int(ids.min()), int(ids.max())
    ids[3, 4] = found
    expected = f"ids from 0 to 48, the table's columns, given {min(low, found)} to {max(high, found)}."
    with pytest.raises(ValueError) as refused:
        make_lookup(ids, 49, (3, 5), 0)
    assert str(refused.value) == f"index: expected {expected}"


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda ids: ids[:49, :49], "[49, 49] int64"),
        (lambda ids: ids[:, :49], "[50, 49] int64"),
        (lambda ids: ids.flatten(), "[2500] int64"),
        (lambda ids: ids.int(), "[50, 50] int32"),
        (lambda ids: ids.float(), "[50, 50] float32"),
    ],
    ids=["short", "narrow", "flat", "int32", "float32"],
)
def test_an_index_that_does_not_fit_the_tokens_is_refused(change, given):
    with pytest.raises(ValueError) as refused:
        make_lookup(change(bucket_ids((7, 7))), 50, (7, 7), 1)
    expected = f"index: expected [50, 50] int64 for 1 prefix tokens and 7 x 7 patches, given {given}."
    assert str(refused.value) == expected


WRONG = [
    ({"qkv": torch.zeros(2, 49, 3, 2, 64)}, "qkv: expected [B, 50, 3, H, d], given [2, 49, 3, 2, 64]."),
    ({"qkv": torch.zeros(2, 50, 384)}, "qkv: expected [B, 50, 3, H, d], given [2, 50, 384]."),
    ({"qkv": torch.zeros(2, 50, 3, 2, 64).long()}, "qkv: expected floating-point numbers, given torch.int64."),
    ({"table": torch.zeros(1, 64, 49)}, "table: expected [1, 64, 50] or [2, 64, 50], given [1, 64, 49]."),
    ({"table": torch.zeros(3, 64, 50)}, "table: expected [1, 64, 50] or [2, 64, 50], given [3, 64, 50]."),
    ({"table": torch.zeros(64, 50)}, "table: expected [1, 64, 50] or [2, 64, 50], given [64, 50]."),
    ({"table": torch.zeros(1, 64, 50).long()}, "table: expected floating-point numbers, given torch.int64."),
    ({"table": torch.zeros(1, 64, 50, device="meta")}, "table: expected on cpu, the device of qkv, given meta."),
    ({"attacked": torch.zeros(1, 64, 1)}, "attacked: expected [1, 64, 50] or [2, 64, 50], given [1, 64, 1]."),
    ({"attacked": torch.zeros(2, 64, 50)}, "attacked: expected 1 tables as in table, given 2."),
    ({"added": torch.zeros(1, 64, 50)}, "added: expected [1, 64] or [2, 64], given [1, 64, 50]."),
    ({"added": torch.zeros(2, 64)}, "added: expected 1 tables as in table, given 2."),
    ({"added": torch.zeros(1, 64)}, "masked: expected together with attacked or added, and only then."),
    ({"masked": torch.zeros(2, 50)}, "masked: expected together with attacked or added, and only then."),
    (
        {"masked": torch.zeros(2, 49), "added": torch.zeros(1, 64)},
        "masked: expected [2, 50], given [2, 49].",
    ),
    (
        {"masked": torch.zeros(2, 50, device="meta"), "added": torch.zeros(1, 64)},
        "masked: expected on cpu, the device of qkv, given meta.",
    ),
    ({"operator": "fast"}, "operator='fast' is not known; choose triton or reference."),
]
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "heads of 48, the kernels know 24, 32, 64, 80": {
        "qkv": torch.zeros(2, 50, 3, 2, 48),
        "table": torch.zeros(1, 48, 50),
    },
    "float64 tokens": {"qkv": torch.zeros(2, 50, 3, 2, 64).double()},
}


def call(operator="triton", grid=(7, 7), **changed: Any):
    lookup = make_lookup(bucket_ids(grid), 50, grid, 1)
    given = {"qkv": torch.zeros(2, len(lookup.index), 3, 2, 64), "table": torch.zeros(1, 64, 50)}
    return relative_attention(**{**given, **changed}, lookup=lookup, scale=0.125, operator=operator)


@pytest.mark.parametrize(("changed", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_refused(changed, message):
    with pytest.raises(ValueError) as refused:
        call(**changed)
    assert str(refused.value) == message


def test_a_lookup_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"index: expected on meta, the device of qkv, given cpu\."):
        call(qkv=torch.zeros(2, 50, 3, 2, 64, device="meta"), table=torch.zeros(1, 64, 50, device="meta"))


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_the_kernels_do_not_take_is_refused(what):
    with pytest.raises(ValueError) as refused:
        call(**UNSUPPORTED[what])
    expected = f"The Triton kernels for relative attention do not take {what}; use operator='reference'."
    assert str(refused.value) == expected


def test_two_tables_for_several_tiles_are_refused():
    with pytest.raises(ValueError, match="do not take a second table for more than 64 patches; use operator='ref"):
        call(grid=(9, 9), attacked=torch.zeros(1, 64, 50), masked=torch.zeros(2, 82))


def test_wide_heads_in_float32_are_refused_for_several_tiles():
    what = "float32 heads of 80 for more than 64 patches, which no GPU's shared memory holds"
    with pytest.raises(ValueError, match=f"do not take {what}; use operator='reference'"):
        call(grid=(9, 9), qkv=torch.zeros(2, 82, 3, 2, 80), table=torch.zeros(1, 80, 50))


def test_a_lookup_without_maps_is_refused():
    with pytest.raises(ValueError, match="do not take 16 grid rows in 64 keys, the kernels know 8; use operator='ref"):
        call(grid=(16, 4))
