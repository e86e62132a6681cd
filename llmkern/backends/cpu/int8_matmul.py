from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    **_: object,
) -> str | None:
    if residual is not None and residual.dtype not in DTYPES:
        return f"residual is {residual.dtype}; float32, bfloat16 and float16 are taken"
    return refuse_weight("w_q", w_q) or refuse_vectors(a_scale=a_scale, w_scale=w_scale, bias=bias)


implements("int8_matmul", CPU, dtypes=(torch.int8,), refuse=_refuse, rows_alone="always")(native("int8_matmul"))
