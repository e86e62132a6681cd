"""Attention of the newest tokens against a cache, contiguous or paged (vLLM: Kwon et al. 2023, arXiv:2309.06180).

computes  as _attention.py; query i of sequence b stands at position seq_lens[b] − queries + i
blocks    q, out: the queries of all heads that share a key head, as rows × D; k, v: block_k × D, or of a paged cache
          as many of its blocks as make 128 keys, each an input of its own; scales of int8 caches: 1 × block_k
VMEM      two of each; sums of values, maxima and sums of exponentials in fp32; scores, weights, keys and values
grid      sequences × key heads, and for each the blocks of keys one after the other.  Lengths and block table are
          in SMEM before the first step: they place the blocks, and what no query sees is neither copied nor computed
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from llmkern.jax._attention import attend, check_heads, end, scores, start
from llmkern.jax._checks import check_array, check_finite, check_non_negative, check_shape
from llmkern.jax._chips import Chip
from llmkern.jax._launch import launch, planned
from llmkern.jax._plans import WIDEST, decode_plan
from llmkern.ops.attention import window_of
from llmkern.ops.attention_decode import MAX_QUERIES


def decode_kernel(
    *,
    seq_lens: Any,
    q: Any,
    out: Any,
    acc: Any,
    m: Any,
    l: Any,
    block_table: Any = None,
    sinks: Any = None,
    lse: Any = None,
    queries: int,
    slots: int,
    left: int,
    sm_scale: float,
    softcap: float,
    **cache: Any,
) -> None:
    """cache: k0, v0, k_scale0, v_scale0, k1 …"""
    step, steps = pl.program_id(2), pl.num_programs(2)
    length = seq_lens[pl.program_id(0)]
    together = sum(name[0] == "k" and name[1:].isdigit() for name in cache)
    block = cache["k0"].shape[2]
    begin = step * together * block
    below = 0 if left < 0 else length - queries - left

    @pl.when(step == 0)
    def _() -> None:
        start(acc, m, l)

    def part(i: int) -> tuple[Array, Array]:
        k, v = cache[f"k{i}"][0, 0], cache[f"v{i}"][0, 0]
        scaled = f"k_scale{i}" in cache
        if scaled:
            # Codes are exact in q's dtype; the scales of keys go to the scores, those of values to the weights' values.
            k = k.astype(jnp.float32).astype(q.dtype)
            s = scores(q[0, 0], k, sm_scale, 0.0) * cache[f"k_scale{i}"][0, 0]
            s = softcap * jnp.tanh(s / softcap) if softcap > 0 else s
        else:
            s = scores(q[0, 0], k, sm_scale, softcap)
        slot = begin + i * block + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
        position = length - queries + row % queries
        seen = (slot <= position) & (slot < slots)
        if left >= 0:
            seen &= slot >= position - left
        s = jnp.where(seen, s, -jnp.inf)
        values = v.astype(jnp.float32)
        if scaled:
            values = values * jnp.transpose(cache[f"v_scale{i}"][0, 0])
        # Slots past the end may hold NaN, which a weight of 0 does not hide.
        row = begin + i * block + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        values = jnp.where(row < jnp.minimum(length, slots), values, 0.0)
        return s, values if scaled else values.astype(v.dtype)

    @pl.when((begin < length) & (begin + together * block > below))
    def _() -> None:
        attend(acc, m, l, [part(i) for i in range(together)])

    @pl.when(step == steps - 1)
    def _() -> None:
        result, log_sum = end(acc, m, l, None if sinks is None else sinks[0])
        out[0, 0] = result.astype(out.dtype)
        if lse is not None:
            lse[0, 0] = log_sum


@planned
def _decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    seq_lens: Array,
    block_table: Array | None,
    k_scale: Array | None,
    v_scale: Array | None,
    sinks: Array | None,
    *,
    sm_scale: float,
    left: int,
    softcap: float,
    return_lse: bool,
    chip: Chip,
    interpreted: bool,
) -> tuple[Array, ...]:
    (batch, heads, queries, dim), (_, kv_heads, block, dim_v) = q.shape, v_cache.shape
    pages = None if block_table is None else block_table.shape[1]
    slots = block if pages is None else block * pages
    if q.size * dim_v == 0 or slots == 0 or k_cache.shape[0] == 0:
        lse = jnp.full((batch, heads, queries), -jnp.inf, jnp.float32)
        if sinks is not None:
            lse = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], lse.shape)
        return jnp.zeros((batch, heads, queries, dim_v), q.dtype), lse
    rows = heads // kv_heads * queries
    shape = (batch, kv_heads, rows, dim)
    plan = decode_plan(
        chip,
        shape,
        k_cache.shape,
        dim_v,
        str(q.dtype),
        str(k_cache.dtype),
        queries=queries,
        pages=pages,
        sinks=sinks is not None,
        left=left,
        lse=return_lse,
    )
    whole = {"k": k_cache, "v": v_cache}
    if k_scale is not None and v_scale is not None:
        whole |= {"k_scale": k_scale[:, :, None], "v_scale": v_scale[:, :, None]}
    arrays = {block.name: whole[name] for block in plan.inputs if (name := block.name.rstrip("0123456789")) in whole}
    arrays |= {"q": q.reshape(shape), "seq_lens": seq_lens.astype(jnp.int32)}
    if block_table is not None:
        arrays["block_table"] = block_table
    if sinks is not None:
        arrays["sinks"] = jnp.repeat(sinks.astype(jnp.float32), queries).reshape(kv_heads, rows, 1)
    kernel = functools.partial(
        decode_kernel, queries=queries, slots=slots, left=left, sm_scale=sm_scale, softcap=softcap
    )
    out, *more = launch(kernel, plan, arrays, interpreted)
    return out.reshape(batch, heads, queries, dim_v), *[lse.reshape(batch, heads, queries) for lse in more]


def attention_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    seq_lens: Array,
    *,
    block_table: Array | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    sinks: Array | None = None,
    sm_scale: float | None = None,
    window: int | Sequence[int] | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """`llmkern.ops.attention_decode`: out, with `return_lse` (out, lse)."""
    op = "attention_decode"
    softcap = softcap or 0.0
    if (k_scale is None) != (v_scale is None):
        raise ValueError(f"{op}: {'k' if k_scale is None else 'v'}_scale is None, expected one beside the other")
    check_array(op, q=q)
    check_heads(op, q, k_cache, v_cache, "k_cache", "v_cache", sinks, str(q.dtype) if k_scale is None else "int8")
    batch, _, queries, dim = q.shape
    if not 1 <= queries <= MAX_QUERIES:
        raise ValueError(f"{op}: q has {queries} queries, expected 1 to {MAX_QUERIES}; use attention for more")
    check_array(op, ("int32", "int64"), seq_lens=seq_lens)
    check_shape(op, "seq_lens", seq_lens, (batch,), "q's batch")
    if block_table is not None:
        check_array(op, ("int32",), block_table=block_table)
        check_shape(op, "block_table", block_table, (batch, block_table.shape[-1]), "q's batch, entries")
    elif k_cache.shape[0] != batch:
        raise ValueError(f"{op}: k_cache has batch size {k_cache.shape[0]}, expected {batch} (q's)")
    check_array(op, ("float32",), k_scale=k_scale, v_scale=v_scale)
    check_shape(op, "k_scale", k_scale, k_cache.shape[:3], "k_cache's but for the last dimension")
    check_shape(op, "v_scale", v_scale, k_cache.shape[:3], "v_cache's but for the last dimension")
    sm_scale = dim**-0.5 if sm_scale is None else sm_scale
    check_finite(op, "sm_scale", sm_scale)
    check_non_negative(op, "softcap", softcap)
    out, *lse = _decode(
        q,
        k_cache,
        v_cache,
        seq_lens,
        block_table,
        k_scale,
        v_scale,
        sinks,
        sm_scale=sm_scale,
        left=min(window_of(op, window)[0], WIDEST),
        softcap=softcap,
        return_lse=return_lse,
    )
    return (out, lse[0]) if return_lse else out
