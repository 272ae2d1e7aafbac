"""Gradients of attention with a relative table on keys, for sequences of one tile, as one Triton kernel.

The adjoint of the lookup sums a query's logit gradients by column. A column's keys are a range of key rows by a range
of key columns, so its sum is two differences of running sums (`column_sums`); where a column has one key at most, it
is a gather. Nothing is added up by atomics, so every gradient is the same on every run.
"""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_relative import (
    LOG2E,
    NONE,
    bias,
    class_logits,
    dot,
    load_keys,
    load_rows,
    load_table,
    load_vector,
    prefix_products,
    store_rows,
    store_vector,
)


@triton.jit
def _range_sums(running, upper, lower):
    """Differences of running sums `[rows, n]` at the places `upper` and `lower` `[rows, m]`; NONE stands for zero."""
    high = tl.gather(running, tl.load(upper).to(tl.int32), 1)
    at = tl.load(lower).to(tl.int32)
    return high - tl.where(at == NONE, 0.0, tl.gather(running, tl.where(at == NONE, 0, at), 1))


@triton.jit
def column_sums(
    ds, sums, row, chunk, ONE_KEY: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr
):  # fmt: skip
    """Sums of `ds` `[BLOCK, BLOCK]` by column, `[BLOCK, COLUMNS]`; `sums` are the maps of one tile of keys.

    The maps `[4, SLOTS, COLUMNS]`: first along the keys of one grid row, then over grid rows. With ONE_KEY a single
    one, of the only key: `[chunks, SLOTS, COLUMNS]`.
    """
    each: tl.constexpr = SLOTS * COLUMNS
    at = sums + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if ONE_KEY:
        key = tl.load(at + chunk * each).to(tl.int32)
        return tl.where(key == NONE, 0.0, tl.gather(ds, tl.where(key == NONE, 0, key), 1))
    else:
        by_row = _range_sums(tl.cumsum(ds, 1), at, at + each)
        return _range_sums(tl.cumsum(by_row, 1), at + 2 * each, at + 3 * each)


@triton.jit
def backward_kernel(
    qkv, table, attacked, added, masked, pairs, sums, grad_out, lse, grad_qkv, by_column, scale,
    stride_b, stride_l, stride_s, stride_h, out_b, out_l, out_h, table_h, columns, L, HEADS,
    FIRST: tl.constexpr, PREFIX: tl.constexpr, CHUNKS: tl.constexpr, ATTACKED: tl.constexpr, ADDED: tl.constexpr,
    ONE_KEY: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of one image, and its queries' sums by column, `[B, L - FIRST, H, CHUNKS · COLUMNS]`.

    What is needed again is read again: from the cache it costs less than registers.
    """
    pid = tl.program_id(0)
    batch, head = (pid // HEADS).to(tl.int64), pid % HEADS
    start, to = qkv + batch * stride_b + head * stride_h, grad_qkv + batch * stride_b + head * stride_h
    gradient = grad_out + batch * out_b + head * out_h
    lse += pid.to(tl.int64) * L
    table += head * table_h
    attacked += head * table_h
    added += head * (table_h // columns)
    masked += batch * L
    slot, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    token = FIRST + slot
    if FIRST == 1:  # the class token: its key's share of each query, its query's of each key
        q0, do0 = load_vector(start, D, BLOCK_D), load_vector(gradient, D, BLOCK_D)
        k0, v0 = load_vector(start + stride_s, D, BLOCK_D), load_vector(start + 2 * stride_s, D, BLOCK_D)
        most0 = tl.load(lse)
        _, c = class_logits(start, token, stride_l, stride_s, q0, scale, added, masked, L, ADDED, D, BLOCK_D)
        c = tl.exp2(c - most0)
        own = tl.exp2(tl.sum(q0 * k0, 0) * (scale * LOG2E) - most0)
        dc = tl.sum(load_rows(start + 2 * stride_s, token, stride_l, L, D, BLOCK_D).to(tl.float32) * do0[None, :], 1)
        down = tl.sum(do0 * v0, 0)
        delta0 = tl.sum(c * dc, 0) + own * down
        dc, down = c * (dc - delta0) * scale, own * (down - delta0) * scale
        logit = tl.sum(load_rows(start, token, stride_l, L, D, BLOCK_D).to(tl.float32) * k0[None, :], 1)
        dp0 = tl.sum(load_rows(gradient, token, out_l, L, D, BLOCK_D).to(tl.float32) * v0[None, :], 1)
    most = tl.load(lse + token, mask=token < L, other=float("inf"))
    marks = token < 0
    if ATTACKED:
        marks = tl.load(masked + token, mask=token < L, other=0) != 0
    q = load_rows(start, token, stride_l, L, D, BLOCK_D)
    here, looked_up = bias(
        q, marks, table, attacked, pairs, columns, scale, CHUNKS, ATTACKED, D, BLOCK, BLOCK_D, COLUMNS, UPCAST
    )  # fmt: skip
    k = load_keys(start + stride_s, token, stride_l, added, masked, L, ADDED, D, BLOCK_D)
    logits = dot(q, tl.trans(k), here, UPCAST)
    p = tl.where((token < L)[None, :], tl.exp2(logits * (scale * LOG2E) - most[:, None]), 0.0)
    do = load_rows(gradient, token, out_l, L, D, BLOCK_D)
    v = load_rows(start + 2 * stride_s, token, stride_l, L, D, BLOCK_D)
    dp = dot(do, tl.trans(v), tl.zeros([BLOCK, BLOCK], tl.float32), UPCAST)
    delta = tl.sum(p * dp, 1)
    if FIRST == 1:
        logit += prefix_products(looked_up, columns, CHUNKS, COLUMNS)
        p0 = tl.exp2(logit * (scale * LOG2E) - most)
        delta += p0 * dp0
        ds0 = p0 * (dp0 - delta) * scale
    dv = dot(tl.trans(p.to(v.dtype)), do, tl.zeros([BLOCK, BLOCK_D], tl.float32), UPCAST)
    if FIRST == 1:
        dv += c[:, None] * load_vector(gradient, D, BLOCK_D)[None, :]
    store_rows(to + 2 * stride_s, token, stride_l, dv, L, D, BLOCK_D)
    ds = p * (dp - delta[:, None]) * scale
    low = ds.to(q.dtype)
    dk = dot(tl.trans(low), q, tl.zeros([BLOCK, BLOCK_D], tl.float32), UPCAST)
    if FIRST == 1:
        dk += dc[:, None] * load_vector(start, D, BLOCK_D)[None, :]
    store_rows(to + stride_s, token, stride_l, dk, L, D, BLOCK_D)
    dq = dot(low, k, tl.zeros([BLOCK, BLOCK_D], tl.float32), UPCAST)
    if FIRST == 1:
        dq += ds0[:, None] * load_vector(start + stride_s, D, BLOCK_D)[None, :]
    row = (batch * (L - FIRST) + slot) * HEADS + head
    for chunk in range(0, CHUNKS):
        found = column_sums(ds, sums, slot, chunk, ONE_KEY, BLOCK, COLUMNS, BLOCK)
        last = (chunk * COLUMNS + column == columns - 1)[None, :]
        if FIRST == 1:
            found = tl.where(last, ds0[:, None], found)
        elif PREFIX == 1:  # the class token is the first key here, and its own query's bias cancels
            first = tl.sum(tl.where((slot == 0)[None, :], ds, 0.0), 1)
            found = tl.where(last & (slot > 0)[:, None], first[:, None], found)
        found = found.to(q.dtype)
        kept = by_column + row[:, None] * (CHUNKS * COLUMNS) + chunk * COLUMNS + column[None, :]
        tl.store(kept, found, mask=(token < L)[:, None])
        if ATTACKED:
            r = load_table(attacked, chunk, columns, scale, q, D, BLOCK_D, COLUMNS)
            dq = dot(tl.where(marks[:, None], found, 0.0).to(q.dtype), tl.trans(r), dq, UPCAST)
            found = tl.where(marks[:, None], 0.0, found).to(q.dtype)
        r = load_table(table, chunk, columns, scale, q, D, BLOCK_D, COLUMNS)
        dq = dot(found, tl.trans(r), dq, UPCAST)
    store_rows(to, token, stride_l, dq, L, D, BLOCK_D)
    if FIRST == 1:
        q0, do0 = load_vector(start, D, BLOCK_D), load_vector(gradient, D, BLOCK_D)
        q32 = load_rows(start, token, stride_l, L, D, BLOCK_D).to(tl.float32)
        store_vector(to + stride_s, tl.sum(ds0[:, None] * q32, 0) + down * q0, D, BLOCK_D)
        do32 = load_rows(gradient, token, out_l, L, D, BLOCK_D).to(tl.float32)
        store_vector(to + 2 * stride_s, tl.sum(p0[:, None] * do32, 0) + own * do0, D, BLOCK_D)
        k32 = load_keys(start + stride_s, token, stride_l, added, masked, L, ADDED, D, BLOCK_D).to(tl.float32)
        store_vector(to, tl.sum(dc[:, None] * k32, 0) + down * load_vector(start + stride_s, D, BLOCK_D), D, BLOCK_D)
