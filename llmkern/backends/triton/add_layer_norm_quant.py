from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, refuse_forward


@serves("add_layer_norm_quant", refuse=refuse_forward)
def add_layer_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return norm(x, residual, weight, bias, eps, layer=True, quant=True)
