from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._isa import multiplies_bf16
from llmkern.backends.cpu._rows import DTYPES
from llmkern.backends.cpu.attention_decode import refuse_heads
from llmkern.dispatch import implements
from llmkern.library import native


def _refuse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    window: Sequence[int],
    softcap: float,
    return_lse: bool,
    **_: Any,
) -> str | None:
    plain = sinks is None and softcap == 0 and not return_lse and max(window) < 0
    if plain and q.dtype == torch.bfloat16 and not multiplies_bf16():
        return (
            "without AVX512-BF16 it computes bfloat16 in float32, and PyTorch is faster where there is neither softcap "
            "nor sinks nor window nor log-sum-exp"
        )
    return refuse_heads(sinks, q=q, k=k, v=v)


# Without a log-sum-exp the backward would have to walk all scores once more.
implements(
    "attention",
    CPU,
    dtypes=DTYPES,
    refuse=_refuse,
    has_backward=True,
    rows_alone="always",
    for_gradient={"return_lse": True},
)(native("attention"))
