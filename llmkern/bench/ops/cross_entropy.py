from __future__ import annotations

from llmkern.bench.sweep import Sweep

SWEEPS = (
    Sweep(
        "49152 words",
        ("rows",),
        (1, 64, 512, 2048),
        {"words": 49152},
        modes=("forward", "backward"),
        quick=(512,),
        check={"rows": 16},
    ),
)
