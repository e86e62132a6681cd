from __future__ import annotations

from torch import Tensor

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_few, refuse_strided
from llmkern.dispatch import implements
from llmkern.library import native

LEAST = 8192
# Elements.  One thread, µs, native / PyTorch in fp32 and bf16: 1×4096 5.1/4.3 and 5.4/4.9, 32×576 8.9/11.1 and
# 13.2/15.7, 512×1536 415/835 and 437/672.


def _refuse(gate: Tensor, up: Tensor) -> str | None:
    return refuse_few(LEAST, gate=gate) or refuse_strided(gate=gate, up=up)


implements("swiglu", CPU, dtypes=DTYPES, refuse=_refuse)(native("swiglu"))
