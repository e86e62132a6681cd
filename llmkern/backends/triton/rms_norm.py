from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, norm_backward, refuse_backward, refuse_forward


@serves("rms_norm", has_backward=True, refuse=refuse_forward)
def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    return norm(x, None, weight, bias, eps, weight_offset)[0]


@serves("rms_norm_backward", refuse=refuse_backward)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backward(dy, x, weight, bias, eps, weight_offset)
