"""xformers: memory_efficient_attention."""

from __future__ import annotations

from typing import Any

from llmkern.bench.peer import Peer, Thunk, need

PEER = Peer("xformers", need("xformers", "xformers", cuda=True))


@PEER.op("attention")
def _attention(call: dict[str, Any]) -> Thunk:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    # Grouped heads are a fifth dimension: [B, S, Hkv, group, D], keys and values expanded without a copy.
    batch, heads, queries, dim = call["q"].shape
    groups, keys = call["k"].shape[1], call["k"].shape[2]
    q = call["q"].transpose(1, 2).reshape(batch, queries, groups, heads // groups, dim)
    k, v = (
        call[n].transpose(1, 2)[:, :, :, None].expand(batch, keys, groups, heads // groups, call[n].shape[3])
        for n in "kv"
    )
    bias = LowerTriangularMask() if call["causal"] else None

    def run() -> Any:
        out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=call["sm_scale"])
        return out.reshape(batch, queries, heads, -1).transpose(1, 2)

    return run
