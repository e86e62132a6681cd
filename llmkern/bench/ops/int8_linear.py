from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import llmkern.why.int8_linear as why
from llmkern.bench.ops._linear import linear_sweeps
from llmkern.bench.sweep import Work, tensor_bytes

SWEEPS = linear_sweeps()


def build(make: Any, M: int, N: int, K: int) -> dict[str, Any]:
    """Scales as a real weight's: positive, and small enough that results are of size 1."""
    arguments = why.build(make, M, N, K)
    return arguments | {"w_scale": arguments["w_scale"].abs().add_(0.5) / (75.0 * K**0.5)}


def work(call: Mapping[str, Any], out: Tensor) -> Work:
    """Weight-only products are bounded by the rate of the activations' dtype."""
    n = call["w_q"].shape[0]
    dtype = "int8" if call["scheme"] == "w8a8" else str(call["x"].dtype).removeprefix("torch.")
    return Work(tensor_bytes([*call.values(), out]), 2 * call["x"].numel() * n, dtype)
