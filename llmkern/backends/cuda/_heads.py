"""What the attention kernels of csrc/cuda take, and the sentences for what they do not."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu.attention_decode import refuse_heads as refuse_vectors

__all__ = ["DTYPES", "MAX_LENGTH", "refuse_heads"]

DTYPES = (torch.float16, torch.bfloat16)
MAX_LENGTH = 2**29
"""Keys and queries of a sequence are counted in 32 bits."""


def refuse_heads(sinks: Tensor | None, **vectors: Tensor) -> str | None:
    """None where tensor cores can be fed with these [..., D]: D in their units, each vector at a multiple of 16 bytes.

    A tensor whose first element is elsewhere cannot be told from its form: the operator itself leaves it to the
    reference.
    """
    reason = refuse_vectors(sinks, **vectors)
    if reason is not None:
        return reason
    for name, tensor in vectors.items():
        if tensor.shape[3] == 0 or tensor.shape[3] % 8:
            return f"{name} has head dimension {tensor.shape[3]}; only multiples of 8 are taken"
        for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False):
            if size > 1 and stride * tensor.element_size() % 16:
                return (
                    f"{name} has vectors {stride * tensor.element_size()} bytes apart; only multiples of 16 are taken"
                )
    return None
