from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements

__all__ = ["divergence"]


def divergence(logits: Tensor, teacher: Tensor, temperature: float, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return each row's T² · KL [N] and its gradient in the student's logits [N, V].

    With p of the left side and q of the right one KL is Σ p · (log p − log q), where p is 0 nothing.  With s the
    student's softmax and t the teacher's the gradient is T · (s − t), in reverse T · s · (log s − log t − KL).
    """
    log_s, log_t = (x.div(temperature).log_softmax(-1) for x in (logits, teacher))
    log_p, log_q = (log_s, log_t) if reverse else (log_t, log_s)
    p = log_p.exp()
    difference = torch.where(p == 0, 0, log_p - log_q)
    kl = (p * difference).sum(-1)
    gradient = p * (difference - kl[:, None]) if reverse else log_s.exp() - p
    return temperature**2 * kl, temperature * gradient


@implements("linear_kl_div", REFERENCE, has_backward=True)
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
    """Gradients with G those of the logits: dhidden = G · weight, dweight = Gᵀ · hidden, dbias = Σ_rows G."""

    def head(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        logits = accumulate(x) @ accumulate(w).T
        logits = logits if b is None else logits + accumulate(b)
        # Products of half-precision operands give half-precision logits.
        return accumulate(logits.to(x.dtype))

    logits = head(hidden, weight, bias)
    teacher = head(teacher_hidden, teacher_weight, teacher_bias).to(logits.dtype)
    rows, gradient = divergence(logits, teacher, temperature, reverse)
    out = scale == 0
    loss = torch.where(out, 0, rows * scale)
    none = hidden.new_empty(0)
    dhidden, dweight, dbias = none, none, none
    with torch.no_grad():
        d = accumulate(torch.where(out[:, None], 0, gradient * scale[:, None]).to(hidden.dtype))
        if hidden_grad:
            dhidden = (d @ accumulate(weight)).to(hidden.dtype)
        if weight_grad:
            dweight = (d.T @ accumulate(hidden)).to(hidden.dtype)
            dbias = none if bias is None else d.sum(0).to(hidden.dtype)
    return loss.sum() if reduction == "sum" else loss, dhidden, dweight, dbias
