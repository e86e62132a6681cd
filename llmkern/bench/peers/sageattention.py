"""SageAttention: attention with 8-bit scores (arXiv:2410.02367)."""

from __future__ import annotations

from typing import Any

import torch

from llmkern.bench.peer import Peer, Thunk, Unsupported, need

PEER = Peer("sageattention", need("sageattention", "sageattention", cuda=True))


@PEER.op("attention", approximate="scores in int8")
def _attention(call: dict[str, Any]) -> Thunk:
    from sageattention import sageattn

    q, k, v = call["q"], call["k"], call["v"]
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported("takes float16 and bfloat16")
    return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=call["causal"], sm_scale=call["sm_scale"])
