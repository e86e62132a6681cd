from __future__ import annotations

from typing import Any

from llmkern.why._layer import linears


def build(
    make: Any, B: int, S: int, past: int, H: int, Hq: int, Hkv: int, D: int, I: int, *, int8: bool = False
) -> dict[str, Any]:
    """past: tokens in the cache, which has room for S more; int8: weights in int8."""
    into, cache = (Hkv * D, H), (B, Hkv, past + S, D)
    sizes = {"q": (Hq * D, H), "k": into, "v": into, "o": (H, Hq * D), "gate": (I, H), "up": (I, H), "down": (H, I)}
    return {
        "hidden": make.randn(B, S, H),
        "cos": make.randn(1, S, D),
        "sin": make.randn(1, S, D),
        "k_cache": make.randn(*cache),
        "v_cache": make.randn(*cache),
        "past": past,
        "input_norm": make.randn(H),
        "post_norm": make.randn(H),
        "head_dim": D,
        **linears(make, sizes, int8),
    }
