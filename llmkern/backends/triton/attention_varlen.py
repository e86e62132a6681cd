from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern.backends.triton._attention import MAX_DIM, features, head_dims, shape_class
from llmkern.backends.triton._configs import config
from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import Kernel, launch, next_power_of_2, target_of
from llmkern.ops.attention_varlen import varlen_like

VARLEN_KERNEL = Kernel("attention_varlen", "attention_varlen_kernel")


def _refuse(q: Tensor, k: Tensor, v: Tensor, **_: object) -> str | None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not 0 < tensor.shape[-1] <= MAX_DIM:
            return f"{name} has head dimension {tensor.shape[-1]}; 1 to {MAX_DIM} are taken"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the vectors of {name} have stride {tensor.stride(-1)}; only 1 is taken, so that no cache is copied"
    return None


@serves("attention_varlen", refuse=_refuse)
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    sm_scale: float,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    out, lse = varlen_like(q, v, return_lse)
    out.zero_()  # rows in no sequence
    if return_lse:
        lse.fill_(-math.inf)
    batch = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or batch == 0:
        return out, lse
    rows, heads, dim = q.shape
    kv_heads = k.shape[-2]
    group = heads // kv_heads
    dims = head_dims(dim, v.shape[-1])
    (left, right), switches = features(None, causal, window, softcap)
    del switches["ADDITIVE"]
    chosen = dict(config("attention", shape_class(q.dtype, dims), target_of(q)))
    chosen["BLOCK_M"] = max(chosen["BLOCK_M"], next_power_of_2(group))
    if q.dtype == torch.float32 and max(dims["PADDED"], dims["PADDED_V"]) > 128:
        chosen["BLOCK_N"] //= 2  # keys' addresses take registers that `attention` has for a tile
    block_q = chosen["BLOCK_M"] // group
    slots = k.shape[-3]
    launch(
        VARLEN_KERNEL,
        ((rows // block_q + batch) * kv_heads, 1, 1),
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table,
        sinks if sinks is None else sinks.contiguous(),
        out,
        lse if return_lse else None,
        batch,
        kv_heads,
        group,
        rows,
        slots if block_table is None else slots * block_table.shape[1],
        k.shape[0],
        max(slots, 1),
        *q.stride()[:2],
        *(k.stride()[:3] if k.dim() == 4 else (0, *k.stride()[:2])),
        *(v.stride()[:3] if v.dim() == 4 else (0, *v.stride()[:2])),
        *((0, 0) if block_table is None else block_table.stride()),
        sm_scale,
        softcap,
        left,
        right,
        **switches,
        BLOCK_Q=block_q,
        **dims,
        **chosen,
    )
    return out, lse
