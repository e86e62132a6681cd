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
) -> dict[str, Any]:
    """B sequences of Sq queries and Skv keys.  block_size: tokens in a paged cache's block, 0 for packed keys."""
    if block_size < 0:
        raise ValueError(f"why: block_size is {block_size}, expected 0 or more")
    blocks = -(-Skv // block_size) if block_size else 0
    keys = (B * blocks, block_size, Hkv, D) if block_size else (B * Skv, Hkv, D)
    arguments = {
        "q": make.randn(B * Sq, Hq, D),
        "k": make.randn(*keys),
        "v": make.randn(*keys),
        "cu_seqlens_q": make.tensor([b * Sq for b in range(B + 1)], dtype=torch.int32),
    }
    if block_size:
        arguments["seqused_k"] = make.tensor([Skv] * B, dtype=torch.int32)
        arguments["block_table"] = make.tensor(range(B * blocks), dtype=torch.int32).reshape(B, blocks)
    else:
        arguments["cu_seqlens_k"] = make.tensor([b * Skv for b in range(B + 1)], dtype=torch.int32)
    if sinks:
        arguments["sinks"] = make.randn(Hq)
    return arguments
