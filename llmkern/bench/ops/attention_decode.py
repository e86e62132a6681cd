from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llmkern.why.attention_decode as why
from llmkern.bench.ops.attention import attention_work
from llmkern.bench.sweep import Sweep, Work

CACHES = (1024, 4096, 16384, 65536, 131072)
CHECK = {"B": 1, "Skv": 1024}

SWEEPS = (
    *[
        Sweep(
            f"batch {batch}, {queries} {'query' if queries == 1 else 'queries'}",
            ("Skv",),
            CACHES,
            {"B": batch, "Hq": 32, "Hkv": 8, "Sq": queries, "D": 128},
            quick_on_gpu=batch < 64 and queries in (1, 16),
            check=CHECK,
        )
        for batch in (1, 8, 64)
        for queries in (1, 4, 8, 16)
    ],
    Sweep(
        "SmolLM2-135M, batch 1",
        ("Skv",),
        (128, 512, 1024, 4096, 16384),
        {"B": 1, "Hq": 9, "Hkv": 3, "Sq": 1, "D": 64},
        quick=(512, 4096),
        check=CHECK,
    ),
)


def build(make: Any, B: int, Hq: int, Hkv: int, Sq: int, Skv: int, D: int) -> dict[str, Any]:
    """Every cache is full."""
    arguments = why.build(make, B, Hq, Hkv, Sq, Skv, D)
    return arguments | {"seq_lens": arguments["seq_lens"].fill_(Skv)}


def work(call: Mapping[str, Any], out: tuple[Any, Any]) -> Work:
    """The caches are read once; queries and results are small beside them."""
    k, v = call["k_cache"], call["v_cache"]
    return attention_work([*call.values(), *out], call["q"], k.shape[2], v.shape[3], causal=True)
