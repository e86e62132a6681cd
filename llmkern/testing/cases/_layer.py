"""Linear layers and masks of whole transformer layers."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.testing.case import Call, Make


def linear(make: Make, name: str, rows: int, columns: int, *, int8: bool, bias: bool) -> Call:
    """<name>_weight, <name>_scale and <name>_bias of a layer that keeps the size of what goes through it."""
    spread = columns**-0.5
    weight = make.randn(rows, columns, scale=spread)
    scale = None
    if int8:
        weight = make.randint(-127, 128, rows, columns, dtype=torch.int8)
        scale = make.randn(rows, 1, dtype=torch.float32, scale=0.1, offset=1.0).abs() * (spread / 73)
    return {
        f"{name}_weight": weight,
        f"{name}_scale": scale,
        f"{name}_bias": make.randn(rows, scale=0.3) if bias else None,
    }


def left_padding(make: Make, queries: int, keys: int, lengths: tuple[int, ...]) -> Tensor:
    """bool [B, 1, queries, keys]: causal, and the last `lengths` keys of each sequence are real."""
    position = make.tensor(range(keys), torch.int64)
    real = position >= keys - make.tensor(lengths, torch.int64)[:, None]
    visible = position <= (position[-queries:])[:, None]
    return real[:, None, None] & visible[None, None]
