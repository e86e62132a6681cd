from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements


@implements("rms_norm", REFERENCE, has_backward=True)
def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    xf = accumulate(x)
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous()


@implements("rms_norm_backward", REFERENCE, has_backward=True)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With r = 1/sqrt(mean(x²) + eps), n = x·r and g = dy·(weight + offset): dx = r·(g − n·mean(g·n))."""
    xf, dyf = accumulate(x), accumulate(dy)
    rstd = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    normed = xf * rstd
    g = dyf if weight is None else dyf * (weight.to(dyf.dtype) + weight_offset)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    dweight = x.new_empty(0) if weight is None else (dyf * normed).sum(rows).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else dyf.sum(rows).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias
