from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends.torch import TORCH
from llmkern.backends.torch._linear_loss import with_gradients
from llmkern.backends.torch.cross_entropy import cross_entropy
from llmkern.dispatch import implements
from llmkern.ops._linear_loss import LinearCrossEntropy, Outputs


@implements("linear_cross_entropy", TORCH, has_backward=True, for_gradient={"hidden_grad": False, "weight_grad": False})
def linear_cross_entropy(**arguments: Any) -> Outputs:
    call = LinearCrossEntropy(**arguments)

    def losses(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        options = call.options._asdict()
        rows, _ = cross_entropy(F.linear(x, w, b), call.labels, call.class_weight, "none", **options)
        return rows if call.scale is None else rows * call.scale

    weight = call.weight if call.weight_scale is None else (call.weight * call.weight_scale).to(call.hidden.dtype)
    return with_gradients(call, weight, losses)
