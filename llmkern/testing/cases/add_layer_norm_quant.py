from __future__ import annotations

from llmkern.testing.cases._norm import FUSED_SIZES, norm_cases

CASES = norm_cases("add_layer_norm_quant", optional=("residual",), sizes=FUSED_SIZES, codes_of="layer_norm")
