from __future__ import annotations

from typing import Any


def build(make: Any, M: int, N: int, K: int, *, bias: bool = False) -> dict[str, Any]:
    arguments = {"x": make.randn(M, K), "weight": make.randn(N, K)}
    return arguments | {"bias": make.randn(N)} if bias else arguments
