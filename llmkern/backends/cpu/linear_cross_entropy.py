from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends._chunked_loss import linear_loss
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implementation, implements
from llmkern.library import implement_in_python, native
from llmkern.ops._linear_loss import LinearCrossEntropy, Outputs

_in_place = torch.ops.llmkern.cross_entropy_in_place_backward.default


def _linear_cross_entropy(**arguments: Any) -> Outputs:
    call = LinearCrossEntropy(**arguments)
    if call.hidden.dtype not in DTYPES:
        return implementation("linear_cross_entropy", "reference").fn(**arguments)

    def row_loss(logits: Tensor, targets: tuple[Tensor, ...], scale: Tensor) -> Tensor:
        return _in_place(logits, *targets, call.class_weight, scale, *call.options)

    return linear_loss(call, (call.labels,), call.labels != call.ignore_index, row_loss, call.weight_scale)


def _refuse(class_weight: Tensor | None, **_: Any) -> str | None:
    if class_weight is not None and class_weight.dtype != torch.float32:
        return f"class_weight is {class_weight.dtype}; only float32 is taken"
    return None


# The products of whole matrices are PyTorch's; the losses between them are native.
implement_in_python("linear_cross_entropy", _linear_cross_entropy, "CPU")
implements("linear_cross_entropy", CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True)(
    native("linear_cross_entropy")
)
