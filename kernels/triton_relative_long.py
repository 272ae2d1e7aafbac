"""Gradients of attention with a relative table on keys, for sequences of several tiles, as two Triton kernels.

Both compute the probabilities again from the logarithms of their sums. The first goes through the keys of a tile of
queries: their gradients, their sums by column, and what the second takes from them. The second goes through the
queries of a tile of keys, with logits laid out the other way round. The class token has programs of its own.
"""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_relative import (
    LOG2E,
    class_logits,
    dot,
    load_keys,
    load_rows,
    load_table,
    load_vector,
    prefix_products,
    products,
    store_rows,
    store_vector,
)
from .triton_relative_backward import column_sums


@triton.jit
def query_gradient_kernel(
    qkv, table, added, masked, pairs, sums, out, grad_out, lse, delta, grad_qkv, by_column, scale,
    stride_b, stride_l, stride_s, stride_h, out_b, out_l, out_h, table_h, columns, L, HEADS,
    FIRST: tl.constexpr, TILES: tl.constexpr, ADDED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, their sums by column `[B, L - FIRST, H, COLUMNS]`, and `delta` `[B, H, L]`, Σ p · ∂p."""
    pid, tile = tl.program_id(0) // (TILES + FIRST), tl.program_id(0) % (TILES + FIRST)
    batch, head = (pid // HEADS).to(tl.int64), pid % HEADS
    start = qkv + batch * stride_b + head * stride_h
    to = grad_qkv + batch * stride_b + head * stride_h
    gradient, out = grad_out + batch * out_b + head * out_h, out + batch * out_b + head * out_h
    lse, delta = lse + pid.to(tl.int64) * L, delta + pid.to(tl.int64) * L
    table += head * table_h
    added += head * (table_h // columns)
    masked += batch * L
    slot, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    if tile < TILES:
        row = tile * BLOCK + slot
        token = FIRST + row
        q = load_rows(start, token, stride_l, L, D, BLOCK_D)
        do = load_rows(gradient, token, out_l, L, D, BLOCK_D)
        o = load_rows(out, token, out_l, L, D, BLOCK_D)
        difference = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + token, difference, mask=token < L)
        most = tl.load(lse + token, mask=token < L, other=float("inf"))
        looked_up = products(q, token < 0, table, table, 0, columns, scale, False, D, BLOCK_D, COLUMNS, UPCAST)
        dq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        found = tl.zeros([BLOCK, COLUMNS], tl.float32)
        if FIRST == 1:  # the class token's key
            k0, v0 = load_vector(start + stride_s, D, BLOCK_D), load_vector(start + 2 * stride_s, D, BLOCK_D)
            logit = tl.sum(q.to(tl.float32) * k0[None, :], 1)
            logit += prefix_products(looked_up, columns, 1, COLUMNS)
            dp0 = tl.sum(do.to(tl.float32) * v0[None, :], 1)
            ds0 = tl.exp2(logit * (scale * LOG2E) - most) * (dp0 - difference) * scale
            dq += ds0[:, None] * k0[None, :]
            found += tl.where((column == columns - 1)[None, :], ds0[:, None], 0.0)
        for step in range(0, TILES):
            key = FIRST + step * BLOCK + slot
            k = load_keys(start + stride_s, key, stride_l, added, masked, L, ADDED, D, BLOCK_D)
            v = load_rows(start + 2 * stride_s, key, stride_l, L, D, BLOCK_D)
            at = tl.load(pairs + row[:, None] * (TILES * BLOCK) + (step * BLOCK + slot)[None, :])
            logits = dot(q, tl.trans(k), tl.gather(looked_up, at.to(tl.int32), 1), UPCAST)
            p = tl.where((key < L)[None, :], tl.exp2(logits * (scale * LOG2E) - most[:, None]), 0.0)
            dp = dot(do, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32), UPCAST)
            ds = p * (dp - difference[:, None]) * scale
            dq = dot(ds.to(q.dtype), k, dq, UPCAST)
            maps = sums + step * (4 * TILES * BLOCK * COLUMNS)
            found += column_sums(ds, maps, row, 0, False, BLOCK, COLUMNS, TILES * BLOCK)
        found = found.to(q.dtype)
        r = load_table(table, 0, columns, scale, q, D, BLOCK_D, COLUMNS)
        dq = dot(found, tl.trans(r), dq, UPCAST)
        store_rows(to, token, stride_l, dq, L, D, BLOCK_D)
        kept = by_column + ((batch * (L - FIRST) + row) * HEADS + head)[:, None] * COLUMNS + column[None, :]
        tl.store(kept, found, mask=(token < L)[:, None])
    else:
        q0, do0 = load_vector(start, D, BLOCK_D), load_vector(gradient, D, BLOCK_D)
        k0, v0 = load_vector(start + stride_s, D, BLOCK_D), load_vector(start + 2 * stride_s, D, BLOCK_D)
        delta0, most0 = tl.sum(do0 * load_vector(out, D, BLOCK_D), 0), tl.load(lse)
        tl.store(delta, delta0)
        own = tl.exp2(tl.sum(q0 * k0, 0) * (scale * LOG2E) - most0)
        dq0 = own * (tl.sum(do0 * v0, 0) - delta0) * scale * k0
        for step in range(0, TILES):
            key = 1 + step * BLOCK + slot
            k, c = class_logits(start, key, stride_l, stride_s, q0, scale, added, masked, L, ADDED, D, BLOCK_D)
            v = load_rows(start + 2 * stride_s, key, stride_l, L, D, BLOCK_D).to(tl.float32)
            dc = tl.exp2(c - most0) * (tl.sum(v * do0[None, :], 1) - delta0) * scale
            dq0 += tl.sum(dc[:, None] * k, 0)
        store_vector(to, dq0, D, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    qkv, table, added, masked, pairs, grad_out, lse, delta, grad_qkv, scale,
    stride_b, stride_l, stride_s, stride_h, out_b, out_l, out_h, table_h, columns, L, HEADS,
    FIRST: tl.constexpr, TILES: tl.constexpr, ADDED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; `pairs` are transposed, `[key, query]`."""
    pid, tile = tl.program_id(0) // (TILES + FIRST), tl.program_id(0) % (TILES + FIRST)
    batch, head = (pid // HEADS).to(tl.int64), pid % HEADS
    start = qkv + batch * stride_b + head * stride_h
    to = grad_qkv + batch * stride_b + head * stride_h
    gradient = grad_out + batch * out_b + head * out_h
    lse, delta = lse + pid.to(tl.int64) * L, delta + pid.to(tl.int64) * L
    table += head * table_h
    added += head * (table_h // columns)
    masked += batch * L
    slot = tl.arange(0, BLOCK)
    if tile < TILES:
        row = tile * BLOCK + slot
        token = FIRST + row
        k = load_keys(start + stride_s, token, stride_l, added, masked, L, ADDED, D, BLOCK_D)
        v = load_rows(start + 2 * stride_s, token, stride_l, L, D, BLOCK_D)
        if FIRST == 1:  # the class token's query
            q0, do0 = load_vector(start, D, BLOCK_D), load_vector(gradient, D, BLOCK_D)
            c = tl.exp2(tl.sum(k.to(tl.float32) * q0[None, :], 1) * (scale * LOG2E) - tl.load(lse))
            dc = c * (tl.sum(v.to(tl.float32) * do0[None, :], 1) - tl.load(delta)) * scale
        dk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        r = tl.trans(load_table(table, 0, columns, scale, k, D, BLOCK_D, COLUMNS))
        for step in range(0, TILES):
            query = FIRST + step * BLOCK + slot
            q = load_rows(start, query, stride_l, L, D, BLOCK_D)
            do = load_rows(gradient, query, out_l, L, D, BLOCK_D)
            most = tl.load(lse + query, mask=query < L, other=float("inf"))
            difference = tl.load(delta + query, mask=query < L, other=0.0)
            looked_up = dot(r, tl.trans(q), tl.zeros([COLUMNS, BLOCK], tl.float32), UPCAST)
            at = tl.load(pairs + row[:, None] * (TILES * BLOCK) + (step * BLOCK + slot)[None, :])
            logits = dot(k, tl.trans(q), tl.gather(looked_up, at.to(tl.int32), 0), UPCAST)
            p = tl.exp2(logits * (scale * LOG2E) - most[None, :])
            dv = dot(p.to(do.dtype), do, dv, UPCAST)
            dp = dot(v, tl.trans(do), tl.zeros([BLOCK, BLOCK], tl.float32), UPCAST)
            ds = p * (dp - difference[None, :]) * scale
            dk = dot(ds.to(q.dtype), q, dk, UPCAST)
        if FIRST == 1:
            dv += c[:, None] * load_vector(gradient, D, BLOCK_D)[None, :]
            dk += dc[:, None] * load_vector(start, D, BLOCK_D)[None, :]
        store_rows(to + stride_s, token, stride_l, dk, L, D, BLOCK_D)
        store_rows(to + 2 * stride_s, token, stride_l, dv, L, D, BLOCK_D)
    else:
        q0, do0 = load_vector(start, D, BLOCK_D), load_vector(gradient, D, BLOCK_D)
        k0, v0 = load_vector(start + stride_s, D, BLOCK_D), load_vector(start + 2 * stride_s, D, BLOCK_D)
        own = tl.exp2(tl.sum(q0 * k0, 0) * (scale * LOG2E) - tl.load(lse))
        dk0 = own * (tl.sum(do0 * v0, 0) - tl.load(delta)) * scale * q0
        dv0 = own * do0
        depth = tl.arange(0, BLOCK_D)
        looked_up = tl.load(table + depth * columns + columns - 1, mask=depth < D, other=0.0) / scale
        for step in range(0, TILES):
            query = 1 + step * BLOCK + slot
            q = load_rows(start, query, stride_l, L, D, BLOCK_D).to(tl.float32)
            do = load_rows(gradient, query, out_l, L, D, BLOCK_D).to(tl.float32)
            most = tl.load(lse + query, mask=query < L, other=float("inf"))
            difference = tl.load(delta + query, mask=query < L, other=0.0)
            p = tl.exp2(tl.sum(q * (k0 + looked_up)[None, :], 1) * (scale * LOG2E) - most)
            ds = p * (tl.sum(do * v0[None, :], 1) - difference) * scale
            dv0 += tl.sum(p[:, None] * do, 0)
            dk0 += tl.sum(ds[:, None] * q, 0)
        store_vector(to + stride_s, dk0, D, BLOCK_D)
        store_vector(to + 2 * stride_s, dv0, D, BLOCK_D)
