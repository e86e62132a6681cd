from __future__ import annotations

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._isa import bf16_by_vectors
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu._weights import refuse_vectors, refuse_weight
from llmkern.checks import row_count
from llmkern.dispatch import implements, known
from llmkern.library import native

MAX_ROWS = 4
"""With few rows, reading the weight is the whole cost; with many, PyTorch's libraries have weights packed for the
caches, and shape by shape either may win."""

MAX_ROWS_BF16 = 8
"""In bfloat16 by AVX512-BF16.  One core of Zen 4, PyTorch's time / the native one, over eight shapes from 192×576 to
768×3072: 5 rows 1.06 to 1.15, 8 rows 1.06 to 1.26, 9 rows 0.82 to 0.96, 16 rows 0.91 to 1.02."""


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> str | None:
    return refuse_weight("weight", weight) or refuse_vectors(bias=bias)


def _slower(x: Tensor, weight: Tensor, **_: object) -> str | None:
    most = MAX_ROWS_BF16 if x.dtype == weight.dtype == torch.bfloat16 and bf16_by_vectors() else MAX_ROWS
    if known(row_count(x) <= most):
        return None
    # Without their number: to write it would settle a size that a trace leaves open.
    return f"x has more than {most} rows: with so many, PyTorch can be faster"


implements("linear", CPU, dtypes=DTYPES, refuse=_refuse, slower=_slower, has_backward=True, rows_alone="on request")(
    native("linear")
)
