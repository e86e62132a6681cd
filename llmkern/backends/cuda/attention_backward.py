from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cuda import CUDA
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, v: Tensor, sinks: Tensor | None, **_: object) -> str | None:
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] % 8 or not 8 <= tensor.shape[3] <= 256:
            return f"{name} has head dimension {tensor.shape[3]}; multiples of 8 up to 256 are taken"
    if sinks is not None and sinks.dtype not in DTYPES:
        return f"sinks is {sinks.dtype}; float32, bfloat16 and float16 are taken"
    if sinks is not None and not sinks.is_contiguous():
        return "sinks is not contiguous"
    return None


implements("attention_backward", CUDA, dtypes=(torch.bfloat16, torch.float16), min_capability=(8, 0), refuse=_refuse)(
    native("attention_backward")
)
