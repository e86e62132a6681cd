from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu.attention_decode import refuse_sinks
from llmkern.backends.cuda._declare import serves
from llmkern.backends.cuda._heads import DTYPES, refuse_dims, refuse_lengths


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    """Vectors that do not lie as the kernels want them are copied: a gradient comes as autograd makes it."""
    return refuse_lengths(q, k) or refuse_dims(q=q, v=v) or refuse_sinks(sinks)


serves("attention_backward", dtypes=DTYPES, refuse=_refuse)
