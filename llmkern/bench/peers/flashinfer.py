"""FlashInfer (arXiv:2501.01005)."""

from __future__ import annotations

from typing import Any

import torch

from llmkern.bench.peer import Peer, Thunk, Unsupported, need

PEER = Peer("flashinfer", need("flashinfer", "flashinfer-python", cuda=True))


@PEER.op("attention")
def _attention(call: dict[str, Any]) -> Thunk:
    from flashinfer import single_prefill_with_kv_cache

    if call["q"].shape[0] != 1 or call["q"].dtype == torch.float32:
        raise Unsupported("one sequence, in float16 or bfloat16")
    q, k, v = (call[name][0] for name in "qkv")
    q = q.transpose(0, 1).contiguous()  # [S, H, D]; keys and values may keep their heads first
    return lambda: single_prefill_with_kv_cache(
        q, k, v, causal=call["causal"], kv_layout="HND", sm_scale=call["sm_scale"]
    ).transpose(0, 1)[None]


@PEER.op("attention_decode")
def _attention_decode(call: dict[str, Any]) -> Thunk:
    from flashinfer import single_decode_with_kv_cache

    q = call["q"]
    if q.shape[0] != 1 or q.shape[2] != 1 or call["block_table"] is not None or q.dtype == torch.float32:
        raise Unsupported("one query of one sequence in a contiguous cache, in float16 or bfloat16")
    k, v = call["k_cache"][0], call["v_cache"][0]
    query = q[0, :, 0].contiguous()
    return lambda: single_decode_with_kv_cache(query, k, v, kv_layout="HND", sm_scale=call["sm_scale"])[None, :, None]


@PEER.op("rms_norm")
def _rms_norm(call: dict[str, Any]) -> Thunk:
    from flashinfer import rmsnorm

    if call["bias"] is not None or call["weight_offset"] or call["x"].dtype == torch.float32:
        raise Unsupported("without bias and offset, in float16 or bfloat16")
    x, weight = call["x"], call["weight"]
    return lambda: rmsnorm(x, weight, call["eps"])
