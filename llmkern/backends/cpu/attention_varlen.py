from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu.attention_decode import MAX_HEAD_DIM, refuse_sinks
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[-1] > MAX_HEAD_DIM:
            return f"{name} has head dimension {tensor.shape[-1]}; at most {MAX_HEAD_DIM} is taken"
    return refuse_sinks(sinks) or refuse_strided(q=q, k=k, v=v)


implements("attention_varlen", CPU, dtypes=DTYPES, refuse=_refuse, rows_alone="always")(native("attention_varlen"))
