from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(x: Tensor, w_q: Tensor, w_scale: Tensor, bias: Tensor | None, activation: str, scheme: str) -> str | None:
    return refuse_weight("w_q", w_q) or refuse_vectors(w_scale=w_scale, bias=bias)


implements("int8_linear", CPU, dtypes=DTYPES, has_backward=True, refuse=_refuse, rows_alone="on request")(
    native("int8_linear")
)
