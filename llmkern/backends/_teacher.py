"""The teacher's logits of a divergence, as each backend of PyTorch's operators makes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spread"]


def spread(logits: Tensor, which: Tensor | None, words: int) -> Tensor:
    """Return logits [N, words]: the given ones if `which` is None, else those [N, K] of the words `which` [N, K], and
    −inf for all other words.
    """
    if which is None:
        return logits
    nothing = logits.new_full((logits.shape[0], words), -torch.inf)
    return nothing.scatter_reduce_(1, which, logits, "amax")
