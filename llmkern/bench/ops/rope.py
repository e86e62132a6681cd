from __future__ import annotations

from llmkern.bench.sweep import Sweep

SWEEPS = (
    Sweep(
        "32/8 heads, dim 128",
        ("S",),
        (1, 128, 512, 2048, 8192, 16384),
        {"B": 1, "Hq": 32, "Hkv": 8, "D": 128},
        modes=("forward", "backward"),
        quick=(1, 512),
        check={"S": 256},
    ),
)
