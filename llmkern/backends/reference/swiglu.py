from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements


@implements("swiglu", REFERENCE, has_backward=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    g, u = accumulate(gate), accumulate(up)
    return (g * torch.sigmoid(g) * u).to(gate.dtype).contiguous()


@implements("swiglu_backward", REFERENCE, has_backward=True)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(g): dgate = dy·up·s·(1 + g·(1 − s)), dup = dy·g·s."""
    d, g, u = accumulate(dy), accumulate(gate), accumulate(up)
    s = torch.sigmoid(g)
    dgate = d * u * s * (1 + g * (1 - s))
    return dgate.to(gate.dtype).contiguous(), (d * g * s).to(up.dtype).contiguous()
