"""Per-token int8 quantization.

computes  codes and scale of each row, by `_compute.codes`
blocks    x, q: rows × hidden, whole rows; scale: rows × 1
VMEM      two of each, and two blocks of fp32 in between
grid      blocks of rows, each on its own
"""

from __future__ import annotations

from typing import Any

from jax import Array
from jax import numpy as jnp

from llmkern.jax._checks import check_array
from llmkern.jax._chips import Chip
from llmkern.jax._compute import codes
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import rows_plan


def quantize_kernel(*, x: Any, q: Any, scale: Any) -> None:
    q[...], scale[...] = codes(x[...].astype(jnp.float32))


@planned
def _quantize(x: Array, *, chip: Chip, interpreted: bool) -> tuple[Array, Array]:
    shape, hidden = x.shape, x.shape[-1]
    if x.size == 0:
        return jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), jnp.float32)
    outputs = {"q": "int8", "scale": "float32"}
    plan = rows_plan("quantize_int8", chip, x.size // hidden, hidden, {"x": str(x.dtype)}, outputs)
    q, scale = launch(quantize_kernel, plan, {"x": x.reshape(-1, hidden)}, interpreted)
    return q.reshape(shape), scale.reshape(*shape[:-1], 1)


def quantize_int8(x: Array) -> tuple[Array, Array]:
    """`llmkern.ops.quantize_int8`: (codes, scale)."""
    check_array("quantize_int8", x=x)
    if x.ndim == 0:
        raise ValueError("quantize_int8: x has no dimensions, expected [..., hidden]")
    return _quantize(x)
