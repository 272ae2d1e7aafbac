"""Attention with relative-position terms in plain PyTorch, in two forms (iRPE, Wu et al., ICCV 2021; AdPE).

A term looks up column `index[i, j]` of a table for query position i and key position j. Both forms give the same
numbers and differ in what they multiply:

    gather   all columns of the table at once, then pick one per (i, j)
    dense    the L columns that a position looks up, one product per position over batch and heads, some positions
             at a time; the backward lays the columns out again

Attacked rows use another table: `[x·r, x·(1-r)]` against both tables stacked is one product of twice the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

FORMS = ("gather", "dense")
# Numbers of a table laid out for one chunk of positions: what stays in each core's cache, or little of a GPU's memory.
_CPU_CHUNK, _GPU_CHUNK = 1 << 19, 1 << 27


def _float(x: Tensor) -> Tensor:
    """`x` in at least float32, to add many numbers up in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_position(x: Tensor, groups: int) -> Tensor:
    """`[B, H, L, n]` as `[L·G, B·H/G, n]`, one matrix per position and table."""
    batch, heads, length, depth = x.shape
    x = x.unflatten(1, (groups, heads // groups)).permute(3, 1, 0, 2, 4)
    return x.reshape(length * groups, batch * heads // groups, depth)


def _by_head(x: Tensor, batch: int, heads: int, groups: int) -> Tensor:
    """What `_by_position` arranged, `[L·G, B·H/G, n]`, back as `[B, H, L, n]`."""
    x = x.unflatten(1, (batch, heads // groups)).unflatten(0, (-1, groups))
    return x.permute(2, 1, 3, 0, 4).flatten(1, 2)


@torch.compiler.assume_constant_result
def _chunk_numbers(device_type: str) -> int:
    return _CPU_CHUNK * torch.get_num_threads() if device_type == "cpu" else _GPU_CHUNK


def _chunks(table: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """For chunks of positions: where their matrices are, and the rows of `[G·C, d]` they look up, `[n·G, L]`.

    A whole table laid out, `[L·G, L, d]`, would be far larger than all that is kept for the backward.
    """
    groups, rows, depth = table.shape
    starts = torch.arange(groups, device=index.device)[:, None] * rows
    step = max(1, _chunk_numbers(table.device.type) // (groups * index.shape[1] * depth))
    for start in range(0, index.shape[0], step):
        part = (index[start : start + step, None] + starts).flatten(0, 1)
        yield slice(start * groups, start * groups + part.shape[0]), part


class _Columns:
    """The rows `[n·G, L, d]` that a chunk looks up in a table `[G, C, d]`, always in the same memory."""

    def __init__(self, table: Tensor, dtype: torch.dtype):
        self.rows, self.kept = table.to(dtype).reshape(-1, table.shape[2]), None

    def __call__(self, part: Tensor) -> Tensor:
        if self.kept is None:  # the first chunk is the largest
            self.kept = self.rows.new_empty(part.numel(), self.rows.shape[1])
        torch.index_select(self.rows, 0, part.flatten(), out=self.kept[: part.numel()])
        return self.kept[: part.numel()].view(*part.shape, -1)


def _against_columns(x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """`x` `[L·G, m, d]` by the rows that each position looks up: `[L·G, m, L]`."""
    out, columns = x.new_empty(*x.shape[:2], index.shape[1]), _Columns(table, x.dtype)
    for at, part in _chunks(table, index):
        torch.bmm(x[at], columns(part).transpose(1, 2), out=out[at])
    return out


def _over_columns(p: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Sums of the rows that each position looks up, weighted by `p` `[L·G, m, L]`: `[L·G, m, d]`."""
    out, columns = p.new_empty(*p.shape[:2], table.shape[2]), _Columns(table, p.dtype)
    for at, part in _chunks(table, index):
        torch.bmm(p[at], columns(part), out=out[at])
    return out


def _table_gradient(p: Tensor, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """Σ over positions and j of `p[…, j]ᵀ x` into the row looked up, `[G, C, d]`, in a fixed order."""
    total, kept = table.new_zeros(table.shape[0] * table.shape[1], table.shape[2]), None
    for at, part in _chunks(table, index):
        if kept is None:
            kept = x.new_empty(*part.shape, x.shape[2])
        outer = torch.bmm(p[at].transpose(1, 2), x[at], out=kept[: part.shape[0]]).to(table.dtype)
        # Indexing's own backward adds with atomics on a GPU, that of an embedding does not.
        total += torch.ops.aten.embedding_dense_backward(outer, part, total.shape[0], -1, False)
    return total.view_as(table)


class _DenseBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, table, index)
        return _against_columns(x, table, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, table, index = ctx.saved_tensors
        gradient = gradient.contiguous()
        for_table = _table_gradient(gradient, x, table, index) if ctx.needs_input_grad[1] else None
        return _over_columns(gradient, table, index), for_table, None


class _DenseValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(p, table, index)
        return _over_columns(p, table, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        p, table, index = ctx.saved_tensors
        for_table = _table_gradient(p, gradient, table, index) if ctx.needs_input_grad[1] else None
        return _against_columns(gradient, table, index), for_table, None


def _by_table(x: Tensor, groups: int) -> Tensor:
    """`[B, H, L, n]` as `[G, H/G·B·L, n]`, one matrix per table."""
    return x.transpose(0, 1).reshape(groups, -1, x.shape[-1])


def _flat(index: Tensor, columns: int) -> Tensor:
    """`index` `[L, L]` into rows of `columns` entries, as an index `[L·L]` into all rows one after another."""
    starts = torch.arange(index.shape[0], device=index.device)[:, None] * columns
    return (index + starts).flatten()


def _check(form: str, attacked: Tensor | None, rows: Tensor | None) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}.")
    assert (attacked is None) == (rows is None), "an attacked table and its rows come together"


def relative_bias(
    x: Tensor,
    table: Tensor,
    index: Tensor,
    form: str,
    attacked: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The logits' relative term, `bias[b, h, i, j] = x[b, h, i] · table[h or 0, :, index[i, j]]`, `[B, H, L, L]`.

    `x` is `[B, H, L, d]`, `table` `[G, d, C]` with G 1 (shared) or H, `index` `[L, L]` int64. Where `rows` `[B, L]`
    is 1, `attacked` `[G, d, C]` is used in the place of `table`. Raises ValueError for an unknown form.
    """
    _check(form, attacked, rows)
    batch, heads, length, _ = x.shape
    groups, _, columns = table.shape
    arrange = _by_position if form == "dense" else _by_table
    x = arrange(x, groups)
    if attacked is not None and rows is not None:
        rows = rows.to(x.dtype)
        chosen = torch.stack([rows, 1 - rows], dim=-1)[:, None].expand(batch, heads, length, 2)
        x = (x[..., None, :] * arrange(chosen, groups)[..., None]).flatten(-2)
        table = torch.cat([attacked, table], dim=1)
    if form == "dense":
        # Whole rows are quicker to copy than columns.
        bias = _DenseBias.apply(x, table.transpose(1, 2).contiguous(), index)
        return _by_head(bias, batch, heads, groups)  # pyright: ignore
    products = torch.bmm(x, table.to(x.dtype))
    picked = products.view(heads, batch, -1).index_select(2, _flat(index, columns))
    return picked.view(heads, batch, length, length).transpose(0, 1)


def relative_values(
    p: Tensor,
    table: Tensor,
    index: Tensor,
    form: str,
    attacked: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """The values' relative term, `out[b, h, i] = Σ_j p[b, h, i, j] · table[h or 0, index[i, j]]`, `[B, H, L, d]`.

    `p` is `[B, H, L, L]`, `table` `[G, C, d]` with G 1 (shared) or H, `index` `[L, L]` int64. Where `rows` `[B, L]`
    is 1, `attacked` `[G, C, d]` is used in the place of `table`. Raises ValueError for an unknown form.
    """
    _check(form, attacked, rows)
    batch, heads, length, _ = p.shape
    # Both tables side by side, so that the probabilities are kept once.
    both = table if attacked is None else torch.cat([attacked, table], dim=2)
    groups, columns, _ = both.shape
    if form == "dense":
        out = _DenseValues.apply(_by_position(p, groups), both, index)
        out = _by_head(out, batch, heads, groups)  # pyright: ignore
    else:
        sums = _float(p).new_zeros(heads, batch, length * columns)
        sums = sums.index_add(2, _flat(index, columns), _float(p).transpose(0, 1).reshape(heads, batch, -1))
        out = torch.bmm(sums.view(groups, -1, columns).to(p.dtype), both.to(p.dtype))
        out = out.view(heads, batch, length, -1).transpose(0, 1)
    if rows is None:
        return out
    kept = rows.to(out.dtype)[:, None, :, None]
    ours, others = out.chunk(2, dim=-1)
    return ours * kept + others * (1 - kept)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    value_term: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`p = softmax(scale · q kᵀ + bias)`, then `p v + value_term(p)`, `[B, H, L, d]`.

    `q`, `k` and `v` are `[B, H, L, d]`, `bias` broadcasts to `[B, H, L, L]`; `value_term` is given the probabilities.
    """
    bias = None if bias is None else bias.to(q.dtype)
    if value_term is None and _fused(q, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = (q * scale) @ k.transpose(-2, -1)
    # Autocast would give float32 probabilities and then cast them once for each product.
    p = (logits if bias is None else logits + bias).softmax(dim=-1).to(v.dtype)
    return p @ v if value_term is None else p @ v + value_term(p)


def _fused(q: Tensor, bias: Tensor | None) -> bool:
    """Whether torch's own attention is quicker than its parts: not on a CPU with a trained bias.

    There it computes the same parts, and looks for rows without any key besides (docs/benchmarks/steps.md).
    """
    return bias is None or not bias.requires_grad or q.device.type != "cpu" or q.dtype.itemsize < 4


def choose_form(device: torch.device, length: int, columns: int, groups: int = 1) -> str:
    """The faster form for `length` tokens and `groups` tables of `columns` columns (docs/benchmarks).

    On a CPU dense pays where a position looks up fewer columns than the table has, as interpolated tables do, and
    where heads share the table: one per head is as large, laid out, as all the logits. On a GPU it is always dense,
    whose sums have a fixed order; the choice was not measured there.
    """
    if device.type != "cpu":
        return "dense"
    return "dense" if groups == 1 and 32 <= length < columns else "gather"
