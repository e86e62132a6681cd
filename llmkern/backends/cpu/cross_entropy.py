from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(logits: Tensor, weight: Tensor | None, **_: Any) -> str | None:
    if weight is not None and weight.dtype != torch.float32:
        return f"weight is {weight.dtype}; only float32 is taken"
    return refuse_strided(logits=logits)


implements("cross_entropy", CPU, dtypes=DTYPES, refuse=_refuse, has_backward=True, rows_alone="always")(
    native("cross_entropy")
)
for _op in ("cross_entropy_backward", "cross_entropy_in_place_backward"):
    implements(_op, CPU, dtypes=DTYPES, refuse=_refuse, rows_alone="always")(native(_op))
