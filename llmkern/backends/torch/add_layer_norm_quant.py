from __future__ import annotations

from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.layer_norm_quant import layer_norm_quant
from llmkern.backends.torch.quantize_int8 import refuse_empty_rows
from llmkern.dispatch import implements

implements("add_layer_norm_quant", TORCH, refuse=refuse_empty_rows)(of_the_sum(layer_norm_quant))
