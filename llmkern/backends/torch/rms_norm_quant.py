from __future__ import annotations

from llmkern.backends.reference._compose import quantized
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.quantize_int8 import quantize_int8, refuse_empty_rows
from llmkern.backends.torch.rms_norm import rms_norm
from llmkern.dispatch import implements

rms_norm_quant = quantized(rms_norm, quantize_int8)
implements("rms_norm_quant", TORCH, refuse=refuse_empty_rows)(rms_norm_quant)
