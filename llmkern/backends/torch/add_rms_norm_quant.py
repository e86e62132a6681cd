from __future__ import annotations

from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch.quantize_int8 import refuse_empty_rows
from llmkern.backends.torch.rms_norm_quant import rms_norm_quant
from llmkern.dispatch import implements


@implements("add_rms_norm_quant", TORCH, refuse=refuse_empty_rows)
def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    total = (x + residual).contiguous()
    return *rms_norm_quant(total, weight, bias, eps, weight_offset), total
