from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference.quantize_int8 import ZERO_ROW
from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


def refuse_empty_rows(x: Tensor, **_: object) -> str | None:
    return "the largest of no elements has no value" if x.shape[-1] == 0 else None


@implements("quantize_int8", TORCH, refuse=refuse_empty_rows)
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition with one fp32 temporary: the maximum is exact in x's own dtype, and x * inv promotes."""
    amax = x.abs().amax(-1, keepdim=True)
    amax = amax if x.dtype == torch.float64 else amax.float()
    limit = torch.full_like(amax, 127.0)
    scale = torch.where(amax < ZERO_ROW, torch.zeros_like(amax), amax / limit).float()
    inv = torch.where(scale.isfinite() & (scale > 0), limit / amax, torch.zeros_like(amax))
    # Infinity and NaN times 0 are NaN, whose cast to an integer is undefined; |x| * inv never rounds beyond 127.
    codes = torch.mul(x, inv).round_().nan_to_num_(nan=0.0)
    return codes.to(torch.int8).contiguous(), scale.contiguous()
