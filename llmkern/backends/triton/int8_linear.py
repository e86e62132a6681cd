from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton.int8_matmul import int8_matmul, refuse_parameters
from llmkern.backends.triton.quantize_int8 import quantize_int8


def _refuse(bias: Tensor | None, **_: object) -> str | None:
    return refuse_parameters(bias=bias)


@serves("int8_linear", has_backward=True, refuse=_refuse)
def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> Tensor:
    if scheme == "w8a8":
        codes, scale = quantize_int8(x)
        return int8_matmul(codes, w_q, scale, w_scale, bias, None, activation, x.dtype)
    return int8_matmul(x, w_q, None, w_scale, bias, None, activation, x.dtype)
