from __future__ import annotations

from typing import Any

import torch


def build(
    make: Any,
    B: int,
    Hq: int,
    Hkv: int,
    Sq: int,
    Skv: int,
    D: int,
    *,
    block_size: int = 0,
    sinks: bool = False,
    int8: bool = False,
) -> dict[str, Any]:
    """Skv: the cache's capacity per sequence; int8: it holds codes and their scales.

    block_size: tokens in a paged cache's block, 0 for contiguous.
    """
    if block_size < 0:
        raise ValueError(f"why: block_size is {block_size}, expected 0 or more")
    blocks = -(-Skv // block_size) if block_size else 0
    cache = (B * blocks, Hkv, block_size, D) if block_size else (B, Hkv, Skv, D)
    k_cache, v_cache = (make.randint(-127, 128, *cache, dtype=torch.int8) if int8 else make.randn(*cache) for _ in "kv")
    arguments = {
        "q": make.randn(B, Hq, Sq, D),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "seq_lens": make.randint(Sq, Skv + 1, B, dtype=torch.int32),
    }
    if block_size:
        arguments["block_table"] = make.randint(0, B * blocks, B, blocks, dtype=torch.int32)
    if int8:
        arguments["k_scale"], arguments["v_scale"] = (make.randn(*cache[:3], dtype=torch.float32) for _ in "kv")
    if sinks:
        arguments["sinks"] = make.randn(Hq)
    return arguments
