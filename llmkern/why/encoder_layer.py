from __future__ import annotations

from typing import Any

from llmkern.why._layer import linears


def build(make: Any, B: int, S: int, H: int, heads: int, I: int, *, int8: bool = False) -> dict[str, Any]:
    """int8: weights in int8."""
    sizes = dict.fromkeys("qkvo", (H, H)) | {"up": (I, H), "down": (H, I)}
    return {
        "hidden": make.randn(B, S, H),
        "attention_norm": make.randn(H),
        "output_norm": make.randn(H),
        "heads": heads,
        **linears(make, sizes, int8),
    }
