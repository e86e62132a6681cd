from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu._rows import DTYPES, refuse_norm, refuse_strided
from llmkern.backends.cuda import CUDA, _plan
from llmkern.dispatch import implements
from llmkern.library import native

implements(
    "rms_norm",
    CUDA,
    dtypes=DTYPES,
    min_capability=(8, 0),
    has_backward=True,
    refuse=refuse_norm,
    describe=_plan.norm,
)(native("rms_norm"))


def _refuse_backward(dy: Tensor, **call: Any) -> str | None:
    return refuse_strided(dy=dy) or refuse_norm(**call)


implements("rms_norm_backward", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=_refuse_backward)(
    native("rms_norm_backward")
)
