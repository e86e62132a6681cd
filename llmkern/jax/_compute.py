"""Computations on blocks that several kernels share, in fp32."""

from __future__ import annotations

import functools
import math
import operator

import jax
from jax import Array
from jax import numpy as jnp

__all__ = ["activate", "codes", "dot"]

ZERO_ROW = 2.0**-118
"""A row whose largest magnitude is below this has scale 0; see llmkern.ops.quantize_int8."""
DEPTH = 128
"""Products in fp32 that are added before the next sum begins: as many as the smallest matrix unit is deep."""
SQRT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715


def activate(z: Array, activation: str) -> Array:
    """Apply the named activation to fp32 values."""
    if activation == "gelu":
        return z * (0.5 * (1 + jax.lax.erf(z * math.sqrt(0.5))))
    if activation == "gelu_tanh":
        return z * (0.5 * (1 + jnp.tanh(SQRT_2_OVER_PI * (z + CUBIC * z * z * z))))
    if activation == "silu":
        return z * jax.nn.sigmoid(z)
    return jnp.maximum(z, 0) if activation == "relu" else z


def codes(y: Array) -> tuple[Array, Array]:
    """Quantize fp32 rows as llmkern.ops.quantize_int8 does: (int8 codes, fp32 scale [rows, 1])."""
    # Detect NaN by a sum: a vector unit's maximum may ignore it.
    nan = jnp.isnan(y)
    amax = jnp.max(jnp.where(nan, 0.0, jnp.abs(y)), axis=-1, keepdims=True)
    amax = jnp.where(jnp.sum(jnp.where(nan, 1.0, 0.0), axis=-1, keepdims=True) > 0, jnp.nan, amax)
    # An array, because XLA turns division by a constant into multiplication by its reciprocal.
    limit = jnp.where(amax == amax, 127.0, amax)
    scale = jnp.where(amax < ZERO_ROW, 0.0, amax / limit)
    usable = (scale > 0) & (scale < jnp.inf)
    q = jnp.clip(jnp.round(y * (limit / amax)), -127, 127)
    return jnp.where(usable, q, 0.0).astype(jnp.int32).astype(jnp.int8), scale


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiply, summing in fp32 (int32 for int8) over dimension contract[0] of `a` and contract[1] of `b`.

    fp32 operands keep all their digits; the MXU by itself would round them to bf16.  Their products are summed in
    parts of `DEPTH`, because what runs the interpreter may add a row's one after the other, with several times the
    rounding error of PyTorch's.
    """
    size = a.shape[contract[0]]
    if a.dtype != jnp.float32 or size <= DEPTH:
        return _product(a, b, contract)
    parts = [(_part(a, contract[0], i), _part(b, contract[1], i)) for i in range(0, size, DEPTH)]
    return functools.reduce(operator.add, [_product(x, y, contract) for x, y in parts])


def _part(x: Array, axis: int, start: int) -> Array:
    return jax.lax.slice_in_dim(x, start, min(start + DEPTH, x.shape[axis]), axis=axis)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if a.dtype == jnp.int8 else jnp.float32,
    )
