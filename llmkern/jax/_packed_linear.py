"""quantized_linear with activations in floating point: weights in the layout of llmkern/packed.py.

computes  out = act(x·wᵀ + bias) + residual, with w = scale·(level − zero) + offset rounded to x's dtype
blocks    codes: panels × blocks of 32 columns × bytes, as stored; scale, zero, offset: rows × blocks of 32, one fp32
          value per block, expanded before; x: 32 × M × blocks of 32, the first columns of all blocks together, then
          the second ones …; out, residual: M × rows; bias: 1 × rows
VMEM      two of each, the codes in s32, turned so that their last dimension is the blocks, the sums M × rows in fp32
grid      blocks of M × blocks of panels, and for each the blocks of K one after the other
unpacking Byte j of a panel's block holds row j/4 % 16 and column 4·(j/64) + j%4, and in four bits the one 16 further:
          every fourth of the turned bytes is one column of every block, rows × blocks like the scales.  Such a
          matrix is multiplied with its columns of x
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
from llmkern.jax._linear import ACTIVATIONS
from llmkern.jax._plans import packed_plan
from llmkern.packed import BLOCK, CODES, PANEL, Code

SERVED = ("s8", "s4", "u4")
"""Codes whose levels are computed; others look them up, or keep further bits elsewhere."""
LINE = 4 * PANEL
"""Bytes of four columns."""


def packed_kernel(
    *,
    x: Any,
    codes: Any,
    scale: Any,
    out: Any,
    acc: Any,
    turned: Any,
    zero: Any = None,
    offset: Any = None,
    bias: Any = None,
    residual: Any = None,
    code: Code,
    blocks: int,
    activation: str,
) -> None:
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    turned[...] = jnp.swapaxes(codes[...].astype(jnp.int32), 1, 2)

    def within(block: Array) -> Array:
        """Return [rows, blocks] with zeros for the garbage past the last block."""
        if blocks % block.shape[1] == 0:
            return block
        place = step * block.shape[1] + jax.lax.broadcasted_iota(jnp.int32, block.shape, 1)
        return jnp.where(place < blocks, block.astype(jnp.float32), 0.0).astype(block.dtype)

    def column(i: Array, _: Any) -> None:
        """Accumulate the products with column i of every block, and with the one whose codes are the upper halves."""
        stored = turned[:, pl.ds(i // 4 * LINE + i % 4, PANEL, stride=4), :].reshape(scale.shape)
        for half in range(8 // code.bits):
            level = stored >> 4 * half & 15 if code.bits == 4 else stored
            w = (level - code.shift).astype(jnp.float32)
            if zero is not None:
                w = w - zero[...]
            w = w * scale[...]
            if offset is not None:
                w = w + offset[...]
            part = x[i + BLOCK // 2 * half]
            acc[...] += dot(within(part), within(w).astype(part.dtype), (1, 1))

    jax.lax.fori_loop(0, codes.shape[2] // PANEL, column, None)

    @pl.when(step == steps - 1)
    def _() -> None:
        y = acc[...]
        if bias is not None:
            y = y + bias[...].astype(jnp.float32)
        y = activate(y, activation)
        if residual is not None:
            y = y + residual[...].astype(jnp.float32)
        out[...] = y.astype(out.dtype)


def _per_block(values: Array, blocks: int) -> Array:
    """Expand [panels, groups, 16] to fp32 [16 · panels, blocks]."""
    groups = values.shape[1]
    rows = values.astype(jnp.float32).transpose(0, 2, 1).reshape(-1, groups)
    return jnp.repeat(rows, blocks // groups, axis=1)


@planned
def _packed(
    x: Array,
    codes: Array,
    levels: dict[str, tuple[Array, ...]],
    bias: Array | None,
    residual: Array | None,
    *,
    code: str,
    n: int,
    activation: str,
    chip: Chip,
    interpreted: bool,
) -> Array:
    """levels: scale, zero and offset [panels, groups, 16], each as the factors that it is the product of."""
    outer, (panels, blocks, size) = x.shape[:-1], codes.shape
    m = functools.reduce(lambda a, b: a * b, outer, 1)
    if m * n == 0:
        return jnp.zeros((*outer, n), x.dtype)
    if blocks == 0:  # an empty sum, as one of products with zeros
        x, codes, blocks = jnp.zeros((*outer, BLOCK), x.dtype), jnp.zeros((panels, 1, size), jnp.uint8), 1
        levels = {"scale": (jnp.zeros((panels, 1, PANEL)),)}
    width = panels * PANEL
    arrays = {
        "x": x.reshape(m, blocks, BLOCK).transpose(2, 0, 1),
        "codes": jax.lax.bitcast_convert_type(codes, jnp.int8),
    }
    for name, factors in levels.items():
        arrays[name] = functools.reduce(jnp.multiply, [_per_block(factor, blocks) for factor in factors])
    for name, array in (("bias", bias), ("residual", residual)):
        if array is not None:
            arrays[name] = jnp.pad(array.reshape(-1, n), ((0, 0), (0, width - n)))
    kinds = {name: str(array.dtype) for name, array in arrays.items()}
    plan = packed_plan(chip, m, (panels, blocks, size), kinds)
    kernel = functools.partial(packed_kernel, code=CODES[code], blocks=blocks, activation=activation)
    (out,) = launch(kernel, plan, arrays, interpreted)
    return out[:, :n].reshape(*outer, n)


def quantized_linear(
    x: Array,
    codes: Array,
    scale: Array,
    zero: Array | None = None,
    offset: Array | None = None,
    super_scale: Array | None = None,
    super_offset: Array | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    *,
    code: str,
    n: int,
    activation: str = "none",
    scheme: str = "a16",
) -> Array:
    """`llmkern.ops.quantized_linear`, weight-only: scheme "a16", and code "s4", "u4" or "s8"."""
    op = "quantized_linear"
    check_array(op, x=x, bias=bias, residual=residual)
    check_choice(op, "activation", activation, ACTIVATIONS)
    if scheme != "a16":
        raise ValueError(f"{op}: scheme is {scheme!r}, expected 'a16': the weights are unpacked to x's dtype")
    if code not in SERVED:
        raise ValueError(f"{op}: code is {code!r}, expected {' or '.join(map(repr, SERVED))}")
    check_array(op, ("uint8",), codes=codes, zero=zero)
    check_array(op, (*FLOATING, "float16"), super_scale=super_scale, super_offset=super_offset)
    stored = (*FLOATING, "float16", "int8", "uint8")
    check_array(op, stored, scale=scale, offset=offset)
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, expected [..., K] with K a multiple of {BLOCK}")
    panels, blocks = -(-n // PANEL), x.shape[-1] // BLOCK
    check_shape(op, "codes", codes, (panels, blocks, CODES[code].block_bytes), f"n, K and code {code!r}")
    for name, values in (
        ("scale", scale),
        ("offset", offset),
        ("super_scale", super_scale),
        ("super_offset", super_offset),
    ):
        if values is not None:
            groups = values.shape[1] if values.ndim == 3 else 1
            whole = groups if groups and blocks % groups == 0 else blocks
            check_shape(op, name, values, (panels, whole, PANEL), "panels, equal groups of blocks, rows")
    check_shape(op, "zero", zero, scale.shape, "the shape of scale")
    check_shape(op, "offset", offset, scale.shape, "the shape of scale")
    check_shape(op, "bias", bias, (n,), "one value per row of the weight")
    check_shape(op, "residual", residual, (*x.shape[:-1], n), "the shape of the result")
    given = {"scale": (scale, super_scale), "zero": (zero,), "offset": (offset, super_offset)}
    levels = {
        name: tuple([factor for factor in factors if factor is not None])
        for name, factors in given.items()
        if factors[0] is not None
    }
    return _packed(x, codes, levels, bias, residual, code=code, n=n, activation=activation)
