"""quantize_int8 and swiglu_quant: int8 codes and one scale per row, of x or of silu(x)·up.

A program takes ROWS rows.  Rows of at most BLOCK columns stay in registers between the maximum and the codes; longer
ones are read twice, the second time from the cache.
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import codes, row_amax, row_scale, sigmoid


@triton.jit
def _load(x_ptr, up_ptr, row, col, mask, stride, up_stride):
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask, other=0.0).to(tl.float32)
    if up_ptr is not None:
        x = x * sigmoid(x) * tl.load(up_ptr + row[:, None] * up_stride + col[None, :], mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def quantize_int8_kernel(
    x_ptr,
    up_ptr,  # or None
    q_ptr,
    scale_ptr,
    rows,
    hidden,
    stride,
    up_stride,
    WHOLE: tl.constexpr,  # hidden <= BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (row < rows)[:, None]
    col = tl.arange(0, BLOCK)
    if WHOLE:
        mask = valid & (col < hidden)[None, :]
        x = _load(x_ptr, up_ptr, row, col, mask, stride, up_stride)
        scale, inv = row_scale(row_amax(x))
        tl.store(q_ptr + row[:, None] * hidden + col[None, :], codes(x, inv[:, None]), mask)
    else:
        # Magnitudes as integers, which order NaN above infinity; see row_amax.
        bits = tl.zeros((ROWS,), tl.int32)
        for start in range(0, hidden, BLOCK):
            mask = valid & (start + col < hidden)[None, :]
            amax = row_amax(_load(x_ptr, up_ptr, row, start + col, mask, stride, up_stride))
            bits = tl.maximum(bits, amax.to(tl.int32, bitcast=True))
        scale, inv = row_scale(bits.to(tl.float32, bitcast=True))
        for start in range(0, hidden, BLOCK):
            mask = valid & (start + col < hidden)[None, :]
            x = _load(x_ptr, up_ptr, row, start + col, mask, stride, up_stride)
            tl.store(q_ptr + row[:, None] * hidden + (start + col)[None, :], codes(x, inv[:, None]), mask)
    tl.store(scale_ptr + row, scale, row < rows)
