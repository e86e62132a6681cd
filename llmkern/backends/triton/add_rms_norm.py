from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, refuse_forward


@serves("add_rms_norm", has_backward=True, refuse=refuse_forward)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    out, _, total = norm(x, residual, weight, bias, eps, weight_offset)
    return out, total
