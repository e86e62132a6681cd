from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends._chunked_loss import linear_loss
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.dispatch import implementation, implements
from llmkern.library import implement_in_python, native

_in_place = torch.ops.llmkern.cross_entropy_in_place_backward.default


def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = (label_smoothing, z_loss, softcap)
    if hidden.dtype not in DTYPES:
        reference = implementation("linear_cross_entropy", "reference").fn
        flags = (reduction, hidden_grad, weight_grad)
        return reference(
            hidden, weight, bias, weight_scale, labels, class_weight, scale, ignore_index, *numbers, *flags
        )

    def row_loss(logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return _in_place(logits, labels, class_weight, scale, ignore_index, *numbers)

    tensors = (hidden, weight, bias, weight_scale, labels, scale)
    return linear_loss(*tensors, labels != ignore_index, reduction, hidden_grad, weight_grad, row_loss)


def _refuse(hidden: Tensor, class_weight: Tensor | None, **_: Any) -> str | None:
    if class_weight is not None and class_weight.dtype != torch.float32:
        return f"class_weight is {class_weight.dtype}; only float32 is taken"
    return None


# The products of whole matrices are PyTorch's; the losses between them are native.
implement_in_python("linear_cross_entropy", _linear_cross_entropy, "CPU")
implements("linear_cross_entropy", CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True)(
    native("linear_cross_entropy")
)
