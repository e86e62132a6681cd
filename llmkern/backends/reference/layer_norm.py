from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements


def _standardize(xf: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean)·rstd, and rstd; the variance from the centred values, so that a large mean costs no digits."""
    centred = xf - xf.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


@implements("layer_norm", REFERENCE, has_backward=True)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y, _ = _standardize(accumulate(x), eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous()


@implements("layer_norm_backward", REFERENCE, has_backward=True)
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """With n the standardized x and g = dy·weight: dx = rstd·(g − mean(g) − n·mean(g·n))."""
    dyf = accumulate(dy)
    normed, rstd = _standardize(accumulate(x), eps)
    g = dyf if weight is None else dyf * weight.to(dyf.dtype)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    dweight = x.new_empty(0) if weight is None else (dyf * normed).sum(rows).to(weight.dtype)
    dbias = x.new_empty(0) if bias is None else dyf.sum(rows).to(bias.dtype)
    return dx.to(x.dtype).contiguous(), dweight, dbias
