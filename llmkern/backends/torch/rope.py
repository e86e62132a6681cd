from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference.rope import per_dimension, rotate
from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements


@implements("rope", TORCH, has_backward=True)
def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """In the promoted dtype of x and cos, as transformers' apply_rotary_pos_emb, but in place on one temporary."""
    cos, sin = per_dimension(cos, rotary_dim, interleaved), per_dimension(sin, rotary_dim, interleaved)
    dtype = torch.promote_types(q.dtype, cos.dtype)

    def one(x: Tensor) -> Tensor:
        whole = rotary_dim == x.shape[-1]
        part = (x if whole else x[..., :rotary_dim]).to(dtype)
        turned = rotate(part, interleaved).mul_(sin).addcmul_(part, cos).to(x.dtype)
        return turned if whole else torch.cat((turned, x[..., rotary_dim:]), -1)

    return one(q), one(k)
