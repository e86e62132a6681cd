"""Arguments that the launchers of attention share: shapes and strides as the kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.triton._launch import next_power_of_2

MAX_DIM = 256
WIDEST = 2**30
"""Keys that a window sees to one side: it hides nothing then, and added to a position it stays within 32 bits."""


def refuse_dims(k: Tensor, v: Tensor) -> str | None:
    """Return the sentence for head dimensions that the tiles do not hold, or None."""
    for name, tensor in (("k", k), ("v", v)):
        if not 0 < tensor.shape[3] <= MAX_DIM:
            return f"{name} has head dimension {tensor.shape[3]}; 1 to {MAX_DIM} are taken"
    return None


def head_dims(dim: int, dim_v: int) -> dict[str, int]:
    """The head dimensions, and the powers of two that tiles have for them: tensor cores take no fewer than 16."""
    padded = next_power_of_2(max(dim, 16))
    padded_v = padded if dim_v == dim else next_power_of_2(max(dim_v, 16))
    return {"DIM": dim, "DIM_V": dim_v, "PADDED": padded, "PADDED_V": padded_v}


def shape_class(dtype: torch.dtype, dims: dict[str, int]) -> str:
    """The class of configurations: a tile's size follows from the head dimensions and the bytes of an element."""
    return f"{'fp32' if dtype == torch.float32 else 'half'}-{max(dims['PADDED'], dims['PADDED_V'], 64)}"


def with_strides(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """(x, its strides but the last) with a last dimension of stride 1: itself, or a copy."""
    strides = x.stride()
    if strides[-1] != 1 and x.shape[-1] != 1:
        x = x.contiguous()
        strides = x.stride()
    return x, strides[:-1]


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as uint8, any other as it is."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Four strides, 0 where the mask is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple([0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)])


def features(
    attn_mask: Tensor | None, causal: bool, window: Sequence[int], softcap: float
) -> tuple[tuple[int, int], dict[str, Any]]:
    """((left, right), the kernels' switches); causality is a window that ends at the query's own key."""
    left, right = min(window[0], WIDEST), 0 if causal else min(window[1], WIDEST)
    return (left, right), {
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "SOFTCAP": softcap > 0,
        "ADDITIVE": attn_mask is not None and attn_mask.dtype != torch.bool,
    }
