from __future__ import annotations

from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate


@implements("linear", REFERENCE, has_backward=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = accumulate(x) @ accumulate(weight).mT
    if bias is not None:
        y = y + accumulate(bias)
    return activate(y, activation).to(x.dtype).contiguous()
