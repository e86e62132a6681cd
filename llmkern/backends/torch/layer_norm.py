from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("layer_norm", TORCH, has_backward=True)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if all([parameter is None or parameter.dtype == x.dtype for parameter in (weight, bias)]):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()
    # PyTorch takes parameters of another dtype on some devices only; fp32 holds every half-precision one.
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    weight, bias = (None if parameter is None else parameter.to(wide) for parameter in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(x.dtype).contiguous()
