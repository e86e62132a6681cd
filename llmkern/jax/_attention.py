"""Attention forward, after FlashAttention-2 (Dao 2023, arXiv:2307.08691): softmax online, scores never in memory.

computes  softmax(mask(cap(q·kᵀ·sm_scale)))·v and its log-sum-exp; query i stands at key i + keys − queries
blocks    q, out: block_q × D of one head; k, v: block_k × D of the head that the query head reads; mask: block_q ×
          block_k, or 1 where it is broadcast; padding: 1 × block_k; sinks: all of them, in SMEM
VMEM      two of each; sums of values, maxima and sums of exponentials in fp32; scores, weights and what they see
grid      sequences × query heads × blocks of queries, and for each the blocks of keys one after the other.  Those
          that no query of a block sees are neither copied nor computed
rows      that see nothing have maximum −inf and sum 0: out 0, lse −inf
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from llmkern.checks import broadcasts, shape_text
from llmkern.jax._checks import check_array, check_finite, check_non_negative, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._compute import dot
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import WIDEST, attention_plan, visible_blocks
from llmkern.ops.attention import window_of

__all__ = ["attention", "attend", "check_heads", "end", "start"]


def start(acc: Any, m: Any, l: Any) -> None:
    """Initialise an online softmax."""
    acc[...] = jnp.zeros_like(acc)
    m[...] = jnp.full_like(m, -jnp.inf)
    l[...] = jnp.zeros_like(l)


def attend(acc: Any, m: Any, l: Any, parts: Sequence[tuple[Array, Array]]) -> None:
    """Accumulate blocks of (scores fp32 [rows, keys], −inf where masked; values [keys, Dv])."""
    before = m[...]
    top = functools.reduce(jnp.maximum, [jnp.max(s, axis=-1, keepdims=True) for s, _ in parts], before)
    shift = _finite(top)
    kept = jnp.exp(before - shift)
    total, sums = l[...] * kept, acc[...] * kept
    for s, v in parts:
        p = jnp.exp(s - shift)
        total += jnp.sum(p, axis=-1, keepdims=True)
        sums += dot(p.astype(v.dtype), v, (1, 0))
    m[...], l[...], acc[...] = top, total, sums


def end(acc: Any, m: Any, l: Any, sink: Any) -> tuple[Array, Array]:
    """Return (out [rows, Dv], lse [rows, 1]) in fp32; `sink`: one more logit in the sum, without a value, or None."""
    top, total, sums = m[...], l[...], acc[...]
    if sink is not None:
        raised = jnp.maximum(top, sink)
        kept = jnp.exp(top - raised)
        top, total, sums = raised, total * kept + jnp.exp(sink - raised), sums * kept
    nothing = total == 0
    divisor = jnp.where(nothing, 1.0, total)
    return sums / divisor, jnp.where(nothing, -jnp.inf, top + jnp.log(divisor))


def _finite(m: Array) -> Array:
    """Return the row maxima to subtract: 0 for fully masked rows, whose scores stay −inf."""
    return jnp.where(m == -jnp.inf, 0.0, m)


def scores(q: Array, k: Array, sm_scale: float, softcap: float) -> Array:
    """Return the scores, fp32 [rows, keys], after the softcap."""
    s = dot(q, k, (1, 1)) * sm_scale
    return softcap * jnp.tanh(s / softcap) if softcap > 0 else s


def attention_kernel(
    *,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    acc: Any,
    m: Any,
    l: Any,
    mask: Any = None,
    padding: Any = None,
    sinks: Any = None,
    lse: Any = None,
    queries: int,
    keys: int,
    left: int,
    right: int,
    sm_scale: float,
    softcap: float,
) -> None:
    head, i, j, steps = pl.program_id(1), pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    block_q, block_k = q.shape[2], k.shape[2]
    first, last = visible_blocks(
        i, block_q=block_q, block_k=block_k, queries=queries, keys=keys, left=left, right=right
    )

    @pl.when(j == 0)
    def _() -> None:
        start(acc, m, l)

    @pl.when((j >= first) & (j <= last))
    def _() -> None:
        s = scores(q[0, 0], k[0, 0], sm_scale, softcap)
        column = j * block_k + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        seen = column < keys
        if left >= 0 or right >= 0:
            position = i * block_q + (keys - queries) + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
            if left >= 0:
                seen &= column >= position - left
            if right >= 0:
                seen &= column <= position + right
        if mask is not None:
            if mask.dtype == jnp.int8:
                seen &= mask[0, 0].astype(jnp.int32) != 0
            else:
                s = s + mask[0, 0].astype(jnp.float32)
        if padding is not None:
            seen &= padding[0] != 0
        s = jnp.where(seen, s, -jnp.inf)
        values = v[0, 0]
        if keys % block_k:  # garbage past the last key, which may be NaN
            row = j * block_k + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(row < keys, values.astype(jnp.float32), 0.0).astype(values.dtype)
        attend(acc, m, l, [(s, values)])

    @pl.when(j == steps - 1)
    def _() -> None:
        result, log_sum = end(acc, m, l, None if sinks is None else sinks[head])
        out[0, 0] = result.astype(out.dtype)
        if lse is not None:
            lse[0, 0] = log_sum


@planned
def _attention(
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None,
    key_padding_mask: Array | None,
    sinks: Array | None,
    *,
    sm_scale: float,
    left: int,
    right: int,
    softcap: float,
    return_lse: bool,
    chip: Chip,
    interpreted: bool,
) -> tuple[Array, ...]:
    (batch, heads, queries, _), (_, kv_heads, keys, dim), dim_v = q.shape, k.shape, v.shape[3]
    if q.size * dim_v == 0:
        return jnp.zeros((batch, heads, queries, dim_v), q.dtype), jnp.zeros((batch, heads, queries), jnp.float32)
    arrays = {"q": q, "k": k, "v": v}
    if keys == 0:  # one key that is masked for every query
        shapes = {"k": (batch, kv_heads, 1, dim), "v": (batch, kv_heads, 1, dim_v)}
        arrays |= {name: jnp.zeros(shape, q.dtype) for name, shape in shapes.items()}
        attn_mask, key_padding_mask = None, jnp.zeros((batch, 1), bool)
    if attn_mask is not None:
        arrays["mask"] = attn_mask.astype(jnp.int8) if attn_mask.dtype == jnp.bool_ else attn_mask
    if key_padding_mask is not None:
        arrays["padding"] = key_padding_mask.astype(jnp.int32)[:, None, :]
    if sinks is not None:
        arrays["sinks"] = sinks.astype(jnp.float32)
    plan = attention_plan(
        chip,
        q.shape,
        arrays["k"].shape,
        dim_v,
        str(q.dtype),
        mask=(arrays["mask"].shape, str(arrays["mask"].dtype)) if "mask" in arrays else None,
        padding="padding" in arrays,
        sinks=sinks is not None,
        left=left,
        right=right,
        lse=return_lse,
    )
    kernel = functools.partial(
        attention_kernel,
        queries=queries,
        keys=max(keys, 1),
        left=left,
        right=right,
        sm_scale=sm_scale,
        softcap=softcap,
    )
    out, *lse = launch(kernel, plan, arrays, interpreted)
    return out, *[x[..., 0] for x in lse]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    attn_mask: Array | None = None,
    key_padding_mask: Array | None = None,
    sinks: Array | None = None,
    causal: bool = False,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`llmkern.ops.attention`: out, with `return_lse` (out, lse)."""
    op = "attention"
    softcap = softcap or 0.0
    check_heads(op, q, k, v, "k", "v", sinks, str(q.dtype))
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    if k.shape[0] != batch:
        raise ValueError(f"{op}: k has batch size {k.shape[0]}, expected {batch} (q's)")
    if attn_mask is not None:
        check_array(op, tuple(dict.fromkeys(("bool", str(q.dtype), "float32"))), attn_mask=attn_mask)
        full = (batch, heads, queries, keys)
        given = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
        if len(given) != 4 or not all([broadcasts(*sizes) for sizes in zip(given, full, strict=True)]):
            shape = shape_text(attn_mask.shape)
            raise ValueError(f"{op}: attn_mask has shape {shape}, expected one that broadcasts to {shape_text(full)}")
        attn_mask = attn_mask.reshape(given)
    check_array(op, ("bool",), key_padding_mask=key_padding_mask)
    check_shape(op, "key_padding_mask", key_padding_mask, (batch, keys), "k's batch and length")
    sm_scale = dim**-0.5 if sm_scale is None else sm_scale
    check_finite(op, "sm_scale", sm_scale)
    check_non_negative(op, "softcap", softcap)
    left, right = (min(n, WIDEST) for n in window_of(op, window))
    out, *lse = _attention(
        q,
        k,
        v,
        attn_mask,
        key_padding_mask,
        sinks,
        sm_scale=sm_scale,
        left=left,
        right=0 if causal else right,
        softcap=softcap,
        return_lse=return_lse,
    )
    return (out, lse[0]) if return_lse else out


def check_heads(
    op: str, q: Array, k: Array, v: Array, k_name: str, v_name: str, sinks: Array | None, cache_dtype: str
) -> None:
    """Check dtypes and shapes of q, of k and v (or a cache, of any batch size), and of the sinks."""
    check_array(op, q=q)
    check_array(op, (cache_dtype,), **{k_name: k, v_name: v})
    for name, array in (("q", q), (k_name, k), (v_name, v)):
        if array.ndim != 4:
            raise ValueError(f"{op}: {name} has shape {shape_text(array.shape)}, expected 4 dimensions")
    if q.shape[3] == 0 or k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: {k_name} has head dimension {k.shape[3]}, expected {max(q.shape[3], 1)} (q's)")
    check_shape(op, v_name, v, (*k.shape[:3], v.shape[3]), f"that of {k_name} but for the last dimension")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} heads, expected a multiple of {k_name}'s {k.shape[1]}")
    check_array(op, sinks=sinks)
    check_shape(op, "sinks", sinks, q.shape[1:2], "q's heads")
