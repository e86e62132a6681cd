from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE
from llmkern.dispatch import implements
from llmkern.ops.int8_matmul import activate


@implements("int8_matmul", REFERENCE)
def int8_matmul(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    # Sums of at most 2¹⁷ products below 2¹⁵ are integers below 2³²: float64 holds each one exactly.
    accumulators = (a_q.double() @ w_q.double().mT).to(torch.int32)
    return epilogue(accumulators, a_scale, w_scale, bias, residual, activation, out_dtype)


def epilogue(
    accumulators: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute everything after the accumulation, in fp32, or in fp64 where an argument is fp64."""
    if out_dtype == torch.int32:
        return accumulators.contiguous()
    floating = [t for t in (a_scale, w_scale, bias, residual) if t is not None]
    dtype = torch.float64 if any([t.dtype == torch.float64 for t in floating]) else torch.float32
    y = accumulators.to(dtype)
    # In place on the one fp32 copy: further ones would cost more than the arithmetic.
    if a_scale is not None:
        y.mul_(a_scale)
    if w_scale is not None:
        y.mul_(w_scale.squeeze(-1))
    if bias is not None:
        y.add_(bias)
    y = activate(y, activation)
    if residual is not None:
        y = y.add_(residual)
    return y.to(out_dtype).contiguous()
