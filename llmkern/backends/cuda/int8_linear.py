from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu._rows import refuse_strided
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves
from llmkern.backends.cuda._newer import many_rows


def _refuse(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> str | None:
    if scheme == "w8a16" and x.dtype == torch.float32:
        return "x is torch.float32; with scheme w8a16 bfloat16 and float16 are taken"
    return refuse_strided(x=x) or refuse_weight("w_q", w_q) or refuse_vectors(w_scale=w_scale, bias=bias)


serves("int8_linear", refuse=_refuse, describe=_plan.int8_linear, has_backward=True, gives_way=many_rows("x"))
