from __future__ import annotations

from llmkern.testing.cases._norm import norm_cases

CASES = norm_cases("rms_norm", optional=("weight_offset",), differentiable=("x", "weight", "bias"))
