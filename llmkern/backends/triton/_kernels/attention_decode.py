"""Attention of a few queries against a long cache, split over the keys (Flash-Decoding, Dao et al. 2023).

decode   a program takes BLOCK_M of the group · queries rows that share one head of the cache, and one of `splits`
         equal parts of the sequence's own length; it leaves its part of out and the part's log-sum-exp
combine  a program weighs one row's parts by exp(lse − their total's), and adds the sink

The cache is read where it lies: position p of a paged one in block table[p // block_size], clamped to those there
are, whole rows at a time.  Slots past a sequence's end are not read.
int8 caches: (q · codes) · k_scale, and (p · v_scale) · codes.
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.attention import capped, finite, log_sum, with_sink
from llmkern.backends.triton._kernels.common import dot, narrow, widen


@triton.jit
def _slots(table_ptr, column, inside, blocks, block_size, table_stride):
    """(block, slot within it) of each position, 64 bits."""
    block = tl.load(table_ptr + (column // block_size).to(tl.int64) * table_stride, inside, other=0)
    block = tl.minimum(tl.maximum(block, 0), blocks - 1)
    return block.to(tl.int64), (column % block_size).to(tl.int64)


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lens_ptr,
    table_ptr,  # or None: then `blocks` is the batch, and `block_size` the slots of each sequence
    k_scale_ptr,  # or None
    v_scale_ptr,
    part_ptr,  # fp32 [B · Hq · Sq, splits, DIM_V]
    part_lse_ptr,  # fp32 [B · Hq · Sq, splits]
    kv_heads,
    group,
    queries,
    capacity,
    splits,
    blocks,
    block_size,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_block_stride,
    k_head_stride,
    k_stride,
    v_block_stride,
    v_head_stride,
    v_stride,
    k_scale_block_stride,
    k_scale_head_stride,
    k_scale_stride,
    v_scale_block_stride,
    v_scale_head_stride,
    v_scale_stride,
    table_batch_stride,
    table_stride,
    sm_scale,
    softcap,
    left,
    HAS_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(group * queries, BLOCK_M)
    split = program % splits
    row_block = program // splits % row_blocks
    kv_head = (program // splits // row_blocks % kv_heads).to(tl.int64)
    batch = (program // splits // row_blocks // kv_heads).to(tl.int64)
    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < group * queries
    head = kv_head * group + row // queries
    query = row % queries
    dim = tl.arange(0, PADDED)
    dim_v = tl.arange(0, PADDED_V)
    at = batch * q_batch_stride + head * q_head_stride + query * q_stride
    q = tl.load(q_ptr + at[:, None] + dim[None, :], valid[:, None] & (dim < DIM)[None, :], other=0.0)

    length = tl.load(lens_ptr + batch).to(tl.int32)
    position = length - queries + query
    low = length * 0
    if HAS_LEFT:
        low = tl.maximum(length - queries - left, 0)
    high = tl.minimum(length, capacity)
    chunk = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), BLOCK_N) * BLOCK_N
    low = low + split * chunk
    high = tl.minimum(low + chunk, high)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_V), tl.float32)
    for start in range(low, high, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < high
        block = batch
        slot = column.to(tl.int64)
        if table_ptr is not None:
            row_ptr = table_ptr + batch * table_batch_stride
            block, slot = _slots(row_ptr, column, inside, blocks, block_size, table_stride)
        at_k = block * k_block_stride + kv_head * k_head_stride + slot * k_stride
        k = tl.load(k_ptr + at_k[:, None] + dim[None, :], inside[:, None] & (dim < DIM)[None, :], other=0)
        s = dot(q, tl.trans(widen(k, q.dtype)), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if k_scale_ptr is not None:
            at_k = block * k_scale_block_stride + kv_head * k_scale_head_stride + slot * k_scale_stride
            s = s * tl.load(k_scale_ptr + at_k, inside, other=0.0)[None, :]
        s = capped(s * sm_scale, softcap, SOFTCAP)
        allowed = inside[None, :] & (column[None, :] <= position[:, None])
        if HAS_LEFT:
            allowed = allowed & (column[None, :] >= position[:, None] - left)
        s = tl.where(allowed, s, -float("inf"))
        top = tl.maximum(m, tl.max(s, axis=1))
        shift = finite(top)
        p = tl.exp(s - shift[:, None])
        scale = tl.exp(m - shift)
        l = l * scale + tl.sum(p, axis=1)
        m = top
        at_v = block * v_block_stride + kv_head * v_head_stride + slot * v_stride
        v = tl.load(v_ptr + at_v[:, None] + dim_v[None, :], inside[:, None] & (dim_v < DIM_V)[None, :], other=0)
        if v_scale_ptr is not None:
            at_v = block * v_scale_block_stride + kv_head * v_scale_head_stride + slot * v_scale_stride
            p = p * tl.load(v_scale_ptr + at_v, inside, other=0.0)[None, :]
        acc = dot(narrow(p, q.dtype), widen(v, q.dtype), acc * scale[:, None])

    index = ((batch * kv_heads * group + head) * queries + query) * splits + split
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(part_lse_ptr + index, log_sum(m, l, False), valid)
    mask = valid[:, None] & (dim_v < DIM_V)[None, :]
    tl.store(part_ptr + index[:, None] * DIM_V + dim_v[None, :], acc, mask)


@triton.jit
def combine_kernel(
    part_ptr,
    part_lse_ptr,
    sinks_ptr,  # or None
    out_ptr,  # [B, Sq, Hq, DIM_V], contiguous
    lse_ptr,  # fp32 [B, Hq, Sq], or None
    heads,
    queries,
    splits,
    DIM_V: tl.constexpr,
    PADDED_V: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least `splits`
):
    row = tl.program_id(0).to(tl.int64)
    query = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    split = tl.arange(0, SPLITS)
    dim_v = tl.arange(0, PADDED_V)
    at = row * splits + split
    part_lse = tl.load(part_lse_ptr + at, split < splits, other=-float("inf"))[None, :]
    mask = (split < splits)[:, None] & (dim_v < DIM_V)[None, :]
    part = tl.load(part_ptr + at[:, None] * DIM_V + dim_v[None, :], mask, other=0.0)
    m = tl.max(part_lse, axis=1)
    weight = tl.exp(part_lse - finite(m)[:, None])
    l = tl.sum(weight, axis=1)
    acc = tl.sum(tl.trans(weight) * part, axis=0)[None, :]
    if sinks_ptr is not None:
        acc, m, l = with_sink(acc, m, l, tl.load(sinks_ptr + head).to(tl.float32), False)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_row = out_ptr + ((batch * queries + query) * heads + head) * DIM_V
    tl.store(out_row + dim_v[None, :], narrow(acc, out_ptr.dtype.element_ty), (dim_v < DIM_V)[None, :])
    if lse_ptr is not None:
        tl.store(lse_ptr + row + tl.arange(0, 1), log_sum(m, l, False))
