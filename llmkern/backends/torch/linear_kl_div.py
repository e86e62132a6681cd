from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch._linear_loss import with_gradients
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
    wide, none = loss_dtype(hidden), hidden.new_empty(0)
    if not (hidden_grad or weight_grad):
        student = (F.linear(hidden, weight, bias).to(wide) / temperature).log_softmax(-1)
        teacher = (F.linear(teacher_hidden, teacher_weight, teacher_bias).to(wide) / temperature).log_softmax(-1)
        left, right = (student, teacher) if reverse else (teacher, student)
        words = F.kl_div(right, left, reduction="none", log_target=True)
        # exp(-inf) * -inf, where a word has no probability at all, is nothing.
        rows = torch.where(left == -torch.inf, 0, words).sum(-1) * temperature**2
        loss = torch.where(scale == 0, 0, rows * scale)
        return loss.sum() if reduction == "sum" else loss, none, none.clone(), none.clone()

    def forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        teacher_head = (teacher_hidden, teacher_weight, teacher_bias)
        return linear_kl_div(x, w, b, *teacher_head, scale, temperature, reverse, reduction, False, False)

    return with_gradients(forward, hidden, weight, bias, hidden_grad, weight_grad)
