from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu._rows import refuse_strided
from llmkern.backends.cpu.gelu import refuse
from llmkern.backends.cuda import _plan
from llmkern.backends.cuda._declare import serves


def _refuse_backward(dy: Tensor, x: Tensor, approximate: str) -> str | None:
    return refuse_strided(dy=dy, x=x)


serves("gelu", refuse=refuse, describe=_plan.activate("x"), has_backward=True)
serves("gelu_backward", refuse=_refuse_backward)
