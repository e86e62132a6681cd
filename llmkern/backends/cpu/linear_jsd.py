from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends._chunked_loss import linear_loss
from llmkern.backends._teacher import spread
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implementation, implements
from llmkern.library import implement_in_python, native
from llmkern.ops._linear_loss import LinearJsd, Outputs
from llmkern.ops._loss import loss_dtype


def _linear_jsd(**arguments: Any) -> Outputs:
    call = LinearJsd(**arguments)
    if call.hidden.dtype not in DTYPES:
        return implementation("linear_jsd", "reference").fn(**arguments)

    def row_loss(logits: Tensor, targets: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        student = logits.to(loss_dtype(logits))
        if call.teacher_weight is not None:
            teacher = F.linear(targets[0], call.teacher_weight, call.teacher_bias).to(student.dtype)
        else:  # a copy: what the caller gave is not to be overwritten
            given = spread(targets[0], targets[1] if len(targets) > 1 else None, logits.shape[1])
            teacher = given.to(student.dtype, copy=call.teacher_words is None)
        rows = _divergence_(student, teacher, call.temperature, call.beta)
        student.mul_(scale[:, None])
        if student is not logits:
            logits.copy_(student)
        return rows

    given = (call.teacher_hidden, call.teacher_logits, call.teacher_words)
    return linear_loss(call, tuple([t for t in given if t is not None]), call.scale, row_loss)


def _divergence_(student: Tensor, teacher: Tensor, temperature: float, beta: float) -> Tensor:
    """Return each row's divergence, as the reference defines it, with its gradient in `student`'s place.

    Overwrites `teacher` too: of a chunk's size there are three tensors at the ends, five between them.
    """
    for x in (student, teacher):
        x.div_(temperature).sub_(x.amax(-1, keepdim=True))
        x.sub_(x.logsumexp(-1, keepdim=True))
    if beta == 0:
        t = teacher.exp()
        value = teacher.sub_(student).masked_fill_(t == 0, 0).mul_(t).sum(-1)
        student.exp_().sub_(t).mul_(temperature)
        return value * temperature**2
    mixed, share, value = teacher, 1.0, teacher.new_zeros(())
    if beta < 1:
        mixed, share = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta)), 1 - beta
        t = teacher.exp()
        value = beta * teacher.sub_(mixed).masked_fill_(t == 0, 0).mul_(t).sum(-1)
    s = student.exp()
    difference = student.sub_(mixed).masked_fill_(s == 0, 0)
    kl = torch.linalg.vecdot(s, difference)
    difference.sub_(kl[:, None]).mul_(s).mul_(temperature * share)
    return (value + share * kl) * temperature**2


def _linear_kl_div(reverse: bool, **arguments: Any) -> Outputs:
    return _linear_jsd(beta=float(reverse), **arguments)


def _refuse(teacher_hidden: Tensor | None, teacher_logits: Tensor | None, **_: Any) -> str | None:
    for name, given in (("teacher_hidden", teacher_hidden), ("teacher_logits", teacher_logits)):
        if given is not None and given.dtype not in DTYPES:
            return f"{name} is {given.dtype}; fp32, bf16 and fp16 are taken"
    return None


# Chunks of rows: PyTorch's operators on them, whose temporaries stay as small as the chunk.
for _op, _fn in (("linear_jsd", _linear_jsd), ("linear_kl_div", _linear_kl_div)):
    implement_in_python(_op, _fn, "CPU")
    implements(_op, CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True)(native(_op))
