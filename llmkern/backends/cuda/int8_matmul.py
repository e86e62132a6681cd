from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu._weights import refuse_vectors
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> str | None:
    reason = (
        refuse_strided(a_q=a_q, w_q=w_q) if residual is None else refuse_strided(a_q=a_q, w_q=w_q, residual=residual)
    )
    if reason is not None:
        return reason
    if residual is not None and residual.dtype not in DTYPES:
        return f"residual is {residual.dtype}; float32, bfloat16 and float16 are taken"
    return refuse_vectors(a_scale=a_scale, w_scale=w_scale, bias=bias)


implements("int8_matmul", CUDA, min_capability=(8, 0), refuse=_refuse, describe=_plan.product)(native("int8_matmul"))
