from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native


def refuse(x: Tensor, approximate: str) -> str | None:
    return refuse_strided(x=x)


implements("gelu", CPU, dtypes=DTYPES, refuse=refuse)(native("gelu"))
