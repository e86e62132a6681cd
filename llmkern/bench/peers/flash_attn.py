"""flash-attn (arXiv:2307.08691)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.bench.peer import Peer, Thunk, Unsupported, need

PEER = Peer("flash-attn", need("flash_attn", "flash-attn", cuda=True))


def _half(q: Tensor) -> None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported("takes float16 and bfloat16")


@PEER.op("attention")
def _attention(call: dict[str, Any]) -> Thunk:
    from flash_attn import flash_attn_func

    _half(call["q"])
    # Its layout is [B, S, H, D].
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    return lambda: flash_attn_func(q, k, v, softmax_scale=call["sm_scale"], causal=call["causal"]).transpose(1, 2)


@PEER.op("attention_decode")
def _attention_decode(call: dict[str, Any]) -> Thunk:
    from flash_attn import flash_attn_with_kvcache

    _half(call["q"])
    if call["block_table"] is not None:
        raise Unsupported("its paged cache has another layout")
    q, k, v = (call[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    lengths = call["seq_lens"].int()
    return lambda: flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, softmax_scale=call["sm_scale"], causal=True
    ).transpose(1, 2)
