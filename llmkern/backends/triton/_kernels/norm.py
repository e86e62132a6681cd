"""Normalisations: one kernel for layer_norm and rms_norm, with or without residual and quantization; one backward.

forward   a program takes ROWS rows of BLOCK >= hidden columns, all in registers: memory is read and written once
backward  a program takes every P-th block of ROWS rows, and sums dweight and dbias of its rows in registers;
          `sum_partials_kernel` adds the P partial sums, in the same order every time
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import codes, narrow, row_amax, row_scale


@triton.jit
def _standardize(x, mask, hidden, eps, LAYER: tl.constexpr):
    """(n, rstd): the normalised rows [rows, cols] before weight and bias, 0 beyond `hidden`."""
    if LAYER:
        # The variance from the centred values, so that a large mean costs no digits.
        mean = tl.sum(x, axis=1) / hidden
        x = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(x * x, axis=1) / hidden
    rstd = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    return x * rstd[:, None], rstd


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,  # or None
    bias_ptr,  # or None
    out_ptr,  # x's dtype; int8 with QUANT
    total_ptr,  # x + residual, where there is one
    scale_ptr,  # fp32, with QUANT
    rows,
    hidden,
    x_stride,
    residual_stride,
    eps,
    weight_offset,
    LAYER: tl.constexpr,
    QUANT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < hidden)[None, :]
    at = row[:, None] * hidden + col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + col[None, :], mask, other=0.0)
        # Rounded to the dtype, and normalised after that: what a model computes that adds first.
        x = narrow(x.to(tl.float32) + residual.to(tl.float32), x.dtype)
        tl.store(total_ptr + at, x, mask)
    y, _ = _standardize(x.to(tl.float32), mask, hidden, eps, LAYER)
    if weight_ptr is not None:
        y = y * (tl.load(weight_ptr + col, col < hidden, other=0.0).to(tl.float32) + weight_offset)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + col, col < hidden, other=0.0).to(tl.float32)[None, :]
    if QUANT:
        scale, inv = row_scale(row_amax(tl.where(mask, y, 0.0)))
        tl.store(out_ptr + at, codes(y, inv[:, None]), mask)
        tl.store(scale_ptr + row, scale, row < rows)
    else:
        tl.store(out_ptr + at, narrow(y, x.dtype), mask)


@triton.jit
def norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,  # or None
    dx_ptr,
    dweight_ptr,  # fp32 [programs, hidden], or None
    dbias_ptr,  # fp32 [programs, hidden], or None
    rows,
    hidden,
    dy_stride,
    x_stride,
    eps,
    weight_offset,
    LAYER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    valid = (col < hidden)[None, :]
    weight = tl.full((1, BLOCK), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + col[None, :], valid, other=0.0).to(tl.float32) + weight_offset
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & valid
        x = tl.load(x_ptr + row * x_stride + col[None, :], mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + col[None, :], mask, other=0.0).to(tl.float32)
        normed, rstd = _standardize(x, mask, hidden, eps, LAYER)
        # dx = rstd·(g − mean(g) − n·mean(g·n)); an rms_norm subtracts no mean
        g = dy * weight
        dx = g - normed * (tl.sum(g * normed, axis=1) / hidden)[:, None]
        if LAYER:
            dx = dx - (tl.sum(g, axis=1) / hidden)[:, None]
        tl.store(dx_ptr + row * hidden + col[None, :], narrow(dx * rstd[:, None], dx_ptr.dtype.element_ty), mask)
        dweight += dy * normed
        dbias += dy
    at = program.to(tl.int64) * hidden + col
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), col < hidden)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), col < hidden)


@triton.jit
def sum_partials_kernel(partial_ptr, out_ptr, programs, hidden, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[hidden] = Σ over programs of partial[programs, hidden], fp32; rounded once."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & (col < hidden)[None, :]
        total += tl.load(partial_ptr + row[:, None].to(tl.int64) * hidden + col[None, :], mask, other=0.0)
    tl.store(out_ptr + col, narrow(tl.sum(total, axis=0), out_ptr.dtype.element_ty), col < hidden)
