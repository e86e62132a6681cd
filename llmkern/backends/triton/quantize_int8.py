from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton._launch import as_rows, launch, next_power_of_2, warps

MAX_BLOCK = 4096


@serves("quantize_int8")
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    return row_codes(x, None)


def row_codes(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """(q, scale) of x, or of silu(x)·up."""
    from llmkern.backends.triton._kernels.quantize_int8 import quantize_int8_kernel

    hidden = x.shape[-1]
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    make_scale = torch.empty if hidden else torch.zeros  # a row without columns has scale 0
    scale = make_scale((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if q.numel() == 0:
        return q, scale
    xs = as_rows(x)
    ups = as_rows(up) if up is not None else None
    rows = xs.shape[0]
    block = min(next_power_of_2(hidden), MAX_BLOCK)
    rows_at_once = max(1, min(2048 // block, next_power_of_2(rows)))
    launch(
        quantize_int8_kernel,
        (-(-rows // rows_at_once), 1, 1),
        xs,
        ups,
        q,
        scale,
        rows,
        hidden,
        xs.stride(0),
        0 if ups is None else ups.stride(0),
        WHOLE=hidden <= block,
        ROWS=rows_at_once,
        BLOCK=block,
        num_warps=warps(block * rows_at_once),
    )
    return q, scale
