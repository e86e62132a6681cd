from __future__ import annotations

from typing import Any

import torch

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._linear_loss import head_logits, with_gradients
from llmkern.backends.reference.cross_entropy import capped, cross_entropy_backward, losses
from llmkern.dispatch import implements
from llmkern.ops._linear_loss import LinearCrossEntropy, Outputs


@implements("linear_cross_entropy", REFERENCE, has_backward=True)
def linear_cross_entropy(**arguments: Any) -> Outputs:
    call = LinearCrossEntropy(**arguments)
    weight = call.weight if call.weight_scale is None else (call.weight * call.weight_scale).to(call.hidden.dtype)
    logits = head_logits(call.hidden, weight, call.bias)
    rows, lse = losses(capped(logits, call.softcap), call.labels, call.class_weight, call.options)
    scale = torch.ones_like(rows) if call.scale is None else call.scale.to(rows.dtype)
    labels = (call.labels, call.class_weight, lse)
    gradient = cross_entropy_backward(logits.detach(), scale, *labels, **call.options._asdict())
    return with_gradients(call, weight, rows * scale, gradient)
