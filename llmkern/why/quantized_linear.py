from __future__ import annotations

from typing import Any

import torch

from llmkern.packed import BLOCK, CODES, PANEL


def build(
    make: Any, M: int, N: int, K: int, *, code: str = "s4", group: int = 32, bias: bool = False
) -> dict[str, Any]:
    if code not in CODES or K % BLOCK or K % group:
        raise ValueError(
            f"quantized_linear: K is {K} and code {code!r}, expected a multiple of {BLOCK} and of group {group}, and "
            f"one of {', '.join(CODES)}"
        )
    panels = -(-N // PANEL)
    arguments = {
        "x": make.randn(M, K),
        "codes": make.randint(0, 256, panels, K // BLOCK, CODES[code].block_bytes, dtype=torch.uint8),
        "scale": make.randn(panels, K // group, PANEL, dtype=torch.float16),
        "code": code,
        "n": N,
    }
    return arguments | {"bias": make.randn(N)} if bias else arguments
