"""Launchers of the normalisations: every norm op is one call of `norm` or `norm_backward`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends.triton._launch import (
    Kernel,
    as_rows,
    contiguous_like,
    launch,
    next_power_of_2,
    scales_like,
    target_of,
    warps,
)

NORM_KERNEL = Kernel("norm", "norm_kernel")
NORM_BACKWARD_KERNEL = Kernel("norm", "norm_backward_kernel")
SUM_PARTIALS_KERNEL = Kernel("norm", "sum_partials_kernel")

MAX_HIDDEN = 16384
"""More columns than this do not fit in one program's registers."""
MAX_HIDDEN_BACKWARD = 8192
"""The backward holds two sums per column besides."""
PROGRAMS_PER_MULTIPROCESSOR = 4


def refuse_forward(x: Tensor, **_: object) -> str | None:
    """Return the sentence for rows longer than one program takes, or None."""
    return _refuse_wide(x, MAX_HIDDEN)


def refuse_backward(x: Tensor, **_: object) -> str | None:
    """Like `refuse_forward`, for the gradient."""
    return _refuse_wide(x, MAX_HIDDEN_BACKWARD)


def _refuse_wide(x: Tensor, limit: int) -> str | None:
    if x.shape[-1] > limit:
        return f"hidden size {x.shape[-1]} is larger than {limit}, which one program's registers hold"
    return None


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    layer: bool = False,
    quant: bool = False,
) -> tuple[Tensor, Any, Any]:
    """(norm or its codes, scale or None, x + residual or None), contiguous, in x's shape."""
    out = contiguous_like(x, torch.int8 if quant else None)
    scale = scales_like(x) if quant else None
    total = contiguous_like(x) if residual is not None else None
    elements = x.numel()
    if elements == 0:
        return out, scale, total
    hidden = x.shape[-1]
    rows = elements // hidden
    xs, stride = as_rows(x)
    residuals, residual_stride = as_rows(residual) if residual is not None else (None, 0)
    block = next_power_of_2(hidden)
    rows_at_once = max(1, min(2048 // block, next_power_of_2(rows)))
    launch(
        NORM_KERNEL,
        (-(-rows // rows_at_once), 1, 1),
        xs,
        residuals,
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        out,
        total,
        scale,
        rows,
        hidden,
        stride,
        residual_stride,
        eps,
        weight_offset,
        LAYER=layer,
        QUANT=quant,
        ROWS=rows_at_once,
        BLOCK=block,
        num_warps=warps(block * rows_at_once),
    )
    return out, scale, total


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    *,
    layer: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); a gradient of a parameter that is None has 0 elements."""
    dx = contiguous_like(x)
    if x.numel() == 0:
        return dx, _no_gradient(x, weight), _no_gradient(x, bias)
    (xs, stride), (dys, dy_stride) = as_rows(x), as_rows(dy)
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    block = next_power_of_2(hidden)
    rows_at_once = max(1, min(1024 // block, next_power_of_2(rows)))
    programs = min(-(-rows // rows_at_once), target_of(x).multiprocessors * PROGRAMS_PER_MULTIPROCESSOR)
    dweight, dbias = (
        None if parameter is None else torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
        for parameter in (weight, bias)
    )
    launch(
        NORM_BACKWARD_KERNEL,
        (programs, 1, 1),
        dys,
        xs,
        weight if weight is None else weight.contiguous(),
        dx,
        dweight,
        dbias,
        rows,
        hidden,
        dy_stride,
        stride,
        eps,
        weight_offset,
        LAYER=layer,
        ROWS=rows_at_once,
        BLOCK=block,
        num_warps=warps(block * rows_at_once),
    )
    return dx, _sum(dweight, x, weight), _sum(dbias, x, bias)


def _no_gradient(x: Tensor, parameter: Tensor | None) -> Tensor:
    return x.new_empty(0) if parameter is None else torch.zeros_like(parameter)


def _sum(partial: Tensor | None, x: Tensor, parameter: Tensor | None) -> Tensor:
    if partial is None or parameter is None:
        return x.new_empty(0)
    out = torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device)
    programs, hidden = partial.shape
    launch(
        SUM_PARTIALS_KERNEL, (-(-hidden // 64), 1, 1), partial, out, programs, hidden, ROWS=32, BLOCK=64, num_warps=4
    )
    return out
