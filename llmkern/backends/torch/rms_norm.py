from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("rms_norm", TORCH, has_backward=True)
def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    if weight is None or (weight_offset == 0.0 and weight.dtype == x.dtype):
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
    else:
        # 1 + w loses w's low bits in half precision, so models with an offset multiply in fp32.
        y = (F.rms_norm(x.float(), x.shape[-1:], weight.float() + weight_offset, eps)).to(x.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.contiguous()
