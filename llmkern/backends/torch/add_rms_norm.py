from __future__ import annotations

from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch.rms_norm import rms_norm
from llmkern.dispatch import implements


@implements("add_rms_norm", TORCH, has_backward=True)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    total = (x + residual).contiguous()
    return rms_norm(total, weight, bias, eps, weight_offset), total
