"""The keyed noise of stochastic positions as one Triton kernel: Philox words, Box–Muller, written once.

The words are those of `stochastic_positions.position_words`, bit for bit; the numbers are meant to be
within 1e-5 of the reference's, by the errors known of the hardware's functions, and are so in the interpreter.
"""

# What pyright sees of a kernel is the Python function, not what @triton.jit makes of it.
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportAssignmentType=false

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from triton import knobs
from triton.language.extra import libdevice

from .dispatch import said
from .stochastic_positions import KEY, position_words

# Kernels are interpreted or compiled as triton found TRITON_INTERPRET when they were defined.
_HARDWARE = not knobs.runtime.interpret
TOKENS, QUADS, WARPS = 8, 64, 4  # of a program
# Token numbers are int32, those of the last program's masked tokens too.
MOST_TOKENS = 2**31 - TOKENS


@triton.jit
def _pair(radius, angle, HARDWARE: tl.constexpr):
    """Two normal numbers of two 32-bit words, by Box–Muller on 23-bit uniforms.

    The hardware's logarithm is within 2^-22, of which a square root near 0 would make 5e-4 (or NaN, of a logarithm
    above 0), so that the last 1/64 below 1 takes a series, -2 ln(1 - w) = 2w + w² + 2w³/3 up to 2^-20 of it.
    """
    first = ((radius >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    rest = 1.0 - first  # exact
    # Around 0, where the hardware's sine and cosine are most exact: half a turn off, which is a change of sign.
    turn = (((angle >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07 - 0.5) * 6.283185307179586
    if HARDWARE:
        logarithm, cosine, sine = libdevice.fast_log2f(first), libdevice.fast_cosf(turn), libdevice.fast_sinf(turn)
    else:
        logarithm, cosine, sine = tl.log2(first), tl.cos(turn), tl.sin(turn)
    series = rest * (2.0 + rest * (1.0 + rest * 0.6666666666666666))
    length = -tl.sqrt(tl.where(rest < 0.015625, series, logarithm * -1.3862943611198906))
    return length * cosine, length * sine


@triton.jit(do_not_specialize=["key", "scale", "tokens", "N"])
def noise_kernel(
    out, epochs, ids, blocks, patches, key, scale, tokens, N, columns, quads,
    WORDS: tl.constexpr, HARDWARE: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Numbers of TOKENS tokens by 4 · QUADS columns; lane l of quad q is column l · quads + q.

    `out` is `[tokens, columns]`; of int64 are `epochs`, `ids` and `blocks` `[tokens / N]` and `patches` `[tokens]`.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)
    there, row = token < tokens, token // N
    sample = tl.load(ids + row, mask=there, other=0)
    epoch = tl.load(epochs + row, mask=there, other=0)
    block = tl.load(blocks + row, mask=there, other=0)
    patch = tl.load(patches + token, mask=there, other=0)
    shape: tl.constexpr = [TOKENS, QUADS]
    c0 = (block << 16).to(tl.uint32)[:, None] | quad.to(tl.uint32)[None, :]
    c1 = tl.broadcast_to(patch.to(tl.uint32)[:, None], shape)
    c2 = tl.broadcast_to(sample.to(tl.uint32)[:, None], shape)
    c3 = tl.broadcast_to(((sample >> 32) | (epoch << 12)).to(tl.uint32)[:, None], shape)
    c0, c1, c2, c3 = tl.philox(key, c0, c1, c2, c3)
    if not WORDS:
        c0, c1 = _pair(c0, c1, HARDWARE)
        c2, c3 = _pair(c2, c3, HARDWARE)
        c0, c1, c2, c3 = c0 * scale, c1 * scale, c2 * scale, c3 * scale
    at = out + token.to(tl.int64)[:, None] * columns + quad[None, :]
    inside = there[:, None] & (quad < quads)[None, :]
    kind = out.dtype.element_ty
    left = columns - quad[None, :]
    tl.store(at, c0.to(kind, bitcast=WORDS), mask=inside)
    tl.store(at + quads, c1.to(kind, bitcast=WORDS), mask=inside & (left > quads))
    tl.store(at + 2 * quads, c2.to(kind, bitcast=WORDS), mask=inside & (left > 2 * quads))
    tl.store(at + 3 * quads, c3.to(kind, bitcast=WORDS), mask=inside & (left > 3 * quads))


def draw(
    out: Tensor, epochs: Tensor, sample_ids: Tensor, blocks: Tensor, patches: Tensor, seed: int, scale: float = 1.0
) -> Tensor:
    """Fill `out` `[R, N, columns]`, contiguous: floats with noise times `scale`, int32 with the words themselves."""
    columns, tokens = out.shape[-1], patches.numel()
    if out.numel() == 0:
        return out
    quads = -(-columns // 4)
    keys = [each.to(torch.int64).contiguous() for each in (epochs, sample_ids, blocks, patches)]
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(quads, QUADS))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        noise_kernel[grid](
            out, *keys, (KEY << 32) | seed, scale, tokens, patches.shape[1], columns, quads,
            WORDS=out.dtype == torch.int32, HARDWARE=_HARDWARE, TOKENS=TOKENS, QUADS=QUADS,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def fault(device: torch.device) -> str | None:
    """What the kernel lacks on `device`, to stand after "needs"; None where its words are those of the reference."""
    seed, columns = 2**32 - 1, 9
    with unset_fake_temporarily():
        epochs, ids, blocks = (
            torch.tensor(each, device=device) for each in ([3, 2**20 - 1], [2**44 - 1, 7], [0, 2**16 - 1])
        )
        patches = torch.tensor([[0, 195, 1024], [5, 5, 6]], device=device)
        expected = torch.cat(position_words(seed, epochs, ids, blocks, patches, columns), dim=-1)[..., :columns]
        found = torch.empty(expected.shape, dtype=torch.int32, device=device)
        try:
            draw(found, epochs, ids, blocks, patches, seed)
            same = torch.equal(found.long() & 0xFFFFFFFF, expected)
        except Exception as error:  # a compiler, linker or driver that is missing or old
            return f"a kernel that runs here ({said(error)})"
    return None if same else "a kernel that gives the words of the reference, and here it gives others"
