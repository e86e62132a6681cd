"""x·Φ(x) and its gradient, exact or by tanh, in fp32 and rounded once."""

import triton
import triton.language as tl

from llmkern.backends.triton._kernels.common import gelu_phi, narrow
from llmkern.backends.triton._kernels.elementwise import place


@triton.jit
def gelu_kernel(x_ptr, out_ptr, hidden, x_stride, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask = place(hidden, BLOCK)
    x = tl.load(x_ptr + row * x_stride + col, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * hidden + col, narrow(x * gelu_phi(x, APPROXIMATE), out_ptr.dtype.element_ty), mask)


@triton.jit
def gelu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, hidden, dy_stride, x_stride, APPROXIMATE: tl.constexpr, BLOCK: tl.constexpr
):
    row, col, mask = place(hidden, BLOCK)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + col, mask, other=0.0).to(tl.float32)
    phi = gelu_phi(x, APPROXIMATE)
    if APPROXIMATE == "none":
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327  # 1/√(2π)
    else:
        # Φ = sigmoid(2u) with u = √(2/π)·(x + 0.044715·x³), so Φ' = 2·Φ·(1 − Φ)·u'
        density = 2.0 * phi * (1.0 - phi) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    dx = dy * (phi + x * density)
    tl.store(dx_ptr + row * hidden + col, narrow(dx, dx_ptr.dtype.element_ty), mask)
