"""Attention of packed sequences, after FlashAttention-2 (Dao 2023, arXiv:2307.08691) with pages (arXiv:2309.06180).

tiles    a program takes BLOCK_M rows of one key head: BLOCK_Q queries of a sequence by the query heads of its group,
         row r being query r // group and member r % group; it walks that sequence's keys in steps of BLOCK_N
search   tile i of all sequences' is found by bisection, without lengths on the host: sequence b's begin at
         cu_seqlens_q[b] // BLOCK_Q + b, which leaves each at least as many as it needs; what it does not need ends
         at once
pages    a key's block is looked up in the table, so that pages of any size fit any BLOCK_N
bands    query i stands at key i + keys − queries; blocks of keys that no query of the tile sees are not visited
numbers  scores, maxima and sums in fp32, exponentials in base 2, but in fp32 in base e
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.attention import capped, exponential, finite, log_sum, with_sink
from llmkern.backends.triton._kernels.common import LOG2E, dot, narrow


@triton.jit
def within(n, low, high):
    return tl.minimum(tl.maximum(n, low), high)


@triton.jit
def sequence_of(cu_seqlens_ptr, tile, batch, BLOCK_Q: tl.constexpr):
    """The last sequence whose tiles begin at or before `tile`; −1 for the tiles of rows before the first."""
    low = batch * 0
    high = batch
    while low < high:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def slots_of(column, keys, table_ptr, table_stride, block_size, blocks):
    """(block, slot) of each key in a paged cache; without a table (0, key)."""
    if table_ptr is None:
        block, slot = column * 0, column
    else:  # the compiler reads on behind a return
        entry = tl.load(table_ptr + (column // block_size).to(tl.int64) * table_stride, column < keys, other=0)
        block, slot = within(entry, 0, blocks - 1), column % block_size
    return block.to(tl.int64), slot.to(tl.int64)


@triton.jit
def attention_varlen_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,  # or None: lengths in a cache
    seqused_k_ptr,
    table_ptr,  # or None
    sinks_ptr,  # or None
    out_ptr,  # [rows, Hq, DIM_V], contiguous
    lse_ptr,  # fp32 [Hq, rows], or None
    batch,
    kv_heads,
    group,
    rows,
    capacity,  # keys in all where packed; those that a sequence may have in the cache
    blocks,
    block_size,
    q_stride,
    q_head_stride,
    k_batch_stride,
    k_stride,
    k_head_stride,
    v_batch_stride,
    v_stride,
    v_head_stride,
    table_batch_stride,
    table_stride,
    sm_scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    BASE2: tl.constexpr = q_ptr.dtype.element_ty != tl.float32
    UNIT: tl.constexpr = LOG2E if BASE2 else 1.0
    tile = tl.program_id(0) // kv_heads
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    b = sequence_of(cu_seqlens_q_ptr, tile, batch, BLOCK_Q)
    if b >= 0:
        first_row = within(tl.load(cu_seqlens_q_ptr + b), 0, rows)
        queries = within(tl.load(cu_seqlens_q_ptr + b + 1), first_row, rows) - first_row
        start = (tile - first_row // BLOCK_Q - b) * BLOCK_Q
        if start < queries:
            row = tl.arange(0, BLOCK_M)
            query = start + row // group
            head = kv_head * group + row % group
            real = (row < BLOCK_Q * group) & (query < queries)
            dim = tl.arange(0, PADDED)
            dim_v = tl.arange(0, PADDED_V)
            at = (first_row + query).to(tl.int64)
            q_at = (at * q_stride + head * q_head_stride)[:, None] + dim[None, :]
            q = tl.load(q_ptr + q_at, real[:, None] & (dim < DIM)[None, :], other=0.0)

            if cu_seqlens_k_ptr is not None:
                first_key = within(tl.load(cu_seqlens_k_ptr + b), 0, capacity)
                keys = within(tl.load(cu_seqlens_k_ptr + b + 1), first_key, capacity) - first_key
                k_ptr += first_key.to(tl.int64) * k_stride
                v_ptr += first_key.to(tl.int64) * v_stride
            else:
                keys = within(tl.load(seqused_k_ptr + b), 0, capacity)
                if table_ptr is None:
                    k_ptr += b.to(tl.int64) * k_batch_stride
                    v_ptr += b.to(tl.int64) * v_batch_stride
                else:
                    table_ptr += b.to(tl.int64) * table_batch_stride
            k_ptr += kv_head * k_head_stride
            v_ptr += kv_head * v_head_stride

            position = query + (keys - queries)
            first = start + (keys - queries)
            last = tl.minimum(start + BLOCK_Q, queries) - 1 + (keys - queries)
            low = start * 0
            high = low + keys
            if HAS_LEFT:
                low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
            if HAS_RIGHT:
                high = within(last + right + 1, 0, keys)

            m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
            l = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, PADDED_V), tl.float32)
            for start_n in range(low, high, BLOCK_N):
                column = start_n + tl.arange(0, BLOCK_N)
                inside = column < high
                if HAS_LEFT:
                    inside = inside & (column >= first - left)
                block, slot = slots_of(column, high, table_ptr, table_stride, block_size, blocks)
                k_at = (block * k_batch_stride + slot * k_stride)[None, :] + dim[:, None]
                k = tl.load(k_ptr + k_at, inside[None, :] & (dim < DIM)[:, None], other=0.0)
                s = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                if SOFTCAP:
                    s = capped(s * sm_scale, softcap, SOFTCAP) * UNIT
                else:
                    s = s * (sm_scale * UNIT)
                allowed = inside[None, :] & real[:, None]
                if HAS_LEFT:
                    allowed = allowed & (column[None, :] >= position[:, None] - left)
                if HAS_RIGHT:
                    allowed = allowed & (column[None, :] <= position[:, None] + right)
                s = tl.where(allowed, s, -float("inf"))
                top = tl.maximum(m, tl.max(s, axis=1))
                shift = finite(top)
                p = exponential(s - shift[:, None], BASE2)
                scale = exponential(m - shift, BASE2)
                l = l * scale + tl.sum(p, axis=1)
                v_at = (block * v_batch_stride + slot * v_stride)[:, None] + dim_v[None, :]
                v = tl.load(v_ptr + v_at, inside[:, None] & (dim_v < DIM_V)[None, :], other=0.0)
                acc = dot(narrow(p, v.dtype), v, acc * scale[:, None])
                m = top

            if sinks_ptr is not None:
                sink = tl.load(sinks_ptr + head, real, other=0.0).to(tl.float32) * UNIT
                acc, m, l = with_sink(acc, m, l, sink, BASE2)
            if lse_ptr is not None:
                tl.store(lse_ptr + head * rows + at, log_sum(m, l, BASE2), real)
            acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
            out_at = (at * (kv_heads * group) + head)[:, None] * DIM_V + dim_v[None, :]
            tl.store(out_ptr + out_at, narrow(acc, out_ptr.dtype.element_ty), real[:, None] & (dim_v < DIM_V)[None, :])
