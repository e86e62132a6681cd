from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, refuse_forward


@serves("rms_norm_quant", refuse=refuse_forward)
def rms_norm_quant(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    q, scale, _ = norm(x, None, weight, bias, eps, weight_offset, quant=True)
    return q, scale
