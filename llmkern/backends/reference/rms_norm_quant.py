from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import quantized
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.backends.reference.rms_norm import rms_norm
from llmkern.dispatch import implements

rms_norm_quant = quantized(rms_norm, quantize_int8)
implements("rms_norm_quant", REFERENCE)(rms_norm_quant)
