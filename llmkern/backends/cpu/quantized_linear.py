from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors
from llmkern.dispatch import implements
from llmkern.library import native

GROUPS = ("scale", "zero", "offset", "super_scale", "super_offset")


def _refuse(
    x: Tensor, codes: Tensor, scheme: str, bias: Tensor | None, residual: Tensor | None, **call: Any
) -> str | None:
    if scheme == "a16":
        return "scheme is 'a16'; the kernels multiply integers, x rounded in blocks of 32 ('a8')"
    for name in ("codes", *GROUPS):
        tensor = codes if name == "codes" else call[name]
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}; float32, bfloat16 and float16 are taken"
    if residual is not None and residual.dtype not in DTYPES:
        return f"residual is {residual.dtype}; float32, bfloat16 and float16 are taken"
    return refuse_vectors(bias=bias)


implements("quantized_linear", CPU, dtypes=DTYPES, has_backward=True, refuse=_refuse, rows_alone="always")(
    native("quantized_linear")
)
