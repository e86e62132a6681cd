from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._norm import norm, norm_backward, refuse_backward, refuse_forward


@serves("layer_norm", has_backward=True, refuse=refuse_forward)
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return norm(x, None, weight, bias, eps, layer=True)[0]


@serves("layer_norm_backward", refuse=refuse_backward)
def layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_backward(dy, x, weight, bias, eps, layer=True)
