from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("swiglu", TORCH, has_backward=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).contiguous()


@implements("swiglu_backward", TORCH)
def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate = torch.ops.aten.silu_backward(dy * up, gate)
    return dgate.contiguous(), (dy * F.silu(gate)).contiguous()
