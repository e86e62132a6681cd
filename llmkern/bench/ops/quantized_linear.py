from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

import llmkern.why.quantized_linear as why
from llmkern.bench.ops._linear import linear_sweeps
from llmkern.bench.sweep import Work, tensor_bytes
from llmkern.packed import CODES

_LAYERS = linear_sweeps()
SWEEPS = (
    *[
        replace(sweep, title=f"{sweep.title} {code}", options={"code": code, "group": group})
        for code, group in (("s4", 32), ("s8", 32))
        for sweep in _LAYERS
    ],
    # Weight-only, as a TPU computes it: one layer is enough beside those above.
    replace(
        _LAYERS[1],
        title=f"{_LAYERS[1].title} s4 a16",
        options={"code": "s4", "group": 128, "scheme": "a16"},
        quick=(),
    ),
)


def build(make: Any, M: int, N: int, K: int, *, code: str = "s4", group: int = 32) -> dict[str, Any]:
    """Scales as a real weight's: positive, and small enough that results are of size 1."""
    arguments = why.build(make, M, N, K, code=code, group=group)
    size = 2 ** (CODES[code].bits - 1) * 0.58
    return arguments | {"scale": arguments["scale"].abs().add_(0.5) / (size * K**0.5)}


def work(call: Mapping[str, Any], out: Tensor) -> Work:
    """Weight-only products are bounded by the rate of the activations' dtype."""
    dtype = "int8" if call["scheme"] == "a8" else str(call["x"].dtype).removeprefix("torch.")
    return Work(tensor_bytes([*call.values(), out]), 2 * call["x"].numel() * call["n"], dtype)
