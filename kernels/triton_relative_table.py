"""Gradients of relative tables from queries and their logit gradients summed by column, as one Triton kernel."""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_relative import dot, load_rows


@triton.jit
def table_gradient_kernel(
    qkv, masked, by_column, partial, stride_b, stride_l, stride_h, L, BATCH, HEADS,
    FIRST: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ qᵀ `by_column` over the images of a share, `partial` `[shares, H, d, CHUNKS · COLUMNS]` float32.

    Programs are shares, heads and chunks of columns. ROWS: all, or only those where `masked` is 1 or 0.
    """
    head, chunk = tl.program_id(1), tl.program_id(2)
    slot, column = tl.arange(0, BLOCK), chunk * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    for turn in range(0, tl.cdiv(BATCH - tl.program_id(0), tl.num_programs(0))):
        batch = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64)
        for tile in range(0, TILES):
            row = tile * BLOCK + slot
            token = FIRST + row
            q = load_rows(qkv + batch * stride_b + head * stride_h, token, stride_l, L, D, BLOCK_D)
            at = ((batch * (L - FIRST) + row) * HEADS + head)[:, None] * (CHUNKS * COLUMNS) + column[None, :]
            there = token < L
            if ROWS != "all":
                mark = tl.load(masked + batch * L + token, mask=there, other=0) != 0
                there = there & (mark if ROWS == "marked" else mark == 0)
            sums = tl.load(by_column + at, mask=there[:, None], other=0.0)
            total = dot(tl.trans(q), sums, total, UPCAST)
    depth = tl.arange(0, BLOCK_D)
    part = partial + (tl.program_id(0) * HEADS + head).to(tl.int64) * D * (CHUNKS * COLUMNS)
    tl.store(part + depth[:, None] * (CHUNKS * COLUMNS) + column[None, :], total, mask=(depth < D)[:, None])
