from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.dispatch import implements
from llmkern.library import native

MAX_ROWS = 4
"""With few rows, reading the weight is the whole cost; with many, PyTorch's libraries have weights packed for the
caches, and shape by shape either may win."""


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> str | None:
    rows = x.shape[:-1].numel()
    if rows > MAX_ROWS:
        return f"x has {rows} rows; at most {MAX_ROWS} are taken: with more, PyTorch can be faster"
    return refuse_weight("weight", weight) or refuse_vectors(bias=bias)


implements("linear", CPU, dtypes=DTYPES, refuse=_refuse)(native("linear"))
