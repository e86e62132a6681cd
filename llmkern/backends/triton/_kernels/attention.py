"""Attention forward, after FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax online, scores never in memory.

tiles    a program takes BLOCK_M queries of one head, and walks the keys in steps of BLOCK_N, num_stages in flight
bands    query i stands at key i + keys − queries; it sees `left` keys back and `right` on.  Blocks of keys that no
         query of the tile sees are not visited; only those at the band's edges are compared with it
masks    bool or additive through their strides (0 where broadcast), padding [B, keys]; read for every visited block
numbers  scores, maxima and sums in fp32.  Exponentials in base 2, but in fp32, where one more rounding of the scores
         shows, and beside an additive mask, whose −3e38 would overflow when scaled
rows     that see nothing have maximum −inf and sum 0: out 0, lse −inf
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import LN2, LOG2E, dot, narrow, tanh


@triton.jit
def visible(row, column, queries, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Return the mask of pairs (row, column), broadcast against each other, that the band and the ends allow."""
    position = row + (keys - queries)
    allowed = (row < queries) & (column < keys)
    if HAS_RIGHT:
        allowed = allowed & (column <= position + right)
    if HAS_LEFT:
        allowed = allowed & (column >= position - left)
    return allowed


@triton.jit
def masked(
    s,
    allowed,
    row,
    column,
    mask_ptr,  # of this batch and head, or None
    padding_ptr,  # of this batch, or None
    queries,
    keys,
    mask_row_stride,
    mask_column_stride,
    padding_stride,
    ADDITIVE: tl.constexpr,
):
    """Scores `s` with −inf where something hides the key, and the additive mask added."""
    inside = (row < queries) & (column < keys)
    if mask_ptr is not None:
        at = row.to(tl.int64) * mask_row_stride + column.to(tl.int64) * mask_column_stride
        mask = tl.load(mask_ptr + at, inside, other=0)
        if ADDITIVE:
            s = s + mask.to(tl.float32)
        else:
            allowed = allowed & (mask != 0)
    if padding_ptr is not None:
        real = tl.load(padding_ptr + column.to(tl.int64) * padding_stride, column < keys, other=0)
        allowed = allowed & (real != 0)
    return tl.where(allowed, s, -float("inf"))


@triton.jit
def capped(s, softcap, SOFTCAP: tl.constexpr):
    """softcap · tanh(s / softcap), or s."""
    if SOFTCAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def exponential(x, BASE2: tl.constexpr):
    if BASE2:
        return tl.exp2(x)
    else:
        return tl.exp(x)


@triton.jit
def finite(m):
    """Row maxima to subtract: 0 for rows that see nothing, whose scores stay −inf."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def with_sink(acc, m, l, sink, BASE2: tl.constexpr):
    """One more logit (in the base's unit) in the sum, without a value."""
    top = tl.maximum(m, sink)
    scale = exponential(finite(m) - top, BASE2)
    scale = tl.where(m == -float("inf"), 0.0, scale)
    return acc * scale[:, None], top, l * scale + exponential(sink - top, BASE2)


@triton.jit
def log_sum(m, l, BASE2: tl.constexpr):
    """The natural logarithm of Σ exp(scores), −inf for rows that see nothing."""
    total = tl.where(l == 0.0, 1.0, l)
    lse = (m + tl.log2(total)) * LN2 if BASE2 else m + tl.log(total)
    return tl.where(l == 0.0, -float("inf"), lse)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,  # uint8 or floating, or None
    padding_ptr,  # uint8, or None
    sinks_ptr,  # or None
    out_ptr,  # STATS: the row maxima, fp32 [B, Hq, Sq]
    lse_ptr,  # fp32 [B, Hq, Sq], or None; STATS: the sums of exponentials
    heads,
    group,
    queries,
    keys,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    out_batch_stride,
    out_head_stride,
    out_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    mask_column_stride,
    padding_batch_stride,
    padding_stride,
    sm_scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADDITIVE: tl.constexpr,
    STATS: tl.constexpr,  # only maxima and sums, for a backward whose forward kept none
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    PADDED: tl.constexpr,  # powers of two, at least 16
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    BASE2: tl.constexpr = not ADDITIVE and not STATS and q_ptr.dtype.element_ty != tl.float32
    UNIT: tl.constexpr = LOG2E if BASE2 else 1.0
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    # The last queries see the most keys under causality: they begin.
    start_m = (blocks - 1 - program % blocks) * BLOCK_M
    batch_head = program // blocks
    head = (batch_head % heads).to(tl.int64)
    batch = (batch_head // heads).to(tl.int64)
    row = start_m + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, PADDED)
    dim_v = tl.arange(0, PADDED_V)
    k_ptr += batch * k_batch_stride + head // group * k_head_stride
    v_ptr += batch * v_batch_stride + head // group * v_head_stride
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch_stride

    at = batch * q_batch_stride + head * q_head_stride + row.to(tl.int64)[:, None] * q_stride + dim[None, :]
    q = tl.load(q_ptr + at, (row < queries)[:, None] & (dim < DIM)[None, :], other=0.0)

    # Keys [low, high) that some query of the tile sees; whole blocks in [inner, outer) are seen by all of them.
    first = start_m + (keys - queries)
    last = tl.minimum(start_m + BLOCK_M, queries) - 1 + (keys - queries)
    low = start_m * 0
    inner = low
    high = low + keys
    outer = high
    if HAS_LEFT:
        low = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        inner = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        high = tl.minimum(tl.maximum(last + right + 1, 0), keys)
        outer = tl.minimum(tl.maximum(first + right + 1, 0), keys)
    inner = tl.minimum(inner, tl.cdiv(high, BLOCK_N) * BLOCK_N)
    outer = tl.maximum(outer // BLOCK_N * BLOCK_N, inner)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PADDED_V), tl.float32)
    for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
        # phases: the band's left edge, blocks that all see, the right edge
        begin = low if phase == 0 else (inner if phase == 1 else outer)
        end = inner if phase == 0 else (outer if phase == 1 else high)
        for start_n in range(begin, end, BLOCK_N):
            column = start_n + tl.arange(0, BLOCK_N)
            at_k = column.to(tl.int64)[None, :] * k_stride + dim[:, None]
            at_v = column.to(tl.int64)[:, None] * v_stride + dim_v[None, :]
            if phase != 1:
                k = tl.load(k_ptr + at_k, (column < keys)[None, :] & (dim < DIM)[:, None], other=0.0)
            else:
                k = tl.load(k_ptr + at_k, (dim < DIM)[:, None], other=0.0)
            s = dot(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            if SOFTCAP:
                s = capped(s * sm_scale, softcap, SOFTCAP) * UNIT
            else:
                s = s * (sm_scale * UNIT)
            if phase != 1 or mask_ptr is not None or padding_ptr is not None:
                allowed = (row < queries)[:, None] & (column < keys)[None, :]
                if phase != 1:
                    allowed = visible(
                        row[:, None], column[None, :], queries, keys, left, right, HAS_LEFT, HAS_RIGHT
                    )  # fmt: skip
                s = masked(
                    s, allowed, row[:, None], column[None, :], mask_ptr, padding_ptr, queries, keys,
                    mask_row_stride, mask_column_stride, padding_stride, ADDITIVE,
                )  # fmt: skip
            top = tl.maximum(m, tl.max(s, axis=1))
            shift = finite(top)
            p = exponential(s - shift[:, None], BASE2)
            scale = exponential(m - shift, BASE2)
            l = l * scale + tl.sum(p, axis=1)
            if not STATS:
                if phase != 1:
                    v = tl.load(v_ptr + at_v, (column < keys)[:, None] & (dim_v < DIM_V)[None, :], other=0.0)
                else:
                    v = tl.load(v_ptr + at_v, (dim_v < DIM_V)[None, :], other=0.0)
                acc = dot(narrow(p, v.dtype), v, acc * scale[:, None])
            m = top

    if sinks_ptr is not None:
        acc, m, l = with_sink(acc, m, l, tl.load(sinks_ptr + head).to(tl.float32) * UNIT, BASE2)
    at_row = batch_head.to(tl.int64) * queries + row
    if STATS:
        tl.store(out_ptr + at_row, m, row < queries)
        tl.store(lse_ptr + at_row, l, row < queries)
    else:
        if lse_ptr is not None:
            tl.store(lse_ptr + at_row, log_sum(m, l, BASE2), row < queries)
        acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
        at = batch * out_batch_stride + head * out_head_stride + row.to(tl.int64)[:, None] * out_stride
        inside = (row < queries)[:, None] & (dim_v < DIM_V)[None, :]
        tl.store(out_ptr + at + dim_v[None, :], narrow(acc, out_ptr.dtype.element_ty), inside)
