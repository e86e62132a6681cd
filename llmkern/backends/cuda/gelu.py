from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_strided
from llmkern.backends.cuda import CUDA
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(x: Tensor, approximate: str) -> str | None:
    return refuse_strided(x=x)


implements("gelu", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=_refuse)(native("gelu"))
