from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cuda import CUDA, _plan
from llmkern.backends.cuda._heads import DTYPES, MAX_LENGTH, refuse_heads
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    if k.shape[2] > MAX_LENGTH or q.shape[:3].numel() > MAX_LENGTH:
        return f"{k.shape[2]} keys, {q.shape[:3].numel()} queries of all heads; at most {MAX_LENGTH} of each are taken"
    return refuse_heads(sinks, q=q, k=k, v=v)


implements("attention", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=_refuse, describe=_plan.attention)(
    native("attention")
)
