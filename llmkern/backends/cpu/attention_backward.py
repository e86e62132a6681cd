from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu.attention_decode import refuse_heads
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    """Return why the kernel cannot read a tensor, or None; out and its gradient are copied where it cannot."""
    return refuse_heads(sinks, q=q, k=k, v=v)


implements("attention_backward", CPU, dtypes=DTYPES, refuse=_refuse)(native("attention_backward"))
