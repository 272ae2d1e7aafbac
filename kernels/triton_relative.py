"""Attention with a relative table on keys as Triton kernels: what they share, and the forward.

One program is one tile of 64 queries of one head of one image. `qkv` is read where the packed projection left it. The
lookup of a pair's column is a gather within the tile of products of queries and table, which is where the product of
queries and keys starts to add up. Where a class token would need a tile of its own, it is folded in as vectors: its
key is what the softmax starts from, its query a few sums over keys.
"""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(255)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """a @ b + acc in float32; UPCAST for the interpreter, whose bfloat16 products are wrong."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")  # concerns float32 alone


@triton.jit
def load_rows(start, token, stride, L, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[BLOCK, BLOCK_D]` of the tokens below L, zeros elsewhere."""
    depth = tl.arange(0, BLOCK_D)
    inside = (token < L)[:, None] & (depth < D)[None, :]
    return tl.load(start + token[:, None] * stride + depth[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(start, token, stride, x, L, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What `load_rows` reads."""
    depth = tl.arange(0, BLOCK_D)
    inside = (token < L)[:, None] & (depth < D)[None, :]
    tl.store(start + token[:, None] * stride + depth[None, :], x.to(start.dtype.element_ty), mask=inside)


@triton.jit
def load_vector(start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token's numbers `[BLOCK_D]` as float32."""
    depth = tl.arange(0, BLOCK_D)
    return tl.load(start + depth, mask=depth < D, other=0.0).to(tl.float32)


@triton.jit
def store_vector(start, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What `load_vector` reads."""
    depth = tl.arange(0, BLOCK_D)
    tl.store(start + depth, x.to(start.dtype.element_ty), mask=depth < D)


@triton.jit
def load_table(
    table, chunk, columns, scale, like, D: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The `chunk`-th COLUMNS columns of a float32 table `[d, columns]` over `scale`, `[BLOCK_D, COLUMNS]` of a type."""
    depth, column = tl.arange(0, BLOCK_D), chunk * COLUMNS + tl.arange(0, COLUMNS)
    inside = (depth < D)[:, None] & (column < columns)[None, :]
    r = tl.load(table + depth[:, None] * columns + column[None, :], mask=inside, other=0.0)
    return (r / scale).to(like.dtype)


@triton.jit
def load_keys(
    start, token, stride, added, masked, L, ADDED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Keys, with the attack's vector on the masked ones."""
    k = load_rows(start, token, stride, L, D, BLOCK_D)
    if ADDED:
        m = tl.load(masked + token, mask=token < L, other=0)
        e = load_vector(added, D, BLOCK_D)
        k = tl.where((m != 0)[:, None], (k.to(tl.float32) + e[None, :]).to(k.dtype), k)
    return k


@triton.jit
def products(
    q, marks, table, attacked, chunk, columns, scale, ATTACKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Queries by a chunk of columns over `scale`, `[BLOCK, COLUMNS]`; those of marked queries by the attacked table."""
    found = tl.zeros([q.shape[0], COLUMNS], tl.float32)
    r = load_table(table, chunk, columns, scale, q, D, BLOCK_D, COLUMNS)
    if ATTACKED:
        found = dot(tl.where(marks[:, None], 0.0, q).to(q.dtype), r, found, UPCAST)
        r = load_table(attacked, chunk, columns, scale, q, D, BLOCK_D, COLUMNS)
        q = tl.where(marks[:, None], q, 0.0).to(q.dtype)
    return dot(q, r, found, UPCAST)


@triton.jit
def bias(
    q, marks, table, attacked, pairs, columns, scale, CHUNKS: tl.constexpr, ATTACKED: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What a tile of queries looks up for the keys of the only tile, and its products with the last chunk."""
    slot = tl.arange(0, BLOCK)
    at = pairs + slot[:, None] * BLOCK + slot[None, :]
    last = products(
        q, marks, table, attacked, CHUNKS - 1, columns, scale, ATTACKED, D, BLOCK_D, COLUMNS, UPCAST
    )  # fmt: skip
    if CHUNKS == 1:
        return tl.gather(last, tl.load(at).to(tl.int32), 1), last
    else:
        place = tl.load(at).to(tl.int32) - (CHUNKS - 1) * COLUMNS
        found = tl.where(place >= 0, tl.gather(last, tl.maximum(place, 0), 1), 0.0)
        for chunk in range(0, CHUNKS - 1):
            each = products(
                q, marks, table, attacked, chunk, columns, scale, ATTACKED, D, BLOCK_D, COLUMNS, UPCAST
            )  # fmt: skip
            place = tl.load(at).to(tl.int32) - chunk * COLUMNS
            inside = (place >= 0) & (place < COLUMNS)
            found = tl.where(inside, tl.gather(each, tl.where(inside, place, 0), 1), found)
        return found, last


@triton.jit
def prefix_products(
    products, columns, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Of the products with the last chunk those with the last column, the prefix token's."""
    column = (CHUNKS - 1) * COLUMNS + tl.arange(0, COLUMNS)
    return tl.sum(tl.where((column == columns - 1)[None, :], products, 0.0), 1)


@triton.jit
def class_logits(
    start, token, stride_l, stride_s, q, scale, added, masked, L,
    ADDED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys as float32 and the class token's logits over them, base 2; its bias, a constant, cancels and is left out."""
    k = load_keys(start + stride_s, token, stride_l, added, masked, L, ADDED, D, BLOCK_D).to(tl.float32)
    logits = tl.sum(k * q[None, :], 1) * (scale * LOG2E)
    return k, tl.where(token < L, logits, float("-inf"))


@triton.jit
def _tile(
    start, table, attacked, added, masked, pairs, out, lse, scale, columns, tile, stride_l, stride_s, out_l, L,
    FIRST: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, ATTACKED: tl.constexpr, ADDED: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and logarithm of sums of 64 queries."""
    slot = tl.arange(0, BLOCK)
    token = FIRST + tile * BLOCK + slot
    q = load_rows(start, token, stride_l, L, D, BLOCK_D)
    marks = token < 0
    if ATTACKED:
        marks = tl.load(masked + token, mask=token < L, other=0) != 0
    if TILES == 1:
        here, looked_up = bias(
            q, marks, table, attacked, pairs, columns, scale, CHUNKS, ATTACKED, D, BLOCK, BLOCK_D, COLUMNS, UPCAST
        )  # fmt: skip
    else:
        looked_up = products(q, marks, table, attacked, 0, columns, scale, ATTACKED, D, BLOCK_D, COLUMNS, UPCAST)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if FIRST == 1:  # the class token's key, whose column of the table is the same for all
        k0 = load_vector(start + stride_s, D, BLOCK_D)
        most = tl.sum(q.to(tl.float32) * k0[None, :], 1)
        most += prefix_products(looked_up, columns, CHUNKS, COLUMNS)
        most *= scale * LOG2E
        total += 1.0
        o += load_vector(start + 2 * stride_s, D, BLOCK_D)[None, :]
    for step in range(0, TILES):
        key = FIRST + step * BLOCK + slot
        k = load_keys(start + stride_s, key, stride_l, added, masked, L, ADDED, D, BLOCK_D)
        if TILES > 1:
            at = pairs + (tile * BLOCK + slot)[:, None] * (TILES * BLOCK) + (step * BLOCK + slot)[None, :]
            here = tl.gather(looked_up, tl.load(at).to(tl.int32), 1)
        logits = dot(q, tl.trans(k), here, UPCAST)
        logits = tl.where((key < L)[None, :], logits * (scale * LOG2E), float("-inf"))
        above = tl.maximum(most, tl.max(logits, 1))
        p, kept = tl.exp2(logits - above[:, None]), tl.exp2(most - above)
        total, most = total * kept + tl.sum(p, 1), above
        v = load_rows(start + 2 * stride_s, key, stride_l, L, D, BLOCK_D)
        o = dot(p.to(v.dtype), v, o * kept[:, None], UPCAST)
    store_rows(out, token, out_l, o / total[:, None], L, D, BLOCK_D)
    tl.store(lse + token, most + tl.log2(total), mask=token < L)


@triton.jit
def _class_token(
    start, added, masked, out, lse, scale, stride_l, stride_s, L,
    TILES: tl.constexpr, ADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output and logarithm of sums of the class token's query, over its own key and all tiles."""
    slot = tl.arange(0, BLOCK)
    q = load_vector(start, D, BLOCK_D)
    most = tl.sum(q * load_vector(start + stride_s, D, BLOCK_D), 0) * (scale * LOG2E)
    total = most * 0.0 + 1.0
    o = load_vector(start + 2 * stride_s, D, BLOCK_D)
    for step in range(0, TILES):
        key = 1 + step * BLOCK + slot
        _, logits = class_logits(start, key, stride_l, stride_s, q, scale, added, masked, L, ADDED, D, BLOCK_D)
        above = tl.maximum(most, tl.max(logits, 0))
        p, kept = tl.exp2(logits - above), tl.exp2(most - above)
        total, most = total * kept + tl.sum(p, 0), above
        v = load_rows(start + 2 * stride_s, key, stride_l, L, D, BLOCK_D).to(tl.float32)
        o = o * kept + tl.sum(v * p[:, None], 0)
    store_vector(out, o / total, D, BLOCK_D)
    tl.store(lse, most + tl.log2(total))


@triton.jit
def forward_kernel(
    qkv, table, attacked, added, masked, pairs, out, lse, scale,
    stride_b, stride_l, stride_s, stride_h, out_b, out_l, out_h, table_h, columns, L, HEADS,
    FIRST: tl.constexpr, TILES: tl.constexpr, CHUNKS: tl.constexpr, ATTACKED: tl.constexpr, ADDED: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`softmax(scale · (q kᵀ + (q · table)[pairs])) v`, and the base-2 logarithm of its sums, `lse` `[B, H, L]`.

    FIRST = 1 folds the class token in. With several tiles it has a program of its own, after those of the tiles.
    """
    programs: tl.constexpr = TILES + FIRST if TILES > 1 else 1
    pid = tl.program_id(0) // programs
    tile = tl.program_id(0) % programs
    batch, head = (pid // HEADS).to(tl.int64), pid % HEADS
    start = qkv + batch * stride_b + head * stride_h
    out += batch * out_b + head * out_h
    lse += pid.to(tl.int64) * L
    table += head * table_h
    attacked += head * table_h
    added += head * (table_h // columns)
    masked += batch * L
    if TILES == 1:
        _tile(
            start, table, attacked, added, masked, pairs, out, lse, scale, columns, 0, stride_l, stride_s, out_l, L,
            FIRST, TILES, CHUNKS, ATTACKED, ADDED, D, BLOCK, BLOCK_D, COLUMNS, UPCAST,
        )  # fmt: skip
        if FIRST == 1:
            _class_token(start, added, masked, out, lse, scale, stride_l, stride_s, L, TILES, ADDED, D, BLOCK, BLOCK_D)
    else:
        if tile < TILES:
            _tile(
                start, table, attacked, added, masked, pairs, out, lse, scale, columns, tile, stride_l, stride_s, out_l,
                L, FIRST, TILES, CHUNKS, ATTACKED, ADDED, D, BLOCK, BLOCK_D, COLUMNS, UPCAST,
            )  # fmt: skip
        else:
            _class_token(start, added, masked, out, lse, scale, stride_l, stride_s, L, TILES, ADDED, D, BLOCK, BLOCK_D)
