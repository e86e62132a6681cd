from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements

ZERO_ROW = 2.0**-118
"""A row whose largest magnitude is below this has scale 0; see the public function."""


@implements("quantize_int8", REFERENCE)
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    xf = accumulate(x)
    if x.shape[-1] == 0:
        return x.new_empty(x.shape, dtype=torch.int8), x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)
    amax = xf.abs().amax(-1, keepdim=True)
    # A tensor, because torch divides by a Python number (and a number by a tensor) through the reciprocal.
    limit = torch.full_like(amax, 127.0)
    scale = torch.where(amax < ZERO_ROW, torch.zeros_like(amax), amax / limit).float()
    codes = (xf * (limit / amax)).round().clamp(-127, 127)
    usable = scale.isfinite() & (scale > 0)
    return torch.where(usable, codes, torch.zeros_like(codes)).to(torch.int8).contiguous(), scale.contiguous()
