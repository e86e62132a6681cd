"""gelu and the gate of SwiGLU, elementwise, and the gate with per-token quantization.

computes  act(x), or act(x)·up, or the latter's codes and scale
blocks    rows × columns of each array, read and written once; whole rows for codes
VMEM      two of each, and two blocks of fp32 in between
grid      blocks of rows × blocks of columns, each on its own
"""

from __future__ import annotations

import functools
from typing import Any

from jax import Array
from jax import numpy as jnp

from llmkern.jax._checks import check_array, check_choice, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._compute import activate, codes
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import rows_plan


def activation_kernel(*, x: Any, out: Any, up: Any = None, scale: Any = None, activation: str) -> None:
    y = activate(x[...].astype(jnp.float32), activation)
    if up is not None:
        y = y * up[...].astype(jnp.float32)
    if scale is not None:
        out[...], scale[...] = codes(y)
    else:
        out[...] = y.astype(out.dtype)


@planned
def _activation(
    x: Array, up: Array | None, *, activation: str, quant: bool, chip: Chip, interpreted: bool
) -> tuple[Array, ...]:
    shape, hidden = x.shape, x.shape[-1] if x.ndim else 1
    outputs = {"out": "int8", "scale": "float32"} if quant else {"out": str(x.dtype)}
    if x.size == 0:
        return tuple([jnp.zeros((*shape[:-1], 1) if name == "scale" else shape, d) for name, d in outputs.items()])
    arrays = {name: a.reshape(-1, hidden) for name, a in (("x", x), ("up", up)) if a is not None}
    inputs = {name: str(a.dtype) for name, a in arrays.items()}
    plan = rows_plan("activation", chip, x.size // hidden, hidden, inputs, outputs, whole=quant)
    kernel = functools.partial(activation_kernel, activation=activation)
    out, *scale = launch(kernel, plan, arrays, interpreted)
    return (out.reshape(shape), *[s.reshape(*shape[:-1], 1) for s in scale])


def gelu(x: Array, approximate: str = "none") -> Array:
    """`llmkern.ops.gelu`."""
    check_array("gelu", x=x)
    check_choice("gelu", "approximate", approximate, ("none", "tanh"))
    return _activation(x, None, activation="gelu" if approximate == "none" else "gelu_tanh", quant=False)[0]


def swiglu(gate: Array, up: Array) -> Array:
    """`llmkern.ops.swiglu`."""
    _check_gated("swiglu", gate, up)
    return _activation(gate, up, activation="silu", quant=False)[0]


def swiglu_quant(gate: Array, up: Array) -> tuple[Array, Array]:
    """`llmkern.ops.swiglu_quant`: (codes, scale)."""
    _check_gated("swiglu_quant", gate, up)
    if gate.ndim == 0:
        raise ValueError("swiglu_quant: gate has no dimensions, expected [..., hidden]")
    q, scale = _activation(gate, up, activation="silu", quant=True)
    return q, scale


def _check_gated(op: str, gate: Array, up: Array) -> None:
    check_array(op, gate=gate)
    check_array(op, (str(gate.dtype),), up=up)
    check_shape(op, "up", up, gate.shape, "the shape of gate")
