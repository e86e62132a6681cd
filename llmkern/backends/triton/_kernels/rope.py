"""Rotary embedding of q and k in one launch.

With (a, b) the positions of a pair, i and i + R/2 or, interleaved, 2i and 2i + 1:
out[a] = x[a]·cos[a] − x[b]·sin[a],  out[b] = x[b]·cos[b] + x[a]·sin[b].
A program takes ROWS of the rows (batch, head, position) of q, or of k; neighbours are positions, whose cosines lie
side by side and are read again, from the cache, for each head.
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import narrow


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,  # [B, heads, S, D]
    cos_ptr,
    sin_ptr,
    block,
    rows,
    heads,
    length,
    dim,
    x_batch_stride,
    x_head_stride,
    x_stride,
    x_dim_stride,
    cos_batch_stride,
    cos_stride,
    cos_dim_stride,
    sin_batch_stride,
    sin_stride,
    sin_dim_stride,
    ROTARY: tl.constexpr,
    PER_PAIR: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    position = (row % length)[:, None]
    head = (row // length % heads)[:, None]
    batch = (row // length // heads)[:, None]
    valid = (row < rows)[:, None]
    i = tl.arange(0, PAIRS).to(tl.int64)  # times a stride, which may be that of a whole sequence
    if INTERLEAVED:
        a, b = 2 * i, 2 * i + 1
    else:
        a, b = i, i + ROTARY // 2
    if PER_PAIR:
        at_a, at_b = i, i
    else:
        at_a, at_b = a, b
    mask = valid & (i < ROTARY // 2)[None, :]
    cos_row = cos_ptr + batch * cos_batch_stride + position * cos_stride
    sin_row = sin_ptr + batch * sin_batch_stride + position * sin_stride
    cos_a = tl.load(cos_row + at_a[None, :] * cos_dim_stride, mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_row + at_b[None, :] * cos_dim_stride, mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_row + at_a[None, :] * sin_dim_stride, mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_row + at_b[None, :] * sin_dim_stride, mask, other=0.0).to(tl.float32)

    x_row = x_ptr + batch * x_batch_stride + head * x_head_stride + position * x_stride
    out_row = out_ptr + row[:, None] * dim
    out_type: tl.constexpr = out_ptr.dtype.element_ty
    xa = tl.load(x_row + a[None, :] * x_dim_stride, mask, other=0.0).to(tl.float32)
    xb = tl.load(x_row + b[None, :] * x_dim_stride, mask, other=0.0).to(tl.float32)
    tl.store(out_row + a[None, :], narrow(xa * cos_a - xb * sin_a, out_type), mask)
    tl.store(out_row + b[None, :], narrow(xb * cos_b + xa * sin_b, out_type), mask)
    if REST:  # the dimensions behind the rotated ones
        rest = ROTARY + tl.arange(0, REST).to(tl.int64)[None, :]
        mask = valid & (rest < dim)
        tl.store(out_row + rest, tl.load(x_row + rest * x_dim_stride, mask), mask)


@triton.jit
def rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_rows,  # B · heads · S
    k_rows,
    q_heads,
    k_heads,
    length,
    dim,
    q_batch_stride,
    q_head_stride,
    q_stride,
    q_dim_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    k_dim_stride,
    cos_batch_stride,
    cos_stride,
    cos_dim_stride,
    sin_batch_stride,
    sin_stride,
    sin_dim_stride,
    ROTARY: tl.constexpr,
    PER_PAIR: tl.constexpr,  # one cosine for both dimensions of a pair
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,  # a power of two, at least ROTARY / 2
    REST: tl.constexpr,  # a power of two, at least D − ROTARY; or 0
):
    block = tl.program_id(0)
    q_blocks = tl.cdiv(q_rows, ROWS)
    if block < q_blocks:
        _rotate(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, block, q_rows, q_heads, length, dim,
            q_batch_stride, q_head_stride, q_stride, q_dim_stride,
            cos_batch_stride, cos_stride, cos_dim_stride, sin_batch_stride, sin_stride, sin_dim_stride,
            ROTARY, PER_PAIR, INTERLEAVED, ROWS, PAIRS, REST,
        )  # fmt: skip
    else:
        _rotate(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, block - q_blocks, k_rows, k_heads, length, dim,
            k_batch_stride, k_head_stride, k_stride, k_dim_stride,
            cos_batch_stride, cos_stride, cos_dim_stride, sin_batch_stride, sin_stride, sin_dim_stride,
            ROTARY, PER_PAIR, INTERLEAVED, ROWS, PAIRS, REST,
        )  # fmt: skip
