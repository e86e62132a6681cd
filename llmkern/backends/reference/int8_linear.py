from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate


@implements("int8_linear", REFERENCE, has_backward=True)
def int8_linear(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> Tensor:
    xf = accumulate(x)
    if scheme == "w8a8":
        codes, scale = quantize_int8(x.detach())
        rounded = codes * scale.to(xf.dtype)
        xf = xf + (rounded - xf).detach()  # the value of the rounded activations, the gradient of x
    weight = w_q.to(xf.dtype) * w_scale.to(xf.dtype)
    y = F.linear(xf, weight, None if bias is None else bias.to(xf.dtype))
    return activate(y, activation).to(x.dtype).contiguous()
