"""Gradients of a head from those of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import accumulate
from llmkern.ops._linear_loss import LinearCrossEntropy, LinearJsd, Outputs

__all__ = ["head_logits", "with_gradients"]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits; products of half-precision operands give half-precision logits."""
    logits = accumulate(hidden) @ accumulate(weight).T
    return (logits if bias is None else logits + accumulate(bias)).to(hidden.dtype)


@torch.no_grad()
def _gradients(call: LinearCrossEntropy | LinearJsd, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With G the gradient of the logits: dhidden = G · weight, dweight = Gᵀ · hidden, dbias = Σ_rows G."""
    dtype = call.hidden.dtype
    d, none = accumulate(gradient.to(dtype)), call.hidden.new_empty(0)
    dhidden = (d @ accumulate(weight)).to(dtype) if call.hidden_grad else none
    if not call.weight_grad:
        return dhidden, none, none
    dbias = none if call.bias is None else d.sum(0).to(dtype)
    return dhidden, (d.T @ accumulate(call.hidden)).to(dtype), dbias


def with_gradients(call: LinearCrossEntropy | LinearJsd, weight: Tensor, losses: Tensor, gradient: Tensor) -> Outputs:
    """Return the op's outputs from the rows' losses [N] and the gradient of their sum in the logits [N, V].

    weight: of the head, in floating point.
    """
    loss = losses.sum() if call.reduction == "sum" else losses
    return loss, *_gradients(call, weight, gradient)
