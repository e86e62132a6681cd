"""Gradients of a head and its loss by autograd, for losses of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmkern.ops._linear_loss import LinearCrossEntropy, LinearJsd, Outputs

__all__ = ["with_gradients"]


def with_gradients(
    call: LinearCrossEntropy | LinearJsd,
    weight: Tensor,
    losses: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Outputs:
    """Return loss, dhidden, dweight and dbias, with 0 elements if not wanted.

    weight: of the head, in floating point.  losses: computes each row's from hidden, weight and bias.  With gradients
    of its own an op is asked for them without autograd.
    """

    def reduced(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        rows = losses(x, w, b)
        return rows.sum() if call.reduction == "sum" else rows

    found = [call.hidden.new_empty(0) for _ in range(3)]
    if not (call.hidden_grad or call.weight_grad):
        return reduced(call.hidden, weight, call.bias), found[0], found[1], found[2]
    with torch.enable_grad():
        x, w = call.hidden.detach().requires_grad_(call.hidden_grad), weight.detach().requires_grad_(call.weight_grad)
        b = None if call.bias is None else call.bias.detach().requires_grad_(call.weight_grad)
        loss = reduced(x, w, b)
    wanted = {i: t for i, t in enumerate((x, w, b)) if t is not None and t.requires_grad}
    for i, gradient in zip(wanted, torch.autograd.grad(loss.sum(), list(wanted.values())), strict=True):
        found[i] = gradient.contiguous()
    return loss.detach(), found[0], found[1], found[2]
