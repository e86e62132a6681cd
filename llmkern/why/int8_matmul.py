from __future__ import annotations

from typing import Any

import torch


def build(make: Any, M: int, N: int, K: int, *, bias: bool = False, residual: bool = False) -> dict[str, Any]:
    """The dtype is the result's."""
    arguments = {
        "a_q": make.randint(-127, 128, M, K, dtype=torch.int8),
        "w_q": make.randint(-127, 128, N, K, dtype=torch.int8),
        "a_scale": make.randn(M, 1, dtype=torch.float32),
        "w_scale": make.randn(N, 1, dtype=torch.float32),
        "out_dtype": make.dtype,
    }
    if bias:
        arguments["bias"] = make.randn(N)
    if residual:
        arguments["residual"] = make.randn(M, N)
    return arguments
