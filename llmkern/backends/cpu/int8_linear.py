from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implements
from llmkern.library import native

MAX_ROWS = {"w8a8": 32, "w8a16": 64}
"""As far as it is faster than PyTorch at every size tried.  Measured on two cores with VNNI and AMX, µs, native /
PyTorch: W8A8 in fp32, 32 rows by 576² 65/110, by 4096² 1628/1715; 64 rows 106/145 and 2694/2222.  Weight-only in bf16,
where PyTorch dequantizes the weight first, 64 rows by 576² 213/225, by 4096² 9006/11109; 96 rows 309/266 and
13644/12024."""


def _refuse(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> str | None:
    rows = x.shape[:-1].numel()
    if rows > MAX_ROWS[scheme]:
        return f"x has {rows} rows; at most {MAX_ROWS[scheme]} are taken in {scheme}: with more, PyTorch can be faster"
    if w_q.stride(1) != 1 and w_q.shape[1] > 1:
        return f"the rows of w_q have stride {w_q.stride(1)}; only 1 is taken"
    for name, parameter in (("w_scale", w_scale), ("bias", bias)):
        if parameter is not None and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    if bias is not None and bias.dtype not in DTYPES:
        return f"bias is {bias.dtype}; float32, bfloat16 and float16 are taken"
    return None


implements("int8_linear", CPU, dtypes=DTYPES, has_backward=True, refuse=_refuse)(native("int8_linear"))
