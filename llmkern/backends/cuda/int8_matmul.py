from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu._weights import refuse_vectors
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves
from llmkern.backends.cuda._newer import many_rows


def _refuse(
    a_q: Tensor,
    w_q: Tensor,
    a_scale: Tensor | None,
    w_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    **_: object,
) -> str | None:
    rows = {"a_q": a_q, "w_q": w_q} | ({} if residual is None else {"residual": residual})
    if reason := refuse_strided(**rows):
        return reason
    if residual is not None and residual.dtype not in DTYPES:
        return f"residual is {residual.dtype}; float32, bfloat16 and float16 are taken"
    return refuse_vectors(a_scale=a_scale, w_scale=w_scale, bias=bias)


serves("int8_matmul", refuse=_refuse, describe=_plan.product, dtypes=None, gives_way=many_rows("a_q"))
