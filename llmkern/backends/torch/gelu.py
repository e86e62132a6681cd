from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("gelu", TORCH, has_backward=True)
def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate).contiguous()


@implements("gelu_backward", TORCH, has_backward=True)
def gelu_backward(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate).contiguous()
