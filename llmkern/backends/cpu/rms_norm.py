from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.dispatch import implements
from llmkern.library import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuse(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float) -> str | None:
    if x.dim() > 0 and x.stride(-1) != 1 and x.shape[-1] > 1:
        return f"x's last dimension has stride {x.stride(-1)}; only 1 is taken"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; float32, bfloat16 and float16 are taken"
        if parameter is not None and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return None


implements("rms_norm", CPU, dtypes=DTYPES, has_backward=True, refuse=_refuse)(native("rms_norm"))
