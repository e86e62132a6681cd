"""Dtypes that the native row kernels take, and the sentences for what they refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "refuse_norm", "refuse_norm_backward", "refuse_strided"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuse_strided(**tensors: Tensor) -> str | None:
    """Return which tensor's last dimension is not contiguous, or None."""
    for name, tensor in tensors.items():
        if tensor.dim() > 0 and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"{name}'s last dimension has stride {tensor.stride(-1)}; only 1 is taken"
    return None


def refuse_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, **_: object
) -> str | None:
    """Return why a normalisation cannot take the call, or None."""
    reason = refuse_strided(x=x) if residual is None else refuse_strided(x=x, residual=residual)
    if reason is not None:
        return reason
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}; float32, bfloat16 and float16 are taken"
        if parameter is not None and not parameter.is_contiguous():
            return f"{name} is not contiguous"
    return None


def refuse_norm_backward(dy: Tensor, **call: Any) -> str | None:
    """Return why the gradient of a normalisation cannot take the call, or None."""
    return refuse_strided(dy=dy) or refuse_norm(**call)
