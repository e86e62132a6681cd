from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cpu.gelu import refuse
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "gelu",
    CUDA,
    dtypes=DTYPES,
    min_capability=(8, 0),
    has_backward=True,
    refuse=refuse,
    describe=_plan.activate("x"),
)(native("gelu"))


def _refuse_backward(dy: Tensor, x: Tensor, approximate: str) -> str | None:
    return refuse_strided(dy=dy, x=x)


implements("gelu_backward", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=_refuse_backward)(
    native("gelu_backward")
)
