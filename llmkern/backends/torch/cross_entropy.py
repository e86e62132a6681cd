from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.reference import accumulate
from llmkern.backends.reference.cross_entropy import capped
from llmkern.backends.torch import TORCH
from llmkern.dispatch import implements
from llmkern.ops._loss import LossOptions


@implements("cross_entropy", TORCH, has_backward=True)
def cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None, reduction: str, **options: Any
) -> tuple[Tensor, Tensor]:
    ignore_index, label_smoothing, z_loss, softcap = LossOptions(**options)
    scores = capped(logits, softcap)  # in fp32, as transformers computes it
    lse = torch.where(labels == ignore_index, 0, torch.logsumexp(scores if z_loss else scores.detach(), -1))
    loss = F.cross_entropy(scores, labels, weight, None, ignore_index, None, "none", label_smoothing)
    loss = loss + z_loss * lse.square() if z_loss else loss
    return loss.sum() if reduction == "sum" else loss, lse.detach()


@implements("cross_entropy_backward", TORCH)
def cross_entropy_backward(
    logits: Tensor, dloss: Tensor, labels: Tensor, weight: Tensor | None, lse: Tensor, **options: Any
) -> Tensor:
    with torch.enable_grad():
        leaf = accumulate(logits.detach()).requires_grad_()
        loss, _ = cross_entropy(leaf, labels, weight, "none", **options)
    (gradient,) = torch.autograd.grad(loss, leaf, dloss)
    return gradient.to(logits.dtype)
