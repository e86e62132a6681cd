"""Attention backward, after FlashAttention-2: the weights are computed again, tile by tile, and no sum is atomic.

With P the weights, dP = dO·Vᵀ and Δ = rowsum(dO∘O) − dlse:  dS = P∘(dP − Δ),  dV = Pᵀ·dO,  dQ = scale·dS·K,
dK = scale·dSᵀ·Q, with the cap's slope between dS and the last two; a mask that was added has the gradient dS.

delta_kernel  Δ of each row
dq_kernel     a program takes BLOCK_M queries and walks the keys that they see
dkv_kernel    a program takes BLOCK_N keys and walks the queries that see them, of every head of the group
dmask_kernel  a program takes a tile of the mask and walks what the mask was broadcast over

P = exp(S − shift) / total.  Without `total` shift is the log-sum-exp.  In fp32 its own rounding would be most of the
error, and beside an additive mask −3e38 would have swallowed the logarithm of the sum: there shift is the row's maximum
and total the sum of exponentials.
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.attention import finite, masked, visible
from llmkern.backends.triton._kernels.common import dot, narrow, tanh


@triton.jit
def delta_kernel(
    dout_ptr,
    out_ptr,
    dlse_ptr,  # fp32 [B, H, S], or None
    delta_ptr,  # fp32 [B, H, S]
    rows,
    heads,
    queries,
    dout_batch_stride,
    dout_head_stride,
    dout_stride,
    out_batch_stride,
    out_head_stride,
    out_stride,
    DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = index < rows
    row = index % queries
    head = index // queries % heads
    batch = index // queries // heads
    dim = tl.arange(0, PADDED_V)
    mask = inside[:, None] & (dim < DIM_V)[None, :]
    at = batch * dout_batch_stride + head * dout_head_stride + row * dout_stride
    dout = tl.load(dout_ptr + at[:, None] + dim[None, :], mask, other=0.0).to(tl.float32)
    at = batch * out_batch_stride + head * out_head_stride + row * out_stride
    out = tl.load(out_ptr + at[:, None] + dim[None, :], mask, other=0.0).to(tl.float32)
    delta = tl.sum(dout * out, axis=1)
    if dlse_ptr is not None:
        delta = delta - tl.load(dlse_ptr + index, inside, other=0.0)
    tl.store(delta_ptr + index, delta, inside)


@triton.jit
def _weights(
    s,  # q·kᵀ, in either orientation
    row,  # broadcast against each other in that orientation, as shift and inverse are
    column,
    shift,
    inverse,
    mask_ptr,
    padding_ptr,
    queries,
    keys,
    mask_row_stride,
    mask_column_stride,
    padding_stride,
    sm_scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    """(P, the slope of the cap)."""
    s = s * sm_scale
    slope = tl.full((1, 1), 1.0, tl.float32)
    if SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
    allowed = visible(row, column, queries, keys, left, right, HAS_LEFT, HAS_RIGHT)
    s = masked(
        s, allowed, row, column, mask_ptr, padding_ptr, queries, keys,
        mask_row_stride, mask_column_stride, padding_stride, ADDITIVE,
    )  # fmt: skip
    return tl.exp(s - shift) * inverse, slope


@triton.jit
def _row_sums(shift_ptr, total_ptr, delta_ptr, at, inside):
    """(shift, 1 / total, Δ) of rows; those that see nothing have P = exp(−inf − 0)."""
    shift = finite(tl.load(shift_ptr + at, inside, other=0.0))
    inverse = tl.full(shift.shape, 1.0, tl.float32)
    if total_ptr is not None:
        total = tl.load(total_ptr + at, inside, other=1.0)
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    return shift, inverse, tl.load(delta_ptr + at, inside, other=0.0)


@triton.jit
def _rows(ptr, row, size, stride, dim, DIM: tl.constexpr):
    """[rows, dim] of a matrix with contiguous rows; 0 beyond its edges."""
    at = row.to(tl.int64)[:, None] * stride + dim[None, :]
    return tl.load(ptr + at, (row < size)[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, mask_ptr, padding_ptr, shift_ptr, total_ptr, delta_ptr, dq_ptr,
    heads, group, queries, keys,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, dout_batch_stride, dout_head_stride, dout_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, padding_batch_stride, padding_stride,
    sm_scale, softcap, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    batch_head = (program // blocks).to(tl.int64)
    head = batch_head % heads
    batch = batch_head // heads
    k_ptr += batch * k_batch_stride + head // group * k_head_stride
    v_ptr += batch * v_batch_stride + head // group * v_head_stride
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch_stride
    row = start_m + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED)
    dim_v = tl.arange(0, PADDED_V)
    q = _rows(q_ptr + batch * q_batch_stride + head * q_head_stride, row, queries, q_stride, dim, DIM)
    dout = _rows(
        dout_ptr + batch * dout_batch_stride + head * dout_head_stride, row, queries, dout_stride, dim_v, DIM_V
    )
    shift, inverse, delta = _row_sums(shift_ptr, total_ptr, delta_ptr, batch_head * queries + row, row < queries)

    low = start_m * 0
    high = low + keys
    if HAS_LEFT:
        low = tl.maximum(start_m + (keys - queries) - left, 0) // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        last = tl.minimum(start_m + BLOCK_M, queries) - 1 + (keys - queries)
        high = tl.minimum(tl.maximum(last + right + 1, 0), keys)
    dq = tl.zeros((BLOCK_M, PADDED), tl.float32)
    for start_n in range(low, high, BLOCK_N):
        column = start_n + tl.arange(0, BLOCK_N)
        k = _rows(k_ptr, column, keys, k_stride, dim, DIM)
        v = _rows(v_ptr, column, keys, v_stride, dim_v, DIM_V)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        p, slope = _weights(
            s, row[:, None], column[None, :], shift[:, None], inverse[:, None], mask_ptr, padding_ptr, queries, keys,
            mask_row_stride, mask_column_stride, padding_stride, sm_scale, softcap, left, right,
            HAS_LEFT, HAS_RIGHT, SOFTCAP, ADDITIVE,
        )  # fmt: skip
        dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        ds = p * (dp - delta[:, None]) * slope
        dq = dot(narrow(ds, k.dtype), k, dq)
    at = (batch_head * queries + row)[:, None] * DIM + dim[None, :]
    inside = (row < queries)[:, None] & (dim < DIM)[None, :]
    tl.store(dq_ptr + at, narrow(dq * sm_scale, dq_ptr.dtype.element_ty), inside)


@triton.jit
def dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, mask_ptr, padding_ptr, shift_ptr, total_ptr, delta_ptr, dk_ptr, dv_ptr,
    heads, group, queries, keys,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, dout_batch_stride, dout_head_stride, dout_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, padding_batch_stride, padding_stride,
    sm_scale, softcap, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % blocks * BLOCK_N
    kv_heads = heads // group
    batch_head = (program // blocks).to(tl.int64)
    kv_head = batch_head % kv_heads
    batch = batch_head // kv_heads
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch_stride
    column = start_n + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, PADDED)
    dim_v = tl.arange(0, PADDED_V)
    k = _rows(k_ptr + batch * k_batch_stride + kv_head * k_head_stride, column, keys, k_stride, dim, DIM)
    v = _rows(v_ptr + batch * v_batch_stride + kv_head * v_head_stride, column, keys, v_stride, dim_v, DIM_V)

    low = start_n * 0
    high = low + queries
    if HAS_RIGHT:
        low = tl.maximum(start_n - right - (keys - queries), 0) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        last = tl.minimum(start_n + BLOCK_N, keys) - 1
        high = tl.minimum(tl.maximum(last + left - (keys - queries) + 1, 0), queries)
    dk = tl.zeros((BLOCK_N, PADDED), tl.float32)
    dv = tl.zeros((BLOCK_N, PADDED_V), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        q_head = q_ptr + batch * q_batch_stride + head * q_head_stride
        dout_head = dout_ptr + batch * dout_batch_stride + head * dout_head_stride
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head = mask_ptr + batch * mask_batch_stride + head * mask_head_stride
        first = (batch * heads + head) * queries
        for start_m in range(low, high, BLOCK_M):
            row = start_m + tl.arange(0, BLOCK_M)
            q = _rows(q_head, row, queries, q_stride, dim, DIM)
            dout = _rows(dout_head, row, queries, dout_stride, dim_v, DIM_V)
            shift, inverse, delta = _row_sums(shift_ptr, total_ptr, delta_ptr, first + row, row < queries)
            s = dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
            p, slope = _weights(
                s, row[None, :], column[:, None], shift[None, :], inverse[None, :], mask_head, padding_ptr,
                queries, keys, mask_row_stride, mask_column_stride, padding_stride, sm_scale, softcap, left, right,
                HAS_LEFT, HAS_RIGHT, SOFTCAP, ADDITIVE,
            )  # fmt: skip
            dv = dot(narrow(p, dout.dtype), dout, dv)
            dp = dot(v, tl.trans(dout), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
            ds = p * (dp - delta[None, :]) * slope
            dk = dot(narrow(ds, q.dtype), q, dk)
    at = (batch_head * keys + column)[:, None]
    inside = (column < keys)[:, None]
    dk_type: tl.constexpr = dk_ptr.dtype.element_ty
    tl.store(dk_ptr + at * DIM + dim[None, :], narrow(dk * sm_scale, dk_type), inside & (dim < DIM)[None, :])
    tl.store(dv_ptr + at * DIM_V + dim_v[None, :], narrow(dv, dk_type), inside & (dim_v < DIM_V)[None, :])


@triton.jit
def dmask_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, mask_ptr, padding_ptr, shift_ptr, total_ptr, delta_ptr,
    dmask_ptr,  # contiguous, of the mask's own shape
    batches, heads, group, queries, keys,
    mask_batches, mask_heads, mask_rows, mask_columns,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, dout_batch_stride, dout_head_stride, dout_stride,
    mask_batch_stride, mask_head_stride, mask_row_stride, mask_column_stride, padding_batch_stride, padding_stride,
    sm_scale, softcap, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ADDITIVE: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    ONE_ROW: tl.constexpr,  # the mask is broadcast over queries
    ONE_COLUMN: tl.constexpr,  # over keys
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row_blocks = 1 if ONE_ROW else tl.cdiv(mask_rows, BLOCK_M)
    column_blocks = 1 if ONE_COLUMN else tl.cdiv(mask_columns, BLOCK_N)
    column_block = program % column_blocks
    row_block = program // column_blocks % row_blocks
    mask_matrix = (program // column_blocks // row_blocks).to(tl.int64)
    mask_head = mask_matrix % mask_heads
    mask_batch = mask_matrix // mask_heads
    # What this tile of the mask was broadcast over: from these, in these steps.
    row_end = queries if ONE_ROW else tl.minimum((row_block + 1) * BLOCK_M, queries)
    column_end = keys if ONE_COLUMN else tl.minimum((column_block + 1) * BLOCK_N, keys)
    dim = tl.arange(0, PADDED)
    dim_v = tl.arange(0, PADDED_V)
    dmask = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch in range(mask_batch, batches, mask_batches):
        for head in range(mask_head, heads, mask_heads):
            q_head = q_ptr + batch * q_batch_stride + head * q_head_stride
            k_head = k_ptr + batch * k_batch_stride + head // group * k_head_stride
            v_head = v_ptr + batch * v_batch_stride + head // group * v_head_stride
            dout_head = dout_ptr + batch * dout_batch_stride + head * dout_head_stride
            mask_at = mask_ptr + batch * mask_batch_stride + head * mask_head_stride
            padding_at = padding_ptr
            if padding_ptr is not None:
                padding_at = padding_ptr + batch * padding_batch_stride
            first = (batch * heads + head) * queries
            for start_m in range(row_block * BLOCK_M, row_end, BLOCK_M):
                row = start_m + tl.arange(0, BLOCK_M)
                q = _rows(q_head, row, queries, q_stride, dim, DIM)
                dout = _rows(dout_head, row, queries, dout_stride, dim_v, DIM_V)
                shift, inverse, delta = _row_sums(shift_ptr, total_ptr, delta_ptr, first + row, row < queries)
                for start_n in range(column_block * BLOCK_N, column_end, BLOCK_N):
                    column = start_n + tl.arange(0, BLOCK_N)
                    k = _rows(k_head, column, keys, k_stride, dim, DIM)
                    v = _rows(v_head, column, keys, v_stride, dim_v, DIM_V)
                    s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                    p, slope = _weights(
                        s, row[:, None], column[None, :], shift[:, None], inverse[:, None], mask_at, padding_at,
                        queries, keys, mask_row_stride, mask_column_stride, padding_stride,
                        sm_scale, softcap, left, right, HAS_LEFT, HAS_RIGHT, SOFTCAP, ADDITIVE,
                    )  # fmt: skip
                    dp = dot(dout, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                    dmask += p * (dp - delta[:, None])
    row = row_block * BLOCK_M + tl.arange(0, 1 if ONE_ROW else BLOCK_M)
    column = column_block * BLOCK_N + tl.arange(0, 1 if ONE_COLUMN else BLOCK_N)
    if ONE_ROW:
        dmask = tl.sum(dmask, axis=0, keep_dims=True)
    if ONE_COLUMN:
        dmask = tl.sum(dmask, axis=1, keep_dims=True)
    at = (mask_matrix * mask_rows + row)[:, None] * mask_columns + column[None, :]
    inside = (row < mask_rows)[:, None] & (column < mask_columns)[None, :]
    tl.store(dmask_ptr + at, narrow(dmask, dmask_ptr.dtype.element_ty), inside)
