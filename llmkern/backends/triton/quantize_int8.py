from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import (
    Kernel,
    as_rows,
    contiguous_like,
    launch,
    next_power_of_2,
    scales_like,
    warps,
)

QUANTIZE_INT8_KERNEL = Kernel("quantize_int8", "quantize_int8_kernel")

MAX_BLOCK = 4096


@serves("quantize_int8")
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    return row_codes(x, None)


def row_codes(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(q, scale) of x, or of silu(x)·up."""
    q, scale = contiguous_like(x, torch.int8), scales_like(x)
    elements = x.numel()
    if elements == 0:
        return q, scale
    hidden = x.shape[-1]
    rows = elements // hidden
    xs, stride = as_rows(x)
    ups, up_stride = as_rows(up) if up is not None else (None, 0)
    block = min(next_power_of_2(hidden), MAX_BLOCK)
    rows_at_once = max(1, min(2048 // block, next_power_of_2(rows)))
    launch(
        QUANTIZE_INT8_KERNEL,
        (-(-rows // rows_at_once), 1, 1),
        xs,
        ups,
        q,
        scale,
        rows,
        hidden,
        stride,
        up_stride,
        WHOLE=hidden <= block,
        ROWS=rows_at_once,
        BLOCK=block,
        num_warps=warps(block * rows_at_once),
    )
    return q, scale
