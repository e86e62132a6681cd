from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch._linear_loss import with_gradients
from llmkern.backends.torch.cross_entropy import cross_entropy
from llmkern.dispatch import implements


@implements("linear_cross_entropy", TORCH, has_backward=True, for_gradient={"hidden_grad": False, "weight_grad": False})
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
    """With gradients of its own it is asked for them without autograd."""
    head = weight if weight_scale is None else (weight * weight_scale).to(hidden.dtype)
    if not (hidden_grad or weight_grad):
        numbers = (ignore_index, label_smoothing, z_loss, softcap, "none")
        loss, _ = cross_entropy(F.linear(hidden, head, bias), labels, class_weight, *numbers)
        loss = loss if scale is None else loss * scale
        none = hidden.new_empty(0)
        return loss.sum() if reduction == "sum" else loss, none, none.clone(), none.clone()

    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        call = (x, w, b, None, labels, class_weight, scale, ignore_index, label_smoothing, z_loss, softcap)
        return linear_cross_entropy(*call, reduction, False, False)

    return with_gradients(forward, hidden, head, bias, hidden_grad, weight_grad)
