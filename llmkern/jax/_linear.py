"""Products with weights: linear, int8_matmul, and int8_linear over it.

computes  out = act((a·wᵀ)·a_scale·w_scale + bias) + residual; a and w int8 and the sums s32, or a floating, w of its
          dtype or int8, and the sums fp32
blocks    a: M × K, w: N × K, out, residual: M × N, scales and bias: a row or a column of them
VMEM      two of each, the sums M × N, the epilogue's M × N in fp32; where a is floating also w in its dtype
grid      blocks of M × blocks of N, and for each the blocks of K one after the other
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from llmkern.jax._checks import FLOATING, check_array, check_choice, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._compute import activate, dot
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import matmul_plan
from llmkern.jax._quantize import quantize_int8

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
SCHEMES = ("auto", "w8a8", "w8a16")
MAX_K = (2**31 - 1) // 2**14
"""Beyond this many products of -128 · -128 an s32 accumulator can overflow."""


def matmul_kernel(
    *,
    a: Any,
    w: Any,
    out: Any,
    acc: Any,
    a_scale: Any = None,
    w_scale: Any = None,
    bias: Any = None,
    residual: Any = None,
    activation: str,
    k: int,
) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    def within(block: Array) -> Array:
        """Return the block with zeros for the garbage past the end of K."""
        if k % block.shape[1] == 0:
            return block
        column = step * block.shape[1] + jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
        wide = block.astype(jnp.int32 if block.dtype == jnp.int8 else jnp.float32)
        return jnp.where(column < k, wide, 0).astype(block.dtype)

    # Codes are finite, whatever they are: zeros in a are enough.
    weights = w[...].astype(a.dtype) if w.dtype == jnp.int8 else within(w[...])
    acc[...] += dot(within(a[...]), weights, (1, 1))

    @pl.when(step == steps - 1)
    def _() -> None:
        if out.dtype == jnp.int32:
            out[...] = acc[...]
            return
        y = acc[...].astype(jnp.float32)
        if a_scale is not None:
            y = y * a_scale[...]
        if w_scale is not None:
            y = y * w_scale[...]
        if bias is not None:
            y = y + bias[...].astype(jnp.float32)
        y = activate(y, activation)
        if residual is not None:
            y = y + residual[...].astype(jnp.float32)
        out[...] = y.astype(out.dtype)


@planned
def _matmul(
    a: Array,
    w: Array,
    a_scale: Array | None,
    w_scale: Array | None,
    bias: Array | None,
    residual: Array | None,
    *,
    activation: str,
    out_dtype: str,
    chip: Chip,
    interpreted: bool,
) -> Array:
    outer, (n, k) = a.shape[:-1], w.shape
    m = functools.reduce(lambda x, y: x * y, outer, 1)
    if m * n == 0:
        return jnp.zeros((*outer, n), out_dtype)
    if k == 0:  # an empty sum, as the sum of one zero
        a, w, k = jnp.zeros((m, 1), a.dtype), jnp.zeros((n, 1), w.dtype), 1
    shapes = {
        "a_scale": (a_scale, (m, 1)),
        "w_scale": (w_scale, (1, n)),
        "bias": (bias, (1, n)),
        "residual": (residual, (m, n)),
    }
    extras = {name: array.reshape(shape) for name, (array, shape) in shapes.items() if array is not None}
    kinds = {name: str(array.dtype) for name, array in extras.items()}
    name = "linear" if a.dtype == w.dtype else "weight_only_matmul"
    name = "int8_matmul" if a.dtype == jnp.int8 else name
    plan = matmul_plan(name, chip, m, n, k, str(a.dtype), str(w.dtype), out_dtype, kinds)
    kernel = functools.partial(matmul_kernel, activation=activation, k=k)
    (out,) = launch(kernel, plan, {"a": a.reshape(m, k), "w": w, **extras}, interpreted)
    return out.reshape(*outer, n)


def linear(x: Array, weight: Array, bias: Array | None = None, *, activation: str = "none") -> Array:
    """`llmkern.ops.linear`."""
    check_array("linear", x=x)
    check_array("linear", (str(x.dtype),), weight=weight, bias=bias)
    _check_weight("linear", "x", x, "weight", weight, bias, activation)
    return _matmul(x, weight, None, None, bias, None, activation=activation, out_dtype=str(x.dtype))


def int8_matmul(
    a_q: Array,
    w_q: Array,
    a_scale: Array | None = None,
    w_scale: Array | None = None,
    *,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str = "none",
    out_dtype: Any = None,
) -> Array:
    """`llmkern.ops.int8_matmul`."""
    op = "int8_matmul"
    check_array(op, ("int8",), a_q=a_q)
    wanted = "float32" if out_dtype is None else str(jnp.dtype(out_dtype))
    if wanted not in (*FLOATING, "int32"):
        raise TypeError(f"{op}: out_dtype is {wanted}, expected float32, bfloat16 or int32")
    _check_codes(op, "a_q", a_q, w_q, w_scale, bias, activation)
    rows = a_q.shape[:-1]
    check_array(op, ("float32",), a_scale=a_scale)
    check_shape(op, "a_scale", a_scale, (*rows, 1), "one scale per row of a_q")
    check_array(op, residual=residual)
    check_shape(op, "residual", residual, (*rows, w_q.shape[0]), "the shape of the result")
    if wanted == "int32":
        for name, value in (("a_scale", a_scale), ("w_scale", w_scale), ("bias", bias), ("residual", residual)):
            if value is not None:
                raise ValueError(f"{op}: {name} is given with out_dtype=int32, which returns the bare accumulators")
        if activation != "none":
            raise ValueError(f"{op}: activation is {activation!r}, expected 'none' with out_dtype=int32")
    return _matmul(a_q, w_q, a_scale, w_scale, bias, residual, activation=activation, out_dtype=wanted)


def int8_linear(
    x: Array,
    w_q: Array,
    w_scale: Array,
    bias: Array | None = None,
    *,
    activation: str = "none",
    scheme: str = "auto",
) -> Array:
    """`llmkern.ops.int8_linear`; "auto" is "w8a8"."""
    op = "int8_linear"
    check_array(op, x=x)
    check_choice(op, "scheme", scheme, SCHEMES)
    if w_scale is None:
        raise TypeError(f"{op}: w_scale is None, expected an array")
    _check_codes(op, "x", x, w_q, w_scale, bias, activation)
    a, a_scale = (x, None) if scheme == "w8a16" else quantize_int8(x)
    return _matmul(a, w_q, a_scale, w_scale, bias, None, activation=activation, out_dtype=str(x.dtype))


def _check_codes(
    op: str, lead: str, a: Array, w_q: Array, w_scale: Array | None, bias: Array | None, activation: str
) -> None:
    check_array(op, ("int8",), w_q=w_q)
    check_array(op, ("float32",), w_scale=w_scale)
    check_array(op, bias=bias)
    _check_weight(op, lead, a, "w_q", w_q, bias, activation)
    n, k = w_q.shape
    if k > MAX_K:
        raise ValueError(f"{op}: K is {k}, at most {MAX_K} is accepted: a longer s32 accumulation can overflow")
    if w_scale is not None:
        check_shape(op, "w_scale", w_scale, (n, 1)[: max(w_scale.ndim, 1)], "one scale per row of w_q")


def _check_weight(op: str, lead: str, a: Array, name: str, w: Array, bias: Array | None, activation: str) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)
    if a.ndim == 0:
        raise ValueError(f"{op}: {lead} has no dimensions, expected [..., K]")
    if w.ndim != 2 or w.shape[1] != a.shape[-1]:
        check_shape(op, name, w, (w.shape[0] if w.ndim else 1, a.shape[-1]), f"[N, the last dimension of {lead}]")
    check_shape(op, "bias", bias, w.shape[:1], f"one value per row of {name}")
