from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import quantized
from llmkern.backends.reference.layer_norm import layer_norm
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.dispatch import implements

layer_norm_quant = quantized(layer_norm, quantize_int8)
implements("layer_norm_quant", REFERENCE)(layer_norm_quant)
