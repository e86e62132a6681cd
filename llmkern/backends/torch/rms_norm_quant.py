from __future__ import annotations

from torch import Tensor

from llmkern.backends.reference import accumulate
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.quantize_int8 import quantize_int8, refuse_empty_rows
from llmkern.backends.torch.rms_norm import rms_norm
from llmkern.dispatch import implements


@implements("rms_norm_quant", TORCH, refuse=refuse_empty_rows)
def rms_norm_quant(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return quantize_int8(rms_norm(accumulate(x), weight, bias, eps, weight_offset))
