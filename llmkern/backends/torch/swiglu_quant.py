from __future__ import annotations

from torch import Tensor

from llmkern.backends.reference._compose import quantized
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.quantize_int8 import quantize_int8, refuse_empty_rows
from llmkern.backends.torch.swiglu import swiglu
from llmkern.dispatch import implements


def _refuse(gate: Tensor, up: Tensor) -> str | None:
    return refuse_empty_rows(gate)


implements("swiglu_quant", TORCH, refuse=_refuse)(quantized(swiglu, quantize_int8))
