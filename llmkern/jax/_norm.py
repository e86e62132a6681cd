"""Normalisations: one kernel for rms_norm and layer_norm, with or without residual and quantization.

computes  y = (x + residual)·rstd·(weight + offset) + bias, of centred x for layer_norm; and with quant y's codes
blocks    x, residual, out, total: rows × hidden, whole rows, read and written once; weight, bias: 1 × hidden
VMEM      two of each, and two blocks of fp32 in between
grid      blocks of rows, each on its own
"""

from __future__ import annotations

import functools
from typing import Any

from jax import Array, lax
from jax import numpy as jnp

from llmkern.jax._checks import check_array, check_finite, check_non_negative, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._compute import codes
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import rows_plan


def norm_kernel(
    *,
    x: Any,
    out: Any,
    residual: Any = None,
    weight: Any = None,
    bias: Any = None,
    total: Any = None,
    scale: Any = None,
    eps: float,
    weight_offset: float,
    layer: bool,
) -> None:
    y = x[...].astype(jnp.float32)
    if residual is not None:
        # Round the sum to the dtype before the norm, as a model does that adds first.
        total[...] = (y + residual[...].astype(jnp.float32)).astype(total.dtype)
        y = total[...].astype(jnp.float32)
    if layer:
        # Centre before squaring, so that a large mean costs no digits; twice, to correct the mean's own rounding.
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    if weight is not None:
        y = y * (weight[...].astype(jnp.float32) + weight_offset)
    if bias is not None:
        y = y + bias[...].astype(jnp.float32)
    if scale is not None:
        out[...], scale[...] = codes(y)
    else:
        out[...] = y.astype(out.dtype)


@planned
def _norm(
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    *,
    eps: float,
    weight_offset: float,
    layer: bool,
    quant: bool,
    chip: Chip,
    interpreted: bool,
) -> tuple[Array, ...]:
    """Return (norm or codes, scale if quantized, x + residual if there is one)."""
    shape, hidden = x.shape, x.shape[-1]
    kind = str(x.dtype)
    outputs = {"out": "int8" if quant else kind}
    outputs |= {"scale": "float32"} if quant else {}
    outputs |= {"total": kind} if residual is not None else {}
    if x.size == 0:
        return tuple([jnp.zeros((*shape[:-1], 1) if name == "scale" else shape, d) for name, d in outputs.items()])
    full = {name: a.reshape(-1, hidden) for name, a in (("x", x), ("residual", residual)) if a is not None}
    rows = {name: a.reshape(1, hidden) for name, a in (("weight", weight), ("bias", bias)) if a is not None}
    plan = rows_plan(
        "norm",
        chip,
        x.size // hidden,
        hidden,
        {name: str(a.dtype) for name, a in full.items()},
        outputs,
        {name: str(a.dtype) for name, a in rows.items()},
    )
    kernel = functools.partial(norm_kernel, eps=eps, weight_offset=weight_offset, layer=layer)
    found = launch(kernel, plan, full | rows, interpreted)
    return tuple([array.reshape(*shape[:-1], -1) for array in found])


def _checked(
    op: str,
    x: Array,
    residual: Array | None,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    weight_offset: float,
    *,
    layer: bool,
    quant: bool,
) -> tuple[Array, ...]:
    check_array(op, x=x, residual=residual, weight=weight, bias=bias)
    hidden = x.shape[-1:]
    if not hidden:
        raise ValueError(f"{op}: x has no dimensions, expected [..., hidden]")
    check_shape(op, "weight", weight, hidden, "the last dimension of x")
    check_shape(op, "bias", bias, hidden, "the last dimension of x")
    if residual is not None:
        check_shape(op, "residual", residual, x.shape, "the shape of x")
        check_array(op, (str(x.dtype),), residual=residual)
    check_non_negative(op, "eps", eps)
    check_finite(op, "weight_offset", weight_offset)
    return _norm(x, residual, weight, bias, eps=eps, weight_offset=weight_offset, layer=layer, quant=quant)


def rms_norm(
    x: Array, weight: Array | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0, bias: Array | None = None
) -> Array:
    """`llmkern.ops.rms_norm`."""
    return _checked("rms_norm", x, None, weight, bias, eps, weight_offset, layer=False, quant=False)[0]


def rms_norm_quant(
    x: Array, weight: Array | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0, bias: Array | None = None
) -> tuple[Array, Array]:
    """`llmkern.ops.rms_norm_quant`: (codes, scale)."""
    q, scale = _checked("rms_norm_quant", x, None, weight, bias, eps, weight_offset, layer=False, quant=True)
    return q, scale


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """`llmkern.ops.add_rms_norm`: (norm, sum)."""
    out, total = _checked("add_rms_norm", x, residual, weight, bias, eps, weight_offset, layer=False, quant=False)
    return out, total


def add_rms_norm_quant(
    x: Array,
    residual: Array,
    weight: Array | None = None,
    eps: float = 1e-6,
    *,
    weight_offset: float = 0.0,
    bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """`llmkern.ops.add_rms_norm_quant`: (codes, scale, sum)."""
    q, scale, total = _checked(
        "add_rms_norm_quant", x, residual, weight, bias, eps, weight_offset, layer=False, quant=True
    )
    return q, scale, total


def layer_norm(x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5) -> Array:
    """`llmkern.ops.layer_norm`."""
    return _checked("layer_norm", x, None, weight, bias, eps, 0.0, layer=True, quant=False)[0]


def layer_norm_quant(
    x: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> tuple[Array, Array]:
    """`llmkern.ops.layer_norm_quant`: (codes, scale)."""
    q, scale = _checked("layer_norm_quant", x, None, weight, bias, eps, 0.0, layer=True, quant=True)
    return q, scale


def add_layer_norm(
    x: Array, residual: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> tuple[Array, Array]:
    """`llmkern.ops.add_layer_norm`: (norm, sum)."""
    out, total = _checked("add_layer_norm", x, residual, weight, bias, eps, 0.0, layer=True, quant=False)
    return out, total


def add_layer_norm_quant(
    x: Array, residual: Array, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """`llmkern.ops.add_layer_norm_quant`: (codes, scale, sum)."""
    q, scale, total = _checked("add_layer_norm_quant", x, residual, weight, bias, eps, 0.0, layer=True, quant=True)
    return q, scale, total
