"""What the CPU kernels of whole layers cannot read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES

MAX_HEAD_DIM = 256


def refuse_linears(names: tuple[str, ...], hidden: Tensor, tensors: dict[str, Any]) -> str | None:
    """The sentence why one of these linear layers is not taken, or None."""
    for name in names:
        weight, scale, bias = (tensors[f"{name}_{part}"] for part in ("weight", "scale", "bias"))
        if weight.stride(1) != 1 and weight.shape[1] > 1:
            return f"the rows of {name}_weight have stride {weight.stride(1)}; only 1 is taken"
        if bias is not None and bias.dtype != hidden.dtype:
            return f"{name}_bias is {bias.dtype}; only hidden's {hidden.dtype} is taken"
        for part, tensor in (("scale", scale), ("bias", bias)):
            if tensor is not None and not tensor.is_contiguous():
                return f"{name}_{part} is not contiguous"
    return None


def refuse_vectors(head_dim: int, mask: Tensor | None, vectors: dict[str, Tensor | None]) -> str | None:
    """The sentence why the heads, the mask or a norm's parameter is not taken, or None."""
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}; at most {MAX_HEAD_DIM} is taken"
    if mask is not None and mask.dtype not in (torch.bool, *DTYPES):
        return f"mask is {mask.dtype}; bool, float32, bfloat16 and float16 are taken"
    for name, vector in vectors.items():
        if vector is not None and vector.dtype not in DTYPES:
            return f"{name} is {vector.dtype}; float32, bfloat16 and float16 are taken"
        if vector is not None and vector.stride(-1) != 1 and vector.shape[-1] > 1:
            return f"the last dimension of {name} has stride {vector.stride(-1)}; only 1 is taken"
    return None
