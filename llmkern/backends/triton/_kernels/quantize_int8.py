"""quantize_int8: int8 codes and one scale per row.

A program takes ROWS rows.  Rows of at most BLOCK columns stay in registers between the maximum and the codes; longer
ones are read twice, the second time from the cache.
"""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import codes, row_amax, row_scale


@triton.jit
def _load(x_ptr, row, col, mask, stride):
    return tl.load(x_ptr + row[:, None] * stride + col[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def quantize_int8_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    hidden,
    stride,
    WHOLE: tl.constexpr,  # hidden <= BLOCK
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = (row < rows)[:, None]
    col = tl.arange(0, BLOCK)
    if WHOLE:
        mask = valid & (col < hidden)[None, :]
        x = _load(x_ptr, row, col, mask, stride)
        scale, inv = row_scale(row_amax(x))
        tl.store(q_ptr + row[:, None] * hidden + col[None, :], codes(x, inv[:, None]), mask)
    else:
        # Magnitudes as integers, which order NaN above infinity; see row_amax.
        bits = tl.zeros((ROWS,), tl.int32)
        for start in range(0, hidden, BLOCK):
            mask = valid & (start + col < hidden)[None, :]
            amax = row_amax(_load(x_ptr, row, start + col, mask, stride))
            bits = tl.maximum(bits, amax.to(tl.int32, bitcast=True))
        scale, inv = row_scale(bits.to(tl.float32, bitcast=True))
        for start in range(0, hidden, BLOCK):
            mask = valid & (start + col < hidden)[None, :]
            x = _load(x_ptr, row, start + col, mask, stride)
            tl.store(q_ptr + row[:, None] * hidden + (start + col)[None, :], codes(x, inv[:, None]), mask)
    tl.store(scale_ptr + row, scale, row < rows)
