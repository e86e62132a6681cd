from __future__ import annotations

from llmkern.testing.cases._norm import norm_cases

CASES = norm_cases("layer_norm", differentiable=("x", "weight", "bias"))
