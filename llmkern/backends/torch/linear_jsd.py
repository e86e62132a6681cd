from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends._teacher import spread
from llmkern.backends.torch import TORCH
from llmkern.backends.torch._linear_loss import with_gradients
from llmkern.dispatch import implements
from llmkern.ops._linear_loss import LinearJsd, Outputs
from llmkern.ops._loss import loss_dtype

_NO_GRADIENTS = {"hidden_grad": False, "weight_grad": False}


def _kl(left: Tensor, right: Tensor) -> Tensor:
    words = F.kl_div(right, left, reduction="none", log_target=True)
    # exp(-inf) * -inf, where a word has no probability at all, is nothing.
    return torch.where(left == -torch.inf, 0, words).sum(-1)


@implements("linear_jsd", TORCH, has_backward=True, for_gradient=_NO_GRADIENTS)
def linear_jsd(**arguments: Any) -> Outputs:
    call = LinearJsd(**arguments)
    wide, beta = loss_dtype(call.hidden), call.beta

    def losses(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if call.teacher_hidden is not None and call.teacher_weight is not None:
            logits = F.linear(call.teacher_hidden, call.teacher_weight, call.teacher_bias)
        else:
            assert call.teacher_logits is not None
            logits = spread(call.teacher_logits, call.teacher_words, call.weight.shape[0])
        logits = logits.masked_fill((call.scale == 0)[:, None], 0)  # what is left out may be anything
        teacher = (logits.to(wide) / call.temperature).log_softmax(-1)
        student = (F.linear(x, w, b).to(wide) / call.temperature).log_softmax(-1)
        if beta in (0, 1):
            rows = _kl(teacher, student) if beta == 0 else _kl(student, teacher)
        else:
            mixed = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
            rows = beta * _kl(teacher, mixed) + (1 - beta) * _kl(student, mixed)
        return torch.where(call.scale == 0, 0, rows * call.temperature**2 * call.scale)

    return with_gradients(call, call.weight, losses)


@implements("linear_kl_div", TORCH, has_backward=True, for_gradient=_NO_GRADIENTS)
def linear_kl_div(reverse: bool, **arguments: Any) -> Outputs:
    return linear_jsd(beta=float(reverse), **arguments)
