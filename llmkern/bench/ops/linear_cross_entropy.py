from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkern.bench.sweep import Sweep, Work, tensor_bytes

SWEEPS = (
    Sweep(
        "SmolLM2-135M's head",
        ("rows",),
        (512, 2048),
        {"words": 49152, "hidden": 576},
        modes=("backward",),
        quick=(2048,),
        check={"rows": 64, "words": 4096},
    ),
)


def work(call: Mapping[str, Any], out: tuple[Any, ...]) -> Work:
    """One product of matrices for the logits, and one for each gradient."""
    hidden, weight = call["hidden"], call["weight"]
    products = 1 + call["hidden_grad"] + call["weight_grad"]
    dtype = str(hidden.dtype).removeprefix("torch.")
    tensors = [hidden, weight, call["labels"], *out]
    return Work(tensor_bytes(tensors), 2 * hidden.numel() * weight.shape[0] * products, dtype)
