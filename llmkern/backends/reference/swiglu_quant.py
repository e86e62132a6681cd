from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import quantized
from llmkern.backends.reference.quantize_int8 import quantize_int8
from llmkern.backends.reference.swiglu import swiglu
from llmkern.dispatch import implements

implements("swiglu_quant", REFERENCE)(quantized(swiglu, quantize_int8))
