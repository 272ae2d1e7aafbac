"""Attention with a relative table on keys as one operator: Triton kernels where they fit, the references elsewhere.

Gradients come from kernels, too, and all sums have a fixed order.
"""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .relative_lookup import BLOCK, Lookup
from .relative_reference import attention, choose_form, relative_bias

_KINDS = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (24, 32, 64, 80)


def unsupported(lookup: Lookup, head_dim: int, dtype: torch.dtype, attacked: bool = False) -> str | None:
    """Why the Triton kernels do not take this attention, or None where they do."""
    if lookup.unsupported is not None:
        return lookup.unsupported
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim}, the kernels know {', '.join(map(str, HEAD_DIMS))}"
    if dtype not in _KINDS:
        return f"{str(dtype).removeprefix('torch.')} tokens"
    if dtype == torch.float32 and head_dim > 64 and lookup.tiles > 1:
        return f"float32 heads of {head_dim} for more than {BLOCK} patches, which no GPU's shared memory holds"
    if attacked and lookup.tiles > 1:
        return f"a second table for more than {BLOCK} patches"
    return None


def _check(qkv: Tensor, lookup: Lookup, tables: dict[str, Tensor | None], masked: Tensor | None) -> None:
    length = len(lookup.index)
    if qkv.ndim != 5 or qkv.shape[1:3] != (length, 3):
        raise ValueError(f"qkv: expected [B, {length}, 3, H, d], given {list(qkv.shape)}.")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv: expected floating-point numbers, given {qkv.dtype}.")
    batch, _, _, heads, depth = qkv.shape
    for name, given in tables.items():
        if given is None:
            continue
        wanted = (depth,) if name == "added" else (depth, lookup.columns)
        if given.shape[1:] != wanted or given.shape[0] not in (1, heads):
            text = ", ".join(map(str, wanted))
            raise ValueError(f"{name}: expected [1, {text}] or [{heads}, {text}], given {list(given.shape)}.")
        table = tables["table"]
        assert table is not None
        if len(given) != len(table):
            raise ValueError(f"{name}: expected {len(table)} tables as in table, given {len(given)}.")
        if not given.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, given {given.dtype}.")
    if (tables["attacked"] is not None or tables["added"] is not None) != (masked is not None):
        raise ValueError("masked: expected together with attacked or added, and only then.")
    if masked is not None and masked.shape != (batch, length):
        raise ValueError(f"masked: expected [{batch}, {length}], given {list(masked.shape)}.")
    for name, given in {**tables, "masked": masked, "index": lookup.index}.items():
        if given is not None and given.device != qkv.device:
            raise ValueError(f"{name}: expected on {qkv.device}, the device of qkv, given {given.device}.")


def relative_attention(
    qkv: Tensor,
    table: Tensor,
    lookup: Lookup,
    scale: float,
    *,
    masked: Tensor | None = None,
    attacked: Tensor | None = None,
    added: Tensor | None = None,
    operator: str = "reference",
    form: str | None = None,
) -> Tensor:
    """`softmax(scale · q kᵀ + q · table[index]) v`, `[B, L, H, d]` (iRPE, AdPE).

    `qkv` is the packed projection `[B, L, 3, H, d]`, `table` `[G, d, C]` with G 1 (shared) or H. Where `masked`
    `[B, L]` is not 0, which a prefix token never is, queries look up `attacked` `[G, d, C]` in the place of `table`,
    and `added` `[G, d]` is added to keys. `operator` is `triton` or `reference`, `form` one of the reference's. Raises
    ValueError for wrong shapes, types and devices, and where the Triton kernels do not take what they are given.
    """
    _check(qkv, lookup, {"table": table, "attacked": attacked, "added": added}, masked)
    if masked is not None:
        masked = F.pad(masked[:, lookup.prefix :] != 0, (lookup.prefix, 0))
    if operator == "reference":
        return _reference(qkv, table, lookup, scale, masked, attacked, added, form)
    if operator != "triton":
        raise ValueError(f"operator={operator!r} is not known; choose triton or reference.")
    why = unsupported(lookup, qkv.shape[-1], qkv.dtype, attacked is not None)
    if why is not None:
        raise ValueError(f"The Triton kernels for relative attention do not take {why}; use operator='reference'.")
    assert lookup.pairs is not None and lookup.sums is not None
    shape = [lookup.prefix, lookup.first]
    marks = None if masked is None else masked.to(torch.uint8)
    out, _ = torch.ops.elsewhere.relative_attention(
        qkv.contiguous(), _whole(table), lookup.pairs, lookup.sums, marks, _whole(attacked), _whole(added), shape, scale
    )
    return out


def _whole(table: Any) -> Any:
    return None if table is None else table.float().contiguous()


def _reference(
    qkv: Tensor,
    table: Tensor,
    lookup: Lookup,
    scale: float,
    masked: Tensor | None,
    attacked: Tensor | None,
    added: Tensor | None,
    form: str | None,
) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    form = form or choose_form(qkv.device, len(lookup.index), table.shape[2], table.shape[0])
    rows = masked if attacked is not None else None
    with torch.autocast(qkv.device.type, enabled=False):
        bias = relative_bias(q, table, lookup.index, form, attacked, rows)
    if added is not None and masked is not None:
        k = k + masked.to(k.dtype)[:, None, :, None] * added.to(k.dtype)[:, None]
    return attention(q, k, v, scale, bias).transpose(1, 2)


# Programs among which the images are divided for a table's gradient.
_SHARES = 32


def _warps(tiles: int, chunks: int, depth: int, dtype: torch.dtype) -> int:
    """Warps of a forward's program: the fewest without spills; not measured on a GPU."""
    return 8 if tiles > 1 or chunks > 1 or depth > 64 or dtype == torch.float32 else 4


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current GPU, whatever its tensors' is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _constants(qkv: Tensor, first: int) -> dict[str, Any]:
    depth = qkv.shape[-1]
    return {
        "FIRST": first,
        "D": depth,
        "BLOCK": BLOCK,
        "BLOCK_D": max(16, 1 << (depth - 1).bit_length()),
        "COLUMNS": 64,
        "UPCAST": qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


@torch.library.custom_op("elsewhere::relative_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    table: Tensor,
    pairs: Tensor,
    sums: Tensor,
    masked: Tensor | None,
    attacked: Tensor | None,
    added: Tensor | None,
    shape: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    from .triton_relative import forward_kernel

    batch, length, _, heads, depth = qkv.shape
    out = qkv.new_empty(batch, length, heads, depth)
    lse = qkv.new_empty(batch, heads, length, dtype=torch.float32)
    tiles, chunks = pairs.shape[1] // BLOCK, _chunks(sums)
    programs = tiles + shape[1] if tiles > 1 else 1
    with _on(qkv.device):
        forward_kernel[(batch * heads * programs,)](
            qkv, table, _or(attacked, table), _or(added, table), _or(masked, pairs), pairs[0], out, lse, scale,
            *qkv.stride()[:4], *out.stride()[:3], table.stride(0) if len(table) > 1 else 0, table.shape[2], length,
            heads, TILES=tiles, ATTACKED=attacked is not None, ADDED=added is not None, CHUNKS=chunks,
            **_constants(qkv, shape[1]), num_warps=_warps(tiles, chunks, depth, qkv.dtype),
        )  # fmt: skip
    return out, lse


def _chunks(sums: Tensor) -> int:
    """Chunks of 64 columns that the kernels go through; several have the one map of `Lookup.sums`."""
    return len(sums) if sums.ndim == 3 else 1


def _or(given: Tensor | None, other: Tensor) -> Tensor:
    return other if given is None else given


@_forward.register_fake
def _(qkv, table, pairs, sums, masked, attacked, added, shape, scale):
    batch, length, _, heads, depth = qkv.shape
    return qkv.new_empty(batch, length, heads, depth), qkv.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("elsewhere::relative_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    qkv: Tensor,
    table: Tensor,
    pairs: Tensor,
    sums: Tensor,
    masked: Tensor | None,
    attacked: Tensor | None,
    added: Tensor | None,
    out: Tensor,
    lse: Tensor,
    shape: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv, table, attacked and added; empty where there is no such table."""
    from .triton_relative_backward import backward_kernel
    from .triton_relative_long import key_gradient_kernel, query_gradient_kernel

    batch, length, _, heads, _ = qkv.shape
    first, columns = shape[1], table.shape[2]
    gradient, grad_qkv = gradient.contiguous(), torch.empty_like(qkv)
    constants = _constants(qkv, first) | {"num_warps": 8}  # the fewest without spills; not measured on a GPU
    strides = (*qkv.stride()[:4], *out.stride()[:3], table.stride(0) if len(table) > 1 else 0, columns, length)
    tiles, chunks = pairs.shape[1] // BLOCK, _chunks(sums)
    by_column = qkv.new_empty(batch, length - first, heads, chunks * 64)
    marks, vector = _or(masked, pairs), _or(added, table)
    with _on(qkv.device):
        if tiles == 1:
            backward_kernel[(batch * heads,)](
                qkv, table, _or(attacked, table), vector, marks, pairs[0], sums, gradient, lse, grad_qkv, by_column,
                scale, *strides, heads, PREFIX=shape[0], CHUNKS=chunks, ATTACKED=attacked is not None,
                ADDED=added is not None, ONE_KEY=chunks > 1, **constants,
            )  # fmt: skip
        else:
            delta, grid = torch.empty_like(lse), (batch * heads * (tiles + first),)
            query_gradient_kernel[grid](
                qkv, table, vector, marks, pairs[0], sums, out, gradient, lse, delta, grad_qkv, by_column, scale,
                *strides, heads, TILES=tiles, ADDED=added is not None, **constants,
            )  # fmt: skip
            key_gradient_kernel[grid](
                qkv, table, vector, marks, pairs[1], gradient, lse, delta, grad_qkv, scale, *strides, heads,
                TILES=tiles, ADDED=added is not None, **constants,
            )  # fmt: skip
        rows = ("unmarked", "marked") if attacked is not None else ("all",)
        found = [_table_gradient(qkv, marks, by_column, tiles, chunks, first, which) for which in rows]
    found = [each if len(table) > 1 else each.sum(0, keepdim=True) for each in found]
    for_tables = [(each[..., :columns] / scale).contiguous() for each in found]
    for_attacked, for_added = table.new_empty(0), table.new_empty(0)
    if attacked is not None:
        for_attacked = for_tables[1]
    if added is not None and masked is not None:
        moved = grad_qkv[:, :, 1] * masked[..., None, None].to(qkv.dtype)
        for_added = moved.sum(dim=(0, 1) if len(added) > 1 else (0, 1, 2), dtype=torch.float32).view_as(added)
    return grad_qkv, for_tables[0], for_attacked, for_added


def _table_gradient(
    qkv: Tensor, marks: Tensor, by_column: Tensor, tiles: int, chunks: int, first: int, rows: str
) -> Tensor:
    """Queries by their sums by column, `[H, d, n]` float32, over all queries or those that are marked or not."""
    from .triton_relative_table import table_gradient_kernel

    batch, length, _, heads, depth = qkv.shape
    shares = min(batch, _SHARES)
    partial = qkv.new_empty(shares, heads, depth, chunks * 64, dtype=torch.float32)
    stride_b, stride_l, _, stride_h = qkv.stride()[:4]
    table_gradient_kernel[(shares, heads, chunks)](
        qkv, marks, by_column, partial, stride_b, stride_l, stride_h, length, batch, heads,
        TILES=tiles, CHUNKS=chunks, ROWS=rows, **_constants(qkv, first), num_warps=4,
    )  # fmt: skip
    return partial.sum(0)


@_backward.register_fake
def _(gradient, qkv, table, pairs, sums, masked, attacked, added, out, lse, shape, scale):
    return (
        torch.empty_like(qkv),
        torch.empty_like(table),
        table.new_empty(0 if attacked is None else attacked.shape),
        table.new_empty(0 if added is None else added.shape),
    )


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.shape, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple:
    *inputs, out, lse = ctx.saved_tensors
    attacked, added = inputs[5:7]
    found = torch.ops.elsewhere.relative_attention_backward(gradient, *inputs, out, lse, ctx.shape, ctx.scale)
    for_qkv, for_table, for_attacked, for_added = found
    for_attacked = None if attacked is None else for_attacked
    return for_qkv, for_table, None, None, None, for_attacked, None if added is None else for_added, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
