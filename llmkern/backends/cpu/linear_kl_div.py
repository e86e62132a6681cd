from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llmkern.backends._chunked_loss import linear_loss
from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.reference.linear_kl_div import divergence
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
        wide = loss_dtype(logits)
        teacher = F.linear(teacher_rows, teacher_weight, teacher_bias).to(wide)
        rows, gradient = divergence(logits.to(wide), teacher, temperature, reverse)
        logits.copy_(gradient.mul_(scale[:, None]))
        return rows

    tensors = (hidden, weight, bias, None, teacher_hidden, scale)
    return linear_loss(*tensors, scale, reduction, hidden_grad, weight_grad, row_loss)


def _refuse(teacher_hidden: Tensor, **_: Any) -> str | None:
    if teacher_hidden.dtype not in DTYPES:
        return f"teacher_hidden is {teacher_hidden.dtype}; fp32, bf16 and fp16 are taken"
    return None


# Chunks of rows: PyTorch's operators on them, whose temporaries stay as small as the chunk.
implement_in_python("linear_kl_div", _linear_kl_div, "CPU")
implements("linear_kl_div", CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True)(native("linear_kl_div"))
