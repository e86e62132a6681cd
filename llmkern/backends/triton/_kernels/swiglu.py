"""silu(gate) · up and its gradients, in fp32 and rounded once."""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import narrow, sigmoid
from llmkern.backends.triton._kernels.elementwise import place


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, hidden, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, col, mask = place(hidden, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden + col, narrow(gate * sigmoid(gate) * up, out_ptr.dtype.element_ty), mask)


@triton.jit
def swiglu_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, hidden, dy_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):
    row, col, mask = place(hidden, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(tl.float32)
    s = sigmoid(gate)
    dgate = dy * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + row * hidden + col, narrow(dgate, dgate_ptr.dtype.element_ty), mask)
    tl.store(dup_ptr + row * hidden + col, narrow(dy * gate * s, dup_ptr.dtype.element_ty), mask)
