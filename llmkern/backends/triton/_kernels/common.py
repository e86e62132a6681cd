"""Device functions that kernels share.

All of them run in the interpreter too, whose functions are NumPy's; libdevice is not there, so nothing uses it.
"""

# Not `from __future__ import annotations`: Triton reads constexpr annotations as they stand.

import triton
import triton.language as tl

from llmkern.backends.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ZERO_ROW = tl.constexpr(2.0**-118)
"""See llmkern.ops.quantize_int8."""


@triton.jit
def dot(a, b, acc):
    """acc + a·b in fp32 (s32 for int8); fp32 operands are not rounded to TF32."""
    if INTERPRETED and a.dtype != tl.int8:
        # NumPy has no bfloat16: it would multiply the bits.  And the order of its sums hangs on shapes and strides, a
        # GPU's does not: there q·kᵀ and k·qᵀ, from which a backward takes the same weights, are equal.
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64)
        return (wide + acc.to(tl.float64)).to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def widen(w, DTYPE: tl.constexpr):
    """int8 `w` in DTYPE, which holds it exactly, as an operand of `dot`."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        return w.to(tl.float32)
    return w.to(DTYPE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """fp32 `x` rounded to nearest even in DTYPE.  The interpreter's own conversion to bfloat16 truncates."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def sigmoid(x):
    """1 / (1 + e⁻ˣ); exact to fp32's rounding in both tails."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Cephes' tanhf: near 0, where (1 − e⁻²ˣ) cancels, an odd polynomial."""
    z = x * x
    p = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    near = x + x * z * (p - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def gelu_phi(x, APPROXIMATE: tl.constexpr):
    """Φ(x), and its tanh approximation as ½(1 + tanh u) = sigmoid(2u), which does not cancel in the left tail."""
    if APPROXIMATE == "none":
        return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of int8_matmul, in fp32."""
    if ACTIVATION == "gelu":
        x = x * gelu_phi(x, "none")
    elif ACTIVATION == "gelu_tanh":
        x = x * gelu_phi(x, "tanh")
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "relu":
        x = tl.where(x > 0, x, tl.where(x != x, x, 0.0))
    return x


@triton.jit
def row_amax(x):
    """max|x| of each row [rows, cols]; NaN where the row has one.

    The bits of |x| order as integers, NaNs above infinity, so one integer maximum does both.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(amax):
    """(scale, inv) of quantize_int8 for rows with these largest magnitudes; inv is 0 where all codes are 0."""
    zero = amax < ZERO_ROW
    scale = tl.where(zero, 0.0, tl.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32)))
    inv = tl.div_rn(tl.full(amax.shape, 127.0, tl.float32), tl.where(zero, 1.0, amax))
    usable = (scale > 0.0) & (scale < float("inf"))
    return scale, tl.where(usable, inv, 0.0)


@triton.jit
def codes(x, inv):
    """round_half_even(x · inv) within ±127, as int8; 0 where inv is 0.

    Adding and subtracting 1.5·2²³ rounds.  The clamp stands between the product and the sum, so that no compiler
    contracts them to a fused multiply-add, which would round a product that is not rounded yet.
    """
    y = tl.minimum(tl.maximum(x * inv, -127.0), 127.0)
    y = (y + 12582912.0) - 12582912.0
    return tl.where(inv == 0.0, 0.0, y).to(tl.int8)
