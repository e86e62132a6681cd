from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference.cross_entropy import capped, cross_entropy_backward, losses
from llmkern.dispatch import implements


@implements("linear_cross_entropy", REFERENCE, has_backward=True)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with G those of the logits: dhidden = G · weight, dweight = Gᵀ · hidden, dbias = Σ_rows G."""
    x = accumulate(hidden)
    w = accumulate(weight if weight_scale is None else (weight * weight_scale).to(hidden.dtype))
    logits = x @ w.T
    if bias is not None:
        logits = logits + accumulate(bias)
    # Products of half-precision operands give half-precision logits, and so their gradients.
    logits = logits.to(hidden.dtype)
    numbers = (ignore_index, label_smoothing, z_loss)
    rows, lse = losses(capped(logits, softcap), labels, class_weight, *numbers)
    scale = torch.ones_like(rows) if scale is None else scale.to(rows.dtype)
    loss = rows * scale
    none = hidden.new_empty(0)
    dhidden, dweight, dbias = none, none, none
    with torch.no_grad():
        if hidden_grad or weight_grad:
            d = cross_entropy_backward(logits, scale, labels, class_weight, lse, *numbers, softcap)
            d = accumulate(d)
            dhidden = (d @ w).to(hidden.dtype) if hidden_grad else none
        if weight_grad:
            dweight = (d.T @ x).to(hidden.dtype)
            dbias = none if bias is None else d.sum(0).to(hidden.dtype)
    return loss.sum() if reduction == "sum" else loss, dhidden, dweight, dbias
