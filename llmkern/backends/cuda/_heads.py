"""Limits of the attention kernels of csrc/cuda, and the sentences for what they refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import refuse_strided
from llmkern.backends.cpu.attention_decode import refuse_long, refuse_sinks

__all__ = ["DTYPES", "MAX_LENGTH", "copies_of", "refuse_dims", "refuse_heads", "refuse_lengths"]

DTYPES = (torch.float16, torch.bfloat16)
MAX_LENGTH = 2**29
"""Keys and queries of a sequence are counted in 32 bits."""


def refuse_lengths(q: Tensor, k: Tensor) -> str | None:
    """Return why the kernels cannot count these keys, or queries of all heads, or None."""
    if k.shape[2] > MAX_LENGTH or q.shape[:3].numel() > MAX_LENGTH:
        return f"{k.shape[2]} keys, {q.shape[:3].numel()} queries of all heads; at most {MAX_LENGTH} of each are taken"
    return None


def refuse_dims(**vectors: Tensor) -> str | None:
    """Return why these head dimensions do not fit the units of tensor cores, or None."""
    if reason := refuse_long(**vectors):
        return reason
    for name, tensor in vectors.items():
        if tensor.shape[3] == 0 or tensor.shape[3] % 8:
            return f"{name} has head dimension {tensor.shape[3]}; only multiples of 8 are taken"
    return None


def refuse_heads(sinks: Tensor | None, **vectors: Tensor) -> str | None:
    """Return why tensor cores cannot be fed with these [..., D], or None: D must be in their units, each vector at a
    multiple of 16 bytes.

    A tensor whose first element is elsewhere cannot be told from its form: the operator computes with a copy, which
    `copies_of` has the sentence for.
    """
    reason = refuse_dims(**vectors) or refuse_sinks(sinks) or refuse_strided(**vectors)
    if reason is not None:
        return reason
    for name, tensor in vectors.items():
        for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False):
            if size > 1 and stride * tensor.element_size() % 16:
                return (
                    f"{name} has vectors {stride * tensor.element_size()} bytes apart; only multiples of 16 are taken"
                )
    return None


def copies_of(**vectors: Tensor) -> str | None:
    """Return which tensors the operator copies, because tensor cores cannot load from their address, or None."""
    late = [f"{name} begins {tensor.data_ptr() % 16}" for name, tensor in vectors.items() if tensor.data_ptr() % 16]
    return f"{', '.join(late)} bytes past a multiple of 16, so the kernel computes with a copy" if late else None
