from __future__ import annotations

from llmkern.backends.reference._compose import quantized
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.layer_norm import layer_norm
from llmkern.backends.torch.quantize_int8 import quantize_int8, refuse_empty_rows
from llmkern.dispatch import implements

layer_norm_quant = quantized(layer_norm, quantize_int8)
implements("layer_norm_quant", TORCH, refuse=refuse_empty_rows)(layer_norm_quant)
