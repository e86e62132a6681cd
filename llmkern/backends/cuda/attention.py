from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves
from llmkern.backends.cuda._heads import DTYPES, copies_of, refuse_heads, refuse_lengths
from llmkern.backends.cuda._newer import WARPGROUP_ATTENTION


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    return refuse_lengths(q, k) or refuse_heads(sinks, q=q, k=k, v=v)


def _copies(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> str | None:
    return copies_of(q=q, k=k, v=v)


# Without a log-sum-exp the backward would have to walk all scores once more.
serves(
    "attention",
    dtypes=DTYPES,
    refuse=_refuse,
    describe=_plan.attention,
    has_backward=True,
    for_gradient={"return_lse": True},
    copies=_copies,
    gives_way=WARPGROUP_ATTENTION,
)
