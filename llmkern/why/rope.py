from __future__ import annotations

from typing import Any


def build(make: Any, B: int, Hq: int, Hkv: int, S: int, D: int) -> dict[str, Any]:
    angles = make.randn(1, S, D)
    return {"q": make.randn(B, Hq, S, D), "k": make.randn(B, Hkv, S, D), "cos": angles, "sin": angles}
