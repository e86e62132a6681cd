from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cuda import CUDA, _plan
from llmkern.backends.cuda._heads import DTYPES, refuse_heads, refuse_lengths
from llmkern.dispatch import implements
from llmkern.library import native
from llmkern.registry import needs_grad


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    return refuse_lengths(q, k) or refuse_heads(sinks, q=q, k=k, v=v)


_operator = native("attention")


@implements(
    "attention",
    CUDA,
    dtypes=DTYPES,
    min_capability=(8, 0),
    has_backward=True,
    refuse=_refuse,
    describe=_plan.attention,
)
def attention(**call: Any) -> tuple[Tensor, Tensor]:
    # Without a log-sum-exp the backward would have to walk all scores once more.
    return _operator(**(call | {"return_lse": True} if needs_grad(call) else call))
