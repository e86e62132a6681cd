from __future__ import annotations

from typing import Any

from llmkern.backends.cpu import CPU
from llmkern.backends.cpu._rows import DTYPES, refuse_few, refuse_norm
from llmkern.dispatch import implements
from llmkern.library import native

LEAST = 16384
# Elements.  One thread, µs, native / PyTorch in fp32 and bf16: 1×4096 5.3/4.2 and 6.2/4.8, 32×576 8.0/7.8 and
# 10.0/11.1, 32×4096 25/33 and 34/50.


def _refuse(**call: Any) -> str | None:
    return refuse_few(LEAST, x=call["x"]) or refuse_norm(**call)


implements("layer_norm", CPU, dtypes=DTYPES, refuse=_refuse)(native("layer_norm"))
