from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements


def per_dimension(values: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """cos or sin as [B or 1, 1, S, rotary_dim]; one value per pair is given to both dimensions of the pair."""
    if values.shape[-1] != rotary_dim:
        values = values.repeat_interleave(2, -1) if interleaved else torch.cat((values, values), -1)
    return values.unsqueeze(1)


def rotate(x: Tensor, interleaved: bool) -> Tensor:
    """A quarter turn of each pair: (a, b) → (−b, a); a new contiguous tensor."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


@implements("rope", REFERENCE, has_backward=True)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        xf = accumulate(x)[..., :rotary_dim]
        c, s = (per_dimension(v, rotary_dim, interleaved).to(xf.dtype) for v in (cos, sin))
        turned = xf * c + rotate(xf, interleaved) * s
        return torch.cat((turned.to(x.dtype), x[..., rotary_dim:]), -1)

    return one(q), one(k)
