"""out[M, N] = epilogue(a[M, K] · w[N, K]ᵀ) with w int8; a is int8 (s32 sums, exact) or floating (weight-only, fp32).

tiles     a program computes BLOCK_M × BLOCK_N, in steps of BLOCK_K through shared memory, num_stages of them in flight
order     GROUP row blocks share their columns of w in the L2 cache
edges     rows beyond M and N read the last row again and are masked when stored; K is masked in every step
epilogue  activation(acc · a_scale[m] · w_scale[n] + bias[n]) + residual[m, n], in fp32, rounded once
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import activate, dot, narrow, widen


@triton.jit
def int8_matmul_kernel(
    a_ptr,
    w_ptr,
    a_scale_ptr,  # fp32 [M], or None
    w_scale_ptr,  # fp32 [N], or None
    bias_ptr,  # [N], or None
    residual_ptr,  # [M, N], or None
    out_ptr,  # [M, N]; int32: the bare sums
    m,
    n,
    k,
    a_stride,
    w_stride,
    w_k_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(m, BLOCK_M)
    in_group = GROUP * tl.cdiv(n, BLOCK_N)
    first = program // in_group * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    row_block = first + program % in_group % group
    column_block = program % in_group // group

    row = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.minimum(row, m - 1)[:, None] * a_stride + step[None, :]
    w_ptrs = w_ptr + tl.minimum(column, n - 1)[None, :] * w_stride + step[:, None].to(tl.int64) * w_k_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if a_ptr.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = step < k - start
        a = tl.load(a_ptrs, inside[None, :], other=0)
        w = tl.load(w_ptrs, inside[:, None], other=0)
        acc = dot(a, widen(w, a.dtype), acc)
        a_ptrs += BLOCK_K
        w_ptrs += tl.full((), BLOCK_K, tl.int64) * w_k_stride

    at = row[:, None] * n + column[None, :]
    mask = (row < m)[:, None] & (column < n)[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + at, acc, mask)
    else:
        y = acc.to(tl.float32)
        if a_scale_ptr is not None:
            y = y * tl.load(a_scale_ptr + row, row < m, other=0.0)[:, None]
        if w_scale_ptr is not None:
            y = y * tl.load(w_scale_ptr + column, column < n, other=0.0)[None, :]
        if bias_ptr is not None:
            y = y + tl.load(bias_ptr + column, column < n, other=0.0).to(tl.float32)[None, :]
        y = activate(y, ACTIVATION)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask, other=0.0)
            y = y + residual.to(tl.float32)
        tl.store(out_ptr + at, narrow(y, out_ptr.dtype.element_ty), mask)
