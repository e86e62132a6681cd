from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from llmkern.backends.reference import attention_varlen as definition
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.attention import attention, refuse_lse
from llmkern.dispatch import implements
from llmkern.ops.attention_varlen import varlen_like


@implements("attention_varlen", TORCH, refuse=refuse_lse)
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
    if not q.is_cpu or is_compiling():  # lengths are on the device, or unknown: one call under a mask
        return _masked(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, sinks, causal, sm_scale, window, softcap
        )
    out, lse = varlen_like(q, v, False)
    out.zero_()
    starts = cu_seqlens_q.tolist()
    ends = seqused_k.tolist() if cu_seqlens_k is None and seqused_k is not None else []
    starts_k = [] if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for b in range(len(starts) - 1):
        if starts[b] == starts[b + 1]:
            continue
        rows = slice(starts[b], starts[b + 1])
        if starts_k:
            keys = [x[starts_k[b] : starts_k[b + 1]] for x in (k, v)]
        else:
            keys = [_tokens(x, block_table, b, ends[b]) for x in (k, v)]
        heads = [x.transpose(0, 1)[None] for x in (q[rows], *keys)]
        own, _ = attention(*heads, None, None, sinks, causal, sm_scale, window, softcap, False)
        out[rows] = own[0].transpose(0, 1)
    return out, lse


def _tokens(cache: Tensor, block_table: Tensor | None, b: int, count: int) -> Tensor:
    """[count, Hkv, D]: what is cached of sequence b."""
    if block_table is None:
        return cache[b, :count]
    blocks = block_table[b : b + 1, : -(-count // max(cache.shape[1], 1))]
    return definition.cached(cache, blocks)[0, :count]


def _masked(
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
) -> tuple[Tensor, Tensor]:
    """All sequences against all keys, the scores of strangers hidden."""
    tokens, keys, k, v = definition.keys_of(k, v, cu_seqlens_k, seqused_k, block_table)
    rows = definition.packed(cu_seqlens_q, q.shape[0])
    mask = definition.visible(rows, tokens, definition.lengths_of(cu_seqlens_q), keys, causal, window)
    live = mask.any(0)[:, None, None]
    heads = [x.transpose(0, 1)[None] for x in (q, *(torch.where(live, x, 0) for x in (k, v)))]
    out, lse = attention(*heads, mask[None, None], None, sinks, False, sm_scale, (-1, -1), softcap, False)
    return out[0].transpose(0, 1).contiguous(), lse
