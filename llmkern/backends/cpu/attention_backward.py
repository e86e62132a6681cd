from __future__ import annotations

from typing import Any

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu.attention_decode import refuse_heads
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **_: Any) -> str | None:
    """What the kernel cannot read; out and its gradient it copies, where they lie as it cannot read them."""
    return refuse_heads(sinks, q=q, k=k, v=v)


implements("attention_backward", CPU, dtypes=DTYPES, refuse=_refuse)(native("attention_backward"))
