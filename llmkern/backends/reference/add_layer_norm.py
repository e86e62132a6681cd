from __future__ import annotations

from torch import Tensor

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference.layer_norm import layer_norm
from llmkern.dispatch import implements


@implements("add_layer_norm", REFERENCE, has_backward=True)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = (x + residual).contiguous()
    return layer_norm(total, weight, bias, eps), total
