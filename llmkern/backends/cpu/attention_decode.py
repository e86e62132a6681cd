from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

MAX_HEAD_DIM = 256


def refuse_heads(sinks: Tensor | None, **vectors: Tensor) -> str | None:
    """What both attention kernels refuse: vectors that are long or not contiguous, and sinks of other dtypes."""
    for name, tensor in vectors.items():
        if tensor.shape[3] > MAX_HEAD_DIM:
            return f"{name} has head dimension {tensor.shape[3]}; at most {MAX_HEAD_DIM} is taken"
    if sinks is not None and sinks.dtype not in DTYPES:
        return f"sinks is {sinks.dtype}; float32, bfloat16 and float16 are taken"
    if sinks is not None and not sinks.is_contiguous():
        return "sinks is not contiguous"
    return refuse_strided(**vectors)


def _refuse(q: Tensor, k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    return refuse_heads(sinks, q=q, k_cache=k_cache, v_cache=v_cache)


implements("attention_decode", CPU, dtypes=DTYPES, refuse=_refuse)(native("attention_decode"))
