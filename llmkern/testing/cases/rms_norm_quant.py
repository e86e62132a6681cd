from __future__ import annotations

from llmkern.testing.cases._norm import FUSED_SIZES, norm_cases

CASES = norm_cases("rms_norm_quant", optional=("weight_offset",), sizes=FUSED_SIZES, codes_of="rms_norm")
