from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.reference.rms_norm_quant import rms_norm_quant
from llmkern.dispatch import implements

implements("add_rms_norm_quant", REFERENCE)(of_the_sum(rms_norm_quant))
