from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu.attention_decode import refuse_sinks
from llmkern.backends.cuda import CUDA
from llmkern.backends.cuda._heads import DTYPES, refuse_dims, refuse_lengths
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    """Vectors that do not lie as the kernels want them are copied: a gradient comes as autograd makes it."""
    return refuse_lengths(q, k) or refuse_dims(q=q, v=v) or refuse_sinks(sinks)


implements("attention_backward", CUDA, dtypes=DTYPES, min_capability=(8, 0), refuse=_refuse)(
    native("attention_backward")
)
