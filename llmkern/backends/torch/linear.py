from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate


@implements("linear", TORCH, has_backward=True)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)
