"""Rotary position embedding of queries and keys.

computes  x·cos + turned(x)·sin of the first R dimensions, whose partners in a pair lie 1 or R/2 apart; the others pass
blocks    q, k: all heads × positions × D; cos, sin: positions × D, expanded to one value per dimension before
VMEM      two of each, and x and its quarter turn in fp32
grid      sequences × blocks of positions, each on its own
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp

from llmkern.checks import broadcasts
from llmkern.jax._checks import check_array, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import rope_plan


def rope_kernel(
    *, q: Any, k: Any, cos: Any, sin: Any, q_out: Any, k_out: Any, rotary_dim: int, interleaved: bool
) -> None:
    c, s = cos[...].astype(jnp.float32), sin[...].astype(jnp.float32)
    apart = 1 if interleaved else rotary_dim // 2
    for source, target in ((q, q_out), (k, k_out)):
        x = source[0].astype(jnp.float32)
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 2)
        first = lane % 2 == 0 if interleaved else lane < apart
        turned = jnp.where(first, -jnp.roll(x, -apart, 2), jnp.roll(x, apart, 2))
        rotated = jnp.where(lane < rotary_dim, x * c + turned * s, x)
        target[0] = rotated.astype(target.dtype)


def _per_dimension(angles: Array, dim: int, rotary_dim: int, interleaved: bool) -> Array:
    """Expand [B or 1, S, W] to [B or 1, S, D]: a pair's value for both dimensions, zeros past the rotated ones."""
    if angles.shape[-1] != rotary_dim:
        angles = jnp.repeat(angles, 2, -1) if interleaved else jnp.concatenate((angles, angles), -1)
    return jnp.pad(angles, ((0, 0), (0, 0), (0, dim - rotary_dim)))


@planned
def _rope(
    q: Array,
    k: Array,
    cos: Array,
    sin: Array,
    *,
    rotary_dim: int,
    interleaved: bool,
    chip: Chip,
    interpreted: bool,
) -> tuple[Array, Array]:
    if q.size == 0:
        return jnp.zeros_like(q), jnp.zeros_like(k)
    cos, sin = (_per_dimension(angles, q.shape[3], rotary_dim, interleaved) for angles in (cos, sin))
    plan = rope_plan(chip, q.shape, k.shape, cos.shape, str(q.dtype), str(cos.dtype))
    kernel = functools.partial(rope_kernel, rotary_dim=rotary_dim, interleaved=interleaved)
    q_out, k_out = launch(kernel, plan, {"q": q, "k": k, "cos": cos, "sin": sin}, interpreted)
    return q_out, k_out


def rope(
    q: Array, k: Array, cos: Array, sin: Array, *, interleaved: bool = False, rotary_dim: int | None = None
) -> tuple[Array, Array]:
    """`llmkern.ops.rope`: rotated (q, k)."""
    op = "rope"
    check_array(op, q=q, cos=cos)
    check_array(op, (str(q.dtype),), k=k)
    check_array(op, (str(cos.dtype),), sin=sin)
    if q.ndim != 4 or k.ndim != 4:
        name, array = ("q", q) if q.ndim != 4 else ("k", k)
        raise ValueError(f"{op}: {name} has {array.ndim} dimensions, expected [B, heads, S, D]")
    batch, _, length, dim = q.shape
    check_shape(op, "k", k, (batch, k.shape[1], length, dim), "q's batch, length and head dimension")
    check_shape(op, "sin", sin, cos.shape, "the shape of cos")
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    if cos.ndim != 3 or not broadcasts(cos.shape[0], batch) or cos.shape[1] != length:
        check_shape(op, "cos", cos, (batch, length, cos.shape[-1]), "q's batch or 1, and length")
    width = cos.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if rotary_dim not in (width, 2 * width) or rotary_dim % 2 or not 0 < rotary_dim <= dim:
        raise ValueError(
            f"{op}: rotary_dim is {rotary_dim}, expected {width} or {2 * width} (cos has width {width}), "
            f"even and at most {dim}"
        )
    return _rope(q, k, cos, sin, rotary_dim=rotary_dim, interleaved=interleaved)
