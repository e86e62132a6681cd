from __future__ import annotations

from llmkern.backends.reference import REFERENCE
from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.reference.layer_norm_quant import layer_norm_quant
from llmkern.dispatch import implements

implements("add_layer_norm_quant", REFERENCE)(of_the_sum(layer_norm_quant))
