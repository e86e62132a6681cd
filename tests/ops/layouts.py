"""The same values elsewhere in memory, poison around them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "POISON", "expanded"]

POISON = {torch.bool: True, torch.int8: -128, torch.int32: -(2**31), torch.int64: -(2**62), torch.uint8: 170}  # and NaN


def _placed(x: Tensor, storage: tuple[int, ...], view: Callable[[Tensor], Tensor]) -> Tensor:
    """A copy of x in `view` of a poisoned storage of that shape."""
    poison = POISON.get(x.dtype, math.nan)
    return view(torch.full(storage, poison, dtype=x.dtype)).copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The last two dimensions in the other order in memory."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x.clone()


def sliced(x: Tensor) -> Tensor:
    """Every second element of rows twice as long."""
    return _placed(x, (*x.shape[:-1], 2 * x.shape[-1]), lambda y: y[..., ::2]) if x.dim() else x.clone()


def padded(x: Tensor) -> Tensor:
    """Rows three elements longer than they are said to be."""
    if not x.dim():
        return x.clone()
    return _placed(x, (*x.shape[:-1], x.shape[-1] + 3), lambda y: y[..., : x.shape[-1]])


def offset(x: Tensor) -> Tensor:
    """Contiguous from the second element of the storage on: aligned to one element, and no more."""
    return _placed(x, (x.numel() + 1,), lambda y: y[1:].view(x.shape))


def expanded(x: Tensor) -> Tensor:
    """The first slice of the longest dimension but the last, repeated with a stride of 0.  Other values than x's."""
    if x.dim() < 2 or not x.numel():
        return x.clone()
    dim = max(range(x.dim() - 1), key=lambda d: x.shape[d])
    return x.narrow(dim, 0, 1).clone().expand(x.shape)


LAYOUTS = (torch.clone, transposed, sliced, padded, offset, expanded)
