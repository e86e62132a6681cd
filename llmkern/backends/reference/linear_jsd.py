from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmkern.backends._teacher import spread
from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.backends.reference._linear_loss import head_logits, with_gradients
from llmkern.dispatch import implements
from llmkern.ops._linear_loss import LinearJsd, Outputs


def _kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ p · (log p − log q) [N] and the differences [N, V], which are 0 where p is."""
    p = log_p.exp()
    difference = torch.where(p == 0, 0, log_p - log_q)
    return (p * difference).sum(-1), difference


def _divergence(logits: Tensor, teacher: Tensor, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
    """Return each row's divergence [N] and its gradient in the student's logits [N, V].

    With s the student's softmax, t the teacher's and m = β·t + (1 − β)·s the divergence is
    T² · (β · KL(t ‖ m) + (1 − β) · KL(s ‖ m)), its gradient T · (1 − β) · s · (log s − log m − KL(s ‖ m)): the terms
    through m cancel.  Ends: T² · KL(t ‖ s) with the gradient T · (s − t); T² · KL(s ‖ t) with that of the formula for
    m = t, without its factor 1 − β.
    """
    log_s, log_t = (x.div(temperature).log_softmax(-1) for x in (logits, teacher))
    s = log_s.exp()
    if beta == 0:
        value, _ = _kl(log_t, log_s)
        return temperature**2 * value, temperature * (s - log_t.exp())
    if beta == 1:
        value, difference = _kl(log_s, log_t)
        return temperature**2 * value, temperature * s * (difference - value[:, None])
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    teachers, _ = _kl(log_t, log_m)
    students, difference = _kl(log_s, log_m)
    value = beta * teachers + (1 - beta) * students
    return temperature**2 * value, temperature * (1 - beta) * s * (difference - students[:, None])


@implements("linear_jsd", REFERENCE, has_backward=True)
def linear_jsd(**arguments: Any) -> Outputs:
    call = LinearJsd(**arguments)
    logits = accumulate(head_logits(call.hidden, call.weight, call.bias))
    if call.teacher_hidden is not None and call.teacher_weight is not None:
        teacher = head_logits(call.teacher_hidden, call.teacher_weight, call.teacher_bias)
    else:
        assert call.teacher_logits is not None
        teacher = spread(call.teacher_logits, call.teacher_words, call.weight.shape[0])
    rows, gradient = _divergence(logits, teacher.to(logits.dtype), call.temperature, call.beta)
    out = call.scale == 0
    gradient = torch.where(out[:, None], 0, gradient * call.scale[:, None])
    return with_gradients(call, call.weight, torch.where(out, 0, rows * call.scale), gradient)


@implements("linear_kl_div", REFERENCE, has_backward=True)
def linear_kl_div(reverse: bool, **arguments: Any) -> Outputs:
    return linear_jsd(beta=float(reverse), **arguments)
