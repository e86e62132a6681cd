from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, refuse_forward


@serves("layer_norm_quant", refuse=refuse_forward)
def layer_norm_quant(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    q, scale, _ = norm(x, None, weight, bias, eps, layer=True, quant=True)
    return q, scale
