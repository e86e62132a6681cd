from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.checks import row_count
from llmkern.dispatch import implements, known
from llmkern.library import native

MAX_ROWS = 4
"""With few rows, reading the weight is the whole cost; with many, PyTorch's libraries have weights packed for the
caches, and shape by shape either may win."""


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> str | None:
    return refuse_weight("weight", weight) or refuse_vectors(bias=bias)


def _slower(x: Tensor, **_: object) -> str | None:
    if known(row_count(x) <= MAX_ROWS):
        return None
    # Without their number: to write it would settle a size that a trace leaves open.
    return f"x has more than {MAX_ROWS} rows: with so many, PyTorch can be faster"


implements("linear", CPU, dtypes=DTYPES, refuse=_refuse, slower=_slower, rows_alone="on request")(native("linear"))
