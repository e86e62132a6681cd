from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> str | None:
    if w_q.stride(1) != 1 and w_q.shape[1] > 1:
        return f"the rows of w_q have stride {w_q.stride(1)}; only 1 is taken"
    for name, parameter in (("w_scale", w_scale), ("bias", bias)):
        if parameter is not None and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    if bias is not None and bias.dtype not in DTYPES:
        return f"bias is {bias.dtype}; float32, bfloat16 and float16 are taken"
    return None


implements("int8_linear", CPU, dtypes=DTYPES, has_backward=True, refuse=_refuse)(native("int8_linear"))
