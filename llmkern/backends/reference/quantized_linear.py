from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate
from llmkern.ops.quantized_linear import packed_of
from llmkern.packed import BLOCK


def rounded_in_blocks(x: Tensor) -> Tensor:
    """x [..., K] as int8 codes in blocks of 32 stand for it, in the dtype that is accumulated in."""
    codes, scale = quantize_int8(x.detach().unflatten(-1, (x.shape[-1] // BLOCK, BLOCK)))
    return (codes * scale.to(accumulate(x).dtype)).flatten(-2)


@implements("quantized_linear", REFERENCE, has_backward=True)
def quantized_linear(x: Tensor, **call: Any) -> Tensor:
    xf = accumulate(x)
    if call["scheme"] == "a8":
        xf = xf + (rounded_in_blocks(x) - xf).detach()  # the value of the rounded x, the gradient of x
    weight = packed_of(call).dequantized().to(xf.dtype)
    bias, residual = (None if call[name] is None else call[name].to(xf.dtype) for name in ("bias", "residual"))
    y = activate(F.linear(xf, weight, bias), call["activation"])
    return (y if residual is None else y + residual).to(x.dtype).contiguous()
