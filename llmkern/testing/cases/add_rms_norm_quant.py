from __future__ import annotations

from llmkern.testing.cases._norm import FUSED_SIZES, norm_cases

CASES = norm_cases("add_rms_norm_quant", optional=("residual", "weight_offset"), sizes=FUSED_SIZES, codes_of="rms_norm")
