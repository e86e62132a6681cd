from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("gelu", TORCH, has_backward=True)
def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate).contiguous()
