from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements
from llmkern.ops._loss import loss_dtype


@implements("linear_kl_div", TORCH, has_backward=True, for_gradient={"hidden_grad": False, "weight_grad": False})
def linear_kl_div(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    scale: Tensor,
    temperature: float,
    reverse: bool,
    reduction: str,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With gradients of its own it is asked for them without autograd."""
    leaves = [hidden] if hidden_grad else []
    leaves += [t for t in (weight, bias) if t is not None] if weight_grad else []
    wide, none = loss_dtype(hidden), hidden.new_empty(0)
    if not leaves:
        student = (F.linear(hidden, weight, bias).to(wide) / temperature).log_softmax(-1)
        teacher = (F.linear(teacher_hidden, teacher_weight, teacher_bias).to(wide) / temperature).log_softmax(-1)
        left, right = (student, teacher) if reverse else (teacher, student)
        words = F.kl_div(right, left, reduction="none", log_target=True)
        # exp(-inf) * -inf, where a word has no probability at all, is nothing.
        rows = torch.where(left == -torch.inf, 0, words).sum(-1) * temperature**2
        loss = torch.where(scale == 0, 0, rows * scale)
        return loss.sum() if reduction == "sum" else loss, none, none.clone(), none.clone()
    with torch.enable_grad():
        x, w = hidden.detach().requires_grad_(hidden_grad), weight.detach().requires_grad_(weight_grad)
        b = None if bias is None else bias.detach().requires_grad_(weight_grad)
        teacher_head = (teacher_hidden, teacher_weight, teacher_bias)
        loss, *empty = linear_kl_div(x, w, b, *teacher_head, scale, temperature, reverse, reduction, False, False)
    wanted = {i: t for i, t in enumerate((x, w, b)) if t is not None and t.requires_grad}
    for i, gradient in zip(wanted, torch.autograd.grad(loss.sum(), list(wanted.values())), strict=True):
        empty[i] = gradient.contiguous()
    return loss.detach(), *empty
