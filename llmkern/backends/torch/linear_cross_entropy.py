from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
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
    leaves = [hidden] if hidden_grad else []
    leaves += [t for t in (head, bias) if t is not None] if weight_grad else []
    if not leaves:
        numbers = (ignore_index, label_smoothing, z_loss, softcap, "none")
        loss, _ = cross_entropy(F.linear(hidden, head, bias), labels, class_weight, *numbers)
        loss = loss if scale is None else loss * scale
        none = hidden.new_empty(0)
        return loss.sum() if reduction == "sum" else loss, none, none.clone(), none.clone()
    with torch.enable_grad():
        x, w = hidden.detach().requires_grad_(hidden_grad), head.detach().requires_grad_(weight_grad)
        b = None if bias is None else bias.detach().requires_grad_(weight_grad)
        call = (x, w, b, None, labels, class_weight, scale, ignore_index, label_smoothing, z_loss, softcap)
        loss, *empty = linear_cross_entropy(*call, reduction, False, False)
    wanted = {i: t for i, t in enumerate((x, w, b)) if t is not None and t.requires_grad}
    for i, gradient in zip(wanted, torch.autograd.grad(loss.sum(), list(wanted.values())), strict=True):
        empty[i] = gradient.contiguous()
    return loss.detach(), *empty
