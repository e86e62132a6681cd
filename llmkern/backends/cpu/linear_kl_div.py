from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends._chunked_loss import linear_loss
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implementation, implements
from llmkern.library import implement_in_python, native
from llmkern.ops._loss import loss_dtype


def _linear_kl_div(
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
    if hidden.dtype not in DTYPES:
        heads = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
        options = (temperature, reverse, reduction, hidden_grad, weight_grad)
        return implementation("linear_kl_div", "reference").fn(*heads, scale, *options)

    def row_loss(logits: Tensor, teacher_rows: Tensor, scale: Tensor) -> Tensor:
        student = logits.to(loss_dtype(logits))
        teacher = F.linear(teacher_rows, teacher_weight, teacher_bias).to(student.dtype)
        rows = _divergence_(student, teacher, temperature, reverse)
        student.mul_(scale[:, None])
        if student is not logits:
            logits.copy_(student)
        return rows

    tensors = (hidden, weight, bias, None, teacher_hidden, scale)
    return linear_loss(*tensors, scale, reduction, hidden_grad, weight_grad, row_loss)


def _divergence_(student: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> Tensor:
    """Return each row's divergence, as the reference defines it, with its gradient in `student`'s place.

    Overwrites `teacher` too: with the left side's probabilities there are three tensors of a chunk's size, no more.
    """
    for x in (student, teacher):
        x.div_(temperature).sub_(x.amax(-1, keepdim=True))
        x.sub_(x.logsumexp(-1, keepdim=True))
    left, right = (student, teacher) if reverse else (teacher, student)
    p = left.exp()
    difference = left.sub_(right).masked_fill_(p == 0, 0)
    if reverse:
        kl = torch.linalg.vecdot(p, difference)
        difference.sub_(kl[:, None]).mul_(p).mul_(temperature)
    else:
        kl = difference.mul_(p).sum(-1)
        right.exp_().sub_(p).mul_(temperature)
    return kl * temperature**2


def _refuse(teacher_hidden: Tensor, **_: Any) -> str | None:
    if teacher_hidden.dtype not in DTYPES:
        return f"teacher_hidden is {teacher_hidden.dtype}; fp32, bf16 and fp16 are taken"
    return None


# Chunks of rows: PyTorch's operators on them, whose temporaries stay as small as the chunk.
implement_in_python("linear_kl_div", _linear_kl_div, "CPU")
implements("linear_kl_div", CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True)(native("linear_kl_div"))
