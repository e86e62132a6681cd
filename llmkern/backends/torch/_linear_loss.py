"""Gradients of a head and its loss by autograd, for losses of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["with_gradients"]

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def with_gradients(
    forward: Callable[[Tensor, Tensor, Tensor | None], _Outputs],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_grad: bool,
    weight_grad: bool,
) -> _Outputs:
    """Return loss, dhidden, dweight and dbias, with 0 elements if not wanted, of `forward(hidden, weight, bias)`.

    forward: computes the loss, and three gradients of 0 elements.
    """
    with torch.enable_grad():
        x, w = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
        b = None if bias is None else bias.detach().requires_grad_(weight_grad)
        loss, *found = forward(x, w, b)
    wanted = {i: t for i, t in enumerate((x, w, b)) if t is not None and t.requires_grad}
    for i, gradient in zip(wanted, torch.autograd.grad(loss.sum(), list(wanted.values())), strict=True):
        found[i] = gradient.contiguous()
    return loss.detach(), found[0], found[1], found[2]
