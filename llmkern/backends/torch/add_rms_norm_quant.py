from __future__ import annotations

from llmkern.backends.reference._compose import of_the_sum
from llmkern.backends.torch import TORCH
from llmkern.backends.torch.quantize_int8 import refuse_empty_rows
from llmkern.backends.torch.rms_norm_quant import rms_norm_quant
from llmkern.dispatch import implements

implements("add_rms_norm_quant", TORCH, refuse=refuse_empty_rows)(of_the_sum(rms_norm_quant))
