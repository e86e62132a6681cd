from __future__ import annotations

from typing import Any

import torch


def build(make: Any, M: int, N: int, K: int, *, bias: bool = False) -> dict[str, Any]:
    arguments = {
        "x": make.randn(M, K),
        "w_q": make.randint(-127, 128, N, K, dtype=torch.int8),
        "w_scale": make.randn(N, 1, dtype=torch.float32),
    }
    return arguments | {"bias": make.randn(N)} if bias else arguments
