from __future__ import annotations

from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.backends.reference.rms_norm import rms_norm
from llmkern.dispatch import implements


@implements("rms_norm_quant", REFERENCE)
def rms_norm_quant(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return quantize_int8(rms_norm(accumulate(x), weight, bias, eps, weight_offset))
