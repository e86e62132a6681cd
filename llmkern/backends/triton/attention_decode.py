from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.backends.triton._attention import WIDEST, head_dims, refuse_dims, shape_class, with_strides
from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import Kernel, launch, next_power_of_2, target_of
from llmkern.ops.attention import lse_like, out_like

COMBINE_KERNEL = Kernel("attention_decode", "combine_kernel")
DECODE_KERNEL = Kernel("attention_decode", "decode_kernel")

MAX_SPLITS = 64
PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_BLOCK_M = 64


def _refuse(k_cache: Tensor, v_cache: Tensor, **_: object) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            return f"the vectors of {name} have stride {cache.stride(-1)}; only 1 is taken, so that no cache is copied"
    return refuse_dims(k_cache, v_cache)


@serves("attention_decode", refuse=_refuse)
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, dim = q.shape
    blocks, kv_heads, block_size, dim_v = v_cache.shape
    out, lse = out_like(q, v_cache), lse_like(q, return_lse)
    if out.numel() == 0:
        return out, lse
    q, q_strides = with_strides(q)
    dims = head_dims(dim, dim_v)
    capacity = block_size if block_table is None else block_size * block_table.shape[1]
    group = heads // kv_heads
    rows = group * queries
    block_m = min(max(next_power_of_2(rows), 16), MAX_BLOCK_M)
    target = target_of(q)
    chosen = config("attention_decode", shape_class(q.dtype, dims), target)
    # As many parts as fill the device, by the cache's capacity: the lengths are never read on the host.
    programs = batch * kv_heads * -(-rows // block_m)
    wanted = -(-target.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // programs)
    splits = max(min(wanted, capacity // (2 * chosen["BLOCK_N"]), MAX_SPLITS), 1)
    part = q.new_empty((batch * heads * queries, splits, dim_v), dtype=torch.float32)
    part_lse = q.new_empty((batch * heads * queries, splits), dtype=torch.float32)
    launch(
        DECODE_KERNEL,
        (programs * splits, 1, 1),
        q,
        k_cache,
        v_cache,
        seq_lens.contiguous(),
        block_table,
        k_scale,
        v_scale,
        part,
        part_lse,
        kv_heads,
        group,
        queries,
        capacity,
        splits,
        blocks,
        max(block_size, 1),
        *q_strides,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0, 0) if k_scale is None else k_scale.stride()),
        *((0, 0, 0) if v_scale is None else v_scale.stride()),
        *((0, 0) if block_table is None else block_table.stride()),
        sm_scale,
        softcap,
        min(window[0], WIDEST),
        HAS_LEFT=window[0] >= 0,
        SOFTCAP=softcap > 0,
        BLOCK_M=block_m,
        **dims,
        **chosen,
    )
    launch(
        COMBINE_KERNEL,
        (batch * heads * queries, 1, 1),
        part,
        part_lse,
        sinks if sinks is None else sinks.contiguous(),
        out,
        lse if return_lse else None,
        heads,
        queries,
        splits,
        DIM_V=dim_v,
        PADDED_V=dims["PADDED_V"],
        SPLITS=next_power_of_2(splits),
        num_warps=4,
    )
    return out, lse
