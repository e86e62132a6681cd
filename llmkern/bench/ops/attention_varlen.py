from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkern.bench.ops.attention import attention_work
from llmkern.bench.sweep import Sweep, Work

CHECK = {"B": 2, "Sq": 32, "Skv": 64}


def _sweep(title: str, queries: int, lengths: tuple[int, ...], batch: int = 8, **quick: Any) -> Sweep:
    """Pages of 16 tokens, GQA 32/8."""
    sizes = {"B": batch, "Hq": 32, "Hkv": 8, "Sq": queries, "D": 128}
    return Sweep(title, ("Skv",), lengths, sizes, {"causal": True, "block_size": 16}, check=CHECK, **quick)


SWEEPS = (
    _sweep("8 chunks of 512 against a past", 512, (512, 2048, 8192), quick_on_gpu=True),
    _sweep("64 decoded", 1, (512, 2048, 8192), batch=64, quick_on_gpu=True),
    Sweep(
        "SmolLM2-135M, 16 prompts",
        ("Sq", "Skv"),
        (32, 128, 512),
        {"B": 16, "Hq": 9, "Hkv": 3, "D": 64},
        {"causal": True},
        quick=(128,),
        check=CHECK,
    ),
)


def work(call: Mapping[str, Any], out: tuple[Any, Any]) -> Work:
    """Sequences of one length each: the work of so many calls of attention."""
    batch = call["cu_seqlens_q"].shape[0] - 1
    q, k, table = call["q"], call["k"], call["block_table"]
    keys = k.shape[0] // batch if table is None else table.shape[1] * k.shape[1]
    per_sequence = q.reshape(batch, -1, *q.shape[1:]).transpose(1, 2)
    return attention_work([*call.values(), *out], per_sequence, keys, call["v"].shape[-1], causal=call["causal"])
