from __future__ import annotations

from torch import Tensor

from llmkern.backends.triton._declare import serves
from llmkern.backends.triton.quantize_int8 import row_codes


@serves("swiglu_quant")
def swiglu_quant(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return row_codes(gate, up)
