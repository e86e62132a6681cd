from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

MOST_DIMS = 1024  # kRopeMostDims in csrc/include/llmkern/rope.h


def refuse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> str | None:
    if cos.dtype not in DTYPES:
        return f"cos is {cos.dtype}; float32, bfloat16 and float16 are taken"
    if rotary_dim > MOST_DIMS:
        return f"{rotary_dim} dimensions are to be rotated; at most {MOST_DIMS} are taken"
    return refuse_strided(q=q, k=k, cos=cos, sin=sin)


implements("rope", CPU, dtypes=DTYPES, refuse=refuse, has_backward=True, rows_alone="always")(native("rope"))
