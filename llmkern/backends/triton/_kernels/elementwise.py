"""Indexing of the elementwise kernels: a program takes BLOCK columns of one row; contiguous tensors are one row."""

import triton
import triton.language as tl


@triton.jit
def place(hidden, BLOCK: tl.constexpr):
    """(row, columns, mask) of this program; 64 bits, since a contiguous tensor's one row may be that long."""
    blocks = tl.cdiv(hidden, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    col = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, col, col < hidden
