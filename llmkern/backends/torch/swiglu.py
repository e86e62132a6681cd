from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("swiglu", TORCH, has_backward=True)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate) * up).contiguous()
