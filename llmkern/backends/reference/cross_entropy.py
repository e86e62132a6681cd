from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.reference import REFERENCE, accumulate
from llmkern.dispatch import implements
from llmkern.ops._loss import LossOptions

__all__ = ["capped", "losses"]


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return the scores: softcap · tanh(logits / softcap), or the logits without one."""
    wide = accumulate(logits)
    return softcap * torch.tanh(wide / softcap) if softcap > 0 else wide


def losses(
    scores: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """Return each row's loss and log-sum-exp: 0 where the label is ignored, NaN where it is no word."""
    words, smoothing = scores.shape[1], options.label_smoothing
    kept, word = labels != options.ignore_index, (labels >= 0) & (labels < words)
    target = torch.where(word, labels, 0)
    weights = scores.new_ones(words) if weight is None else weight.to(scores.dtype)
    lse = torch.logsumexp(scores, -1)
    loss = (1 - smoothing) * weights[target] * (lse - scores.gather(1, target[:, None])[:, 0])
    if smoothing > 0:
        loss = loss + smoothing / words * ((lse[:, None] - scores) * weights).sum(-1)
    loss = loss + options.z_loss * lse.square()
    return tuple(torch.where(kept, torch.where(word, x, math.nan), 0) for x in (loss, lse))  # type: ignore[return-value]


@implements("cross_entropy", REFERENCE, has_backward=True)
def cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, reduction: str, **options: Any
) -> tuple[Tensor, Tensor]:
    numbers = LossOptions(**options)
    loss, lse = losses(capped(logits, numbers.softcap), labels, weight, numbers)
    return loss.sum() if reduction == "sum" else loss, lse.detach()


@implements("cross_entropy_backward", REFERENCE, has_backward=True)
def cross_entropy_backward(
    logits: Tensor, dloss: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, **options: Any
) -> Tensor:
    """With p the softmax, ε the smoothing and W the sum of the weights w, the gradient of a score is
    ((1 − ε)·w[y] + ε/V·W + 2·z_loss·lse)·p − ε/V·w − (1 − ε)·w[y]·[y]; the cap's slope is 1 − (score / softcap)²."""
    ignore_index, smoothing, z_loss, softcap = LossOptions(**options)
    scores = capped(logits, softcap)
    words = scores.shape[1]
    word = (labels >= 0) & (labels < words)
    target = torch.where(word, labels, 0)
    weights = scores.new_ones(words) if weight is None else weight.to(scores.dtype)
    share, each = (1 - smoothing) * weights[target], smoothing / words * weights
    lse = scores.logsumexp(-1)  # again, for its part in the gradient of this gradient
    factor = share + each.sum() + 2 * z_loss * lse
    gradient = factor[:, None] * torch.exp(scores - lse[:, None]) - each
    gradient = gradient.scatter_add(1, target[:, None], -share[:, None])
    if softcap > 0:
        gradient = gradient * (1 - (scores / softcap).square())
    gradient = torch.where(word[:, None], gradient * dloss.to(scores.dtype)[:, None], math.nan)
    return torch.where((labels == ignore_index)[:, None], 0, gradient).to(logits.dtype)


@implements("cross_entropy_in_place_backward", REFERENCE)
def cross_entropy_in_place_backward(
    logits: Tensor, labels: Tensor, weight: Tensor | None, scale: Tensor, **options: Any
) -> Tensor:
    loss, lse = cross_entropy(logits, labels, weight, "none", **options)
    logits.copy_(cross_entropy_backward(logits, scale, labels, weight, lse, **options))
    return loss
